"""The adding problem (Hochreiter and Schmidhuber, 1997) by FPTT and other methods.

A sequence has two rows: numbers uniform in [0, 1], and two markers, one in each half.
The target is the sum of the two marked numbers. The constant answer 1 has a mean
squared error of 1/6 = 0.167. Every batch is drawn anew.

By default each method trains at its own learning rate and momentum, found by a local
search of a declared grid on draws of another seed (see `experiments.core.rates`). --lr
and --momentum set them for all methods, and --tune searches the grid again. The methods
are compared by their mean test error over the last quarter of the evaluations, since
the last point of a curve is noisy.

The defaults take a few minutes on two CPU cores: T=120, an LSTM of 128 units, batches
of 128, K=11 and 1,000 batches. The paper's settings (Figs. 1-3) are
--seq_len=200|500|750|1000 --nodecay --batches=3000 --lr=1e-3 --momentum=0.9.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import math
from pathlib import Path
import statistics
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from experiments.core import (
  cells,
  checkpoints,
  cli,
  devices,
  files,
  flags,
  intervals,
  loop,
  optimizers,
  plotting,
  processes,
  rates,
  recipe,
  workdir,
)
from experiments.core.flags import check, option, redeclare
from experiments.core.loop import Task
from experiments.core.plotting import Curve, Plot
from experiments.core.rates import Rates
from experiments.core.schedule import (
  Member,
  format_number,
  has_ended,
  list_members,
)
import fptt_jax
from fptt_jax import nn
from fptt_jax.influence import INFLUENCES

CHANCE = 1 / 6
"""Mean squared error of the constant answer 1."""


SOLVED = 0.01
"""Mean squared error below which the problem counts as solved."""


PROBE_BATCHES = 3
"""Number of batches that are timed before the start, after one that compiles."""


UNTUNED_RATE = 1e-3
"""Learning rate of methods and optimizers without a tuned rate."""


TUNED = rates.read_table()
"""Tuned learning rates and momenta by method."""


PLOT = Plot(
  'convergence.png',
  'Adding problem',
  'test_mse',
  'test MSE',
  (('step', 'batches'), ('updates', 'updates'), ('seconds', 'seconds')),
  (('chance', CHANCE), ('solved', SOLVED)),
)
"""Plot of the test error of all runs."""


@dataclasses.dataclass(frozen=True)
class Config(recipe.Recipe):
  """Settings of the adding problem."""

  method: tuple[str, ...] = redeclare(
    recipe.Recipe,
    'method',
    ('fptt', 'tbptt', 'bptt'),
    f'methods, one after the other: {", ".join(recipe.METHODS)}',
  )
  lr: float | None = redeclare(
    recipe.Recipe,
    'lr',
    None,
    "learning rate of all methods; default: each method's own, tuned one",
  )
  momentum: float | None = redeclare(
    recipe.Recipe,
    'momentum',
    None,
    "decay of the first moment of all methods, adam's b1 or sgd's heavy ball; may "
    "be negative; default: each method's own, tuned one",
  )
  tune: bool = option(
    False,
    'search the rate and momentum of each method on draws of another seed, and stop',
    group='training',
  )
  alpha: float = redeclare(recipe.Recipe, 'alpha', 0.1)
  clip: float = redeclare(recipe.Recipe, 'clip', 1.0)
  seq_len: int = option(120, 'T, steps per sequence', within='[2, inf)', group='task')
  hidden: int = option(128, 'H, LSTM units', within='[1, inf)', group='model')
  batch_size: int = option(
    128, 'B, sequences per batch', within='[1, inf)', group='training'
  )
  batches: int = option(
    1000,
    'number of training batches, each with K updates or one',
    within='[1, inf)',
    group='training',
  )
  forget_bias: float = option(
    1.0, "initial bias of the LSTM's forget gate", within='(-inf, inf)', group='model'
  )
  influence: str = option(
    'none',
    'how credit crosses the border of a window, see `fptt_jax.influence`',
    ('none', *INFLUENCES),
    group='training',
  )
  decay: bool = option(
    True,
    'decay the learning rate to 0 over the run along a half cosine; --nodecay keeps it '
    'constant, as in the paper',
    group='optimizer',
  )
  test_size: int = option(
    1024,
    'number of sequences of the test set',
    within='[1, inf)',
    group='task',
  )
  eval_every: int = option(
    50,
    'number of batches between evaluations, which are also checkpoints',
    within='[1, inf)',
    group='training',
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_length(self.seq_len)
    self.check_bootstrap(True)
    self.check_influence(self.influence)
    cells.check_settings(self, 'lstm')
    self._check_tuning()

  def _check_tuning(self) -> None:
    """Validate --tune and the seed that tuning has used.

    Raises:
      ValueError: a setting that --tune chooses is given, or a run would report on the
        draws that the rates were chosen on.
    """
    chosen = {'lr': None, 'momentum': None, 'grid': (), 'seeds': (0,)}
    for name, unset in chosen.items():
      value = getattr(self, name)
      check(not self.tune or value == unset, name, value, 'left out with --tune')
    is_tunable = not self.tune or self.optimizer == 'adam'
    check(is_tunable, 'optimizer', self.optimizer, "'adam' with --tune")
    check(
      rates.SEED not in self.seeds or not self.missing,
      'seeds',
      self.seeds,
      f'other seeds than {rates.SEED}, whose draws chose the rates, unless --lr and '
      '--momentum are given',
    )

  @property
  def missing(self) -> list[str]:
    """Names of the settings, out of rate and momentum, that each method has its own."""
    chosen = [variant for _, variant in self.variants()]
    names = {'lr': 'learning rate', 'momentum': 'momentum'}
    return [
      name
      for field, name in names.items()
      if any(getattr(variant, field) is None for variant in chosen)
    ]

  @property
  def tuned_methods(self) -> list[str]:
    """Methods whose missing settings are tuned ones."""
    # The grid was searched with Adam alone.
    if self.optimizer != 'adam':
      return []
    return [name for name in self.method if name in TUNED.methods]

  def for_method(self, method: str) -> 'Config':
    """Return the settings for one method.

    A missing rate or momentum is replaced by the method's own.
    """
    tuned = method in TUNED.methods and self.optimizer == 'adam'
    usual = Rates(UNTUNED_RATE, self.first_moment)
    own = TUNED.methods[method] if tuned else usual
    return dataclasses.replace(
      self,
      lr=own.lr if self.lr is None else self.lr,
      momentum=own.momentum if self.momentum is None else self.momentum,
    )


def draw_batch(key: jax.Array, seq_len: int, batch_size: int) -> fptt_jax.Batch:
  """Draw a batch of the adding problem.

  Args:
    key: PRNG key.
    seq_len: T.
    batch_size: B.

  Returns:
    Inputs float32 [T, B, 2], (value, marker), and targets float32 [B].
  """
  value_key, first_key, second_key = jax.random.split(key, 3)
  values = jax.random.uniform(value_key, (seq_len, batch_size), jnp.float32)
  first = jax.random.randint(first_key, (batch_size,), 0, seq_len // 2)
  second = jax.random.randint(second_key, (batch_size,), seq_len // 2, seq_len)
  steps = jnp.arange(seq_len)[:, None]
  markers = ((steps == first[None]) | (steps == second[None])).astype(values.dtype)
  inputs = jnp.stack([values, markers], axis=-1)
  return fptt_jax.Batch(inputs, jnp.sum(values * markers, axis=0))


@jax.jit
def _batch_keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
  """Return the data of a key per number, see :func:`batch_keys`."""
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
  return jax.random.key_data(keys)


def batch_keys(key: jax.Array, numbers: np.ndarray) -> np.ndarray:
  """Return the data of a PRNG key per batch.

  Args:
    key: PRNG key of the run's batches.
    numbers: int [N], numbers of the batches.

  Returns:
    uint32 [N, 2]. NumPy arrays, which the loop cuts and stacks, cannot hold typed keys.
  """
  return np.asarray(_batch_keys(key, numbers))


def make_model(config: Config) -> fptt_jax.Model:
  """Return a model of one LSTM and a linear readout."""

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    return nn.Sequential(
      cells.build(config, 'lstm', 2, config.hidden, config.forget_bias, rngs),
      nnx.Linear(config.hidden, 1, rngs=rngs),
    )

  return nn.from_nnx(build)


def model_of(config: Config, described: dict[str, Any]) -> fptt_jax.Model:
  """Return the model of a folder; `described` is empty, since the data are drawn."""
  del described
  return make_model(config)


def make_trainer(
  config: Config, method: str, members: int
) -> tuple[fptt_jax.Trainer, devices.Meshes]:
  """Return the trainer of one run and the devices for several.

  Args:
    config: settings of the runs.
    method: training method.
    members: number of runs.

  Raises:
    UserError: the devices do not fit the batch or the runs.
  """
  meshes = intervals.choose_meshes(config, method, members)
  trainer = optimizers.make_trainer(
    config,
    method,
    make_model(config),
    fptt_jax.losses.terminal_regression(),
    config.seq_len,
    decay=intervals.decay_schedule(config, method),
    mesh=meshes.batch,
    influence=config.influence,
    num_batches=config.batches,
  )
  return trainer, meshes


class Reporter(intervals.IntervalReporter):
  """Measurements of the adding problem, every `eval_every` batches."""

  def summarize(self, ended: loop.Ended) -> dict[str, Any]:
    """Return the errors of a run that has ended, and the sizes of its model."""
    finite = [row for row in ended.rows if row['test_mse'] is not None]
    solved = [row['step'] for row in finite if row['test_mse'] < SOLVED]
    summary = super().summarize(ended)
    return summary | {'below_0.01_at': solved[0] if solved else None}


def make_task(config: Config, seeds: Iterable[int], method: str, members: int) -> Task:
  """Return the task of the training loop, for several runs side by side.

  Args:
    config: settings of the runs.
    seeds: seeds of the runs.
    method: training method.
    members: number of runs.
  """
  num_windows, _ = recipe.updates_per_sequence(config, method, config.seq_len)
  trainer, meshes = make_trainer(config, method, members)
  # Keys of the weights, the batches and the test set.
  keys = {seed: jax.random.split(jax.random.key(seed), 3) for seed in seeds}
  draw = jax.jit(draw_batch, static_argnums=(1, 2))
  tests = {
    seed: intervals.HeldOut(
      processes.replicated(draw(test_key, config.seq_len, config.test_size))
    )
    for seed, (_, _, test_key) in keys.items()
  }

  def read(data: jax.Array) -> fptt_jax.Batch:
    key = jax.random.wrap_key_data(data)
    return draw_batch(key, config.seq_len, config.batch_size)

  def draw_keys(seed: int, start: int, end: int) -> Any:
    # Each batch has a key of its own, so a resumed run draws the same batches.
    return batch_keys(keys[seed][1], np.arange(start, end) + 1)

  reporter = Reporter(
    trainer, tests, sizes(config), num_windows, 'test_mse', 'test MSE'
  )
  make_key = lambda seed: keys[seed][0]
  return intervals.make_task(
    config, method, trainer, meshes, read, draw_keys, reporter, make_key=make_key
  )


def train(chosen: list[Member], folder: Path, evaluated: Callable[[], None]) -> None:
  """Train runs of one method side by side.

  Args:
    chosen: the runs.
    folder: the parent of the runs' folders.
    evaluated: callback after each evaluation of a run.
  """
  seeds = {member.seed for member in chosen}
  task = make_task(chosen[0].config, seeds, chosen[0].method, len(chosen))
  loop.train(task, chosen, folder, evaluated)


def sizes(config: Config) -> dict[str, int]:
  """Return the numbers of all parameters and of the LSTM's."""
  params = jax.eval_shape(make_model(config).init, jax.random.key(0))
  return {
    'parameters': cells.count(params),
    'recurrent_parameters': cells.recurrent_parameters('lstm', (2, config.hidden)),
  }


