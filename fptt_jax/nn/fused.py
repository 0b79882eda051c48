"""WindowPlan of a recurrent layer with a backward pass of their own: quicker than
differentiating the scan, and smaller.

A step is taken apart into its matrix products and the rest. Forward, each step leaves
behind the factors by which the gradient of its state is to be multiplied, so that a
step backward is a few multiplications and nothing is computed twice. The products that
give the weights' gradient are put off until there are rows enough for one that is worth
it: :func:`steps_at_once`.

A sequence's features are a row, [B, H], or a column, [H, B]: `axis`, along which they
lie, is -1 (`ROWS`) or -2 (`COLUMNS`). CPU libraries copy a product's right operand into
an order of their own each time: with columns that is the sequences, few numbers, and
not the weights, many. :func:`features_axis` chooses.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from fptt_jax._dtypes import at_least_float32, widen

State = Any
Weights = Any
ROWS, COLUMNS = -1, -2
"""Where the features are: of arrays [..., B, H] and [..., H, B]."""
FEW_FEATURES = 4
"""Inputs of so few features are multiplied within each step: what comes of it, written
out, is much larger than they are.
"""
UNROLLED = 2
"""So few steps, of a chunk, are written out rather than looped over: their results then
lie in memory as one product reads them. Of more, XLA computes again in each what the
ones before have.
"""


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`jnp.einsum` of numbers of a's dtype, summed up in float32 or more."""
  b = b.astype(a.dtype)
  if (
    jax.default_backend() == 'cpu'
  ):  # Where products of 16 bits are not known in all orders; the sums are the same.
    a, b = widen(a), widen(b)
  return jnp.einsum(equation, a, b, preferred_element_type=at_least_float32(a.dtype))


def matmul(axis: int, weights: jax.Array, a: jax.Array) -> jax.Array:
  """The products weights [G, H] @ a [H, B] or, of rows, a [..., B, H] @ weights [H,
  G].
  """
  return product('hg,...h->...g' if axis == ROWS else 'gh,hb->gb', weights, a)


def matmul_steps(axis: int, weights: jax.Array, a: jax.Array) -> jax.Array:
  """`matmul` of each of a's steps [n, H, B] or [n, B, H], as one product."""
  if axis == ROWS:
    return matmul(axis, weights, a)
  return (
    matmul(axis, weights, side_by_side(axis, a))
    .reshape(-1, a.shape[0], a.shape[2])
    .swapaxes(0, 1)
  )


def input_product(axis: int, w: jax.Array, x: jax.Array) -> jax.Array:
  """The products of w and the inputs, of one step or of n; for few features written
  out, to be part of what comes after.
  """
  if x.shape[axis] > FEW_FEATURES:
    return matmul_steps(axis, w, x)
  x, of_features = (
    widen(x),
    jnp.split(widen(w), w.shape[_batch_axis(axis)], _batch_axis(axis)),
  )
  features = jnp.split(x, x.shape[axis], axis)
  return functools.reduce(
    jnp.add,
    (
      of_each_step(w_d, x) * x_d for w_d, x_d in zip(of_features, features, strict=True)
    ),
  )


def of_each_step(vector: jax.Array, like: jax.Array) -> jax.Array:
  """A vector [G, 1] or [1, G] with as many axes as `like`."""
  return vector.reshape(*[1] * (like.ndim - 2), *vector.shape)


def affine_drive(axis: int, prepared: Weights, x: jax.Array) -> jax.Array:
  """The inputs' part w_x x + bias, of weights (w_x, the recurrent ones, bias, ...)."""
  return input_product(axis, prepared[0], x) + of_each_step(prepared[2], x)


def product_gradient(axis: int, a: jax.Array, dz: jax.Array) -> jax.Array:
  """The gradient [H, G] of the weights that a's steps are multiplied by, dz being that
  of the products.
  """
  return product(
    'ch,cg->hg' if axis == ROWS else 'hc,gc->hg',
    side_by_side(axis, a.astype(dz.dtype)),
    side_by_side(axis, dz),
  )


def x_gradient(axis: int, weights: Weights, dz: jax.Array) -> jax.Array:
  """The gradient of x where the first of the weights is w_x and dz that of its
  products.
  """
  return matmul_steps(axis, weights[0], dz)


