"""Watching a run from the host: non-finite numbers, and a diverging λ."""

from typing import NamedTuple

import jax
import numpy as np

from fptt_jax._checks import (
  FLOAT32_MAX,
  INT32_MAX,
  as_floats,
  check_integer,
  check_number,
  check_shape,
  check_type,
  describe,
  require,
)
from fptt_jax._types import StepMetrics

DIVERGENCE_FACTOR = 100.0
"""λ diverges when its norm is so many times the largest norm seen before."""


def raise_if_nonfinite(
  metrics: StepMetrics, *, first_update: int = 0, radius: float | None = None
) -> None:
  """Raise an error where :func:`find_nonfinite` finds something.

  Args:
    metrics: As for :func:`find_nonfinite`.
    first_update: As for :func:`find_nonfinite`.
    radius: As for :func:`find_nonfinite`.

  Raises:
    FloatingPointError: A loss or gradient norm is not finite and its update was not
      skipped, or targets or lengths are out of range.
    ValueError, TypeError: As for :func:`find_nonfinite`.

  Example:
    After each call of a train step, or once per epoch::

      state, metrics = trainer.step(state, batch)
      fptt_jax.raise_if_nonfinite(metrics)
  """
  found = find_nonfinite(metrics, first_update=first_update, radius=radius)
  if found is not None:
    raise FloatingPointError(found)


def find_nonfinite(
  metrics: StepMetrics, *, first_update: int = 0, radius: float | None = None
) -> str | None:
  """Describe the first update that was not finite and was not skipped.

  Updates of targets or lengths out of range count, too.

  Args:
    metrics: Concrete metrics of one run: of one step, or of N steps with a leading
      axis, as `fptt_jax.scan_train_steps` returns them. For a population, pass those of
      one member: see :func:`fptt_jax.take_member`.
    first_update: Index of the first update in `metrics`. Batches, windows and updates
      are counted from 0; skipped updates count.
    radius: Spectral radius from `fptt_jax.spectral_radius`, for the description.

  Returns:
    None if all is finite. Otherwise a sentence with the place, the loss, the gradient
    norm, those of the last finite update before it, the norm of λ with `fptt`, and the
    radius. Of targets or lengths out of range (`StepMetrics.invalid`) only the place:
    such an update was not applied.

  Raises:
    ValueError: `metrics` has other axes, or a number is out of range.
    TypeError: `metrics` is not a `StepMetrics`, or holds traced arrays.

  Example:
    >>> import numpy as np, fptt_jax
    >>> losses, norms = np.array([2.31, np.nan]), np.array([14.2, np.inf])
    >>> metrics = fptt_jax.StepMetrics(
    ...   losses, norms, {}, skipped=np.zeros(2, bool), lambda_norm=np.float32(0)
    ... )
    >>> found = fptt_jax.find_nonfinite(metrics, first_update=6)
    >>> print(found)  # doctest: +NORMALIZE_WHITESPACE
    loss is nan in window 1 of 2 (update 7): gradient norm inf; the last finite update,
    6, had loss 2.31 and gradient norm 14.2.
  """
  check_integer('first_update', first_update, 0, INT32_MAX, 'an integer >= 0')
  if radius is not None:
    check_number('radius', radius, 0, FLOAT32_MAX, 'a finite number >= 0')
  run = _as_run(metrics)
  finite = np.isfinite(run.losses) & np.isfinite(run.norms)
  # A skipped update did no harm, but a batch with a bad label must be reported.
  fine = (finite | run.skipped) & ~run.invalid
  if fine.all():
    return None
  # The first one explains those after it.
  at = int(fine.argmin())
  batch, window = divmod(at, run.num_updates)
  where = f'window {window} of {run.num_updates} (update {first_update + at})'
  if run.num_batches is not None:
    where = f'batch {batch} of {run.num_batches}, {where}'
  if run.invalid[at]:
    return (
      f'targets or lengths are out of range in {where}, which was not applied: '
      'call fptt_jax.validate_batch(batch, loss) to see which.'
    )
  parts = [_describe_update(run, at, where)]
  before = np.flatnonzero(finite[:at])
  if len(before):
    last = before[-1]
    parts.append(
      f'the last finite update, {first_update + last}, had loss '
      f'{run.losses[last]:.3g} and gradient norm {run.norms[last]:.3g}'
    )
  if run.lambdas[: batch + 1].any():
    earlier = f'{run.lambdas[batch - 1]:.3g} before and ' if batch else ''
    parts.append(f'norm of lambda {earlier}{run.lambdas[batch]:.3g} after the batch')
  if radius is not None:
    parts.append(f"the recursion's spectral radius is {radius:.3g} (unstable above 1)")
  return '; '.join(parts) + '.'


