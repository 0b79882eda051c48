"""The settings all experiments share: training method, FPTT's hyper-parameters,
optimizer.
"""

import dataclasses
import itertools
import math
from typing import ClassVar
import warnings

import jax
import optax

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
    ('fptt',), f'methods to train by, one after the other: {", ".join(METHODS)}'
  )
  seeds: tuple[int, ...] = option((0,), 'seeds, one run each: 0,1,2 or 0:3')
  num_windows: int | None = option(
    None,
    'K, updates a sequence; default round(sqrt(T)), for methods that do not fix it',
  )
  truncation_steps: int | None = option(
    None,
    "k of method 'tbptt_final': the last steps that are differentiated; default "
    'min(300, T)',
  )
  alpha: float = option(0.5, 'strength of the tie of W to its summary')
  alpha_warmup: int = option(
    0,
    'windows over which alpha grows linearly from a tenth ("starting small, gradually '
    'increased"); 0 for none',
  )
  beta: float = option(0.5, 'mixing of the summary')
  kappa: float = option(1.0, 'scale of the quadratic term')
  rho: float = option(0.0, 'fades the linear term')
  correction: str = option(
    'eq6',
    'coefficient of the previous gradient: 1 (Eq. 6) or 1/2 (Eq. 4)',
    ('eq6', 'eq4'),
  )
  gradient_estimate: str = option(
    'running',
    'estimate of the gradient at the new weights',
    ('running', 'recomputed', 'lagged'),
  )
  inner_steps: int = option(1, 'gradient steps a window')
  optimizer: str = option('adam', 'base optimizer', ('adam', 'sgd'))
  lr: float = option(1e-3, 'learning rate')
  momentum: float | None = option(
    None,
    "decay of the first moment: b1 of 'adam', default 0.9; heavy-ball momentum of "
    "'sgd', default 0. May be negative",
  )
  weight_decay: float = option(
    0.0, 'added to the gradient times the weights, after clipping'
  )
  clip: float = option(0.0, 'largest global norm of the gradient; 0 does not clip')
  clip_regularizer: bool = option(
    True,
    'clip loss plus regularizer, as the release does, rather than the loss gradient '
    'alone',
  )
  on_nonfinite: str = option(
    'stop',
    'what a loss or gradient that is not finite does: end the run, or have its update '
    'skipped',
    ('stop', 'skip'),
  )
  grid: tuple[str, ...] = option(
    (),
    'values to compare, every combination: lr=1e-3:3e-4,alpha=0.1:0.5, out of '
    f'{", ".join(HYPERPARAMETERS)}',
  )
  population: int = option(
    0,
    'runs (seeds, grid) trained side by side in one program; 0 chooses: all, on a CPU '
    'one where a batch is better split',
  )
  devices: int = option(
    0,
    'devices to split a batch or a population over; 0 chooses: all of an '
    "accelerator's, a CPU's cores where that pays, or 1",
  )
  steps_per_call: int = option(
    25,
    'batches that run as one compiled program, after which progress shows; 0: all up '
    'to an evaluation',
  )
  data_parallel: bool = option(
    False, 'split every batch over all devices, those of other processes included'
  )
  shard_params: bool = option(
    False,
    'split weights and optimizer state over these devices, too, for networks of many '
    'parameters',
  )
  coordinator: str = option(
    '',
    'HOST:PORT of the first of several processes; SLURM and TPU hosts tell by '
    'themselves',
  )
  num_processes: int | None = option(
    None, 'how many processes there are; 1: this one alone, whatever started it'
  )
  process_id: int | None = option(None, 'the number of this process, from 0')
  max_to_keep: int = option(
    2,
    'checkpoints to keep of each run, the last ones; each holds the weights of the '
    'best epoch as well',
  )
  checkpoint_minutes: float = option(
    10.0,
    'minutes after which a run is saved also before its epoch or interval has ended',
  )
  allow_config_change: bool = option(
    False, 'go on with the runs in --workdir under other settings than they began with'
  )
  logger: str = option(
    'none', 'also write curves, within an epoch too, for this program', LOGGERS
  )
  evaluate_at: str = option(
    'w', 'evaluate at the weights or at their summary (fptt only)', ('w', 'w_bar')
  )

  def __post_init__(self) -> None:
    check_fields(self)
    installed = is_available(self.logger)
    check(
      installed,
      'logger',
      self.logger,
      "'none' without tensorboardX: pip install tensorboardX",
    )
    check(
      bool(self.method) and set(self.method) <= set(METHODS),
      'method',
      self.method,
      f'out of {", ".join(METHODS)}',
    )
    check(
      bool(self.seeds) and min(self.seeds, default=-1) >= 0,
      'seeds',
      self.seeds,
      'integers >= 0',
    )
    check(
      self.num_windows is None or self.num_windows >= 1,
      'num_windows',
      self.num_windows,
      'at least 1',
    )
    check(
      len(set(self.method)) == len(self.method),
      'method',
      self.method,
      'named once each',
    )
    check(
      len(set(self.seeds)) == len(self.seeds),
      'seeds',
      self.seeds,
      'different from each other',
    )
    check(
      self.truncation_steps is None or self.truncation_steps >= 1,
      'truncation_steps',
      self.truncation_steps,
      'at least 1',
    )
    check(
      self.lr is None or 0 < self.lr < math.inf, 'lr', self.lr, 'a finite number > 0'
    )
    check(-1 < self.first_moment < 1, 'momentum', self.momentum, 'in (-1, 1)')
    check(
      0 <= self.weight_decay < math.inf,
      'weight_decay',
      self.weight_decay,
      'a finite number >= 0',
    )
    check(self.alpha_warmup >= 0, 'alpha_warmup', self.alpha_warmup, 'an integer >= 0')
    check(
      not self.shard_params or self.data_parallel,
      'shard_params',
      self.shard_params,
      'false without --data_parallel',
    )
    together = (self.data_parallel or self.coordinator) and (
      self.population > 1 or self.devices > 0
    )
    check(
      not together,
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
    check(
      self.num_processes is None or self.num_processes >= 1,
      'num_processes',
      self.num_processes,
      'at least 1',
    )
    alone = not self.coordinator and (self.num_processes or 1) > 1
    check(not alone, 'num_processes', self.num_processes, '1 without --coordinator')
    inside = 0 <= (self.process_id or 0) < (self.num_processes or 1) or not any(given)
    check(
      inside,
      'process_id',
      self.process_id,
      f'from 0 to {(self.num_processes or 1) - 1}, one less than --num_processes',
    )
    check(
      self.max_to_keep >= 2,
      'max_to_keep',
      self.max_to_keep,
      'at least 2: runs side by side may have to go back by one',
    )
    check(
      self.checkpoint_minutes > 0,
      'checkpoint_minutes',
      self.checkpoint_minutes,
      'a number > 0',
    )
    for name in ('steps_per_call', 'devices', 'population'):
      check(getattr(self, name) >= 0, name, getattr(self, name), 'an integer >= 0')
    check(0 <= self.clip < math.inf, 'clip', self.clip, 'a finite number >= 0')
    inside = (
      self.clip_regularizer or not self.clip or self.gradient_estimate != 'recomputed'
    )
    check(
      inside,
      'clip_regularizer',
      self.clip_regularizer,
      'true with --gradient_estimate=recomputed, whose lambda is not clipped',
    )
    with (
      warnings.catch_warnings()
    ):  # Raises on FPTT options of no meaning; warnings come when it is used.
      warnings.simplefilter('ignore')
      try:
        regularize(self, optax.identity(), self.alpha, self.beta, self.kappa)
      except ValueError as error:
        raise ValueError(f'--{error}') from error
    self.variants()

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


def regularize(
  recipe: Recipe,
  base: optax.GradientTransformation,
  alpha: jax.typing.ArrayLike,
  beta: jax.typing.ArrayLike,
  kappa: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
  """FPTT around `base`; the recipe says what is not given."""
  warmup = optax.linear_schedule(0.1, 1.0, recipe.alpha_warmup)
  return fptt_jax.fptt(
    base,
    alpha=(lambda count: alpha * warmup(count)) if recipe.alpha_warmup else alpha,
    beta=beta,
    kappa=kappa,
    rho=recipe.rho,
    correction=recipe.correction,
    gradient_estimate=recipe.gradient_estimate,
    inner_steps=recipe.inner_steps,
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
