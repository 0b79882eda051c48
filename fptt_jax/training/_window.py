"""One window of a sequence, and the objective of one optimizer update.

The objective is the weighted sum of the losses of the windows that the update runs
through, from a given hidden state. Most methods run through one window per update.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fptt_jax._batch import Batch, check_shapes
from fptt_jax._checks import check_array
from fptt_jax._dtypes import at_least_float32
from fptt_jax._types import (
  Hidden,
  Model,
  OutputsWithPenalty,
  Params,
  UpdateInputs,
  UpdateResult,
)
from fptt_jax._windows import (
  ValidSteps,
  WindowPlan,
  WindowView,
  valid_steps,
  window_at,
  write_window,
)
from fptt_jax.influence import WindowMap, attach
from fptt_jax.losses import LossState, MetricSums
from fptt_jax.training._readout import WindowLoss, chunked_loss, steps_at_once
from fptt_jax.training._schedules import UpdatePlan
from fptt_jax.training._spec import StepSpec


class Sequence(NamedTuple):
  """A batch of sequences, cut into windows.

  Attributes:
    batch: The batch, or one device's rows of it.
    windows: Where the windows lie.
    valid: Which steps are valid.
    key: PRNG key that each window's key is folded from; None in evaluation.
    axis: Name of the mesh axis that the rows are split over, or None.
  """

  batch: Batch
  windows: WindowPlan
  valid: ValidSteps
  key: jax.Array | None
  axis: str | None

  @classmethod
  def cut(
    cls, batch: Batch, windows: WindowPlan, key: jax.Array | None, axis: str | None
  ) -> 'Sequence':
    """Cut a batch into windows."""
    _, batch_size = check_shapes(batch)
    valid = valid_steps(windows, batch_size, batch.lengths, batch.mask)
    return cls(batch, windows, valid, key, axis)


class WindowRun(NamedTuple):
  """Results of the model in one window.

  Attributes:
    hidden: [B, ...], hidden state after the window.
    outputs: [S, B, ...], or [1, B, ...] where the loss takes each sequence's last valid
      step only. None with a chunked readout.
    chunked: Loss and metrics of a chunked readout, else None.
    penalty: float [S, B], or None.
    view: The window.
  """

  hidden: Hidden
  outputs: Any
  chunked: WindowLoss | None
  penalty: jax.Array | None
  view: WindowView


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


def run_window(
  spec: StepSpec, sequence: Sequence, params: Params, hidden: Hidden, k: jax.Array
) -> WindowRun:
  """Run the model through the k-th window.

  Args:
    spec: Options of the trainer.
    sequence: The batch. Without a key, the window is evaluated.
    params: Parameters of the model.
    hidden: [B, ...], hidden state before the window.
    k: int [], number of the window.

  Returns:
    The model's outputs or, with a chunked readout, the window's loss.
  """
  evaluating = sequence.key is None
  model = spec.model if evaluating else spec.training_model
  view = window_at(sequence.windows, k, sequence.valid, sequence.axis)
  x = jax.tree.map(lambda leaf: view.slice(jnp.asarray(leaf)), sequence.batch.inputs)
  mask = view.mask if view.masked else None
  key = None if sequence.key is None else jax.random.fold_in(sequence.key, k)
  arguments = (params, hidden, x, mask, key)

  # Whoever wants all outputs gets them; otherwise the readout may save work.
  every_step = spec.return_outputs and not evaluating
  num_outputs = view.size
  chunk = view.size
  if not every_step:
    chunk = _readout_chunk(spec, model, arguments, view.size)
  if spec.loss.last_only and model.apply_last is not None and not every_step:
    num_outputs = 1
    new_hidden, outputs = model.apply_last(*arguments, view.last)
  elif model.split is None or chunk == view.size:
    new_hidden, outputs = model.apply(*arguments)
  else:
    new_hidden, outputs = model.split.features(*arguments)
  outputs, penalty = split_penalty(outputs)
  check_hidden(new_hidden, hidden, 'the hidden state that model.apply returns')
  _check_outputs(outputs, penalty, num_outputs, view)
  if chunk >= num_outputs:
    return WindowRun(new_hidden, outputs, None, penalty, view)

  assert model.split is not None
  assert spec.loss.per_step is not None
  chunked = chunked_loss(
    model.split.readout,
    spec.loss.per_step,
    params,
    outputs,
    sequence.batch.targets,
    view,
    key,
    steps=chunk,
    evaluating=evaluating,
  )
  return WindowRun(new_hidden, None, chunked, penalty, view)


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
  if spec.influence is not None:
    return _gradient_with_credit(update, params)

  def objective(params: Params) -> tuple[jax.Array, UpdateResult]:
    return _objective(update, params, inputs.hidden)

  (value, result), grads = jax.value_and_grad(objective, has_aux=True)(params)
  # JAX returns the conjugate of a complex parameter's ascent direction; optax expects
  # the direction itself.
  return value, jax.tree.map(jnp.conj, grads), result


def _gradient_with_credit(
  update: _Update, params: Params
) -> tuple[jax.Array, Params, UpdateResult]:
  """Differentiate the objective of a window, with the credit from beyond it."""
  spec = update.spec
  inputs = update.inputs
  influence = spec.influence
  assert influence is not None
  window = _window_map(spec, update.sequence, inputs)

  def objective(params: Params, before: Params) -> tuple[jax.Array, UpdateResult]:
    # The same parameters twice tell the two parts of the gradient apart.
    hidden = attach(influence, window, before, inputs.hidden, inputs.influence)
    return _objective(update, params, hidden)

  differentiate = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
  (value, result), parts = differentiate(params, params)
  within, credit = jax.tree.map(jnp.conj, parts)
  grads = jax.tree.map(jnp.add, within, credit)
  return value, grads, result._replace(credit=credit)


def advance_influence(
  spec: StepSpec, windows: WindowPlan, params: Params, inputs: UpdateInputs
) -> Any:
  """Return the influence after the window of an update.

  Args:
    spec: Options of the trainer, with an influence.
    windows: Where the windows lie.
    params: Parameters with which the window was last run.
    inputs: What else its objective depends on.
  """
  influence = spec.influence
  assert influence is not None
  sequence = Sequence.cut(inputs.batch, windows, inputs.key, spec.axis)
  window = _window_map(spec, sequence, inputs)
  key = None
  if influence.draws:
    # The keys 0..K are those of the windows and of the steps before the first.
    numbers, _, _ = inputs.schedule
    key = jax.random.fold_in(inputs.key, windows.num_windows + 1 + numbers[0])
  return influence.advance(window, params, inputs.hidden, inputs.influence, key)


def first_influence(
  spec: StepSpec, params: Params, hidden: Hidden, batch: Batch
) -> Any:
  """Return the state of the influence before the first step; () without one."""
  if spec.influence is None:
    return ()
  num_steps, batch_size = check_shapes(batch)
  windows = spec.plan_windows(num_steps)
  fresh = None
  if spec.model.learned_initial_state is not None:
    fresh = jnp.ones(batch_size, bool)
  x = jax.tree.map(lambda leaf: jnp.asarray(leaf)[: windows.size], batch.inputs)
  # No axis of a mesh is bound here.
  window = _bare_map(spec, x, None, fresh, None)
  return spec.influence.init(window, params, hidden)


def _window_map(spec: StepSpec, sequence: Sequence, inputs: UpdateInputs) -> WindowMap:
  """Return the map of the one window that an update runs through."""
  numbers, _, _ = inputs.schedule
  view = window_at(sequence.windows, numbers[0], sequence.valid, sequence.axis)
  x = jax.tree.map(lambda leaf: view.slice(jnp.asarray(leaf)), sequence.batch.inputs)
  mask = view.mask if view.masked else None
  return _bare_map(spec, x, mask, inputs.fresh, spec.axis)


def _bare_map(
  spec: StepSpec,
  x: Any,
  mask: jax.Array | None,
  fresh: jax.Array | None,
  axis: str | None,
) -> WindowMap:
  """Return the map of a window of inputs x [S, B, ...]."""
  assert spec.hidden_map is not None
  own = spec.model.own_steps
  window = WindowMap(spec.hidden_map, x, mask, own_steps=own)
  if fresh is None:
    return window
  rows = len(fresh)
  return window._replace(
    fresh=fresh,
    start=lambda params: start_rows(spec.model, params, rows, axis),
  )


def _objective(
  update: _Update, params: Params, hidden: Hidden
) -> tuple[jax.Array, UpdateResult]:
  """Return the weighted loss of the update's windows, and their other results."""
  spec = update.spec
  inputs = update.inputs
  if inputs.fresh is not None:
    hidden = _with_start(spec, params, hidden, inputs.fresh)

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
    return (run.hidden, terms.loss_state, outputs), (weight * value, terms.totals)

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
  if spec.micro_batches > 1 and run.view.ragged:
    raise ValueError(
      'micro_batches > 1 excludes ragged batches for a model that returns penalties, '
      'which may be means over the rows of a part: got '
      f'micro_batches={spec.micro_batches} and lengths or a mask.'
    )
  return value + run.view.mean(run.penalty, run.view.mask).astype(value.dtype)


