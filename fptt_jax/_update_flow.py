"""Follow the updates that `fptt` returns to the updates that an optimizer returns.

W̄ and λ follow the weights only if the updates of `fptt` are applied as they are.
A wrapper may move them (`optax.flatten`) or replace all of them by zeros on calls on
which it takes no step (`optax.MultiSteps`, `optax.apply_if_finite`). Anything else
changes them. The jaxpr of one update tells which is the case.
"""

from collections.abc import Sequence
import itertools
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

_mark = core.Primitive('fptt_update')
_mark.def_abstract_eval(lambda update, index: update)

_MOVES = (
  'broadcast_in_dim',
  'concatenate',
  'copy',
  'dynamic_slice',
  'expand_dims',
  'reshape',
  'slice',
  'split',
  'squeeze',
  'transpose',
)
"""Primitives that move numbers and change none."""


class _Flow(NamedTuple):
  """Facts about a variable.

  Attributes:
    marks: Indices of the marked updates that it holds, unchanged or replaced by zeros.
      Empty for all other variables.
    is_zero: Whether all of its numbers are 0.
    is_switch: Whether it is one boolean, possibly as a number, or copies of one.
  """

  marks: frozenset[int] = frozenset()
  is_zero: bool = False
  is_switch: bool = False


_indices = itertools.count()


def mark(update: jax.Array) -> jax.Array:
  """Return an update that :func:`lost_marks` recognizes, by an index of its own.

  It can be traced, but not compiled.
  """
  marked: jax.Array = _mark.bind(update, index=next(_indices))
  return marked


def lost_marks(jaxpr: core.Jaxpr) -> frozenset[int]:
  """Return the indices of the marked updates that a function changes or drops.

  Args:
    jaxpr: A function whose outputs are updates. Some of its arrays are marked.

  Returns:
    The marks in the function that do not reach its outputs unchanged, or as zeros where
    a scalar condition replaces the whole update.
  """
  outputs = _follow(jaxpr, [_Flow()] * len(jaxpr.invars))
  return _all_marks(jaxpr).difference(*(flow.marks for flow in outputs))


def _all_marks(jaxpr: core.Jaxpr) -> frozenset[int]:
  """Return the indices of all marked updates, also of those in branches."""
  marks: frozenset[int] = frozenset()
  for equation in jaxpr.eqns:
    if equation.primitive is _mark:
      marks |= {equation.params['index']}
    for body in _bodies(equation):
      marks |= _all_marks(body)
  return marks


def _follow(jaxpr: core.Jaxpr, inputs: Sequence[_Flow]) -> list[_Flow]:
  """Return the flows of a jaxpr's outputs."""
  known = dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom: Any) -> _Flow:
    if isinstance(atom, core.Literal):
      return _Flow(is_zero=not np.any(atom.val))
    flow = known.get(atom, _Flow())
    is_boolean = atom.aval.shape == () and atom.aval.dtype == jnp.bool_
    return flow._replace(is_switch=True) if is_boolean else flow

  for equation in jaxpr.eqns:
    outputs = _follow_equation(equation, [read(atom) for atom in equation.invars])
    known.update(zip(equation.outvars, outputs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _follow_equation(equation: Any, inputs: list[_Flow]) -> list[_Flow]:
  """Return the flows of an equation's outputs."""
  name = equation.primitive.name
  bodies = _bodies(equation)
  if name == 'cond':
    # The first input chooses the branch and does not reach the outputs.
    branches = [_follow(body, inputs[1:]) for body in bodies]
    return [_either(cases) for cases in zip(*branches, strict=True)]
  # A call of another function has that function's inputs. Loops have not.
  is_call = len(bodies) == 1 and name not in ('scan', 'while')
  if is_call and len(bodies[0].invars) == len(inputs):
    return _follow(bodies[0], inputs)
  return [_combine(equation, inputs)] * len(equation.outvars)


def _combine(equation: Any, inputs: list[_Flow]) -> _Flow:
  """Return the flow of an output of a primitive without functions inside."""
  name = equation.primitive.name
  if equation.primitive is _mark:
    return _Flow(inputs[0].marks | {equation.params['index']})
  if name in _MOVES:
    return _all_of(inputs)
  if name == 'convert_element_type':
    # An update in another dtype has other numbers.
    return inputs[0]._replace(marks=frozenset())
  if name == 'select_n' and inputs[0].is_switch:
    return _either(inputs[1:])
  # MultiSteps multiplies updates by 0 on calls without a step.
  if name == 'mul':
    left, right = inputs
    for factor, switch in ((left, right), (right, left)):
      if switch.is_switch:
        return factor
  return _Flow()


def _all_of(inputs: list[_Flow]) -> _Flow:
  """Return the flow of an array that is put together from others."""
  if not all(flow.marks for flow in inputs):
    first = inputs[0]
    same = all(flow == first for flow in inputs)
    return first if same else _Flow()
  return _Flow(frozenset().union(*(flow.marks for flow in inputs)))


def _either(cases: Sequence[_Flow]) -> _Flow:
  """Return the flow of an array that is one of others, for all of its numbers."""
  # A case that is neither an update nor zero replaces updates by something else.
  if not all(flow.marks or flow.is_zero for flow in cases):
    return _Flow()
  marks = frozenset().union(*(flow.marks for flow in cases))
  return _Flow(marks, is_zero=not marks)


def _bodies(equation: Any) -> list[core.Jaxpr]:
  """Return the functions that an equation calls."""
  found = []
  for value in equation.params.values():
    for item in value if isinstance(value, tuple) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        found.append(item)
  return found
