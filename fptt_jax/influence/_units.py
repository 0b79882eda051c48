"""Units of a recurrent network, found by running one step of it.

A unit is one position in all arrays of a layer's state, such as h and c of an LSTM. A
parameter belongs to a unit if it reaches no other one of its layer in one step. Units
are apart if the state of each depends on no other unit's state of the step before.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._concrete import concrete
from fptt_jax._types import Hidden, Params
from fptt_jax.influence._arrays import by_path, is_real, join, row_size, split
from fptt_jax.influence._base import WindowMap
from fptt_jax.influence._reach import (
  DRAWS,
  MAX_DRAWS,
  once_per_model,
  points_of,
  reached_paths,
)

ROWS = 1
"""Rows of the step that is run: contributions of several could cancel."""
NOT_REACHED, SEVERAL = -1, -2
"""In place of a unit's number: the layer is not reached, or several units are."""
BITS = 3
"""Bits of a unit's number that one pull-back tells."""
TOLERANCE = 1e-5
"""Relative difference of numbers that count as equal: about a hundred roundings."""


class Layer(NamedTuple):
  """Arrays of the hidden state whose units correspond, and the parameters of the units.

  Attributes:
    arrays: Numbers of its m arrays among the floating-point arrays of the state.
    columns: int [m, n], where they are in the rows that `join` makes.
    units: {path: int array}, the unit of each entry of a parameter, -1 for entries
      without one. Axes along which the unit does not change have the length 1.
    apart: Whether the units are apart from each other.
  """

  arrays: tuple[int, ...]
  columns: np.ndarray
  units: dict[str, np.ndarray]
  apart: bool


class Units(NamedTuple):
  """The layers of a model, lowest first.

  Attributes:
    layers: The layers that parameters belong to.
    whole: Whether there is one layer, its units are apart, and every parameter that
      reaches the state belongs to one unit.
  """

  layers: tuple[Layer, ...]
  whole: bool


@once_per_model
def find_units(window: WindowMap, params: Params, hidden: Hidden) -> Units:
  """Find layers and units of a model.

  Args:
    window: A window. Its shapes are used, and its functions.
    params: Parameters of the model; only shapes are used.
    hidden: Hidden state [B, ...]; only shapes are used.
  """
  hidden_shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((ROWS, *leaf.shape[1:]), leaf.dtype), hidden
  )
  x_shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((1, ROWS, *leaf.shape[2:]), leaf.dtype), window.x
  )
  columns = _columns_of_arrays(hidden)
  probe = _Probe(window, columns)
  points = points_of(window, params, hidden_shapes, x_shapes)
  units_of_params: dict[str, np.ndarray] = {}
  units_of_state = np.full((len(columns), row_size(hidden)), NOT_REACHED)
  for seed in range(MAX_DRAWS):
    if seed >= DRAWS and _all_seen(units_of_params):
      break
    of_params, of_state = probe.run(points.draw(seed))
    units_of_state = _agree(units_of_state, of_state)
    for path, found in of_params.items():
      before = units_of_params.get(path, np.full(found.shape, NOT_REACHED))
      units_of_params[path] = _agree(before, found)
  units = _arrange(columns, units_of_params, units_of_state)
  # What the state depends on without a unit, such as a number that is clipped at all
  # points.
  known = {path for layer in units.layers for path in layer.units}
  without = set(reached_paths(window, params, hidden)) - known
  return units._replace(whole=units.whole and not without)


def _all_seen(units_of_params: dict[str, np.ndarray]) -> bool:
  """Return whether each entry of all parameters with units has reached something."""
  return not any(
    (found >= 0).any() and (found == NOT_REACHED).all(0).any()
    for found in units_of_params.values()
  )


def _columns_of_arrays(hidden: Hidden) -> list[np.ndarray]:
  """Return the columns [n] of each floating-point array in the rows of `join`."""
  columns = []
  first = 0
  for leaf in jax.tree.leaves(hidden):
    if is_real(leaf):
      size = int(np.prod(leaf.shape[1:]))
      columns.append(np.arange(first, first + size))
      first += size
  return columns


