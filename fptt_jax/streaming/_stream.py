"""A stream, step by step: predict, wait for labels, train on windows that are ready.

Whole windows that come with their labels take a shorter way. The training pass
starts from the hidden state of the predictions then, so that its outputs are the
predictions.
"""

import jax
import jax.numpy as jnp

from fptt_jax._trees import where_rows
from fptt_jax.streaming._buffer import (
  Label,
  NewStep,
  PendingWindow,
  answer,
  append,
  drop,
  expire,
  next_window,
)
from fptt_jax.streaming._types import StreamState
from fptt_jax.streaming._window import (
  StreamSpec,
  finite_rows,
  learn_window,
  predict_steps,
  start_rows_anew,
  training_predicts,
)


def run_steps(
  spec: StreamSpec,
  state: StreamState,
  steps: NewStep,
  labels: Label | None,
  *,
  may_reset: bool,
) -> tuple[StreamState, jax.Array]:
  """Predict n steps and, with labels, learn after each of them.

  Args:
    spec: Options of the learner.
    state: State before.
    steps: The steps, [n, B, ...].
    labels: As many labels, for the oldest steps that wait for one; or None.
    may_reset: Whether a row may start anew. The window before is then closed first, so
      that the new row is predicted with the weights after it.

  Returns:
    The state after, and the predictions [n, B, ...].
  """

  def body(
    state: StreamState, item: tuple[NewStep, Label | None]
  ) -> tuple[StreamState, jax.Array]:
    step, label = item
    if may_reset:
      state = _learn_ready(spec, state, closing=step.reset.any())
    state, outputs = _predict(spec, state, step)
    if label is not None:
      state = _answer(state, label)
    return _learn_ready(spec, state), outputs

  return jax.lax.scan(body, state, (steps, labels))


def run_labels(spec: StreamSpec, state: StreamState, labels: Label) -> StreamState:
  """Learn from n labels [n, B, ...] of steps that were predicted before."""

  def body(state: StreamState, label: Label) -> tuple[StreamState, None]:
    return _learn_ready(spec, _answer(state, label)), None

  state, _ = jax.lax.scan(body, state, labels)
  return state


def can_run_windows(
  spec: StreamSpec, state: StreamState, steps: NewStep, labels: Label
) -> jax.Array:
  """Return bool [], whether :func:`run_windows` gives what :func:`run_steps` does."""
  pending = state.pending
  able = (pending.length == 0) & (pending.owed == 0) & ~steps.reset.any()
  if spec.skip_nonfinite:
    able &= finite_rows(steps.inputs, 2).all()
  return able


def run_windows(
  spec: StreamSpec, state: StreamState, steps: NewStep, labels: Label, all_valid: bool
) -> tuple[StreamState, jax.Array]:
  """Predict and learn whole windows, as :func:`run_steps` does.

  Args:
    spec: Options of the learner.
    state: State before, in which no step is pending.
    steps: The steps, [n, B, ...], where the window size divides n.
    labels: The labels of these steps.
    all_valid: Whether all steps are known to have an input.
  """
  size = spec.window_size
  predicts = training_predicts(spec, state)

  def body(
    state: StreamState, item: tuple[NewStep, Label]
  ) -> tuple[StreamState, jax.Array]:
    steps, labels = item
    valid = None if all_valid else steps.valid
    outputs = None
    if not predicts:
      params, hidden = state.train.params, state.train.hidden
      _, outputs = predict_steps(spec, params, hidden, steps.inputs, valid)
    window = PendingWindow(
      inputs=steps.inputs,
      outputs=outputs,
      targets=labels.targets,
      labeled=labels.labeled,
      valid=steps.valid,
      reset=jnp.zeros(steps.valid.shape[1], bool),
      length=jnp.asarray(size),
    )
    return learn_window(spec, state, window, valid)

  def split(leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1, size, *leaf.shape[1:])

  def join(leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1, *leaf.shape[2:])

  windows = jax.tree.map(split, (steps, labels))
  state, outputs = jax.lax.scan(body, state, windows)
  return state._replace(live=state.train.hidden), join(outputs)


def _predict(
  spec: StreamSpec, state: StreamState, step: NewStep
) -> tuple[StreamState, jax.Array]:
  """Predict one step and add it to the pending ones."""
  params = state.train.params
  start = spec.model.start(params, len(step.reset))
  before = where_rows(step.reset, start, state.live)
  if spec.skip_nonfinite:
    step = step._replace(valid=step.valid & finite_rows(step.inputs, 1))
  x = jax.tree.map(lambda leaf: leaf[None], step.inputs)
  live, outputs = predict_steps(spec, params, before, x, step.valid[None])
  if spec.skip_nonfinite and jax.tree.leaves(live):
    # The training pass keeps its hidden state, too, when the numbers run away.
    live = where_rows(finite_rows(live, 1), live, before)
  pending = expire(append(state.pending, step, outputs[0]), spec.delay)
  return state._replace(live=live, pending=pending), outputs[0]


def _answer(state: StreamState, label: Label) -> StreamState:
  """Give labels to the oldest step that waits for them, and count those dropped."""
  pending, late, unmatched = answer(state.pending, label)
  counts = state.counts
  counts = counts._replace(
    late=counts.late + late, unmatched=counts.unmatched + unmatched
  )
  return state._replace(pending=pending, counts=counts)


def _learn_ready(
  spec: StreamSpec, state: StreamState, closing: jax.Array | None = None
) -> StreamState:
  """Train on the windows all of whose steps are answered, the oldest first.

  Args:
    spec: Options of the learner.
    state: State before.
    closing: bool [], whether a row starts anew at the step that comes next; None if
      not.
  """
  if closing is None:
    closing = jnp.zeros([], bool)

  def is_ready(state: StreamState) -> jax.Array:
    ready, _ = next_window(state.pending, spec.window_size, closing)
    return ready

  def learn(state: StreamState) -> StreamState:
    _, window = next_window(state.pending, spec.window_size, closing)
    train = start_rows_anew(spec, state.train, window.reset)
    state, _ = learn_window(spec, state._replace(train=train), window, window.valid)
    pending = drop(state.pending, window.length)
    caught_up = jnp.broadcast_to(pending.length == 0, len(window.reset))
    live = where_rows(caught_up, state.train.hidden, state.live)
    return state._replace(pending=pending, live=live)

  result: StreamState = jax.lax.while_loop(is_ready, learn, state)
  return result
