"""Losses with one target per sequence."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fptt_jax._checks import (
  check_choice,
  check_number,
  check_shape,
  check_size,
  require,
)
from fptt_jax._dtypes import widen
from fptt_jax._trees import shapes
from fptt_jax._windows import WindowView, take_steps
from fptt_jax.losses._base import (
  Loss,
  LossState,
  Memory,
  MetricSums,
  check_classes,
  check_finite,
  check_indices,
  correct,
  in_range,
  no_state,
  require_features,
  require_kind,
  squared_error,
  totals_where,
  widen_indices,
)
from fptt_jax.losses._references import Examples, Predictions, Reference, make_reference

DIVERGENCES = ('class_ema', 'last_epoch', 'example', 'uniform', 'none')


def terminal_classification(
  num_classes: int,
  *,
  divergence: str | Reference = 'class_ema',
  ema_decay: float = 0.99,
  num_examples: int | None = None,
) -> Loss:
  r"""Make a classification loss with one label per sequence.

  At each window's last output the objective is the paper's :math:`\ell_t = \beta\,CE +
  (1-\beta)\,Div` with β = t/T. CE is the cross-entropy of the prediction P̂ against the
  label. Div = -Σ_c Q(c) log P̂(c) keeps P̂ close to an earlier estimate Q of it ("our
  estimate in last training epoch"). t is the window's last valid step. The last window
  of a sequence has β = 1, so K = 1 gives plain cross-entropy.

  In a ragged batch β = t/length_i. Sequences without a valid step in the window do not
  count, and the mean is over the others. Under a mask, t and length_i count valid steps
  only.

  Args:
    num_classes: C >= 2. Outputs are logits [S, B, C].
    divergence: How Q is found. All start uniform. 'class_ema': per class and window, an
      exponential moving average of P̂ over the batches. 'last_epoch': per class and
      window, the mean of P̂ over the last epoch (call `end_epoch`). 'example': P̂ of
      the same example at the same window in its last visit, the paper's literal
      reading; it needs `num_examples`. 'uniform': 1/C. 'none': no Div term. Or a
      :class:`Reference` of your own.
    ema_decay: Weight of the old Q with 'class_ema', in [0, 1).
    num_examples: N, size of the training set, for 'example' or a reference of your own
      that needs example ids. Targets are then pairs (labels [B], example ids [B]).
      Evaluation takes pairs, too, and does not use the ids; give any in 0..N-1.

  Returns:
    A :class:`Loss` for targets int [B], or the pairs above. It measures 'loss'
    (cross-entropy, nats) and 'accuracy' of the last output of each sequence.

  Raises:
    ValueError: If an argument is out of range, or `num_examples` does not go with
      `divergence`.

  Example:
    >>> from fptt_jax import losses
    >>> loss = losses.terminal_classification(10, divergence='uniform')
  """
  num_classes = check_classes(num_classes)
  below_one = math.nextafter(1, 0)
  ema_decay = check_number('ema_decay', ema_decay, 0, below_one, 'in [0, 1)')
  if num_examples is not None:
    num_examples = check_size('num_examples', num_examples)
  reference = divergence if isinstance(divergence, Reference) else None
  if reference is None:
    check_choice('divergence', divergence, DIVERGENCES)
    fits = (divergence == 'example') == (num_examples is not None)
    accepted = "an integer with divergence='example' and None with others"
    hint = f'The divergence is {divergence!r}.'
    require(fits, 'num_examples', accepted, num_examples, hint)
    reference = make_reference(str(divergence), ema_decay, num_examples)
  task = _Classification(num_classes, num_examples, reference)
  return Loss(
    task.init,
    task.apply,
    task.measure,
    task.end_epoch,
    task.check,
    last_only=True,
    memory=Memory(task.apply, task.observe, task.write),
    valid=task.valid,
  )


class _Classification(NamedTuple):
  """The functions of a terminal classification loss.

  Attributes:
    num_classes: C.
    num_examples: N if targets are pairs (labels, example ids), else None.
    reference: The reference of the Div term; None for no such term.
  """

  num_classes: int
  num_examples: int | None
  reference: Reference | None

  def init(self, num_windows: int) -> LossState:
    if self.reference is None:
      return {}
    return self.reference.init(num_windows, self.num_classes)

  def observe(
    self, outputs: jax.Array, targets: Any, window: WindowView, loss_state: LossState
  ) -> tuple[jax.Array, Any]:
    labels, ids = self._labels_and_ids(targets, window.mask.shape[1])
    logits = widen(_last_outputs(outputs, window, self.num_classes))
    log_p = jax.nn.log_softmax(logits)
    beta = _progress(window, log_p.dtype)
    cross_entropy = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    if self.reference is None:
      return window.mean(beta * cross_entropy, window.active), ()
    examples = Examples(labels, ids, window, self.num_classes)
    q = self.reference.lookup(loss_state, examples)
    div = jnp.sum(q.astype(log_p.dtype) * log_p, axis=-1)
    per_sequence = beta * cross_entropy - (1 - beta) * div
    objective = window.mean(per_sequence, window.active)
    # The reference is a constant of later windows' objectives.
    predictions = Predictions(q, *jax.lax.stop_gradient((jnp.exp(log_p), objective)))
    return objective, self.reference.observe(loss_state, examples, predictions)

  def write(
    self, loss_state: LossState, note: Any, keep: jax.Array | bool
  ) -> LossState:
    if self.reference is None:
      return loss_state
    return self.reference.update(loss_state, note, keep)

  def apply(
    self, outputs: jax.Array, targets: Any, window: WindowView, loss_state: LossState
  ) -> tuple[jax.Array, LossState]:
    objective, note = self.observe(outputs, targets, window, loss_state)
    return objective, self.write(loss_state, note, True)

  def end_epoch(self, loss_state: LossState) -> LossState:
    if self.reference is None:
      return loss_state
    return self.reference.end_epoch(loss_state)

  def measure(self, outputs: jax.Array, targets: Any, window: WindowView) -> MetricSums:
    labels, _ = self._labels_and_ids(targets, window.mask.shape[1])
    logits = widen(_last_outputs(outputs, window, self.num_classes))
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    metrics = {
      'loss': cross_entropy(logits, labels),
      'accuracy': correct(logits, labels),
    }
    return totals_where(window.ended, metrics)

  def valid(self, targets: Any, mask: jax.Array) -> jax.Array:
    labels, ids = self._labels_and_ids(targets, mask.shape[1])
    good = in_range(labels, self.num_classes)
    if ids is not None and self.num_examples is not None:
      good &= in_range(ids, self.num_examples)
    return jnp.all(good | ~mask.any(0))

  def check(self, targets: Any, valid: np.ndarray) -> None:
    labels, ids = self._labels_and_ids(targets, valid.shape[1])
    rows = _rows(valid)
    check_indices('labels', labels, rows, self.num_classes)
    if ids is not None and self.num_examples is not None:
      check_indices('example ids', ids, rows, self.num_examples)

  def _labels_and_ids(
    self, targets: Any, batch_size: int
  ) -> tuple[jax.Array, jax.Array | None]:
    """Return the labels and the example ids, if any, after checking their shapes."""
    if self.num_examples is None:
      return _as_indices('labels', targets, batch_size), None
    found = shapes(targets)
    accepted = f'a pair (labels [B], example ids [B]), B={batch_size}'
    require(found == ((batch_size,), (batch_size,)), 'targets', accepted, found)
    labels, ids = targets
    labels = _as_indices('labels', labels, batch_size)
    return labels, _as_indices('example ids', ids, batch_size)


def _as_indices(name: str, values: Any, batch_size: int) -> jax.Array:
  """Return integers [B] of the targets in at least 32 bits."""
  values = check_shape(f'{name} in targets', values, '[B]', (batch_size,))
  require_kind(name, values, jnp.integer)
  return widen_indices(values)


def terminal_regression() -> Loss:
  """Make a squared error loss with one real target per sequence (the adding problem).

  The objective is β times the squared error at each window's last output, with β = t/T
  as for :func:`terminal_classification`. The error is the mean over the O outputs.

  Returns:
    A :class:`Loss` for targets float [B] and outputs [S, B, 1], or targets [B, O] and
    outputs [S, B, O]. It measures 'loss', the mean squared error of the last output of
    each sequence.

  Example:
    >>> from fptt_jax import losses
    >>> loss = losses.terminal_regression()  # Targets float [B].
  """

  def apply(
    outputs: jax.Array, targets: jax.Array, window: WindowView, loss_state: LossState
  ) -> tuple[jax.Array, LossState]:
    squared = _squared_errors(outputs, targets, window)
    beta = _progress(window, squared.dtype)
    return window.mean(beta * squared, window.active), loss_state

  def measure(outputs: jax.Array, targets: jax.Array, window: WindowView) -> MetricSums:
    return totals_where(
      window.ended, {'loss': _squared_errors(outputs, targets, window)}
    )

  def check(targets: Any, valid: np.ndarray) -> None:
    check_finite('targets', targets, _rows(valid))

  return Loss(no_state, apply, measure, check=check, last_only=True)


def _squared_errors(
  outputs: jax.Array, targets: jax.Array, window: WindowView
) -> jax.Array:
  """Return the mean squared error of each sequence's last output, float [B]."""
  require_kind('targets', targets, jnp.floating)
  batch_size = window.mask.shape[1]
  fits = targets.ndim in (1, 2) and targets.shape[0] == batch_size
  require(fits, 'targets', f'[B] or [B, O] with B={batch_size}', targets.shape)
  expected = targets.reshape(targets.shape[0], -1)
  predicted = _last_outputs(outputs, window, expected.shape[-1])
  return jnp.mean(squared_error(predicted, expected), axis=-1)


def _progress(window: WindowView, dtype: jnp.dtype) -> jax.Array:
  """Return β = t/length_i of each sequence, float [B], in valid steps."""
  # A sequence without valid steps has length 0 and is never active.
  return window.seen.astype(dtype) / jnp.maximum(window.lengths, 1).astype(dtype)


def _last_outputs(outputs: jax.Array, window: WindowView, features: int) -> jax.Array:
  """Return the outputs [B, features] at each sequence's last valid step."""
  require_features(outputs, features)
  if outputs.shape[0] > 1:
    outputs = take_steps(outputs, window.last)
  return outputs[0]


def _rows(valid: np.ndarray) -> np.ndarray:
  """Return which sequences have a valid step, bool [B], given bool [T, B]."""
  return np.any(valid, axis=0)