def open_folder(config: Config, folder: str) -> Path:
  """Make the folder of the runs, or check that it has the same configuration.

  Raises:
    UserError: it has another configuration, or cannot be written.
  """
  identity = {}
  if config.missing:
    # Runs with rates of another table are other runs, although their flags are equal.
    tuned = {name: tuple(own) for name, own in TUNED.methods.items()}
    identity['tuned_rates'] = str(tuned)
  about = (
    f'adding problem, T={config.seq_len}, LSTM {config.hidden}, batch '
    f'{config.batch_size}, {config.batches:,} batches per run'
  )
  return cli.open_task(config, folder, 'add_task', about, identity)


def run(
  config: Config, folder: str, plot: Plot | None = None
) -> tuple[Path, list[dict[str, Any]]]:
  """Train a run for each method, seed and grid value.

  Args:
    config: settings of the runs.
    folder: folder of the runs.
    plot: plot to keep up to date; None draws nothing and announces nothing.

  Returns:
    (the folder, a summary per run).

  Raises:
    UserError: the folder holds runs of another configuration, or cannot be written.
    Stopped: a signal asked for the end.
  """
  path = open_folder(config, folder)
  if plot is not None and jax.process_count() == 1:
    announce(config, path)
  return path, cli.train_runs(config, path, train, plot)