class _Run(NamedTuple):
  """Metrics of one run, flattened over batches and updates.

  Attributes:
    losses: float64 [N U].
    norms: float64 [N U], norms of the gradients.
    lambdas: float64 [N], norms of λ.
    skipped: bool [N U].
    invalid: bool [N U].
    num_updates: U, updates per batch.
    num_batches: N, or None for metrics of a single step.
  """

  losses: np.ndarray
  norms: np.ndarray
  lambdas: np.ndarray
  skipped: np.ndarray
  invalid: np.ndarray
  num_updates: int
  num_batches: int | None


def _as_run(metrics: StepMetrics) -> _Run:
  """Check and flatten the metrics of one run."""
  check_type('metrics', metrics, StepMetrics)
  losses = as_floats('loss', metrics.loss)
  norms = as_floats('grad_norm', metrics.grad_norm)
  lambdas = as_floats('lambda_norm', metrics.lambda_norm)
  skipped = np.asarray(metrics.skipped)
  shape: tuple[int, ...] = losses.shape
  fits = norms.shape == skipped.shape == shape and lambdas.shape == shape[:-1]
  fits = fits and len(shape) in (1, 2) and 0 not in shape and skipped.dtype == bool
  accepted = 'of one run: loss, grad_norm and bool skipped [U] or [N, U]'
  hint = 'There is one lambda_norm for each of the N batches.'
  require(fits, 'metrics', accepted, jax.tree.map(describe, metrics), hint)
  # Metrics made by hand may lack the field.
  invalid = np.zeros(shape, bool)
  if metrics.invalid is not None:
    invalid = check_shape('metrics.invalid', metrics.invalid, '[U]', shape, bool)
  return _Run(
    losses=losses.ravel(),
    norms=norms.ravel(),
    lambdas=lambdas.ravel(),
    skipped=skipped.ravel(),
    invalid=invalid.ravel(),
    num_updates=shape[-1],
    num_batches=shape[0] if len(shape) == 2 else None,
  )


def _describe_update(run: _Run, at: int, where: str) -> str:
  """Return the loss and gradient norm of an update, the non-finite one first."""
  loss = f'{run.losses[at]:.3g}'
  norm = f'{run.norms[at]:.3g}'
  if np.isfinite(run.losses[at]):
    return f'gradient norm is {norm} in {where}: loss {loss}'
  return f'loss is {loss} in {where}: gradient norm {norm}'


def lambda_diverges(
  lambda_norms: np.typing.ArrayLike, grad_norms: np.typing.ArrayLike
) -> bool:
  """Return whether λ has diverged by the last of N batches.

  λ estimates the gradient of the window loss. If the recursion is stable, λ is a filter
  of past gradients with a gain of a few; if not, λ grows exponentially. This can show
  long before the loss is no longer finite.

  λ has diverged when its norm is more than 100 times the largest norm, of a gradient or
  of λ, in the first half of the batches. Only the first half counts, because for a
  squared error gradients grow together with λ and would hide it. The norms of λ count,
  because with Adam λ has the size of α times the step, however small the gradients are.

  Args:
    lambda_norms: [N], `StepMetrics.lambda_norm` of all batches so far.
    grad_norms: [N, U], their `StepMetrics.grad_norm`. Non-finite numbers, of skipped
      updates, are ignored.

  Returns:
    Whether λ has diverged, or its last norm is not finite. False with one batch, and
    without `fptt`.

  Raises:
    ValueError: The shapes differ from these, or N is 0.
    TypeError: An argument does not hold real numbers.

  Example:
    >>> import fptt_jax
    >>> fptt_jax.lambda_diverges([0.1, 0.2, 5.0, 200.0], [[1.0, 1.1]] * 4)
    True
  """
  lambdas = as_floats('lambda_norms', lambda_norms)
  grads = as_floats('grad_norms', grad_norms)
  fits = lambdas.size and grads.ndim == 2 and lambdas.shape == grads.shape[:1]
  found = (lambdas.shape, grads.shape)
  require(fits, 'lambda_norms and grad_norms', '[N] and [N, U], N >= 1', found)
  half = (len(lambdas) + 1) // 2
  seen = np.concatenate([lambdas[:half], grads[:half].ravel()])
  largest = seen[np.isfinite(seen)].max(initial=0)
  # A comparison with NaN would be False.
  if not np.isfinite(lambdas[-1]):
    return True
  return bool(lambdas[-1] > DIVERGENCE_FACTOR * largest > 0)
