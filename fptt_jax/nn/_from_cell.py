"""Per-step cells of flax as layers that run windows."""

import functools
from typing import Any

from flax import nnx
import jax

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
    if not isinstance(cell, nnx.Module) or not hasattr(cell, 'initialize_carry'):
      raise TypeError(
        f'cell must be an nnx.Module with initialize_carry, got {type(cell).__name__}.'
      )
    # A scan over steps would draw the same noise at each of them.
    if jax.tree.leaves(nnx.state(cell, nnx.RngState)):
      raise TypeError(
        f'cell must not own random streams, got {type(cell).__name__}: put noise '
        'between layers.'
      )
    self.cell = cell
    features = getattr(cell, 'in_features', None)
    self.in_features = features if isinstance(features, int) else None
    if self.in_features is None:
      _check_carry_without_features(cell)

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
    check_window(self, state, x, mask)
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
    'expected a recurrent module with initial_state or a per-step cell with '
    f'initialize_carry, got {type(module).__name__}; put it into nn.Sequential.'
  )


def unwrap_rnn(layer: Any) -> Any:
  """Return the cell of an `nnx.RNN`, and any other layer unchanged.

  The loop of `nnx.RNN` would reset the carry in each window.

  Raises:
    TypeError: the loop runs backward in time or has separate state for each step.
  """
  is_rnn = isinstance(layer, nnx.RNN)
  if isinstance(layer, nnx.Bidirectional) or (is_rnn and layer.reverse):
    raise TypeError(
      f'{type(layer).__name__} (Bidirectional or reverse=True) reads later steps, '
      'which are not in the window: use a forward cell alone.'
    )
  if not is_rnn:
    return layer
  # An integer axis means one set of variables per time step.
  if any(isinstance(axis, int) for axis in layer.state_axes.values()):
    raise TypeError(
      f'nnx.RNN(state_axes={layer.state_axes}) has separate state for each step, which '
      'windows do not have.'
    )
  return layer.cell


def _check_carry_without_features(cell: Any) -> None:
  """Raise a TypeError if a cell's carry depends on the unknown number of features."""
  name = type(cell).__name__
  shapes = []
  # Two sizes suffice: a carry that depends on D differs between them.
  for features in (1, 2):
    initialize = functools.partial(cell.initialize_carry, (2, features))
    try:
      carry = jax.eval_shape(lambda initialize=initialize: initialize(nnx.Rngs(0)))
    except Exception as error:
      raise TypeError(
        f'initialize_carry of {name} failed for the input shape (2, {features}): '
        f'{error} Give the cell an attribute in_features, the D of its inputs [B, D].'
      ) from error
    shapes.append(carry)
  if shapes[0] != shapes[1]:
    raise TypeError(
      'a per-step cell whose carry depends on D, the features of its inputs [B, D], '
      f'must have an attribute in_features, got {name} without it.'
    )
