"""The train step: a scan over the windows of a sequence, one update in each turn.

A time-major batch is cut into K windows. In each, the model runs over S steps from the
carried hidden state, the loss gives a scalar, and its gradient goes to the optimizer.
Parameters, optimizer state, hidden state and loss state go on to the next window.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import optax

from fptt_jax._batch import Batch, check_shapes, targets_by_row
from fptt_jax._dtypes import widen
from fptt_jax._summary import lambda_norm
from fptt_jax._types import (
  Hidden,
  Params,
  StepMetrics,
  TrainState,
  UpdateInputs,
  UpdateResult,
)
from fptt_jax._usable import accepted
from fptt_jax._windows import ValidSteps, WindowPlan, lengths_in_range, valid_steps
from fptt_jax.losses import Loss, LossState
from fptt_jax.parallel._collectives import (
  all_over_devices,
  any_over_devices,
  fold_device,
  max_over_devices,
)
from fptt_jax.parallel._placement import Gradient, Placement
from fptt_jax.training._schedules import UpdatePlan, plan_updates
from fptt_jax.training._spec import StepSpec
from fptt_jax.training._window import (
  advance_influence,
  empty_outputs,
  run_prefix,
  start_rows,
  update_gradient,
)


class Carry(NamedTuple):
  """Carry of the scan over the updates of a sequence.

  Attributes:
    params: W.
    opt_state: State of the optimizer.
    hidden: [B, ...], hidden state after the last window.
    loss_state: State of the loss.
    influence: [B, ...], influence on the hidden state; () without one.
  """

  params: Params
  opt_state: optax.OptState
  hidden: Hidden
  loss_state: LossState
  influence: Any


class Turn(NamedTuple):
  """One turn of the scan.

  Attributes:
    schedule: The update's row of the :class:`UpdatePlan`: windows, coefficients and
      records, each [V].
    first: int [], first step of its newest window.
    occupied: bool [], whether that window has a valid step; None without a mask.
  """

  schedule: tuple[jax.Array, jax.Array, jax.Array]
  first: jax.Array
  occupied: jax.Array | None


class Seen(NamedTuple):
  """Measurements of one update; the scan stacks them to [U, ...].

  Attributes:
    value: [], objective before the update.
    grad_norm: [], global norm of its gradient.
    totals: Metrics.
    skipped: bool [], or None without `skip_nonfinite`.
    credit_norm: [], global norm of the credit from beyond the window, or None without
      an influence.
  """

  value: jax.Array
  grad_norm: jax.Array
  totals: Any
  skipped: jax.Array | None
  credit_norm: jax.Array | None


class Move(NamedTuple):
  """One optimizer step.

  Attributes:
    params: Parameters after it.
    opt_state: Optimizer state after it.
    measured: Objective and gradient norm before it.
    result: Other results of its windows.
    credit_norm: [], norm of the credit from beyond the window, or None.
  """

  params: Params
  opt_state: optax.OptState
  measured: tuple[jax.Array, jax.Array]
  result: UpdateResult
  credit_norm: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Constants:
  """Constants of all updates of one sequence.

  Attributes:
    spec: Options of the trainer.
    gradient: Gradient of an update's objective.
    windows: Where the windows lie.
    batch: The batch.
    key: PRNG key of the sequence.
    plan: Which windows each update runs through.
    start: [B, ...], hidden state before the first window.
    fresh: bool [B], rows that start from the learned initial state, or None.
    first_loss_state: State of the loss before the sequence.
    longest: int [], steps of the longest sequence, or None.
  """

  spec: StepSpec
  gradient: Gradient
  windows: WindowPlan
  batch: Batch
  key: jax.Array
  plan: UpdatePlan
  start: Hidden
  fresh: jax.Array | None
  first_loss_state: LossState
  longest: jax.Array | None


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
  fresh = _fresh_rows(spec, placement, state, windows)
  start = state.hidden
  if windows.starts[0] > 0:
    prefix = placement.wrap_prefix(functools.partial(run_prefix, spec))
    start = prefix(state.params, state.hidden, batch, key)
  valid = valid_steps(windows, batch_size, batch.lengths, batch.mask)
  batch = clear_idle_targets(spec.loss, batch, valid)
  gradient = functools.partial(update_gradient, spec, windows, plan)
  constants = _Constants(
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
  )
  outputs = None
  if spec.return_outputs:
    outputs = empty_outputs(spec.model, state.params, state.hidden, batch, windows.size)
  carry = Carry(
    state.params, state.opt_state, state.hidden, state.loss_state, state.influence
  )
  turns = _turns(spec, placement, windows, plan, valid)
  body = functools.partial(_run_update, constants)

  def scan(carried: Any) -> Any:
    return jax.lax.scan(body, carried, turns)

  in_range = batch_in_range(spec.loss, batch, placement.step_axis)
  (carry, outputs), seen = _run_if(in_range, scan, (carry, outputs))
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
  invalid = _invalid_updates(seen, in_range)
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


def _run_update(
  constants: _Constants, carried: tuple[Carry, jax.Array | None], turn: Turn
) -> tuple[tuple[Carry, jax.Array | None], Seen]:
  """Run one update: `inner_steps` optimizer steps on the objective of its windows."""
  carry, outputs = carried
  spec = constants.spec
  active = turn.occupied
  if constants.longest is not None:
    active = constants.longest > turn.first
  inputs = _update_inputs(constants, carry, outputs, turn)
  params, opt_state, early = _run_early_steps(constants, inputs, carry, active)
  move = _optimizer_step(constants, inputs, params, opt_state)
  influence = carry.influence
  if spec.influence is not None:
    # With the parameters of the pass that gave the hidden state.
    influence = advance_influence(spec, constants.windows, params, inputs)
  params, opt_state = move.params, move.opt_state
  if active is not None:
    # A window without a valid step makes no update. A cond would copy the carry.
    params, opt_state = optax.tree.where(
      active, (params, opt_state), (carry.params, carry.opt_state)
    )
  skip = None
  if spec.skip_nonfinite:
    skip = ~_all_finite((move.measured, early, lambda_norm(opt_state)))
  result = move.result
  loss_state = _next_loss_state(constants, carry.loss_state, result.loss_state, skip)
  moved = (params, opt_state, result.hidden, influence)
  totals = result.totals
  if skip is not None:
    kept = (carry.params, carry.opt_state, carry.hidden, carry.influence)
    nothing = optax.tree.zeros_like(totals)
    moved, totals = optax.tree.where(skip, (kept, nothing), (moved, totals))
  params, opt_state, hidden, influence = moved
  if skip is not None:
    # An influence that has overflowed would have every later update skipped.
    influence = _finite_rows(influence)
  value, norm = move.measured
  seen = Seen(value, norm, totals, skip, move.credit_norm)
  carry = Carry(params, opt_state, hidden, loss_state, influence)
  return (carry, result.outputs), seen


def _update_inputs(
  constants: _Constants, carry: Carry, outputs: jax.Array | None, turn: Turn
) -> UpdateInputs:
  """Collect what an update's objective depends on besides the parameters."""
  hidden = constants.start if constants.plan.restarts else carry.hidden
  fresh = constants.fresh
  if fresh is not None:
    # Only a sequence's first window depends on the learned initial state.
    windows, _, _ = turn.schedule
    fresh = fresh & (windows[0] == 0)
  return UpdateInputs(
    hidden=jax.lax.stop_gradient(hidden),
    fresh=fresh,
    batch=constants.batch,
    key=constants.key,
    loss_state=carry.loss_state,
    schedule=turn.schedule,
    first_loss_state=constants.first_loss_state,
    outputs=outputs,
    influence=carry.influence,
  )


