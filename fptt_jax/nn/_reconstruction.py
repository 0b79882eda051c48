"""Remembering the past as an auxiliary task: the r-LSTM of Trinh, Dai, Luong and Le, a
baseline beside FPTT.
"""

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
)
from fptt_jax._types import OutputsWithPenalty
from fptt_jax.nn._checks import check_inputs, check_rngs
from fptt_jax.nn._from_cell import as_recurrent


class Reconstruction(nnx.Module):
  r"""A recurrent layer that in training has to reconstruct inputs it has seen (r-LSTM,
   for any recurrent layer).

  At random anchor steps a decoder, a layer of the same kind, starts from the layer's
  state and reconstructs a random sub-sequence of L inputs before the anchor, in their
  own order and teacher-forced: the first input is given, each of the other L - 1 is
  predicted from the true one before it by a linear readout of the decoder. With x̂ the
  predictions, a the anchor (as many steps are behind it), s <= a - L the sub-sequence's
  first step,

  .. math::

    P = \frac{w}{A B} \sum_{\text{anchors}} \sum_{b} \frac{1}{(L-1) D} \sum_{i=1}^{L-1}
    \| \hat x_{s+i} - x_{s+i} \|^2

  is added to the window's objective (as :class:`fptt_jax.OutputsWithPenalty` outputs,
  whose mean over the valid steps is P). Each sequence has its own A anchors, uniform in
  L..n where n is its number of valid steps in the window; sequences with n < L are left
  out, of the mean as well. Its gradient reaches the decoder, and the layer back to the
  window's start; the inputs as targets are constants (what embeds them is not drawn to
  embed everything alike).

  In evaluation (key None) this is `layer` itself. In training it costs one more pass
  over the window for each anchor, masked beyond it.

  The paper uses one anchor, sub-sequences of 600 pixels and w = 1, pre-trains on the
  penalty alone, reads the decoder out through two hidden layers, and cuts this gradient
  after 300 steps; here it ends where the window does. (These settings of theirs were
  taken from a figure's caption and a summary, not checked against the paper's text.)

  Args:
    layer: what runs the window: a layer of `fptt_jax.nn`, a per-step cell of flax, or a
      `Sequential` of them, without penalties of its own. The decoder is a copy, with
      weights of its own from there on.
    in_features: D >= 1; inputs are floating point, [S, B, D].
    segment: L >= 2, length of the sub-sequences. No window may be shorter, what
      'tbptt_final' runs before its window included.
    anchors: A >= 1, anchors a window and sequence.
    weight: w >= 0.
    rngs: source of the readout's initial parameters.

  Raises:
    ValueError: an argument outside its range (here); inputs that are not [S, B, D] or
      in training have S < L (when traced).
    TypeError: `layer` does not run windows, `rngs` is no source of parameters, or (when
      traced) inputs are not floating point.

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(lambda rngs: nn.Sequential(
    ...   nn.Reconstruction(nn.LSTM(1, 128, rngs=rngs), 1, segment=600, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)))

  References: Trinh, Dai, Luong and Le, "Learning Longer-term Dependencies in RNNs with
    Auxiliary Losses", ICML 2018: Fig. 2, left.
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
    self.decoder = nnx.clone(self.layer)
    outputs = jax.eval_shape(
      lambda: self.layer(
        self.layer.initial_state(1), jnp.zeros((1, 1, self.in_features), jnp.float32)
      )[1]
    )
    self.readout = nnx.Linear(
      outputs.shape[-1], self.in_features, param_dtype=outputs.dtype, rngs=rngs
    )

  def initial_state(self, batch_size: int) -> Any:
    """The layer's."""
    return self.layer.initial_state(batch_size)

  def __call__(
    self,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[Any, jax.Array | OutputsWithPenalty]:
    """Runs a window."""
    x = check_inputs(self, x, self.in_features)
    if key is None:
      result: tuple[Any, jax.Array] = self.layer(state, x, mask, None)
      return result
    num_steps, batch_size = x.shape[:2]
    if num_steps < self.segment:
      raise ValueError(
        f'Reconstruction expected windows of at least segment={self.segment} steps, '
        f'got S={num_steps}.'
      )
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(
        'Reconstruction expected floating-point inputs, whose squared error it takes, '
        f'got {x.dtype}.'
      )
    layer_key, anchor_key = jax.random.split(key)
    new_state, y = self.layer(state, x, mask, layer_key)
    valid = jnp.full(batch_size, num_steps) if mask is None else mask.sum(0)
    seen = x if mask is None else _valid_first(x, mask)
    error = jax.vmap(lambda k: self._error(state, seen, valid, layer_key, k))(
      jax.random.split(anchor_key, self.anchors)
    ).mean(0)
    counted = valid >= self.segment
    mean = jnp.sum(error, where=counted) / jnp.maximum(counted.sum(), 1).astype(
      error.dtype
    )
    return new_state, OutputsWithPenalty(
      y, jnp.full((num_steps, batch_size), self.weight * mean)
    )

  def _error(
    self,
    state: Any,
    x: jax.Array,
    valid: jax.Array,
    layer_key: jax.Array,
    key: jax.Array,
  ) -> jax.Array:
    """Mean squared error [B] of one sub-sequence each, seen from one anchor each; the
    `valid` steps of x come first.
    """
    anchor_key, start_key, decoder_key = jax.random.split(key, 3)
    anchor = jax.random.randint(
      anchor_key, valid.shape, self.segment, jnp.maximum(valid, self.segment) + 1
    )
    start = jax.random.randint(start_key, valid.shape, 0, anchor - self.segment + 1)
    # The state at the anchor, whatever the layer keeps in it: masked steps leave it as
    # it is.
    anchored, _ = self.layer(
      state, x, jnp.arange(x.shape[0])[:, None] < anchor[None], layer_key
    )
    steps = start[None] + jnp.arange(self.segment)[:, None]
    inputs = jnp.take_along_axis(x, steps[..., None], axis=0)
    _, y = self.decoder(anchored, inputs[:-1], None, decoder_key)
    return jnp.square(self.readout(y) - jax.lax.stop_gradient(inputs[1:])).mean((0, 2))


def _valid_first(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Inputs [S, B, D] with each sequence's valid steps at its beginning, in their
  order.
  """
  order = jnp.argsort(~mask, axis=0, stable=True)
  return jnp.take_along_axis(x, order[..., None], axis=0)