def _as_objective(value: Any) -> jax.Array:
  """Return a loss's number in at least float32.

  The sum over windows may exceed float16, and half precision loses small weights.
  """
  if isinstance(value, jax.Array | np.ndarray | np.generic | float):
    value = jnp.asarray(value)
  got = type(value).__name__
  if isinstance(value, jax.Array):
    if value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.floating):
      return value.astype(at_least_float32(value.dtype))
    got = f'{value.dtype}{list(value.shape)}'
  raise ValueError(
    f'a loss must return one floating-point number per window, got {got}.'
  )


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


def _with_start(
  spec: StepSpec, params: Params, hidden: Hidden, fresh: jax.Array
) -> Hidden:
  """Put the initial state of these parameters into the rows that are fresh."""

  def put(start: jax.Array, old: jax.Array) -> jax.Array:
    rows = fresh.reshape(-1, *[1] * (old.ndim - 1))
    return jnp.where(rows, start.astype(old.dtype), old)

  start = start_rows(spec.model, params, len(fresh), spec.axis)
  return jax.tree.map(put, start, hidden)


def split_penalty(outputs: Any) -> tuple[Any, Any]:
  """Return (outputs, penalty or None) of what a model's `apply` returned."""
  if isinstance(outputs, OutputsWithPenalty):
    return outputs.outputs, outputs.penalty
  return outputs, None


