"""Windows that run in a native kernel of the CPU: see :mod:`fptt_jax.nn.kernels.cpu`.

A window is one operation forward and one backward, which gives all gradients. Where
there is no kernel, the fused scan runs in its place: see :mod:`fptt_jax.nn._operation`.
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
import jax.numpy as jnp

from fptt_jax._types import OwnStep
from fptt_jax.nn._fused import FusedCell, Mask, State, Weights, run_fused, varies
from fptt_jax.nn._operation import Operation, make_primitive
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
    names: names of the weights as parameters of the layer.
    own_step: (weights, state, x_t, own_only) -> derivatives as `Recurrent.own_step`
      returns them, if a kernel advances the influence of the weights.
    products: 'bfloat16' rounds the operands of products.
    attributes: further arguments of the kernel, names and numbers of float32.
  """

  name: str
  num_factors: int
  weight_shapes: Callable[[int, int], tuple[tuple[int, ...], ...]]
  fused: FusedCell
  names: tuple[str, ...] = ()
  own_step: Callable[[Weights, State, jax.Array, bool], OwnStep] | None = None
  products: str = 'float32'
  attributes: tuple[tuple[str, float], ...] = ()

  def with_products(self, products: str | None) -> 'NativeCell':
    """Return the cell with products of a precision, None for what JAX does."""
    fused = self.fused._replace(products=products)
    own = 'bfloat16' if products == 'bfloat16' else 'float32'
    return self._replace(products=own, fused=fused)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
  """Tell which gradients a backward pass computes beside those of the weights."""

  x: bool
  state: bool


class Call(NamedTuple):
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
  cell: NativeCell, weights: Weights, state: State, x: jax.Array, mask: Mask
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
  # The kernel counts rows and features in 32 bits, and some of them twice.
  sizes = (math.prod(x.shape[-3:-1]), x.shape[-1], parts[0].shape[-1])
  if not 0 < min(sizes) <= max(sizes) <= 2**30:
    return f'it takes 1 to 2^30 rows and features, got inputs of the shape {x.shape}'
  if varies((weights, state, x, mask)):
    return 'jax.shard_map runs with check_vma=True'
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
  return run_forward(cell, False, weights, state, x, mask)[0]


def run_forward(
  cell: NativeCell,
  keep: bool,
  weights: Weights,
  state: State,
  x: jax.Array,
  mask: Mask,
) -> tuple[tuple[State, jax.Array], jax.Array]:
  """Return ((state after the window, y), factors)."""
  parts, state_structure = jax.tree.flatten(state)
  call = Call(cell, jax.tree.structure((weights, state)), keep)
  operands = (*weights, x, fill(mask, jnp.bool_), *parts)
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
  outputs, factors = run_forward(cell, True, weights, state, x, mask)
  return outputs, (weights, state, x, mask, outputs[1], factors, wanted)


def _run_native_backward(
  cell: NativeCell, residuals: Any, gradient: tuple[State, Any]
) -> tuple[Any, ...]:
  """Return the gradients of weights, state, x and (None) mask."""
  weights, state, x, mask, y, factors, wanted = residuals
  d_end, dy = gradient
  parts, state_structure = jax.tree.flatten(state)
  call = Call(cell, jax.tree.structure((weights, state)), wanted=wanted)
  d_outputs = (dy, *jax.tree.leaves(d_end, is_leaf=_is_zero))
  given = [fill(None if _is_zero(d) else d, jnp.float32) for d in d_outputs]
  operands = (*weights, x, fill(mask, jnp.bool_), *parts, y, factors, *given)
  gradients = _backward_p.bind(*operands, call=call)
  d_weights = tuple(gradients[: len(weights)])
  dx, *d_parts = gradients[len(weights) :]
  d_state = jax.tree.unflatten(state_structure, d_parts) if wanted.state else None
  return d_weights, d_state, dx if wanted.x else None, None


run_native.defvjp(_run_native_forward, _run_native_backward, symbolic_zeros=True)


def _is_zero(gradient: Any) -> bool:
  return isinstance(gradient, SymbolicZero)


def fill(array: jax.Array | None, dtype: Any) -> jax.Array:
  """Return an array, or one without elements for None."""
  return jnp.zeros(0, dtype) if array is None else array


def split_operands(call: Call, operands: Any) -> tuple[Any, Any, Any, Any, Any]:
  """Split operands into (weights, parts of the state, x, mask, others)."""
  num_weights, num_parts = (tree.num_leaves for tree in call.structure.children())
  weights = operands[:num_weights]
  x, mask, *others = operands[num_weights:]
  return weights, others[:num_parts], x, mask, others[num_parts:]


def _forward_shapes(call: Call, *operands: Any) -> list[jax.ShapeDtypeStruct]:
  """Return the shapes of the forward pass's results."""
  _, parts, x, _, _ = split_operands(call, operands)
  *steps, _ = x.shape
  hidden = parts[0].shape[-1]
  padded = -(-hidden // UNIT_MULTIPLE) * UNIT_MULTIPLE
  factors = (*steps, call.cell.num_factors * padded) if call.keep else (*steps[:-2], 0)
  shapes = [*(part.shape for part in parts), (*steps, hidden), factors]
  return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def _backward_shapes(call: Call, *operands: Any) -> list[jax.ShapeDtypeStruct]:
  """Return the shapes of the backward pass's results."""
  weights, parts, x, _, _ = split_operands(call, operands)
  nothing = (*x.shape[:-3], 0)
  shapes = [
    *(weight.shape for weight in weights),
    x.shape if call.wanted.x else nothing,
    *(part.shape if call.wanted.state else nothing for part in parts),
  ]
  return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def _fused_forward(call: Call, *operands: jax.Array) -> list[jax.Array]:
  """Compute what the kernel does, without factors, by the fused scan."""
  weights, parts, x, mask, _ = split_operands(call, operands)
  run = _fused_window(call, mask)
  *_, factors = _forward_shapes(call, *operands)
  return [*run(weights, parts, x), jnp.zeros(factors.shape, factors.dtype)]


def _fused_backward(call: Call, *operands: jax.Array) -> list[jax.Array]:
  """Compute what the kernel does by the fused scan, which runs forward anew."""
  weights, parts, x, mask, others = split_operands(call, operands)
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


def _fused_window(call: Call, mask: jax.Array) -> Any:
  """Return the fused scan: (weights, parts, x) -> [parts of the end state, y]."""

  def run(weights: Any, parts: Any, x: jax.Array) -> list[jax.Array]:
    weights, state = jax.tree.unflatten(call.structure, [*weights, *parts])
    valid = mask if mask.size else None
    end, y = run_fused(call.cell.fused, weights, state, x, valid)
    return [*jax.tree.leaves(end), y]

  return run


def _target(function: str, call: Call) -> str:
  return cpu.target(call.cell.name, call.cell.products, function)


def _attributes(call: Call) -> dict[str, float]:
  return dict(call.cell.attributes)


def count_members(call: Call, *operands: Any) -> int:
  """Return how many leading axes of a window's operands are members."""
  _, _, x, _, _ = split_operands(call, operands)
  return int(x.ndim) - 3


_forward_p = make_primitive(
  Operation(
    'forward',
    _forward_shapes,
    _fused_forward,
    functools.partial(_target, 'forward'),
    count_members,
    _attributes,
  )
)
_backward_p = make_primitive(
  Operation(
    'backward',
    _backward_shapes,
    _fused_backward,
    functools.partial(_target, 'backward'),
    count_members,
    _attributes,
  )
)
