"""The settings all experiments share: training method, FPTT's hyper-parameters,
optimizer.
"""

import dataclasses
import itertools
import math
from typing import ClassVar

from experiments.core.flags import MAX_RUNS, check, check_fields, option
from experiments.core.loggers import LOGGERS, is_available
import fptt_jax

METHODS = tuple(fptt_jax.METHODS)


HYPERPARAMETERS = {
  'lr': 'learning_rate',
  'momentum': 'momentum',
  'alpha': 'alpha',
  'beta': 'beta',
  'kappa': 'kappa',
  'clip': 'clip',
}
"""Settings that runs of one program may differ in, and what the optimizer's state calls
them.
"""


REGULARIZER = ('alpha', 'beta', 'kappa')
"""Those of them that only methods with the regularizer have."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a model is trained, apart from the task."""

  COMPARABLE: ClassVar[tuple[str, ...]] = tuple(HYPERPARAMETERS)
  """Settings that --grid takes several values of."""

  method: tuple[str, ...] = option(
    ('fptt',),
    f'methods to train by, one after the other: {", ".join(METHODS)}',
    choices=METHODS,
    group='training',
    required=True,
  )
  seeds: tuple[int, ...] = option(
    (0,),
    'seeds, one run each: 0,1,2 or 0:3',
    within='[0, inf)',
    group='run',
    required=True,
  )
  num_windows: int | None = option(
    None,
    'K, updates a sequence; default round(sqrt(T)), for methods that do not fix it',
    within='[1, inf)',
    group='training',
  )
  truncation_steps: int | None = option(
    None,
    "k of method 'tbptt_final': the last steps that are differentiated; default "
    'min(300, T)',
    within='[1, inf)',
    group='training',
  )
  alpha: float = option(
    0.5, 'strength of the tie of W to its summary', within='(0, inf)', group='optimizer'
  )
  alpha_warmup: int = option(
    0,
    'windows over which alpha grows linearly from a tenth ("starting small, gradually '
    'increased"); 0 for none',
    within='[0, inf)',
    group='optimizer',
  )
  beta: float = option(0.5, 'mixing of the summary', within='(0, 1]', group='optimizer')
  kappa: float = option(
    1.0, 'scale of the quadratic term', within='[0, inf)', group='optimizer'
  )
  linear_scale: float = option(
    1.0,
    'scale of the linear term: 1 (Eq. 6) or 1/2 (Eq. 4), 0 for none',
    within='[0, 1]',
    group='optimizer',
  )
  gradient_estimate: str = option(
    'running',
    'estimate of the gradient at the new weights',
    ('running', 'recomputed', 'lagged'),
    group='optimizer',
  )
  inner_steps: int = option(
    1, 'gradient steps a window', within='[1, inf)', group='optimizer'
  )
  optimizer: str = option('adam', 'base optimizer', ('adam', 'sgd'), group='optimizer')
  lr: float = option(1e-3, 'learning rate', within='(0, inf)', group='optimizer')
  momentum: float | None = option(
    None,
    "decay of the first moment: b1 of 'adam', default 0.9; heavy-ball momentum of "
    "'sgd', default 0. May be negative",
    within='(-1, 1)',
    group='optimizer',
  )
  weight_decay: float = option(
    0.0,
    'added to the gradient times the weights, after clipping',
    within='[0, inf)',
    group='optimizer',
  )
  clip: float = option(
    0.0,
    'largest global norm of the gradient; 0 does not clip',
    within='[0, inf)',
    group='optimizer',
  )
  clip_regularizer: bool = option(
    True,
    'clip loss plus regularizer, as the release does, rather than the loss gradient '
    'alone',
    group='optimizer',
  )
  on_nonfinite: str = option(
    'stop',
    'what a loss or gradient that is not finite does: end the run, or have its update '
    'skipped',
    ('stop', 'skip'),
    group='optimizer',
  )
  grid: tuple[str, ...] = option(
    (),
    'values to compare, every combination: lr=1e-3:3e-4,alpha=0.1:0.5, out of '
    f'{", ".join(HYPERPARAMETERS)}',
    group='run',
  )
  population: int = option(
    0,
    'runs (seeds, grid) trained side by side in one program; 0 chooses: all, on a CPU '
    'one where a batch is better split',
    within='[0, inf)',
    group='run',
  )
  devices: int = option(
    0,
    'devices to split a batch or a population over; 0 chooses: all of an '
    "accelerator's, a CPU's cores where that pays, or 1",
    within='[0, inf)',
    group='devices',
  )
  steps_per_call: int = option(
    25,
    'batches that run as one compiled program, after which progress shows; 0: all up '
    'to an evaluation',
    within='[0, inf)',
    group='run',
  )
  data_parallel: bool = option(
    False,
    'split every batch over all devices, those of other processes included',
    group='devices',
  )
  shard_params: bool = option(
    False,
    'split weights and optimizer state over these devices, too, for networks of many '
    'parameters',
    group='devices',
  )
  coordinator: str = option(
    '',
    'HOST:PORT of the first of several processes; SLURM and TPU hosts tell by '
    'themselves',
    group='devices',
  )
  num_processes: int | None = option(
    None,
    'how many processes there are; 1: this one alone, whatever started it',
    within='[1, inf)',
    group='devices',
  )
  process_id: int | None = option(
    None, 'the number of this process, from 0', within='[0, inf)', group='devices'
  )
  max_to_keep: int = option(
    2,
    'checkpoints to keep of each run, the last ones; each holds the weights of the '
    'best epoch as well',
    within='[2, inf)',
    group='run',
  )
  checkpoint_minutes: float = option(
    10.0,
    'minutes after which a run is saved also before its epoch or interval has ended',
    within='(0, inf]',
    group='run',
  )
  allow_config_change: bool = option(
    False,
    'go on with the runs in --workdir under other settings than they began with',
    group='run',
  )
  logger: str = option(
    'none',
    'also write curves, within an epoch too, for this program',
    LOGGERS,
    group='run',
  )
  workdir: str = option(
    '',
    'folder of the runs; default runs/SCRIPT-TIME. The same command and folder resume '
    'the runs',
    group='run',
  )
  evaluate_at: str = option(
    'w',
    'evaluate at the weights or at their summary (fptt only)',
    ('w', 'w_bar'),
    group='training',
  )

  def __post_init__(self) -> None:
    check_fields(self)
    self._check_optimizer()
    self._check_processes()
    self.variants()

  def _check_optimizer(self) -> None:
    """Validates settings of the optimizer and logger that depend on each other.

    Raises:
      ValueError: two settings exclude each other, or the logger is not installed.
    """
    expected = "'none' without tensorboardX: pip install tensorboardX"
    check(is_available(self.logger), 'logger', self.logger, expected)
    # The recomputed gradient enters lambda unclipped, so clipping outside the
    # regularizer would mix clipped and unclipped gradients.
    is_outside = self.clip > 0 and not self.clip_regularizer
    check(
      not is_outside or self.gradient_estimate != 'recomputed',
      'clip_regularizer',
      self.clip_regularizer,
      'true with --gradient_estimate=recomputed, whose lambda is not clipped',
    )

  def _check_processes(self) -> None:
    """Validates settings of devices and processes that depend on each other.

    Raises:
      ValueError: two settings exclude each other, or one is missing.
    """
    check(
      not self.shard_params or self.data_parallel,
      'shard_params',
      self.shard_params,
      'false without --data_parallel',
    )
    is_distributed = self.data_parallel or bool(self.coordinator)
    is_placed = self.population > 1 or self.devices > 0
    check(
      not (is_distributed and is_placed),
      'population',
      self.population,
      'not given, nor --devices, with --data_parallel or --coordinator',
    )
    given = [self.num_processes is not None, self.process_id is not None]
    check(
      not self.coordinator or all(given),
      'coordinator',
      self.coordinator,
      'given with --num_processes and --process_id',
    )
    count = self.num_processes or 1
    check(
      bool(self.coordinator) or count == 1,
      'num_processes',
      self.num_processes,
      '1 without --coordinator',
    )
    check(
      not any(given) or (self.process_id or 0) < count,
      'process_id',
      self.process_id,
      f'from 0 to {count - 1}, one less than --num_processes',
    )

  @property
  def first_moment(self) -> float:
    """Decay of the first moment: what is given, or the base optimizer's usual one."""
    usual = {'adam': 0.9, 'sgd': 0.0}
    return usual[self.optimizer] if self.momentum is None else self.momentum

  def for_method(self, method: str) -> 'Recipe':
    """Returns the settings for one method, with all that depends on it filled in."""
    return self

  def variants(self) -> list[tuple[dict[str, float], 'Recipe']]:
    """The combinations of the grid, each with its configuration; without a grid ({},
    this one).

    Raises:
      ValueError: a grid of no meaning.
    """
    names, values = [], []
    for text in self.grid:
      name, _, numbers = text.partition('=')
      try:
        values.append([float(number) for number in numbers.split(':')])
      except ValueError:
        values.append([])
      expected = f'NAME=VALUE:VALUE with names out of {", ".join(HYPERPARAMETERS)}'
      check(name in HYPERPARAMETERS and len(values[-1]) > 0, 'grid', text, expected)
      check(
        len(set(values[-1])) == len(values[-1]),
        'grid',
        text,
        'of values different from each other',
      )
      check(
        name != 'clip' or min(values[-1]) > 0,
        'grid',
        text,
        'of values > 0: whether to clip is not for a grid',
      )
      without = [
        method for method in self.method if not fptt_jax.METHODS[method].regularized
      ]
      check(
        name not in REGULARIZER or not without,
        'grid',
        text,
        f'without {name}, which {", ".join(without)} does not have',
      )
      names.append(name)
    check(len(set(names)) == len(names), 'grid', self.grid, 'of names given once each')
    check(
      math.prod(map(len, values)) <= MAX_RUNS,
      'grid',
      self.grid,
      f'of at most {MAX_RUNS} combinations',
    )
    combinations = [
      dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)
    ]
    return [
      (chosen, dataclasses.replace(self, grid=(), **chosen) if chosen else self)
      for chosen in combinations
    ]

  def check_length(self, seq_len: int) -> None:
    """Raises if K or truncation_steps do not fit sequences of `seq_len` steps."""
    fits = f'an integer between 1 and the sequence length T={seq_len}'
    check((self.num_windows or 1) <= seq_len, 'num_windows', self.num_windows, fits)
    check(
      (self.truncation_steps or 1) <= seq_len,
      'truncation_steps',
      self.truncation_steps,
      f'at most T={seq_len}',
    )


def window_steps(recipe: Recipe, method: str, seq_len: int) -> int:
  """S, the steps that an update looks at."""
  _, updates = updates_per_sequence(recipe, method, seq_len)
  return seq_len // (updates // recipe.inner_steps)


def updates_per_sequence(recipe: Recipe, method: str, seq_len: int) -> tuple[int, int]:
  """(K, optimizer updates) of one sequence of `seq_len` steps."""
  setting = fptt_jax.METHODS[method]
  if setting.num_windows is None:
    num_windows = fptt_jax.make_windows(
      seq_len, num_windows=recipe.num_windows
    ).num_windows
  else:
    num_windows = seq_len if setting.num_windows == 'T' else int(setting.num_windows)
  return num_windows, (
    num_windows if setting.update_each_window else 1
  ) * recipe.inner_steps
