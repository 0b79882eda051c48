"""The hidden state that a sequence's first window starts from."""

import jax
import jax.numpy as jnp

from fptt_jax._batch import Batch, check_shapes
from fptt_jax._trees import where_rows
from fptt_jax._types import (
  Hidden,
  Model,
  Params,
  TrainState,
)
from fptt_jax._windows import ValidSteps, WindowPlan
from fptt_jax.parallel._placement import Placement
from fptt_jax.training._spec import StepSpec


def fresh_rows(
  spec: StepSpec, placement: Placement, state: TrainState, windows: WindowPlan
) -> jax.Array | None:
  """Return which rows start from the learned initial state, bool [B].

  Returns:
    None if the initial state is constant, or is not in a window.
  """
  if spec.model.learned_initial_state is None or windows.starts[0] > 0:
    return None
  leaves = jax.tree.leaves(state.hidden)
  rows = leaves[0].shape[0]
  if not spec.carry_hidden:
    return jnp.ones(rows, bool)
  # A carried row that still is the initial state starts its sequence here.
  axis = placement.step_axis
  starts = jax.tree.leaves(start_rows(spec.model, state.params, rows, axis))
  same = []
  for leaf, start in zip(leaves, starts, strict=True):
    same.append(_agree(leaf, start).reshape(rows, -1).all(1))
  return jnp.stack(same).all(0)


def start_idle_rows(
  spec: StepSpec,
  placement: Placement,
  params: Params,
  hidden: Hidden,
  fresh: jax.Array | None,
  valid: ValidSteps,
) -> Hidden:
  """Put the initial state of the new parameters into rows that have not begun.

  Otherwise the next batch would take the initial state of older parameters for a state
  that was carried on.

  Args:
    spec: Options of the trainer.
    placement: Where the arrays lie.
    params: Parameters after all updates.
    hidden: [B, ...], the state to carry on.
    fresh: bool [B], rows that started from the learned initial state, or None.
    valid: Valid steps of the batch.
  """
  # A length is at least one step.
  if fresh is None or valid.mask is None:
    return hidden
  idle = fresh & (valid.lengths == 0)
  start = start_rows(spec.model, params, len(idle), placement.step_axis)
  return where_rows(idle, start, hidden)


def _agree(leaf: jax.Array, start: jax.Array) -> jax.Array:
  """Return where a carried state still is the initial one, up to rounding."""
  start = start.astype(leaf.dtype)
  # In half precision a state that moves slowly is as near.
  if not jnp.issubdtype(leaf.dtype, jnp.inexact) or jnp.finfo(leaf.dtype).bits < 32:
    return leaf == start
  # Another program, such as that of `init`, may round an initial state that is
  # computed in another way.
  return jnp.abs(leaf - start) <= 4 * jnp.finfo(leaf.dtype).eps * jnp.abs(start)


def run_prefix(
  spec: StepSpec, params: Params, hidden: Hidden, batch: Batch, key: jax.Array
) -> Hidden:
  """Return the hidden state [B, ...] after the steps before the first window."""
  num_steps, _ = check_shapes(batch)
  windows = spec.plan_windows(num_steps)
  first = windows.starts[0]
  prefix = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:first], batch.inputs)
  # The windows' keys are folded from 0..K-1.
  key = jax.random.fold_in(key, windows.num_windows)
  new_hidden, _ = spec.model.apply(params, hidden, prefix, None, key)
  return new_hidden


def start_rows(model: Model, params: Params, rows: int, axis: str | None) -> Hidden:
  """Return one device's rows of the initial state of the whole batch."""
  if axis is None:
    return model.start(params, rows)
  # Rows may start differently, so that each device takes its own.
  whole = model.start(params, rows * jax.lax.axis_size(axis))
  first = jax.lax.axis_index(axis) * rows
  return jax.tree.map(
    lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, rows), whole
  )


def with_start(
  spec: StepSpec, params: Params, hidden: Hidden, fresh: jax.Array
) -> Hidden:
  """Put the initial state of these parameters into the rows that are fresh."""
  start = start_rows(spec.model, params, len(fresh), spec.axis)
  return where_rows(fresh, start, hidden)
