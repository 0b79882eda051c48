"""A window's readout, loss and gradient a few steps at a time.

Outputs over a large vocabulary, [S, B, V], cost a CPU about as much to write, read and
copy as to compute. Here a scan goes over chunks of steps: a chunk's outputs are
computed, window_loss and, where a gradient is asked for, differentiated while they are
in the caches, and none are kept. The objective being one number, all the backward pass
has to do is to multiply by its cotangent the gradient that the forward pass has found,
so that outputs are computed once: three products in all, as without chunks.
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

LARGE = 2**25
"""A CPU computes a window whole unless its readout makes an array of more bytes than
this.
"""
CHUNK = 10 * 2**20
"""Bytes of that array in a chunk, unless one step has more."""


def steps_at_once(
  readout: Readout, params: Any, features: jax.ShapeDtypeStruct, key: jax.Array | None
) -> int:
  """How many steps a chunk should have, by the largest array [S, B, ...] that the
  readout makes of a window; S for all.

  Args:
    readout: see :func:`chunked_loss`.
    params: its first argument, or shapes.
    features: shape [S, B, ...] and dtype of those of a window.
    key: its last argument.
  """
  num_steps = features.shape[0]
  made = [
    variable.aval
    for equation in jax.make_jaxpr(readout)(params, features, key).eqns
    for variable in equation.outvars
  ]
  sizes = [
    array.size * array.dtype.itemsize
    for array in made
    if array.shape[:2] == features.shape[:2]
  ]
  largest = max(sizes, default=0)
  return num_steps if largest <= LARGE else max(1, CHUNK * num_steps // largest)


class WindowLoss(NamedTuple):
  """What a loss says of a window.

  Attributes:
    loss: [], the mean over the valid steps.
    totals: :data:`fptt_jax.losses.MetricSums`: constants where the window is trained
      on, differentiable where it is evaluated.
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
  """What a window's loss `apply` and `measure` give for the outputs `readout(params,
  features, key)`.

  In training the loss is differentiable in reverse with respect to `params` and
  `features`; the gradient of weights is summed up in at least float32. In evaluation
  all of the result is differentiable, in any mode and any number of times.

  Args:
    readout: (params, features [s, B, ...], key) -> outputs [s, B, ...] of any s steps,
      each by itself.
    per_step: see :class:`fptt_jax.Loss`.
    params: a tree of which `readout` may use a part.
    features: float [S, B, ...].
    targets: tree of arrays [T, B, ...], constants.
    window: which steps of the targets these are.
    key: what `readout` draws from, the same for each chunk; None for no noise.
    steps: s, the most steps of a chunk.
    evaluating: whether the window is evaluated, not trained on.
  """
  num_steps = features.shape[0]
  num_chunks = -(-num_steps // steps)
  steps = -(-num_steps // num_chunks)

  def split(x: jax.Array) -> jax.Array:
    """[S, B, ...] -> [chunks, s, B, ...]; steps that are put to the end do not
    count.
    """
    padded = jnp.pad(x, [(0, num_chunks * steps - num_steps), *[(0, 0)] * (x.ndim - 1)])
    return padded.reshape(num_chunks, steps, *x.shape[1:])

  count = window.divisor(window.mask, at_least_float32(features.dtype))
  features, targets, mask = jax.tree.map(
    split, (features, jax.tree.map(window.slice, targets), window.mask)
  )
  if evaluating:
    run_chunk = lambda x, key: readout(params, x, key)
    return _judge_chunks(run_chunk, per_step, (), features, targets, mask, count, key)
  run, weights = jax.closure_convert(
    lambda x, key: readout(params, x, key), features[0], key
  )  # The params that are used.
  return _chunked_loss(
    run, per_step, tuple(weights), features, targets, mask, count, key
  )


def _judge_chunks(
  run: Callable[..., jax.Array],
  per_step: PerStep,
  weights: tuple[jax.Array, ...],
  features: jax.Array,
  targets: Any,
  mask: jax.Array,
  count: jax.Array,
  key: jax.Array | None,
) -> WindowLoss:
  """Chunk by chunk: features, targets and mask are [chunks, s, B, ...]."""
  part = functools.partial(_part, run, per_step, count, key, weights)

  # The derivative of an evaluation computes a chunk's outputs again, so that it does
  # not keep them either.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def body(
    _: None, chunk: tuple[Any, ...]
  ) -> tuple[None, tuple[jax.Array, MetricSums]]:
    return None, part(*chunk)

  _, parts = jax.lax.scan(body, None, (features, targets, mask))
  return _sum(parts)


_chunked_loss = jax.custom_vjp(_judge_chunks, nondiff_argnums=(0, 1))


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
  """The same, and the loss's gradient with respect to weights and features."""
  part = jax.value_and_grad(
    functools.partial(_part, run, per_step, count, key), argnums=(0, 1), has_aux=True
  )

  def body(
    to_weights: tuple[jax.Array, ...], chunk: tuple[Any, ...]
  ) -> tuple[tuple[jax.Array, ...], Any]:
    window_loss, (more, to_features) = part(weights, *chunk)
    return tuple(
      g + m.astype(g.dtype) for g, m in zip(to_weights, more, strict=True)
    ), (window_loss, to_features)

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
  """A chunk's part of the mean and of the totals."""
  values = per_step(run(features, key, *weights), targets)
  wide = at_least_float32(values['loss'].dtype)
  loss = jnp.sum(values['loss'], where=mask, dtype=wide) / count.astype(wide)
  return loss, totals_where(mask, values)


def _sum(parts: tuple[jax.Array, MetricSums]) -> WindowLoss:
  return WindowLoss(*jax.tree.map(lambda part: part.sum(0), parts))
