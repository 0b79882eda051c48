"""Regularization of the AWD-LSTM as layers of a :class:`fptt_jax.nn.Sequential`.

Each layer runs windows: (state, x, mask, key) -> (state, y). Layers without weights
have the state (). All act in training only: with key None, a layer adds neither noise
nor penalty. One mask lasts a window, as the authors' release draws one per forward
pass. Masks are scaled by 1/(1 - rate), so that expectations equal evaluation.

References:
  Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models",
  ICLR 2018.
"""

import math
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import (
  FLOAT32_MAX,
  check_array,
  check_number,
  check_type,
  require_type,
)
from fptt_jax._dtypes import widen
from fptt_jax._rows import sum_over_rows
from fptt_jax._types import OutputsWithPenalty


class Stateless(nnx.Module):
  """Base class of layers that need the window's key or mask, but carry no state.

  Attributes:
    in_readout: whether the layer may be part of the readout of a
      :class:`fptt_jax.nn.Sequential`, which may run on a few steps at a time. Such a
      layer acts on each step alone, ignores the mask, draws the same noise for all
      steps from the window's key, and returns no penalty.
  """

  in_readout: ClassVar[bool] = False

  def initial_state(self, batch_size: int) -> tuple[()]:
    """Return the empty state."""
    return ()


class LockedDropout(Stateless):
  """Variational dropout: one mask [1, B, D] for all steps of a window.

  Args:
    rate: fraction of the units set to 0, in [0, 1).

  Raises:
    ValueError: the rate is outside its range.

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> def build(rngs):
    ...   lstm = nn.LSTM(1, 16, rngs=rngs)
    ...   readout = nnx.Linear(16, 9, rngs=rngs)
    ...   return nn.Sequential(lstm, nn.LockedDropout(0.4), readout)
    >>> model = nn.from_nnx(build)

  References:
    Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent
    Neural Networks", NIPS 2016.
  """

  def __init__(self, rate: float):
    self.rate = _check_rate(rate)

  def __call__(
    self,
    state: tuple[()],
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[()], jax.Array]:
    """Map activations [S, B, D] to [S, B, D]."""
    if key is None:
      return state, x
    # One step's shape: all steps of the window share the mask.
    shape = (1, *x.shape[1:])
    noise = _draw_noise(key, self.rate, shape, x.dtype)
    return state, x * noise


class EmbeddingDropout(Stateless):
  """Embedding that drops whole words: one mask [V] per window over its rows.

  All occurrences of a word in the window are dropped together, in all sequences of the
  batch.

  Args:
    embed: the embedding. A tied readout may hold the same one.
    rate: fraction of the words set to 0, in [0, 1).

  Raises:
    ValueError: the rate is outside its range.
    TypeError: `embed` is not an `nnx.Embed`; the tokens are not integers (when called).

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> def build(rngs):
    ...   embed = nn.EmbeddingDropout(nnx.Embed(9, 16, rngs=rngs), 0.1)
    ...   return nn.Sequential(
    ...     embed, nn.LSTM(16, 16, rngs=rngs), nnx.Linear(16, 9, rngs=rngs)
    ...   )
    >>> model = nn.from_nnx(build)
  """

  def __init__(self, embed: nnx.Embed, rate: float):
    check_type('embed', embed, nnx.Embed)
    self.embed = embed
    self.rate = _check_rate(rate)

  def __call__(
    self,
    state: tuple[()],
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[()], jax.Array]:
    """Map tokens int [S, B] to features [S, B, E]."""
    dtype = check_array('tokens', x).dtype
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    require_type(is_integer, 'tokens', 'integers', x)
    y = self.embed(x)
    if key is None:
      return state, y
    # Over the vocabulary, so that all occurrences of a word share one factor.
    shape = (self.embed.num_embeddings,)
    words = _draw_noise(key, self.rate, shape, y.dtype)
    noise = words[x][..., None]
    return state, y * noise


class WeightDrop(nnx.Module):
  """Drop recurrent weights of a layer (DropConnect), with one mask per window.

  The layer itself does not change: a copy with dropped weights runs the window.

  Args:
    layer: runs windows and has one recurrent matrix, the parameter `w_h`:
      :class:`fptt_jax.nn.LSTM`, :class:`fptt_jax.nn.GRU` or
      :class:`fptt_jax.nn.ElmanRNN`.
    rate: fraction of the weights set to 0, in [0, 1).

  Raises:
    ValueError: the rate is outside its range.
    TypeError: the layer has no such parameter.

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> layer = nn.WeightDrop(nn.LSTM(1, 16, rngs=nnx.Rngs(0)), 0.5)
  """

  def __init__(self, layer: Any, rate: float):
    has_matrix = isinstance(getattr(layer, 'w_h', None), nnx.Param)
    is_recurrent = has_matrix and hasattr(layer, 'initial_state')
    accepted = 'recurrent with one recurrent matrix w_h'
    require_type(is_recurrent, 'layer', accepted, layer)
    self.layer = layer
    self.rate = _check_rate(rate)

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
    """Run a window, in training with dropped weights."""
    if key is None:
      return self.layer(state, x, mask, None)
    noise_key, layer_key = jax.random.split(key)
    w_h = self.layer.w_h[...]
    noise = _draw_noise(noise_key, self.rate, w_h.shape, w_h.dtype)
    # A copy, because the layer's own weights must not be written to while traced.
    graph, weights = nnx.split(self.layer)
    nnx.replace_by_pure_dict(weights, {'w_h': w_h * noise})
    dropped = nnx.merge(graph, weights)
    return dropped(state, x, mask, layer_key)


