"""Antisymmetric recurrent network with gating."""

import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import FLOAT32_TINY
from fptt_jax.nn._fused import FusedCell, bias_gradient, matmul, product_gradient
from fptt_jax.nn._native import NativeCell
from fptt_jax.nn._recurrent import Recurrent, Step


def _forward(
  epsilon: float, axis: int, prepared: Any, h: jax.Array, drive_t: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  recurrent = matmul(axis, prepared[1], h)
  to_tanh, to_gate = jnp.split(drive_t, 2, axis)
  t = jnp.tanh(recurrent + to_tanh)
  gate = jax.nn.sigmoid(recurrent + to_gate)
  scaled = epsilon * gate
  return h + scaled * t, (scaled * (1 - t * t), scaled * t * (1 - gate))


def _backward(
  axis: int, weights: Any, factors: tuple[jax.Array, ...], dh: jax.Array
) -> tuple[jax.Array, jax.Array]:
  to_tanh = dh * factors[0]
  to_gate = dh * factors[1]
  before = dh + matmul(axis, weights[1], to_tanh + to_gate)
  return before, jnp.concatenate([to_tanh, to_gate], axis)


def _weight_gradient(
  axis: int, previous: jax.Array, x: jax.Array, dz: jax.Array
) -> Any:
  to_tanh, to_gate = jnp.split(dz, 2, axis)
  return (
    product_gradient(axis, x, dz),
    product_gradient(axis, previous, to_tanh + to_gate),
    bias_gradient(axis, dz),
  )


@functools.cache
def fused_cell(epsilon: float) -> FusedCell:
  """Make the parts of a fused window for a step size ε.

  Weights (v [D, 2H], Aᵀ [H, H], bias [2H]), first the part of tanh, then the gate's.
  The cache keeps one object per ε: JAX compiles anew for each other object.
  """
  return FusedCell(
    forward=functools.partial(_forward, epsilon),
    backward=_backward,
    weight_gradient=_weight_gradient,
  )


def _weight_shapes(features: int, hidden: int) -> tuple[tuple[int, ...], ...]:
  return (features, 2 * hidden), (hidden, hidden), (2 * hidden,)


NATIVE_CELL = NativeCell('antisymmetric', 2, _weight_shapes, fused_cell(1.0))
"""The factors are the tanh and its gate. Each layer has an ε of its own."""


class AntisymmetricRNN(Recurrent):
  r"""AntisymmetricRNN with gating (Eq. 14 of the paper).

  .. math::

    A = W - W^\top - \gamma I, \quad z = \sigma(A h + x V_z + b_z), \quad h' = h +
    \epsilon\, z \tanh(A h + x V_h + b_h)

  Only the strict upper triangle of W matters, and only it is stored. Parameters: `w`
  [H(H-1)/2], `v` [D, 2H] and `bias` [2H], first the part of tanh, then the gate's.

  Args:
    in_features: D.
    hidden_features: H.
    epsilon: step size ε > 0.
    gamma: diffusion γ >= 0.
    w_scale: σ_w. The initial entries of W are normal with variance σ_w²/H, those of V
      with variance 1/D; biases are 0.
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
    >>> rnn = nn.AntisymmetricRNN(3, 16, epsilon=0.1, rngs=nnx.Rngs(0))
    >>> state, y = rnn(rnn.initial_state(4), jnp.ones((28, 4, 3)))
    >>> y.shape
    (28, 4, 16)

  References:
    Chang, Chen, Haber and Chi, "AntisymmetricRNN: A Dynamical System View on Recurrent
    Neural Networks", ICLR 2019.
  """

  _native_cell = NATIVE_CELL

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    epsilon: float = 0.01,
    gamma: float = 0.01,
    w_scale: float = 1.0,
    implementation: str = 'auto',
    products: str | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      in_features, hidden_features, param_dtype, rngs, implementation, products
    )
    positive = 'a finite number > 0'
    nonnegative = 'a finite number >= 0'
    self.epsilon = self._check_number('epsilon', epsilon, FLOAT32_TINY, positive)
    self.gamma = self._check_number('gamma', gamma, 0, nonnegative)
    w_scale = self._check_number('w_scale', w_scale, 0, nonnegative)
    size = self.hidden_features
    draw_w = jax.nn.initializers.normal(w_scale * size**-0.5)
    draw_v = jax.nn.initializers.normal(self.in_features**-0.5)
    w = draw_w(rngs.params(), (size * (size - 1) // 2,), param_dtype)
    v = draw_v(rngs.params(), (self.in_features, 2 * size), param_dtype)
    self.w = nnx.Param(w)
    self.v = nnx.Param(v)
    self.bias = nnx.Param(jnp.zeros(2 * size, param_dtype))

  def step(self) -> Step:
    """Return one time step as a function of (h, x_t)."""
    a_transposed = self._a_transposed()
    v = self.v[...]
    bias = self.bias[None]
    epsilon = self.epsilon

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      recurrent = h @ a_transposed
      to_tanh, to_gate = jnp.split(x_t @ v + bias, 2, axis=-1)
      gate = jax.nn.sigmoid(recurrent + to_gate)
      h = h + epsilon * gate * jnp.tanh(recurrent + to_tanh)
      return h, h

    return step

  def _a_transposed(self) -> jax.Array:
    """Return Aᵀ [H, H]: a step multiplies the row h by it."""
    size = self.hidden_features
    # Only H(H-1)/2 numbers are stored, so that the optimizer's state is half as large.
    upper = jnp.zeros((size, size), self.w[...].dtype)
    upper = upper.at[jnp.triu_indices(size, 1)].set(self.w[...])
    return (upper - upper.T).T - self.gamma * jnp.eye(size, dtype=upper.dtype)

  def _fused_cell(self) -> tuple[FusedCell, Any]:
    weights = (self.v[...], self._a_transposed(), self.bias[...])
    return fused_cell(self.epsilon), weights

  def _make_native_cell(self) -> NativeCell:
    attributes = (('epsilon', self.epsilon),)
    return NATIVE_CELL._replace(fused=fused_cell(self.epsilon), attributes=attributes)
