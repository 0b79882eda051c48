"""One update: gradient steps on the objective of its windows, each from one state."""

import dataclasses
from typing import Any, NamedTuple

import jax
import optax

from fptt_jax._batch import Batch
from fptt_jax._dtypes import widen
from fptt_jax._types import (
  Hidden,
  Params,
  UpdateInputs,
  UpdateResult,
)
from fptt_jax._usable import accepted_args
from fptt_jax._windows import WindowPlan
from fptt_jax.losses import LossState
from fptt_jax.parallel._placement import Gradient
from fptt_jax.training._credit import advance_influence
from fptt_jax.training._optimizer import make_extra_args
from fptt_jax.training._schedules import UpdatePlan
from fptt_jax.training._skip import must_skip, next_loss_state, usable_influence
from fptt_jax.training._spec import StepSpec


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
    begun: bool [] or [B], whether a row has a step before the update's first window.
  """

  schedule: tuple[jax.Array, jax.Array, jax.Array]
  first: jax.Array
  occupied: jax.Array | None
  begun: jax.Array


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
class Constants:
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
    first_influence: State that a learned influence restarts from, or None.
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
  first_influence: Any


def run_update(
  constants: Constants, carried: tuple[Carry, jax.Array | None], turn: Turn
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
    influence = advance_influence(spec, constants.windows, params, inputs, move.result)
  params, opt_state = move.params, move.opt_state
  if active is not None:
    # A window without a valid step makes no update. A cond would copy the carry.
    params, opt_state = optax.tree.where(
      active, (params, opt_state), (carry.params, carry.opt_state)
    )
  skip = None
  if spec.skip_nonfinite:
    skip = must_skip((move.measured, early), carry, params, opt_state)
  result = move.result
  # With one window per update, the loss's memory writes what it has observed.
  memory = spec.loss.memory if constants.plan.windows.shape[1] == 1 else None
  loss_state = next_loss_state(memory, carry.loss_state, result.loss_state, skip)
  moved = (params, opt_state, result.hidden, influence)
  totals = result.totals
  if skip is not None:
    kept = (carry.params, carry.opt_state, carry.hidden, carry.influence)
    nothing = optax.tree.zeros_like(totals)
    moved, totals = optax.tree.where(skip, (kept, nothing), (moved, totals))
  params, opt_state, hidden, influence = moved
  if skip is not None:
    # An influence that has run away would have every later update skipped.
    first = constants.first_influence
    influence = usable_influence(influence, carry.influence, skip, first)
  value, norm = move.measured
  seen = Seen(value, norm, totals, skip, move.credit_norm)
  carry = Carry(params, opt_state, hidden, loss_state, influence)
  return (carry, result.outputs), seen


def _update_inputs(
  constants: Constants, carry: Carry, outputs: jax.Array | None, turn: Turn
) -> UpdateInputs:
  """Collect what an update's objective depends on besides the parameters."""
  hidden = constants.start if constants.plan.restarts else carry.hidden
  fresh = constants.fresh
  if fresh is not None:
    # Only a sequence's first window depends on the learned initial state.
    fresh = fresh & ~turn.begun
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
  constants: Constants, inputs: UpdateInputs, carry: Carry, active: Any
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
  constants: Constants,
  inputs: UpdateInputs,
  params: Params,
  opt_state: optax.OptState,
) -> Move:
  """Run one optimizer step on an update's objective, always from its hidden state."""
  spec = constants.spec

  def gradient(params: Params) -> tuple[jax.Array, Params, UpdateResult]:
    return constants.gradient(params, inputs)

  value, grads, result = gradient(params)
  extra_args = make_extra_args(
    gradient, value, grads, spec.inner_steps, inputs.schedule
  )
  given = accepted_args(spec.optimizer.update, extra_args)
  changes, opt_state = spec.optimizer.update(grads, opt_state, params, **given)
  params = optax.apply_updates(params, changes)
  # float16 cannot hold the square of a number above 255.
  norm = optax.tree.norm(jax.tree.map(widen, grads))
  credit_norm = None
  if spec.influence is not None:
    credit_norm = optax.tree.norm(jax.tree.map(widen, result.credit))
  return Move(params, opt_state, (value, norm), result, credit_norm)
