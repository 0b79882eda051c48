"""Long short-term memory."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import FLOAT32_MAX
from fptt_jax._types import OwnProduct, OwnStep
from fptt_jax.nn._fused import (
  FusedCell,
  WindowKernel,
  affine_gradient,
  matmul,
  scale_gates,
)
from fptt_jax.nn._initializers import draw_gates
from fptt_jax.nn._native import NativeCell
from fptt_jax.nn._recurrent import Recurrent, Step, own_recurrence
from fptt_jax.nn.kernels import cuda


class LSTMState(NamedTuple):
  """State of :class:`LSTM`.

  The order is torch's; flax's cells carry (c, h).

  Attributes:
    h: output [B, H].
    c: memory [B, H].
  """

  h: jax.Array
  c: jax.Array


def _prepare(axis: int, weights: Any) -> Any:
  return scale_gates(axis, weights, (0.5, 0.5, 1.0, 0.5))


def _forward(
  axis: int, prepared: Any, state: LSTMState, drive_t: jax.Array
) -> tuple[LSTMState, tuple[jax.Array, ...]]:
  """Compute a step and the factors of its Jacobian.

  The factors are, in this order: of dc for i, f and g; of dh for o and for c; of dc
  for the c of the step before.
  """
  h, c = state
  # One tanh over all gates: see scale_gates.
  a = jnp.tanh(drive_t + matmul(axis, prepared[1], h))
  i, f, g, o = jnp.split(a, 4, axis)
  d_i, d_f, d_g, d_o = jnp.split(1 - a * a, 4, axis)
  # σ(z) = (1 + tanh(z/2))/2; see scale_gates.
  i = 0.5 * i + 0.5
  f = 0.5 * f + 0.5
  o = 0.5 * o + 0.5
  new_c = f * c + i * g
  t = jnp.tanh(new_c)
  factors = (
    0.25 * d_i * g,
    0.25 * d_f * c,
    d_g * i,
    0.25 * d_o * t,
    o * (1 - t * t),
    f,
  )
  return type(state)(o * t, new_c), factors


def _backward(
  axis: int, weights: Any, factors: tuple[jax.Array, ...], d_state: LSTMState
) -> tuple[LSTMState, jax.Array]:
  to_i, to_f, to_g, to_o, to_c, f = factors
  dh, dc = d_state
  # c reaches the loss through h, too.
  dc = dc + dh * to_c
  dz = jnp.concatenate([dc * to_i, dc * to_f, dc * to_g, dh * to_o], axis)
  return type(d_state)(matmul(axis, weights[1], dz), dc * f), dz


def _output(state: LSTMState) -> jax.Array:
  return state[0]


FUSED_CELL = FusedCell(
  prepare=_prepare,
  forward=_forward,
  backward=_backward,
  weight_gradient=affine_gradient,
  output=_output,
  joint=True,
)
"""Weights (w_x [D, 4H], w_h [H, 4H], bias [4H]), gates i, f, g, o."""


def _cuda_forward(
  weights: Any, state: LSTMState, drive: jax.Array, mask: jax.Array | None
) -> tuple[LSTMState, tuple[Any, Any]]:
  matrices = {'w_h': weights[1]}
  parts = {'h': state.h, 'c': state.c}
  end, outputs = cuda.run_forward('LSTM', drive, matrices, parts, mask)
  return type(state)(*end), outputs


def _cuda_backward(
  weights: Any, factors: Any, dy: jax.Array, mask: jax.Array | None, d_state: LSTMState
) -> tuple[LSTMState, jax.Array]:
  steps, batch, size = dy.shape
  shapes = [(steps, batch, 4 * size), (batch, size), (batch, size)]
  operands = (*factors, dy, *d_state, weights[1].T)
  dz, *before = cuda.run_backward('LSTM', shapes, operands, dy, mask)
  return type(d_state)(*before), dz


CUDA_KERNEL = WindowKernel(_cuda_forward, _cuda_backward)
"""All steps of :data:`FUSED_CELL`, float32, H in `cuda.SIZES`."""


def _weight_shapes(features: int, hidden: int) -> tuple[tuple[int, ...], ...]:
  return (features, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,)


def _own_step(
  weights: Any, state: LSTMState, x_t: jax.Array, own_only: bool
) -> OwnStep:
  w_x, w_h, bias = weights
  z = x_t @ w_x + state.h @ w_h + bias[None]
  z_i, z_f, z_g, z_o = jnp.split(z, 4, axis=-1)
  i, f, o = (jax.nn.sigmoid(gate) for gate in (z_i, z_f, z_o))
  g = jnp.tanh(z_g)
  t = jnp.tanh(f * state.c + i * g)
  of_c = (g * i * (1 - i), state.c * f * (1 - f), i * (1 - g * g))
  h_by_c = o * (1 - t * t)
  of_h = tuple(h_by_c * gain for gain in of_c)
  gains = ((*of_h, t * o * (1 - o)), (*of_c, None))
  h_by_h, c_by_h = own_recurrence(gains, w_h, own_only)
  transition = ((h_by_h, h_by_c * f), (c_by_h, f))
  operands = {'w_x': x_t, 'w_h': state.h, 'bias': None}
  return OwnStep(transition, (OwnProduct(gains, operands),))


NATIVE_CELL = NativeCell(
  'lstm', 5, _weight_shapes, FUSED_CELL, ('w_x', 'w_h', 'bias'), _own_step
)
"""The factors are i, f, g, o and the new c."""


class LSTM(Recurrent):
  r"""Long short-term memory with forget gates, as `torch.nn.LSTM` computes it.

  .. math::

    (i, f, g, o) = x W_x + h W_h + b, \quad c' = \sigma(f) c + \sigma(i) \tanh(g), \quad
    h' = \sigma(o) \tanh(c')

  Parameters: `w_x` [D, 4H], `w_h` [H, 4H], `bias` [4H], gates in the order i, f, g, o:
  4H(D + H + 1) numbers. Torch's two biases are one sum here. The state is an
  :class:`LSTMState`.

  Args:
    in_features: D.
    hidden_features: H.
    init: 'torch' draws all weights uniform in ±1/√H, the bias as the sum of two such.
      'flax' draws `w_x` LeCun normal and `w_h` orthogonal per gate; the bias is 0.
    forget_bias: initial bias of the forget gate, in place of `init`'s. 1 gives long
      memories from the start.
    implementation: how a window runs. 'auto' takes 'native' where it can run, else
      'custom_vjp'. 'native' runs all steps in one CPU kernel for float32, which a C++
      compiler builds at first use. 'custom_vjp' is a scan with a hand-written backward
      pass. Both are differentiable once, in reverse mode. 'scan' is the plain scan over
      steps, which `jax.jvp` and second derivatives need.
      'cuda' runs all steps of a window in one CUDA kernel, for float32 and H of 32, 64
      or 128; the kernels have only run in emulation so far.
    products: 'bfloat16' rounds the operands of all products of a window, forward and
      backward, for float32 parameters; sums, gates and state stay float32. Training
      of 128 units is about twice as fast on Intel CPUs with AMX, and 1.5 times as fast
      on AMD CPUs with AVX-512 BF16. On other CPUs it is slower, and warns once. None
      follows `jax.default_matmul_precision`.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters.

  Raises:
    ValueError: an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> lstm = nn.LSTM(3, 16, rngs=nnx.Rngs(0))
    >>> state, y = lstm(lstm.initial_state(4), jnp.ones((28, 4, 3)))
    >>> y.shape
    (28, 4, 16)

  References:
    Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 1997.
  """

  _cuda_kernel = CUDA_KERNEL
  _native_cell = NATIVE_CELL

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    init: str = 'torch',
    forget_bias: float | None = None,
    implementation: str = 'auto',
    products: str | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      in_features, hidden_features, param_dtype, rngs, implementation, products
    )
    w_x, w_h, biases = draw_gates(self, init, 4, rngs)
    bias = biases[0] + biases[1]
    if forget_bias is not None:
      accepted = 'a finite number or None'
      value = self._check_number('forget_bias', forget_bias, -FLOAT32_MAX, accepted)
      size = self.hidden_features
      bias = bias.at[size : 2 * size].set(value)
    self.w_x = nnx.Param(w_x)
    self.w_h = nnx.Param(w_h)
    self.bias = nnx.Param(bias)

  def initial_state(self, batch_size: int) -> LSTMState:
    """Return the state before the first step: zeros."""
    h = self._zeros(batch_size, self.hidden_features)
    c = self._zeros(batch_size, self.hidden_features)
    return LSTMState(h, c)

  def step(self) -> Step:
    """Return one time step as a function of (state, x_t)."""
    w_x = self.w_x[...]
    w_h = self.w_h[...]
    bias = self.bias[None]

    def step(state: LSTMState, x_t: jax.Array) -> tuple[LSTMState, jax.Array]:
      i, f, g, o = jnp.split(x_t @ w_x + state.h @ w_h + bias, 4, axis=-1)
      c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
      h = jax.nn.sigmoid(o) * jnp.tanh(c)
      return LSTMState(h, c), h

    return step

  def own_step(self, state: LSTMState, x_t: jax.Array, own_only: bool) -> OwnStep:
    """Return the derivatives within each unit; see :class:`Recurrent`."""
    return _own_step(self._fused_cell()[1], state, x_t, own_only)

  def _fused_cell(self) -> tuple[FusedCell, Any]:
    return FUSED_CELL, (self.w_x[...], self.w_h[...], self.bias[...])
