"""Influence of the parameters of a unit on that unit's own state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._dtypes import at_least_float32, widen
from fptt_jax._types import Hidden, OwnProduct, OwnStep, Params
from fptt_jax.influence._arrays import (
  Weights,
  by_path,
  is_real,
  join,
  select,
  spread,
  take_arrays,
)
from fptt_jax.influence._base import WindowMap
from fptt_jax.influence._pull import (
  inner_axis,
  pull_to_start,
  pull_to_weights,
  run_steps,
)
from fptt_jax.influence._units import Layer, Units

Blocks = tuple[tuple[jax.Array, ...], ...]
"""A small matrix for each unit: m times m arrays over the units."""


def empty_own(units: Units, params: Params, batch_size: int) -> Weights:
  """Return the influence before the first step, {path: zeros [B, ..., m, G]}.

  Args:
    units: Layers and units of the model.
    params: Parameters of the model.
    batch_size: B.
  """
  influence = {}
  for layer in units.layers:
    for path, leaf in select(params, layer.units).items():
      shape = [batch_size, *leaf.shape]
      shape.insert(inner_axis(leaf.ndim), len(layer.arrays))
      influence[path] = jnp.zeros(shape, at_least_float32(leaf.dtype))
  return influence


def credit_own(
  units: Units,
  window: WindowMap,
  params: Params,
  influence: Weights,
  d_hidden: Hidden,
) -> Params:
  """Return the credit of each unit's parameters, a tree like all parameters."""
  delta = join(d_hidden)
  credits = {}
  for layer in units.layers:
    of_layer = jnp.stack([delta[:, c[0] : c[-1] + 1] for c in layer.columns], 1)
    for path, unit in layer.units.items():
      credit = None
      if window.own_kernels is not None and side_by_side(unit, layer.columns.shape[1]):
        credit = window.own_kernels.credit(of_layer, influence[path])
      if credit is None:
        own = _at_units(of_layer, unit)
        credit = sum_of_products(own, influence[path]).sum(inner_axis(unit.ndim) - 1)
      credits[path] = credit
  return spread(params, credits)


