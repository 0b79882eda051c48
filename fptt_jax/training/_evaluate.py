"""Evaluation and prediction: a forward pass in windows of about √T steps."""

from typing import Any

import jax
import jax.numpy as jnp

from fptt_jax._batch import Batch, check_shapes
from fptt_jax._types import Hidden, Params
from fptt_jax._windows import (
  lengths_in_range,
  make_windows,
  valid_steps,
  window_at,
  write_window,
)
from fptt_jax.losses import MetricSums
from fptt_jax.parallel._collectives import sum_over_devices
from fptt_jax.training._invalid import batch_in_range
from fptt_jax.training._spec import StepSpec
from fptt_jax.training._window import (
  Sequence,
  check_hidden,
  empty_outputs,
  run_window,
  split_penalty,
)


def run_evaluate(
  spec: StepSpec, axis: str | None, params: Params, batch: Batch, hidden: Hidden
) -> tuple[MetricSums, Hidden]:
  """Evaluate a batch, without dropout.

  Args:
    spec: Options of the trainer.
    axis: Name of the mesh axis that the batch is split over, or None.
    params: Parameters of the model.
    batch: The batch, or one device's rows of it.
    hidden: [B, ...], hidden state that the sequences start from.

  Returns:
    Sums of the loss's metrics over the whole batch, and the hidden state after it.
  """
  loss = spec.loss
  num_steps, batch_size = check_shapes(batch)
  windows = make_windows(num_steps)
  valid = valid_steps(windows, batch_size, batch.lengths, batch.mask)
  sequence = Sequence(batch, windows, valid, key=None, axis=axis)

  def body(hidden: Hidden, k: jax.Array) -> tuple[Hidden, MetricSums]:
    run = run_window(spec, sequence, params, hidden, k)
    if run.chunked is not None:
      return run.hidden, run.chunked.totals
    return run.hidden, loss.measure(run.outputs, batch.targets, run.view)

  hidden, totals = jax.lax.scan(body, hidden, jnp.arange(windows.num_windows))
  totals = jax.tree.map(lambda total: total.sum(0), totals)
  in_range = batch_in_range(loss, batch, None)
  if in_range is not None:
    totals = jax.tree.map(lambda total: _nan_unless(in_range, total), totals)
  return sum_over_devices(totals, axis), hidden


def _nan_unless(valid: jax.Array, numbers: jax.Array) -> jax.Array:
  """Return NaN for an invalid batch, so that nothing made of it looks right."""
  if not jnp.issubdtype(numbers.dtype, jnp.inexact):
    return numbers
  return jnp.where(valid, numbers, jnp.nan)


def run_predict(
  spec: StepSpec, params: Params, batch: Batch, hidden: Hidden
) -> tuple[jax.Array, Hidden]:
  """Compute the model's outputs at all steps, without dropout.

  Args:
    spec: Options of the trainer.
    params: Parameters of the model.
    batch: Batch, whose targets are not used.
    hidden: [B, ...], hidden state that the sequences start from.

  Returns:
    Outputs [T, B, ...], 0 at masked steps and NaN if a length is out of range, and the
    hidden state after them.
  """
  model = spec.model
  num_steps, batch_size = check_shapes(batch)
  windows = make_windows(num_steps)
  valid = valid_steps(windows, batch_size, batch.lengths, batch.mask)

  def body(carry: tuple[Hidden, Any], k: jax.Array) -> tuple[tuple[Hidden, Any], None]:
    hidden, sequence = carry
    view = window_at(windows, k, valid)
    x = jax.tree.map(lambda leaf: view.slice(jnp.asarray(leaf)), batch.inputs)
    mask = view.mask if view.masked else None
    new_hidden, outputs = model.apply(params, hidden, x, mask, None)
    outputs, _ = split_penalty(outputs)
    check_hidden(new_hidden, hidden, 'the hidden state that model.apply returns')
    return (new_hidden, write_window(sequence, outputs, view)), None

  start = (hidden, empty_outputs(model, params, hidden, batch, windows.size))
  (hidden, outputs), _ = jax.lax.scan(body, start, jnp.arange(windows.num_windows))
  if batch.lengths is not None:
    lengths = jnp.asarray(batch.lengths, jnp.int32)
    outputs = _nan_unless(lengths_in_range(lengths, num_steps), outputs)
  return outputs, hidden
