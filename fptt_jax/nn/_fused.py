"""Windows of recurrent layers with a hand-written backward pass.

Forward, each step stores the factors of its Jacobian. Backward, a step is then a few
multiplications and recomputes nothing. The products that give the gradients of the
weights are batched over steps: see :func:`steps_per_chunk`.

The features of a step lie along `axis`:

* `ROWS` (-1): a step is [B, H], products are a @ w.
* `COLUMNS` (-2): a step is [H, B], products are w @ a.

CPU libraries repack the right operand of each product. With columns that operand is the
batch, which is small, and not the weights. :func:`choose_axis` decides.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import Any, NamedTuple

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from fptt_jax._dtypes import at_least_float32, widen

State = Any
Weights = Any
Factors = tuple[jax.Array, ...]
Mask = jax.Array | None
ChunkInputs = tuple[jax.Array, Mask]
"""(x [n, ...], mask [n, B]) of the n steps of a chunk."""
ChunkOutputs = tuple[Any, Any, Any]
"""(y, operands kept for the weights' gradient, factors) of steps."""

ROWS = -1
"""The axis of the features in arrays [..., B, H]."""
COLUMNS = -2
"""The axis of the features in arrays [..., H, B]."""
FEW_FEATURES = 4
"""Inputs with at most this many features are multiplied inside each step: their
products with w_x are much larger than the inputs, and storing them costs more.
"""
MAX_UNROLLED_STEPS = 2
"""Chunks of at most this many steps are unrolled. Their results then lie in memory in
the order in which one product reads them. In longer chunks XLA would recompute in each
step what the steps before it computed.
"""


class WindowKernel(NamedTuple):
  """All steps of a window in one call, in place of scans over single steps.

  Masked steps leave the state unchanged.

  Attributes:
    forward: (prepared, state, drive [n, B, G], mask [n, B] or None) ->
      (state, (y [n, B, ...], factors [n, ...])).
    backward: (weights, factors, dy, mask, d_state) -> (gradient of the state before
      the window, dz [n, B, ...], which is 0 at masked steps).
  """

  forward: Callable[[Any, State, jax.Array, Mask], tuple[State, tuple[Any, Any]]]
  backward: Callable[[Weights, Any, Any, Mask, State], tuple[State, Any]]


def matmul(axis: int, weights: jax.Array, a: jax.Array) -> jax.Array:
  """Multiply features by weights.

  Args:
    axis: the axis of the features.
    weights: [H, G] for rows, [G, H] for columns.
    a: [..., B, H] for rows, [H, B] for columns.

  Returns:
    [..., B, G] for rows, [G, B] for columns, at least float32.
  """
  return _einsum('hg,...h->...g' if axis == ROWS else 'gh,hb->gb', weights, a)


def product_gradient(axis: int, a: jax.Array, dz: jax.Array) -> jax.Array:
  """Return the gradient [H, G] of the weights that multiplied the steps of `a`.

  Args:
    axis: the axis of the features.
    a: the n steps' left operands, [n, B, H] or [n, H, B].
    dz: the gradient of the n products, [n, B, G] or [n, G, B].
  """
  return _einsum(
    'ch,cg->hg' if axis == ROWS else 'hc,gc->hg',
    _join_steps(axis, a.astype(dz.dtype)),
    _join_steps(axis, dz),
  )


def bias_gradient(axis: int, dz: jax.Array) -> jax.Array:
  """Sum dz over steps and batch, which is the gradient [G] of a bias."""
  return widen(dz).sum((0, _batch_axis(axis)))


def affine_drive(axis: int, prepared: Weights, x: jax.Array) -> jax.Array:
  """Compute x w_x + bias of one step or of n.

  Args:
    axis: the axis of the features.
    prepared: the weights (w_x, recurrent weights, bias, ...), laid out by `axis`.
    x: inputs [B, D] or [n, B, D], for columns [D, B] or [n, D, B].
  """
  return _input_product(axis, prepared[0], x) + _add_axes(prepared[2], x)


def affine_gradient(
  axis: int, previous: jax.Array, x: jax.Array, dz: jax.Array
) -> Weights:
  """Return the gradients of (w_x, w_h, bias) for z = x w_x + h w_h + bias.

  `previous` holds h before each step, or (h, x, 1) joined if x has few features.
  """
  features = x.shape[axis]
  if features > FEW_FEATURES:
    return (
      product_gradient(axis, x, dz),
      product_gradient(axis, previous, dz),
      bias_gradient(axis, dz),
    )
  joint = product_gradient(axis, previous, dz)
  size = joint.shape[0] - features - 1
  return joint[size:-1], joint[:size], joint[-1]


def input_gradient(axis: int, weights: Weights, dz: jax.Array) -> jax.Array:
  """Return the gradient of x where the first of the weights is w_x."""
  return _matmul_steps(axis, weights[0], dz)


def scale_gates(axis: int, weights: Weights, scales: tuple[float, ...]) -> Weights:
  """Multiply the columns of each gate by its scale.

  With σ(z) = (1 + tanh(z/2))/2, one tanh over all gates replaces sigmoids of parts: on
  CPUs, functions of parts of an array were measured to be several times slower than
  functions of a whole array. The factor 1/2 of z goes into the weights here.
  """
  gate_size = weights[0].shape[axis] // len(scales)
  scale = np.expand_dims(np.repeat(scales, gate_size), _batch_axis(axis))
  return tuple(w * jnp.asarray(scale, w.dtype) for w in weights)


def _keep_weights(axis: int, weights: Weights) -> Weights:
  return weights


def _whole_state(state: State) -> State:
  return state


class FusedCell(NamedTuple):
  """The parts of a recurrent step from which a fused window is built.

  All functions are pure and take arrays only. They see matrices as :func:`matmul`
  expects them and vectors as [1, G] (rows) or [G, 1] (columns).

  Attributes:
    forward: (axis, prepared, state, drive_t) -> (state, factors). The factors are a
      tuple of arrays, and all that the backward pass keeps of the step.
    backward: (axis, weights, factors, d_state) -> (gradient of the state before the
      step, dz). dz is the gradient of the step's products with the weights.
    weight_gradient: (axis, outputs before each of n steps, x, dz) -> gradient of the
      weights in their original shapes, at least float32.
    prepare: (axis, weights) -> the weights as `forward` uses them; runs once per
      window.
    drive: (axis, prepared, x of one step or of n) -> the part of z that depends on x.
    input_gradient: (axis, weights, dz of n steps) -> gradient of x.
    output: state -> the part of the state that is the layer's output y.
    joint: whether all weights multiply one row (y before the step, x, 1). For inputs
      with few features `weight_gradient` is then given that row in place of y.
    elementwise: whether all weights are vectors. `drive` must return x then.
    kernel: runs all steps of a window, as rows, in place of the scans.
    products: 'bfloat16' rounds the operands of all products of float32; None follows
      `jax.default_matmul_precision`.
  """

  forward: Callable[[int, Any, State, jax.Array], tuple[State, Factors]]
  backward: Callable[[int, Weights, Factors, State], tuple[State, Any]]
  weight_gradient: Callable[[int, Any, jax.Array, Any], Weights]
  prepare: Callable[[int, Weights], Any] = _keep_weights
  drive: Callable[[int, Any, jax.Array], jax.Array] = affine_drive
  input_gradient: Callable[[int, Weights, Any], jax.Array] = input_gradient
  output: Callable[[State], Any] = _whole_state
  joint: bool = False
  elementwise: bool = False
  kernel: WindowKernel | None = None
  products: str | None = None


def elementwise_cell(
  forward: Callable[..., Any],
  backward: Callable[..., Any],
  weight_gradient: Callable[[Any, jax.Array], Weights],
) -> FusedCell:
  """Make a cell whose weights are all vectors.

  Args:
    forward: as in :class:`FusedCell`.
    backward: as in :class:`FusedCell`.
    weight_gradient: (outputs before each step, dz), at least float32, -> the terms
      [n, B, H] whose sums over steps and batch are the gradients.
  """

  def summed_gradient(axis: int, previous: Any, x: jax.Array, dz: Any) -> Weights:
    terms = weight_gradient(jax.tree.map(widen, previous), widen(dz))
    return jax.tree.map(lambda term: term.sum((0, 1)), terms)

  def input_drive(axis: int, prepared: Any, x: jax.Array) -> jax.Array:
    return x

  def same_gradient(axis: int, weights: Weights, dz: Any) -> jax.Array:
    return dz

  return FusedCell(
    forward=forward,
    backward=backward,
    weight_gradient=summed_gradient,
    drive=input_drive,
    input_gradient=same_gradient,
    elementwise=True,
  )


def run_fused(
  cell: FusedCell, weights: Weights, state: State, x: jax.Array, mask: Mask
) -> tuple[State, Any]:
  """Run a cell over a window.

  The result is differentiable once, in reverse mode, in weights, state and x.

  Args:
    cell: the parts of a step.
    weights: the cell's weights.
    state: tree of arrays [B, H].
    x: inputs [S, B, D].
    mask: bool [S, B] or None. Steps where it is False leave the state unchanged.

  Returns:
    (state after the window, y [S, B, H]). At a masked step y repeats the output
    of the step before.
  """
  # Elementwise cells have no products, and kernels read rows.
  if cell.elementwise or cell.kernel is not None:
    axis = ROWS
  else:
    axis = choose_axis(x.shape[1], jax.tree.leaves(state)[0].shape[1])
  if axis == ROWS:
    return _run_window(cell, axis, weights, state, x, mask)
  swap = functools.partial(jax.tree.map, _swap_features)
  return swap(_run_window(cell, axis, weights, swap(state), swap(x), mask))


def varies(tree: Any) -> bool:
  """Return whether an array varies over a mesh axis of `jax.shard_map`, as far as its
  type says.

  With `check_vma=True` types do say so, and JAX adds up gradients over devices by them.
  Neither a hand-written backward pass nor a kernel takes part in that.
  """
  for leaf in jax.tree.leaves(tree):
    kind: Any = jax.typeof(leaf)
    # The name of the attribute changed between releases.
    kind = getattr(kind, 'manual_axis_type', kind)
    if getattr(kind, 'varying', None) or getattr(kind, 'vma', None):
      return True
  return False


def rounds_products(dtype: jax.typing.DTypeLike) -> bool:
  """Return whether products of this dtype round their operands to bfloat16."""
  config: Any = jax.config  # Its attributes have no types.
  precision = config.jax_default_matmul_precision
  return precision == 'bfloat16' and jnp.dtype(dtype) == jnp.float32


def choose_axis(batch_size: int, hidden_features: int) -> int:
  """Return the faster of `ROWS` and `COLUMNS` for cells with matrix products.

  On a CPU, columns are faster if the weights exceed its cache, and for batch sizes that
  suit XLA's loops over columns. Other sizes were measured to take up to 1.6 times as
  long. Accelerators use rows. So do batches of symbolic size (:mod:`jax.export`),
  because one program serves every size.
  """
  if jax.default_backend() != 'cpu' or export.is_symbolic_dim(batch_size):
    return ROWS
  if hidden_features >= 1024:
    return COLUMNS
  return COLUMNS if batch_size >= 64 and batch_size % 16 == 0 else ROWS


def steps_per_chunk(num_steps: int, batch_size: int) -> int:
  """Return how many steps share one product for the gradients of the weights.

  The operands of a deferred product must be stored. A CPU therefore takes the smallest
  divisor of S that gives 128 to 1024 rows (or columns), if there is one. With fewer
  rows, the gradient sums, which each product reads and writes, compete with the weights
  for the cache (measured as 1.3 to 1.6 times slower, sometimes only now and then).
  Accelerators and symbolic sizes (:mod:`jax.export`) take all S steps.

  Args:
    num_steps: S.
    batch_size: B.

  Returns:
    a divisor of S.
  """
  if jax.default_backend() != 'cpu':
    return num_steps
  if export.is_symbolic_dim(num_steps) or export.is_symbolic_dim(batch_size):
    return num_steps
  divisors = [steps for steps in range(1, num_steps + 1) if num_steps % steps == 0]
  fitting = [steps for steps in divisors if 128 <= steps * batch_size <= 1024]
  large_enough = [steps for steps in divisors if steps * batch_size >= 64]
  return next(iter(fitting or large_enough), num_steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_window(
  cell: FusedCell,
  axis: int,
  weights: Weights,
  state: State,
  x: jax.Array,
  mask: Mask,
) -> tuple[State, Any]:
  """Run a window as `run_fused` does, with features along `axis`."""
  with _precision(cell):
    state, (y, _, _) = _run_forward(cell, axis, weights, state, x, mask)
  return state, y


def _run_window_forward(
  cell: FusedCell,
  axis: int,
  weights: Weights,
  state: State,
  x: jax.Array,
  mask: Mask,
) -> tuple[Any, Any]:
  """Run a window and return the residuals of its backward pass with the result."""
  # Traced later than `_run_window` if a compiled function or a loop is differentiated.
  with _precision(cell):
    end, (y, kept, factors) = _run_forward(cell, axis, weights, state, x, mask)
  # Residuals hold `kept` and not y: XLA drops y if the caller does not use it.
  return (end, y), (weights, x, mask, kept, factors)


def _run_window_backward(
  cell: FusedCell, axis: int, residuals: Any, gradient: tuple[State, Any]
) -> tuple[Any, ...]:
  """Return the gradients of weights, state, x and (None) mask."""
  with _precision(cell):
    return _run_backward(cell, axis, residuals, gradient)


def _run_backward(
  cell: FusedCell, axis: int, residuals: Any, gradient: tuple[State, Any]
) -> tuple[Any, ...]:
  """Run a window backward, in the precision of the context."""
  given_weights, x, mask, kept, factors = residuals
  d_state, dy = gradient
  # Backward, products are with the transposed weights.
  weights = _lay_out(axis, given_weights, transposed=axis == ROWS)
  dtypes = jax.tree.map(lambda d: d.dtype, d_state)
  d_state = jax.tree.map(widen, d_state)
  run_chunk = functools.partial(
    _run_chunk_backward,
    cell,
    axis,
    weights,
    jax.linear_transpose(cell.output, d_state),
  )
  # Sums over many steps need at least float32.
  zeros = jax.tree.map(
    lambda w: jnp.zeros(w.shape, at_least_float32(w.dtype)), given_weights
  )
  (d_state, d_weights), dx = _scan_chunks(
    run_chunk,
    (d_state, zeros),
    (factors, dy, mask, kept, x),
    _num_chunk_steps(cell, axis, x),
    reverse=True,
  )
  d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, given_weights)
  d_state = jax.tree.map(lambda d, dtype: d.astype(dtype), d_state, dtypes)
  return d_weights, d_state, dx, None


_run_window.defvjp(_run_window_forward, _run_window_backward)


def _precision(cell: FusedCell) -> contextlib.AbstractContextManager[Any]:
  """Return the context of a cell's products."""
  if cell.products is None:
    return contextlib.nullcontext()
  return jax.default_matmul_precision(cell.products)


def _run_forward(
  cell: FusedCell,
  axis: int,
  weights: Weights,
  state: State,
  x: jax.Array,
  mask: Mask,
) -> tuple[State, ChunkOutputs]:
  """Run a window.

  Returns:
    (state after the window, (y of S steps, the operands of the weights'
    gradient that the backward pass keeps of y and x, factors)).
  """
  # Columns multiply the weights from the left, rows from the right.
  prepared = cell.prepare(axis, _lay_out(axis, weights, transposed=axis == COLUMNS))
  few_features = not cell.elementwise and x.shape[axis] <= FEW_FEATURES
  if cell.kernel is not None:
    run_chunk = _run_chunk_by_kernel
  elif few_features:
    run_chunk = _run_chunk_of_few_features
  else:
    run_chunk = _run_chunk_forward
  # With few features no product is deferred, so nothing is gained by chunks.
  num_steps = x.shape[0] if few_features else _num_chunk_steps(cell, axis, x)
  run_chunk = functools.partial(run_chunk, cell, axis, prepared)
  return _scan_chunks(run_chunk, state, (x, mask), num_steps)


def _run_chunk_forward(
  cell: FusedCell,
  axis: int,
  prepared: Any,
  state: State,
  inputs: ChunkInputs,
) -> tuple[State, ChunkOutputs]:
  """Run a chunk; one product gives the drive of all its steps."""
  x, mask = inputs

  def step(state: State, inputs: ChunkInputs) -> tuple[State, ChunkOutputs]:
    drive_t, mask_t = inputs
    new, factors = _run_step(cell, axis, prepared, state, drive_t, mask_t, x.dtype)
    return new, (cell.output(new), cell.output(state), factors)

  return _scan_steps(cell, step, state, (cell.drive(axis, prepared, x), mask))


def _run_chunk_of_few_features(
  cell: FusedCell,
  axis: int,
  prepared: Any,
  state: State,
  inputs: ChunkInputs,
) -> tuple[State, ChunkOutputs]:
  """Run a chunk; each step computes its own drive."""
  x, mask = inputs

  def step(
    state: State, inputs: tuple[tuple[jax.Array, ...], Mask]
  ) -> tuple[State, ChunkOutputs]:
    features, mask_t = inputs
    x_t = jnp.stack(features, axis)
    drive_t = cell.drive(axis, prepared, x_t)
    kept = _join_operands(cell, axis, cell.output(state), x_t)
    new, factors = _run_step(cell, axis, prepared, state, drive_t, mask_t, x.dtype)
    return new, (cell.output(new), kept, factors)

  # Features are scanned separately: as part of a step, a transposed x would be read
  # with strides.
  return jax.lax.scan(step, state, (tuple(jnp.unstack(x, axis=axis)), mask))


def _run_chunk_by_kernel(
  cell: FusedCell,
  axis: int,
  prepared: Any,
  state: State,
  inputs: ChunkInputs,
) -> tuple[State, ChunkOutputs]:
  """Run a chunk by the cell's kernel."""
  assert cell.kernel is not None
  x, mask = inputs
  drive = cell.drive(axis, prepared, x)
  end, (y, factors) = cell.kernel.forward(prepared, state, drive, mask)
  # A kernel returns the outputs after each step; the weights multiplied those before.
  previous = jnp.concatenate([cell.output(state)[None], y[:-1]])
  return end, (y, _join_operands(cell, axis, previous, x), factors)


def _run_step(
  cell: FusedCell,
  axis: int,
  prepared: Any,
  state: State,
  drive_t: jax.Array,
  mask_t: Mask,
  dtype: jnp.dtype,
) -> tuple[State, Factors]:
  """Run one step in at least float32.

  Returns:
    the new state in the state's dtypes, the factors in `dtype`.
  """
  wide_state = jax.tree.map(widen, state)
  new, factors = cell.forward(axis, prepared, wide_state, widen(drive_t))
  new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)
  new = _where(axis, mask_t, new, state)
  return new, jax.tree.map(lambda factor: factor.astype(dtype), factors)


