"""Updates left out: what a non-finite update leaves behind."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fptt_jax._trees import zero_unless
from fptt_jax.losses import LossState, Memory


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


def finite_influence(new: Any, old: Any, keeps: bool) -> Any:
  """Return the influence after an update without non-finite numbers.

  Args:
    new: The influence after the update.
    old: The influence before it.
    keeps: Whether the influence is learned. Then the whole of the old one replaces a
      new one that is not finite; otherwise rows that are not finite become 0.
  """
  if keeps:
    return optax.tree.where(all_finite(new), new, old)
  leaves = jax.tree.leaves(new)
  if not leaves:
    return new
  finite = [jnp.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves]
  rows = functools.reduce(jnp.logical_and, finite)

  def put(leaf: jax.Array) -> jax.Array:
    # A leaf that all rows share is dropped with any of them.
    keep = rows if len(leaf) == len(rows) else rows.all(keepdims=True)
    cleared: jax.Array = zero_unless(keep, leaf)
    return cleared

  return jax.tree.map(put, new)


def all_finite(tree: Any) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