def sum_of_products(values: jax.Array, factors: jax.Array) -> jax.Array:
  """Return the sum over the rows of products of arrays [B, ...] that broadcast."""
  if jax.default_backend() != 'cpu':
    return (values * factors).sum(0)

  # On a CPU the fused sum reads its operands with the stride of a row, one number after
  # the other. Row by row, whole arrays are added.
  def body(total: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
    value, factor = row
    return total + (value * factor).astype(total.dtype), None

  total, _ = jax.lax.scan(body, jnp.zeros_like(factors[0]), (values, factors))
  return total


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
    influence: {path: [B, ..., m, G]}, influence before the window.
    own_only: Whether to leave out a unit's effect on itself through recurrent matrices,
      too.
  """
  moved = _advance_natively(units, window, params, hidden, influence, own_only)
  remaining = [
    layer for layer in units.layers if not moved.keys() >= layer.units.keys()
  ]
  if not remaining:
    return moved
  before = run_steps(window, params, hidden)
  given = given_steps(window, params, before, own_only)
  for layer in remaining:
    step = given.get(layer.arrays[0])
    if step is None:
      transition = _own_transitions(layer, window, params, before)
      step = OwnStep(_where_valid(window.mask, transition), ())
    moved |= _advance_layer(layer, window, params, before, influence, step)
  return moved


def _advance_natively(
  units: Units,
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  influence: Weights,
  own_only: bool,
) -> Weights:
  """Return the influence after a window of what native kernels advance."""
  if window.own_kernels is None or window.start is not None:
    return {}
  given = {
    path: influence[path]
    for layer in units.layers
    for path, unit in layer.units.items()
    if side_by_side(unit, layer.columns.shape[1])
  }
  inputs = (window.x, window.mask)
  credit = {} if window.credit is None else by_path(window.credit)
  credit = {path: credit[path] for path in given if path in credit}
  return window.own_kernels.advance(params, hidden, *inputs, given, credit, own_only)


def advance_by_steps(
  step: OwnStep, mask: jax.Array | None, influence: Weights
) -> Weights:
  """Return the influence after a window of parameters of one layer.

  Args:
    step: Derivatives of all steps, arrays [S, B, ...].
    mask: bool [S, B], or None.
    influence: {name: [B, ..., m, k n]}, units fastest, of parameters that the products
      name.
  """
  carried, after = _chain(_where_valid(mask, step.transition))
  direct: Weights = {}
  for product in step.products:
    direct |= _direct_of(product, _through(product, after, mask))
  size = carried[0][0].shape[-1]
  moved = {}
  for path, old in influence.items():
    unit = np.tile(np.arange(size), old.shape[-1] // size)
    unit = unit.reshape([1] * (old.ndim - 3) + [-1])
    moved[path] = _carry(carried, unit, old, direct[path])
  return moved


def own_norms(
  units: Units, window: WindowMap, params: Params, hidden: Hidden
) -> jax.Array:
  """Return the norm of what a window adds to each number of the state.

  Only what the parameters of a unit add to the unit itself counts.

  Args:
    units: Layers and units of the model.
    window: The window.
    params: Parameters of the model.
    hidden: [B, ...], hidden state after the window before.

  Returns:
    [B, N], at least float32.
  """
  batch_size, width = join(hidden).shape
  nothing = empty_own(units, params, batch_size)
  direct = advance_own(units, window, params, hidden, nothing)
  squares = jnp.zeros((batch_size, width), join(hidden).dtype)
  for layer in units.layers:
    for path, unit in layer.units.items():
      squared = jnp.moveaxis(jnp.abs(direct[path]) ** 2, inner_axis(unit.ndim), 1)
      # Entries without a unit have gained nothing, so that any unit will do.
      owner = np.broadcast_to(np.maximum(unit, 0), squared.shape[2:]).ravel()
      squared = squared.reshape(*squared.shape[:2], -1)
      squares = squares.at[:, layer.columns[:, owner]].add(squared)
  return jnp.sqrt(squares)


def given_steps(
  window: WindowMap, params: Params, before: Hidden, own_only: bool
) -> dict[int, OwnStep]:
  """Return the derivatives that layers compute themselves, of all steps of a window.

  They are keyed by the index of the layer's first array, as in :class:`Layer`, and
  their arrays are [S, B, ...], at least float32.
  """
  if window.own_steps is None:
    return {}
  steps, batch_size = jax.tree.leaves(before)[0].shape[:2]
  found = window.own_steps(params, _join_steps(before), _one_window(window.x), own_only)
  found = jax.tree.map(
    lambda leaf: widen(leaf).reshape(steps, batch_size, *leaf.shape[1:]), found
  )
  return {
    array: step._replace(transition=_where_valid(window.mask, step.transition))
    for array, step in found.items()
  }


def _advance_layer(
  layer: Layer,
  window: WindowMap,
  params: Params,
  before: Hidden,
  influence: Weights,
  step: OwnStep,
) -> Weights:
  """Return the influence of one layer's parameters after a window.

  Args:
    layer: The layer.
    window: The window.
    params: Parameters of the model.
    before: [S, B, ...], hidden states before each step.
    influence: {path: [B, ..., m, G]}, influence before the window.
    step: Derivatives of all steps, arrays [S, B, ...]. Parameters without a product
      are differentiated.
  """
  carried, after = _chain(step.transition)
  direct = _direct(layer, window, params, before, step, after)
  arrays = len(layer.arrays)
  if window.fresh is not None:
    width = join(jax.tree.map(lambda leaf: leaf[0], before)).shape[1]
    first = jnp.zeros((arrays, len(window.fresh), width), carried[0][0].dtype)
    # A row that starts anew gets its state from the learned initial state. The carried
    # derivatives are widened to all N numbers of the state, pulled back through that
    # start, and cut out again.
    rows = jnp.stack([jnp.stack(row, 1) for row in carried])
    first = first.at[:, :, layer.columns].set(rows)
    direct, first = pull_to_start(window, params, direct, first)
    rows = first[:, :, layer.columns]
    carried = tuple(tuple(rows[i, :, j] for j in range(arrays)) for i in range(arrays))

  def moved(path: str, unit: np.ndarray) -> jax.Array:
    old = influence[path]
    added = direct[path].astype(old.dtype)
    if (unit < 0).any():
      added = jnp.where(jnp.expand_dims(unit >= 0, inner_axis(unit.ndim) - 1), added, 0)
    return _carry(carried, unit, old, added)

  return {path: moved(path, unit) for path, unit in layer.units.items()}


def _carry(
  carried: Blocks, unit: np.ndarray, old: jax.Array, added: jax.Array
) -> jax.Array:
  """Return what of the influence [B, ..., m, G] is carried on, plus what is added."""
  for array in range(len(carried)):
    own = _at_units(jnp.stack([row[array] for row in carried], 1), unit)
    part = jax.lax.index_in_dim(old, array, inner_axis(unit.ndim))
    added += own.astype(old.dtype) * part
  return added


def _direct(
  layer: Layer,
  window: WindowMap,
  params: Params,
  before: Hidden,
  step: OwnStep,
  after: Blocks,
) -> Weights:
  """Return the influence that parameters gain within the window.

  Args:
    layer: The layer.
    window: The window.
    params: Parameters of the model.
    before: [S, B, ...], hidden states before each step.
    step: Derivatives of all steps.
    after: m times m arrays [S, B, n], derivatives of the arrays after the window with
      respect to those after each step.

  Returns:
    {path: [B, ..., m, G]}.
  """
  known = {path for product in step.products for path in product.operands}
  if not known.issuperset(layer.units):
    rows = jnp.stack([jnp.concatenate(row, -1) for row in after], 1)
    paths = tuple(layer.units)
    return pull_to_weights(window, params, paths, before, rows, layer.arrays)
  direct: Weights = {}
  for product in step.products:
    direct |= _direct_of(product, _through(product, after, window.mask))
  return direct


def _through(product: OwnProduct, after: Blocks, mask: jax.Array | None) -> Blocks:
  """Return derivatives of the arrays after the window with respect to each step's sums.

  They are m times k arrays [S, B, n], 0 at masked steps.
  """
  through = _multiply(after, product.gains)
  if mask is None:
    return through
  valid = mask[:, :, None]
  return tuple(tuple(jnp.where(valid, block, 0) for block in row) for row in through)


def _direct_of(product: OwnProduct, through: Blocks) -> Weights:
  """Return the influence of the parameters of one product, {path: [B, ..., m, G]}.

  Args:
    product: The product.
    through: m times k arrays [S, B, n], derivatives of the arrays after the window with
      respect to the k sums of each step.
  """
  if all(operand is None for operand in product.operands.values()):
    rows = [jnp.concatenate([block.sum(0) for block in row], -1) for row in through]
    return dict.fromkeys(product.operands, jnp.stack(rows, 1))
  # The k sums of all units side by side, [S, B, m, G].
  sums = jnp.stack([jnp.concatenate(row, -1) for row in through], 2)
  direct = {}
  for path, operand in product.operands.items():
    if operand is None:
      direct[path] = sums.sum(0)
    else:
      direct[path] = jnp.einsum('sbq,sbag->bqag', operand, sums)
  return direct


def _chain(transition: Blocks) -> tuple[Blocks, Blocks]:
  """Multiply transitions backward from a window's end.

  Args:
    transition: m times m arrays [S, B, n].

  Returns:
    Derivatives of each unit's arrays after the window with respect to those before it,
    m times m arrays [B, n], and to those after each step, [S, B, n].
  """

  def body(after: Blocks, step: Blocks) -> tuple[Blocks, Blocks]:
    return _multiply(after, step), after

  one = jnp.ones_like(transition[0][0][0])
  size = len(transition)
  start = tuple(
    tuple(one if i == j else jnp.zeros_like(one) for j in range(size))
    for i in range(size)
  )
  return jax.lax.scan(body, start, transition, reverse=True)


def _multiply(outer: Blocks, inner: tuple[tuple[jax.Array | None, ...], ...]) -> Blocks:
  """Multiply small matrices of arrays, unit by unit; None counts as 0."""
  # For the CPU a few products of whole arrays are several times faster than a
  # reduction over a short axis, or a product of a small matrix for each unit.
  rows = []
  for row in outer:
    sums = []
    for column in zip(*inner, strict=True):
      terms = [
        left * right
        for left, right in zip(row, column, strict=True)
        if right is not None
      ]
      sums.append(sum(terms[1:], terms[0]))
    rows.append(tuple(sums))
  return tuple(rows)


def _own_transitions(
  layer: Layer, window: WindowMap, params: Params, before: Hidden
) -> Blocks:
  """Differentiate each step; returns m times m arrays [S, B, n]."""
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
  blocks = blocks.reshape(steps, batch_size, arrays, arrays, size)
  return tuple(tuple(blocks[:, :, i, j] for j in range(arrays)) for i in range(arrays))


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


def _where_valid(mask: jax.Array | None, transition: Blocks) -> Blocks:
  """Put the identity in place of the transitions of masked steps."""
  if mask is None:
    return transition
  valid = mask[:, :, None]
  return tuple(
    tuple(jnp.where(valid, block, float(i == j)) for j, block in enumerate(row))
    for i, row in enumerate(transition)
  )


def side_by_side(units: np.ndarray, size: int) -> bool:
  """Return whether a parameter's last axis is one or several times all units."""
  tiled = np.tile(np.arange(size), units.size // size)
  return units.shape[-1:] == tiled.shape and np.array_equal(units.ravel(), tiled)


def _at_units(values: jax.Array, units: np.ndarray) -> jax.Array:
  """Return values [B, m, n] at a parameter's units [..., G], as [B, ..., m, G]."""
  size = values.shape[-1]
  axis = inner_axis(units.ndim)
  repeats = units.size // size
  if np.array_equal(units.ravel(), np.tile(np.arange(size), repeats)):
    # The usual case, gates of all units side by side, needs no slow gather.
    taken = jnp.tile(values, (1, 1, repeats)).reshape(*values.shape[:2], *units.shape)
  else:
    taken = jnp.take(values, np.maximum(units, 0), axis=-1)
  return jnp.moveaxis(taken, 1, axis)


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
