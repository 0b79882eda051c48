"""Credit that an influence carries across the borders of windows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fptt_jax._batch import Batch, check_shapes
from fptt_jax._types import (
  Hidden,
  Params,
  UpdateInputs,
  UpdateResult,
)
from fptt_jax._windows import (
  WindowPlan,
  window_at,
)
from fptt_jax.influence import WindowMap, attach
from fptt_jax.training._spec import StepSpec
from fptt_jax.training._start import start_rows
from fptt_jax.training._window import Sequence


def gradient_with_credit(
  spec: StepSpec,
  sequence: Sequence,
  inputs: UpdateInputs,
  objective: Callable[[Params, Hidden], tuple[jax.Array, UpdateResult]],
  params: Params,
) -> tuple[jax.Array, Params, UpdateResult]:
  """Differentiate the objective of a window, with the credit from beyond it.

  Args:
    spec: Options of the trainer, with an influence.
    sequence: The batch, cut into windows.
    inputs: What else the objective depends on.
    objective: (params, hidden) -> (value, result).
    params: Parameters of the model.

  Returns:
    The objective [], its gradient, and the other results of its windows.
  """
  influence = spec.influence
  assert influence is not None
  window = _window_map(spec, sequence, inputs)

  def attached(
    params: Params, before: Params, hidden: Hidden
  ) -> tuple[jax.Array, UpdateResult]:
    # The same parameters twice tell the two parts of the gradient apart.
    hidden = attach(influence, window, before, hidden, inputs.influence)
    return objective(params, hidden)

  learns = influence.observe is not None
  differentiate = jax.value_and_grad(
    attached, argnums=(0, 1, 2) if learns else (0, 1), has_aux=True, allow_int=learns
  )
  (value, result), parts = differentiate(params, params, inputs.hidden)
  within, credit = jax.tree.map(jnp.conj, parts[:2])
  grads = jax.tree.map(jnp.add, within, credit)
  d_hidden = parts[2] if learns else ()
  return value, grads, result._replace(credit=credit, d_hidden=d_hidden)


def advance_influence(
  spec: StepSpec,
  windows: WindowPlan,
  params: Params,
  inputs: UpdateInputs,
  result: UpdateResult,
) -> Any:
  """Return the influence after the window of an update.

  Args:
    spec: Options of the trainer, with an influence.
    windows: Where the windows lie.
    params: Parameters with which the window was last run.
    inputs: What else its objective depends on.
    result: Results of the window.
  """
  influence = spec.influence
  assert influence is not None
  sequence = Sequence.cut(inputs.batch, windows, inputs.key, spec.axis)
  window = _window_map(spec, sequence, inputs)._replace(credit=result.credit)
  key = None
  if influence.draws:
    # The keys 0..K are those of the windows and of the steps before the first.
    numbers, _, _ = inputs.schedule
    key = jax.random.fold_in(inputs.key, windows.num_windows + 1 + numbers[0])
  state = inputs.influence
  if influence.observe is not None:
    state = influence.observe(window, params, inputs.hidden, state, result.d_hidden)
  return influence.advance(window, params, inputs.hidden, state, key)


def reset_influence(spec: StepSpec, influence: Any) -> Any:
  """Return the influence of rows whose hidden states start anew."""
  return () if spec.influence is None else spec.influence.reset(influence)


def first_influence(
  spec: StepSpec, params: Params, hidden: Hidden, batch: Batch
) -> Any:
  """Return the state of the influence before the first step; () without one."""
  if spec.influence is None:
    return ()
  num_steps, batch_size = check_shapes(batch)
  windows = spec.plan_windows(num_steps)
  fresh = None
  if spec.model.learned_initial_state is not None:
    fresh = jnp.ones(batch_size, bool)

  def first_window(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.ShapeDtypeStruct):
      # Of an abstract batch there are only shapes, which is all that is used.
      return jnp.zeros((windows.size, *leaf.shape[1:]), leaf.dtype)
    return jnp.asarray(leaf)[: windows.size]

  x = jax.tree.map(first_window, batch.inputs)
  # No axis of a mesh is bound here.
  window = _bare_map(spec, x, None, fresh, None)
  return spec.influence.init(window, params, hidden)


def _window_map(spec: StepSpec, sequence: Sequence, inputs: UpdateInputs) -> WindowMap:
  """Return the map of the one window that an update runs through."""
  numbers, _, _ = inputs.schedule
  view = window_at(sequence.windows, numbers[0], sequence.valid, sequence.axis)
  x = jax.tree.map(lambda leaf: view.slice(jnp.asarray(leaf)), sequence.batch.inputs)
  mask = view.mask if view.masked else None
  window = _bare_map(spec, x, mask, inputs.fresh, spec.axis)
  if spec.carry_hidden:
    return window
  starts = view.seen == view.mask.sum(0)
  return window._replace(ends=view.seen >= view.lengths, starts=starts)


def _bare_map(
  spec: StepSpec,
  x: Any,
  mask: jax.Array | None,
  fresh: jax.Array | None,
  axis: str | None,
) -> WindowMap:
  """Return the map of a window of inputs x [S, B, ...]."""
  assert spec.hidden_map is not None
  model = spec.model
  window = WindowMap(
    spec.hidden_map,
    x,
    mask,
    own_steps=model.own_steps,
    own_kernels=model.own_kernels,
    first_params=model.init,
  )
  if fresh is None:
    return window
  rows = len(fresh)
  return window._replace(
    fresh=fresh,
    start=lambda params: start_rows(model, params, rows, axis),
  )
