"""Incremental recurrent network (iRNN)."""

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import FLOAT32_TINY, check_integer
from fptt_jax.nn._low_rank import make_matrix, matrix_values, multiply
from fptt_jax.nn._recurrent import Recurrent, Step

MAX_INNER_STEPS = 100
"""Inner steps are unrolled, so more would compile slowly."""


class IncrementalRNN(Recurrent):
  r"""Incremental RNN (iRNN): Euler steps toward the equilibrium of an ODE.

  .. math::

    g_0 = h, \quad g_i = g_{i-1} + \eta_i (\phi((g_{i-1} + h) W_h + x W_x + b) -
    (g_{i-1} + h)), \quad h' = g_n, \quad \phi = \mathrm{relu}

  At the equilibrium φ(...) = g + h. So h' + h depends on x and on itself only, and
  ∂h'/∂h = -I exactly: the gradient neither vanishes nor explodes. A few steps of small
  η keep h' near h, as a skip connection does.

  The equilibrium does not depend on g_0, but a few steps toward it do. g_0 = h, relu,
  the factor 1 before (g + h), the uniform weights and the range of η are taken from
  public implementations of the paper. One η per inner step is trained and shared by
  all time steps, so that windows of any length run the same cell.

  Parameters: `w_x` [D, H], `w_h` a list of one matrix [H, H] or of the factors [H, r],
  [r, H] of a low rank, `bias` [H], `eta` [n]: H(D + H + 1) + n numbers, with a rank
  H(D + 2r + 1) + n. The paper quotes 4K for pixel MNIST, which is less than a full
  matrix has at H = 128; a rank of 15 gives 4,099 with n = 3.

  Args:
    in_features: D.
    hidden_features: H.
    inner_steps: number n of Euler steps per input, 1 to 100.
    eta: initial η > 0 of every inner step, small (0.001 to 0.01).
    u_rank: rank r of W_h (U in the paper), at most H; None for a full matrix.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters. Weights and bias are uniform in ±1/√H.

  Raises:
    ValueError: an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> layer = nn.IncrementalRNN(3, 16, rngs=nnx.Rngs(0))
    >>> state, y = layer(layer.initial_state(4), jnp.ones((28, 4, 3)))
    >>> y.shape
    (28, 4, 16)

  References:
    Kag, Zhang and Saligrama, "RNNs Incrementally Evolving on an Equilibrium Manifold",
    ICLR 2020.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    inner_steps: int = 3,
    eta: float = 0.01,
    u_rank: int | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs, 'scan')
    most = MAX_INNER_STEPS
    accepted = f'an integer from 1 to {most}'
    inner_steps = check_integer('inner_steps', inner_steps, 1, most, accepted)
    eta = self._check_number('eta', eta, FLOAT32_TINY, 'a number > 0')
    inputs = self.in_features
    size = self.hidden_features

    def draw(shape: tuple[int, ...]) -> jax.Array:
      bound = size**-0.5
      return jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)

    self.w_x = nnx.Param(draw((inputs, size)))
    self.w_h = make_matrix(draw, size, size, 'u_rank', u_rank)
    self.bias = nnx.Param(draw((size,)))
    self.eta = nnx.Param(jnp.full(inner_steps, eta, param_dtype))

  def step(self) -> Step:
    """Return one time step as a function of (h, x_t)."""
    w_x = self.w_x[...]
    w_h = matrix_values(self.w_h)
    bias = self.bias[None]
    etas = self.eta[...]

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      drive = x_t @ w_x + bias
      g = h
      # Unrolled: a loop of a few small products would cost more than it saves.
      for i in range(len(etas)):
        g = g + etas[i] * (jax.nn.relu(multiply(g + h, w_h) + drive) - (g + h))
      return g, g

    return step