def _run_early_steps(
  constants: _Constants, inputs: UpdateInputs, carry: Carry, active: Any
) -> tuple[Params, optax.OptState, Any]:
  """Run all inner steps but the last.

  Returns:
    Parameters and optimizer state after them and, with `skip_nonfinite`, what they
    measured.
  """
  spec = constants.spec
  if spec.inner_steps == 1:
    return carry.params, carry.opt_state, None

  def body(moved: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], Any]:
    move = _optimizer_step(constants, inputs, *moved)
    after = (move.params, move.opt_state)
    if active is not None and constants.plan.restarts:
      # The last pass starts anew and must not see parameters that are put back.
      after = optax.tree.where(active, after, moved)
    return after, move.measured if spec.skip_nonfinite else None

  before = (carry.params, carry.opt_state)
  after, measured = jax.lax.scan(body, before, length=spec.inner_steps - 1)
  return *after, measured


def _optimizer_step(
  constants: _Constants,
  inputs: UpdateInputs,
  params: Params,
  opt_state: optax.OptState,
) -> Move:
  """Run one optimizer step on an update's objective, always from its hidden state."""
  optimizer = constants.spec.optimizer

  def gradient(params: Params) -> tuple[jax.Array, Params, UpdateResult]:
    return constants.gradient(params, inputs)

  def grad_fn(params: Params, step: Any = None) -> Params:
    return gradient(params)[1]

  value, grads, result = gradient(params)
  extra_args = {
    'value': value,
    'grad': grads,
    'value_fn': _value_fn(gradient),
    'grad_fn': grad_fn,
    'inner_steps': constants.spec.inner_steps,
  }
  changes, opt_state = optimizer.update(
    grads, opt_state, params, **accepted(optimizer.update, extra_args)
  )
  params = optax.apply_updates(params, changes)
  # float16 cannot hold the square of a number above 255.
  norm = optax.tree.norm(jax.tree.map(widen, grads))
  credit_norm = None
  if constants.spec.influence is not None:
    credit_norm = optax.tree.norm(jax.tree.map(widen, result.credit))
  return Move(params, opt_state, (value, norm), result, credit_norm)