class ActivationPenalty(Stateless):
  """Activation regularization (AR): the penalty α · mean over H of h², per step.

  Activations pass through unchanged. The release applies it to the last recurrent
  layer's outputs after their dropout: LSTM, TemporalActivationPenalty,
  :class:`LockedDropout`, ActivationPenalty, readout.

  Args:
    alpha: α >= 0.

  Raises:
    ValueError: α is negative or not finite.

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> def build(rngs):
    ...   return nn.Sequential(
    ...     nn.LSTM(1, 16, rngs=rngs),
    ...     nn.TemporalActivationPenalty(1.0),
    ...     nn.LockedDropout(0.4),
    ...     nn.ActivationPenalty(2.0),
    ...     nnx.Linear(16, 9, rngs=rngs),
    ...   )
    >>> model = nn.from_nnx(build)
  """

  def __init__(self, alpha: float):
    self.alpha = check_number('alpha', alpha, 0, FLOAT32_MAX, 'a number >= 0')

  def __call__(
    self,
    state: tuple[()],
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[()], jax.Array | OutputsWithPenalty]:
    """Return activations [S, B, H], in training with their penalty [S, B]."""
    if key is None:
      return state, x
    penalty = self.alpha * _mean_square(x)
    return state, OutputsWithPenalty(x, penalty)


class TemporalActivationPenalty(Stateless):
  """Temporal activation regularization (TAR): β · mean over H of (h_t - h_{t-1})².

  Activations pass through unchanged. The release applies it to the last recurrent
  layer's raw outputs, before their dropout.

  Differences are taken within a window: S - 1 of them in a window of S steps. The
  release takes their mean, while the trainer takes a penalty's mean over all valid
  steps. The differences are therefore multiplied by (valid steps) / (valid
  differences), which is S/(S-1) in a full window; the first step has none. At masked
  steps, the difference is to the last valid step before them.

  Args:
    beta: β >= 0.

  Raises:
    ValueError: β is negative or not finite.

  Example:
    See :class:`ActivationPenalty`.
  """

  def __init__(self, beta: float):
    self.beta = check_number('beta', beta, 0, FLOAT32_MAX, 'a number >= 0')

  def __call__(
    self,
    state: tuple[()],
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[()], jax.Array | OutputsWithPenalty]:
    """Return activations [S, B, H], in training with their penalty [S, B]."""
    if key is None:
      return state, x
    if mask is None:
      valid = jnp.ones(x.shape[:2], bool)
      before = x[:-1]
      counted = valid[1:]
    else:
      valid = mask
      before, counted = _previous_valid(x, mask)
    squares = jnp.where(counted, _mean_square(x[1:] - before), 0)
    differences = jnp.pad(squares, ((1, 0), (0, 0)))
    dtype = differences.dtype
    counts = (counted.sum(), valid.sum())
    if mask is not None:
      counts = sum_over_rows(counts)
    # At least 1: a window may have no difference at all.
    num_counted, num_valid = jnp.maximum(counts[0], 1), counts[1]
    weight = num_valid.astype(dtype) / num_counted.astype(dtype)
    penalty = self.beta * weight * differences
    return state, OutputsWithPenalty(x, penalty)


def _previous_valid(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Find the last valid step before each step from the second one on.

  Returns:
    (activations [S - 1, B, H] of that step, bool [S - 1, B]: whether both steps are
    valid).
  """
  steps = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
  # -1 where there is no valid step yet.
  valid_steps = jnp.where(mask, steps, -1)
  index = jax.lax.cummax(valid_steps, axis=0)[:-1]
  row = jnp.maximum(index, 0)[..., None]
  before = jnp.take_along_axis(x, row, axis=0)
  is_counted = mask[1:] & (index >= 0)
  return before, is_counted


def _mean_square(h: jax.Array) -> jax.Array:
  """Return the mean of h² over H, [S, B], in at least float32."""
  return jnp.square(widen(h)).mean(-1)


def _draw_noise(
  key: jax.Array, rate: float, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
  """Draw factors that are 0 with probability `rate`, and else 1/(1 - rate)."""
  kept = 1 - rate
  mask = jax.random.bernoulli(key, kept, shape)
  return mask.astype(dtype) / kept


def _check_rate(rate: float) -> float:
  """Return a rate that is in [0, 1)."""
  below_one = math.nextafter(1, 0)
  return check_number('rate', rate, 0, below_one, 'in [0, 1)')
