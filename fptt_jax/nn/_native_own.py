"""Influence of parameters on their own units in native kernels of the CPU.

See :mod:`fptt_jax.influence._own` for what is computed, and :mod:`fptt_jax.nn._native`
for how an operation becomes a call of a kernel.
"""

from typing import Any

import jax
from jax import export
import jax.numpy as jnp

from fptt_jax.nn._fused import Mask, State, Weights, run_fused
from fptt_jax.nn._native import (
  Call,
  NativeCell,
  count_members,
  fill,
  run_forward,
  split_operands,
)
from fptt_jax.nn._operation import Operation, make_primitive
from fptt_jax.nn.kernels import cpu

Influence = dict[str, jax.Array]
SOURCE = 'own'
"""The source of these kernels."""
SMALL_INFLUENCE = 4096
"""Below this size of an influence, a call of a kernel takes longer than its credit."""


def can_advance(
  cell: NativeCell, weights: Weights, state: State, influence: Influence
) -> bool:
  """Return whether a kernel takes the influence [B, ..., m, k n] of a layer."""
  if not influence or cell.own_step is None:
    return False
  # A kernel reads raw memory by these shapes, so a wrong operand must not reach it.
  parts = jax.tree.leaves(state)
  expected = {
    name: (len(parts[0]), *weight.shape[:-1], len(parts), weight.shape[-1])
    for name, weight in zip(cell.names, weights, strict=True)
  }
  return cpu.find_problem(SOURCE, 'float32') is None and all(
    leaf.dtype == jnp.float32 and leaf.shape == expected.get(name)
    for name, leaf in influence.items()
  )


def advance_own(
  cell: NativeCell,
  weights: Weights,
  state: State,
  x: jax.Array,
  mask: Mask,
  influence: Influence,
  credit: Influence,
  own_only: bool,
) -> Influence:
  """Return the influence of a layer's parameters after a window.

  Args:
    cell: The cell, of which `can_advance` is true.
    weights: Its weights.
    state: Its state before the window, arrays [B, n].
    x: [S, B, D].
    mask: bool [S, B] or None.
    influence: {name of a weight: [B, ..., m, k n]}.
    credit: {name of a weight: [..., k n]}, arrays that are computed from the influence
      before. Without them XLA does not know that it may overwrite the influence.
    own_only: As in `Recurrent.own_step`.
  """
  # The gradient of the window runs the same operation, so that XLA runs it once.
  (_, y), factors = run_forward(cell, True, weights, state, x, mask)
  cell = cell._replace(attributes=(('recurrence', float(not own_only)),))
  call = Call(cell, jax.tree.structure((weights, state)))
  waits = [fill(credit.get(name), jnp.float32) for name in cell.names]
  before = [fill(influence.get(name), jnp.float32) for name in cell.names]
  parts = jax.tree.leaves(state)
  mask = fill(mask, jnp.bool_)
  operands = (*weights, x, mask, *parts, y, factors, *waits, *before)
  after = _advance_p.bind(*operands, call=call)
  pairs = zip(cell.names, after, strict=True)
  return {name: leaf for name, leaf in pairs if name in influence}


def _influence_shapes(call: Call, *operands: Any) -> list[jax.ShapeDtypeStruct]:
  influence = operands[-len(call.cell.names) :]
  return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in influence]


def _fused_advance(call: Call, *operands: jax.Array) -> list[jax.Array]:
  """Advance by derivatives of single steps."""
  # Layers without an influence never import them.
  from fptt_jax.influence._own import advance_by_steps

  weights, parts, x, mask, others = split_operands(call, operands)
  influence = others[-len(call.cell.names) :]
  weights, state = jax.tree.unflatten(call.structure, [*weights, *parts])
  valid = mask if mask.size else None
  cell = call.cell

  def body(state: State, inputs: Any) -> tuple[State, State]:
    x_t, mask_t = jax.tree.map(lambda leaf: leaf[None], inputs)
    return run_fused(cell.fused, weights, state, x_t, mask_t)[0], state

  _, before = jax.lax.scan(body, state, (x, valid))
  before, inputs = jax.tree.map(
    lambda leaf: leaf.reshape(-1, leaf.shape[-1]), (before, x)
  )
  [(_, recurrence)] = cell.attributes
  assert cell.own_step is not None
  step = cell.own_step(weights, before, inputs, not recurrence)
  step = jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:2], -1), step)
  given = dict(zip(cell.names, influence, strict=True))
  moved = advance_by_steps(step, valid, {k: v for k, v in given.items() if v.size})
  return [moved.get(name, given[name]) for name in cell.names]


def _advance_target(call: Call) -> str:
  return cpu.target(SOURCE, 'float32', call.cell.name)


def _advance_attributes(call: Call) -> dict[str, float]:
  return dict(call.cell.attributes)


_advance_p = make_primitive(
  Operation(
    'own_advance',
    _influence_shapes,
    _fused_advance,
    _advance_target,
    count_members,
    _advance_attributes,
    in_place=True,
  )
)


def find_credit(delta: jax.Array, influence: jax.Array) -> jax.Array | None:
  """Return the credit of a parameter; None where no kernel can compute it.

  Args:
    delta: [B, m, n], gradient of the state.
    influence: [B, ..., m, k n], influence of the parameter, units fastest.

  Returns:
    [..., k n].
  """
  batch, *own, arrays, columns = influence.shape
  fits = (
    jax.default_backend() == 'cpu'
    and delta.dtype == influence.dtype == jnp.float32
    and not any(export.is_symbolic_dim(size) for size in influence.shape)
    and influence.size >= SMALL_INFLUENCE
    and delta.shape[:2] == (batch, arrays)
    and columns % delta.shape[2] == 0
    and cpu.find_problem(SOURCE, 'float32') is None
  )
  if not fits:
    return None
  flat = influence.reshape(batch, -1, arrays, columns)
  [credit] = _credit_p.bind(delta, flat, call=None)
  return credit.reshape(*own, columns)


def _credit_shapes(
  call: None, delta: Any, influence: Any
) -> list[jax.ShapeDtypeStruct]:
  *members, _, count, _, columns = influence.shape
  return [jax.ShapeDtypeStruct((*members, count, columns), influence.dtype)]


def _fused_credit(call: None, delta: jax.Array, influence: jax.Array) -> Any:
  from fptt_jax.influence._own import sum_of_products

  repeats = influence.shape[-1] // delta.shape[-1]
  own = jnp.tile(delta, (1, 1, repeats))[:, None]
  return [sum_of_products(own, influence).sum(1)]


def _credit_target(call: None) -> str:
  return cpu.target(SOURCE, 'float32', 'credit')


def _count_credit_members(call: None, delta: Any, influence: Any) -> int:
  return int(delta.ndim) - 3


_credit_p = make_primitive(
  Operation(
    'own_credit', _credit_shapes, _fused_credit, _credit_target, _count_credit_members
  )
)
