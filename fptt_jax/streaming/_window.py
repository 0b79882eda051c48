"""One window of a stream: the trainer's update, the metrics and the drift hook."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import optax

from fptt_jax._batch import Batch
from fptt_jax._dtypes import widen
from fptt_jax._trees import check_like, where_rows, zero_unless
from fptt_jax._types import Hidden, Model, Params, StepMetrics, Trainer, TrainState
from fptt_jax._windows import make_windows, valid_steps, window_at
from fptt_jax.losses import Loss, MetricSums
from fptt_jax.streaming._buffer import PendingWindow
from fptt_jax.streaming._types import StreamState
from fptt_jax.training._window import split_penalty

Means = dict[str, jax.Array]
RUNAWAY = 1e6
"""Size of a number above which a row's hidden state starts anew.

It does so if an update from that state was skipped.
"""
DriftHook = Callable[[TrainState, Means, Means], TrainState]


@dataclasses.dataclass(frozen=True)
class StreamSpec:
  """Resolved options of a stream learner.

  Attributes:
    model: The model.
    user_loss: Loss for labels [S, B, ...].
    loss: The same for pairs (labels, bool [S, B]), which the trainer was made with.
    trainer: Trainer of one window. It carries the hidden state and returns outputs.
    unlabeled: The same with one inner step, for windows without labels.
    window_size: S.
    delay: How many steps late a label may come.
    skip_nonfinite: Whether non-finite inputs and labels count as missing.
    fading: The fading factors of the fast and the slow metrics.
    on_drift: The user's hook, or None.
    inner_steps: Gradient steps per window.
    keeps_influence: Whether the influence is learned, and stays when rows start anew.
  """

  model: Model
  user_loss: Loss
  loss: Loss
  trainer: Trainer
  unlabeled: Trainer
  window_size: int
  delay: int
  skip_nonfinite: bool
  fading: tuple[float, float]
  on_drift: DriftHook | None
  inner_steps: int
  keeps_influence: bool = False


def finite_rows(tree: Any, num_axes: int) -> jax.Array:
  """Return bool, for the leading axes of a tree's arrays: whether all is finite there.

  Args:
    tree: A tree of arrays with at least `num_axes` common leading axes.
    num_axes: Number of these axes.
  """
  finite = []
  for leaf in jax.tree.leaves(tree):
    flat = jnp.isfinite(leaf).reshape(*leaf.shape[:num_axes], -1)
    finite.append(flat.all(-1))
  return jnp.stack(finite).all(0)


def predict_steps(
  spec: StreamSpec, params: Params, hidden: Hidden, x: Any, valid: jax.Array | None
) -> tuple[Hidden, jax.Array]:
  """Run the model over steps, without dropout.

  Args:
    spec: Options of the learner.
    params: Parameters of the model.
    hidden: [B, ...], hidden state before the steps.
    x: [n, B, ...].
    valid: bool [n, B], which steps have an input; None for all.

  Returns:
    The hidden state after the steps, and the outputs [n, B, ...], 0 at steps without an
    input.
  """
  if valid is not None:
    x = zero_unless(valid, x)
  hidden, outputs = spec.model.apply(params, hidden, x, valid, None)
  outputs, _ = split_penalty(outputs)
  if valid is not None:
    outputs = zero_unless(valid, outputs)
  return hidden, outputs


def training_predicts(spec: StreamSpec, state: StreamState) -> bool:
  """Return whether a training pass has the outputs of a prediction before it.

  It has not if it is the last of several inner steps, or draws noise such as dropout.
  """
  if spec.inner_steps > 1:
    return False
  window = jax.tree.map(lambda ring: ring[: spec.window_size], state.pending.inputs)
  train = state.train
  arguments = jax.eval_shape(
    lambda: (train.params, train.hidden, window, None, train.key)
  )
  jaxpr = jax.make_jaxpr(spec.model.apply)(*arguments).jaxpr
  *_, key = jaxpr.invars
  drawn = {key}
  for equation in jaxpr.eqns:
    if not drawn.isdisjoint(_variables(equation.invars)):
      drawn.update(equation.outvars)
  return drawn.isdisjoint(_variables(jaxpr.outvars))


def _variables(atoms: Any) -> list[Any]:
  """Return the atoms of a jaxpr that are not constants."""
  return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def start_rows_anew(spec: StreamSpec, train: TrainState, rows: jax.Array) -> TrainState:
  """Return the train state with the chosen rows, bool [B], at their start."""
  start = spec.model.start(train.params, len(rows))

  def cleared(leaf: jax.Array) -> jax.Array:
    # What rows share stays: it reaches a row through that row's own part alone.
    is_own = len(leaf) == len(rows)
    return where_rows(rows, jnp.zeros_like(leaf), leaf) if is_own else leaf

  influence = train.influence
  if not spec.keeps_influence:
    # What does not depend on the parameters has no influence of theirs.
    influence = jax.tree.map(cleared, influence)
  return train._replace(
    hidden=where_rows(rows, start, train.hidden), influence=influence
  )


def learn_window(
  spec: StreamSpec, state: StreamState, window: PendingWindow, valid: jax.Array | None
) -> tuple[StreamState, jax.Array]:
  """Train on a window.

  Args:
    spec: Options of the learner.
    state: State before, with the rows that have to at their start.
    window: The window. Without outputs, those of the training pass are taken.
    valid: bool [S, B], which steps have an input; None for all.

  Returns:
    The state after, and the window's predictions [S, B, ...].
  """
  labeled, in_range = _usable_labels(spec, window, valid)
  has_label = labeled.any()
  targets = (window.targets, labeled)
  batch = Batch(window.inputs, targets, mask=valid)
  train, metrics = _train(spec, state.train, batch, has_label)
  # Without a label a window moves the hidden state and what depends on it, no weights.
  params, opt_state = optax.tree.where(
    has_label,
    (train.params, train.opt_state),
    (state.train.params, state.train.opt_state),
  )
  train = train._replace(params=params, opt_state=opt_state)
  live = state.live
  if spec.skip_nonfinite and jax.tree.leaves(live):
    # A state that ran away in a window without labels would otherwise never come back.
    restarted = _far_rows(state.train.hidden) & metrics.skipped[0] & has_label
    train = start_rows_anew(spec, train, restarted)
    start = spec.model.start(params, len(restarted))
    live = where_rows(restarted & _far_rows(live), start, live)
  outputs = metrics.outputs if window.outputs is None else window.outputs
  assert outputs is not None
  skipped = (metrics.skipped[0] & has_label) | ~in_range
  totals = _measure(spec, outputs, targets, valid)
  totals = jax.tree.map(lambda total: jnp.where(skipped, 0, total), totals)
  fast, slow = (
    _fade(faded, totals, factor)
    for faded, factor in zip((state.fast, state.slow), spec.fading, strict=True)
  )
  train = _react(spec, train, (fast, slow), has_label & ~skipped)
  counts = state.counts._replace(
    totals=jax.tree.map(jnp.add, state.counts.totals, totals),
    windows=state.counts.windows + 1,
    skipped=state.counts.skipped + skipped,
  )
  state = state._replace(train=train, live=live, fast=fast, slow=slow, counts=counts)
  return state, outputs


def _train(
  spec: StreamSpec, train: TrainState, batch: Batch, has_label: jax.Array
) -> tuple[TrainState, StepMetrics]:
  """Run the train step of a window."""
  if spec.inner_steps == 1:
    return spec.trainer.step(train, batch)
  # Early steps would move the weights that the hidden state is computed with, and a
  # window without a label has to put them back.
  trained: tuple[TrainState, StepMetrics] = jax.lax.cond(
    has_label, spec.trainer.step, spec.unlabeled.step, train, batch
  )
  return trained


def _far_rows(hidden: Hidden) -> jax.Array:
  """Return which rows [B] of a hidden state hold NaN or a number above `RUNAWAY`."""
  leaves = jax.tree.leaves(hidden)
  far = jnp.zeros(len(leaves[0]), bool)
  for leaf in leaves:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      near = jnp.abs(widen(leaf)) <= RUNAWAY
      far |= ~near.reshape(len(leaf), -1).all(1)
  return far


def _usable_labels(
  spec: StreamSpec, window: PendingWindow, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Return which steps can be learned, bool [S, B], and whether labels are in range.

  Labels out of range make all labels of the window unusable.
  """
  labeled = window.labeled if valid is None else window.labeled & valid
  if spec.user_loss.valid is None:
    return labeled, jnp.ones([], bool)
  in_range = spec.user_loss.valid(window.targets, labeled)
  return labeled & in_range, in_range


