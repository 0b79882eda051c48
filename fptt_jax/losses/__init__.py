"""Losses of one window, and the metrics that evaluation reports.

A loss sees one window at a time: the model's outputs [S, B, ...], the whole batch's
targets, and the :class:`~fptt_jax.WindowView`. Terminal tasks have one target per
sequence and build an intermediate loss for every window from it (paper, Sec. 3
"Intermediate Losses"). Sequence tasks have one target per step. Whatever a loss
remembers between windows is its state, a tree of arrays.
"""

from fptt_jax.losses._base import (
  Loss,
  LossState,
  Memory,
  MetricSums,
  compute_metrics,
)
from fptt_jax.losses._function import from_function
from fptt_jax.losses._references import Examples, Predictions, Reference
from fptt_jax.losses._sequence import sequence_classification, sequence_regression
from fptt_jax.losses._terminal import (
  DIVERGENCES,
  terminal_classification,
  terminal_regression,
)

__all__ = (
  'DIVERGENCES',
  'Examples',
  'Loss',
  'LossState',
  'Memory',
  'MetricSums',
  'Predictions',
  'Reference',
  'compute_metrics',
  'from_function',
  'sequence_classification',
  'sequence_regression',
  'terminal_classification',
  'terminal_regression',
)


def __dir__() -> list[str]:
  """List the public names only."""
  return sorted(__all__)