def announce(config: Config, folder: Path) -> None:
  """Print which runs are not trained yet, and estimate how long they take.

  Args:
    config: settings of the runs.
    folder: folder of the runs.
  """
  left = [member for member in list_members(config) if not has_ended(folder, member)]
  if not left:
    return
  print(f'to train, one after the other, {rates_in_words(config)}:')
  size = devices.population_size(config, config.batch_size, config.hidden)
  total = 0.0
  for method in dict.fromkeys(member.method for member in left):
    chosen = [member for member in left if member.method == method]
    seconds = estimate(chosen, folder, min(size or len(chosen), len(chosen)))
    total += seconds
    for member in chosen:
      print(f'  {member.label.strip()}: {settings_in_words(member.config)}')
    print(f'  {method} takes about {duration(seconds)}', flush=True)
  print(f'about {duration(total)} in total, if the load on the machine stays the same')


def estimate(chosen: list[Member], folder: Path, together: int) -> float:
  """Estimate the seconds that runs of one method take, from a few timed batches.

  The estimate is too high if several runs share a program.

  Args:
    chosen: the runs.
    folder: the parent of the runs' folders, whose checkpoints show what is done.
    together: number of runs per program.
  """
  config = chosen[0].config
  key = jax.random.key(0)
  trainer, _ = make_trainer(config, chosen[0].method, together)
  batch = draw_batch(key, config.seq_len, config.batch_size)
  # Shapes are enough; the batch is validated when the runs begin.
  state = trainer.init(key, jax.eval_shape(lambda: batch))
  seconds = []
  for _ in range(1 + PROBE_BATCHES):
    started = time.perf_counter()
    state, metrics = trainer.step(state, batch)
    jax.block_until_ready((state, metrics))
    seconds.append(time.perf_counter() - started)
  done = [
    max(checkpoints.saved_steps(folder / member.name), default=0) for member in chosen
  ]
  batches = len(chosen) * config.batches - sum(done)
  # The first batch compiled the program.
  return len(chosen) * seconds[0] + batches * statistics.median(seconds[1:])


