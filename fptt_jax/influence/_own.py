"""Influence of the parameters of a unit on that unit's own state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._dtypes import at_least_float32, widen
from fptt_jax._types import Hidden, Params
from fptt_jax.influence._arrays import (
  Weights,
  is_real,
  join,
  select,
  spread,
  take_arrays,
)
from fptt_jax.influence._base import WindowMap
from fptt_jax.influence._pull import pull_to_start, pull_to_weights, run_steps
from fptt_jax.influence._units import Layer, Units


def empty_own(units: Units, params: Params, batch_size: int) -> Weights:
  """Return the influence before the first step, {path: zeros [B, m, ...]}.

  Args:
    units: Layers and units of the model.
    params: Parameters of the model.
    batch_size: B.
  """
  influence = {}
  for layer in units.layers:
    for path, leaf in select(params, layer.units).items():
      shape = (batch_size, len(layer.arrays), *leaf.shape)
      influence[path] = jnp.zeros(shape, at_least_float32(leaf.dtype))
  return influence


def credit_own(
  units: Units, params: Params, influence: Weights, d_hidden: Hidden
) -> Params:
  """Return the credit of each unit's parameters, a tree like all parameters."""
  delta = join(d_hidden)
  credits = {}
  for layer in units.layers:
    of_layer = delta[:, layer.columns]
    for path, unit in layer.units.items():
      own = _at_units(of_layer, unit)
      credits[path] = (own * influence[path]).sum((0, 1))
  return spread(params, credits)


def advance_own(
  units: Units,
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  influence: Weights,
  own_only: bool = False,
) -> Weights:
  """Return the influence after a window.

  The effect of a unit on the others is left out from step to step.

  Args:
    units: Layers and units of the model.
    window: The window.
    params: Parameters of the model.
    hidden: [B, ...], hidden state after the window before.
    influence: {path: [B, m, ...]}, influence before the window.
    own_only: Whether to leave out a unit's effect on itself through recurrent matrices,
      too.
  """
  before = run_steps(window, params, hidden)
  given = given_transitions(window, params, before, own_only)
  moved: Weights = {}
  for layer in units.layers:
    transitions = given.get(layer.arrays[0])
    if transitions is None or layer.apart:
      transitions = _own_transitions(layer, window, params, before)
    transitions = _where_valid(window.mask, transitions)
    moved |= _advance_layer(layer, window, params, before, influence, transitions)
  return moved


def given_transitions(
  window: WindowMap, params: Params, before: Hidden, own_only: bool
) -> dict[int, jax.Array]:
  """Return the transitions [S, B, m, m, n] that layers compute themselves.

  They are keyed by the number of the layer's first array, as in :class:`Layer`.
  """
  if window.own_transitions is None:
    return {}
  first = jax.tree.leaves(before)[0]
  steps, batch_size = first.shape[:2]
  blocks = window.own_transitions(
    params, _join_steps(before), _one_window(window.x), own_only
  )
  return {
    array: widen(block).reshape(steps, batch_size, *block.shape[1:])
    for array, block in blocks.items()
  }


def _advance_layer(
  layer: Layer,
  window: WindowMap,
  params: Params,
  before: Hidden,
  influence: Weights,
  transitions: jax.Array,
) -> Weights:
  """Return the influence of one layer's parameters after a window.

  Args:
    layer: The layer.
    window: The window.
    params: Parameters of the model.
    before: [S, B, ...], hidden states before each step.
    influence: {path: [B, m, ...]}, influence before the window.
    transitions: [S, B, m, m, n], derivative of the m arrays of each unit after each
      step with respect to those before it.
  """
  paths = tuple(layer.units)
  carried, after = _chain(transitions)
  steps, batch_size, arrays = after.shape[:3]
  rows = after.reshape(steps, batch_size, arrays, -1).swapaxes(1, 2)
  direct = pull_to_weights(window, params, paths, before, rows, layer.arrays)
  if window.fresh is not None:
    width = join(jax.tree.map(lambda leaf: leaf[0], before)).shape[1]
    first = jnp.zeros((arrays, batch_size, width), carried.dtype)
    first = first.at[:, :, layer.columns].set(carried.swapaxes(0, 1))
    direct, first = pull_to_start(window, params, direct, first)
    carried = first[:, :, layer.columns].swapaxes(0, 1)

  def moved(path: str, unit: np.ndarray) -> jax.Array:
    old = influence[path]
    added = jnp.where(unit >= 0, direct[path], 0).astype(old.dtype)
    for array in range(arrays):
      own = _at_units(carried[:, :, array], unit)
      added += own.astype(old.dtype) * old[:, None, array]
    return added

  return {path: moved(path, unit) for path, unit in layer.units.items()}


