"""Problems that windows alone cannot learn, with credit across windows.

    python -m experiments.online --task=recall --influence=rtrl
    python -m experiments.online --task=lags --influence=snap1 --seeds=0:5

Each task has a dependency that is longer than a window. --influence says how the
gradient of a window gains what lies before it: 'none' cuts it, as truncated
back-propagation does; the others are those of `fptt_jax.influence`. The problems are
described in `experiments.data.memory`, and a line with the losses of known predictors
begins the report.

The defaults of --task=recall take about a minute on two CPU cores. With
--seq_len=10000 --num_windows=1000 the number has to be kept for 10,000 steps, and the
memory of a step stays the same.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.core import (
  cells,
  cli,
  devices,
  flags,
  intervals,
  loop,
  optimizers,
  processes,
  recipe,
)
from experiments.core.flags import check, option, redeclare
from experiments.core.loop import Task
from experiments.core.plotting import Plot
from experiments.core.schedule import Member
from experiments.data.memory import PROBLEMS
import fptt_jax
from fptt_jax import influence, nn
from fptt_jax.influence import INFLUENCES, Influence

SERIES = dict(
  cell='rnn',
  hidden=64,
  seq_len=50,
  num_windows=50,
  batches=300,
  lr=1e-3,
  decay=False,
)
"""Settings of the series: 15,000 steps with an update after each, as in the comparison
whose figures `experiments.paper` quotes.
"""


TASKS: dict[str, dict[str, Any]] = {
  'lags': dict(
    cell='gru', hidden=16, seq_len=100, num_windows=20, batch_size=16, batches=1000
  ),
  'recall': dict(
    cell='lru',
    hidden=4,
    seq_len=1000,
    num_windows=20,
    batch_size=16,
    batches=500,
    lr=1e-2,
  ),
  **dict.fromkeys(('henon', 'mackey_glass', 'lorenz', 'sunspots'), SERIES),
}
"""Defaults of the other flags by task."""


CREDIT: dict[str, str | Influence] = {
  **{name: name for name in ('none', *INFLUENCES)},
  'rflo': influence.snap1(own_only=True),
  'kf': influence.kronecker(1, 'signs'),
  'lookback25': influence.lookback(25),
}
"""Influences by the value of --influence."""


@dataclasses.dataclass(frozen=True)
class Config(recipe.Recipe):
  """Settings of the problems with long dependencies."""

  task: str = option('lags', 'the problem', PROBLEMS, group='task')
  method: tuple[str, ...] = redeclare(recipe.Recipe, 'method', ('tbptt',))
  influence: str = option(
    'none',
    'how credit crosses the border of a window',
    tuple(CREDIT),
    group='training',
  )
  every_window: bool = option(
    False,
    'train on the target of an episode at the end of every window, with weight k/K in '
    'window k of K, instead of in the last window only',
    group='task',
  )
  lr: float = redeclare(recipe.Recipe, 'lr', 3e-3)
  clip: float = redeclare(recipe.Recipe, 'clip', 1.0)
  cell: str = option('gru', 'recurrent layer', tuple(cells.CELLS), group='model')
  hidden: int = option(16, 'H, units', within='[1, inf)', group='model')
  seq_len: int = option(100, 'T, steps per batch', within='[2, inf)', group='task')
  batch_size: int = option(
    8, 'B, sequences per batch', within='[1, inf)', group='training'
  )
  batches: int = option(
    1000, 'number of training batches', within='[1, inf)', group='training'
  )
  decay: bool = option(
    True, 'decay the learning rate to 0 along a half cosine', group='optimizer'
  )
  eval_every: int = option(
    50,
    'number of batches between evaluations, which are also checkpoints',
    within='[1, inf)',
    group='training',
  )
  test_steps: int = option(
    1000,
    'steps of the test stream per row over which the test loss is averaged; for '
    'episodes, the number of test sequences',
    within='[1, inf)',
    group='task',
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_length(self.seq_len)
    is_stream = PROBLEMS[self.task].is_stream
    check(
      not (is_stream and self.every_window),
      'every_window',
      self.every_window,
      f'false with --task={self.task}, which has a target at each step',
    )
    self.check_bootstrap(self.every_window)
    cells.check_settings(self, self.cell)
    self.check_influence(self.influence)


def make_model(config: Config) -> fptt_jax.Model:
  """Return a model of one recurrent layer and a linear readout."""
  problem = PROBLEMS[config.task]

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    readout = nnx.Linear(config.hidden, problem.outputs, rngs=rngs)
    return nn.Sequential(_recurrent_layer(config, problem.features, rngs), readout)

  return nn.from_nnx(build)


def _recurrent_layer(config: Config, features: int, rngs: nnx.Rngs) -> Any:
  """Return the recurrent layer."""
  if config.cell == 'lru' and not PROBLEMS[config.task].is_stream:
    # Units that forget over a quarter of an episode to all of it, and hardly turn.
    slowest = math.exp(-1 / config.seq_len)
    return nn.LRU(
      features,
      config.hidden,
      r_min=slowest**4,
      r_max=slowest,
      max_phase=0.1 / config.seq_len,
      rngs=rngs,
    )
  return cells.build(config, config.cell, features, config.hidden, None, rngs)


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
  problem = PROBLEMS[config.task]
  num_windows, _ = recipe.updates_per_sequence(config, method, config.seq_len)
  meshes = intervals.choose_meshes(config, method, members)
  weights = None
  if not problem.is_stream and not config.every_window:
    weights = [0.0] * (num_windows - 1) + [1.0]
  trainer = optimizers.make_trainer(
    config,
    method,
    make_model(config),
    problem.make_loss(),
    config.seq_len,
    decay=intervals.decay_schedule(config, method),
    mesh=meshes.batch,
    carry_hidden=problem.is_stream,
    influence=CREDIT[config.influence],
    loss_weights=weights,
    num_batches=config.batches,
  )
  return trainer, meshes


def draw_items(config: Config, seed: int, start: int, end: int) -> dict[str, Any]:
  """Draw the data of several batches.

  Args:
    config: settings of the runs.
    seed: seed of the run.
    start: number of the first batch, from 0.
    end: number after the last batch.

  Returns:
    inputs [N, n, B, D] and targets [N, ...] of the N batches, as `read_batch` takes
    them. A stream goes on from batch to batch, also from call to call.
  """
  problem = PROBLEMS[config.task]
  if problem.is_stream:
    # One series for the whole run, so that a resumed run finds its place.
    inputs, targets = _series(config, seed)
    steps = slice(start * config.seq_len, end * config.seq_len)
    cut = (end - start, config.seq_len)
    return {
      'inputs': inputs[steps].reshape(*cut, *inputs.shape[1:]),
      'targets': targets[steps].reshape(*cut, *targets.shape[1:]),
    }
  drawn = [
    problem.draw(
      np.random.default_rng([seed, number]), config.seq_len, config.batch_size
    )
    for number in range(start, end)
  ]
  return {
    'inputs': np.stack([inputs for inputs, _ in drawn]),
    'targets': np.stack([targets for _, targets in drawn]),
  }


@functools.lru_cache(maxsize=16)
def _series(config: Config, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the stream that a run is trained on, all steps of it."""
  num_steps = config.batches * config.seq_len
  rng = np.random.default_rng([seed, 0])
  return PROBLEMS[config.task].draw(rng, num_steps, config.batch_size)


