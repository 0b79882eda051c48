"""Readout, loss and gradient of a window, a few steps at a time.

Logits over a large vocabulary, [S, B, V], cost a CPU about as much to write, read and
copy as to compute. Here a scan runs over chunks of steps. Each chunk's logits, loss and
gradient are computed together, so that logits stay in the caches and are never kept.
The objective is one number, so the forward pass can find its gradient and the backward
pass only scales it by the cotangent: three matrix products, as without chunks.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fptt_jax._dtypes import at_least_float32
from fptt_jax._windows import WindowView
from fptt_jax.losses._base import MetricSums, totals_where

Readout = Callable[[Any, jax.Array, jax.Array | None], jax.Array]
PerStep = Callable[[jax.Array, Any], dict[str, jax.Array]]

CHUNK_THRESHOLD_BYTES = 2**25
"""A CPU runs a window in chunks if its readout makes a larger array than this."""
CHUNK_BYTES = 10 * 2**20
"""Size of that array in a chunk, unless one step exceeds it."""


def steps_at_once(
  readout: Readout, params: Any, features: jax.ShapeDtypeStruct, key: jax.Array | None
) -> int:
  """Return the steps per chunk, by the largest array that the readout makes.

  Args:
    readout: See :func:`chunked_loss`.
    params: Its first argument, or its shapes.
    features: Shape [S, B, ...] and dtype of a window's features.
    key: Its last argument.

  Returns:
    Steps per chunk; S to compute the window as a whole.
  """
  num_steps = features.shape[0]
  # The readout is the user's own, so its arrays are found by tracing it.
  jaxpr = jax.make_jaxpr(readout)(params, features, key)
  largest = 0
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      array = variable.aval
      # Weights have the same size in every chunk and do not count.
      if array.shape[:2] == features.shape[:2]:
        largest = max(largest, array.size * array.dtype.itemsize)
  if largest <= CHUNK_THRESHOLD_BYTES:
    return num_steps
  return max(1, CHUNK_BYTES * num_steps // largest)


class WindowLoss(NamedTuple):
  """Loss and metrics of one window.

  Attributes:
    loss: [], the mean over the valid steps.
    totals: :data:`fptt_jax.losses.MetricSums`. Constants in training, differentiable in
      evaluation.
  """

  loss: jax.Array
  totals: MetricSums


def chunked_loss(
  readout: Readout,
  per_step: PerStep,
  params: Any,
  features: jax.Array,
  targets: Any,
  window: WindowView,
  key: jax.Array | None,
  *,
  steps: int,
  evaluating: bool = False,
) -> WindowLoss:
  """Compute a window's loss and metrics from `readout(params, features, key)`.

  In training, the loss is differentiable in reverse mode with respect to `params` and
  `features`; gradients of weights are summed in at least float32. In evaluation, the
  result is differentiable in any mode and any number of times.

  Args:
    readout: (params, features [s, B, ...], key) -> outputs [s, B, ...], for each of any
      s steps by itself.
    per_step: See :class:`fptt_jax.Loss`.
    params: Tree of which `readout` may use a part.
    features: float [S, B, ...].
    targets: Tree of arrays [T, B, ...], constants.
    window: The window that the features belong to.
    key: PRNG key of the window, the same for each chunk; None for no noise.
    steps: Largest number s of steps per chunk.
    evaluating: Whether the window is evaluated, not trained on.
  """
  num_steps = features.shape[0]
  # Chunks of nearly equal size need less padding than full ones and a rest.
  num_chunks = -(-num_steps // steps)
  steps = -(-num_steps // num_chunks)

  def split(x: jax.Array) -> jax.Array:
    """Split [S, B, ...] into [chunks, s, B, ...]; padded steps are masked."""
    padded = jnp.pad(x, [(0, num_chunks * steps - num_steps), *[(0, 0)] * (x.ndim - 1)])
    return padded.reshape(num_chunks, steps, *x.shape[1:])

  count = window.divisor(window.mask, at_least_float32(features.dtype))
  features, targets, mask = jax.tree.map(
    split, (features, jax.tree.map(window.slice, targets), window.mask)
  )

  def run_chunk(x: jax.Array, key: jax.Array | None) -> jax.Array:
    return readout(params, x, key)

  if evaluating:
    return _sum_chunks(run_chunk, per_step, (), features, targets, mask, count, key)
  # Only the parameters that the readout uses become weights.
  run, weights = jax.closure_convert(run_chunk, features[0], key)
  return _chunked_loss(
    run, per_step, tuple(weights), features, targets, mask, count, key
  )


def _sum_chunks(
  run: Callable[..., jax.Array],
  per_step: PerStep,
  weights: tuple[jax.Array, ...],
  features: jax.Array,
  targets: Any,
  mask: jax.Array,
  count: jax.Array,
  key: jax.Array | None,
) -> WindowLoss:
  """Sum loss and metrics over chunks [chunks, s, B, ...]."""
  part = functools.partial(_part, run, per_step, count, key, weights)

  # The derivative of an evaluation recomputes a chunk's outputs, rather than keep them.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def body(
    _: None, chunk: tuple[Any, ...]
  ) -> tuple[None, tuple[jax.Array, MetricSums]]:
    return None, part(*chunk)

  _, parts = jax.lax.scan(body, None, (features, targets, mask))
  return _sum(parts)


_chunked_loss = jax.custom_vjp(_sum_chunks, nondiff_argnums=(0, 1))


def _chunked_loss_with_gradient(
  run: Callable[..., jax.Array],
  per_step: PerStep,
  weights: tuple[jax.Array, ...],
  features: jax.Array,
  targets: Any,
  mask: jax.Array,
  count: jax.Array,
  key: jax.Array | None,
) -> tuple[WindowLoss, tuple[tuple[jax.Array, ...], jax.Array]]:
  """Sum over chunks, and differentiate with respect to weights and features."""
  part = jax.value_and_grad(
    functools.partial(_part, run, per_step, count, key), argnums=(0, 1), has_aux=True
  )

  def body(
    to_weights: tuple[jax.Array, ...], chunk: tuple[Any, ...]
  ) -> tuple[tuple[jax.Array, ...], Any]:
    window_loss, (more, to_features) = part(weights, *chunk)
    sums = [g + m.astype(g.dtype) for g, m in zip(to_weights, more, strict=True)]
    return tuple(sums), (window_loss, to_features)

  # Sums over many chunks in bfloat16 would stop growing.
  zeros = tuple(jnp.zeros(w.shape, at_least_float32(w.dtype)) for w in weights)
  to_weights, (parts, to_features) = jax.lax.scan(
    body, zeros, (features, targets, mask)
  )
  to_weights = tuple(
    g.astype(w.dtype) for g, w in zip(to_weights, weights, strict=True)
  )
  return _sum(parts), (to_weights, to_features)


def _scale_gradient(
  run: Callable[..., jax.Array],
  per_step: PerStep,
  gradient: tuple[tuple[jax.Array, ...], jax.Array],
  cotangents: WindowLoss,
) -> tuple[Any, ...]:
  """Scale the gradient that the forward pass found; the totals are constants."""

  def scaled(g: jax.Array) -> jax.Array:
    wide = at_least_float32(g.dtype)
    return (g.astype(wide) * cotangents.loss.astype(wide)).astype(g.dtype)

  return *jax.tree.map(scaled, gradient), None, None, None, None


_chunked_loss.defvjp(_chunked_loss_with_gradient, _scale_gradient)


def _part(
  run: Callable[..., jax.Array],
  per_step: PerStep,
  count: jax.Array,
  key: jax.Array | None,
  weights: tuple[jax.Array, ...],
  features: jax.Array,
  targets: Any,
  mask: jax.Array,
) -> tuple[jax.Array, MetricSums]:
  """Return a chunk's part of the mean and of the totals."""
  # `count` is the whole window's, so that the parts add up to its mean.
  values = per_step(run(features, key, *weights), targets)
  wide = at_least_float32(values['loss'].dtype)
  loss = jnp.sum(values['loss'], where=mask, dtype=wide) / count.astype(wide)
  return loss, totals_where(mask, values)


def _sum(parts: tuple[jax.Array, MetricSums]) -> WindowLoss:
  """Sum the chunks' parts."""
  return WindowLoss(*jax.tree.map(lambda part: part.sum(0), parts))