def side_by_side(axis: int, a: jax.Array) -> jax.Array:
  """The steps of [n, G, B] as [G, n B]; few of them joined, which is quicker than to
  transpose. Those of [n, B, G] as [n B, G].
  """
  if axis == ROWS:
    return a.reshape(-1, a.shape[2])
  if 0 < a.shape[0] <= UNROLLED:
    return jnp.concatenate(list(a), 1)
  return a.swapaxes(0, 1).reshape(a.shape[1], -1)


def _batch_axis(axis: int) -> int:
  """The other one of the last two."""
  return -3 - axis


class WindowKernel(NamedTuple):
  """All steps of a window at once, in place of scans of a cell's `forward` and
  `backward`. Masked steps leave the state as it is.

  Attributes:
    forward: (prepared, state, drive [n, B, G], mask [n, B] or None) -> (state, (y [n,
      B, ...], factors [n, ...])).
    backward: (weights, factors, dy, mask, d_state) -> (d_state before the window, dz
      [n, B, ...], 0 at masked steps).
  """

  forward: Callable[
    [Any, State, jax.Array, jax.Array | None], tuple[State, tuple[Any, Any]]
  ]
  backward: Callable[[Weights, Any, Any, jax.Array | None, State], tuple[State, Any]]


class FusedCell(NamedTuple):
  """One step of a recurrent layer, taken apart. Functions of arrays alone, all else is
  in `weights`: matrices and vectors, which the functions see as `matmul` wants them and
  as [1, G] or [G, 1].

  Attributes:
    forward: (axis, prepared, state, drive_t) -> (state, factors). The factors, a tuple
      of arrays, are what is kept of the step.
    backward: (axis, weights, factors, d_state) -> (d_state before the step, dz): dz is
      the gradient of what the weights' products give.
    weight_gradient: (axis, y before each of n steps, x, dz) -> gradient of the weights,
      shaped as they are given, float32 or more.
    prepare: (axis, weights) -> what the steps forward use, made once a window.
    drive: (axis, prepared, x of one step or of n) -> the inputs' part.
    input_gradient: (axis, weights, dz of n steps) -> gradient of x.
    output: (state) -> y, a part of it: what the layer gives out.
    joint: whether all weights multiply what stands in one row or column: y before the
      step, x, and 1, in this order. For few features that is what `weight_gradient` is
      given for y.
    elementwise: whether the only weights are vectors; `drive` is to give x back then.
    window: what runs all steps, of rows, if not scans of `forward` and `backward`.
  """

  forward: Callable[[int, Any, State, jax.Array], tuple[State, tuple[jax.Array, ...]]]
  backward: Callable[[int, Weights, tuple[jax.Array, ...], State], tuple[State, Any]]
  weight_gradient: Callable[[int, Any, jax.Array, Any], Weights]
  prepare: Callable[[int, Weights], Any] = lambda axis, weights: weights
  drive: Callable[[int, Any, jax.Array], jax.Array] = affine_drive
  input_gradient: Callable[[int, Weights, Any], jax.Array] = x_gradient
  output: Callable[[State], Any] = lambda state: state
  joint: bool = False
  elementwise: bool = False
  window: WindowKernel | None = None


def fused_window(
  cell: FusedCell, weights: Weights, state: State, x: jax.Array, mask: jax.Array | None
) -> tuple[State, Any]:
  """Runs a cell over a window.

  Args:
    cell: the step.
    weights: its weights.
    state: tree of arrays [B, H].
    x: [S, B, D].
    mask: bool [S, B] or None; a step where it is False leaves the state as it is.

  Returns: (state after the window, y [S, B, H]); at a masked step y repeats the one
    before. Differentiable once, in reverse, and in weights, state and x.
  """
  axis = (
    ROWS
    if cell.elementwise or cell.window is not None
    else features_axis(x.shape[1], jax.tree.leaves(state)[0].shape[1])
  )
  if axis == ROWS:
    return _window(cell, axis, weights, state, x, mask)
  swap = functools.partial(jax.tree.map, lambda array: array.swapaxes(-1, -2))
  return swap(_window(cell, axis, weights, swap(state), swap(x), mask))