def duration(seconds: float) -> str:
  """Return a duration in words."""
  minutes, rest = divmod(round(seconds), 60)
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def settings_in_words(config: Config) -> str:
  """Return the rate and momentum of a run in words.

  Args:
    config: settings of the run, from :meth:`Config.for_method`.
  """
  names = {'lr': config.lr, 'momentum': config.momentum}
  # `for_method` has filled in both.
  known = {name: value for name, value in names.items() if value is not None}
  return ', '.join(f'{name} {format_number(value)}' for name, value in known.items())


def rates_in_words(config: Config) -> str:
  """Return the origin of the learning rates and momenta in words."""
  if not config.missing:
    return 'at the learning rate and momentum that were given'
  what = ' and '.join(config.missing)
  tuned = config.tuned_methods
  if not tuned:
    return f'at a default {what}, untuned'
  text = f'each at its own {what}, chosen on draws of seed {rates.SEED}'
  others = [method for method in config.method if method not in tuned]
  if others:
    text += f' (except {", ".join(others)}: untuned)'
  differ = [
    f'{name} {value!r}, here {getattr(config, name)!r}'
    for name, value in TUNED.settings.items()
    if getattr(config, name) != value
  ]
  # Rates tuned at other settings may be far from the best ones.
  text += f' at other settings ({"; ".join(differ)})' if differ else ''
  open_ended = [method for method in tuned if method in TUNED.unsettled]
  if open_ended:
    text += (
      f' (the best rate of {", ".join(open_ended)} is at the edge of what was tried)'
    )
  unlearned = [method for method in tuned if method in TUNED.unlearned]
  if unlearned:
    text += f' (no rate of {", ".join(unlearned)} was better than chance)'
  return text


