"""Forecasters of streams: recurrent networks, a linear model, and deep-river."""

from collections.abc import Callable, Iterator
import dataclasses
import importlib
import importlib.util
import time
from typing import Any

from flax import nnx
import jax
import numpy as np
import optax

from experiments.stream.series import Problem
import fptt_jax
from fptt_jax import losses, nn

HIDDEN = 32
"""Units of all networks."""


RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates of Adam that all networks choose from."""


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


Forecast = tuple[float, int, np.ndarray, float]
"""(setting, seed, forecast [n], steps per second)"""


def make_learner(system: System, features: int) -> fptt_jax.Learner:
  """Make the learner of a network; its learning rate is a number in its state."""

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    # LRU and the gated cells have the same first two arguments.
    cell: Any = system.cell
    return nn.Sequential(
      cell(features, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, 1, rngs=rngs)
    )

  def adam(learning_rate: float) -> optax.GradientTransformation:
    base = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    return fptt_jax.fptt(base, alpha=0.1) if system.regularized else base

  return fptt_jax.make_learner(
    nn.from_nnx(build),
    losses.sequence_regression(),
    optax.inject_hyperparams(adam)(learning_rate=RATES[0]),
    window_size=system.window_size,
    influence=system.influence,
  )


def run_learner(system: System, problem: Problem, seeds: int) -> Iterator[Forecast]:
  """Yield a network's forecasts for all learning rates and seeds."""
  x, y = problem.inputs[:, None], problem.targets[:, None, None]
  learner = make_learner(system, x.shape[-1])
  # Whole windows take the shorter way; the few steps left over come after them.
  whole = len(x) - len(x) % system.window_size
  for rate in RATES:
    for seed in range(seeds):
      state = learner.init(jax.random.key(seed), x)
      opt_state = optax.tree.set(state.train.opt_state, learning_rate=rate)
      state = state._replace(train=state.train._replace(opt_state=opt_state))
      start = time.perf_counter()
      state, outputs, _ = learner.step(state, x[:whole], y[:whole])
      changes = np.asarray(outputs)[:, 0, 0]
      seconds = time.perf_counter() - start
      if whole < len(x):
        _, rest = learner.predict(state, x[whole:])
        changes = np.concatenate([changes, np.asarray(rest)[:, 0, 0]])
      yield rate, seed, problem.values + problem.scale * changes, whole / seconds


def run_linear(problem: Problem) -> Iterator[Forecast]:
  """Yield the forecasts of recursive least squares for all forgetting factors.

  Its inputs are those of the last three steps and a constant.
  """
  x = np.nan_to_num(problem.inputs.astype(np.float64))
  lags = [np.roll(x, lag, axis=0) for lag in range(3)]
  rows = np.concatenate([*lags, np.ones((len(x), 1))], axis=1)
  for factor in FORGETTING:
    start = time.perf_counter()
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
    speed = len(rows) / (time.perf_counter() - start)
    yield factor, 0, problem.values + problem.scale * changes, speed


def has_deep_river() -> bool:
  """Return whether deep-river is installed."""
  return importlib.util.find_spec('deep_river') is not None


def run_deep_river(name: str, problem: Problem, seeds: int) -> Iterator[Forecast]:
  """Yield the forecasts of a recurrent network of deep-river.

  Args:
    name: name of its class.
    problem: the stream.
    seeds: number of seeds.
  """
  import torch

  torch.set_num_threads(1)
  for rate in RATES:
    for seed in range(seeds):
      torch.manual_seed(seed)
      make = getattr(importlib.import_module('deep_river.regression'), name)
      features = problem.inputs.shape[1]
      model = make(n_features=features, hidden_size=HIDDEN, lr=rate, seed=seed)
      start = time.perf_counter()
      changes = predict_and_learn(model.predict_one, model.learn_one, problem)
      speed = len(changes) / (time.perf_counter() - start)
      yield rate, seed, problem.values + problem.scale * changes, speed


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
