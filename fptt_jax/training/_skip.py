"""Updates left out: what a non-finite update leaves behind."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fptt_jax._dtypes import widen
from fptt_jax._summary import lambda_norm
from fptt_jax._trees import zero_unless
from fptt_jax._types import Params
from fptt_jax.losses import LossState, Memory

RUNAWAY = 1e12
"""Size of a number above which an influence starts anew if an update is skipped."""


def next_loss_state(
  memory: Memory | None, old: LossState, new: LossState, skip: jax.Array | None
) -> LossState:
  """Return the loss state after an update; the old one if the update is skipped.

  Args:
    memory: How the loss writes what it has observed, or None.
    old: Loss state before the update.
    new: Loss state after it or, with a memory, what the loss has observed.
    skip: bool [], or None to skip nothing.
  """
  if memory is not None:
    # Only a part of the state is written.
    keep = True if skip is None else ~skip
    return memory.write(old, new, keep)
  if skip is not None:
    return optax.tree.where(skip, old, new)
  return new


def usable_influence(new: Any, old: Any, skip: jax.Array, first: Any) -> Any:
  """Return the influence after an update without numbers that ran away.

  A number has run away if it is not finite or, where the update is skipped, if it is
  above `RUNAWAY`. Rows with such numbers become 0.

  Args:
    new: The influence after the update, or before it where the update is skipped.
    old: The influence before it.
    skip: bool [], whether the update is skipped.
    first: The state before the first step of an influence that is learned, or None. If
      it is given, `old` takes the place of a new state that is not finite, and `first`
      that of a state that ran away.
  """
  if first is not None:
    kept = optax.tree.where(all_finite(new), new, old)
    return optax.tree.where(skip & ~_near_rows(kept, skip).all(), first, kept)
  if not jax.tree.leaves(new):
    return new
  rows = _near_rows(new, skip)

  def put(leaf: jax.Array) -> jax.Array:
    # A leaf that all rows share is dropped with any of them.
    keep = rows if len(leaf) == len(rows) else rows.all(keepdims=True)
    cleared: jax.Array = zero_unless(keep, leaf)
    return cleared

  return jax.tree.map(put, new)


def _near_rows(influence: Any, skip: jax.Array) -> jax.Array:
  """Return which rows hold finite numbers alone, below `RUNAWAY` where `skip`."""
  limit = jnp.where(skip, RUNAWAY, jnp.inf)
  near = [
    (jnp.isfinite(leaf) & (jnp.abs(widen(leaf)) <= limit)).reshape(len(leaf), -1).all(1)
    for leaf in jax.tree.leaves(influence)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  return functools.reduce(jnp.logical_and, near)


def all_finite(tree: Any) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def must_skip(
  measured: Any, carry: Any, params: Params, opt_state: optax.OptState
) -> jax.Array:
  """Return bool [], whether an update measured or left a number that is not finite.

  Args:
    measured: Tree of measurements.
    carry: What the update started from. Weights that were not finite there, such as a
      mask of -inf, do not count.
    params: Parameters after it.
    opt_state: Optimizer state after it, whose λ counts.
  """
  fits = [all_finite((measured, lambda_norm(opt_state)))]
  for new, old in zip(
    jax.tree.leaves(params), jax.tree.leaves(carry.params), strict=True
  ):
    fits.append((jnp.isfinite(new) | ~jnp.isfinite(old)).all())
  return ~jnp.stack(fits).all()
