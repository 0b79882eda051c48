"""What a window is trained on and what is measured of it.

A loss sees one window at a time: the model's outputs [S, B, ...], the batch's targets
whole, and the :class:`WindowView`. Terminal tasks have one label a sequence and build
an intermediate loss for every window from it (paper, Sec. 3 "Intermediate Losses");
sequence-to-sequence tasks have a label each step. Whatever a loss remembers between
windows is a tree in the carry.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fptt_jax._checks import (
  INT32_MAX,
  as_floats,
  check_array,
  check_callable,
  check_choice,
  check_flag,
  check_integer,
  check_number,
  check_size,
  shapes,
)
from fptt_jax._dtypes import widen
from fptt_jax._windows import WindowView, take_steps

__all__ = (
  'DIVERGENCES',
  'Loss',
  'LossState',
  'MetricSums',
  'from_function',
  'compute_metrics',
  'sequence_classification',
  'sequence_regression',
  'terminal_classification',
  'terminal_regression',
)

LossState = Any
MetricSums = dict[str, jax.Array]
"""Sums over what was measured, and 'count', over how many: means are `total /
count`.
"""

DIVERGENCES = ('class_ema', 'last_epoch', 'example', 'uniform', 'none')


class Memory(NamedTuple):
  """A loss's `apply` in two parts, for a loss state so large that a window may only
  write the part that it changes.

  Attributes:
    observe: (outputs, targets, window, loss_state) -> (scalar objective, note). The
      note is what is to be remembered of the window, a tree of arrays that are the same
      on all devices.
    write: (loss_state, note, keep) -> new loss state; the old one where `keep`, True or
      a bool [], is False.
  """

  observe: Callable[[jax.Array, Any, WindowView, LossState], tuple[jax.Array, Any]]
  write: Callable[[LossState, Any, jax.Array | bool], LossState]


class Loss(NamedTuple):
  """A loss as pure functions. :func:`from_function` makes one of a single function of
  your own.

  Attributes:
    init: (num_windows) -> loss state.
    apply: (outputs, targets, window, loss_state) -> (scalar objective of this window,
      new loss state). A window in which no sequence is active must give 0.
    measure: (outputs, targets, window) -> :data:`MetricSums` of what evaluation
      reports; summed over windows, batches, devices.
    end_epoch: (loss_state) -> loss state of the next epoch.
    check: (targets, valid bool [T, B]) -> None; raises on concrete targets that mean
      nothing. `valid` says which steps are real.
    last_only: whether `apply` and `measure` look at each sequence's last valid step in
      the window alone (`window.last`) and take outputs [1, B, ...] of just that as
      well.
    per_step: (outputs [s, B, ...], targets [s, B, ...] of the same steps) -> {'loss':
      float [s, B], and what else is measured}, of any s steps, each by itself; where
      `apply` is the mean of 'loss' over the window's valid steps, `measure` the sums of
      all over them, and there is no loss state. Outputs may then be computed a few
      steps at a time (:mod:`fptt_jax.training._readout`). Else None.
    terminal: whether targets are [B, ...] for certain, even where their shape could be
      [T, B, ...].
    memory: `apply` in two parts, one after the other; None where the loss state is
      small.
    valid: (targets, mask bool [T, B]) -> bool [], traced: whether the targets are in
      range where they count; `mask` says which steps are real. The train step leaves a
      batch for which it is False out, and tells so in `StepMetrics.invalid`. None:
      targets are not looked at.
  """

  init: Callable[[int], LossState]
  apply: Callable[[jax.Array, Any, WindowView, LossState], tuple[jax.Array, LossState]]
  measure: Callable[[jax.Array, Any, WindowView], MetricSums]
  end_epoch: Callable[[LossState], LossState] = lambda loss_state: loss_state
  check: Callable[[Any, np.ndarray], None] = lambda targets, valid: None
  last_only: bool = False
  per_step: Callable[[jax.Array, Any], dict[str, jax.Array]] | None = None
  terminal: bool = False
  memory: Memory | None = None
  valid: Callable[[Any, jax.Array], jax.Array] | None = None


def from_function(
  function: Callable[[jax.Array, Any, WindowView], jax.Array],
  measure: Callable[[jax.Array, Any, WindowView], MetricSums] | None = None,
  *,
  terminal: bool | None = None,
) -> Loss:
  """Makes a :class:`Loss` of one pure function (outputs [S, B, ...], targets, window)
  -> scalar.

  The function decides itself what of `targets` it looks at: `window.slice(targets)`
  cuts the window's steps out of a time-major array; `window.mask` [S, B] says which
  steps are real; `window.last` is each sequence's last valid step.

  Args:
    function: The loss of a window.
    measure: What evaluation reports, see :class:`Loss`. By default it is the function's
      value as 'loss', averaged as `terminal` says. Evaluation cuts windows of its own,
      of about √T steps.
    terminal: How the default measure averages. False: the mean over all valid steps, by
      windows that count as many times as they have valid steps; right for a function
      that is a mean over steps. True: the function at each sequence's last step alone.
      It then gets that step as a window of one step, outputs [1, B, ...]; in a ragged
      batch it gets one sequence at a time, and the mean over the sequences is taken.
      None: True where no target has a time axis, False where all are [T, B, ...].

  Returns:
    A :class:`Loss` without state.

  Raises:
    TypeError: `function` or `measure` is not callable, or `terminal` is neither a bool
      nor None.
    ValueError: `terminal` is None and the shapes of the targets do not tell, which is
      the case if some have a time axis and others have none, if there are none, or if T
      = B (raised when a batch is checked or a step is traced).

  Example:
    >>> import jax.numpy as jnp
    >>> from fptt_jax.losses import from_function
    >>> def absolute_error(outputs, targets, window):
    ...   error = jnp.abs(outputs - window.slice(targets)).mean(-1)
    ...   return jnp.sum(error, where=window.mask) / jnp.maximum(window.mask.sum(), 1)
    >>> loss = from_function(absolute_error)
  """
  check_callable('function', function)
  if measure is not None:
    check_callable('measure', measure)
  if terminal is not None:
    terminal = check_flag('terminal', terminal)

  def default_measure(
    outputs: jax.Array, targets: Any, window: WindowView
  ) -> MetricSums:
    if _is_terminal(terminal, targets, window.num_steps, window.mask.shape[1]):
      return _measure_last_steps(function, outputs, targets, window)
    steps = window.mask.sum()
    value = jnp.asarray(function(outputs, targets, window))
    wide = jnp.promote_types(value.dtype, jnp.float32)
    total = jnp.where(steps > 0, steps.astype(wide) * value.astype(wide), 0)
    return {'count': steps, 'loss': total}

  def check(targets: Any, valid: np.ndarray) -> None:
    if measure is None:
      _is_terminal(terminal, targets, *valid.shape)

  return Loss(
    init=lambda num_windows: (),
    apply=lambda outputs, targets, window, loss_state: (
      function(outputs, targets, window),
      loss_state,
    ),
    measure=measure or default_measure,
    check=check,
    terminal=bool(terminal),
  )


def _is_terminal(
  terminal: bool | None, targets: Any, num_steps: int, batch_size: int
) -> bool:
  """Returns whether targets are one per sequence: as `terminal` says or, if that is
  None, as their shapes [B, ...] tell.

  Raises:
    ValueError: the shapes do not tell.
  """
  if terminal is not None:
    return terminal
  leaf_shapes = [np.shape(leaf) for leaf in jax.tree.leaves(targets)]
  time_major = [shape[:2] == (num_steps, batch_size) for shape in leaf_shapes]
  certain = num_steps != batch_size or not any(time_major)
  if leaf_shapes and certain and all(time_major) == any(time_major):
    return not any(time_major)
  raise ValueError(
    'terminal=None expected targets whose shapes tell whether they have a time axis, '
    f'for T={num_steps} and B={batch_size}: got '
    f'{shapes(targets)}. Pass terminal=True (one target per sequence) or '
    'terminal=False (one per step), or a measure.'
  )


def _measure_last_steps(
  function: Callable[[jax.Array, Any, WindowView], jax.Array],
  outputs: jax.Array,
  targets: Any,
  window: WindowView,
) -> MetricSums:
  """Measures a function at the last step of the sequences that end in the window.

  Args:
    function: (outputs [1, B, ...], targets, window) -> scalar.
    outputs: [S, B, ...].
    targets: tree of arrays [B, ...] or [T, B, ...].
    window: the window.
  """
  last_outputs = take_steps(outputs, window.last)
  _, ended, _ = _progress(window, jnp.dtype(jnp.float32))
  if (
    not window.ragged
  ):  # All sequences end together, so the function sees them together.
    last_step = window._replace(
      size=1,
      masked=False,
      start=window.end - 1,
      last=0,
      mask=jnp.ones_like(window.mask[:1]),
    )
    value = function(last_outputs, targets, last_step)
    count = jnp.sum(ended, dtype=jnp.int32)
    return {
      'count': count,
      'loss': jnp.where(count > 0, count.astype(jnp.float32) * value, 0),
    }

  def value_of(row: jax.Array) -> jax.Array:
    take = lambda leaf, axis: jax.lax.dynamic_slice_in_dim(leaf, row, 1, axis)
    length = take(window.lengths, 0)
    step = window.start + jnp.asarray(window.last)[row]
    last_step = window._replace(
      size=1,
      masked=False,
      start=step,
      end=step + 1,
      lengths=length,
      seen=length,
      active=jnp.ones(1, bool),
      last=0,
      mask=jnp.ones((1, 1), bool),
      axis=None,
    )
    of_row = jax.tree.map(
      lambda leaf: take(leaf, int(_has_time_axis(leaf, window))), targets
    )
    return function(take(last_outputs, 1), of_row, last_step)

  return totals_where(
    ended, {'loss': jax.vmap(value_of)(jnp.arange(len(window.lengths)))}
  )


def _has_time_axis(leaf: jax.Array, window: WindowView) -> bool:
  """Returns whether a leaf of terminal targets is [T, B, ...] for certain."""
  num_steps, batch_size = window.num_steps, window.mask.shape[1]
  return num_steps != batch_size and leaf.shape[:2] == (num_steps, batch_size)


def compute_metrics(totals: MetricSums) -> dict[str, Any]:
  """Divide measured totals by their count, on the host; 'count' itself is left out.

  Args:
    totals: Sums by name and 'count': numbers, or arrays [R] of the members of a
      population.

  Returns: {'loss': 0.31, 'accuracy': 0.9}; of a population float64 arrays [R], one mean
    per member. NaN where nothing was counted.

  Raises:
    TypeError: `totals` is no dict of real numbers, or of arrays of one shape, with a
      'count'.
  """
  try:
    sums = {name: as_floats(name, total) for name, total in totals.items()}
    if len({total.shape for total in sums.values()}) != 1:
      raise ValueError('not of one shape')
    count = sums.pop('count')
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise TypeError(
      "totals must be a dict of numbers, or of arrays of one shape, with a 'count', "
      f'got {totals!r}.'
    ) from error
  counted = np.where(count > 0, count, np.nan)
  return {
    name: total / counted if count.ndim else float(total / counted)
    for name, total in sums.items()
  }


# Terminal tasks: one target a sequence.


def terminal_classification(
  num_classes: int,
  *,
  divergence: str = 'class_ema',
  ema_decay: float = 0.99,
  num_examples: int | None = None,
) -> Loss:
  r"""One label a sequence: the paper's :math:`\ell_t = \beta\,CE + (1-\beta)\,Div` with
   β = t/T, at each window's last output.

  CE is the cross-entropy of the prediction P̂ against the label, Div = -Σ_c Q(c) log
  P̂(c) keeps P̂ close to an earlier estimate Q of it ("our estimate in last training
  epoch"), summed over the classes. t is the window's last valid step; in a ragged batch
  β = t/length_i, sequences without a valid step in the window contribute nothing and
  the mean is over the others. Under a mask only valid steps are counted, by t and by
  length_i: β is that of the sequence without its masked steps. The last window of a
  sequence has β = 1, so with K = 1 this is plain cross-entropy.

  Args:
    num_classes: C >= 2; outputs are logits [S, B, C].
    divergence: what Q is. 'class_ema': per class and window, the exponential moving
      average of P̂ over the batches; 'last_epoch': per class and window, the mean of P̂
      over the last epoch (call `end_epoch`); 'example': P̂ of the same example at the
      same window one visit ago, the paper's literal reading, needs `num_examples` and
      targets (labels [B], example ids [B]); 'uniform': 1/C; 'none': no Div term. All
      start uniform.
    ema_decay: weight of the old Q in 'class_ema', in [0, 1).
    num_examples: N, size of the training set, for 'example'.

  Returns:
    A :class:`Loss` for targets int [B] (or the pair above). It measures 'loss'
    (cross-entropy, nats) and 'accuracy', of the last output of each sequence.

  Raises:
    ValueError: an argument outside its range.
  """
  num_classes = _check_classes(num_classes)
  check_choice('divergence', divergence, DIVERGENCES)
  ema_decay = check_number('ema_decay', ema_decay, 0, math.nextafter(1, 0), 'in [0, 1)')
  if (divergence == 'example') != (num_examples is not None):
    raise ValueError(
      f"num_examples goes with divergence='example': got num_examples={num_examples!r} "
      f'and {divergence!r}.'
    )
  if num_examples is not None:
    num_examples = check_size('num_examples', num_examples)
  by_example = divergence == 'example'
  uniform = 1 / num_classes

  def init(num_windows: int) -> LossState:
    table = jnp.full((num_windows, num_classes, num_classes), uniform, float)
    if divergence == 'class_ema':
      return {'q': table}
    if divergence == 'last_epoch':
      return {
        'q': table,
        'sum': jnp.zeros_like(table),
        'count': jnp.zeros((num_windows, num_classes)),
      }
    if num_examples is not None:
      return {'q': jnp.full((num_examples, num_windows, num_classes), uniform, float)}
    return {}

  def observe(
    outputs: jax.Array, targets: Any, window: WindowView, loss_state: LossState
  ) -> tuple[jax.Array, Any]:
    labels, ids = _labels_and_ids(targets, by_example, window.mask.shape[1])
    log_p = jax.nn.log_softmax(widen(_last_outputs(outputs, window, num_classes)))
    active, _, beta = _progress(window, log_p.dtype)
    cross_entropy = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    if divergence == 'none':
      return window.mean(beta * cross_entropy, active), ()
    p, k = jax.lax.stop_gradient(jnp.exp(log_p)), window.k
    note: tuple[jax.Array, ...] = ()
    if divergence == 'uniform':
      q = jnp.full_like(log_p, uniform)
    elif by_example:
      q = loss_state['q'][ids, k]
      seen = jnp.where(active[:, None], p.astype(q.dtype), q)
      note = (k, *window.gather((ids, seen)))
    else:
      rows = loss_state['q'][k]
      q = loss_state['q'][k, labels]
      note = (k, *_new_rows(p, labels, active, window, rows))
    per_sequence = beta * cross_entropy - (1 - beta) * jnp.sum(
      q.astype(log_p.dtype) * log_p, axis=-1
    )
    objective = window.mean(per_sequence, active)
    if divergence == 'class_ema':
      moved, seen = note[1:]
      note = (
        k,
        jnp.where(seen & _true_after(jax.lax.stop_gradient(objective)), moved, rows),
      )
    return objective, note

  def _new_rows(
    p: jax.Array,
    labels: jax.Array,
    active: jax.Array,
    window: WindowView,
    rows: jax.Array,
  ) -> tuple[jax.Array, ...]:
    """What the per-class tables get of the predictions p [B, C] of a window, whose part
    of Q is `rows` [C, C].
    """
    members = jax.nn.one_hot(labels, num_classes, dtype=rows.dtype) * active[
      :, None
    ].astype(rows.dtype)
    ones = jnp.ones((*labels.shape, 1), rows.dtype)
    both = window.total(
      members.T @ jnp.concatenate([p.astype(rows.dtype), ones], -1)
    )  # One sum over the devices, not two.
    sums, counts = both[:, :-1], both[:, -1]
    if divergence == 'last_epoch':
      return sums, counts
    moved = ema_decay * rows + (1 - ema_decay) * sums / jnp.maximum(counts, 1)[:, None]
    return moved, counts[:, None] > 0

  def write(loss_state: LossState, note: Any, keep: jax.Array | bool) -> LossState:
    if divergence in ('uniform', 'none'):
      return loss_state
    k, *news = note
    if divergence == 'last_epoch':
      sums, counts = (_where(keep, new, jnp.zeros_like(new)) for new in news)
      return loss_state | {
        'sum': loss_state['sum'].at[k].add(sums),
        'count': loss_state['count'].at[k].add(counts),
      }
    table = loss_state['q']
    place = (news[0], k) if by_example else k
    return {'q': table.at[place].set(_where(keep, news[-1], table[place]))}

  def apply(
    outputs: jax.Array, targets: Any, window: WindowView, loss_state: LossState
  ) -> tuple[jax.Array, LossState]:
    objective, note = observe(outputs, targets, window, loss_state)
    return objective, write(loss_state, note, True)

  def end_epoch(loss_state: LossState) -> LossState:
    if divergence != 'last_epoch':
      return loss_state
    count = loss_state['count'][..., None]
    q = jnp.where(count > 0, loss_state['sum'] / jnp.maximum(count, 1), loss_state['q'])
    return {
      'q': q,
      'sum': jnp.zeros_like(loss_state['sum']),
      'count': jnp.zeros_like(loss_state['count']),
    }

  def measure(outputs: jax.Array, targets: Any, window: WindowView) -> MetricSums:
    labels, _ = _labels_and_ids(targets, by_example, window.mask.shape[1])
    logits = widen(_last_outputs(outputs, window, num_classes))
    _, ended, _ = _progress(window, logits.dtype)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    )
    return totals_where(
      ended,
      {
        'loss': cross_entropy,
        'accuracy': logits.argmax(-1).astype(labels.dtype) == labels,
      },
    )

  def valid(targets: Any, mask: jax.Array) -> jax.Array:
    labels, ids = _labels_and_ids(targets, by_example, mask.shape[1])
    in_range = _in_range(labels, num_classes)
    if num_examples is not None:
      in_range &= _in_range(ids, num_examples)
    return jnp.all(in_range | ~mask.any(0))

  def check(targets: Any, valid: np.ndarray) -> None:
    labels, ids = _labels_and_ids(targets, by_example, valid.shape[1])
    _check_integers('labels', labels, _rows(valid), num_classes)
    if num_examples is not None:
      _check_integers('example ids', ids, _rows(valid), num_examples)

  return Loss(
    init,
    apply,
    measure,
    end_epoch,
    check,
    last_only=True,
    memory=Memory(observe, write),
    valid=valid,
  )


def terminal_regression() -> Loss:
  """One real target a sequence (the adding problem): β · squared error at each window's
  last output, β = t/T.

  The same β as for :func:`terminal_classification`, (k+1)/K in the k-th window; ragged
  batches likewise. Targets: float [B] or [B, O], outputs [S, B, 1] or [S, B, O]; the
  error is the mean over O. It measures 'loss', the mean squared error of the last
  output of each sequence.
  """

  def error(outputs: jax.Array, targets: jax.Array, window: WindowView) -> jax.Array:
    _require_floats('targets', targets)
    if targets.ndim not in (1, 2) or targets.shape[0] != window.mask.shape[1]:
      raise ValueError(
        'terminal_regression expected targets [B] or [B, O] with '
        f'B={window.mask.shape[1]}, got {targets.shape}.'
      )
    expected = targets.reshape(targets.shape[0], -1)
    predicted = _last_outputs(outputs, window, expected.shape[-1])
    return jnp.mean(_squared_error(predicted, expected), axis=-1)

  def apply(
    outputs: jax.Array, targets: Any, window: WindowView, loss_state: LossState
  ) -> tuple[jax.Array, LossState]:
    squared = error(outputs, targets, window)
    active, _, beta = _progress(window, squared.dtype)
    return window.mean(beta * squared, active), loss_state

  def measure(outputs: jax.Array, targets: Any, window: WindowView) -> MetricSums:
    squared = error(outputs, targets, window)
    return totals_where(_progress(window, squared.dtype)[1], {'loss': squared})

  def check(targets: Any, valid: np.ndarray) -> None:
    _check_floats('targets', targets, _rows(valid))

  return Loss(lambda num_windows: (), apply, measure, check=check, last_only=True)


# Sequence-to-sequence tasks: a target each step.


def sequence_classification(num_classes: int, *, accuracy: bool = False) -> Loss:
  """A label each step (language modelling): mean cross-entropy over the window's valid
  steps.

  Args:
    num_classes: C (the vocabulary's V for language), outputs are logits [S, B, C].
    accuracy: measure the share of right predictions as well (one more pass over the
      logits).

  Returns:
    A :class:`Loss` for targets int [T, B]; it measures 'loss' in nats a step:
      perplexity is its exponential.

  Raises:
    ValueError: num_classes is no integer >= 2.
    TypeError: accuracy is no bool.
  """
  num_classes, accuracy = _check_classes(num_classes), check_flag('accuracy', accuracy)

  def per_step(outputs: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    _require_integers('targets', labels)
    if labels.ndim != 2:
      raise ValueError(
        'sequence_classification expected targets [T, B], got [T, B, ...] with a '
        f'window of shape {labels.shape}.'
      )
    _require_features(outputs, num_classes)
    labels = _widened(labels)
    logits = widen(outputs)
    extra = (
      {'accuracy': logits.argmax(-1).astype(labels.dtype) == labels} if accuracy else {}
    )
    return {
      'loss': optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels),
      **extra,
    }

  def check(targets: Any, valid: np.ndarray) -> None:
    _check_integers('targets', targets, valid, num_classes)

  def valid(targets: Any, mask: jax.Array) -> jax.Array:
    _require_integers('targets', targets)
    if targets.shape != mask.shape:
      raise ValueError(
        f'targets must be [T, B] = {mask.shape}, got shape {targets.shape}.'
      )
    return jnp.all(_in_range(targets, num_classes) | ~mask)

  return _mean_of_steps(per_step, check)._replace(valid=valid)


def sequence_regression() -> Loss:
  """A real target each step: mean squared error over the window's valid steps and the O
  outputs; targets float [T, B, O].
  """

  def per_step(outputs: jax.Array, expected: jax.Array) -> dict[str, jax.Array]:
    _require_floats('targets', expected)
    if expected.shape != outputs.shape:
      raise ValueError(
        'sequence_regression needs targets [T, B, O] like the outputs: got a window '
        f'of targets {expected.shape} and outputs '
        f'{outputs.shape}.'
      )
    squared = _squared_error(outputs, expected)
    return {'loss': squared.reshape(*outputs.shape[:2], -1).mean(-1)}

  def check(targets: Any, valid: np.ndarray) -> None:
    _check_floats('targets', targets, valid)

  return _mean_of_steps(per_step, check)


def _mean_of_steps(
  per_step: Callable[[jax.Array, Any], dict[str, jax.Array]],
  check: Callable[[Any, np.ndarray], None],
) -> Loss:
  """The loss that is the mean of `per_step`'s."""

  def apply(
    outputs: jax.Array, targets: Any, window: WindowView, loss_state: LossState
  ) -> tuple[jax.Array, LossState]:
    return window.mean(
      per_step(outputs, window.slice(targets))['loss'], window.mask
    ), loss_state

  def measure(outputs: jax.Array, targets: Any, window: WindowView) -> MetricSums:
    return totals_where(window.mask, per_step(outputs, window.slice(targets)))

  return Loss(lambda num_windows: (), apply, measure, check=check, per_step=per_step)


def _progress(
  window: WindowView, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of each sequence [B]: is it active in the window, does it end there, and β =
  t/length_i, of valid steps alone.
  """
  beta = window.seen.astype(dtype) / jnp.maximum(window.lengths, 1).astype(dtype)
  return window.active, window.ended, beta


def _last_outputs(outputs: jax.Array, window: WindowView, features: int) -> jax.Array:
  """Outputs [B, features] at each sequence's last valid step in the window."""
  _require_features(outputs, features)
  return (outputs if outputs.shape[0] == 1 else take_steps(outputs, window.last))[0]


def _where(keep: jax.Array | bool, new: jax.Array, old: jax.Array) -> jax.Array:
  return new if keep is True else jnp.where(keep, new, old)


def _true_after(number: jax.Array) -> jax.Array:
  """Returns True, but not before `number` is known.

  A large table that is written once this is known has been read for `number` before.
  Without that order XLA copies the table in each window. It drops optimization barriers
  on a CPU before it looks for the order.
  """
  return (number <= 0) | (number >= 0) | jnp.isnan(number)


def _widened(indices: jax.Array) -> jax.Array:
  """Return indices in at least 32 bits: fewer may not hold the number of classes."""
  return (
    indices if jnp.iinfo(indices.dtype).bits >= 32 else jnp.asarray(indices, jnp.int32)
  )


def _in_range(indices: jax.Array, limit: int) -> jax.Array:
  """Return bool, elementwise: whether indices lie in 0..limit-1."""
  indices = _widened(indices)
  return (indices >= 0) & (indices < limit)


def _squared_error(predicted: jax.Array, expected: jax.Array) -> jax.Array:
  """Return (predicted - expected)² elementwise, in at least float32."""
  # float16 holds no square of a difference above 256.
  return jnp.square(widen(predicted) - widen(expected))


def totals_where(where: jax.Array, values: dict[str, jax.Array]) -> MetricSums:
  """Sums of the values, and how many they are, where `where` is True."""
  sums = {
    name: jnp.sum(value, where=where, dtype=jnp.float32)
    for name, value in values.items()
  }
  return {'count': jnp.sum(where, dtype=jnp.int32), **sums}


def _labels_and_ids(
  targets: Any, by_example: bool, batch_size: int
) -> tuple[jax.Array, jax.Array]:
  expected = (
    f'a pair (labels [B], example ids [B]), B={batch_size}'
    if by_example
    else f'labels [B], B={batch_size}'
  )
  pair = targets if by_example else (targets, targets)
  if shapes(pair) != ((batch_size,), (batch_size,)):
    raise ValueError(
      f'terminal_classification expected targets to be {expected}, got shapes '
      f'{shapes(targets)}.'
    )
  _require_integers('labels', pair[0])
  _require_integers('example ids', pair[1])
  return _widened(pair[0]), _widened(pair[1])


def _check_classes(num_classes: Any) -> int:
  return check_integer('num_classes', num_classes, 2, INT32_MAX, 'an integer >= 2')


def _require_integers(name: str, values: jax.Array) -> None:
  check_array(name, values)
  if not jnp.issubdtype(values.dtype, jnp.integer):
    raise TypeError(
      f'{name} must be integers (class indices), got dtype {values.dtype} of shape '
      f'{values.shape}.'
    )


def _require_floats(name: str, values: jax.Array) -> None:
  check_array(name, values)
  if not jnp.issubdtype(values.dtype, jnp.floating):
    raise TypeError(
      f'{name} must be floating point, got dtype {values.dtype} of shape '
      f'{values.shape}.'
    )


def _require_features(outputs: jax.Array, features: int) -> None:
  if outputs.ndim != 3 or outputs.shape[-1] != features:
    raise ValueError(
      f'the loss expected model outputs of shape [S, B, {features}], got '
      f'{outputs.shape}.'
    )


def _rows(valid: np.ndarray) -> np.ndarray:
  """Which sequences have a valid step, bool [B], of bool [T, B]."""
  return np.any(valid, axis=0, keepdims=True)[0]


def _check_integers(name: str, values: Any, valid: np.ndarray, limit: int) -> None:
  """Concrete class indices of the shape of `valid`, in 0..limit-1 where it is True."""
  _require_integers(name, values)
  values = np.asarray(values)
  if values.shape != valid.shape:
    raise ValueError(f'{name} must have shape {valid.shape}, got {values.shape}.')
  if not valid.any():
    return
  low, high = int(values[valid].min()), int(values[valid].max())
  if low < 0 or high >= limit:
    message = f'{name} must lie in 0..{limit - 1}, got values from {low} to {high}.'
    if low < 0:
      message += ' No negative number marks what to ignore: give lengths.'
    raise ValueError(message)


def _check_floats(name: str, values: Any, valid: np.ndarray) -> None:
  """Concrete numbers with the leading dimensions of `valid`, finite where it is
  True.
  """
  _require_floats(name, values)
  values = np.asarray(values)
  if values.shape[: valid.ndim] != valid.shape:
    raise ValueError(
      f'{name} must have leading dimensions {valid.shape}, got shape {values.shape}.'
    )
  bad = np.count_nonzero(~np.isfinite(values[valid]))
  if bad:
    raise ValueError(f'{name} must be finite, got {bad} NaN or infinite values.')


def __dir__() -> list[str]:
  """Lists the public names alone."""
  return sorted(__all__)
