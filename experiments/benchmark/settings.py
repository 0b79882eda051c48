"""Settings of `python -m experiments.benchmark`."""

import dataclasses

from experiments.benchmark.cases import CASES, DEFAULT_CASES
from experiments.core import flags
from experiments.core.flags import option


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the benchmark."""

  part: str = option(
    'all',
    "what to measure; 'influence' and 'gpu-day' are not part of 'all'",
    (
      'all',
      'rivals',
      'cells',
      'latency',
      'growth',
      'population',
      'influence',
      'gpu-day',
    ),
  )
  cases: tuple[str, ...] = option(
    DEFAULT_CASES, "cases that the part 'rivals' times", CASES, required=True
  )
  without: tuple[str, ...] = option(
    (), 'leave out the rivals whose names contain one of these words'
  )
  rounds: int = option(9, 'timed calls of each program', within='[1, inf)')
  minutes: float = option(
    12.0, 'minutes after which gpu-day starts no further stage', within='(0, inf)'
  )
  precision: str = option(
    'float32',
    'precision of matrix products on a GPU, for systems whose names do not give one',
    ('float32', 'tensorfloat32'),
  )
  workdir: str = option(
    '',
    'folder, in which rows join those of earlier commands; default runs/benchmark-TIME',
  )

  def __post_init__(self) -> None:
    flags.check_fields(self)
