"""Reconstruction of past inputs as an auxiliary loss (r-LSTM)."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import (
  FLOAT32_MAX,
  INT32_MAX,
  check_integer,
  check_number,
  check_size,
  require,
  require_type,
)
from fptt_jax._rows import sum_over_rows
from fptt_jax._types import OutputsWithPenalty
from fptt_jax.nn._checks import check_inputs, check_rngs
from fptt_jax.nn._from_cell import as_recurrent


class Reconstruction(nnx.Module):
  r"""Train a recurrent layer to reconstruct inputs that it has seen.

  This is the r-LSTM's auxiliary loss for any recurrent layer. At random anchor steps a
  decoder, a layer of the same kind, starts from the layer's state. It reconstructs a
  random segment of L inputs before the anchor, in their order, by teacher forcing: the
  first input is given, and each of the other L - 1 is predicted from the true one
  before it by a linear readout of the decoder. With predictions x̂, the anchor a (the
  number of steps before it) and the segment's first step s <= a - L, the penalty

  .. math::

    P = \frac{w}{A B} \sum_{\text{anchors}} \sum_{b} \frac{1}{(L-1) D} \sum_{i=1}^{L-1}
    \| \hat x_{s+i} - x_{s+i} \|^2

  is added to the window's objective. The layer returns
  :class:`fptt_jax.OutputsWithPenalty`, whose mean over the valid steps is P. Each
  sequence has A anchors, uniform in L..n, where n is its number of valid steps in the
  window. Sequences with n < L are left out of sum and mean. The gradient of P reaches
  the decoder, and the layer back to the window's start. The target inputs are
  constants: otherwise an embedding would be trained to map all inputs to one point.

  In evaluation (key None) this is `layer` itself. In training each anchor costs one
  more pass over the window, masked after the anchor.

  The paper uses one anchor, segments of 600 pixels and w = 1, pre-trains on the penalty
  alone, reads the decoder out through two hidden layers, and cuts the gradient after
  300 steps. Here it is cut at the window's start. These settings were taken from a
  figure's caption and a summary, and not compared with the paper's text.

  Args:
    layer: a layer of `fptt_jax.nn`, a per-step cell of flax, or a `Sequential` of them,
      without penalties. The decoder is a copy with separate weights.
    in_features: D >= 1. Inputs are floating point, [S, B, D].
    segment: length L >= 2 of the segments. No window may be shorter, including the
      steps that 'tbptt_final' runs before its window.
    anchors: number A >= 1 of anchors per window and sequence.
    weight: w >= 0.
    rngs: source of the readout's initial parameters.

  Raises:
    ValueError: an argument is outside its range; inputs are not [S, B, D], or S < L in
      training (when traced).
    TypeError: `layer` does not run windows; `rngs` has no stream for parameters; inputs
      are not floating point (when traced).

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> def build(rngs):
    ...   lstm = nn.LSTM(1, 128, rngs=rngs)
    ...   layer = nn.Reconstruction(lstm, 1, segment=600, rngs=rngs)
    ...   return nn.Sequential(layer, nnx.Linear(128, 10, rngs=rngs))
    >>> model = nn.from_nnx(build)

  References:
    Trinh, Dai, Luong and Le, "Learning Longer-term Dependencies in RNNs with Auxiliary
    Losses", ICML 2018: Fig. 2, left.
  """

  def __init__(
    self,
    layer: Any,
    in_features: int,
    *,
    segment: int,
    anchors: int = 1,
    weight: float = 1.0,
    rngs: nnx.Rngs,
  ):
    check_rngs(rngs)
    self.in_features = check_size('in_features', in_features)
    self.segment = check_integer('segment', segment, 2, INT32_MAX, 'an integer >= 2')
    self.anchors = check_size('anchors', anchors)
    self.weight = check_number('weight', weight, 0, FLOAT32_MAX, 'a finite number >= 0')
    self.layer = as_recurrent(layer)
    # Same structure as the layer, so that it can start from the layer's state.
    self.decoder = nnx.clone(self.layer)
    x = jnp.zeros((1, 1, self.in_features), jnp.float32)
    _, outputs = jax.eval_shape(lambda: self.layer(self.layer.initial_state(1), x))
    self.readout = nnx.Linear(
      outputs.shape[-1], self.in_features, param_dtype=outputs.dtype, rngs=rngs
    )

  def initial_state(self, batch_size: int) -> Any:
    """Return the layer's initial state."""
    return self.layer.initial_state(batch_size)

  def __call__(
    self,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[Any, jax.Array | OutputsWithPenalty]:
    """Run a window.

    Args:
      state: as `initial_state` makes it.
      x: inputs [S, B, D].
      mask: bool [S, B], or None if all steps are valid.
      key: the window's random key, None in evaluation.

    Returns:
      (state after the window, the layer's outputs, in training with their penalty).
    """
    x = check_inputs(self, x, self.in_features)
    if key is None:
      result: tuple[Any, jax.Array] = self.layer(state, x, mask, None)
      return result
    require(
      len(x) >= self.segment, 'steps S', f'at least segment={self.segment}', len(x)
    )
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    name = 'inputs of Reconstruction'
    require_type(is_float, name, 'floating point', x)
    num_steps, batch_size = x.shape[:2]
    layer_key, anchor_key = jax.random.split(key)
    new_state, y = self.layer(state, x, mask, layer_key)
    valid = jnp.full(batch_size, num_steps) if mask is None else mask.sum(0)
    seen = x if mask is None else _move_valid_first(x, mask)

    def anchor_error(key: jax.Array) -> jax.Array:
      return self._error(state, seen, valid, layer_key, key)

    anchor_keys = jax.random.split(anchor_key, self.anchors)
    error = jax.vmap(anchor_error)(anchor_keys).mean(0)
    counted = valid >= self.segment
    own_steps = valid.sum()
    count, steps = counted.sum(), own_steps
    if mask is not None:
      count, steps = sum_over_rows((count, steps))
    # A window without any counted sequence has the penalty 0, and not 0/0.
    count = jnp.maximum(count, 1).astype(error.dtype)
    mean = jnp.sum(error, where=counted) / count
    # The trainer averages penalties over the valid steps of all devices, so each step
    # carries the mean, divided by its device's share of the steps.
    # In float32, since float16 holds no count above 65,504.
    share = steps / jnp.maximum(own_steps, 1)
    mean *= share.astype(error.dtype)
    penalty = jnp.full((num_steps, batch_size), self.weight * mean)
    return new_state, OutputsWithPenalty(y, penalty)

  def _error(
    self,
    state: Any,
    x: jax.Array,
    valid: jax.Array,
    layer_key: jax.Array,
    key: jax.Array,
  ) -> jax.Array:
    """Return the mean squared error [B] of one segment per sequence.

    Args:
      state: the state before the window.
      x: inputs [S, B, D] with the valid steps first.
      valid: number of valid steps int [B].
      layer_key: the key with which the layer ran the window.
      key: random key of anchor, segment and decoder.
    """
    anchor_key, start_key, decoder_key = jax.random.split(key, 3)
    length = self.segment
    shape = valid.shape
    # Sequences with too few valid steps draw a legal anchor, but are not counted.
    largest = jnp.maximum(valid, length)
    anchor = jax.random.randint(anchor_key, shape, length, largest + 1)
    last_start = anchor - length
    start = jax.random.randint(start_key, shape, 0, last_start + 1)
    # Masked steps leave the state unchanged, so this run ends with the anchor's state,
    # whatever the layer keeps in it.
    before_anchor = jnp.arange(x.shape[0])[:, None] < anchor[None]
    anchored, _ = self.layer(state, x, before_anchor, layer_key)
    steps = start[None] + jnp.arange(length)[:, None]
    inputs = jnp.take_along_axis(x, steps[..., None], axis=0)
    _, y = self.decoder(anchored, inputs[:-1], None, decoder_key)
    predictions = self.readout(y)
    targets = jax.lax.stop_gradient(inputs[1:])
    return jnp.square(predictions - targets).mean((0, 2))


def _move_valid_first(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Move each sequence's valid steps of [S, B, D] to its start, in their order."""
  order = jnp.argsort(~mask, axis=0, stable=True)
  return jnp.take_along_axis(x, order[..., None], axis=0)
