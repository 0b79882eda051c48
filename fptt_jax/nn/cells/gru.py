"""Gated recurrent unit."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._types import OwnProduct, OwnStep
from fptt_jax.nn._fused import (
  FusedCell,
  WindowKernel,
  bias_gradient,
  input_gradient,
  matmul,
  product_gradient,
  scale_gates,
)
from fptt_jax.nn._initializers import draw_gates
from fptt_jax.nn._native import NativeCell
from fptt_jax.nn._recurrent import Recurrent, Step, own_recurrence
from fptt_jax.nn.kernels import cuda


def _prepare(axis: int, weights: Any) -> Any:
  return scale_gates(axis, weights, (0.5, 0.5, 1.0))


def _forward(
  axis: int, prepared: Any, h: jax.Array, drive_t: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Compute a step and the factors of its Jacobian.

  The factors are those of dh, in this order: for r, z, n, the recurrent part of n, and
  the h of the step before.
  """
  size = h.shape[axis]
  drive_rz, drive_n = jnp.split(drive_t, [2 * size], axis)
  recurrent = matmul(axis, prepared[1], h) + prepared[3]
  recurrent_rz, recurrent_n = jnp.split(recurrent, [2 * size], axis)
  # σ(z) = (1 + tanh(z/2))/2; see scale_gates.
  r, z = jnp.split(0.5 * jnp.tanh(drive_rz + recurrent_rz) + 0.5, 2, axis)
  n = jnp.tanh(drive_n + r * recurrent_n)
  to_n = (1 - z) * (1 - n * n)
  factors = (
    to_n * recurrent_n * r * (1 - r),
    (h - n) * z * (1 - z),
    to_n,
    to_n * r,
    z,
  )
  return n + z * (h - n), factors


