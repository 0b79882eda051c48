"""Watching a run from the host: the first numbers that are not finite, a λ that runs
away.
"""

import numpy as np

from fptt_jax._checks import (
  FLOAT32_MAX,
  INT32_MAX,
  as_floats,
  check_integer,
  check_number,
)
from fptt_jax._types import StepMetrics

RUNAWAY = 100.0
"""λ has run away when its norm is so many times what was seen before."""


def raise_if_nonfinite(
  metrics: StepMetrics, *, first_update: int = 0, radius: float | None = None
) -> None:
  """Raises where :func:`find_nonfinite` finds something, which is the error's message;
  same arguments.

  Raises:
    FloatingPointError: a loss or gradient norm is not finite and its update was not
      skipped, or targets or lengths are out of range.
    ValueError, TypeError: as :func:`find_nonfinite`.
  """
  found = find_nonfinite(metrics, first_update=first_update, radius=radius)
  if found is not None:
    raise FloatingPointError(found)


def find_nonfinite(
  metrics: StepMetrics, *, first_update: int = 0, radius: float | None = None
) -> str | None:
  """Describe the first update whose loss or gradient norm is not finite and that was
  not skipped, or whose targets or lengths are out of range.

  Args:
    metrics: of one run, concrete: of a step, or of N steps with a leading axis, as
      `fptt_jax.scan_train_steps` gives them. Of a population take one member's:
      `jax.tree.map(lambda leaf: leaf[r], metrics)`, or `leaf[:, r]` after N steps.
    first_update: number of the first update in them. Batches, windows and updates count
      from 0, updates that were skipped too.
    radius: what `fptt_jax.spectral_radius` says of the settings, for the report.

  Returns: None where all is finite; else a sentence: where, the loss and the gradient
    norm, those of the last finite update before, the norm of λ where there is one, the
    radius where given. Of targets or lengths out of range (`StepMetrics.invalid`) just
    where: such an update was not applied.

  Raises:
    ValueError: metrics with other axes, or a number outside its range.
    TypeError: what are no metrics, or none that can be looked at here.

  Example:
    >>> import numpy as np, fptt_jax
    >>> losses, norms = np.array([2.31, np.nan]), np.array([14.2, np.inf])
    >>> metrics = fptt_jax.StepMetrics(losses, norms, {}, skipped=np.zeros(2, bool), lambda_norm=np.float32(0))
    >>> fptt_jax.find_nonfinite(metrics, first_update=6)
    'loss is nan in window 1 of 2 (update 7): gradient norm inf; the last finite update, 6, had loss 2.31 and gradient norm 14.2.'
  """
  check_integer('first_update', first_update, 0, INT32_MAX, 'an integer >= 0')
  if radius is not None:
    check_number('radius', radius, 0, FLOAT32_MAX, 'a finite number >= 0')
  if not isinstance(metrics, StepMetrics):
    raise TypeError(
      f'metrics must be a fptt_jax.StepMetrics, got {type(metrics).__name__}.'
    )
  numbers = {
    name: as_floats(name, getattr(metrics, name))
    for name in ('loss', 'grad_norm', 'lambda_norm')
  }
  skipped = np.asarray(metrics.skipped)
  shape = numbers['loss'].shape
  fits = (
    numbers['lambda_norm'].shape == shape[:-1]
    and numbers['grad_norm'].shape == skipped.shape == shape
  )
  if len(shape) not in (1, 2) or not fits or 0 in shape or skipped.dtype != bool:
    got = ', '.join(f'{name} {array.shape}' for name, array in numbers.items())
    raise ValueError(
      'metrics must be of one run: loss, grad_norm and skipped (booleans) [U] or [N, '
      'U], lambda_norm of each batch; '
      f'got {got}, skipped {skipped.dtype} {skipped.shape}.'
    )
  invalid = (
    np.zeros(shape, bool) if metrics.invalid is None else np.asarray(metrics.invalid)
  )
  if invalid.shape != shape or invalid.dtype != bool:
    raise ValueError(
      f'metrics.invalid must be booleans {shape} or None, got {invalid.dtype} '
      f'{invalid.shape}.'
    )
  num_batches, num_updates = shape if len(shape) == 2 else (1, *shape)
  losses, norms, lambdas = (array.ravel() for array in numbers.values())
  finite = np.isfinite(losses) & np.isfinite(norms)
  fine = (finite | skipped.ravel()) & ~invalid.ravel()
  if fine.all():
    return None

  at = int(fine.argmin())
  batch, window = divmod(at, num_updates)
  loss, norm = f'{losses[at]:.3g}', f'{norms[at]:.3g}'
  where = f'window {window} of {num_updates} (update {first_update + at})'
  if len(shape) == 2:
    where = f'batch {batch} of {num_batches}, {where}'
  if invalid.flat[at]:
    return f'targets or lengths are out of range in {where}, which was not applied: fptt_jax.validate_batch tells more.'
  if np.isfinite(losses[at]):
    parts = [f'gradient norm is {norm} in {where}: loss {loss}']
  else:
    parts = [f'loss is {loss} in {where}: gradient norm {norm}']
  before = np.flatnonzero(finite[:at])
  if len(before):
    last = before[-1]
    parts.append(
      f'the last finite update, {first_update + last}, had loss {losses[last]:.3g} and '
      f'gradient norm {norms[last]:.3g}'
    )
  if lambdas[: batch + 1].any():
    earlier = f'{lambdas[batch - 1]:.3g} before and ' if batch else ''
    parts.append(f'norm of lambda {earlier}{lambdas[batch]:.3g} after the batch')
  if radius is not None:
    parts.append(f"the recursion's spectral radius is {radius:.3g} (unstable above 1)")
  return '; '.join(parts) + '.'