def _value_fn(
  gradient: Callable[[Params], tuple[jax.Array, Params, UpdateResult]],
) -> Callable[..., jax.Array]:
  """Return an objective whose gradient is the mean over the devices.

  Args:
    gradient: (params) -> (value, gradient, result).
  """

  @jax.custom_vjp
  def objective(params: Params) -> jax.Array:
    value, _, _ = gradient(params)
    return value

  def forward(params: Params) -> tuple[jax.Array, Params]:
    value, grads, _ = gradient(params)
    return value, grads

  def backward(grads: Params, cotangent: jax.Array) -> tuple[Params]:
    # JAX's convention: the conjugate of optax's for complex parameters.
    return (jax.tree.map(lambda g: jnp.conj(g) * cotangent.astype(g.dtype), grads),)

  def value_fn(
    params: Params, *, grad_fn: Any = None, inner_steps: Any = None
  ) -> jax.Array:
    # Optax's line searches pass on extra arguments that they do not know.
    del grad_fn, inner_steps
    value: jax.Array = objective(params)
    return value

  objective.defvjp(forward, backward)
  return value_fn


def _next_loss_state(
  constants: _Constants, old: LossState, new: LossState, skip: jax.Array | None
) -> LossState:
  """Return the loss state after an update, unless the update is skipped."""
  memory = constants.spec.loss.memory
  if memory is not None and constants.plan.windows.shape[1] == 1:
    # `new` is a note, of which only a part of the state is written.
    keep = True if skip is None else ~skip
    return memory.write(old, new, keep)
  if skip is not None:
    return optax.tree.where(skip, old, new)
  return new


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


def _invalid_updates(seen: Seen, in_range: jax.Array | None) -> jax.Array:
  """Return bool [U], all True for an invalid batch."""
  if in_range is None:
    return jnp.zeros(seen.value.shape, bool)
  return jnp.broadcast_to(~in_range, seen.value.shape)


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
  return Turn(schedule, jnp.asarray(starts), occupied)


def _longest(placement: Placement, batch: Batch, valid: ValidSteps) -> jax.Array | None:
  """Return the length of the longest sequence; None if a mask or nothing tells."""
  if valid.seen is not None or not valid.ragged:
    return None
  longest = jnp.max(jnp.asarray(batch.lengths, jnp.int32))
  return max_over_devices(longest, placement.step_axis)