def _backward(
  axis: int, weights: Any, factors: tuple[jax.Array, ...], dh: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Compute a step backward; dz is one array for w_x and one for w_h."""
  to_r, to_z, to_n, to_recurrent_n, z = factors
  d_rz = jnp.concatenate([dh * to_r, dh * to_z], axis)
  d_recurrent = jnp.concatenate([d_rz, dh * to_recurrent_n], axis)
  # The candidate's recurrent part passes the reset gate, the input part does not.
  before = matmul(axis, weights[1], d_recurrent) + dh * z
  d_input = jnp.concatenate([d_rz, dh * to_n], axis)
  return before, (d_input, d_recurrent)


def _weight_gradient(
  axis: int, previous: jax.Array, x: jax.Array, dz: tuple[jax.Array, jax.Array]
) -> Any:
  d_input, d_recurrent = dz
  return (
    product_gradient(axis, x, d_input),
    product_gradient(axis, previous, d_recurrent),
    bias_gradient(axis, d_input),
    bias_gradient(axis, d_recurrent),
  )


def _input_gradient(
  axis: int, weights: Any, dz: tuple[jax.Array, jax.Array]
) -> jax.Array:
  return input_gradient(axis, weights, dz[0])


FUSED_CELL = FusedCell(
  prepare=_prepare,
  forward=_forward,
  backward=_backward,
  weight_gradient=_weight_gradient,
  input_gradient=_input_gradient,
)
"""Weights (w_x [D, 3H], w_h [H, 3H], bias [3H], recurrent_bias [3H]), gates r, z, n."""


def _cuda_forward(
  weights: Any, h: jax.Array, drive: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, tuple[Any, Any]]:
  matrices = {'w_h': weights[1], 'recurrent_bias': weights[3][0]}
  (end,), outputs = cuda.run_forward('GRU', drive, matrices, {'h': h}, mask)
  return end, outputs


def _cuda_backward(
  weights: Any, factors: Any, dy: jax.Array, mask: jax.Array | None, dh: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  steps, batch, size = dy.shape
  shapes = [(steps, batch, 3 * size), (steps, batch, 3 * size), (batch, size)]
  operands = (*factors, dy, dh, weights[1].T)
  d_input, d_recurrent, dh = cuda.run_backward('GRU', shapes, operands, dy, mask)
  return dh, (d_input, d_recurrent)


CUDA_KERNEL = WindowKernel(_cuda_forward, _cuda_backward)
"""All steps of :data:`FUSED_CELL`, float32, H in `cuda.SIZES`."""


def _weight_shapes(features: int, hidden: int) -> tuple[tuple[int, ...], ...]:
  wide = (3 * hidden,)
  return (features, *wide), (hidden, *wide), wide, wide


def _own_step(
  weights: Any, state: jax.Array, x_t: jax.Array, own_only: bool
) -> OwnStep:
  w_x, w_h, bias, recurrent_bias = weights
  x_r, x_z, x_n = jnp.split(x_t @ w_x + bias[None], 3, axis=-1)
  h_r, h_z, h_n = jnp.split(state @ w_h + recurrent_bias[None], 3, axis=-1)
  r = jax.nn.sigmoid(x_r + h_r)
  z = jax.nn.sigmoid(x_z + h_z)
  n = jnp.tanh(x_n + r * h_n)
  by_n = (1 - z) * (1 - n * n)
  by_rz = (by_n * h_n * r * (1 - r), (state - n) * z * (1 - z))
  # The reset gate acts on the recurrent part of the candidate alone.
  of_inputs = ((*by_rz, by_n),)
  of_state = ((*by_rz, by_n * r),)
  [recurrent_part] = own_recurrence(of_state, w_h, own_only)
  products = (
    OwnProduct(of_inputs, {'w_x': x_t, 'bias': None}),
    OwnProduct(of_state, {'w_h': state, 'recurrent_bias': None}),
  )
  return OwnStep(((z + recurrent_part,),), products)


NATIVE_CELL = NativeCell(
  'gru',
  4,
  _weight_shapes,
  FUSED_CELL,
  ('w_x', 'w_h', 'bias', 'recurrent_bias'),
  _own_step,
)
"""The factors are r, z, n and the recurrent part of n."""


class GRU(Recurrent):
  r"""Gated recurrent unit, as `torch.nn.GRU` computes it.

  .. math::

    r = \sigma(x W_{xr} + h W_{hr} + b_r), \quad z = \sigma(x W_{xz} + h W_{hz} + b_z),
    \quad n = \tanh(x W_{xn} + b_{xn} + r (h W_{hn} + b_{hn})), \quad h' = (1 - z) n + z
    h

  Parameters: `w_x` [D, 3H], `w_h` [H, 3H], `bias` [3H] and `recurrent_bias` [3H], gates
  in the order r, z, n. Only the last third of `recurrent_bias` is not redundant.

  Args:
    in_features: D.
    hidden_features: H.
    init: 'torch' or 'flax', as for :class:`fptt_jax.nn.LSTM`.
    recurrent_bias: whether there is a second bias. Without it, b_hn is 0.
    implementation: 'auto', 'native', 'custom_vjp' or 'scan', as for
      :class:`fptt_jax.nn.LSTM`.
      'cuda' runs all steps of a window in one CUDA kernel, for float32 and H of 32, 64
      or 128; the kernels have only run in emulation so far.
    products: as for :class:`fptt_jax.nn.LSTM`.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters.

  Raises:
    ValueError: an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> gru = nn.GRU(3, 16, rngs=nnx.Rngs(0))
    >>> state, y = gru(gru.initial_state(4), jnp.ones((28, 4, 3)))
    >>> y.shape
    (28, 4, 16)

  References:
    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for
    Statistical Machine Translation", EMNLP 2014.
  """

  _cuda_kernel = CUDA_KERNEL
  _native_cell = NATIVE_CELL

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    init: str = 'torch',
    recurrent_bias: bool = True,
    implementation: str = 'auto',
    products: str | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      in_features, hidden_features, param_dtype, rngs, implementation, products
    )
    w_x, w_h, biases = draw_gates(self, init, 3, rngs)
    self.w_x = nnx.Param(w_x)
    self.w_h = nnx.Param(w_h)
    self.bias = nnx.Param(biases[0])
    self.recurrent_bias = nnx.Param(biases[1]) if recurrent_bias else None

  def step(self) -> Step:
    """Return one time step as a function of (h, x_t)."""
    w_x = self.w_x[...]
    w_h = self.w_h[...]
    bias = self.bias[None]
    recurrent_bias = self._recurrent_bias()[None]

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      x_r, x_z, x_n = jnp.split(x_t @ w_x + bias, 3, axis=-1)
      h_r, h_z, h_n = jnp.split(h @ w_h + recurrent_bias, 3, axis=-1)
      r = jax.nn.sigmoid(x_r + h_r)
      z = jax.nn.sigmoid(x_z + h_z)
      n = jnp.tanh(x_n + r * h_n)
      h = (1 - z) * n + z * h
      return h, h

    return step

  def own_step(self, state: jax.Array, x_t: jax.Array, own_only: bool) -> OwnStep:
    """Return the derivatives within each unit; see :class:`Recurrent`."""
    step = _own_step(self._fused_cell()[1], state, x_t, own_only)
    if self.recurrent_bias is None:
      of_inputs, of_state = step.products
      of_state = of_state._replace(operands={'w_h': state})
      step = step._replace(products=(of_inputs, of_state))
    return step

  def _recurrent_bias(self) -> jax.Array:
    """Return the second bias [3H], zeros if there is none."""
    if self.recurrent_bias is None:
      # Zeros compute the same function, so the steps need no second variant.
      return jnp.zeros_like(self.bias[...])
    return self.recurrent_bias[...]

  def _fused_cell(self) -> tuple[FusedCell, Any]:
    weights = (self.w_x[...], self.w_h[...], self.bias[...], self._recurrent_bias())
    return FUSED_CELL, weights