def lambda_diverges(
  lambda_norms: np.typing.ArrayLike, grad_norms: np.typing.ArrayLike
) -> bool:
  """Whether λ has run away by the last of N batches, most often long before the loss is
  no longer finite.

  λ is an estimate of the window loss's gradient: where the recursion is stable a filter
  of past gradients with a gain of a few; where it is not, λ grows exponentially. So it
  has run away when its norm is more than 100 times the largest norm, of a gradient or
  its own, in the first half of the batches. Not in all so far: on a squared error the
  gradient grows along with the weights, and λ never gets ahead of it. Its own, since by
  Adam λ is of the size of α times the step, however small the gradients are.

  Args:
    lambda_norms: [N], `StepMetrics.lambda_norm` of all batches so far.
    grad_norms: [N, U], their `StepMetrics.grad_norm`. Numbers that are not finite (of
      skipped updates) are left out.

  Returns: True, too, where the last norm of λ is not finite. With one batch, or without
    `fptt`, nothing can be seen: False.

  Raises:
    ValueError: other shapes, or no batch.
    TypeError: what are no real numbers.

  Example:
    >>> import fptt_jax
    >>> fptt_jax.lambda_diverges([0.1, 0.2, 5.0, 200.0], [[1.0, 1.1]] * 4)
    True
  """
  lambdas, grads = (
    as_floats('lambda_norms', lambda_norms),
    as_floats('grad_norms', grad_norms),
  )
  if (
    lambdas.ndim != 1
    or grads.ndim != 2
    or len(lambdas) != len(grads)
    or not lambdas.size
  ):
    raise ValueError(
      'expected norms of lambda [N] and of gradients [N, U], N >= 1; got '
      f'{lambdas.shape} and {grads.shape}.'
    )
  half = (len(lambdas) + 1) // 2
  seen = np.concatenate([lambdas[:half], grads[:half].ravel()])
  largest = seen[np.isfinite(seen)].max(initial=0)
  return bool(not np.isfinite(lambdas[-1]) or lambdas[-1] > RUNAWAY * largest > 0)
