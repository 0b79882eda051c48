"""Windows of a recurrent layer with a backward pass of their own: quicker than differentiating the scan, and smaller.

A step is taken apart into its matrix products and the rest. Forward, each step leaves behind the factors by which the gradient of
its state is to be multiplied, so that a step backward is a few multiplications and nothing is computed twice. The products that
give the weights' gradient are put off until there are rows enough for one that is worth it: :func:`steps_at_once`.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax.transformation import at_least_float32

State = Any
Weights = Any
FEW_FEATURES = 4
"""Inputs of so few features are multiplied within each step: what comes of it, written out, is much larger than they are."""


def widen(x: jax.Array) -> jax.Array:
  """The same in float32, if it has fewer bits."""
  return x.astype(at_least_float32(x.dtype))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """The product a @ b of numbers of b's dtype, summed up in float32 or more."""
  return jnp.matmul(a.astype(b.dtype), b, preferred_element_type=at_least_float32(b.dtype))


def input_product(x: jax.Array, w: jax.Array) -> jax.Array:
  """The product x [..., D] @ w [D, G]; for few features written out, to be part of what comes after."""
  if x.shape[-1] > FEW_FEATURES:
    return matmul(x, w)
  x, w = widen(x), widen(w)
  return functools.reduce(jnp.add, (x[..., d : d + 1] * along_last(w[d], x) for d in range(x.shape[-1])))


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
  """A vector [G] as [1, ..., G], of as many axes as `like`."""
  return vector.reshape(*[1] * (like.ndim - 1), -1)


def affine_drive(prepared: Weights, x: jax.Array) -> jax.Array:
  """The inputs' part x w_x + bias, of weights (w_x, the recurrent ones, bias, ...)."""
  return input_product(x, prepared[0]) + along_last(prepared[2], x)


def product_gradient(a: jax.Array, dz: jax.Array) -> jax.Array:
  """The gradient [K, G] of w in z = a @ w, from a [N, K] and dz [N, G]."""
  return matmul(a.T, dz)


def x_gradient(weights: Weights, dz: jax.Array) -> jax.Array:
  """The gradient of x where the first of the weights is w_x and dz that of its product."""
  return matmul(dz, weights[0].T)


class Window(NamedTuple):
  """All steps of a window at once, in place of scans of a cell's `forward` and `backward`. Masked steps leave the state as it is.

  Attributes:
    forward: (prepared, state, drive [S, B, G], mask [S, B] or None) -> (state, (y [S, B, ...], factors [S, B, ...])).
    backward: (weights, factors, dy, mask, d_state) -> (d_state before the window, dz [S, B, ...], 0 at masked steps).
  """

  forward: Callable[[Any, State, jax.Array, jax.Array | None], tuple[State, tuple[Any, Any]]]
  backward: Callable[[Weights, Any, Any, jax.Array | None, State], tuple[State, Any]]


class FusedCell(NamedTuple):
  """One step of a recurrent layer, taken apart. Functions of arrays alone, all else is in `weights`.

  Attributes:
    forward: (prepared, state, drive_t) -> (state, factors). The factors, a tuple of [B, ...], are all that is kept of the step.
    backward: (weights, factors, d_state) -> (d_state before the step, dz): dz is the gradient of what the weights' products give.
    weight_gradient: (previous [N, ...], x [N, D], dz [N, ...]) -> gradient of the weights over N rows, float32 or more.
    prepare: (weights) -> what the steps forward use, made once a window.
    drive: (prepared, x [..., B, D]) -> the inputs' part of the step [..., B, G].
    input_gradient: (weights, dz [..., G]) -> gradient of x.
    output: (state) -> y, a part of it: what the layer gives out, and the `previous` that `weight_gradient` is given.
    window: what runs all steps, if not scans of `forward` and `backward`.
  """

  forward: Callable[[Any, State, jax.Array], tuple[State, tuple[jax.Array, ...]]]
  backward: Callable[[Weights, tuple[jax.Array, ...], State], tuple[State, Any]]
  weight_gradient: Callable[[Any, jax.Array, Any], Weights]
  prepare: Callable[[Weights], Any] = lambda weights: weights
  drive: Callable[[Any, jax.Array], jax.Array] = affine_drive
  input_gradient: Callable[[Weights, Any], jax.Array] = x_gradient
  output: Callable[[State], Any] = lambda state: state
  window: Window | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_window(cell: FusedCell, weights: Weights, state: State, x: jax.Array, mask: jax.Array | None) -> tuple[State, Any]:
  """Runs a cell over a window.

  Args:
    cell: the step.
    weights: its weights.
    state: tree of arrays [B, ...].
    x: [S, B, D].
    mask: bool [S, B] or None; a step where it is False leaves the state as it is.

  Returns:
    (state after the window, y [S, B, ...]); at a masked step y repeats the one before. Differentiable once, in reverse, and in
    weights, state and x.
  """
  state, (y, _) = _forward(cell, weights, state, x, mask)
  return state, y


