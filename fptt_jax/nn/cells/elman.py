"""Elman network."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._types import OwnProduct, OwnStep
from fptt_jax.nn._fused import FusedCell, affine_gradient, matmul
from fptt_jax.nn._initializers import draw_gates
from fptt_jax.nn._native import NativeCell
from fptt_jax.nn._recurrent import Recurrent, Step, own_recurrence


def _forward(
  axis: int, prepared: Any, h: jax.Array, drive_t: jax.Array
) -> tuple[jax.Array, tuple[jax.Array]]:
  h = jnp.tanh(drive_t + matmul(axis, prepared[1], h))
  return h, (1 - h * h,)


def _backward(
  axis: int, weights: Any, factors: tuple[jax.Array, ...], dh: jax.Array
) -> tuple[jax.Array, jax.Array]:
  dz = dh * factors[0]
  return matmul(axis, weights[1], dz), dz


FUSED_CELL = FusedCell(
  forward=_forward,
  backward=_backward,
  weight_gradient=affine_gradient,
  joint=True,
)
"""Weights (w_x [D, H], w_h [H, H], bias [H])."""


def _weight_shapes(features: int, hidden: int) -> tuple[tuple[int, ...], ...]:
  return (features, hidden), (hidden, hidden), (hidden,)


def _own_step(
  weights: Any, state: jax.Array, x_t: jax.Array, own_only: bool
) -> OwnStep:
  w_x, w_h, bias = weights
  h = jnp.tanh(x_t @ w_x + state @ w_h + bias[None])
  gains = ((1 - h * h,),)
  [transition] = own_recurrence(gains, w_h, own_only)
  operands = {'w_x': x_t, 'w_h': state, 'bias': None}
  return OwnStep(((transition,),), (OwnProduct(gains, operands),))


NATIVE_CELL = NativeCell(
  'elman', 0, _weight_shapes, FUSED_CELL, ('w_x', 'w_h', 'bias'), _own_step
)
"""The outputs are all that the backward pass reads."""


class ElmanRNN(Recurrent):
  r"""Elman network with tanh, as `torch.nn.RNN` computes it.

  .. math:: h' = \tanh(x W_x + h W_h + b)

  Parameters: `w_x` [D, H], `w_h` [H, H], `bias` [H]: H(D + H + 1) numbers.

  Args:
    in_features: D.
    hidden_features: H.
    init: 'torch' or 'flax', as for :class:`fptt_jax.nn.LSTM`.
    implementation: 'auto', 'native', 'custom_vjp' or 'scan', as for
      :class:`fptt_jax.nn.LSTM`.
    products: as for :class:`fptt_jax.nn.LSTM`.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters.

  Raises:
    ValueError: an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> rnn = nn.ElmanRNN(3, 16, rngs=nnx.Rngs(0))
    >>> state, y = rnn(rnn.initial_state(4), jnp.ones((28, 4, 3)))
    >>> y.shape
    (28, 4, 16)

  References:
    Elman, "Finding Structure in Time", Cognitive Science 1990.
  """

  _native_cell = NATIVE_CELL

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    init: str = 'torch',
    implementation: str = 'auto',
    products: str | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      in_features, hidden_features, param_dtype, rngs, implementation, products
    )
    w_x, w_h, biases = draw_gates(self, init, 1, rngs)
    self.w_x = nnx.Param(w_x)
    self.w_h = nnx.Param(w_h)
    self.bias = nnx.Param(biases[0] + biases[1])

  def step(self) -> Step:
    """Return one time step as a function of (h, x_t)."""
    w_x = self.w_x[...]
    w_h = self.w_h[...]
    bias = self.bias[None]

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      h = jnp.tanh(x_t @ w_x + h @ w_h + bias)
      return h, h

    return step

  def own_step(self, state: jax.Array, x_t: jax.Array, own_only: bool) -> OwnStep:
    """Return the derivatives within each unit; see :class:`Recurrent`."""
    return _own_step(self._fused_cell()[1], state, x_t, own_only)

  def _fused_cell(self) -> tuple[FusedCell, Any]:
    return FUSED_CELL, (self.w_x[...], self.w_h[...], self.bias[...])
