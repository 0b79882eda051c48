"""Initial weights of gated layers, as torch or flax draw them."""

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import check_choice
from fptt_jax._dtypes import at_least_float32
from fptt_jax.nn._recurrent import Recurrent

INITS = ('torch', 'flax')


def draw_gates(
  layer: Recurrent, init: str, num_gates: int, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """Draw the weights of a layer with G gates.

  Args:
    layer: its sizes and dtype are used.
    init: 'torch' or 'flax'; see :class:`fptt_jax.nn.LSTM`.
    num_gates: G.
    rngs: source of the random numbers.

  Returns:
    (w_x [D, GH], w_h [H, GH], two biases [GH]).

  Raises:
    ValueError: `init` is unknown.
  """
  check_choice('init', init, INITS)
  if init == 'torch':
    return _draw_as_torch(layer, num_gates, rngs)
  return _draw_as_flax(layer, num_gates, rngs)


def _draw_as_torch(
  layer: Recurrent, num_gates: int, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """Draw all weights uniform in ±1/√H."""
  # The order of the draws is part of the result: seeds give the same weights.
  bound = layer.hidden_features**-0.5
  width = num_gates * layer.hidden_features
  shapes = [
    (layer.in_features, width),
    (layer.hidden_features, width),
    (width,),
    (width,),
  ]
  w_x, w_h, *biases = (
    jax.random.uniform(rngs.params(), shape, layer.param_dtype, -bound, bound)
    for shape in shapes
  )
  return w_x, w_h, biases


def _draw_as_flax(
  layer: Recurrent, num_gates: int, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """Draw w_x LeCun normal and w_h orthogonal, gate by gate; biases are 0."""
  size = layer.hidden_features
  dtype = layer.param_dtype
  normal = jax.nn.initializers.lecun_normal()
  orthogonal = jax.nn.initializers.orthogonal()
  input_kernels = [
    normal(rngs.params(), (layer.in_features, size), dtype) for _ in range(num_gates)
  ]
  # The QR decomposition behind `orthogonal` needs at least float32.
  wide = at_least_float32(dtype)
  kernels = [
    orthogonal(rngs.params(), (size, size), wide).astype(dtype)
    for _ in range(num_gates)
  ]
  biases = [jnp.zeros(num_gates * size, dtype) for _ in range(2)]
  return jnp.concatenate(input_kernels, -1), jnp.concatenate(kernels, -1), biases