def _forward(
  cell: FusedCell, weights: Weights, state: State, x: jax.Array, mask: jax.Array | None
) -> tuple[State, tuple[Any, Any]]:
  """(state after the window, (y [S, B, ...], factors [S, B, ...]))."""
  prepared = cell.prepare(_wide_vectors(weights))
  few = x.shape[-1] <= FEW_FEATURES

  def step(state: State, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[State, tuple[Any, Any]]:
    x_t, mask_t = inputs
    new, factors = cell.forward(prepared, jax.tree.map(widen, state), widen(cell.drive(prepared, x_t) if few else x_t))
    new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)
    new = _where(mask_t, new, state)
    return new, (cell.output(new), jax.tree.map(lambda factor: factor.astype(x.dtype), factors))

  def chunk(state: State, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[State, tuple[Any, Any]]:
    x, mask = inputs
    if cell.window is not None:
      return cell.window.forward(prepared, state, cell.drive(prepared, x), mask)
    return jax.lax.scan(step, state, (x if few else cell.drive(prepared, x), mask))

  return chunk(state, (x, mask)) if few else _by_chunks(chunk, state, (x, mask), steps_at_once(*x.shape[:2]))


def _fused_forward(cell: FusedCell, weights: Weights, state: State, x: jax.Array, mask: jax.Array | None) -> tuple[Any, Any]:
  end, (y, factors) = _forward(cell, weights, state, x, mask)
  # Made here, so that y itself need not be kept.
  previous = jax.tree.map(lambda first, y: jnp.concatenate([first[None], y[:-1]]), cell.output(state), y)
  return (end, y), (weights, x, mask, previous, factors)


def _fused_backward(cell: FusedCell, residual: Any, gradient: tuple[State, Any]) -> tuple[Any, ...]:
  weights, x, mask, previous, factors = residual
  wide_weights, (d_state, dy) = _wide_vectors(weights), gradient
  dtypes = jax.tree.map(lambda d: d.dtype, d_state)
  d_state = jax.tree.map(widen, d_state)
  add_output = jax.linear_transpose(cell.output, d_state)

  def step(d_state: State, inputs: tuple[Any, ...]) -> tuple[State, Any]:
    (factors, dy_t), mask_t = jax.tree.map(widen, inputs[:2]), inputs[2]
    d_state = jax.tree.map(jnp.add, d_state, *add_output(dy_t))
    before, dz = cell.backward(wide_weights, factors, d_state)
    if mask_t is not None:
      dz = _where(mask_t, dz, jax.tree.map(jnp.zeros_like, dz))
    return _where(mask_t, before, d_state), jax.tree.map(lambda part: part.astype(x.dtype), dz)

  def chunk(carry: tuple[State, Weights], inputs: tuple[Any, ...]) -> tuple[Any, jax.Array]:
    d_state, d_weights = carry
    factors, dy, mask, previous, x = inputs
    if cell.window is not None:
      d_state, dz = cell.window.backward(wide_weights, factors, dy, mask, d_state)
    else:
      d_state, dz = jax.lax.scan(step, d_state, (factors, dy, mask), reverse=True)
    rows = lambda array: array.reshape(-1, *array.shape[2:])
    gradient = cell.weight_gradient(jax.tree.map(rows, previous), rows(x), jax.tree.map(rows, dz))
    return (d_state, jax.tree.map(jnp.add, d_weights, gradient)), cell.input_gradient(weights, dz).astype(x.dtype)

  zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, at_least_float32(w.dtype)), weights)
  (d_state, d_weights), dx = _by_chunks(
    chunk, (d_state, zeros), (factors, dy, mask, previous, x), steps_at_once(*x.shape[:2]), reverse=True
  )
  d_weights = jax.tree.map(lambda gradient, w: gradient.astype(w.dtype), d_weights, weights)
  d_state = jax.tree.map(lambda d, dtype: d.astype(dtype), d_state, dtypes)
  return d_weights, d_state, dx, None if mask is None else np.zeros(mask.shape, jax.dtypes.float0)


