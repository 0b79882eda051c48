"""Forecasters of streams: recurrent networks, a linear model, and estimators of river.

An estimator of river is asked for one step and then told its label. There are those of
this library and those of deep-river.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import importlib
import importlib.util
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import numpy as np
import optax

from experiments.stream.series import Problem
import fptt_jax
from fptt_jax import losses, nn

HIDDEN = 32
"""Units of all networks."""


RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
"""Learning rates of Adam that all networks choose from. Those around `FIRST_RATE` are
tried first, and others only while the best is at the edge of what was tried.
"""


FIRST_RATE = 3e-3


TUNING_SEEDS = 2
"""Seeds that each rate is tried with; the chosen one runs with all seeds."""


FORGETTING = (0.99, 0.999, 1.0)
"""Factors that the linear model chooses from."""


@dataclasses.dataclass(frozen=True)
class System:
  """A network of this library and how it learns.

  Attributes:
    cell: class of its recurrent layer.
    window_size: S.
    influence: how credit crosses windows.
    regularized: whether the optimizer contains `fptt`.
  """

  cell: type[nnx.Module]
  window_size: int
  influence: str = 'none'
  regularized: bool = False

  @property
  def label(self) -> str:
    """The name in the table."""
    name = f'{self.cell.__name__}, S={self.window_size}, {self.influence}'
    return f'{name}, fptt' if self.regularized else name


SYSTEMS = (
  System(nn.GRU, 1),
  System(nn.GRU, 1, 'snap1'),
  System(nn.GRU, 8),
  System(nn.GRU, 8, 'snap1'),
  System(nn.GRU, 8, regularized=True),
  System(nn.LSTM, 8),
  System(nn.LSTM, 8, 'snap1'),
  System(nn.LRU, 1, 'rtrl'),
)
"""The networks of this library."""


class Forecast(NamedTuple):
  """The forecasts of one run over a stream.

  Attributes:
    setting: the learning rate, or another number that was chosen; NaN for none.
    seed: seed of the run.
    values: forecasts [n], of values or of classes.
    speed: steps per second, NaN if it was not measured.
  """

  setting: float
  seed: int
  values: np.ndarray
  speed: float = np.nan


Run = Callable[[float, int], Forecast]
"""(learning rate, seed) -> forecast"""


def choose_rate(run: Run, problem: Problem, seeds: int) -> list[Forecast]:
  """Return the forecasts of all seeds with the best learning rate.

  It is the one with the least error over the steps that settings are chosen by, and
  others have been tried on both sides of it, unless `RATES` ends there.

  Args:
    run: makes a forecast.
    problem: the stream.
    seeds: number of seeds.
  """
  trials: dict[int, list[Forecast]] = {}
  errors: dict[int, float] = {}
  middle = RATES.index(FIRST_RATE)
  places = set(range(len(RATES)))
  wanted = {middle - 1, middle, middle + 1} & places
  best = middle
  while wanted:
    for place in sorted(wanted):
      rate = RATES[place]
      trials[place] = [run(rate, seed) for seed in range(min(seeds, TUNING_SEEDS))]
      found = [problem.error(trial.values, problem.tuning) for trial in trials[place]]
      errors[place] = float(np.mean(np.where(np.isfinite(found), found, np.inf)))
    best = min(errors, key=errors.__getitem__)
    wanted = {best - 1, best + 1} & places - set(trials)
  others = range(len(trials[best]), seeds)
  return [*trials[best], *(run(RATES[best], seed) for seed in others)]


def build_network(
  cell: Any, features: int, outputs: int, rngs: nnx.Rngs
) -> nn.Sequential:
  """Build a recurrent layer and a readout."""
  # LRU and the gated cells have the same first two arguments.
  return nn.Sequential(
    cell(features, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, outputs, rngs=rngs)
  )


def make_model(cell: Any, features: int, outputs: int) -> fptt_jax.Model:
  """Make the model of a recurrent layer and a readout."""
  return nn.from_nnx(functools.partial(build_network, cell, features, outputs))


def make_learner(system: System, features: int, classes: int = 0) -> fptt_jax.Learner:
  """Make the learner of a network; its learning rate is a number in its state.

  Args:
    system: the network.
    features: number of inputs.
    classes: number of classes, or 0 to predict a value.
  """

  def adam(learning_rate: float) -> optax.GradientTransformation:
    base = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    return fptt_jax.fptt(base, alpha=0.1) if system.regularized else base

  loss = losses.sequence_regression()
  if classes:
    loss = losses.sequence_classification(classes)
  return fptt_jax.make_learner(
    make_model(system.cell, features, classes or 1),
    loss,
    optax.inject_hyperparams(adam)(learning_rate=RATES[0]),
    window_size=system.window_size,
    influence=system.influence,
  )


def run_learner(system: System, problem: Problem, seeds: int) -> list[Forecast]:
  """Return a network's forecasts with the best learning rate, for all seeds."""
  classes = problem.classes
  x = problem.inputs[:, None]
  labeled = np.isfinite(problem.targets)[:, None]
  y = problem.targets[:, None, None]
  if classes:
    y = np.nan_to_num(problem.targets).astype(np.int32)[:, None]
  resets = None if problem.resets is None else problem.resets[:, None]
  learner = make_learner(system, x.shape[-1], classes)
  # Whole windows take the shorter way; the few steps left over come after them.
  whole = len(x) - len(x) % system.window_size
  if resets is not None:
    whole = len(x)

  def run(rate: float, seed: int) -> Forecast:
    state = learner.init(jax.random.key(seed), x)
    opt_state = optax.tree.set(state.train.opt_state, learning_rate=rate)
    state = state._replace(train=state.train._replace(opt_state=opt_state))
    state, outputs, _ = learner.step(
      state, x[:whole], y[:whole], labeled[:whole], reset=resets
    )
    parts = [np.asarray(outputs)[:, 0]]
    if whole < len(x):
      _, rest = learner.predict(state, x[whole:])
      parts.append(np.asarray(rest)[:, 0])
    found = np.concatenate(parts)
    if classes:
      return Forecast(rate, seed, found.argmax(1))
    return Forecast(rate, seed, problem.values + problem.scale * found[:, 0])

  return choose_rate(run, problem, seeds)


