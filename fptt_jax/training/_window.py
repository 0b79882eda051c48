"""One window of a sequence: the model's outputs or, read out in chunks, the loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fptt_jax._batch import Batch, check_shapes
from fptt_jax._checks import check_array, check_shape, describe, require
from fptt_jax._rows import rows_split_over
from fptt_jax._types import (
  Hidden,
  Model,
  OutputsWithPenalty,
  Params,
)
from fptt_jax._windows import (
  ValidSteps,
  WindowPlan,
  WindowView,
  valid_steps,
  window_at,
)
from fptt_jax.training._readout import WindowLoss, chunked_loss, steps_at_once
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
  with rows_split_over(sequence.axis):
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
  found, wanted = (jax.tree.map(describe, tree) for tree in (got, expected))
  accepted = f"like the model's initial state for this batch, {wanted}"
  require(found == wanted, name, accepted, found)


def _check_outputs(
  outputs: jax.Array, penalty: jax.Array | None, num_steps: int, view: WindowView
) -> None:
  """Raise unless outputs are [num_steps, B, ...] and penalties [S, B]."""
  name = 'outputs that model.apply returns'
  expected = (num_steps, view.mask.shape[1], *check_array(name, outputs).shape[2:])
  check_shape(name, outputs, '[S, B, ...]', expected)
  if penalty is not None:
    name = 'penalty that model.apply returns'
    check_shape(name, penalty, '[S, B]', view.mask.shape)


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