fused_window.defvjp(_fused_forward, _fused_backward)


def steps_at_once(num_steps: int, batch_size: int) -> int:
  """How many steps go into one product of inputs or of the weights' gradient: a divisor of S.

  What is put off has to be kept, so a CPU takes the fewest steps that make 128 to 1024 rows, where there are such. With fewer rows
  the sum of the gradients, which each product reads and writes, and the weights do not fit its cache together (seen as calls 1.3 to
  1.6 times slower, or as slow only now and then). An accelerator is best served with all S at once.
  """
  if jax.default_backend() != 'cpu':
    return num_steps
  divisors = [steps for steps in range(1, num_steps + 1) if num_steps % steps == 0]
  fitting = [steps for steps in divisors if 128 <= steps * batch_size <= 1024]
  return next(iter(fitting or [steps for steps in divisors if steps * batch_size >= 64]), num_steps)


def _by_chunks(chunk: Callable[..., Any], carry: Any, inputs: Any, steps: int, reverse: bool = False) -> tuple[Any, Any]:
  """`jax.lax.scan` of a function of `steps` steps at once."""
  size = jax.tree.leaves(inputs)[0].shape[0]
  if steps == size:
    return chunk(carry, inputs)
  if steps == 1:  # Reshaping to [S, 1, ...] would cost copies.
    one = lambda carry, inputs: chunk(carry, jax.tree.map(lambda array: array[None], inputs))
    carry, outputs = jax.lax.scan(one, carry, inputs, reverse=reverse)
    return carry, jax.tree.map(lambda array: array[:, 0], outputs)
  cut = jax.tree.map(lambda array: array.reshape(size // steps, steps, *array.shape[1:]), inputs)
  carry, outputs = jax.lax.scan(chunk, carry, cut, reverse=reverse)
  return carry, jax.tree.map(lambda array: array.reshape(size, *array.shape[2:]), outputs)


def _wide_vectors(weights: Weights) -> Weights:
  """Weights that are multiplied element by element, or added, in float32; matrices as they are."""
  return jax.tree.map(lambda w: widen(w) if w.ndim == 1 else w, weights)


def _where(mask_t: jax.Array | None, new: Any, old: Any) -> Any:
  """`new` where the step is real, else `old`."""
  if mask_t is None:
    return new
  return jax.tree.map(lambda new, old: jnp.where(mask_t.reshape(-1, *[1] * (new.ndim - 1)), new, old), new, old)


def _summed(dz: jax.Array) -> jax.Array:
  """The gradient of a bias: the sum over the rows [N, G]."""
  return widen(dz).sum(0)


def _join(*parts: jax.Array) -> jax.Array:
  return jnp.concatenate(parts, -1)


# One tanh over all gates at once, σ(z) = (1 + tanh(z/2))/2, the halves being put into the weights: on a CPU, functions of parts of
# an array were seen to be several times slower than those of a whole one.


def _scaled(weights: Weights, factors: tuple[float, ...]) -> Weights:
  """The weights [..., G H], a factor for each of the G gates."""
  scale = np.repeat(factors, weights[0].shape[-1] // len(factors))
  return tuple(w * along_last(jnp.asarray(scale, w.dtype), w) for w in weights)


def _lstm_prepare(weights: Weights) -> Weights:
  return _scaled(weights, (0.5, 0.5, 1.0, 0.5))


def _lstm_forward(prepared: Weights, state: State, drive_t: jax.Array) -> tuple[State, tuple[jax.Array, ...]]:
  h, c = state
  a = jnp.tanh(drive_t + matmul(h, prepared[1]))
  i, f, g, o = jnp.split(a, 4, -1)
  d_i, d_f, d_g, d_o = jnp.split(1 - a * a, 4, -1)
  i, f, o = 0.5 * i + 0.5, 0.5 * f + 0.5, 0.5 * o + 0.5
  new_c = f * c + i * g
  t = jnp.tanh(new_c)
  # In this order: what dc is multiplied by for i, f, g; dh for o, for dc; dc for the step before.
  return type(state)(o * t, new_c), (0.25 * d_i * g, 0.25 * d_f * c, d_g * i, 0.25 * d_o * t, o * (1 - t * t), f)


def _lstm_backward(weights: Weights, factors: tuple[jax.Array, ...], d_state: State) -> tuple[State, jax.Array]:
  to_i, to_f, to_g, to_o, to_c, f = factors
  dh, dc = d_state
  dc = dc + dh * to_c
  dz = _join(dc * to_i, dc * to_f, dc * to_g, dh * to_o)
  return type(d_state)(matmul(dz, weights[1].T), dc * f), dz


def _affine_gradient(previous: jax.Array, x: jax.Array, dz: jax.Array) -> Weights:
  """Of w_x, w_h, bias in x w_x + h w_h + bias."""
  if x.shape[-1] > FEW_FEATURES:
    return product_gradient(x, dz), product_gradient(previous, dz), _summed(dz)
  joint = product_gradient(_join(previous, x, jnp.ones((*x.shape[:-1], 1), x.dtype)), dz)  # One product instead of three.
  size = previous.shape[-1]
  return joint[size:-1], joint[:size], joint[-1]


LSTM_CELL = FusedCell(
  prepare=_lstm_prepare,
  forward=_lstm_forward,
  backward=_lstm_backward,
  weight_gradient=_affine_gradient,
  output=lambda state: state[0],
)
"""Weights (w_x [D, 4H], w_h [H, 4H], bias [4H]), gates i, f, g, o; state (h, c)."""


def _gru_prepare(weights: Weights) -> Weights:
  return _scaled(weights, (0.5, 0.5, 1.0))


def _gru_forward(prepared: Weights, h: jax.Array, drive_t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  size = h.shape[-1]
  recurrent = matmul(h, prepared[1]) + along_last(prepared[3], h)
  gates = 0.5 * jnp.tanh(drive_t[:, : 2 * size] + recurrent[:, : 2 * size]) + 0.5
  r, z = jnp.split(gates, 2, -1)
  recurrent_n = recurrent[:, 2 * size :]
  n = jnp.tanh(drive_t[:, 2 * size :] + r * recurrent_n)
  to_n = (1 - z) * (1 - n * n)
  # What dh is multiplied by for r, z, n, the recurrent part of n, and for the step before.
  return n + z * (h - n), (to_n * recurrent_n * r * (1 - r), (h - n) * z * (1 - z), to_n, to_n * r, z)


def _gru_backward(weights: Weights, factors: tuple[jax.Array, ...], dh: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  to_r, to_z, to_n, to_recurrent_n, z = factors
  dr_dz = _join(dh * to_r, dh * to_z)
  recurrent = _join(dr_dz, dh * to_recurrent_n)
  return matmul(recurrent, weights[1].T) + dh * z, (_join(dr_dz, dh * to_n), recurrent)


def _gru_gradient(previous: jax.Array, x: jax.Array, dz: tuple[jax.Array, jax.Array]) -> Weights:
  inputs, recurrent = dz
  return product_gradient(x, inputs), product_gradient(previous, recurrent), _summed(inputs), _summed(recurrent)


GRU_CELL = FusedCell(
  prepare=_gru_prepare,
  forward=_gru_forward,
  backward=_gru_backward,
  weight_gradient=_gru_gradient,
  input_gradient=lambda weights, dz: x_gradient(weights, dz[0]),
)
"""Weights (w_x [D, 3H], w_h [H, 3H], bias [3H], recurrent_bias [3H]), gates r, z, n; state h."""


def _rnn_forward(prepared: Weights, h: jax.Array, drive_t: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
  h = jnp.tanh(drive_t + matmul(h, prepared[1]))
  return h, (1 - h * h,)


def _rnn_backward(weights: Weights, factors: tuple[jax.Array, ...], dh: jax.Array) -> tuple[jax.Array, jax.Array]:
  dz = dh * factors[0]
  return matmul(dz, weights[1].T), dz


RNN_CELL = FusedCell(
  forward=_rnn_forward,
  backward=_rnn_backward,
  weight_gradient=_affine_gradient,
)
"""Weights (w_x [D, H], w_h [H, H], bias [H]); state h."""


@functools.cache
def antisymmetric_cell(epsilon: float) -> FusedCell:
  """Weights (v [D, 2H], a_transposed [H, H], bias [2H]), the part of tanh and that of the gate; state h."""

  def forward(prepared: Weights, h: jax.Array, drive_t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    size = h.shape[-1]
    recurrent = matmul(h, prepared[1])
    t, gate = jnp.tanh(recurrent + drive_t[:, :size]), jax.nn.sigmoid(recurrent + drive_t[:, size:])
    scaled = epsilon * gate
    return h + scaled * t, (scaled * (1 - t * t), scaled * t * (1 - gate))

  def backward(weights: Weights, factors: tuple[jax.Array, ...], dh: jax.Array) -> tuple[jax.Array, jax.Array]:
    to_tanh, to_gate = dh * factors[0], dh * factors[1]
    return dh + matmul(to_tanh + to_gate, weights[1].T), _join(to_tanh, to_gate)

  def gradient(previous: jax.Array, x: jax.Array, dz: jax.Array) -> Weights:
    to_tanh, to_gate = jnp.split(dz, 2, -1)
    return product_gradient(x, dz), product_gradient(previous, to_tanh + to_gate), _summed(dz)

  return FusedCell(
    forward=forward,
    backward=backward,
    weight_gradient=gradient,
  )


def _indrnn_forward(prepared: Weights, h: jax.Array, drive_t: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
  z = drive_t + along_last(prepared[1], h) * h
  return jax.nn.relu(z), (z > 0,)


def _indrnn_backward(weights: Weights, factors: tuple[jax.Array, ...], dh: jax.Array) -> tuple[jax.Array, jax.Array]:
  dz = dh * factors[0]
  return dz * along_last(weights[1], dz), dz


INDRNN_CELL = FusedCell(
  forward=_indrnn_forward,
  backward=_indrnn_backward,
  weight_gradient=lambda previous, x, dz: (product_gradient(x, dz), _summed(widen(previous) * widen(dz)), _summed(dz)),
)
"""Weights (w_x [D, H], u [H], bias [H]); state h."""


def _diagonal_forward(prepared: Weights, state: State, drive_t: jax.Array) -> tuple[State, tuple[()]]:
  (re, im), (rotate_re, rotate_im) = state, (along_last(part, drive_t) for part in prepared)
  drive_re, drive_im = jnp.split(drive_t, 2, -1)
  return type(state)(rotate_re * re - rotate_im * im + drive_re, rotate_re * im + rotate_im * re + drive_im), ()


def _diagonal_backward(weights: Weights, factors: tuple[jax.Array, ...], d_state: State) -> tuple[State, jax.Array]:
  (re, im), (rotate_re, rotate_im) = d_state, (along_last(part, d_state[0]) for part in weights)
  return type(d_state)(rotate_re * re + rotate_im * im, rotate_re * im - rotate_im * re), _join(re, im)


def _diagonal_gradient(previous: State, x: jax.Array, dz: jax.Array) -> Weights:
  (re, im), (d_re, d_im) = jax.tree.map(widen, previous), jnp.split(widen(dz), 2, -1)
  return _summed(re * d_re + im * d_im), _summed(re * d_im - im * d_re)


DIAGONAL_CELL = FusedCell(
  drive=lambda prepared, x: x,
  forward=_diagonal_forward,
  backward=_diagonal_backward,
  weight_gradient=_diagonal_gradient,
  input_gradient=lambda weights, dz: dz,
)
"""s' = λ s + x, complex: weights the parts of λ, each [N]; state and x [..., 2N] real and imaginary parts."""