def empty_outputs(
  model: Model, params: Params, hidden: Hidden, batch: Batch, size: int
) -> jax.Array:
  """Return zeros [T, B, ...] of the shape of the model's outputs.

  Args:
    model: The model.
    params: Its parameters.
    hidden: [B, ...], a hidden state.
    batch: The batch.
    size: Steps of a window.
  """

  def apply(params: Params, hidden: Hidden, x: Any) -> Any:
    _, outputs = model.apply(params, hidden, x, None, None)
    return split_penalty(outputs)[0]

  x = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:size], batch.inputs)
  shape: Any = jax.eval_shape(apply, params, hidden, x)
  num_steps = jax.tree.leaves(batch.inputs)[0].shape[0]
  return jnp.zeros((num_steps, *shape.shape[1:]), shape.dtype)


def check_hidden(got: Hidden, expected: Hidden, name: str) -> None:
  """Raise a ValueError unless two hidden states agree in shapes and dtypes."""

  def describe(tree: Hidden) -> Hidden:
    return jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', tree)

  if describe(got) != describe(expected):
    raise ValueError(
      f"{name} must have the structure, shapes and dtypes of the model's initial state "
      f'for this batch, {describe(expected)}; got {describe(got)}.'
    )


def _check_outputs(
  outputs: jax.Array, penalty: jax.Array | None, num_steps: int, view: WindowView
) -> None:
  """Raise unless outputs are [num_steps, B, ...] and penalties [S, B]."""
  check_array('the outputs that model.apply returns', outputs)
  expected = (num_steps, view.mask.shape[1])
  if outputs.shape[:2] != expected:
    raise ValueError(
      f'the model must return outputs [S, B, ...] = {expected} + features, got shape '
      f'{outputs.shape}.'
    )
  if penalty is not None and penalty.shape != view.mask.shape:
    raise ValueError(
      f'the penalty that model.apply returns must be [S, B] = {view.mask.shape}, got '
      f'shape {penalty.shape}.'
    )


def _readout_chunk(
  spec: StepSpec, model: Model, arguments: tuple[Any, ...], size: int
) -> int:
  """Return how many of a window's S steps to read out at a time."""
  split = model.split
  if split is None or spec.loss.per_step is None:
    return size
  params, _, _, _, key = arguments
  given = spec.readout_chunk
  if model is spec.training_model and spec.micro_batches > 1 and given is None:
    given = -(-size // spec.micro_batches)
  if given is None and jax.default_backend() != 'cpu':
    return size
  shape: Any = jax.eval_shape(split.features, *arguments)[1]
  features, _ = split_penalty(shape)
  # If all layers are the readout, the features are the inputs: a tree, or tokens, which
  # have no gradient.
  if not isinstance(features, jax.ShapeDtypeStruct):
    return size
  if not jnp.issubdtype(features.dtype, jnp.floating):
    return size
  if given is not None:
    return min(given, size)
  return steps_at_once(split.readout, params, features, key)