def run_linear(problem: Problem) -> Iterator[Forecast]:
  """Yield the forecasts of recursive least squares for all forgetting factors.

  Its inputs are those of the last three steps and a constant.
  """
  x = np.nan_to_num(problem.inputs.astype(np.float64))
  lags = [np.roll(x, lag, axis=0) for lag in range(3)]
  rows = np.concatenate([*lags, np.ones((len(x), 1))], axis=1)
  for factor in FORGETTING:
    weights = np.zeros(rows.shape[1])
    covariance = 100.0 * np.eye(rows.shape[1])
    changes = np.zeros(len(rows))
    for t, row in enumerate(rows):
      changes[t] = row @ weights
      if not np.isfinite(problem.targets[t]):
        continue
      gain = covariance @ row / (factor + row @ covariance @ row)
      weights += gain * (problem.targets[t] - changes[t])
      covariance = (covariance - np.outer(gain, row @ covariance)) / factor
    yield Forecast(factor, 0, problem.values + problem.scale * changes)


@dataclasses.dataclass(frozen=True)
class Estimator:
  """A regressor of river, with a recurrent network of `HIDDEN` units.

  Attributes:
    label: the name in the table.
    make: (number of features, learning rate, seed) -> the regressor.
  """

  label: str
  make: Callable[[int, float, int], Any]


def estimators() -> list[Estimator]:
  """Return the estimators whose packages are installed."""
  found = []
  if importlib.util.find_spec('river') is not None:
    found += [
      Estimator(f'fptt_jax.river, {system.label}', functools.partial(_make_own, system))
      for system in (System(nn.GRU, 8, 'snap1'), System(nn.LSTM, 8, 'snap1'))
    ]
  if importlib.util.find_spec('deep_river') is not None:
    found += [
      Estimator(f'deep-river, {name}', functools.partial(_make_deep_river, name))
      for name in ('LSTMRegressor', 'RNNRegressor')
    ]
  return found


def _make_own(system: System, features: int, rate: float, seed: int) -> Any:
  from fptt_jax.river import Regressor

  return Regressor(
    model=_model_of(system.cell),
    optimizer=_optimizer_of(rate),
    window_size=system.window_size,
    influence=system.influence,
    seed=seed,
  )


@functools.cache
def _model_of(cell: Any) -> Callable[[int], fptt_jax.Model]:
  """Return the model of a cell; the same function, so that it is compiled once."""
  return lambda features: make_model(cell, features, 1)


@functools.cache
def _optimizer_of(rate: float) -> Callable[[], optax.GradientTransformation]:
  """Return the optimizer of a rate; the same function, so that it is compiled once."""
  return lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def _make_deep_river(name: str, features: int, rate: float, seed: int) -> Any:
  import torch

  # More threads only slow such small networks down.
  torch.set_num_threads(1)
  torch.manual_seed(seed)
  make = getattr(importlib.import_module('deep_river.regression'), name)
  return make(n_features=features, hidden_size=HIDDEN, lr=rate, seed=seed)


def run_estimator(estimator: Estimator, problem: Problem, seeds: int) -> list[Forecast]:
  """Return an estimator's forecasts with the best learning rate, for all seeds."""

  def run(rate: float, seed: int) -> Forecast:
    model = estimator.make(problem.inputs.shape[1], rate, seed)
    start = time.perf_counter()
    changes = predict_and_learn(model.predict_one, model.learn_one, problem)
    speed = len(changes) / (time.perf_counter() - start)
    return Forecast(rate, seed, problem.values + problem.scale * changes, speed)

  return choose_rate(run, problem, seeds)


def predict_and_learn(
  predict_one: Callable[[dict[str, float]], float],
  learn_one: Callable[[dict[str, float], float], None],
  problem: Problem,
) -> np.ndarray:
  """Return the predicted changes [n] of an estimator of river."""
  changes = np.zeros(len(problem.targets))
  for t, row in enumerate(np.nan_to_num(problem.inputs).tolist()):
    x = {f'x{place}': value for place, value in enumerate(row)}
    changes[t] = predict_one(x)
    if np.isfinite(problem.targets[t]):
      learn_one(x, float(problem.targets[t]))
  return changes