class _Probe:
  """One step of a model, and which unit each of its inputs reaches."""

  def __init__(self, window: WindowMap, columns: list[np.ndarray]) -> None:
    """Compile the step.

    Args:
      window: The model's functions.
      columns: Columns of the arrays of the hidden state.
    """
    self.window = window
    self.columns = columns
    self._pull = concrete(self._pull_back)

  def run(
    self, point: tuple[Params, Hidden, Any]
  ) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the unit of each array that each input reaches.

    Args:
      point: Parameters, hidden state before the step, and inputs of the step.

    Returns:
      Of each entry of the parameters, {path: int [A, ...]}, and of the hidden state,
      int [A, N], for the A arrays of the state after the step.
    """
    # A unit's index is written in base 2**BITS. For each digit, cotangents 2**digit are
    # pulled back besides cotangents of 1. If an entry reaches a single unit, the ratio
    # of its two derivatives is 2**digit, and log2 gives the digit.
    width = sum(len(columns) for columns in self.columns)
    most = max(len(columns) for columns in self.columns)
    digits = -(-most.bit_length() // BITS)
    cotangents = np.zeros((len(self.columns), 1 + digits, ROWS, width))
    for array, columns in enumerate(self.columns):
      cotangents[array, 0][:, columns] = 1.0
      for digit in range(digits):
        # Powers of two scale a derivative without any rounding.
        numbers = np.arange(len(columns)) >> BITS * digit
        powers = 2.0 ** (numbers % 2**BITS)
        cotangents[array, 1 + digit][:, columns] = powers
    of_params, of_state = self._pull(*point, cotangents)
    units = {path: self._units(np.asarray(leaf)) for path, leaf in of_params.items()}
    return units, self._units(np.asarray(of_state))

  def _pull_back(
    self, params: Params, hidden: Hidden, x: Any, cotangents: jax.Array
  ) -> Any:
    def step(params: Params, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
      new_hidden = join(self.window.run(params, split(rows, hidden), x, None))
      start = new_hidden
      if self.window.start is not None:
        start = join(self.window.start(params))[:ROWS]
      return new_hidden, start

    (out, start), pull = jax.vjp(step, params, join(hidden))
    cotangents = jnp.asarray(cotangents, out.dtype)

    def both(cotangent: jax.Array) -> Any:
      nothing = jnp.zeros_like(start)
      if self.window.start is None:
        return pull((cotangent, nothing))
      # The learned start adds its own parameters, which no step reads.
      return pull((cotangent, cotangent))

    of_params, of_state = jax.vmap(jax.vmap(both))(cotangents)
    return by_path(of_params), of_state[:, :, 0]

  def _units(self, gradients: np.ndarray) -> np.ndarray:
    """Return the unit [A, ...] that gradients [A, 1 + digits, ...] belong to."""
    found = np.full((len(gradients), *gradients.shape[2:]), NOT_REACHED)
    for array, columns in enumerate(self.columns):
      total, *powers = gradients[array]
      unit = np.zeros(total.shape, int)
      single = np.ones(total.shape, bool)
      for digit, power in enumerate(powers):
        with np.errstate(divide='ignore', invalid='ignore'):
          exponent = np.log2(np.real(power / total))
          nearest = np.nan_to_num(np.rint(exponent), posinf=0, neginf=0).astype(int)
          # The sum of several units is not a power of two.
          single &= np.abs(exponent - nearest) < TOLERANCE
        unit += nearest << BITS * digit
      single &= (unit >= 0) & (unit < len(columns))
      reached = (gradients[array] != 0).any(0)
      # A subnormal number has lost digits, and one that is not finite all of them;
      # another draw may tell.
      size = np.abs(total)
      reached &= ~((size > 0) & (size < float(jnp.finfo(gradients.dtype).tiny)))
      reached &= np.isfinite(gradients[array]).all(0)
      found[array] = np.where(reached, np.where(single, unit, SEVERAL), NOT_REACHED)
    return found


def _agree(before: np.ndarray, found: np.ndarray) -> np.ndarray:
  """Join what two draws have found."""
  joined = np.where(before == found, found, SEVERAL)
  joined = np.where(before == NOT_REACHED, found, joined)
  return np.where(found == NOT_REACHED, before, joined)


def _arrange(
  columns: list[np.ndarray], of_params: dict[str, np.ndarray], of_state: np.ndarray
) -> Units:
  """Return the layers, and which parameters belong to each of them."""
  groups = _group_arrays(columns, of_state)
  layers: list[Layer] = []
  remaining = {
    path: found for path, found in of_params.items() if (found != NOT_REACHED).any()
  }
  whole = len(groups) == 1
  for group in groups:
    units = {}
    for path, found in list(remaining.items()):
      joined = np.full(found.shape[1:], NOT_REACHED)
      for number in group:
        joined = _agree(joined, found[number])
      if (joined == NOT_REACHED).all():
        continue  # It belongs to a higher layer.
      del remaining[path]
      joined = _fill(joined)
      whole &= bool((joined >= 0).all())
      if (joined >= 0).any():
        units[path] = _shrink(np.maximum(joined, NOT_REACHED))
    own = np.concatenate([np.arange(len(columns[number])) for number in group])
    inside = np.concatenate([columns[number] for number in group])
    found = of_state[group][:, inside]
    apart = bool(((found == own) | (found == NOT_REACHED)).all())
    layers.append(
      Layer(tuple(group), np.stack([columns[i] for i in group]), units, apart)
    )
  whole = whole and layers[0].apart
  return Units(tuple(layer for layer in layers if layer.units), whole)


def _group_arrays(columns: list[np.ndarray], of_state: np.ndarray) -> list[list[int]]:
  """Return the arrays of each layer, lowest first.

  Arrays are of one layer if each depends on the other, directly or through others.
  """
  number = len(columns)
  depends = np.eye(number, dtype=bool)
  for after in range(number):
    for before in range(number):
      depends[after, before] |= bool((of_state[after, columns[before]] != -1).any())
  # Each squaring adds dependencies through twice as many arrays.
  for _ in range(number):
    depends = (depends.astype(int) @ depends.astype(int)) > 0
  groups: list[list[int]] = []
  for array in range(number):
    for group in groups:
      mutual = depends[array, group[0]] and depends[group[0], array]
      if mutual and len(columns[array]) == len(columns[group[0]]):
        group.append(array)
        break
    else:
      groups.append([array])
  # A layer depends on all that are below it.
  return sorted(groups, key=lambda group: int(depends[group[0]].sum()))


def _fill(units: np.ndarray) -> np.ndarray:
  """Give entries that no point has reached the unit of the entries beside them.

  This is done along each axis along which the known units do not change. Such an axis
  is that of the tokens of a table, of which only a few are drawn.

  Args:
    units: int array, the unit of each entry of a parameter.

  Returns:
    The units, with `NOT_REACHED` where no such axis tells them.
  """
  for axis in range(units.ndim):
    is_known = units != NOT_REACHED
    highest = np.where(is_known, units, SEVERAL).max(axis, keepdims=True)
    lowest = np.where(is_known, units, np.iinfo(int).max).min(axis, keepdims=True)
    lines = is_known.any(axis, keepdims=True)
    if (~lines | (highest == lowest)).all():
      units = np.where(is_known | ~lines, units, highest)
  return units


def _shrink(units: np.ndarray) -> np.ndarray:
  """Shorten each axis along which nothing changes to the length 1."""
  for axis in range(units.ndim):
    first = np.take(units, [0], axis)
    if (units == first).all():
      units = first
  return units