def _fresh_rows(
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
    same.append((leaf == start).reshape(rows, -1).all(1))
  return jnp.stack(same).all(0)


def _check_ragged(spec: StepSpec, batch: Batch) -> None:
  """Raise a ValueError for ragged batches where the method excludes them."""
  for field in ('lengths', 'mask'):
    if spec.method.truncated and getattr(batch, field) is not None:
      raise ValueError(
        "method 'tbptt_final' differentiates the last steps before T and excludes "
        f'ragged batches: got {field}.'
      )


def clear_idle_targets(loss: Loss, batch: Batch, valid: ValidSteps) -> Batch:
  """Put 0 in place of targets [B, ...] of sequences without any valid step.

  NaN there would come back as a NaN gradient, although it counts for nothing.
  """
  if batch.mask is None or not targets_by_row(loss):
    return batch

  def cleared(leaf: Any) -> jax.Array:
    target = jnp.asarray(leaf)
    counts = (valid.lengths > 0).reshape(-1, *[1] * (target.ndim - 1))
    return jnp.where(counts, target, jnp.zeros([], target.dtype))

  return batch._replace(targets=jax.tree.map(cleared, batch.targets))


def batch_in_range(loss: Loss, batch: Batch, axis: str | None) -> jax.Array | None:
  """Return bool [], whether all targets and lengths are in range.

  Args:
    loss: Loss, whose `valid` looks at the targets.
    batch: One device's rows of the batch, or all.
    axis: Name of the mesh axis to take all devices' answers over; None for these rows.

  Returns:
    None where neither targets nor lengths can be out of range.
  """
  num_steps, batch_size = jax.tree.leaves(batch.inputs)[0].shape[:2]
  mask = jnp.ones((num_steps, batch_size), bool)
  if batch.mask is not None:
    mask = jnp.asarray(batch.mask)
  valid = []
  if batch.lengths is not None:
    lengths = jnp.asarray(batch.lengths, jnp.int32)
    valid.append(lengths_in_range(lengths, num_steps))
    mask &= jnp.arange(num_steps)[:, None] < lengths[None, :]
  if loss.valid is not None:
    valid.append(loss.valid(batch.targets, mask))
  if not valid:
    return None
  return all_over_devices(jnp.stack(valid).all(), axis)


def _run_if(
  valid: jax.Array | None, run: Callable[[Any], Any], carried: Any
) -> tuple[tuple[Carry, jax.Array | None], Seen]:
  """Run the scan if the batch is valid; otherwise return the carry as it is.

  Args:
    valid: bool [], or None to run in any case.
    run: (carried) -> (carried, what was seen).
    carried: What the scan starts from.

  Returns:
    The result of `run`. Of an invalid batch, losses and norms are NaN and totals 0.
  """
  if valid is None:
    return run(carried)
  # Traced once, for both branches.
  jaxpr, shape = jax.make_jaxpr(run, return_shape=True)(carried)
  structure: Any = jax.tree.structure(shape)

  def train(carried: Any) -> Any:
    leaves = jax.extend.core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(carried))
    return structure.unflatten(leaves)

  def refuse(carried: Any) -> Any:
    _, seen = shape
    nothing = Seen(
      value=jnp.full(seen.value.shape, jnp.nan, seen.value.dtype),
      grad_norm=jnp.full(seen.grad_norm.shape, jnp.nan, seen.grad_norm.dtype),
      totals=optax.tree.zeros_like(seen.totals),
      skipped=optax.tree.zeros_like(seen.skipped),
      credit_norm=optax.tree.full_like(seen.credit_norm, jnp.nan),
    )
    return carried, nothing

  return jax.lax.cond(valid, train, refuse, carried)


def _finite_rows(influence: Any) -> Any:
  """Return the influence with 0 in the rows that hold a non-finite number."""
  leaves = jax.tree.leaves(influence)
  if not leaves:
    return influence
  finite = [jnp.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves]
  rows = functools.reduce(jnp.logical_and, finite)

  def put(leaf: jax.Array) -> jax.Array:
    # A leaf that all rows share is dropped with any of them.
    keep = rows if len(leaf) == len(rows) else rows.all(keepdims=True)
    keep = keep.reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.where(keep, leaf, jnp.zeros([], leaf.dtype))

  return jax.tree.map(put, influence)


def _all_finite(tree: Any) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
