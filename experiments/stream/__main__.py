"""Forecast real streams one step ahead: the learner, baselines and deep-river.

    python -m experiments.stream
    python -m experiments.stream --streams=sf-temps --systems=deep-river

Each stream is seen once, in order, and each forecast is made before its value is known.
The first seasons set the scales. Learning rates are chosen by the mean absolute error
over the first 30 % of the steps that follow, separately for each network and stream;
the table has the error over the other 70 %, with the mean over seeds and half the width
of its 95 % confidence interval. All networks have the same inputs: the last change, the
change that followed a season ago, and the difference to a season ago.

Streams come with packages, and those whose package is not installed are left out.
deep-river is no dependency of this library; it is compared where it is installed.
"""

from collections.abc import Iterator
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from experiments.core import environment, files, flags, workdir
from experiments.core.flags import option
from experiments.paper.tables import interval
from experiments.stream import speed, systems
from experiments.stream.series import SOURCES, Problem, is_available, read
from experiments.stream.systems import Forecast

PARTS = ('baselines', 'learner', 'deep-river', 'speed')


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the comparison."""

  streams: tuple[str, ...] = option(
    tuple(SOURCES), 'streams to forecast', tuple(SOURCES), required=True
  )
  systems: tuple[str, ...] = option(
    PARTS, 'what to compare; speed is measured on no stream', PARTS, required=True
  )
  seeds: int = option(5, 'seeds of each network', within='[1, inf)')
  workdir: str = option('', 'folder; default runs/stream-TIME')

  def __post_init__(self) -> None:
    flags.check_fields(self)


def main(config: Config) -> None:
  """Forecast, print the table and write it as JSON.

  Args:
    config: the streams, systems and seeds.

  Raises:
    UserError: the folder cannot be written.
  """
  folder = workdir.make_folder(config.workdir)
  about = environment.describe_machine('river', 'deep-river', 'torch') | {
    'scale': 'own',
    'item': 'stream',
  }
  lines: list[dict[str, Any]] = []
  for name in config.streams:
    if not is_available(name):
      print(f'left out: {name} (the package {SOURCES[name].package} is not installed)')
      continue
    problem = read(name)
    for system, forecasts in candidates(config, problem):
      lines.append({'stream': name, 'system': system, **score(problem, forecasts)})
      write(folder, about, lines)
  if 'speed' in config.systems:
    lines += speed.measure()
    write(folder, about, lines)
  print((folder / 'stream.txt').read_text())
  print(f'numbers and the table are in {folder}')


def candidates(
  config: Config, problem: Problem
) -> Iterator[tuple[str, list[Forecast]]]:
  """Yield each system's name, and its forecasts for all settings and seeds.

  Args:
    config: the systems and seeds.
    problem: the stream.
  """
  if 'baselines' in config.systems:
    for name, forecast in problem.baselines.items():
      yield name, [(np.nan, 0, forecast, np.nan)]
    yield 'least squares, 3 steps', list(systems.run_linear(problem))
  if 'learner' in config.systems:
    for system in systems.SYSTEMS:
      yield system.label, list(systems.run_learner(system, problem, config.seeds))
  if 'deep-river' in config.systems and systems.has_deep_river():
    for name in ('LSTMRegressor', 'RNNRegressor'):
      rivals = systems.run_deep_river(name, problem, config.seeds)
      yield f'deep-river, {name}', list(rivals)


def score(problem: Problem, forecasts: list[Forecast]) -> dict[str, Any]:
  """Return a line of the table: the test error of the setting chosen before.

  Args:
    problem: the stream.
    forecasts: forecasts for all settings and seeds.
  """
  tuning: dict[float, list[float]] = {}
  for setting, _, forecast, _ in forecasts:
    error = problem.error(forecast, problem.tuning)
    tuning.setdefault(setting, []).append(error if np.isfinite(error) else np.inf)
  best = min(tuning, key=lambda setting: float(np.mean(tuning[setting])))
  # NaN, the setting of a baseline, equals nothing.
  chosen = [run for run in forecasts if run[0] == best or len(tuning) == 1]
  errors = [problem.error(forecast, problem.test) for _, _, forecast, _ in chosen]
  last = problem.error(problem.baselines['last value'], problem.test)
  error = float(np.mean(errors))
  return {
    'error': error,
    'interval': interval(errors),
    'of_last_value': error / last,
    'setting': None if np.isnan(best) else best,
    'seeds': len(errors),
    'steps': int(problem.test.sum()),
  }


def write(folder: Path, about: dict[str, Any], lines: list[dict[str, Any]]) -> None:
  """Write the lines so far as JSON and as a table."""
  files.write_json(folder / 'stream.json', about | {'lines': lines})
  table = tabulate(lines, 'keys', floatfmt='.4g', missingval='-')
  files.write_text(folder / 'stream.txt', table + '\n')


if __name__ == '__main__':
  flags.run(main, Config)