def read_batch(config: Config, item: dict[str, Any]) -> fptt_jax.Batch:
  """Return a batch, with the zeros that end an episode."""
  inputs = item['inputs']
  missing = config.seq_len - inputs.shape[0]
  padding = [(0, missing)] + [(0, 0)] * (inputs.ndim - 1)
  return fptt_jax.Batch(jnp.pad(inputs, padding), item['targets'])


def test_batch(config: Config, seed: int) -> intervals.HeldOut:
  """Return the test data of a seed. No run trains on what is scored."""
  problem = PROBLEMS[config.task]
  rng = np.random.default_rng([seed, 2**31])
  if not problem.is_stream:
    inputs, targets = problem.draw(rng, config.seq_len, config.test_steps)
    batch = read_batch(config, {'inputs': inputs, 'targets': targets})
    return intervals.HeldOut(batch)
  draw = problem.draw_test or problem.draw
  arrays = draw(rng, problem.lead + config.test_steps, config.batch_size)
  batch = fptt_jax.Batch(*(array[problem.lead :] for array in arrays))
  if not problem.lead:
    return intervals.HeldOut(batch)
  lead = fptt_jax.Batch(*(array[: problem.lead] for array in arrays))
  return intervals.HeldOut(batch, lead)


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
  tests = {seed: processes.replicated(test_batch(config, seed)) for seed in seeds}
  reporter = intervals.IntervalReporter(
    trainer,
    tests,
    costs(config, trainer),
    num_windows,
    f'test_{config.task}',
    'test loss',
  )
  return intervals.make_task(
    config,
    method,
    trainer,
    meshes,
    read=functools.partial(read_batch, config),
    draw=functools.partial(draw_items, config),
    reporter=reporter,
    continues=PROBLEMS[config.task].is_stream,
  )


