"""Layers in sequence."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import require
from fptt_jax._types import OutputsWithPenalty, OwnStep
from fptt_jax._windows import take_steps
from fptt_jax.nn._from_cell import FromCell, is_cell, is_recurrent, unwrap_rnn
from fptt_jax.nn._initial_state import LearnedInitialState
from fptt_jax.nn._overrides import nearest
from fptt_jax.nn._recurrent import Recurrent


class Sequential(nnx.Module):
  """Layers in sequence, recurrent or not.

  Recurrent layers run windows: (state, x, mask, key) -> (state, y). Per-step cells of
  flax are wrapped in :class:`FromCell`; of an `nnx.RNN` the cell is used, and its carry
  becomes part of the state. Every other layer acts on each step alone: `nnx.Embed`,
  `nnx.Linear`, `nnx.Dropout`, an activation function. The first layer may take a tree
  of inputs, such as tokens and features, and return one array.

  The state is a tuple of the recurrent layers' states. Dropout layers draw a new mask
  for each step and unit, and are off in evaluation (key None). Penalties that layers
  return with their outputs (:class:`fptt_jax.OutputsWithPenalty`) are summed. The
  layers at the end that act on each step alone are the readout, which a trainer can
  run in chunks of steps (`readout_chunk`).

  Args:
    *layers: at least one module or function.

  Raises:
    ValueError: there are no layers.
    TypeError: a layer is not callable, or is a class.

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> language_model = nn.from_nnx(lambda rngs: nn.Sequential(
    ...   nnx.Embed(10_000, 256, rngs=rngs), nnx.Dropout(0.2),
    ...   nn.LSTM(256, 256, rngs=rngs), nnx.Dropout(0.2),
    ...   nnx.Linear(256, 10_000, rngs=rngs)))
  """

  def __init__(self, *layers: Any):
    require(layers, 'layers', 'one layer or more', layers)
    for layer in layers:
      is_layer = callable(layer) and not isinstance(layer, type)
      require(is_layer, 'layers', 'modules or functions', layer, error=TypeError)
    layers = tuple(unwrap_rnn(layer) for layer in layers)
    self.layers = nnx.List(
      [FromCell(layer) if is_cell(layer) else layer for layer in layers]
    )

  def initial_state(self, batch_size: int) -> tuple[Any, ...]:
    """Return the recurrent layers' initial states."""
    return tuple(
      layer.initial_state(batch_size) for layer in self.layers if is_recurrent(layer)
    )

  def __call__(
    self,
    state: tuple[Any, ...],
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
    last: jax.Array | int | None = None,
  ) -> tuple[tuple[Any, ...], jax.Array | OutputsWithPenalty]:
    """Run a window through all layers.

    Args:
      state: as `initial_state` makes it.
      x: inputs [S, B, ...].
      mask: bool [S, B], or None if all steps are valid.
      key: the window's random key, None in evaluation.
      last: index of each sequence's last valid step, an int or int [B]. If given, the
        layers after the last recurrent one run at that step only.

    Returns:
      (state after the window, outputs [S, B, ...], or [1, B, ...] with `last`).
    """
    first_after = 1 + max(
      (index for index, layer in enumerate(self.layers) if is_recurrent(layer)),
      default=-1,
    )
    new_state, x, penalties = self._run(0, first_after, state, x, mask, key)
    if last is not None:
      x = self._at_last_step(self.layers[first_after - 1], new_state, x, last)
    _, x, _ = self._run(first_after, len(self.layers), (), x, mask, key)
    return new_state, _with_penalty(x, penalties)

  @property
  def readout_start(self) -> int:
    """Index of the readout's first layer, the number of layers if there is none."""
    start = len(self.layers)
    # From the end, up to the last layer that needs the order or number of steps.
    while start > 0 and _acts_on_steps(self.layers[start - 1]):
      start -= 1
    return start

  def features(
    self,
    state: tuple[Any, ...],
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[Any, ...], jax.Array | OutputsWithPenalty]:
    """Run a window through the layers before the readout."""
    new_state, x, penalties = self._run(0, self.readout_start, state, x, mask, key)
    # The readout's layers have empty states.
    return (*new_state, *state[len(new_state) :]), _with_penalty(x, penalties)

  def readout(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Run the readout on any steps of a window.

    Args:
      x: features [s, B, ...] of s steps.
      key: the window's random key, None in evaluation.

    Returns:
      Outputs [s, B, ...].
    """
    layer: Any
    for index in range(self.readout_start, len(self.layers)):
      layer = self.layers[index]
      if is_recurrent(layer):
        state = layer.initial_state(x.shape[1])
        _, x = layer(state, x, None, _layer_key(key, index))
      elif isinstance(layer, nnx.Linear):
        # As rows [s B, D]: for x [s, B, D], XLA copies and transposes the outputs'
        # gradient to compute the weights' gradient.
        rows = layer(x.reshape(-1, x.shape[-1]))
        x = rows.reshape(*x.shape[:-1], layer.out_features)
      else:
        x = layer(x)
    return x

  def _run(
    self,
    start: int,
    end: int,
    state: tuple[Any, ...],
    x: jax.Array,
    mask: jax.Array | None,
    key: jax.Array | None,
  ) -> tuple[tuple[Any, ...], jax.Array, list[jax.Array]]:
    """Run the layers start..end - 1.

    Returns:
      (their new states, outputs, penalties).
    """
    states = iter(state)
    new_states = []
    penalties: list[jax.Array] = []
    layer: Any
    for index in range(start, end):
      layer = self.layers[index]
      layer_key = _layer_key(key, index)
      if is_recurrent(layer):
        new_state, x = layer(next(states), x, mask, layer_key)
        new_states.append(new_state)
        if isinstance(x, OutputsWithPenalty):
          penalties.append(x.penalty)
          x = x.outputs
      elif isinstance(layer, nnx.Dropout):
        x = layer(x, deterministic=layer_key is None, rngs=layer_key)
      else:
        x = layer(x)
    return tuple(new_states), x, penalties

  def _at_last_step(
    self, layer: Any, state: tuple[Any, ...], x: jax.Array, last: jax.Array | int
  ) -> jax.Array:
    """Return the outputs [1, B, ...] of the last recurrent layer at steps `last`."""
    output = None
    if isinstance(layer, Recurrent | LearnedInitialState):
      # Read from the state, the outputs of the other steps need not be stored.
      output = layer._last_output(state[-1])
    return take_steps(x, last) if output is None else output[None]


def own_steps(module: Any, state: Any, x: Any, own_only: bool) -> dict[int, OwnStep]:
  """Collect `own_step` of the layers that define it.

  Args:
    module: a layer that runs windows, in evaluation mode.
    state: its state before the step, arrays [R, ...].
    x: inputs [1, R, ...] of the step.
    own_only: as in `Recurrent.own_step`.

  Returns:
    {index of the layer's first array among the floating-point arrays of the state:
    its step}, with the paths of the parameters in place of their names.
  """
  is_stack = isinstance(module, Sequential)
  states = iter(state if is_stack else (state,))
  found: dict[int, OwnStep] = {}
  first = 0
  for index, layer in enumerate(module.layers if is_stack else (module,)):
    if not is_recurrent(layer):
      x = layer(x)
      continue
    layer_state = next(states)
    if _derives_its_steps(layer):
      step = layer.own_step(layer_state, x[0], own_only)
      if step is not None:
        found[first] = _with_prefix(step, f'layers/{index}/' if is_stack else '')
    arrays = jax.tree.leaves(layer_state)
    first += sum(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in arrays)
    _, x = layer(layer_state, x, None, None)
    x = x.outputs if isinstance(x, OutputsWithPenalty) else x
  return found


def _derives_its_steps(layer: Any) -> bool:
  """Return whether `own_step` has the derivatives of the layer's own step.

  A subclass that overrides the step, and not the derivatives, has its parent's.
  """
  own = nearest(layer, 'own_step')
  steps = ('__call__', 'step', '_fused_cell')
  return hasattr(layer, 'own_step') and all(
    own <= nearest(layer, name) for name in steps
  )


def _has_own_kernel(layer: Any) -> bool:
  """Return whether `advance_own` computes with the derivatives of `own_step`."""
  kernel = min(nearest(layer, 'advance_own'), nearest(layer, '_native_cell'))
  is_own = hasattr(layer, 'advance_own') and kernel <= nearest(layer, 'own_step')
  return is_own and _derives_its_steps(layer)


def advance_own(
  module: Any,
  state: Any,
  x: Any,
  mask: jax.Array | None,
  influence: dict[str, jax.Array],
  credit: dict[str, jax.Array],
  own_only: bool,
) -> dict[str, jax.Array]:
  """Advance the influence of the layers that have a native kernel for it.

  Args:
    module: a layer that runs windows, in evaluation mode.
    state: its state before the window, arrays [B, ...].
    x: inputs [S, B, ...].
    mask: bool [S, B], or None.
    influence: {path: [B, ..., m, k n]}, influence of parameters before the window.
    credit: {path: [..., k n]}, arrays that were computed from it.
    own_only: as in `Recurrent.own_step`.

  Returns:
    {path: influence after the window}.
  """
  is_stack = isinstance(module, Sequential)
  states = iter(state if is_stack else (state,))
  found: dict[str, jax.Array] = {}
  for index, layer in enumerate(module.layers if is_stack else (module,)):
    if not is_recurrent(layer):
      x = layer(x)
      continue
    layer_state = next(states)
    if _has_own_kernel(layer):
      prefix = f'layers/{index}/' if is_stack else ''
      given = (_of_layer(leaves, prefix) for leaves in (influence, credit))
      moved = layer.advance_own(layer_state, x, mask, *given, own_only)
      found |= {prefix + name: leaf for name, leaf in moved.items()}
    _, x = layer(layer_state, x, mask, None)
    x = x.outputs if isinstance(x, OutputsWithPenalty) else x
  return found


def _of_layer(leaves: dict[str, jax.Array], prefix: str) -> dict[str, jax.Array]:
  """Return the leaves whose paths have a prefix, without it."""
  return {
    path.removeprefix(prefix): leaf
    for path, leaf in leaves.items()
    if path.startswith(prefix)
  }


def _with_prefix(step: OwnStep, prefix: str) -> OwnStep:
  """Put a prefix before the names of a step's parameters."""
  products = []
  for product in step.products:
    operands = {prefix + name: operand for name, operand in product.operands.items()}
    products.append(product._replace(operands=operands))
  return step._replace(products=tuple(products))


def _acts_on_steps(layer: Any) -> bool:
  """Return whether a layer may run on some steps of a window at a time."""
  if is_recurrent(layer):
    return bool(getattr(layer, 'in_readout', False))
  if isinstance(layer, nnx.Dropout):
    return False
  is_module = isinstance(layer, nnx.Module)
  return not (is_module and jax.tree.leaves(nnx.state(layer, nnx.RngState)))


def _layer_key(key: jax.Array | None, index: int) -> jax.Array | None:
  return None if key is None else jax.random.fold_in(key, index)


def _with_penalty(
  x: jax.Array, penalties: list[jax.Array]
) -> jax.Array | OutputsWithPenalty:
  if not penalties:
    return x
  return OutputsWithPenalty(x, sum(penalties[1:], penalties[0]))