class Result(NamedTuple):
  """Result of the runs of one method and point of the grid.

  Attributes:
    name: the method and the values of the grid.
    settings: rate and momentum in words.
    scores: mean test error over the last quarter of the evaluations, per seed; None if
      the run diverged.
  """

  name: str
  settings: str
  scores: list[float | None]

  @property
  def mean(self) -> float | None:
    """Mean over the seeds; None if one of them diverged."""
    # A mean over the other seeds would favor a method that sometimes diverges.
    finite = [score for score in self.scores if score is not None]
    return statistics.fmean(finite) if len(finite) == len(self.scores) else None

  def __str__(self) -> str:
    """Return the mean and the name in words."""
    score = 'none (diverged)' if self.mean is None else f'{self.mean:.4f}'
    return f'{score} for {self.name}'


def conclusion(config: Config, summaries: list[dict[str, Any]]) -> str:
  """Return two sentences on the methods that were compared and on their order.

  Args:
    config: settings that list the runs.
    summaries: summary of each run.
  """
  results: dict[str, Result] = {}
  for member, summary in zip(list_members(config), summaries, strict=True):
    empty = Result(member.line, settings_in_words(member.config), [])
    result = results.setdefault(member.line, empty)
    result.scores.append(summary['last_quarter_mse'])
  listing = ', '.join(f'{one.name} ({one.settings})' for one in results.values())
  compared = (
    f'Compared: {listing} on the adding problem at T={config.seq_len}, '
    f'{config.batches:,} batches of {config.batch_size} per run, '
    f'{rates_in_words(config)}.'
  )
  # Methods that diverged come last.
  ranked = sorted(
    results.values(), key=lambda one: math.inf if one.mean is None else one.mean
  )
  order = ', '.join(map(str, ranked))
  measure = 'mean test MSE over the last quarter of the evaluations'
  text = f'Result: the {measure} was {order}; chance is {CHANCE:.3f}'
  return f'{compared}\n{text}{_reservation(config, ranked)}.'