def costs(config: Config, trainer: fptt_jax.Trainer) -> dict[str, Any]:
  """Return the number of parameters and the memory that a step needs.

  Args:
    config: settings of the runs.
    trainer: the trainer of one run.

  Returns:
    `influence_mib` is the size of the influence, `step_mib` that of all temporary
    arrays of a step, besides the state and the batch.
  """
  batch = jax.eval_shape(
    lambda: read_batch(
      config, jax.tree.map(lambda x: x[0], draw_items(config, 0, 0, 1))
    )
  )
  state = jax.eval_shape(trainer.init, jax.random.key(0), batch)
  size = sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(state.influence)
  )
  # Of the compiled step itself, since a second compilation could differ.
  step: Any = trainer.step
  compiled = step.lower(state, batch).compile()
  return {
    'influence': config.influence,
    'parameters': cells.count(state.params),
    'influence_mib': size / 2**20,
    'step_mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
  }


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


def run(
  config: Config, folder: str, plot: Plot | None = None
) -> tuple[Path, list[dict[str, Any]]]:
  """Train a run for each method, seed and grid value.

  Args:
    config: settings of the runs.
    folder: folder of the runs.
    plot: plot to keep up to date; None draws nothing.

  Returns:
    (the folder, a summary per run).

  Raises:
    UserError: the folder holds runs of another configuration, or cannot be written.
    Stopped: a signal asked for the end.
  """
  about = (
    f'{PROBLEMS[config.task].about}; T={config.seq_len}, {config.cell} '
    f'{config.hidden}, influence {config.influence}'
  )
  path = cli.open_task(config, folder, 'online', about, {})
  return path, cli.train_runs(config, path, train, plot)


def main(config: Config) -> None:
  """Train all runs and report them.

  Args:
    config: settings of the command.

  Raises:
    UserError: a folder or file cannot be read or written.
    Stopped: a signal asked for the end.
  """
  problem = PROBLEMS[config.task]
  known = ', '.join(f'{name} {value:.4g}' for name, value in problem.levels.items())
  print(f'{problem.score} of known predictors: {known}')
  plot = Plot(
    'learning.png',
    f'{config.task}, {config.cell} {config.hidden}, influence {config.influence}',
    f'test_{config.task}',
    problem.score,
    (('step', 'batches'), ('seconds', 'seconds')),
    tuple(problem.levels.items()),
  )
  cli.run_task(config, run, cli.Report(plot, f'last_quarter_{config.task}', digits=4))


if __name__ == '__main__':
  flags.run(main, Config, TASKS)