def _run_chunk_backward(
  cell: FusedCell,
  axis: int,
  weights: Weights,
  add_output: Callable[[Any], tuple[State]],
  carry: tuple[State, Weights],
  inputs: tuple[Any, ...],
) -> tuple[Any, jax.Array]:
  """Run a chunk backward and add its share to the weights' gradients.

  Args:
    cell: the parts of a step.
    axis: the axis of the features.
    weights: the weights, laid out for products with dz.
    add_output: transpose of `cell.output`: gradient of y -> gradient of the state.
    carry: (gradient of the state, gradient of the weights so far).
    inputs: (factors, dy, mask, kept operands, x) of the chunk's steps.

  Returns:
    (new carry, gradient of x).
  """
  d_state, d_weights = carry
  factors, dy, mask, kept, x = inputs

  def step(d_state: State, inputs: tuple[Any, ...]) -> tuple[State, Any]:
    factors, dy_t = jax.tree.map(widen, inputs[:2])
    mask_t = inputs[2]
    # The output is a part of the state, so its gradient joins the state's.
    d_state = jax.tree.map(jnp.add, d_state, *add_output(dy_t))
    before, dz = cell.backward(axis, weights, factors, d_state)
    # A masked step passes the state's gradient on and adds nothing to the weights'.
    if mask_t is not None:
      dz = _where(axis, mask_t, dz, jax.tree.map(jnp.zeros_like, dz))
    before = _where(axis, mask_t, before, d_state)
    return before, jax.tree.map(lambda part: part.astype(x.dtype), dz)

  if cell.kernel is not None:
    d_state, dz = cell.kernel.backward(weights, factors, dy, mask, d_state)
  else:
    d_state, dz = _scan_steps(cell, step, d_state, (factors, dy, mask), reverse=True)
  chunk_gradient = cell.weight_gradient(axis, kept, x, dz)
  d_weights = jax.tree.map(jnp.add, d_weights, chunk_gradient)
  return (d_state, d_weights), cell.input_gradient(axis, weights, dz).astype(x.dtype)