def features_axis(batch_size: int, hidden_features: int) -> int:
  """`ROWS` or `COLUMNS`: what is quicker, of layers with products.

  On a CPU, columns serve weights that are larger than its cache, and batches whose size
  XLA's loops over a column like: of other sizes they were seen to take up to 1.6 times
  as long. An accelerator has rows, and so has a batch of symbolic size
  (:mod:`jax.export`), whose one program serves every size.
  """
  if jax.default_backend() != 'cpu' or export.is_symbolic_dim(batch_size):
    return ROWS
  return (
    COLUMNS
    if hidden_features >= 1024 or (batch_size >= 64 and batch_size % 16 == 0)
    else ROWS
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _window(
  cell: FusedCell,
  axis: int,
  weights: Weights,
  state: State,
  x: jax.Array,
  mask: jax.Array | None,
) -> tuple[State, Any]:
  """As `fused_window`, the features of state, x and y being along `axis`."""
  state, (y, _, _) = _forward(cell, axis, weights, state, x, mask)
  return state, y


def _forward(
  cell: FusedCell,
  axis: int,
  weights: Weights,
  state: State,
  x: jax.Array,
  mask: jax.Array | None,
) -> tuple[State, tuple[Any, Any, Any]]:
  """(state after the window, (y of S steps, what is kept of y and x, factors))."""
  prepared = cell.prepare(axis, _laid_out(axis, weights, transposed=axis == COLUMNS))
  few = not cell.elementwise and x.shape[axis] <= FEW_FEATURES

  def step(
    state: State, inputs: tuple[Any, jax.Array | None]
  ) -> tuple[State, tuple[Any, Any, Any]]:
    drive_t, mask_t = inputs
    kept = cell.output(state)
    if few:
      x_t = jnp.stack(drive_t, axis)
      drive_t, kept = cell.drive(axis, prepared, x_t), _joined(cell, axis, kept, x_t)
    new, factors = cell.forward(
      axis, prepared, jax.tree.map(widen, state), widen(drive_t)
    )
    new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)
    new = _where(axis, mask_t, new, state)
    return new, (
      cell.output(new),
      kept,
      jax.tree.map(lambda factor: factor.astype(x.dtype), factors),
    )

  def chunk(
    state: State, inputs: tuple[jax.Array, jax.Array | None]
  ) -> tuple[State, tuple[Any, Any, Any]]:
    x, mask = inputs
    if cell.window is not None:
      end, (y, factors) = cell.window.forward(
        prepared, state, cell.drive(axis, prepared, x), mask
      )
      return end, (
        y,
        _joined(cell, axis, jnp.concatenate([cell.output(state)[None], y[:-1]]), x),
        factors,
      )
    # Feature by feature: a transpose of x would be read in strides, as part of the
    # step.
    if few:
      return jax.lax.scan(step, state, (tuple(jnp.unstack(x, axis=axis)), mask))
    return _scan(cell, step, state, (cell.drive(axis, prepared, x), mask))

  return (
    chunk(state, (x, mask))
    if few
    else _by_chunks(chunk, state, (x, mask), _steps(cell, axis, x))
  )


def _window_forward(
  cell: FusedCell,
  axis: int,
  weights: Weights,
  state: State,
  x: jax.Array,
  mask: jax.Array | None,
) -> tuple[Any, Any]:
  end, (y, kept, factors) = _forward(
    cell, axis, weights, state, x, mask
  )  # Kept apart, because y itself may not be asked for.
  return (end, y), (weights, x, mask, kept, factors)


