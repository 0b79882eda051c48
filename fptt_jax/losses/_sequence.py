"""Losses with one target per step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fptt_jax._checks import check_shape, require
from fptt_jax._dtypes import widen
from fptt_jax._windows import WindowView
from fptt_jax.losses._base import (
  Loss,
  LossState,
  MetricSums,
  PerStep,
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


def sequence_classification(num_classes: int, *, accuracy: bool = False) -> Loss:
  """Make a cross-entropy loss with one label per step, as for language modeling.

  The objective is the mean cross-entropy over the window's valid steps.

  Args:
    num_classes: C >= 2, for language the vocabulary's size V. Outputs are logits
      [S, B, C].
    accuracy: Whether to measure the accuracy as well, at the cost of one more pass over
      the logits.

  Returns:
    A :class:`Loss` for targets int [T, B]. It measures 'loss' in nats per step;
    perplexity is its exponential.

  Raises:
    ValueError: If `num_classes` is not an integer >= 2.

  Example:
    >>> from fptt_jax import losses
    >>> loss = losses.sequence_classification(10_000)  # Targets int [T, B].
  """
  num_classes = check_classes(num_classes)

  def per_step(outputs: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    require_kind('targets', labels, jnp.integer)
    require(labels.ndim == 2, 'targets of a window', '[S, B]', labels.shape)
    require_features(outputs, num_classes)
    labels = widen_indices(labels)
    logits = widen(outputs)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    metrics = {'loss': cross_entropy(logits, labels)}
    if accuracy:
      metrics['accuracy'] = correct(logits, labels)
    return metrics

  def check(targets: Any, valid: np.ndarray) -> None:
    check_indices('targets', targets, valid, num_classes)

  def valid(targets: Any, mask: jax.Array) -> jax.Array:
    require_kind('targets', targets, jnp.integer)
    check_shape('targets', targets, '[T, B]', mask.shape)
    return jnp.all(in_range(targets, num_classes) | ~mask)

  return _mean_over_steps(per_step, check)._replace(valid=valid)


def sequence_regression() -> Loss:
  """Make a mean squared error loss with one real target per step.

  The mean is over the window's valid steps and the O outputs.

  Returns:
    A :class:`Loss` for targets float [T, B, O] and outputs [S, B, O]. It measures
    'loss', the mean squared error per step.

  Example:
    >>> from fptt_jax import losses
    >>> loss = losses.sequence_regression()  # Targets float [T, B, O].
  """

  def per_step(outputs: jax.Array, expected: jax.Array) -> dict[str, jax.Array]:
    require_kind('targets', expected, jnp.floating)
    # Shapes that differ would broadcast.
    check_shape('targets of a window', expected, '[S, B, O]', outputs.shape)
    squared = squared_error(outputs, expected)
    return {'loss': squared.reshape(*outputs.shape[:2], -1).mean(-1)}

  def check(targets: Any, valid: np.ndarray) -> None:
    check_finite('targets', targets, valid)

  return _mean_over_steps(per_step, check)


def _mean_over_steps(
  per_step: Callable[[jax.Array, Any], dict[str, jax.Array]],
  check: Callable[[Any, np.ndarray], None],
) -> Loss:
  """Return the loss that is the mean of `per_step`'s 'loss' over the valid steps."""

  def apply(
    outputs: jax.Array, targets: Any, window: WindowView, loss_state: LossState
  ) -> tuple[jax.Array, LossState]:
    losses = per_step(outputs, window.slice(targets, 'targets'))['loss']
    return window.mean(losses, window.mask), loss_state

  def measure(outputs: jax.Array, targets: Any, window: WindowView) -> MetricSums:
    return totals_where(
      window.mask, per_step(outputs, window.slice(targets, 'targets'))
    )

  factored = PerStep(per_step, apply, measure)
  return Loss(no_state, apply, measure, check=check, per_step=factored)
