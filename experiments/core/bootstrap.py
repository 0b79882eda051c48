"""Targets of early windows that mix in a prediction of a later one.

A task with one target per sequence gives it to all windows, although an early window
has not seen all that the target depends on. The rest of it is noise there. Bootstrapped
windows have it replaced, in part, by what a mean of the weights predicts at the end of
the next window: of K windows, window k gets (1 - share) y + share f[k + 1], and the
last one gets y. This is temporal-difference learning within a sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.core import averaging
import fptt_jax


class Targets(NamedTuple):
  """Targets of a train step.

  Attributes:
    final: [B] or [B, O], those of the sequences, which metrics are of.
    by_window: float [B, K, O], those of the windows; of classes, their probabilities.
  """

  final: jax.Array
  by_window: jax.Array


def with_window_targets(loss: fptt_jax.Loss) -> fptt_jax.Loss:
  """Return a terminal loss whose train steps take :class:`Targets`.

  Evaluation takes the targets of the sequences as before.

  Args:
    loss: `terminal_regression`, or `terminal_classification` without divergence.
  """

  def apply(
    outputs: jax.Array, targets: Targets, window: fptt_jax.WindowView, loss_state: Any
  ) -> tuple[jax.Array, Any]:
    wanted = targets.by_window[:, window.k]
    if not _are_classes(targets.final):
      return loss.apply(outputs, wanted, window, loss_state)
    rows = jnp.arange(outputs.shape[1])
    logits = outputs[0] if len(outputs) == 1 else outputs[window.last, rows]
    entropy = optax.losses.softmax_cross_entropy(logits, wanted)
    progress = window.seen / window.lengths
    return window.mean(progress * entropy, window.active), loss_state

  valid = loss.valid
  return loss._replace(
    apply=apply,
    measure=lambda outputs, targets, window: loss.measure(
      outputs, _final(targets), window
    ),
    valid=valid and (lambda targets, mask: valid(_final(targets), mask)),
  )


def bootstrapped(
  trainer: fptt_jax.Trainer,
  plan: fptt_jax.WindowPlan,
  share: Callable[[jax.Array], jax.Array],
) -> fptt_jax.Trainer:
  """Return a trainer whose steps give each window a target of its own.

  Each step runs the mean of the weights over the batch once, without a gradient.

  Args:
    trainer: trainer of :func:`with_window_targets` whose optimizer contains
      `averaging.running_mean`.
    plan: its windows.
    share: (batches so far) -> share of the prediction in the targets.
  """

  def step(
    state: fptt_jax.TrainState, batch: fptt_jax.Batch
  ) -> tuple[fptt_jax.TrainState, fptt_jax.StepMetrics]:
    mean = averaging.running_params(state.opt_state, state.params)
    outputs = trainer.predict(mean, batch.inputs)[plan.ends - 1]
    targets = mixed(batch.targets, outputs, share(state.step_count))
    return trainer.step(state, batch._replace(targets=targets))

  return trainer._replace(step=jax.jit(step))


def mixed(final: jax.Array, outputs: jax.Array, share: jax.Array) -> Targets:
  """Mix the targets of sequences with predictions.

  Args:
    final: [B] or [B, O], numbers, or int [B], classes.
    outputs: [K, B, O], outputs at the ends of the windows; of classes, logits.
    share: [], share of the prediction.
  """
  last = final.reshape(1, len(final), -1)
  if _are_classes(final):
    last = jax.nn.one_hot(final[None], outputs.shape[-1], dtype=outputs.dtype)
    outputs = jax.nn.softmax(outputs)
  early = (1 - share) * last + share * outputs[1:]
  return Targets(final, jnp.concatenate([early, last]).swapaxes(0, 1))


def _final(targets: Any) -> Any:
  """Return the targets of the sequences, in a train step and in evaluation."""
  return targets.final if isinstance(targets, Targets) else targets


def _are_classes(final: jax.Array) -> bool:
  """Return whether targets are numbers of classes."""
  return jnp.issubdtype(final.dtype, jnp.integer)