def _window_backward(
  cell: FusedCell, axis: int, residual: Any, gradient: tuple[State, Any]
) -> tuple[Any, ...]:
  given, x, mask, kept, factors = residual
  weights, (d_state, dy) = _laid_out(axis, given, transposed=axis == ROWS), gradient
  dtypes = jax.tree.map(lambda d: d.dtype, d_state)
  d_state = jax.tree.map(widen, d_state)
  add_output = jax.linear_transpose(cell.output, d_state)

  def step(d_state: State, inputs: tuple[Any, ...]) -> tuple[State, Any]:
    (factors, dy_t), mask_t = jax.tree.map(widen, inputs[:2]), inputs[2]
    d_state = jax.tree.map(jnp.add, d_state, *add_output(dy_t))
    before, dz = cell.backward(axis, weights, factors, d_state)
    if mask_t is not None:
      dz = _where(axis, mask_t, dz, jax.tree.map(jnp.zeros_like, dz))
    return _where(axis, mask_t, before, d_state), jax.tree.map(
      lambda part: part.astype(x.dtype), dz
    )

  def chunk(
    carry: tuple[State, Weights], inputs: tuple[Any, ...]
  ) -> tuple[Any, jax.Array]:
    d_state, d_weights = carry
    factors, dy, mask, kept, x = inputs
    if cell.window is not None:
      d_state, dz = cell.window.backward(weights, factors, dy, mask, d_state)
    else:
      d_state, dz = _scan(cell, step, d_state, (factors, dy, mask), reverse=True)
    d_weights = jax.tree.map(
      jnp.add, d_weights, cell.weight_gradient(axis, kept, x, dz)
    )
    return (d_state, d_weights), cell.input_gradient(axis, weights, dz).astype(x.dtype)

  zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, at_least_float32(w.dtype)), given)
  (d_state, d_weights), dx = _by_chunks(
    chunk,
    (d_state, zeros),
    (factors, dy, mask, kept, x),
    _steps(cell, axis, x),
    reverse=True,
  )
  d_weights = jax.tree.map(
    lambda gradient, w: gradient.astype(w.dtype), d_weights, given
  )
  d_state = jax.tree.map(lambda d, dtype: d.astype(dtype), d_state, dtypes)
  return d_weights, d_state, dx, None  # The mask has no gradient.


_window.defvjp(_window_forward, _window_backward)


def steps_at_once(num_steps: int, batch_size: int) -> int:
  """How many steps go into one product of inputs or of the weights' gradient: a divisor
  of S.

  What is put off has to be kept, so a CPU takes the fewest steps that make 128 to 1024
  rows (or columns), where there are such. With fewer the sum of the gradients, which
  each product reads and writes, and the weights do not fit its cache together (seen as
  calls 1.3 to 1.6 times slower, or as slow only now and then). An accelerator is best
  served with all S at once. Symbolic sizes (:mod:`jax.export`) have no divisors to
  choose from and take all S as well.
  """
  if (
    jax.default_backend() != 'cpu'
    or export.is_symbolic_dim(num_steps)
    or export.is_symbolic_dim(batch_size)
  ):
    return num_steps
  divisors = [steps for steps in range(1, num_steps + 1) if num_steps % steps == 0]
  fitting = [steps for steps in divisors if 128 <= steps * batch_size <= 1024]
  return next(
    iter(fitting or [steps for steps in divisors if steps * batch_size >= 64]),
    num_steps,
  )


def _by_chunks(
  chunk: Callable[..., Any], carry: Any, inputs: Any, steps: int, reverse: bool = False
) -> tuple[Any, Any]:
  """`jax.lax.scan` of a function of `steps` steps at once."""
  size = jax.tree.leaves(inputs)[0].shape[0]
  if steps == size:
    return chunk(carry, inputs)
  if steps == 1:  # Reshaping to [S, 1, ...] would cost copies.
    one = lambda carry, inputs: chunk(
      carry, jax.tree.map(lambda array: array[None], inputs)
    )
    carry, outputs = jax.lax.scan(one, carry, inputs, reverse=reverse)
    return carry, jax.tree.map(lambda array: array[:, 0], outputs)
  cut = jax.tree.map(
    lambda array: array.reshape(size // steps, steps, *array.shape[1:]), inputs
  )
  carry, outputs = jax.lax.scan(chunk, carry, cut, reverse=reverse)
  return carry, jax.tree.map(
    lambda array: array.reshape(size, *array.shape[2:]), outputs
  )


def _scan(
  cell: FusedCell,
  step: Callable[..., Any],
  carry: Any,
  inputs: Any,
  reverse: bool = False,
) -> tuple[Any, Any]:
  """`jax.lax.scan` over a chunk's steps."""
  size = jax.tree.leaves(inputs)[0].shape[0]
  unroll = 1
  if not cell.elementwise and not export.is_symbolic_dim(size) and 0 < size <= UNROLLED:
    unroll = size
  return jax.lax.scan(step, carry, inputs, reverse=reverse, unroll=unroll)


def _steps(cell: FusedCell, axis: int, x: jax.Array) -> int:
  """Steps of a chunk; all where there are no products to put off."""
  return (
    x.shape[0]
    if cell.elementwise
    else steps_at_once(x.shape[0], x.shape[_batch_axis(axis)])
  )


def _joined(cell: FusedCell, axis: int, previous: Any, x: jax.Array) -> Any:
  """What `weight_gradient` is given for y before each step, where inputs are of few
  features.
  """
  if not cell.joint or x.shape[axis] > FEW_FEATURES:
    return previous
  one = jnp.ones_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis), previous.dtype)
  return jnp.concatenate([previous, x.astype(previous.dtype), one], axis)


