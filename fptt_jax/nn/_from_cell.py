"""Per-step cells of flax as layers that run windows."""

import functools
from typing import Any

from flax import nnx
import jax

from fptt_jax._checks import describe, require
from fptt_jax.nn._checks import check_batch_size, check_inputs, check_window
from fptt_jax.nn._recurrent import scan_cell


class FromCell(nnx.Module):
  """Run a per-step cell of flax's protocol over windows.

  Args:
    cell: an `nnx.Module`, (carry, x_t [B, D]) -> (carry, y_t), with
      `initialize_carry(input_shape, rngs)`: one of flax's cells, or a module with
      several of them and a readout inside. `initialize_carry` gets the shape (B, D),
      where D is the cell's `in_features`. A cell without `in_features` gets (B, 1), so
      its carry must not depend on D.

  Raises:
    TypeError: `cell` does not follow the protocol, its carry depends on D and it has no
      `in_features`, or it owns random streams.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> layer = nn.FromCell(nnx.GRUCell(3, 16, rngs=nnx.Rngs(0)))
    >>> state, y = layer(layer.initial_state(4), jnp.ones((28, 4, 3)))
    >>> y.shape
    (28, 4, 16)
  """

  def __init__(self, cell: Any):
    is_cell = isinstance(cell, nnx.Module) and hasattr(cell, 'initialize_carry')
    accepted = 'an nnx.Module with initialize_carry'
    name = describe(cell)
    require(is_cell, 'cell', accepted, name, error=TypeError)
    # A scan over steps would draw the same noise at each of them.
    has_streams = bool(jax.tree.leaves(nnx.state(cell, nnx.RngState)))
    hint = 'Put noise between layers.'
    require(not has_streams, 'cell', 'without random streams', name, hint, TypeError)
    self.cell = cell
    features = getattr(cell, 'in_features', None)
    self.in_features = features if isinstance(features, int) else None
    needed = self.in_features is None and _carry_needs_features(cell)
    accepted = 'the D of the inputs [B, D], since the carry depends on it'
    require(not needed, f'in_features of {name}', accepted, features, error=TypeError)

  def initial_state(self, batch_size: int) -> Any:
    """Return the cell's initial carry."""
    features = 1 if self.in_features is None else self.in_features
    # Flax's cells draw their carry from rngs only if an initializer is random.
    shape = (check_batch_size(batch_size), features)
    return self.cell.initialize_carry(shape, nnx.Rngs(0))

  def __call__(
    self,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[Any, jax.Array]:
    """Run a window step by step; `key` is not used."""
    if self.in_features is not None:
      x = check_inputs(self, x, self.in_features)
    state = check_window(self, state, x, mask)
    return scan_cell(self.cell, state, x, mask)


def is_recurrent(layer: Any) -> bool:
  """Return whether a layer runs windows: (state, x, mask, key) -> (state, y).

  Such layers have `initial_state(batch_size)`. A state may be empty.
  """
  return hasattr(layer, 'initial_state')


def is_cell(layer: Any) -> bool:
  """Return whether a layer is a per-step cell of flax's protocol."""
  return hasattr(layer, 'initialize_carry') and not is_recurrent(layer)


def as_recurrent(module: nnx.Module) -> Any:
  """Return a layer that runs windows.

  Args:
    module: a layer that runs windows, a per-step cell, or an `nnx.RNN` of one.

  Raises:
    TypeError: the module is none of these.
  """
  module = unwrap_rnn(module)
  if isinstance(module, nnx.Module) and is_recurrent(module):
    return module
  if isinstance(module, nnx.Module) and is_cell(module):
    return FromCell(module)
  raise TypeError(
    'module must be a recurrent layer with initial_state or a per-step cell with '
    f'initialize_carry, got {type(module).__name__}. Put it into nn.Sequential.'
  )


def unwrap_rnn(layer: Any) -> Any:
  """Return the cell of an `nnx.RNN`, and any other layer unchanged.

  The loop of `nnx.RNN` would reset the carry in each window.

  Raises:
    TypeError: the loop runs backward in time or has separate state for each step.
  """
  is_rnn = isinstance(layer, nnx.RNN)
  backward = isinstance(layer, nnx.Bidirectional) or (is_rnn and layer.reverse)
  name = describe(layer)
  # Later steps are not in the window.
  accepted = 'a forward cell, not Bidirectional or with reverse=True'
  require(not backward, 'layer', accepted, name, error=TypeError)
  if not is_rnn:
    return layer
  # An integer axis means one set of variables per time step, which windows lack.
  axes = layer.state_axes
  shared = not any(isinstance(axis, int) for axis in axes.values())
  require(shared, 'state_axes of nnx.RNN', 'the same at all steps', axes, '', TypeError)
  return layer.cell


def _carry_needs_features(cell: Any) -> bool:
  """Return whether the shape of a cell's carry depends on its number of features."""
  shapes = []
  # Two sizes suffice: a carry that depends on D differs between them.
  for features in (1, 2):
    initialize = functools.partial(cell.initialize_carry, (2, features))
    try:
      carry = jax.eval_shape(lambda initialize=initialize: initialize(nnx.Rngs(0)))
    except Exception as error:
      raise TypeError(
        f'initialize_carry of {type(cell).__name__} failed for the input shape '
        f'(2, {features}): {error} Give the cell an attribute in_features.'
      ) from error
    shapes.append(carry)
  return bool(shapes[0] != shapes[1])
