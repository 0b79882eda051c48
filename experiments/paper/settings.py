"""Settings of `python -m experiments.paper`."""

import dataclasses

from experiments.core import flags
from experiments.core.flags import check, option
from experiments.paper import items, studies
import fptt_jax

TUNE_SEED = 1000
"""Seed of all tuning runs.

Reported runs must not use it, since their settings were chosen on its draws.
"""


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the command: the item, and the part of it to run."""

  item: str = option('fig2', 'figure, table or study', (*items.ITEMS, *studies.STUDIES))
  scale: str = option(
    'cpu',
    "'full': the paper's setting; 'short': its model, data and length in fewer epochs, "
    "rate annealed to 0; 'cpu': reduced, for two cores; 'smoke': a test of seconds, "
    'whose numbers mean nothing',
    items.SCALES,
  )
  methods: tuple[str, ...] = option(
    ('all',),
    f'only lines of these methods: {", ".join(fptt_jax.METHODS)}',
    choices=('all', *fptt_jax.METHODS),
    required=True,
  )
  lines: tuple[str, ...] = option(
    ('all',),
    "only the lines of these names, as the table shows them; or patterns, as 'mnist-*'",
    required=True,
  )
  seeds: tuple[int, ...] = option(
    (0,), 'seeds, one run each: 0,1,2 or 0:3', within='[0, inf)', required=True
  )
  tune: bool = option(
    False, 'try the declared learning rates, choose by validation, and stop'
  )
  allow_config_change: bool = option(
    False, 'resume the runs in --workdir with other settings than they began with'
  )
  data_dir: str = option(
    '',
    'folder with the official data files (or mnist/, cifar10/, ptb/ in it); default a '
    'prepared copy or a download',
  )
  workdir: str = option(
    '', 'folder; default runs/ITEM-SCALE, so that the same command resumes'
  )

  def __post_init__(self) -> None:
    flags.check_fields(self)
    check(
      TUNE_SEED not in self.seeds,
      'seeds',
      self.seeds,
      f'without {TUNE_SEED}, which tuning draws from',
    )
    check(
      not self.tune or self.seeds == type(self).seeds,
      'seeds',
      self.seeds,
      f'left out with --tune, which draws from seed {TUNE_SEED}',
    )
    if self.item in studies.STUDIES:
      check(
        self.scale != 'short' or self.item in studies.SHORT,
        'scale',
        self.scale,
        f'another one with --item={self.item}, which has no such scale',
      )
      # A study ignores these flags; a user who sets them expects an effect.
      for name in ('methods', 'lines', 'seeds', 'allow_config_change'):
        value = getattr(self, name)
        is_default = value == getattr(type(self), name)
        expected = f'left out with --item={self.item}, which is one study'
        check(is_default, name, value, expected)
    check(
      self.item in items.ITEMS or not self.tune,
      'tune',
      self.tune,
      f'false with --item={self.item}, which has nothing to tune',
    )
