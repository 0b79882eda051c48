"""The train step: a scan over the windows of a sequence, one update in each turn.

A time-major batch is cut into K windows. In each, the model runs over S steps from the
carried hidden state, the loss gives a scalar, and its gradient goes to the optimizer.
Parameters, optimizer state, hidden state and loss state go on to the next window.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fptt_jax._batch import Batch, check_shapes
from fptt_jax._checks import describe, require
from fptt_jax._summary import lambda_norm
from fptt_jax._types import (
  StepMetrics,
  TrainState,
)
from fptt_jax._windows import ValidSteps, WindowPlan, valid_steps
from fptt_jax.parallel._collectives import (
  any_over_devices,
  fold_device,
  max_over_devices,
)
from fptt_jax.parallel._placement import Placement
from fptt_jax.training._invalid import (
  batch_in_range,
  invalid_updates,
  run_if,
)
from fptt_jax.training._objective import update_gradient
from fptt_jax.training._schedules import UpdatePlan, plan_updates
from fptt_jax.training._spec import StepSpec
from fptt_jax.training._start import fresh_rows, run_prefix, start_idle_rows
from fptt_jax.training._update import Carry, Constants, Seen, Turn, run_update
from fptt_jax.training._window import empty_outputs


def run_step(
  spec: StepSpec, placement: Placement, state: TrainState, batch: Batch
) -> tuple[TrainState, StepMetrics]:
  """Train on one batch of sequences.

  Args:
    spec: Options of the trainer.
    placement: Where the arrays lie.
    state: State before, with the hidden state that the sequences start from.
    batch: The batch, or one device's rows of it.

  Returns:
    The state after all updates, and what they measured.
  """
  num_steps, batch_size = check_shapes(batch)
  _check_ragged(spec, batch)
  windows = spec.plan_windows(num_steps)
  plan = plan_updates(spec.method, windows.num_windows)
  key = jax.random.fold_in(state.key, state.step_count)
  key = fold_device(key, placement.step_axis)
  fresh = fresh_rows(spec, placement, state, windows)
  start = state.hidden
  if windows.starts[0] > 0:
    prefix = placement.wrap_prefix(functools.partial(run_prefix, spec))
    start = prefix(state.params, state.hidden, batch, key)
  valid = valid_steps(windows, batch_size, batch.lengths, batch.mask)
  gradient = functools.partial(update_gradient, spec, windows, plan)
  constants = Constants(
    spec=spec,
    gradient=placement.wrap_gradient(gradient),
    windows=windows,
    batch=batch,
    key=key,
    plan=plan,
    start=start,
    fresh=fresh,
    first_loss_state=state.loss_state,
    longest=_longest(placement, batch, valid),
    first_influence=_first_influence(spec, state.influence),
  )
  outputs = None
  if spec.return_outputs:
    outputs = empty_outputs(spec.model, state.params, state.hidden, batch, windows.size)
  carry = Carry(
    state.params, state.opt_state, state.hidden, state.loss_state, state.influence
  )
  turns = _turns(spec, placement, windows, plan, valid)
  body = functools.partial(run_update, constants)

  def scan(carried: Any) -> Any:
    return jax.lax.scan(body, carried, turns)

  in_range = batch_in_range(spec.loss, batch, placement.step_axis)
  (carry, outputs), seen = run_if(in_range, scan, (carry, outputs))
  hidden = start_idle_rows(spec, placement, carry.params, carry.hidden, fresh, valid)
  carry = carry._replace(hidden=hidden)
  next_state = _next_state(state, carry)
  return next_state, _step_metrics(placement, carry, outputs, seen, in_range)


def _step_metrics(
  placement: Placement,
  carry: Carry,
  outputs: jax.Array | None,
  seen: Seen,
  in_range: jax.Array | None,
) -> StepMetrics:
  """Return the metrics of a step from what its updates measured, [U, ...]."""
  totals = placement.sum_totals(seen.totals)
  invalid = invalid_updates(seen.value.shape, in_range)
  return StepMetrics(
    loss=seen.value,
    grad_norm=seen.grad_norm,
    totals=totals,
    skipped=invalid if seen.skipped is None else invalid | seen.skipped,
    lambda_norm=lambda_norm(carry.opt_state),
    outputs=outputs,
    invalid=invalid,
    credit_norm=seen.credit_norm,
  )


def _next_state(state: TrainState, carry: Carry) -> TrainState:
  return TrainState(
    params=carry.params,
    opt_state=carry.opt_state,
    hidden=jax.lax.stop_gradient(carry.hidden),
    loss_state=carry.loss_state,
    key=state.key,
    step_count=optax.safe_increment(state.step_count),
    influence=carry.influence,
  )


def _turns(
  spec: StepSpec,
  placement: Placement,
  windows: WindowPlan,
  plan: UpdatePlan,
  valid: ValidSteps,
) -> Turn:
  """Return the turns of the scan, [U, ...]."""
  starts = windows.starts if spec.method.update_each_window else windows.starts[:1]
  occupied = valid.occupied()
  if occupied is not None:
    occupied = any_over_devices(occupied, placement.step_axis)
    occupied = (occupied[plan.windows] & plan.records).any(1)
  schedule = (
    jnp.asarray(plan.windows),
    jnp.asarray(plan.coefficients),
    jnp.asarray(plan.records),
  )
  before, first = valid.before(), plan.windows[:, 0]
  # With padding in front, a row's sequence starts in a later window.
  begun = jnp.asarray(first > 0) if before is None else before[first] > 0
  return Turn(schedule, jnp.asarray(starts), occupied, begun)


def _first_influence(spec: StepSpec, influence: Any) -> Any:
  """Return the state that a learned influence restarts from, or None."""
  if not spec.skip_nonfinite or spec.influence is None or not spec.influence.keeps:
    return None
  return spec.influence.restart(influence)


def _longest(placement: Placement, batch: Batch, valid: ValidSteps) -> jax.Array | None:
  """Return the length of the longest sequence; None if a mask or nothing tells."""
  if valid.seen is not None or not valid.ragged:
    return None
  longest = jnp.max(jnp.asarray(batch.lengths, jnp.int32))
  return max_over_devices(longest, placement.step_axis)


def _check_ragged(spec: StepSpec, batch: Batch) -> None:
  """Raise a ValueError for ragged batches where the method excludes them."""
  for field in ('lengths', 'mask'):
    given = getattr(batch, field)
    # The method differentiates the last steps before T.
    fits = given is None or not spec.method.truncated
    require(fits, field, "None with method 'tbptt_final'", describe(given))
