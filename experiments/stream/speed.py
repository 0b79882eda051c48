"""Steps per second of the learner, of its estimator for river, and of deep-river."""

from collections.abc import Callable, Iterator
import time
from typing import Any

import jax
import numpy as np

from experiments.stream import systems
from experiments.stream.series import make_problem
from experiments.stream.systems import System
from fptt_jax import nn

STEPS = 10_000
"""Steps of a chunk."""


CALLS = 500
"""Calls of one step in a round."""


ROUNDS = 7
"""Rounds, in which all programs take turns."""


CASES = (
  System(nn.GRU, 1),
  System(nn.GRU, 1, 'snap1'),
  System(nn.LSTM, 1),
  System(nn.LSTM, 8),
  System(nn.LSTM, 8, 'snap1'),
)
"""The networks that are timed, with 32 units and one row."""


def measure() -> list[dict[str, Any]]:
  """Return a line per program: its fastest and its median round, in steps per second.

  A step is a prediction and the learning from its label.
  """
  programs = dict(programs_of_learners())
  programs |= dict(programs_of_estimators())
  for run in programs.values():
    run()  # Compiles.
  seconds: dict[tuple[str, str], list[float]] = {name: [] for name in programs}
  for _ in range(ROUNDS):
    for name, run in programs.items():
      start = time.perf_counter()
      steps = run()
      seconds[name].append((time.perf_counter() - start) / steps)
  return [
    {
      'stream': form,
      'system': system,
      'fastest_steps_per_s': round(1 / min(times)),
      'median_steps_per_s': round(1 / float(np.median(times))),
    }
    for (form, system), times in seconds.items()
  ]


def programs_of_learners() -> Iterator[tuple[tuple[str, str], Callable[[], int]]]:
  """Yield programs that learn a chunk of steps, or step by step."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(STEPS, 1, 3)).astype(np.float32)
  y = rng.normal(size=(STEPS, 1, 1)).astype(np.float32)
  for system in CASES:
    learner = systems.make_learner(system, 3)
    states = {n: learner.init(jax.random.key(0), x) for n in (1, STEPS)}

    def chunk(learner: Any = learner, states: Any = states) -> int:
      states[STEPS], outputs, _ = learner.step(states[STEPS], x, y)
      jax.block_until_ready(outputs)
      return STEPS

    def single(learner: Any = learner, states: Any = states) -> int:
      state = states[1]
      for t in range(CALLS):
        state, *_ = learner.step(state, x[t : t + 1], y[t : t + 1])
      jax.block_until_ready(state)
      states[1] = state
      return CALLS

    yield (f'speed, chunks of {STEPS:,}', system.label), chunk
    yield ('speed, single steps', system.label), single


def programs_of_estimators() -> Iterator[tuple[tuple[str, str], Callable[[], int]]]:
  """Yield programs that call predict_one and learn_one of the installed estimators."""
  values = np.random.default_rng(0).normal(size=CALLS + 10)
  problem = make_problem(values, season=2)
  for estimator in systems.estimators():
    made = estimator.make(3, systems.FIRST_RATE, 0)

    def run(model: Any = made) -> int:
      systems.predict_and_learn(model.predict_one, model.learn_one, problem)
      return len(problem.targets)

    yield ('speed, predict_one and learn_one', estimator.label), run