def _num_chunk_steps(cell: FusedCell, axis: int, x: jax.Array) -> int:
  """Return the steps per chunk; all S where there are no products to defer."""
  if cell.elementwise:
    return x.shape[0]
  return steps_per_chunk(x.shape[0], x.shape[_batch_axis(axis)])


def _scan_chunks(
  chunk: Callable[..., Any],
  carry: Any,
  inputs: Any,
  num_steps: int,
  reverse: bool = False,
) -> tuple[Any, Any]:
  """Scan a function that processes `num_steps` steps at once."""
  size = jax.tree.leaves(inputs)[0].shape[0]
  if num_steps == size:
    return chunk(carry, inputs)
  if num_steps == 1:

    def single_step(carry: Any, inputs: Any) -> tuple[Any, Any]:
      return chunk(carry, jax.tree.map(lambda array: array[None], inputs))

    # Reshaping all inputs to [S, 1, ...] instead would cost copies.
    carry, outputs = jax.lax.scan(single_step, carry, inputs, reverse=reverse)
    return carry, jax.tree.map(lambda array: array[:, 0], outputs)
  chunks = jax.tree.map(
    lambda array: array.reshape(size // num_steps, num_steps, *array.shape[1:]), inputs
  )
  carry, outputs = jax.lax.scan(chunk, carry, chunks, reverse=reverse)
  return carry, jax.tree.map(
    lambda array: array.reshape(size, *array.shape[2:]), outputs
  )


def _scan_steps(
  cell: FusedCell,
  step: Callable[..., Any],
  carry: Any,
  inputs: Any,
  reverse: bool = False,
) -> tuple[Any, Any]:
  """Scan a chunk's steps, unrolled if they are few."""
  size = jax.tree.leaves(inputs)[0].shape[0]
  unroll = 1
  if not cell.elementwise and not export.is_symbolic_dim(size):
    unroll = size if 0 < size <= MAX_UNROLLED_STEPS else 1
  return jax.lax.scan(step, carry, inputs, reverse=reverse, unroll=unroll)


def _lay_out(axis: int, weights: Weights, transposed: bool) -> Weights:
  """Lay out weights for products along `axis`.

  Matrices stay [in, G] or become [G, in]. Vectors, which are only added or multiplied
  elementwise, become [1, G] or [G, 1] of at least float32.
  """

  def lay_out(w: jax.Array) -> jax.Array:
    if w.ndim == 1:
      return jnp.expand_dims(widen(w), _batch_axis(axis))
    return w.T if transposed else w

  return jax.tree.map(lay_out, weights)


def _join_operands(cell: FusedCell, axis: int, previous: Any, x: jax.Array) -> Any:
  """Join (y before the step, x, 1), where one product gives all weights' gradients."""
  if not cell.joint or x.shape[axis] > FEW_FEATURES:
    return previous
  one = jnp.ones_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis), previous.dtype)
  return jnp.concatenate([previous, x.astype(previous.dtype), one], axis)