def _react(
  spec: StreamSpec,
  train: TrainState,
  faded: tuple[MetricSums, MetricSums],
  learned: jax.Array,
) -> TrainState:
  """Call the user's hook after a window that was learned."""
  if spec.on_drift is None:
    return train
  fast, slow = map(faded_means, faded)
  changed = spec.on_drift(train, fast, slow)
  whose = 'as the state that on_drift was given has it'
  changed = check_like('the state that on_drift returns', changed, train, whose, True)
  result: TrainState = optax.tree.where(learned, changed, train)
  return result


def _measure(
  spec: StreamSpec, outputs: jax.Array, targets: Any, valid: jax.Array | None
) -> MetricSums:
  """Return the loss's metrics of a window's predictions."""
  windows = make_windows(spec.window_size, num_windows=1)
  steps = valid_steps(windows, outputs.shape[1], mask=valid)
  view = window_at(windows, jnp.zeros([], jnp.int32), steps)
  return spec.loss.measure(outputs, targets, view)


def _fade(faded: MetricSums, totals: MetricSums, factor: float) -> MetricSums:
  """Return faded sums after a window; they stay as they are without a label."""

  def add(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(totals['count'] > 0, factor * old + new.astype(old.dtype), old)

  return jax.tree.map(add, faded, totals)


def faded_means(faded: MetricSums) -> Means:
  """Return the means of faded sums; NaN before the first label."""
  return {
    name: total / faded['count'] for name, total in faded.items() if name != 'count'
  }
