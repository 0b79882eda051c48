"""The regularization of the AWD-LSTM (Merity, Keskar and Socher, ICLR 2018) as layers
of a :class:`fptt_jax.nn.Sequential`.

Each follows the window protocol, (state, x, mask, key) -> (state, y), the ones without
weights with the state (). They act in training only: with key None a layer gives back
what it would without noise and penalties. One mask lasts a window, as the authors'
release draws one for each forward pass, and it is scaled by 1/(1 - rate), so that
expectations are those of evaluation.
"""

import math
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import FLOAT32_MAX, check_array, check_number
from fptt_jax._dtypes import at_least_float32
from fptt_jax._types import OutputsWithPenalty
from fptt_jax.nn._checks import check_embed


class Stateless(nnx.Module):
  """A layer that needs the window's key or mask and carries nothing: its state is ().

  Attributes:
    in_readout: whether it may be part of a :class:`Sequential`'s readout, which may run
      once for every few steps of a window: it acts on each step alone, whatever the
      mask, draws from the window's key the same noise for all steps, and returns no
      penalty.
  """

  in_readout: ClassVar[bool] = False

  def initial_state(self, batch_size: int) -> tuple[()]:
    """Nothing."""
    return ()


class LockedDropout(Stateless):
  """Variational dropout (Gal and Ghahramani 2016): one mask [1, B, D] for all steps of
  a window.

  Args:
    rate: share of the units set to 0, in [0, 1).

  Raises:
    ValueError: a rate outside its range.
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
    """Floats x [S, B, D] -> [S, B, D]."""
    return state, x if key is None else x * _noise(
      key, self.rate, (1, *x.shape[1:]), x.dtype
    )


class EmbeddingDropout(Stateless):
  """An embedding that drops whole words: one mask [V] a window over the rows of its
  matrix.

  All occurrences of a word in the window vanish together, in all sequences of the
  batch.

  Args:
    embed: the embedding; a tied readout may hold the same one.
    rate: share of the words set to 0, in [0, 1).

  Raises:
    ValueError: a rate outside its range.
    TypeError: `embed` is no embedding, or (when called) the tokens are no integers.
  """

  def __init__(self, embed: nnx.Embed, rate: float):
    check_embed(embed)
    self.embed = embed
    self.rate = _check_rate(rate)

  def __call__(
    self,
    state: tuple[()],
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[()], jax.Array]:
    """Tokens x int [S, B] -> [S, B, E]."""
    if not jnp.issubdtype(check_array('tokens', x).dtype, jnp.integer):
      raise TypeError(
        f'EmbeddingDropout expected tokens, integers, got dtype {x.dtype}.'
      )
    y = self.embed(x)
    if key is None:
      return state, y
    words = _noise(key, self.rate, (self.embed.num_embeddings,), y.dtype)
    return state, y * words[x][..., None]


class WeightDrop(nnx.Module):
  """A recurrent layer whose hidden-to-hidden weights are dropped out (DropConnect), one
  mask a window.

  The layer itself is left as it is: a copy with dropped weights runs the window.

  Args:
    layer: runs windows and keeps its recurrent matrix as the one parameter `w_h`:
      :class:`LSTM`, :class:`GRU`, :class:`ElmanRNN`.
    rate: share of the weights set to 0, in [0, 1).

  Raises:
    ValueError: a rate outside its range.
    TypeError: a layer without such a parameter.
  """

  def __init__(self, layer: Any, rate: float):
    if not isinstance(getattr(layer, 'w_h', None), nnx.Param) or not hasattr(
      layer, 'initial_state'
    ):
      raise TypeError(
        'WeightDrop expected a recurrent layer with one recurrent matrix w_h, got '
        f'{type(layer).__name__}.'
      )
    self.layer = layer
    self.rate = _check_rate(rate)

  def initial_state(self, batch_size: int) -> Any:
    """The layer's own."""
    return self.layer.initial_state(batch_size)

  def __call__(
    self,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[Any, jax.Array | OutputsWithPenalty]:
    """Runs a window with dropped weights."""
    if key is None:
      return self.layer(state, x, mask, None)
    noise_key, layer_key = jax.random.split(key)
    w_h = self.layer.w_h[...]
    graph, weights = nnx.split(self.layer)
    nnx.replace_by_pure_dict(
      weights, {'w_h': w_h * _noise(noise_key, self.rate, w_h.shape, w_h.dtype)}
    )
    return nnx.merge(graph, weights)(state, x, mask, layer_key)


class ActivationPenalty(Stateless):
  """Activation regularization, AR: the penalty α · mean over H of h², at each step;
  what comes in goes out.

  The release applies it to the last recurrent layer's outputs after their dropout:
  LSTM, TemporalActivationPenalty, :class:`LockedDropout`, ActivationPenalty, readout.

  Args:
    alpha: α >= 0.

  Raises:
    ValueError: a negative or infinite α.
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
    """Activations h [S, B, H] -> h, in training with their penalty [S, B]."""
    return state, x if key is None else OutputsWithPenalty(
      x, self.alpha * _mean_square(x)
    )


class TemporalActivationPenalty(Stateless):
  """Temporal activation regularization, TAR: β · mean over H of (h_t - h_{t-1})²,
  within a window; what comes in goes out.

  The release applies it to the last recurrent layer's raw outputs, before their
  dropout. A window of S steps has S - 1 differences and the release takes their mean,
  while the trainer takes a penalty's mean over all valid steps: so the differences are
  weighed by (valid steps) / (valid differences), S/(S-1) in a full window, and the
  first step has none. Across masked steps the difference is to the last valid step
  before them.

  Args:
    beta: β >= 0.

  Raises:
    ValueError: a negative or infinite β.
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
    """Activations h [S, B, H] -> h, in training with their penalty [S, B]."""
    if key is None:
      return state, x
    valid = jnp.ones(x.shape[:2], bool) if mask is None else mask
    if mask is None:
      before, counted = x[:-1], valid[1:]
    else:
      # The number of the last valid step up to each, -1 where there is none yet.
      steps = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
      number = jax.lax.cummax(jnp.where(mask, steps, -1), axis=0)[:-1]
      before = jnp.take_along_axis(x, jnp.maximum(number, 0)[..., None], axis=0)
      counted = mask[1:] & (number >= 0)
    squares = jnp.where(counted, _mean_square(x[1:] - before), 0)
    differences = jnp.pad(squares, ((1, 0), (0, 0)))
    weight = valid.sum().astype(differences.dtype) / jnp.maximum(
      counted.sum(), 1
    ).astype(differences.dtype)
    return state, OutputsWithPenalty(x, self.beta * weight * differences)


def _mean_square(h: jax.Array) -> jax.Array:
  """Mean over H of h² [S, B], in at least float32."""
  return jnp.square(h.astype(at_least_float32(h.dtype))).mean(-1)


def _noise(
  key: jax.Array, rate: float, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
  """Factors 0 with probability `rate`, otherwise 1/(1 - rate)."""
  return jax.random.bernoulli(key, 1 - rate, shape).astype(dtype) / (1 - rate)


def _check_rate(rate: float) -> float:
  return check_number('rate', rate, 0, math.nextafter(1, 0), 'in [0, 1)')