def _join_steps(axis: int, a: jax.Array) -> jax.Array:
  """Join steps [n, B, G] to [n B, G], or columns [n, G, B] to [G, n B]."""
  if axis == ROWS:
    return a.reshape(-1, a.shape[2])
  if 0 < a.shape[0] <= MAX_UNROLLED_STEPS:
    # Concatenating a few steps is faster than a transpose.
    return jnp.concatenate(list(a), 1)
  return a.swapaxes(0, 1).reshape(a.shape[1], -1)


def _input_product(axis: int, w: jax.Array, x: jax.Array) -> jax.Array:
  """Multiply w and the inputs of one step or of n.

  For few features the sum is written out, so that XLA fuses it with what follows.
  """
  if x.shape[axis] > FEW_FEATURES:
    return _matmul_steps(axis, w, x)
  wide = _round(widen(x))
  batch_axis = _batch_axis(axis)
  w_by_feature = jnp.split(_round(widen(w)), w.shape[batch_axis], batch_axis)
  x_by_feature = jnp.split(wide, wide.shape[axis], axis)
  products = (
    _add_axes(w_d, wide) * x_d
    for w_d, x_d in zip(w_by_feature, x_by_feature, strict=True)
  )
  return functools.reduce(jnp.add, products)


def _matmul_steps(axis: int, weights: jax.Array, a: jax.Array) -> jax.Array:
  """Apply :func:`matmul` to n steps [n, B, H] or [n, H, B] as one product."""
  if axis == ROWS:
    return matmul(axis, weights, a)
  products = matmul(axis, weights, _join_steps(axis, a))
  return products.reshape(-1, a.shape[0], a.shape[2]).swapaxes(0, 1)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Compute `jnp.einsum` in a's dtype with sums of at least float32."""
  b = b.astype(a.dtype)
  dtype = at_least_float32(a.dtype)
  if rounds_products(a.dtype) and jax.default_backend() != 'cpu':
    a = a.astype(jnp.bfloat16)
    b = b.astype(jnp.bfloat16)
  if jax.default_backend() == 'cpu':
    # CPUs lack 16-bit products in some layouts. Products of 16-bit numbers are exact
    # in float32, so the sums are the same.
    a = _round(widen(a))
    b = _round(widen(b))
  return jnp.einsum(equation, a, b, preferred_element_type=dtype)


def _round(a: jax.Array) -> jax.Array:
  """Round an operand as products do, without a change of its dtype."""
  if not rounds_products(a.dtype):
    return a
  # XLA may leave out a conversion to bfloat16 and back.
  return jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)


def _add_axes(vector: jax.Array, like: jax.Array) -> jax.Array:
  """Reshape a vector [G, 1] or [1, G] to as many axes as `like` has."""
  return vector.reshape((1,) * (like.ndim - 2) + vector.shape)


def _where(axis: int, mask_t: Mask, new: Any, old: Any) -> Any:
  """Select `new` at valid rows and `old` at masked ones."""
  if mask_t is None:
    return new
  mask_t = jnp.expand_dims(mask_t, axis)
  return jax.tree.map(lambda new, old: jnp.where(mask_t, new, old), new, old)


def _batch_axis(axis: int) -> int:
  """Return the other one of the last two axes."""
  return -3 - axis


def _swap_features(array: jax.Array) -> jax.Array:
  return array.swapaxes(-1, -2)
