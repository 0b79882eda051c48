"""The objective of one update, and its gradient.

The objective is the weighted sum of the losses of the windows that the update runs
through, from a given hidden state. Most methods run through one window per update.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fptt_jax._checks import describe, require
from fptt_jax._dtypes import at_least_float32
from fptt_jax._types import (
  Hidden,
  Params,
  UpdateInputs,
  UpdateResult,
)
from fptt_jax._windows import (
  WindowPlan,
  write_window,
)
from fptt_jax.losses import LossState, MetricSums
from fptt_jax.training._credit import gradient_with_credit
from fptt_jax.training._schedules import UpdatePlan
from fptt_jax.training._spec import StepSpec
from fptt_jax.training._start import with_start
from fptt_jax.training._window import Sequence, WindowRun, run_window


class WindowTerms(NamedTuple):
  """Contribution of one window to an update.

  Attributes:
    value: [], its loss.
    loss_state: Loss state after it.
    totals: Its metrics.
  """

  value: jax.Array
  loss_state: LossState
  totals: MetricSums


class _Update(NamedTuple):
  """The objective of one update.

  Attributes:
    spec: Options of the trainer.
    sequence: The batch, cut into windows.
    inputs: What else the objective depends on.
    weights: float [K], weights of the windows' losses.
    revisits: Whether updates run through windows that were seen before.
  """

  spec: StepSpec
  sequence: Sequence
  inputs: UpdateInputs
  weights: jax.Array
  revisits: bool


def update_gradient(
  spec: StepSpec,
  windows: WindowPlan,
  plan: UpdatePlan,
  params: Params,
  inputs: UpdateInputs,
) -> tuple[jax.Array, Params, UpdateResult]:
  """Differentiate the objective of one update.

  Args:
    spec: Options of the trainer.
    windows: Where the windows lie.
    plan: Which windows each update runs through.
    params: Parameters of the model.
    inputs: What else the objective depends on.

  Returns:
    The objective [], its gradient, and the other results of its windows.
  """
  weights = spec.window_weights(windows.num_windows)
  sequence = Sequence.cut(inputs.batch, windows, inputs.key, spec.axis)
  update = _Update(spec, sequence, inputs, weights, revisits=not plan.records.all())
  objective = functools.partial(_objective, update)
  if spec.influence is not None:
    return gradient_with_credit(spec, sequence, inputs, objective, params)
  differentiate = jax.value_and_grad(objective, has_aux=True)
  (value, result), grads = differentiate(params, inputs.hidden)
  # JAX returns the conjugate of a complex parameter's ascent direction; optax expects
  # the direction itself.
  return value, jax.tree.map(jnp.conj, grads), result


def _objective(
  update: _Update, params: Params, hidden: Hidden
) -> tuple[jax.Array, UpdateResult]:
  """Return the weighted loss of the update's windows, and their other results."""
  spec = update.spec
  inputs = update.inputs
  if inputs.fresh is not None:
    hidden = with_start(spec, params, hidden, inputs.fresh)

  # Between windows of one update; with an update per window there is nothing to cut.
  is_cut = _num_seen(inputs) > 1 and not spec.method.whole_gradient

  def body(carry: tuple[Any, ...], row: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    hidden, loss_state, outputs = carry
    k, coefficient, record = row
    run = run_window(spec, update.sequence, params, hidden, k)
    terms = _apply_loss(update, run, loss_state)
    terms = _keep_first_visits(update, terms, loss_state, record)
    if outputs is not None:
      outputs = _write_outputs(update, run, outputs, record)
    value = _add_penalty(spec, run, terms.value)
    weight = (coefficient * update.weights[k]).astype(value.dtype)
    end = jax.lax.stop_gradient(run.hidden) if is_cut else run.hidden
    return (end, terms.loss_state, outputs), (weight * value, terms.totals)

  carry = (hidden, inputs.loss_state, inputs.outputs)
  if _num_seen(inputs) == 1:
    # The usual case: one window per update needs no inner loop.
    row = jax.tree.map(lambda leaf: leaf[0], inputs.schedule)
    (hidden, loss_state, outputs), (value, totals) = body(carry, row)
    return value, UpdateResult(hidden, loss_state, totals, outputs)
  if spec.checkpoint_windows:
    # Within a scan, XLA cannot merge the second forward pass with the first.
    body = jax.checkpoint(body, prevent_cse=False)
  (hidden, loss_state, outputs), terms = jax.lax.scan(body, carry, inputs.schedule)
  values, totals = terms
  totals = jax.tree.map(lambda total: total.sum(0), totals)
  return values.sum(), UpdateResult(hidden, loss_state, totals, outputs)


def _num_seen(inputs: UpdateInputs) -> int:
  """Return V, the number of windows that an update runs through."""
  windows, _, _ = inputs.schedule
  return len(windows)


def _apply_loss(update: _Update, run: WindowRun, loss_state: LossState) -> WindowTerms:
  """Apply the loss to a window.

  For a loss with a `memory`, the loss state returned is the note that `observe` makes.
  """
  if run.chunked is not None:
    value, totals = run.chunked
    return WindowTerms(_as_objective(value), loss_state, totals)
  loss = update.spec.loss
  targets = update.sequence.batch.targets
  apply = loss.apply if loss.memory is None else loss.memory.observe
  value, new_loss_state = apply(run.outputs, targets, run.view, loss_state)
  totals = loss.measure(jax.lax.stop_gradient(run.outputs), targets, run.view)
  if update.revisits:
    # A window seen before has moved the loss state already. Its loss is that of the
    # sequence's start, as when it was first seen.
    first = update.inputs.first_loss_state
    value, _ = apply(run.outputs, targets, run.view, first)
  return WindowTerms(_as_objective(value), new_loss_state, totals)


def _keep_first_visits(
  update: _Update, terms: WindowTerms, loss_state: LossState, record: jax.Array
) -> WindowTerms:
  """Drop loss state and metrics of windows that were seen before."""
  memory = update.spec.loss.memory
  new_loss_state = terms.loss_state
  if memory is not None and _num_seen(update.inputs) > 1:
    # With one window per update the step writes, since it may skip the update.
    keep = record if update.revisits else True
    new_loss_state = memory.write(loss_state, new_loss_state, keep)
  elif update.revisits:
    new_loss_state = optax.tree.where(record, new_loss_state, loss_state)
  totals = terms.totals
  if update.revisits:
    totals = jax.tree.map(lambda total: jnp.where(record, total, 0), totals)
  return WindowTerms(terms.value, new_loss_state, totals)


def _write_outputs(
  update: _Update, run: WindowRun, outputs: jax.Array, record: jax.Array
) -> jax.Array:
  """Write a window's outputs into those of the sequence, when first seen."""
  assert run.outputs is not None
  recorded = record if update.revisits else None
  return write_window(outputs, jax.lax.stop_gradient(run.outputs), run.view, recorded)


def _add_penalty(spec: StepSpec, run: WindowRun, value: jax.Array) -> jax.Array:
  """Add the mean of the model's penalty over the valid steps."""
  if run.penalty is None:
    return value
  # Penalties may be means over the rows of a part.
  parts = spec.micro_batches
  accepted = '1 for ragged batches and a model that returns penalties'
  require(parts == 1 or not run.view.ragged, 'micro_batches', accepted, parts)
  return value + run.view.mean(run.penalty, run.view.mask).astype(value.dtype)


def _as_objective(value: Any) -> jax.Array:
  """Return a loss's number in at least float32.

  The sum over windows may exceed float16, and half precision loses small weights.
  """
  if isinstance(value, jax.Array | np.ndarray | np.generic | float):
    value = jnp.asarray(value)
  is_scalar = isinstance(value, jax.Array) and value.ndim == 0
  fits = is_scalar and jnp.issubdtype(value.dtype, jnp.floating)
  accepted = 'one floating-point number per window'
  require(fits, 'the result of a loss', accepted, describe(value))
  objective: jax.Array = value.astype(at_least_float32(value.dtype))
  return objective