def _reservation(config: Config, ranked: list[Result]) -> str:
  """Return a caveat about the order of the results.

  Args:
    config: settings of the runs.
    ranked: the results, the best first.
  """
  if len(ranked) == 1:
    return '; nothing else was run to compare it with'
  if len(config.seeds) == 1:
    return '; this is one seed, and another one may give another order'
  wins = 0
  for of_seed in zip(*(one.scores for one in ranked), strict=True):
    best, *others = (math.inf if score is None else score for score in of_seed)
    wins += best < min(others)
  return f'; {ranked[0].name} was the lowest from {wins} of {len(config.seeds)} seeds'


def tune(config: Config) -> None:
  """Search the grid for each method, print the trials, and write rates.json.

  Args:
    config: settings of the runs, with the methods and the folder.

  Raises:
    UserError: a file cannot be written.
    Stopped: a signal asked for the end; the same command resumes the search.
  """
  folder = workdir.make_folder(config.workdir)
  path = folder / 'rates.json'
  found = rates.saved_entries(config, path)
  for method in config.method:
    score = functools.partial(trial, config, method, folder / 'tune' / method)
    found[method] = rates.entry(*rates.search(score, CHANCE), CHANCE)
    # Written after each method, since a search takes long.
    if processes.is_first():
      files.write_json(path, rates.table(config, found))
  if not processes.is_first():
    return
  tried = [
    [method, *point.values()] for method, row in found.items() for point in row['tried']
  ]
  header = ['method', 'lr', 'momentum', 'mean MSE of the last quarter']
  print(tabulate(tried, header, floatfmt='.4g', missingval='diverged'))
  draw_tuning(folder / 'rates.png', found)
  for method, row in found.items():
    learned = '' if row['learned'] else '; no rate was better than chance'
    print(f'{method}: lr {row["lr"]:g}, momentum {row["momentum"]:g}{learned}')
  name = rates.FILE.name
  print(f'copy {path} to experiments/core/{name} to use these rates')


def trial(config: Config, method: str, folder: Path, point: Rates) -> float | None:
  """Train at one point of the grid and return its score.

  A point that was trained before is not trained again.

  Args:
    config: settings of the runs.
    method: training method.
    folder: folder of the method's runs.
    point: learning rate and momentum.

  Returns:
    The mean error over the last quarter of the evaluations; None if the run diverged.
  """
  grid = (f'lr={format_number(point.lr)}', f'momentum={format_number(point.momentum)}')
  chosen = dataclasses.replace(
    config, tune=False, method=(method,), seeds=(rates.SEED,), grid=grid
  )
  _, [summary] = run(chosen, str(folder))
  score: float | None = summary['last_quarter_mse']
  return score


def draw_tuning(path: Path, found: dict[str, Any]) -> None:
  """Draw the scores of all points against the learning rate.

  Args:
    path: the image to write.
    found: an entry of the table of rates per method.
  """
  curves = []
  for method, row in found.items():
    for momentum in rates.MOMENTA:
      points = [point for point in row['tried'] if point['momentum'] == momentum]
      x = [point['lr'] for point in points]
      y = [point['score'] for point in points]
      curves.append(Curve(f'{method}, momentum {momentum:g}', method, x, y))
  plotting.plot_curves(
    path,
    panels={'learning rate': curves},
    title='Adding problem: tuning',
    ylabel='mean MSE of the last quarter',
    marks={'chance': CHANCE, 'solved': SOLVED},
    xscale='log',
  )


def main(config: Config) -> None:
  """Train all runs and report them, or tune.

  Args:
    config: settings of the command.

  Raises:
    UserError: a folder or file cannot be read or written.
    Stopped: a signal asked for the end.
  """
  if config.tune:
    processes.join(config.coordinator, config.num_processes, config.process_id)
    tune(config)
    return
  plot = PLOT._replace(title=f'{PLOT.title}, T={config.seq_len}, LSTM {config.hidden}')
  wanted = cli.Report(plot, 'last_quarter_mse', digits=4)
  summaries = cli.run_task(config, run, wanted)
  print(conclusion(config, summaries))


if __name__ == '__main__':
  flags.run(main, Config)
