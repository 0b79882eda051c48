"""One network on one stream by any method, as a task of the tournament.

`experiments.paper` runs it. Each forecast is made before its value is known. The error
over the first part of the stream chooses the learning rate, and that over the rest is
reported, see `experiments.stream.series`. A stream has no end, so the rate is constant.
"""

from collections.abc import Callable
import dataclasses
import math
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.core import cli, optimizers, recipe, schedule
from experiments.core.flags import UserError, check, option, redeclare
from experiments.core.plotting import Plot
from experiments.core.schedule import Member
from experiments.stream import systems
from experiments.stream.series import SOURCES, Problem
import fptt_jax
from fptt_jax import losses, nn
from fptt_jax.influence import INFLUENCES


@dataclasses.dataclass(frozen=True)
class Config(recipe.Recipe):
  """Settings of the methods on a stream of values."""

  stream: str = option(
    'sf-temps', 'the stream', ('sf-temps', 'water-flow', 'brent'), group='task'
  )
  method: tuple[str, ...] = redeclare(recipe.Recipe, 'method', ('tbptt',))
  lr: float = redeclare(recipe.Recipe, 'lr', 3e-3)
  clip: float = redeclare(recipe.Recipe, 'clip', 1.0)
  window_size: int = option(
    8, 'S, steps per window', within='[1, inf)', group='training'
  )
  influence: str = option(
    'none',
    'how credit crosses the border of a window',
    ('none', *INFLUENCES),
    group='training',
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    fits = set(self.method) <= {'fptt', 'tbptt'}
    check(fits, 'method', self.method, "'fptt' or 'tbptt', which learn from streams")
    self.check_bootstrap(False)


def run(
  config: Config, folder: str, plot: Plot | None = None
) -> tuple[Path, list[dict[str, Any]]]:
  """Forecast the stream for each method, seed and grid value.

  Args:
    config: settings of the runs.
    folder: folder of the runs.
    plot: not used; a run takes seconds.

  Returns:
    (the folder, a summary per run).

  Raises:
    UserError: the package with the stream is not installed, or the folder holds runs of
      another configuration.
    Stopped: a signal asked for the end.
  """
  del plot
  source = SOURCES[config.stream]
  package = source.folder('')
  if package is None:
    raise UserError(
      f'--stream={config.stream} reads a file of {source.package}: pip install '
      f'{source.package}.'
    )
  problem = source.read(package)
  about = f'{config.stream}, {len(problem.targets):,} steps, GRU {systems.HIDDEN}'
  path = cli.open_task(config, folder, 'stream', about, {})

  def train(chosen: list[Member]) -> None:
    forecast = make_forecaster(problem, chosen[0])
    for member in chosen:
      started = time.perf_counter()
      summary = summarize(problem, forecast(member), member)
      summary['seconds'] = round(time.perf_counter() - started, 2)
      schedule.finish_run(path, member, summary, None)

  return path, schedule.train_all(config, path, None, train)


def make_forecaster(problem: Problem, of: Member) -> Callable[[Member], np.ndarray]:
  """Return a function that learns from the stream as a run does.

  Runs that differ in seed and hyperparameters share its compiled program.

  Args:
    problem: the stream, all of whose numbers are known.
    of: any of the runs.

  Returns:
    (run) -> its forecasts [n].
  """
  size = of.config.window_size
  # Padded to whole windows, which run faster. Outputs of the padding are cut off below,
  # so that learning from it has no effect.
  padding = (0, -len(problem.targets) % size)
  x = np.pad(problem.inputs, (padding, (0, 0)))[:, None]
  y = np.pad(problem.targets, padding)[:, None, None]
  learn = make_program(of.config, of.method, x.shape[-1])

  def forecast(member: Member) -> np.ndarray:
    outputs = np.asarray(learn(member, x, y))[: len(problem.targets), 0, 0]
    return problem.values + problem.scale * outputs

  return forecast


def make_program(
  config: Config, method: str, features: int
) -> Callable[[Member, np.ndarray, np.ndarray], jax.Array]:
  """Return a function (run, x, y) -> outputs, each made before its label is seen.

  Args:
    config: settings of the runs.
    method: training method.
    features: number of inputs.
  """
  model = systems.make_model(nn.GRU, features, 1)
  learner = fptt_jax.make_learner(
    model,
    losses.sequence_regression(),
    optimizers.make_optimizer(config, method),
    window_size=config.window_size,
    influence=config.influence,
  )

  def run_window(carry: Any, window: Any) -> tuple[Any, Any]:
    # The average has a hidden state of its own.
    state, hidden = carry
    params = optimizers.evaluation_params(config, method, state.train)
    hidden, outputs = model.apply(params, hidden, window[0], None, None)
    state, _, _ = learner.step(state, *window)
    return (state, hidden), outputs

  @jax.jit
  def follow(state: fptt_jax.StreamState, x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = model.start(state.train.params, 1)
    windows = [a.reshape(-1, config.window_size, *a.shape[1:]) for a in (x, y)]
    _, outputs = jax.lax.scan(run_window, (state, hidden), tuple(windows))
    return outputs.reshape(y.shape)

  def learn(member: Member, x: np.ndarray, y: np.ndarray) -> jax.Array:
    state = learner.init(jax.random.key(member.seed), x)
    found = optimizers.hyperparameters(member.config, method)
    values = {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}
    opt_state = optax.tree.set(state.train.opt_state, **values)
    state = state._replace(train=state.train._replace(opt_state=opt_state))
    if config.averaging != 'none':
      return follow(state, x, y)
    _, outputs, _ = learner.step(state, x, y)
    return outputs

  return learn


def summarize(problem: Problem, forecast: np.ndarray, member: Member) -> dict[str, Any]:
  """Return the errors of a run; None if it diverged.

  Args:
    problem: the stream.
    forecast: its forecasts [n].
    member: the run.
  """
  parts = {'first_mae': problem.tuning, 'test_mae': problem.test}
  errors = {name: problem.error(forecast, steps) for name, steps in parts.items()}
  lost = {} if np.isfinite(forecast).all() else {'lost': 'a forecast is not finite'}
  return {
    'lr': member.config.lr,
    'momentum': member.config.momentum,
    'K': math.ceil(len(forecast) / member.config.window_size),
    **{name: error if np.isfinite(error) else None for name, error in errors.items()},
    **lost,
  }
