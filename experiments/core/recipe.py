"""Settings that all experiments share: method, hyperparameters and optimizer."""

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import optax

from experiments.core.flags import MAX_RUNS, check, check_fields, option
from experiments.core.loggers import LOGGERS, is_available
import fptt_jax

METHODS = tuple(fptt_jax.METHODS)
"""Values of --method."""


HYPERPARAMETERS = {
  'lr': 'learning_rate',
  'momentum': 'momentum',
  'alpha': 'alpha',
  'beta': 'beta',
  'kappa': 'kappa',
  'clip': 'clip',
}
"""Settings in which runs of one program may differ, with their names in the optimizer's
state.
"""


REGULARIZER = ('alpha', 'beta', 'kappa')
"""Hyperparameters of the methods with the regularizer only."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Settings of the training that do not depend on the task."""

  COMPARABLE: ClassVar[tuple[str, ...]] = tuple(HYPERPARAMETERS)
  """Settings of which --grid takes several values."""

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
    'K, windows per sequence, of methods that do not fix it; default round(sqrt(T))',
    within='[1, inf)',
    group='training',
  )
  truncation_steps: int | None = option(
    None,
    "k of method 'tbptt_final', number of last steps that are differentiated; default "
    'min(300, T)',
    within='[1, inf)',
    group='training',
  )
  alpha: float = option(
    0.5,
    'strength of the regularizer, which ties W to its summary',
    within='(0, inf)',
    group='optimizer',
  )
  alpha_warmup: int = option(
    0,
    'windows over which alpha grows linearly from a tenth ("starting small, gradually '
    'increased"); 0 for none',
    within='[0, inf)',
    group='optimizer',
  )
  beta: float = option(
    0.5, 'mixing rate of the summary', within='(0, 1]', group='optimizer'
  )
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
    "how lambda, the estimate of the gradient, is found: 'running' by its recursion, "
    "'recomputed' by a second pass over the window, 'lagged' as the last gradient",
    ('running', 'recomputed', 'lagged'),
    group='optimizer',
  )
  coupling: str = option(
    'gradient',
    'what the regularizer is added to: the gradient, as in the paper, or the base '
    "optimizer's update",
    ('gradient', 'update'),
    group='optimizer',
  )
  inner_steps: int = option(
    1, 'gradient steps per window', within='[1, inf)', group='optimizer'
  )
  optimizer: str = option('adam', 'base optimizer', ('adam', 'sgd'), group='optimizer')
  # None stands for a rate that depends on the method, see `for_method`.
  lr: float | None = option(1e-3, 'learning rate', within='(0, inf)', group='optimizer')
  momentum: float | None = option(
    None,
    "decay of the first moment: b1 of 'adam', default 0.9; heavy-ball momentum of "
    "'sgd', default 0. May be negative",
    within='(-1, 1)',
    group='optimizer',
  )
  nesterov: bool = option(False, "Nesterov's momentum, of 'sgd'", group='optimizer')
  momentum_windows: int = option(
    0,
    'keep one momentum per window index, each updated once per sequence, for this '
    'many windows (at least K); 0 keeps one momentum for all windows',
    within='[0, inf)',
    group='optimizer',
  )
  averaging: str = option(
    'none',
    "weights to evaluate: 'none', those that are trained; 'running', their mean over "
    "about --average_horizon updates; 'schedule_free', those of optax.contrib, with "
    '--momentum as its b1',
    ('none', 'running', 'schedule_free'),
    group='optimizer',
  )
  average_horizon: int = option(
    500, 'updates of the running mean', within='[1, inf)', group='optimizer'
  )
  bootstrap: float = option(
    0.0,
    'share of a prediction in the targets of early windows at the end of the run; it '
    'grows linearly from 0; the prediction is that of the mean of the weights (see '
    '--average_horizon) at the end of the next window',
    within='[0, 1]',
    group='training',
  )
  weight_decay: float = option(
    0.0,
    'factor of the weights that is added to the gradient after clipping',
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
    'reaction to a loss or gradient that is not finite: end the run, or skip the '
    'update, also one to weights that are not finite',
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
    'largest number of runs (seeds and grid values) to train in one program; 0 '
    'chooses: all, or one on a CPU if a single run keeps its cores busy',
    within='[0, inf)',
    group='run',
  )
  devices: int = option(
    0,
    'number of devices to split a batch or a population over; 0 chooses: all GPUs or '
    'TPUs, all cores of a CPU if that is faster, or 1',
    within='[0, inf)',
    group='devices',
  )
  implementation: str = option(
    'auto',
    'how windows of the recurrent layers run; auto: in a native kernel on a CPU, if '
    'the layer has one, else by the hand-written backward pass',
    ('auto', 'native', 'custom_vjp', 'scan'),
    group='devices',
  )
  products: str = option(
    'float32',
    'precision to which the operands of matrix products in recurrent layers are '
    'rounded',
    ('float32', 'bfloat16'),
    group='devices',
  )
  steps_per_call: int = option(
    25,
    'batches per call of the compiled program, after which progress is shown; 0: all '
    'up to the next evaluation',
    within='[0, inf)',
    group='run',
  )
  data_parallel: bool = option(
    False,
    'split every batch over all devices of all processes',
    group='devices',
  )
  shard_params: bool = option(
    False,
    'also split weights and optimizer state over these devices, for networks with '
    'many parameters',
    group='devices',
  )
  coordinator: str = option(
    '',
    'HOST:PORT of the first of several processes; not needed under SLURM and on TPU '
    'hosts',
    group='devices',
  )
  num_processes: int | None = option(
    None,
    'number of processes; 1 ignores SLURM and TPU hosts',
    within='[1, inf)',
    group='devices',
  )
  process_id: int | None = option(
    None, 'number of this process, from 0', within='[0, inf)', group='devices'
  )
  max_to_keep: int = option(
    2,
    'number of last checkpoints to keep per run; each also holds the weights of the '
    'best epoch',
    within='[2, inf)',
    group='run',
  )
  checkpoint_minutes: float = option(
    10.0,
    'minutes after which a run is saved before the end of its epoch or interval',
    within='(0, inf]',
    group='run',
  )
  allow_config_change: bool = option(
    False,
    'resume the runs in --workdir with other settings than they began with',
    group='run',
  )
  logger: str = option(
    'none',
    'program for which the curves are also written, with points within each epoch',
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
    self._check_averaging()
    self._check_processes()
    self.variants()

  def _check_optimizer(self) -> None:
    """Validate settings of the optimizer and logger that depend on each other.

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
    check(
      self.coupling == 'gradient' or self.gradient_estimate == 'running',
      'coupling',
      self.coupling,
      "'gradient' without --gradient_estimate=running",
    )

  def _check_averaging(self) -> None:
    """Validate settings of momentum and averages that depend on each other.

    Raises:
      ValueError: two settings exclude each other.
    """
    check(
      not self.nesterov or self.optimizer == 'sgd',
      'nesterov',
      self.nesterov,
      "false without --optimizer='sgd'",
    )
    if self.averaging == 'none':
      return
    check(
      self.evaluate_at == 'w',
      'averaging',
      self.averaging,
      "'none' with --evaluate_at=w_bar",
    )
    if self.averaging == 'schedule_free':
      regularized = [m for m in self.method if fptt_jax.METHODS[m].regularized]
      check(
        not regularized and not self.momentum_windows,
        'averaging',
        self.averaging,
        "'none' or 'running' with the regularizer or --momentum_windows",
      )
      # The average divides by b1.
      check(
        self.first_moment > 0,
        'momentum',
        self.first_moment,
        'above 0 with --averaging=schedule_free',
      )
      expected = '0 with --averaging=schedule_free'
      check(not self.bootstrap, 'bootstrap', self.bootstrap, expected)

  def _check_processes(self) -> None:
    """Validate settings of devices and processes that depend on each other.

    Raises:
      ValueError: two settings exclude each other, or one is missing.
    """
    check(
      not self.shard_params or self.data_parallel,
      'shard_params',
      self.shard_params,
      'false without --data_parallel',
    )
    # Both flags below choose devices of this process alone.
    is_distributed = self.data_parallel or bool(self.coordinator)
    for name, is_free in (
      ('population', self.population <= 1),
      ('devices', self.devices == 0),
    ):
      expected = f'{"0 or 1" if name == "population" else "0"} with --data_parallel '
      expected += 'or --coordinator'
      check(is_free or not is_distributed, name, getattr(self, name), expected)
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
    """Decay of the first moment, by default the usual one of the base optimizer."""
    usual = {'adam': 0.9, 'sgd': 0.0}
    return usual[self.optimizer] if self.momentum is None else self.momentum

  def for_method(self, method: str) -> 'Recipe':
    """Return the settings for one method, with the defaults that depend on it."""
    return self

  def variants(self) -> list[tuple[dict[str, float], 'Recipe']]:
    """Return the configuration of each combination of the grid's values.

    Returns:
      (values by setting, configuration) per combination; without a grid ({}, this one).

    Raises:
      ValueError: the grid is invalid.
    """
    names = []
    values = []
    for text in self.grid:
      name, numbers = self._parse_axis(text)
      names.append(name)
      values.append(numbers)
    check(len(set(names)) == len(names), 'grid', self.grid, 'of names given once each')
    # Counted before the list is made, which could fill the memory.
    count = math.prod(map(len, values))
    expected = f'of at most {MAX_RUNS} combinations'
    check(count <= MAX_RUNS, 'grid', self.grid, expected)
    found = []
    for numbers_chosen in itertools.product(*values):
      chosen: dict[str, Any] = dict(zip(names, numbers_chosen, strict=True))
      # Without a grid the configuration itself, since a copy would be validated again
      # and ask for its own variants.
      config = dataclasses.replace(self, grid=(), **chosen) if chosen else self
      found.append((chosen, config))
    return found

  def _parse_axis(self, text: str) -> tuple[str, list[float]]:
    """Return the setting and the values of one item of --grid.

    Raises:
      ValueError: the item is invalid.
    """
    name, _, listed = text.partition('=')
    try:
      numbers = [float(number) for number in listed.split(':')]
    except ValueError:
      numbers = []
    expected = f'NAME=VALUE:VALUE with names out of {", ".join(HYPERPARAMETERS)}'
    check(name in HYPERPARAMETERS and len(numbers) > 0, 'grid', text, expected)
    is_distinct = len(set(numbers)) == len(numbers)
    check(is_distinct, 'grid', text, 'of values different from each other')
    # Without clipping the optimizer has another structure, and all runs of a grid share
    # one program.
    expected = 'a list of values > 0, since a grid cannot switch clipping off'
    check(name != 'clip' or min(numbers) > 0, 'grid', text, expected)
    without = [
      method for method in self.method if not fptt_jax.METHODS[method].regularized
    ]
    expected = f'without {name}, which {", ".join(without)} does not have'
    check(name not in REGULARIZER or not without, 'grid', text, expected)
    return name, numbers

  def check_bootstrap(self, fits: bool) -> None:
    """Check that early windows have targets of which a share can be replaced.

    Args:
      fits: whether all windows have the target of the sequence.

    Raises:
      ValueError: they have not, or a method has no early windows.
    """
    fits &= all(fptt_jax.METHODS[method].update_each_window for method in self.method)
    expected = '0 unless all windows have the target of the sequence'
    check(not self.bootstrap or fits, 'bootstrap', self.bootstrap, expected)

  def check_influence(self, influence: str) -> None:
    """Check that an influence goes with all methods.

    Args:
      influence: how credit crosses the border of a window.

    Raises:
      ValueError: the gradient of a method is whole, or it has no windows.
    """
    settings = {name: fptt_jax.METHODS[name] for name in self.method}
    whole = [
      name
      for name, setting in settings.items()
      if setting.whole_gradient or not setting.update_each_window
    ]
    check(
      influence == 'none' or not whole,
      'influence',
      influence,
      f"'none' for methods whose gradient is whole, {', '.join(whole)}",
    )

  def check_length(self, seq_len: int) -> None:
    """Check that K, truncation_steps and momentum_windows fit a sequence length.

    Args:
      seq_len: T.

    Raises:
      ValueError: one of the first two is above T, or the last one is below K.
    """
    fits = f'an integer between 1 and the sequence length T={seq_len}'
    check((self.num_windows or 1) <= seq_len, 'num_windows', self.num_windows, fits)
    check(
      (self.truncation_steps or 1) <= seq_len,
      'truncation_steps',
      self.truncation_steps,
      f'at most T={seq_len}',
    )
    counts = [updates_per_sequence(self, name, seq_len)[0] for name in self.method]
    check(
      not self.momentum_windows or self.momentum_windows >= max(counts),
      'momentum_windows',
      self.momentum_windows,
      f'0, or at least the number of windows K={max(counts)}',
    )


def window_steps(recipe: Recipe, method: str, seq_len: int) -> int:
  """Return the number of steps S that an update is based on."""
  _, updates = updates_per_sequence(recipe, method, seq_len)
  return seq_len // (updates // recipe.inner_steps)


def updates_per_sequence(recipe: Recipe, method: str, seq_len: int) -> tuple[int, int]:
  """Return the numbers of windows K and of optimizer updates per sequence.

  Args:
    recipe: settings of the runs.
    method: training method.
    seq_len: sequence length T.
  """
  setting = fptt_jax.METHODS[method]
  if setting.num_windows is None:
    plan = fptt_jax.make_windows(seq_len, num_windows=recipe.num_windows)
    num_windows = plan.num_windows
  else:
    num_windows = seq_len if setting.num_windows == 'T' else int(setting.num_windows)
  updated_windows = num_windows if setting.update_each_window else 1
  return num_windows, updated_windows * recipe.inner_steps


def decay_schedule(decay: bool, num_updates: int) -> optax.Schedule | None:
  """Return the schedule of the learning rate's factor for --decay.

  Args:
    decay: whether the rate is annealed.
    num_updates: number of optimizer updates of a run.

  Returns:
    (updates so far) -> factor, a half cosine from 1 to 0; None without `decay`.
  """
  return optax.cosine_decay_schedule(1.0, num_updates) if decay else None