def _chain(transitions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Multiply transitions backward from a window's end.

  Args:
    transitions: [S, B, m, m, n].

  Returns:
    Derivative of each unit's arrays after the window with respect to those before it
    [B, m, m, n], and to those after each step [S, B, m, m, n].
  """
  batch_size, arrays, _, size = transitions.shape[1:]
  eye = jnp.eye(arrays, dtype=transitions.dtype)[None, :, :, None]

  def body(after: jax.Array, transition: jax.Array) -> tuple[jax.Array, jax.Array]:
    # A few products of units: einsum would make a batched product of them.
    terms = [
      after[:, :, array, None] * transition[:, None, array] for array in range(arrays)
    ]
    return sum(terms[1:], terms[0]), after

  start = jnp.broadcast_to(eye, (batch_size, arrays, arrays, size))
  return jax.lax.scan(body, start, transitions, reverse=True)


def _own_transitions(
  layer: Layer, window: WindowMap, params: Params, before: Hidden
) -> jax.Array:
  """Differentiate each step; returns [S, B, m, m, n]."""
  steps, batch_size = jax.tree.leaves(before)[0].shape[:2]
  hidden = _join_steps(before)
  inputs = _one_window(window.x)
  arrays, size = layer.columns.shape

  def run(rows: jax.Array) -> jax.Array:
    new_hidden = window.run(params, put_arrays(hidden, layer, rows), inputs, None)
    return join(take_arrays(new_hidden, layer.arrays))

  rows = join(take_arrays(hidden, layer.arrays))
  if layer.apart:
    blocks = _pull_ones(run, rows, arrays)
  else:
    blocks = _push_units(run, rows, arrays)
  return blocks.reshape(steps, batch_size, arrays, arrays, size)


def _pull_ones(run: Any, rows: jax.Array, arrays: int) -> jax.Array:
  """Return the transitions [R, m, m, n] of units that are apart, by m pull-backs."""
  number, width = rows.shape
  out, pull = jax.vjp(run, rows)
  ones = jnp.repeat(jnp.eye(arrays, dtype=out.dtype), width // arrays, axis=1)
  cotangents = jnp.broadcast_to(ones[:, None], (arrays, number, width))
  [gradients] = jax.vmap(pull)(cotangents)
  blocks: jax.Array = gradients.reshape(arrays, number, arrays, -1).swapaxes(0, 1)
  return blocks


def _push_units(run: Any, rows: jax.Array, arrays: int) -> jax.Array:
  """Return the own transitions [R, m, m, n] of units that mix, unit by unit."""
  number, width = rows.shape
  size = width // arrays
  _, push = jax.linearize(run, rows)

  def one_unit(unit: jax.Array) -> jax.Array:
    columns = unit + size * jnp.arange(arrays)
    tangents = jax.nn.one_hot(columns, width, dtype=rows.dtype)
    tangents = jnp.broadcast_to(tangents[:, None], (arrays, number, width))
    moved = jax.vmap(push)(tangents).reshape(arrays, number, arrays, size)
    return moved[..., unit]

  blocks = jax.lax.map(one_unit, jnp.arange(size))
  return blocks.transpose(2, 3, 1, 0)


def _where_valid(mask: jax.Array | None, transitions: jax.Array) -> jax.Array:
  """Put the identity in place of the transitions of masked steps."""
  if mask is None:
    return transitions
  arrays = transitions.shape[2]
  eye = jnp.eye(arrays, dtype=transitions.dtype)[None, None, :, :, None]
  return jnp.where(mask[:, :, None, None, None], transitions, eye)


def _at_units(values: jax.Array, units: np.ndarray) -> jax.Array:
  """Return values [..., n] of the units of a parameter's entries, [..., *units]."""
  return jnp.take(values, np.maximum(units, 0), axis=-1)


def put_arrays(hidden: Hidden, layer: Layer, rows: jax.Array) -> Hidden:
  """Return a hidden state with the arrays of a layer replaced by rows [R, m n]."""
  leaves, structure = jax.tree.flatten(hidden)
  places = [place for place, leaf in enumerate(leaves) if is_real(leaf)]
  parts = jnp.split(rows, len(layer.arrays), axis=1)
  for number, part in zip(layer.arrays, parts, strict=True):
    leaf = leaves[places[number]]
    leaves[places[number]] = part.reshape(leaf.shape).astype(leaf.dtype)
  return jax.tree.unflatten(structure, leaves)


def _join_steps(tree: Any) -> Any:
  """Return arrays [S, B, ...] as [S B, ...]."""
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _one_window(x: Any) -> Any:
  """Return inputs [S, B, ...] as those of one step of S B rows."""
  return jax.tree.map(lambda leaf: leaf[None], _join_steps(x))
