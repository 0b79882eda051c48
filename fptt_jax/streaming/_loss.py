"""Losses of windows in which some steps have no label."""

from typing import Any

import jax
import jax.numpy as jnp

from fptt_jax._windows import WindowView
from fptt_jax.losses import Loss, LossState, MetricSums


def partly_labeled(loss: Loss) -> Loss:
  """Return a loss for targets (y, labeled) that leaves out steps without a label.

  Args:
    loss: Loss with one target per step.

  Returns:
    A loss whose `labeled` is bool [T, B], or None if all steps have a label. Labels
    out of range are for the caller to find, since a window must move the hidden state
    in any case.
  """

  def apply(
    outputs: jax.Array, targets: Any, window: WindowView, loss_state: LossState
  ) -> tuple[jax.Array, LossState]:
    y, labeled = targets
    return loss.apply(outputs, y, _narrowed(window, labeled), loss_state)

  def measure(outputs: jax.Array, targets: Any, window: WindowView) -> MetricSums:
    y, labeled = targets
    return loss.measure(outputs, y, _narrowed(window, labeled))

  return Loss(init=loss.init, apply=apply, measure=measure, end_epoch=loss.end_epoch)


def _narrowed(window: WindowView, labeled: jax.Array | None) -> WindowView:
  """Return the view of a sequence's only window without the steps that lack a label."""
  if labeled is None:
    return window
  mask = window.mask & window.slice(labeled)
  seen = mask.sum(0, dtype=jnp.int32)
  steps = jnp.arange(window.size, dtype=jnp.int32)[:, None]
  return window._replace(
    ragged=True,
    masked=True,
    mask=mask,
    lengths=seen,
    seen=seen,
    active=mask.any(0),
    last=jnp.max(jnp.where(mask, steps, 0), axis=0),
  )
