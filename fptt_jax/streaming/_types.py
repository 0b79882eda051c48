"""The named tuples of the stream learner."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fptt_jax._types import Hidden, TrainState
from fptt_jax.losses import MetricSums


class PendingSteps(NamedTuple):
  """The steps that were predicted and not yet trained on, in a ring of R places.

  The oldest step lies at place `first`; the steps after it follow, modulo R. Steps are
  answered in order, so that the answered ones come first.

  Attributes:
    inputs: [R, B, ...].
    outputs: [R, B, ...], the predictions, made before the labels were seen.
    targets: [R, B, ...], labels of the answered steps.
    labeled: bool [R, B], whether an answered step has a label.
    valid: bool [R, B], whether a step has an input.
    reset: bool [R, B], whether a row starts anew before a step.
    first: int32 [], place of the oldest step.
    length: int32 [], number of steps.
    answered: int32 [], number of steps whose label came or is no longer waited for.
    owed: int32 [], number of labels that have not come and will be dropped. It stays at
      the largest int32 once it is there.
  """

  inputs: Any
  outputs: jax.Array
  targets: Any
  labeled: jax.Array
  valid: jax.Array
  reset: jax.Array
  first: jax.Array
  length: jax.Array
  answered: jax.Array
  owed: jax.Array


class StreamMetrics(NamedTuple):
  """Metrics of the windows that were closed since the last report.

  `Learner.step` and `Learner.learn` report. What `Learner.predict` closes is part of
  the next report.

  Attributes:
    totals: Metrics of the loss on the predictions, as they were made before their
      labels were seen; see `fptt_jax.compute_metrics`. Steps without a label are left
      out.
    windows: int32 [], number of windows closed.
    skipped: int32 [], number of windows with labels that moved no weights, because a
      number was not finite or a label was out of range.
    late: int32 [], number of labels dropped because they came more than `delay` steps
      late.
    unmatched: int32 [], number of labels dropped because no step was waiting for them.
    fast: Means of the loss's metrics by name, float32 [], with the first of the
      learner's fading factors. NaN before the first label.
    slow: The same with the second fading factor.
  """

  totals: MetricSums
  windows: jax.Array
  skipped: jax.Array
  late: jax.Array
  unmatched: jax.Array
  fast: dict[str, jax.Array]
  slow: dict[str, jax.Array]


class Counts(NamedTuple):
  """Counts since the last report, with the fields of :class:`StreamMetrics`."""

  totals: MetricSums
  windows: jax.Array
  skipped: jax.Array
  late: jax.Array
  unmatched: jax.Array


class StreamState(NamedTuple):
  """Everything that the next step of a stream depends on: one tree of arrays.

  Its size is constant. A stream goes on exactly from a saved state, see
  `fptt_jax.state_to_arrays`.

  Attributes:
    train: The trainer's state. Its `hidden` is that before the oldest pending step.
    live: [B, ...], hidden state after the newest input.
    pending: The steps in between.
    fast: Sums of the metrics, float32 [], faded by the first factor in each window that
      has a label.
    slow: The same with the second factor.
    counts: What was counted since the last report.
  """

  train: TrainState
  live: Hidden
  pending: PendingSteps
  fast: MetricSums
  slow: MetricSums
  counts: Counts


class Learner(NamedTuple):
  """The functions that :func:`fptt_jax.make_learner` makes.

  Inputs, labels and masks are time-major, [n, B, ...], for any n >= 1. n steps in one
  call are the same as n calls of one step. Each n is compiled once. In an array
  `labeled`, `valid` or `reset`, bool [n, B], None stands for True, True and False.

  Attributes:
    init: (key, x, y=None) -> StreamState. Only shapes and dtypes of x and y are used.
      Without y, the labels are taken to be what the loss accepts: numbers of the
      outputs' shape, or else one class index per row.
    step: (state, x, y, labeled=None, valid=None, reset=None) -> (state, outputs,
      StreamMetrics): predict each step, then learn. y are labels of the oldest steps
      that wait for one: of x itself, if none waited before.
    predict: (state, x, valid=None, reset=None) -> (state, outputs [n, B, ...]). The
      labels may come later. Outputs at steps without an input are 0.
    learn: (state, y, labeled=None) -> (state, StreamMetrics): labels of the oldest n
      steps that wait for one.
    donate: Whether the functions reuse the old state's memory for the new state. The
      old arrays are deleted then.
  """

  init: Callable[..., StreamState]
  step: Callable[..., tuple[StreamState, jax.Array, StreamMetrics]]
  predict: Callable[..., tuple[StreamState, jax.Array]]
  learn: Callable[..., tuple[StreamState, StreamMetrics]]
  donate: bool = True
