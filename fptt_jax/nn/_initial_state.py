"""Trained initial states."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import require_type
from fptt_jax._types import OutputsWithPenalty
from fptt_jax.nn._from_cell import as_recurrent
from fptt_jax.nn._recurrent import Recurrent


class LearnedInitialState(nnx.Module):
  """Train the initial state of a recurrent layer with its parameters.

  One initial state is learned for all sequences. Each floating-point array [B, ...] of
  the layer's state gets a parameter [...]. It starts at the layer's own initial state,
  mostly zeros. Integers in the state, such as counters, are not trained.

  The gradient reaches it from the windows in which sequences start: the first window;
  all windows of 'ftrl' and 'bptt_aux'; with `carry_hidden` the first window after
  `init` and `end_epoch`; with 'tbptt_final' only if all steps are differentiated.

  Args:
    layer: a layer that runs windows, or a per-step cell of flax.

  Raises:
    TypeError: `layer` is neither, or has no floating-point state.

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> def build(rngs):
    ...   lstm = nn.LearnedInitialState(nn.LSTM(1, 16, rngs=rngs))
    ...   return nn.Sequential(lstm, nnx.Linear(16, 3, rngs=rngs))
    >>> model = nn.from_nnx(build)
  """

  def __init__(self, layer: Any):
    self.layer = as_recurrent(layer)
    # One row: all sequences share the learned state.
    leaves = jax.tree.leaves(self.layer.initial_state(1))
    self.initial = nnx.List(
      [nnx.Param(jnp.asarray(leaf)[0]) for leaf in leaves if _is_float(leaf)]
    )
    accepted = 'one with a floating-point state'
    require_type(self.initial, 'layer', accepted, self.layer)

  def initial_state(self, batch_size: int) -> Any:
    """Return the learned state before the first step, the same for each row."""
    leaves, structure = jax.tree.flatten(self.layer.initial_state(batch_size))
    # Parameters are in the order of the state's floating-point leaves.
    learned = iter(self.initial)
    rows = [
      jnp.broadcast_to(next(learned)[...], leaf.shape) if _is_float(leaf) else leaf
      for leaf in leaves
    ]
    return jax.tree.unflatten(structure, rows)

  def __call__(
    self,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[Any, jax.Array | OutputsWithPenalty]:
    """Run a window as the layer does."""
    result: tuple[Any, jax.Array | OutputsWithPenalty] = self.layer(state, x, mask, key)
    return result

  def _last_output(self, state: Any) -> jax.Array | None:
    """Return what the layer returns; see `Recurrent._last_output`."""
    if isinstance(self.layer, Recurrent):
      return self.layer._last_output(state)
    return None


def _is_float(leaf: Any) -> bool:
  return bool(jnp.issubdtype(leaf.dtype, jnp.floating))
