"""Losses from a single function of the user's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._trees import shapes
from fptt_jax._windows import WindowView, is_time_major, take_steps
from fptt_jax.losses._base import Loss, LossState, MetricSums, no_state, totals_where

WindowFunction = Callable[[jax.Array, Any, WindowView], jax.Array]


def from_function(
  function: WindowFunction,
  measure: Callable[[jax.Array, Any, WindowView], MetricSums] | None = None,
  *,
  terminal: bool | None = None,
) -> Loss:
  """Make a :class:`Loss` from a pure function of one window.

  The function selects what it needs from the targets: `window.slice(targets)` returns
  the window's steps of a time-major array, `window.mask` [S, B] tells which steps are
  valid, and `window.last` is each sequence's last valid step.

  Args:
    function: (outputs [S, B, ...], targets, window) -> scalar loss of the window.
    measure: The metrics that evaluation reports, see :class:`Loss`. The default is the
      function's value as 'loss', averaged as `terminal` describes. Evaluation uses its
      own windows of about √T steps. In a ragged batch on a mesh the function is
      measured on each device's rows alone; give a measure if it needs the whole batch.
    terminal: How the default measure averages. False: the mean over windows, weighted
      by their valid steps, which is right for a function that is a mean over steps.
      True: the function at each sequence's last step only. It gets that step as a
      window of one step with outputs [1, B, ...]. In a ragged batch it gets one
      sequence at a time, and the mean over sequences is taken. None: True if no target
      has a time axis, False if all targets are [T, B, ...].

  Returns:
    A :class:`Loss` without state.

  Raises:
    ValueError: When a batch is validated or a step is traced, if `terminal` is None and
      the shapes of the targets do not determine it: some have a time axis and others
      have none, there are no targets, or T = B.

  Example:
    >>> import jax.numpy as jnp
    >>> from fptt_jax.losses import from_function
    >>> def absolute_error(outputs, targets, window):
    ...   error = jnp.abs(outputs - window.slice(targets)).mean(-1)
    ...   return jnp.sum(error, where=window.mask) / jnp.maximum(window.mask.sum(), 1)
    >>> loss = from_function(absolute_error)
  """

  def apply(
    outputs: jax.Array, targets: Any, window: WindowView, loss_state: LossState
  ) -> tuple[jax.Array, LossState]:
    return function(outputs, targets, window), loss_state

  def default_measure(
    outputs: jax.Array, targets: Any, window: WindowView
  ) -> MetricSums:
    if _is_terminal(terminal, targets, window.num_steps, window.mask.shape[1]):
      return _measure_last_steps(function, outputs, targets, window)
    return _measure_steps(function, outputs, targets, window)

  def check(targets: Any, valid: np.ndarray) -> None:
    # Only the default measure depends on the shapes.
    if measure is None:
      _is_terminal(terminal, targets, *valid.shape)

  return Loss(
    init=no_state,
    apply=apply,
    measure=measure or default_measure,
    check=check,
    terminal=bool(terminal),
  )


def _is_terminal(
  terminal: bool | None, targets: Any, num_steps: int, batch_size: int
) -> bool:
  """Return `terminal`, or what the targets' shapes imply if it is None."""
  if terminal is not None:
    return terminal
  leaf_shapes = [np.shape(leaf) for leaf in jax.tree.leaves(targets)]
  time_major = [shape[:2] == (num_steps, batch_size) for shape in leaf_shapes]
  # With T = B, targets [B, ...] and [T, B, ...] cannot be told apart.
  certain = num_steps != batch_size or not any(time_major)
  if leaf_shapes and certain and all(time_major) == any(time_major):
    return not any(time_major)
  raise ValueError(
    'terminal must be True (one target per sequence) or False (one per step) for '
    f'targets {shapes(targets)} with T={num_steps}, B={batch_size}, got None.'
  )


def _measure_steps(
  function: WindowFunction, outputs: jax.Array, targets: Any, window: WindowView
) -> MetricSums:
  """Return the function's value, weighted by the window's valid steps."""
  steps = window.mask.sum()
  if window.ragged:
    # Of this device's rows alone: sums are added up over devices afterwards.
    window = window._replace(axis=None)
  value = jnp.asarray(function(outputs, targets, window))
  wide = jnp.promote_types(value.dtype, jnp.float32)
  # The value of a window without valid steps may be NaN.
  total = jnp.where(steps > 0, steps.astype(wide) * value.astype(wide), 0)
  return {'count': steps, 'loss': total}


def _measure_last_steps(
  function: WindowFunction, outputs: jax.Array, targets: Any, window: WindowView
) -> MetricSums:
  """Return the function's sum at the last steps of the sequences that end here."""
  outputs = take_steps(outputs, window.last)
  if window.ragged:
    return _measure_each_last_step(function, outputs, targets, window)
  # All sequences end together, so the function gets all of them together.
  last_step = window._replace(
    size=1,
    masked=False,
    start=window.end - 1,
    last=0,
    mask=jnp.ones_like(window.mask[:1]),
  )
  value = function(outputs, targets, last_step)
  count = jnp.sum(window.ended, dtype=jnp.int32)
  total = jnp.where(count > 0, count.astype(jnp.float32) * value, 0)
  return {'count': count, 'loss': total}


def _measure_each_last_step(
  function: WindowFunction, outputs: jax.Array, targets: Any, window: WindowView
) -> MetricSums:
  """Return the function's sum over sequences, each with a window of its last step.

  Args:
    function: (outputs [1, 1, ...], targets, window) -> scalar.
    outputs: [1, B, ...].
    targets: A tree of arrays [B, ...] or [T, B, ...].
    window: The window of the whole batch.
  """
  sizes = (window.num_steps, window.mask.shape[1])

  def value_of(row: jax.Array) -> jax.Array:
    def take(leaf: jax.Array, axis: int) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(leaf, row, 1, axis)

    length = take(window.lengths, 0)
    step = window.start + jnp.asarray(window.last)[row]
    last_step = window._replace(
      size=1,
      masked=False,
      start=step,
      end=step + 1,
      lengths=length,
      seen=length,
      active=jnp.ones(1, bool),
      last=0,
      mask=jnp.ones((1, 1), bool),
      axis=None,
    )
    row_targets = jax.tree.map(
      lambda leaf: take(leaf, int(is_time_major(leaf, *sizes, True))), targets
    )
    return function(take(outputs, 1), row_targets, last_step)

  values = jax.vmap(value_of)(jnp.arange(len(window.lengths)))
  return totals_where(window.ended, {'loss': values})
