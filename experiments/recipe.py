"""The settings all experiments share: training method, FPTT's hyper-parameters,
optimizer.
"""

from collections.abc import Callable
import dataclasses
import itertools
import math
from typing import ClassVar, NamedTuple
import warnings

import jax
import optax

from experiments.loggers import LOGGERS, is_available
from experiments.options import MOST_RUNS, check, check_fields, checked, option
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
BUSY = 4096
"""B times H from which on one run keeps a CPU's core busy."""


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
  nonfinite: str = option(
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
  chunk: int = option(
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
  keep: int = option(
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
      self.keep >= 2,
      'keep',
      self.keep,
      'at least 2: runs side by side may have to go back by one',
    )
    check(
      self.checkpoint_minutes > 0,
      'checkpoint_minutes',
      self.checkpoint_minutes,
      'a number > 0',
    )
    for name in ('chunk', 'devices', 'population'):
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
      math.prod(map(len, values)) <= MOST_RUNS,
      'grid',
      self.grid,
      f'of at most {MOST_RUNS} combinations',
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


def make_optimizer(
  recipe: Recipe, method: str, decay: optax.Schedule | None = None
) -> optax.GradientTransformation:
  """The chain of clipping, weight decay, base optimizer and regularizer for one method.

  Its state holds what `HYPERPARAMETERS` names (those the method has), which may be set.
  `decay`: (updates so far) -> factor of the learning rate.

  Warns when FPTT's own recursion would grow: the advisor's radius at the initial
  learning rate is above 1.
  """
  recipe = recipe.for_method(method)
  regularized = fptt_jax.METHODS[method].regularized
  warn_if_unstable(recipe, method)

  def base(
    learning_rate: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike,
    clip: jax.typing.ArrayLike,
  ) -> tuple[optax.GradientTransformation, ...]:
    """(what clips, all else)."""
    rate = (
      learning_rate if decay is None else lambda count: learning_rate * decay(count)
    )
    chain = (
      [optax.add_decayed_weights(recipe.weight_decay)] if recipe.weight_decay else []
    )
    chain.append(
      optax.sgd(rate, momentum)
      if recipe.optimizer == 'sgd'
      else optax.adam(rate, b1=momentum)
    )
    return optax.clip_by_global_norm(
      clip
    ) if recipe.clip else optax.identity(), optax.chain(*chain)

  def plain(
    learning_rate: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike,
    clip: jax.typing.ArrayLike,
  ) -> optax.GradientTransformation:
    return optax.chain(*base(learning_rate, momentum, clip))

  def fptt(
    learning_rate: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike,
    clip: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
    beta: jax.typing.ArrayLike,
    kappa: jax.typing.ArrayLike,
  ) -> optax.GradientTransformation:
    clipping, rest = base(learning_rate, momentum, clip)
    if recipe.clip_regularizer:
      return regularize(recipe, optax.chain(clipping, rest), alpha, beta, kappa)
    return optax.chain(clipping, regularize(recipe, rest, alpha, beta, kappa))

  return optax.inject_hyperparams(fptt if regularized else plain)(
    **hyperparameters(recipe, method)
  )


def hyperparameters(recipe: Recipe, method: str) -> dict[str, float]:
  """What a method's optimizer holds in its state, by the names it has there."""
  recipe = recipe.for_method(method)
  names = [
    name
    for name in HYPERPARAMETERS
    if fptt_jax.METHODS[method].regularized or name not in REGULARIZER
  ]
  values = {
    name: recipe.first_moment if name == 'momentum' else getattr(recipe, name)
    for name in names
  }
  return {HYPERPARAMETERS[name]: value for name, value in values.items()}


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


def radius(recipe: Recipe, method: str) -> float | None:
  """The advisor's spectral radius of FPTT with SGD where the loss is flat; None for
  what it knows nothing of.
  """
  if (
    not fptt_jax.METHODS[method].regularized
    or recipe.optimizer != 'sgd'
    or recipe.gradient_estimate != 'running'
  ):
    return None
  settings = dict(
    kappa=recipe.kappa, beta=recipe.beta, rho=recipe.rho, correction=recipe.correction
  )
  if recipe.first_moment < 0:
    return None
  settings |= dict(momentum=recipe.first_moment)
  return fptt_jax.spectral_radius(recipe.lr, recipe.alpha, **settings)


def warn_if_unstable(recipe: Recipe, method: str) -> None:
  """Warns when FPTT with SGD at these settings is unstable even where the loss is
  flat.
  """
  found = radius(recipe, method)
  if found is not None and found > 1:
    others = ', '.join(
      f'{name}={getattr(recipe, name):g}' for name in ('kappa', 'beta', 'rho')
    )
    others += f', momentum={recipe.first_moment:g}'
    warnings.warn(
      f'FPTT with SGD at lr={recipe.lr:g}, alpha={recipe.alpha:g}, {others}, '
      f'{recipe.correction} is unstable even on a '
      f'flat loss: its linearized recursion has spectral radius {found:.2f} > 1. Lower '
      'lr * alpha.',
      stacklevel=2,
    )


def make_trainer(
  recipe: Recipe,
  method: str,
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  seq_len: int,
  *,
  decay: optax.Schedule | None = None,
  mesh: jax.sharding.Mesh | None = None,
  carry_hidden: bool = False,
  wrap: Callable[
    [optax.GradientTransformation], optax.GradientTransformation
  ] = lambda optimizer: optimizer,
) -> fptt_jax.Trainer:
  """The trainer of one method; `wrap` goes around its optimizer, `decay` as for
  :func:`make_optimizer`.
  """
  setting = fptt_jax.METHODS[method]
  return fptt_jax.make_trainer(
    model,
    loss,
    wrap(make_optimizer(recipe, method, decay)),
    method=method,
    num_windows=recipe.num_windows if setting.num_windows is None else None,
    carry_hidden=carry_hidden,
    inner_steps=recipe.inner_steps,
    truncation_steps=(recipe.truncation_steps or min(300, seq_len))
    if setting.truncated
    else None,
    mesh=mesh,
    shard_params=recipe.shard_params and mesh is not None,
    skip_nonfinite=recipe.nonfinite == 'skip',
  )


class Meshes(NamedTuple):
  """Devices to split work over, None for one.

  Attributes:
    batch: where each takes its share of a batch.
    members: where each takes its share of a population.
  """

  batch: jax.sharding.Mesh | None
  members: jax.sharding.Mesh | None


def choose_meshes(
  recipe: Recipe, batch_size: int, hidden: int, steps: int, members: int = 1
) -> Meshes:
  """What to split: a batch where there is one member, else the members. `steps` are
  those of a window.

  Raises:
    UserError: more devices than there are, or a batch size or population that is no
      multiple of them.
  """
  devices = jax.devices()
  which, number = (
    ('batch size', batch_size) if members == 1 else ('population', members)
  )
  if over_all_devices(recipe):
    checked(
      check,
      number % len(devices) == 0,
      'batch_size',
      number,
      f'a multiple of the {len(devices)} devices there are',
    )
  elif recipe.devices:
    checked(
      check,
      recipe.devices <= len(devices),
      'devices',
      recipe.devices,
      f'at most the {len(devices)} there are',
    )
    checked(
      check,
      number % recipe.devices == 0,
      'devices',
      recipe.devices,
      f'a divisor of the {which}, {number}',
    )
    devices = devices[: recipe.devices]
  elif number % len(devices) or (
    members == 1 and is_cpu() and not pays_on_cpu(batch_size, hidden, steps)
  ):
    devices = devices[:1]
  mesh = jax.sharding.Mesh(devices, ('devices',)) if len(devices) > 1 else None
  return Meshes(mesh, None) if members == 1 else Meshes(None, mesh)


def population_size(recipe: Recipe, batch_size: int, hidden: int) -> int | None:
  """How many runs to train side by side, None for all."""
  if over_all_devices(recipe):
    return 1
  if recipe.population == 0 and is_cpu() and batch_size * hidden >= BUSY:
    return 1
  return recipe.population or None


def over_all_devices(recipe: Recipe) -> bool:
  """Whether every batch is split over all devices of all processes."""
  return recipe.data_parallel or jax.process_count() > 1


def is_cpu() -> bool:
  """Whether this process computes on a CPU."""
  return jax.default_backend() == 'cpu'


def pays_on_cpu(batch_size: int, hidden: int, steps: int) -> bool:
  """Whether half a batch on each of two cores is quicker than XLA's own use of both.

  Seen for LSTMs of H = 128 and 256, B = 20 to 128, windows of 7 steps and more; not at
  H = 1024, where each core would read all weights, nor where the devices mostly wait
  for each other: B = 8, H = 16, or windows of one step.
  """
  return (
    hidden <= 512
    and batch_size * hidden >= BUSY
    and batch_size * hidden * steps >= 16 * BUSY
  )


def window_steps(recipe: Recipe, method: str, seq_len: int) -> int:
  """S, the steps that an update looks at."""
  _, updates = updates_a_sequence(recipe, method, seq_len)
  return seq_len // (updates // recipe.inner_steps)


def updates_a_sequence(recipe: Recipe, method: str, seq_len: int) -> tuple[int, int]:
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


def evaluation_params(
  recipe: Recipe, method: str, state: fptt_jax.TrainState
) -> jax.typing.ArrayLike:
  """The parameters to evaluate at."""
  if recipe.evaluate_at == 'w_bar' and fptt_jax.METHODS[method].regularized:
    return fptt_jax.fptt_eval_params(state.opt_state, state.params)
  return state.params
