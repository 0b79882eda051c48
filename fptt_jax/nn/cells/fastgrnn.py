"""FastGRNN."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import FLOAT32_MAX
from fptt_jax.nn._low_rank import make_matrix, matrix_values, multiply
from fptt_jax.nn._recurrent import Recurrent, Step


class FastGRNN(Recurrent):
  r"""FastGRNN: a gated unit whose gate shares the candidate's weights.

  .. math::

    a = x W_x + h W_h, \quad z = \sigma(a + b_z), \quad
    h' = (\sigma(\zeta)(1 - z) + \sigma(\nu)) \tanh(a + b_h) + z h

  Parameters: `w_x` and `w_h`, each a list of one matrix, [D, H] and [H, H], or of two
  factors of a low rank r, [D, r], [r, H] and [H, r], [r, H]; `bias` [2H], first the
  gate's part; scalars `zeta` and `nu`, stored before their sigmoid, which keeps σ(ζ)
  and σ(ν) in (0, 1) without a projection. These are DH + HH + 2H + 2 numbers, with
  ranks r_w(D + H) + 2 r_u H + 2H + 2.

  The sparse and quantized weights of the paper are not implemented.

  Args:
    in_features: D.
    hidden_features: H.
    w_rank: rank r_w of W_x, at most min(D, H); None for a full matrix.
    u_rank: rank r_u of W_h (U in the paper), at most H; None for a full matrix.
    zeta: initial ζ.
    nu: initial ν. The authors' code starts at ζ = 1, ν = -4 and advises 6 and -6 where
      that does not train.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters. Matrices and factors are normal with
      standard deviation 0.1 and biases are 1, as in the authors' code.

  Raises:
    ValueError: an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> layer = nn.FastGRNN(3, 16, u_rank=4, rngs=nnx.Rngs(0))
    >>> state, y = layer(layer.initial_state(4), jnp.ones((28, 4, 3)))
    >>> y.shape
    (28, 4, 16)

  References:
    Kusupati, Singh, Bhatia, Kumar, Jain and Varma, "FastGRNN", NeurIPS 2018.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    w_rank: int | None = None,
    u_rank: int | None = None,
    zeta: float = 1.0,
    nu: float = -4.0,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs, 'scan')
    inputs = self.in_features
    size = self.hidden_features

    def draw(shape: tuple[int, ...]) -> jax.Array:
      normal = jax.nn.initializers.normal(0.1)
      return normal(rngs.params(), shape, param_dtype)

    self.w_x = make_matrix(draw, inputs, size, 'w_rank', w_rank)
    self.w_h = make_matrix(draw, size, size, 'u_rank', u_rank)
    self.bias = nnx.Param(jnp.ones(2 * size, param_dtype))
    self.zeta = self._make_scalar('zeta', zeta)
    self.nu = self._make_scalar('nu', nu)

  def step(self) -> Step:
    """Return one time step as a function of (h, x_t)."""
    w_x = matrix_values(self.w_x)
    w_h = matrix_values(self.w_h)
    bias_z, bias_h = jnp.split(self.bias[None], 2, axis=-1)
    # Once per window and not per step.
    scale = jax.nn.sigmoid(self.zeta[...])
    shift = jax.nn.sigmoid(self.nu[...])

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      shared = multiply(x_t, w_x) + multiply(h, w_h)
      z = jax.nn.sigmoid(shared + bias_z)
      gate = scale * (1 - z) + shift
      candidate = jnp.tanh(shared + bias_h)
      h = gate * candidate + z * h
      return h, h

    return step

  def _make_scalar(self, name: str, value: float) -> nnx.Param[Any]:
    """Return a scalar parameter after a check of its initial value."""
    number = self._check_number(name, value, -FLOAT32_MAX, 'a finite number')
    return nnx.Param(jnp.asarray(number, self.param_dtype))
