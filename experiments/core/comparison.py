"""Paired comparisons of methods over seeds."""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import stats


class Comparison(NamedTuple):
  """Comparison of a method with a rival over the seeds that both have.

  Attributes:
    wins: number of seeds on which the method is better.
    seeds: number of seeds.
    p_value: p of the paired t-test, two-sided; None if a run of either diverged or
      fewer than two seeds differ.
    is_better: whether the method's mean is better.
    difference: mean of the method's losses minus the rival's; None if a run of either
      diverged.
    half_width: half the width of the 95 % confidence interval of `difference`; None
      where `p_value` is None.
  """

  wins: int
  seeds: int
  p_value: float | None
  is_better: bool
  difference: float | None = None
  half_width: float | None = None


def compare(
  method: Sequence[float | None], rival: Sequence[float | None]
) -> Comparison:
  """Compare losses of two methods, seed by seed.

  Args:
    method: its losses, one per seed, the lower the better, on the scale of the test;
      None for a run that diverged, which loses against any other.
    rival: the rival's losses at the same seeds.
  """
  pairs = [(_worst(a), _worst(b)) for a, b in zip(method, rival, strict=True)]
  differences = np.array(
    [a - b if a < math.inf or b < math.inf else 0.0 for a, b in pairs]
  )
  wins = int((differences < 0).sum())
  if not np.isfinite(differences).all():
    better = sum(a for a, _ in pairs) < sum(b for _, b in pairs)
    return Comparison(wins, len(pairs), None, better)
  p_value, half_width = None, None
  mean = float(differences.mean())
  # Pairs that both diverged are ties, which have no size.
  is_known = bool(np.isfinite(pairs).all())
  if is_known and len(pairs) > 1 and np.ptp(differences) > 0:
    test = stats.ttest_1samp(differences, 0.0)
    p_value = float(test.pvalue)
    half_width = interval(differences.tolist())
  known = mean if is_known else None
  return Comparison(wins, len(pairs), p_value, mean < 0, known, half_width)


def _worst(loss: float | None) -> float:
  return math.inf if loss is None or math.isnan(loss) else loss


def interval(values: Sequence[float]) -> float | None:
  """Return half the width of the 95 % confidence interval of a mean.

  It is Student's, t(0.975, n - 1) s / √n.

  Args:
    values: n numbers; fewer than two have no interval, None.
  """
  if len(values) < 2:
    return None
  return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Return p-values adjusted for their number by Holm's step-down method.

  With m comparisons and their p-values in ascending order, the i-th becomes the
  greatest of (m - j + 1) p_j over j <= i, at most 1.

  Args:
    p_values: p-values; None where a comparison has none, such as a tie or one with a
      run that diverged. It stays None, and counts among the m as one with p = 1.
  """
  known = [(p, place) for place, p in enumerate(p_values) if p is not None]
  adjusted: list[float | None] = [None] * len(p_values)
  greatest = 0.0
  for rank, (p, place) in enumerate(sorted(known)):
    greatest = max(greatest, min(1.0, (len(p_values) - rank) * p))
    adjusted[place] = greatest
  return adjusted