def _laid_out(axis: int, weights: Weights, transposed: bool) -> Weights:
  """Matrices [in, G], or transposed; vectors, which are added or multiplied element by
  element, as [1, G] or [G, 1], in float32.
  """
  lay_out = lambda w: (
    jnp.expand_dims(widen(w), _batch_axis(axis))
    if w.ndim == 1
    else w.T
    if transposed
    else w
  )
  return jax.tree.map(lay_out, weights)


def _where(axis: int, mask_t: jax.Array | None, new: Any, old: Any) -> Any:
  """`new` where the step is real, else `old`."""
  if mask_t is None:
    return new
  mask_t = jnp.expand_dims(mask_t, axis)
  return jax.tree.map(lambda new, old: jnp.where(mask_t, new, old), new, old)


def _summed(axis: int, dz: jax.Array) -> jax.Array:
  """The gradient of a bias: the sum over steps and sequences."""
  return widen(dz).sum((0, _batch_axis(axis)))


# One tanh over all gates at once, σ(z) = (1 + tanh(z/2))/2, the halves being put into
# the weights: on a CPU, functions of parts of an array were seen to be several times
# slower than those of a whole one.


def _scaled(axis: int, weights: Weights, factors: tuple[float, ...]) -> Weights:
  """The weights, prepared, a factor for each of the gates."""
  scale = np.expand_dims(
    np.repeat(factors, weights[0].shape[axis] // len(factors)), _batch_axis(axis)
  )
  return tuple(w * jnp.asarray(scale, w.dtype) for w in weights)


def _lstm_prepare(axis: int, weights: Weights) -> Weights:
  return _scaled(axis, weights, (0.5, 0.5, 1.0, 0.5))


def _lstm_forward(
  axis: int, prepared: Weights, state: State, drive_t: jax.Array
) -> tuple[State, tuple[jax.Array, ...]]:
  h, c = state
  a = jnp.tanh(drive_t + matmul(axis, prepared[1], h))
  i, f, g, o = jnp.split(a, 4, axis)
  d_i, d_f, d_g, d_o = jnp.split(1 - a * a, 4, axis)
  i, f, o = 0.5 * i + 0.5, 0.5 * f + 0.5, 0.5 * o + 0.5
  new_c = f * c + i * g
  t = jnp.tanh(new_c)
  # In this order: what dc is multiplied by for i, f, g; dh for o, for dc; dc for the
  # step before.
  return type(state)(o * t, new_c), (
    0.25 * d_i * g,
    0.25 * d_f * c,
    d_g * i,
    0.25 * d_o * t,
    o * (1 - t * t),
    f,
  )


def _lstm_backward(
  axis: int, weights: Weights, factors: tuple[jax.Array, ...], d_state: State
) -> tuple[State, jax.Array]:
  to_i, to_f, to_g, to_o, to_c, f = factors
  dh, dc = d_state
  dc = dc + dh * to_c
  dz = jnp.concatenate([dc * to_i, dc * to_f, dc * to_g, dh * to_o], axis)
  return type(d_state)(matmul(axis, weights[1], dz), dc * f), dz


def _affine_gradient(
  axis: int, previous: jax.Array, x: jax.Array, dz: jax.Array
) -> Weights:
  """Of w_x, w_h, bias in w_x x + w_h h + bias."""
  features = x.shape[axis]
  if features > FEW_FEATURES:
    return (
      product_gradient(axis, x, dz),
      product_gradient(axis, previous, dz),
      _summed(axis, dz),
    )
  joint = product_gradient(axis, previous, dz)
  size = joint.shape[0] - features - 1
  return joint[size:-1], joint[:size], joint[-1]


LSTM_CELL = FusedCell(
  prepare=_lstm_prepare,
  forward=_lstm_forward,
  backward=_lstm_backward,
  weight_gradient=_affine_gradient,
  output=lambda state: state[0],
  joint=True,
)
"""Weights (w_x [D, 4H], w_h [H, 4H], bias [4H]), gates i, f, g, o; state (h, c)."""


def _gru_prepare(axis: int, weights: Weights) -> Weights:
  return _scaled(axis, weights, (0.5, 0.5, 1.0))


def _gru_forward(
  axis: int, prepared: Weights, h: jax.Array, drive_t: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  size = h.shape[axis]
  drive_rz, drive_n = jnp.split(drive_t, [2 * size], axis)
  recurrent_rz, recurrent_n = jnp.split(
    matmul(axis, prepared[1], h) + prepared[3], [2 * size], axis
  )
  r, z = jnp.split(0.5 * jnp.tanh(drive_rz + recurrent_rz) + 0.5, 2, axis)
  n = jnp.tanh(drive_n + r * recurrent_n)
  to_n = (1 - z) * (1 - n * n)
  # What dh is multiplied by for r, z, n, the recurrent part of n, and for the step
  # before.
  return n + z * (h - n), (
    to_n * recurrent_n * r * (1 - r),
    (h - n) * z * (1 - z),
    to_n,
    to_n * r,
    z,
  )


def _gru_backward(
  axis: int, weights: Weights, factors: tuple[jax.Array, ...], dh: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  to_r, to_z, to_n, to_recurrent_n, z = factors
  dr_dz = jnp.concatenate([dh * to_r, dh * to_z], axis)
  recurrent = jnp.concatenate([dr_dz, dh * to_recurrent_n], axis)
  return matmul(axis, weights[1], recurrent) + dh * z, (
    jnp.concatenate([dr_dz, dh * to_n], axis),
    recurrent,
  )


def _gru_gradient(
  axis: int, previous: jax.Array, x: jax.Array, dz: tuple[jax.Array, jax.Array]
) -> Weights:
  inputs, recurrent = dz
  of_products = (
    product_gradient(axis, x, inputs),
    product_gradient(axis, previous, recurrent),
  )
  return *of_products, _summed(axis, inputs), _summed(axis, recurrent)


GRU_CELL = FusedCell(
  prepare=_gru_prepare,
  forward=_gru_forward,
  backward=_gru_backward,
  weight_gradient=_gru_gradient,
  input_gradient=lambda axis, weights, dz: x_gradient(axis, weights, dz[0]),
)
"""Weights (w_x [D, 3H], w_h [H, 3H], bias [3H], recurrent_bias [3H]), gates r, z, n;
state h.
"""


def _rnn_forward(
  axis: int, prepared: Weights, h: jax.Array, drive_t: jax.Array
) -> tuple[jax.Array, tuple[jax.Array]]:
  h = jnp.tanh(drive_t + matmul(axis, prepared[1], h))
  return h, (1 - h * h,)


def _rnn_backward(
  axis: int, weights: Weights, factors: tuple[jax.Array, ...], dh: jax.Array
) -> tuple[jax.Array, jax.Array]:
  dz = dh * factors[0]
  return matmul(axis, weights[1], dz), dz


RNN_CELL = FusedCell(
  forward=_rnn_forward,
  backward=_rnn_backward,
  weight_gradient=_affine_gradient,
  joint=True,
)
"""Weights (w_x [D, H], w_h [H, H], bias [H]); state h."""


@functools.cache
def antisymmetric_cell(epsilon: float) -> FusedCell:
  """Weights (v [D, 2H], a_transposed [H, H], bias [2H]), the part of tanh and that of
  the gate; state h.
  """

  def forward(
    axis: int, prepared: Weights, h: jax.Array, drive_t: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    recurrent, (to_tanh, to_gate) = (
      matmul(axis, prepared[1], h),
      jnp.split(drive_t, 2, axis),
    )
    t, gate = jnp.tanh(recurrent + to_tanh), jax.nn.sigmoid(recurrent + to_gate)
    scaled = epsilon * gate
    return h + scaled * t, (scaled * (1 - t * t), scaled * t * (1 - gate))

  def backward(
    axis: int, weights: Weights, factors: tuple[jax.Array, ...], dh: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    to_tanh, to_gate = dh * factors[0], dh * factors[1]
    return dh + matmul(axis, weights[1], to_tanh + to_gate), jnp.concatenate(
      [to_tanh, to_gate], axis
    )

  def gradient(axis: int, previous: jax.Array, x: jax.Array, dz: jax.Array) -> Weights:
    to_tanh, to_gate = jnp.split(dz, 2, axis)
    return (
      product_gradient(axis, x, dz),
      product_gradient(axis, previous, to_tanh + to_gate),
      _summed(axis, dz),
    )

  return FusedCell(
    forward=forward,
    backward=backward,
    weight_gradient=gradient,
  )


def _indrnn_forward(
  axis: int, prepared: Weights, h: jax.Array, drive_t: jax.Array
) -> tuple[jax.Array, tuple[jax.Array]]:
  u, bias = prepared
  z = drive_t + u * h + bias
  return jax.nn.relu(z), (z > 0,)


def _indrnn_backward(
  axis: int, weights: Weights, factors: tuple[jax.Array, ...], dh: jax.Array
) -> tuple[jax.Array, jax.Array]:
  dz = dh * factors[0]
  return dz * weights[0], dz


def _elementwise_cell(
  forward: Callable[..., Any],
  backward: Callable[..., Any],
  weight_gradient: Callable[[Any, jax.Array], Weights],
) -> FusedCell:
  """A cell without products; `weight_gradient`: (previous, dz), both float32 or more ->
  what is summed over steps and rows.
  """
  return FusedCell(
    forward=forward,
    backward=backward,
    weight_gradient=lambda axis, previous, x, dz: jax.tree.map(
      lambda terms: terms.sum((0, 1)),
      weight_gradient(jax.tree.map(widen, previous), widen(dz)),
    ),
    drive=lambda axis, prepared, x: x,
    input_gradient=lambda axis, weights, dz: dz,
    elementwise=True,
  )


INDRNN_CELL = _elementwise_cell(
  _indrnn_forward, _indrnn_backward, lambda previous, dz: (previous * dz, dz)
)
"""Weights (u [H], bias [H]); x is the inputs times w_x [B, H], state h."""


def _diagonal_forward(
  axis: int, prepared: Weights, state: State, drive_t: jax.Array
) -> tuple[State, tuple[()]]:
  (re, im), (rotate_re, rotate_im) = state, prepared
  drive_re, drive_im = jnp.split(drive_t, 2, axis)
  return type(state)(
    rotate_re * re - rotate_im * im + drive_re,
    rotate_re * im + rotate_im * re + drive_im,
  ), ()


def _diagonal_backward(
  axis: int, weights: Weights, factors: tuple[jax.Array, ...], d_state: State
) -> tuple[State, jax.Array]:
  (re, im), (rotate_re, rotate_im) = d_state, weights
  return type(d_state)(
    rotate_re * re + rotate_im * im, rotate_re * im - rotate_im * re
  ), jnp.concatenate([re, im], axis)


def _diagonal_gradient(previous: State, dz: jax.Array) -> Weights:
  (re, im), (d_re, d_im) = previous, jnp.split(dz, 2, -1)
  return re * d_re + im * d_im, re * d_im - im * d_re


DIAGONAL_CELL = _elementwise_cell(
  _diagonal_forward, _diagonal_backward, _diagonal_gradient
)
"""s' = λ s + x, complex: weights the parts of λ, each [N]; state and x [B, 2N] real and
imaginary parts.
"""
