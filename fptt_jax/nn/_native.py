"""Windows that run in a native kernel of the CPU: see :mod:`fptt_jax.nn.kernels.cpu`.

A window is one operation forward and one backward, which gives all gradients. Each is
a primitive of JAX, because only its lowering knows what a program is for: one for this
CPU calls the kernel, and one for another platform, or for :mod:`jax.export`, runs the
fused scan.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple
import warnings

import jax
from jax import export
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
import jax.numpy as jnp
import numpy as np

from fptt_jax.nn._fused import FusedCell, Mask, State, Weights, run_fused
from fptt_jax.nn.kernels import cpu

UNIT_MULTIPLE = 16
"""Kernels keep factors for a multiple of so many units, the widest vector of floats."""


class NativeCell(NamedTuple):
  """A cell with a native kernel.

  Operands are the weights, x, the mask, the parts of the state, and backward y, the
  factors, dy and the gradient of the parts of the end state. Results are the parts of
  the end state, y and the factors, and backward the gradients of weights, x and the
  parts of the state. What is absent or not wanted has no elements.

  Attributes:
    name: name of the kernel's source and targets.
    num_factors: numbers per unit and step that the backward pass reads, without y.
    weight_shapes: (D, H) -> the shapes of the weights.
    fused: the same cell, for programs that cannot call the kernel.
    products: 'bfloat16' rounds the operands of products.
    attributes: further arguments of the kernel, names and numbers of float32.
  """

  name: str
  num_factors: int
  weight_shapes: Callable[[int, int], tuple[tuple[int, ...], ...]]
  fused: FusedCell
  products: str = 'float32'
  attributes: tuple[tuple[str, float], ...] = ()

  def round_products(self) -> 'NativeCell':
    """Return the cell with products of bfloat16."""
    fused = self.fused._replace(products='bfloat16')
    return self._replace(products='bfloat16', fused=fused)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
  """Tell which gradients a backward pass computes beside those of the weights."""

  x: bool
  state: bool


class _Call(NamedTuple):
  """The static parts of an operation.

  Attributes:
    cell: the cell.
    structure: tree structure of (weights, state).
    keep: whether the forward pass returns factors.
    wanted: what the backward pass computes.
  """

  cell: NativeCell
  structure: Any
  keep: bool = False
  wanted: _Wanted = _Wanted(False, False)


def find_problem(
  cell: NativeCell, weights: Weights, state: State, x: jax.Array
) -> str | None:
  """Return why a window cannot run in the native kernel, or None if it can."""
  parts = jax.tree.leaves(state)
  if jax.default_backend() != 'cpu':
    return f'the default backend is {jax.default_backend()!r}'
  dtypes = {leaf.dtype for leaf in (x, *weights, *parts)}
  if dtypes != {jnp.dtype(jnp.float32)}:
    names = sorted(dtype.name for dtype in dtypes)
    return f'it takes float32, got {", ".join(names)}'
  if any(export.is_symbolic_dim(size) for size in x.shape):
    return 'sizes are symbolic'
  if 0 in x.shape or math.prod(x.shape[-3:-1]) >= 2**31:
    return f'it takes 1 to 2^31 rows in a window, got inputs of the shape {x.shape}'
  # A kernel reads raw memory by these shapes, so a wrong operand must not reach it.
  expected = cell.weight_shapes(x.shape[-1], parts[0].shape[-1])
  if tuple(weight.shape for weight in weights) != expected:
    return f'it takes weights of the shapes {expected}'
  return cpu.find_problem(cell.name, cell.products)


@functools.cache
def warn_once(message: str) -> None:
  """Warn the first time."""
  warnings.warn(message, stacklevel=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_native(
  cell: NativeCell, weights: Weights, state: State, x: jax.Array, mask: Mask
) -> tuple[State, Any]:
  """Run a window as `run_fused` does, for which `find_problem` found no problem."""
  return _run_forward(cell, False, weights, state, x, mask)[0]


def _run_forward(
  cell: NativeCell,
  keep: bool,
  weights: Weights,
  state: State,
  x: jax.Array,
  mask: Mask,
) -> tuple[tuple[State, jax.Array], jax.Array]:
  """Return ((state after the window, y), factors)."""
  parts, state_structure = jax.tree.flatten(state)
  call = _Call(cell, jax.tree.structure((weights, state)), keep)
  operands = (*weights, x, _fill(mask, jnp.bool_), *parts)
  *end, y, factors = _forward_p.bind(*operands, call=call)
  return (jax.tree.unflatten(state_structure, end), y), factors


def _run_native_forward(
  cell: NativeCell, weights: Any, state: Any, x: Any, mask: Any
) -> tuple[Any, Any]:
  """Run a window whose arguments tell whether they are differentiated."""
  wanted = _Wanted(x.perturbed, any(part.perturbed for part in jax.tree.leaves(state)))
  weights, state, x, mask = jax.tree.map(
    lambda argument: argument.value, (weights, state, x, mask)
  )
  outputs, factors = _run_forward(cell, True, weights, state, x, mask)
  return outputs, (weights, state, x, mask, outputs[1], factors, wanted)


def _run_native_backward(
  cell: NativeCell, residuals: Any, gradient: tuple[State, Any]
) -> tuple[Any, ...]:
  """Return the gradients of weights, state, x and (None) mask."""
  weights, state, x, mask, y, factors, wanted = residuals
  d_end, dy = gradient
  parts, state_structure = jax.tree.flatten(state)
  call = _Call(cell, jax.tree.structure((weights, state)), wanted=wanted)
  d_outputs = (dy, *jax.tree.leaves(d_end, is_leaf=_is_zero))
  given = [_fill(None if _is_zero(d) else d, jnp.float32) for d in d_outputs]
  operands = (*weights, x, _fill(mask, jnp.bool_), *parts, y, factors, *given)
  gradients = _backward_p.bind(*operands, call=call)
  d_weights = tuple(gradients[: len(weights)])
  dx, *d_parts = gradients[len(weights) :]
  d_state = jax.tree.unflatten(state_structure, d_parts) if wanted.state else None
  return d_weights, d_state, dx if wanted.x else None, None


run_native.defvjp(_run_native_forward, _run_native_backward, symbolic_zeros=True)


def _is_zero(gradient: Any) -> bool:
  return isinstance(gradient, SymbolicZero)


def _fill(array: jax.Array | None, dtype: Any) -> jax.Array:
  """Return an array, or one without elements for None."""
  return jnp.zeros(0, dtype) if array is None else array


def _split(call: _Call, operands: Any) -> tuple[Any, Any, Any, Any, Any]:
  """Split operands into (weights, parts of the state, x, mask, others)."""
  num_weights, num_parts = (tree.num_leaves for tree in call.structure.children())
  weights = operands[:num_weights]
  x, mask, *others = operands[num_weights:]
  return weights, others[:num_parts], x, mask, others[num_parts:]


def _forward_shapes(call: _Call, *operands: Any) -> list[jax.ShapeDtypeStruct]:
  """Return the shapes of the forward pass's results."""
  _, parts, x, _, _ = _split(call, operands)
  *steps, _ = x.shape
  hidden = parts[0].shape[-1]
  padded = -(-hidden // UNIT_MULTIPLE) * UNIT_MULTIPLE
  factors = (*steps, call.cell.num_factors * padded) if call.keep else (*steps[:-2], 0)
  shapes = [*(part.shape for part in parts), (*steps, hidden), factors]
  return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def _backward_shapes(call: _Call, *operands: Any) -> list[jax.ShapeDtypeStruct]:
  """Return the shapes of the backward pass's results."""
  weights, parts, x, _, _ = _split(call, operands)
  nothing = (*x.shape[:-3], 0)
  shapes = [
    *(weight.shape for weight in weights),
    x.shape if call.wanted.x else nothing,
    *(part.shape if call.wanted.state else nothing for part in parts),
  ]
  return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def _fused_forward(call: _Call, *operands: jax.Array) -> list[jax.Array]:
  """Compute what the kernel does, without factors, by the fused scan."""
  weights, parts, x, mask, _ = _split(call, operands)
  run = _fused_window(call, mask)
  *_, factors = _forward_shapes(call, *operands)
  return [*run(weights, parts, x), jnp.zeros(factors.shape, factors.dtype)]


def _fused_backward(call: _Call, *operands: jax.Array) -> list[jax.Array]:
  """Compute what the kernel does by the fused scan, which runs forward anew."""
  weights, parts, x, mask, others = _split(call, operands)
  _, _, dy, *d_end = others
  outputs, pull_back = jax.vjp(_fused_window(call, mask), weights, parts, x)
  given = (*d_end, dy)
  d_outputs = [
    d if d.size else jnp.zeros_like(output)
    for d, output in zip(given, outputs, strict=True)
  ]
  d_weights, d_parts, dx = pull_back(d_outputs)
  shapes = _backward_shapes(call, *operands)
  gradients = (*d_weights, dx, *d_parts)
  return [
    gradient if math.prod(shape.shape) else jnp.zeros(shape.shape, shape.dtype)
    for gradient, shape in zip(gradients, shapes, strict=True)
  ]


def _fused_window(call: _Call, mask: jax.Array) -> Any:
  """Return the fused scan: (weights, parts, x) -> [parts of the end state, y]."""

  def run(weights: Any, parts: Any, x: jax.Array) -> list[jax.Array]:
    weights, state = jax.tree.unflatten(call.structure, [*weights, *parts])
    valid = mask if mask.size else None
    end, y = run_fused(call.cell.fused, weights, state, x, valid)
    return [*jax.tree.leaves(end), y]

  return run


class _Pass(NamedTuple):
  """A direction of the window.

  Attributes:
    name: 'forward' or 'backward'.
    shapes: (call, *operands) -> the shapes of the results.
    fused: (call, *operands) -> the results by the fused scan, of one member.
  """

  name: str
  shapes: Callable[..., list[jax.ShapeDtypeStruct]]
  fused: Callable[..., list[jax.Array]]


def _find_avals(part: _Pass, *operands: Any, call: _Call) -> list[Any]:
  """Return the types of the results."""
  results = part.shapes(call, *operands)
  return [jax.core.ShapedArray(result.shape, result.dtype) for result in results]


def _run_kernel(part: _Pass, call: _Call, *operands: jax.Array) -> Any:
  """Run the kernel, which takes members as leading axes."""
  name = cpu.target(call.cell.name, call.cell.products, part.name)
  attributes = {key: np.float32(value) for key, value in call.cell.attributes}
  function = jax.ffi.ffi_call(name, part.shapes(call, *operands))
  return function(*operands, **attributes)


def _run_fused(part: _Pass, call: _Call, *operands: jax.Array) -> Any:
  """Run the fused scan, which takes members by `jax.vmap`."""
  run = functools.partial(part.fused, call)
  _, _, x, _, _ = _split(call, operands)
  for _ in range(x.ndim - 3):
    run = jax.vmap(run)
  return run(*operands)


def _lower_on_cpu(part: _Pass, ctx: Any, *operands: Any, call: _Call) -> Any:
  """Lower to the kernel, unless the program is exported."""
  # A call of the kernel means nothing to another process.
  exported = ctx.module_context.lowering_parameters.for_export
  run = functools.partial(_run_fused if exported else _run_kernel, part, call)
  return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


def _lower(part: _Pass, ctx: Any, *operands: Any, call: _Call) -> Any:
  """Lower to the fused scan."""
  run = functools.partial(_run_fused, part, call)
  return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


def _batch(
  primitive: Primitive, operands: Any, axes: Any, *, call: _Call
) -> tuple[Any, Any]:
  """Give each member operands of its own, along a new leading axis."""
  pairs = list(zip(operands, axes, strict=True))
  size = next(operand.shape[axis] for operand, axis in pairs if axis is not None)
  members = [
    jnp.broadcast_to(operand, (size, *operand.shape))
    if axis is None
    else jnp.moveaxis(operand, axis, 0)
    for operand, axis in pairs
  ]
  results = primitive.bind(*members, call=call)
  return results, [0] * len(results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(primitive: Primitive, call: _Call, *operands: jax.Array) -> Any:
  """Run an operation as a program of its own."""
  return primitive.bind(*operands, call=call)


def _run_eagerly(primitive: Primitive, *operands: jax.Array, call: _Call) -> Any:
  """Run an operation outside of any program."""
  # Without compilation the operation would call itself.
  with jax.disable_jit(False):
    return _compiled(primitive, call, *operands)


def _make_primitive(part: _Pass) -> Primitive:
  """Make an operation of JAX from a direction of the window."""
  primitive = Primitive(f'fptt_jax_native_{part.name}')
  primitive.multiple_results = True
  primitive.def_impl(functools.partial(_run_eagerly, primitive))
  primitive.def_abstract_eval(functools.partial(_find_avals, part))
  mlir.register_lowering(primitive, functools.partial(_lower, part))
  on_cpu = functools.partial(_lower_on_cpu, part)
  mlir.register_lowering(primitive, on_cpu, platform='cpu')
  batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
  return primitive


_forward_p = _make_primitive(_Pass('forward', _forward_shapes, _fused_forward))
_backward_p = _make_primitive(_Pass('backward', _backward_shapes, _fused_backward))
