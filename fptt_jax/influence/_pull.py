"""Pull-backs of a window's end to the parameters, row by row, and to its start.

Only the chain of hidden states runs step by step, backward. The gradient of the
parameters is then one product over all steps of a row, as for a batch of S rows that
run one step. So no array grows with both S and the number of parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fptt_jax._types import Hidden, Params
from fptt_jax.influence._arrays import (
  Weights,
  join,
  replace,
  select,
  split,
  take_arrays,
)
from fptt_jax.influence._base import WindowMap


def run_steps(window: WindowMap, params: Params, hidden: Hidden) -> Hidden:
  """Return the hidden states before each step of a window, [S, B, ...].

  Args:
    window: The window.
    params: Parameters of the model.
    hidden: [B, ...], hidden state after the window before.
  """

  def body(hidden: Hidden, step: tuple[Any, Any]) -> tuple[Hidden, Hidden]:
    return window.run(params, hidden, *_one_step(step)), hidden

  start = window.begin(params, hidden)
  _, before = jax.lax.scan(body, start, (window.x, window.mask))
  return before


def pull_back(
  window: WindowMap,
  params: Params,
  paths: tuple[str, ...],
  hidden: Hidden,
  cotangents: jax.Array,
) -> tuple[Weights, jax.Array]:
  """Pull gradients of the hidden state after a window back through it, row by row.

  Args:
    window: The window.
    params: Parameters of the model.
    paths: Which of them to differentiate.
    hidden: [B, ...], hidden state after the window before.
    cotangents: [n, B, N], n gradients of the hidden state after the window.

  Returns:
    Their gradients with respect to the parameters, {path: [B, n, ...]}, and with
    respect to `hidden`, [n, B, N].
  """
  before = run_steps(window, params, hidden)
  first, steps = pull_through_steps(window, params, before, cotangents)
  gradients = pull_to_weights(window, params, paths, before, steps)
  gradients, first = pull_to_start(window, params, gradients, first)
  return numbered_first(gradients), first


def inner_axis(ndim: int) -> int:
  """Return the axis of the n gradients of a parameter of `ndim` axes, for each row.

  It stands before the parameter's last axis, where a product over the steps puts it
  without a transposition: [B, ..., n, G].
  """
  return max(ndim, 1)


def numbered_first(gradients: Weights) -> Weights:
  """Return gradients [B, ..., n, G] as [B, n, ..., G]."""

  def move(leaf: jax.Array) -> jax.Array:
    return jnp.moveaxis(leaf, inner_axis(leaf.ndim - 2), 1)

  return {path: move(leaf) for path, leaf in gradients.items()}


def _pull_all(
  pull: Callable[[jax.Array], tuple[Weights]],
  weights: Weights,
  cotangents: jax.Array,
  axis: int,
) -> Weights:
  """Pull n cotangents of one row back, to gradients [..., n, G]."""
  places = {path: inner_axis(leaf.ndim) - 1 for path, leaf in weights.items()}

  def one(cotangent: jax.Array) -> Weights:
    [gradients] = pull(cotangent)
    return gradients

  gradients: Weights = jax.vmap(one, in_axes=axis, out_axes=places)(cotangents)
  return gradients


def pull_through_steps(
  window: WindowMap, params: Params, before: Hidden, cotangents: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Pull gradients back from step to step.

  Args:
    window: The window.
    params: Parameters of the model.
    before: [S, B, ...], hidden states before each step.
    cotangents: [n, B, N], gradients of the hidden state after the window.

  Returns:
    Gradients of the state before the first step [n, B, N], and of the states after each
    step [S, n, B, N].
  """

  def body(after: jax.Array, step: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    hidden, *inputs = step

    def run(rows: jax.Array) -> jax.Array:
      return join(window.run(params, split(rows, hidden), *_one_step(inputs)))

    _, pull = jax.vjp(run, join(hidden))
    [gradients] = jax.vmap(pull)(after)
    return gradients, after

  steps = (before, window.x, window.mask)
  return jax.lax.scan(body, cotangents, steps, reverse=True)


def pull_to_weights(
  window: WindowMap,
  params: Params,
  paths: tuple[str, ...],
  before: Hidden,
  cotangents: jax.Array,
  arrays: tuple[int, ...] | None = None,
) -> Weights:
  """Pull gradients of the state after each step back to the parameters of that step.

  Args:
    window: The window.
    params: Parameters of the model.
    paths: Which of them to differentiate.
    before: [S, B, ...], hidden states before each step.
    cotangents: [S, n, B, N], gradients of the states after each step.
    arrays: Numbers of the floating-point arrays of the state that the gradients are of;
      None for all.

  Returns:
    Sums over the steps, {path: [B, ..., n, G]}; see `inner_axis`.
  """
  weights = select(params, paths)

  def one_row(hidden: Hidden, x: Any, mask: Any, after: jax.Array) -> Weights:
    # The S steps of a row, as S rows that run one step.
    def run(weights: Weights) -> jax.Array:
      new_params = replace(params, weights)
      new_hidden = window.run(new_params, hidden, *_one_step((x, mask)))
      if arrays is not None:
        # What comes after these arrays in the step then needs no derivative.
        new_hidden = take_arrays(new_hidden, arrays)
      return join(new_hidden)

    _, pull = jax.vjp(run, weights)
    return _pull_all(pull, weights, after, axis=1)

  rows = jax.vmap(one_row, in_axes=(1, 1, 1, 2))
  gradients: Weights = rows(before, window.x, window.mask, cotangents)
  return gradients


def pull_to_start(
  window: WindowMap, params: Params, gradients: Weights, first: jax.Array
) -> tuple[Weights, jax.Array]:
  """Pull gradients of the first state back to what it was made of.

  Args:
    window: The window.
    params: Parameters of the model.
    gradients: {path: [B, ..., n, G]}, gradients of the parameters so far.
    first: [n, B, N], gradients of the state before the first step.

  Returns:
    The gradients of the parameters, those of the learned initial state included, and of
    the hidden state after the window before, which fresh rows do not read.
  """
  if window.start is None or window.fresh is None:
    return gradients, first
  start = window.start
  fresh = window.fresh[None, :, None]
  weights = select(params, gradients)

  def one_row(number: jax.Array, after: jax.Array) -> Weights:
    def run(weights: Weights) -> jax.Array:
      return join(start(replace(params, weights)))[number]

    _, pull = jax.vjp(run, weights)
    return _pull_all(pull, weights, after, axis=0)

  into_start = jnp.where(fresh, first, 0)
  numbers = jnp.arange(into_start.shape[1])
  through_start = jax.vmap(one_row, in_axes=(0, 1))(numbers, into_start)
  total = jax.tree.map(jnp.add, gradients, through_start)
  return total, jnp.where(fresh, 0, first)


def _one_step(inputs: Any) -> Any:
  """Return inputs and mask of several rows as a window of one step."""
  return jax.tree.map(lambda leaf: leaf[None], tuple(inputs))
