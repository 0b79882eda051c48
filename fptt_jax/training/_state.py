"""The first state of a trainer, and states that come from elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp

from fptt_jax._checks import check_arrays, require
from fptt_jax._probe import check_state_rows
from fptt_jax._trees import arrange_like, check_like, leaf_paths
from fptt_jax._types import Model, Params, TrainState
from fptt_jax.training._window import check_hidden


def check_influence(influence: Any, batch_size: int) -> None:
  """Raise a ValueError if a mesh cannot split an influence with the rows."""
  for leaf in jax.tree.leaves(influence):
    accepted = f'arrays [B, ...] with B={batch_size} rows on a mesh'
    hint = "Use uoro(rows='each'); 'synthetic' has no such arrays."
    require(len(leaf) == batch_size, 'influence', accepted, leaf.shape, hint)


def check_initial_state(model: Model, params: Params, batch_size: int) -> None:
  """Raise unless the initial states of a model are [B, ...] and agree."""
  check_state_rows('model.initial_state', model.initial_state, (batch_size,))
  if model.learned_initial_state is None:
    return
  learned = jax.eval_shape(lambda p: model.start(p, batch_size), params)
  constant = jax.eval_shape(lambda: model.initial_state(batch_size))
  check_hidden(learned, constant, 'the state that model.learned_initial_state returns')


def arrange_state(state: TrainState, expected: TrainState) -> TrainState:
  """Return a state in the structure in which `init` makes it.

  Args:
    state: The given state, perhaps of other containers.
    expected: Shapes of the state that `init` makes for the batch.

  Raises:
    ValueError: Leaves are missing, or have another shape or kind of numbers.
  """
  whose = 'as init makes it for this batch'
  for name in ('params', 'opt_state', 'loss_state', 'step_count', 'influence'):
    given, like = getattr(state, name), getattr(expected, name)
    leaves = check_like(f'state.{name}', given, like, whose)
    state = state._replace(**{name: leaves})
  # Shapes of the hidden state are checked where it is read: with carry_hidden.
  if sorted(leaf_paths(state.hidden)) == sorted(leaf_paths(expected.hidden)):
    hidden = arrange_like('state.hidden', state.hidden, expected.hidden, whose)
    state = state._replace(hidden=hidden)
  return state


def strong_copy(tree: Any) -> Any:
  """Return copies that are strongly typed.

  A state may be donated, and its types must not change from step to step.
  """
  check_arrays('parameters and states of model and loss', tree)
  return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), tree)
