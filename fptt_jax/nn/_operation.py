"""Operations of JAX that a native kernel of the CPU computes, or else plain JAX.

Each is a primitive, because only its lowering knows what a program is for: one for this
CPU calls the kernel, and one for another platform, or for :mod:`jax.export`, runs plain
JAX.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
import numpy as np


class Operation(NamedTuple):
  """An operation, whose operands and results may have members as leading axes.

  Each function takes the static parts of a call, and the operands.

  Attributes:
    name: its name in programs.
    shapes: the shapes of the results.
    plain: the results of one member, in plain JAX.
    target: the name by which JAX knows the kernel; takes the static parts alone.
    members: how many leading axes are members.
    attributes: further arguments of the kernel, names and numbers of float32; takes the
      static parts alone.
    in_place: whether the results overwrite the last operands, if no one else reads
      them.
  """

  name: str
  shapes: Callable[..., list[jax.ShapeDtypeStruct]]
  plain: Callable[..., list[jax.Array]]
  target: Callable[[Any], str]
  members: Callable[..., int]
  attributes: Callable[[Any], dict[str, float]] = lambda call: {}
  in_place: bool = False


def make_primitive(operation: Operation) -> Primitive:
  """Make a primitive of JAX, which takes operands and the static parts `call`."""
  primitive = Primitive(f'fptt_jax_native_{operation.name}')
  primitive.multiple_results = True
  primitive.def_impl(functools.partial(_run_eagerly, primitive))
  primitive.def_abstract_eval(functools.partial(_find_avals, operation))
  mlir.register_lowering(primitive, functools.partial(_lower, operation))
  on_cpu = functools.partial(_lower_on_cpu, operation)
  mlir.register_lowering(primitive, on_cpu, platform='cpu')
  batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
  return primitive


def _find_avals(operation: Operation, *operands: Any, call: Any) -> list[Any]:
  """Return the types of the results."""
  results = operation.shapes(call, *operands)
  return [jax.core.ShapedArray(result.shape, result.dtype) for result in results]


def _run_kernel(operation: Operation, call: Any, *operands: jax.Array) -> Any:
  """Run the kernel, which takes members as leading axes."""
  shapes = operation.shapes(call, *operands)
  aliases = {}
  if operation.in_place:
    first = len(operands) - len(shapes)
    aliases = {first + number: number for number in range(len(shapes))}
  function = jax.ffi.ffi_call(
    operation.target(call), shapes, input_output_aliases=aliases
  )
  attributes = operation.attributes(call)
  return function(*operands, **{key: np.float32(attributes[key]) for key in attributes})


def _run_plain(operation: Operation, call: Any, *operands: jax.Array) -> Any:
  """Run plain JAX, which takes members by `jax.vmap`."""
  run = functools.partial(operation.plain, call)
  for _ in range(operation.members(call, *operands)):
    run = jax.vmap(run)
  return run(*operands)


def _lower_on_cpu(operation: Operation, ctx: Any, *operands: Any, call: Any) -> Any:
  """Lower to the kernel, unless the program is exported."""
  # A call of the kernel means nothing to another process.
  exported = ctx.module_context.lowering_parameters.for_export
  run = functools.partial(_run_plain if exported else _run_kernel, operation, call)
  return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


def _lower(operation: Operation, ctx: Any, *operands: Any, call: Any) -> Any:
  """Lower to plain JAX."""
  run = functools.partial(_run_plain, operation, call)
  return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


def _batch(
  primitive: Primitive, operands: Any, axes: Any, *, call: Any
) -> tuple[Any, Any]:
  """Give each member operands of its own, along a new leading axis."""
  pairs = list(zip(operands, axes, strict=True))
  size = next(operand.shape[axis] for operand, axis in pairs if axis is not None)
  members = [
    jax.numpy.broadcast_to(operand, (size, *operand.shape))
    if axis is None
    else jax.numpy.moveaxis(operand, axis, 0)
    for operand, axis in pairs
  ]
  results = primitive.bind(*members, call=call)
  return results, [0] * len(results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(primitive: Primitive, call: Any, *operands: jax.Array) -> Any:
  """Run an operation as a program of its own."""
  return primitive.bind(*operands, call=call)


def _run_eagerly(primitive: Primitive, *operands: jax.Array, call: Any) -> Any:
  """Run an operation outside of any program."""
  # Without compilation the operation would call itself.
  with jax.disable_jit(False):
    return _compiled(primitive, call, *operands)
