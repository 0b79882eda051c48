"""Forecast real streams one step ahead: the learner, baselines and deep-river.

    python -m experiments.stream
    python -m experiments.stream --streams=sf-temps,co2 --systems=river
    python -m experiments.stream --streams=ptb-characters --data_dir=FOLDER
    python -m experiments.stream --streams=sf-temps --networks='LSTM*'

Each stream is read once, in order, and each forecast is made before its value is known.
The first steps set the scales. The next 30 % of the steps choose the learning rate,
separately for each network and stream; more rates are tried as long as the best one is
at the edge. The table shows the error over the remaining 70 %: the mean over seeds and
half the width of its 95 % confidence interval. All networks get the same inputs. For
values these are the last change, the change that followed the same step of the previous
season, and the difference from the value one season ago.

Streams come with packages, and those whose package is not installed are left out; the
text is read from --data_dir. --networks takes patterns of the names in the table,
including those of deep-river. deep-river is not a dependency of this library; the part
'river' compares it with this library's estimators where it is installed.

A command with the same --workdir resumes an earlier one: it keeps the lines in
stream.json and adds the missing ones.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import fnmatch
import functools
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from experiments.core import environment, files, flags, workdir
from experiments.core.comparison import interval
from experiments.core.flags import UserError, option
from experiments.stream import speed, systems
from experiments.stream.series import SOURCES, Problem
from experiments.stream.systems import Forecast

PARTS = ('baselines', 'learner', 'river', 'speed')


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the comparison."""

  streams: tuple[str, ...] = option(
    tuple(SOURCES), 'streams to forecast', tuple(SOURCES), required=True
  )
  systems: tuple[str, ...] = option(
    PARTS, "what to compare; 'speed' does not use --streams", PARTS, required=True
  )
  networks: tuple[str, ...] = option(
    ('*',), "patterns of the networks' names, such as 'LSTM*'", required=True
  )
  seeds: int = option(5, 'seeds of each network', within='[1, inf)')
  data_dir: str = option('', 'folder with ptb.train.txt, ptb.valid.txt, ptb.test.txt')
  workdir: str = option('', 'folder; default runs/stream-TIME')

  def __post_init__(self) -> None:
    flags.check_fields(self)

  def wants(self, label: str) -> bool:
    """Return whether a network is one of those asked for, given its name."""
    return any(fnmatch.fnmatchcase(label, pattern) for pattern in self.networks)


def main(config: Config) -> None:
  """Forecast, print the table and write it as JSON.

  Args:
    config: the streams, systems and seeds.

  Raises:
    UserError: nothing is left to compare, the folder cannot be written, or its lines
      have another number of seeds.
  """
  folder = workdir.make_folder(config.workdir)
  lines = saved_lines(folder, config)
  about = environment.describe_machine('river', 'deep-river', 'torch') | {
    'scale': 'own',
    'item': 'stream',
    'config': {'seeds': config.seeds},
  }
  is_empty = 'speed' not in config.systems
  for name in config.streams:
    folder_of_files = SOURCES[name].folder(config.data_dir)
    if folder_of_files is None:
      package = SOURCES[name].package
      reason = f'the package {package} is not installed' if package else 'no --data_dir'
      print(f'left out: {name} ({reason})')
      continue
    problem = SOURCES[name].read(folder_of_files)
    for system, forecast in candidates(config, problem):
      is_empty = False
      if (name, system) in lines:
        continue
      line = {'stream': name, 'system': system, **score(problem, forecast())}
      lines[name, system] = line
      print(f'{name}, {system}: error {line["error"]:.4g}', flush=True)
      write(folder, about, lines.values())
  if 'speed' in config.systems:
    print('measuring speed, which takes minutes', flush=True)
    lines |= {(line['stream'], line['system']): line for line in speed.measure()}
    write(folder, about, lines.values())
  if is_empty:
    raise UserError(
      f'--streams={",".join(config.streams)}, --systems={",".join(config.systems)} and '
      f'--networks={",".join(config.networks)} leave nothing to compare.'
    )
  print((folder / 'stream.txt').read_text())
  print(f'numbers and the table are in {folder}')


def saved_lines(folder: Path, config: Config) -> dict[tuple[str, str], dict[str, Any]]:
  """Return the lines of an earlier command in a folder, by stream and system.

  Args:
    folder: the folder.
    config: settings of this command.

  Raises:
    UserError: they have another number of seeds, or do not say how many.
  """
  path = folder / 'stream.json'
  if not path.exists():
    return {}
  saved = files.read_json(path)
  # Earlier versions did not write it.
  seeds = saved.get('config', {}).get('seeds')
  if seeds is None:
    raise UserError(
      f'{path} does not say how many seeds its lines have: choose another --workdir.'
    )
  if seeds != config.seeds:
    raise UserError(
      f'--seeds must be {seeds}, the number of seeds of the lines in {path}, got '
      f'{config.seeds}. Choose another --workdir for another number.'
    )
  return {(line['stream'], line['system']): line for line in saved['lines']}


def candidates(
  config: Config, problem: Problem
) -> Iterator[tuple[str, Callable[[], list[Forecast]]]]:
  """Yield each system's name, and a function of its forecasts.

  The function takes a while. It returns forecasts for all settings and seeds.

  Args:
    config: the systems and seeds.
    problem: the stream.
  """
  if 'baselines' in config.systems:
    for name, forecast in problem.baselines.items():
      yield name, functools.partial(list, [Forecast(np.nan, 0, forecast)])
    if not problem.classes:
      yield 'least squares, 3 steps', lambda: list(systems.run_linear(problem))
  if 'learner' in config.systems:
    for system in systems.SYSTEMS:
      if config.wants(system.label):
        run = functools.partial(systems.run_learner, system, problem, config.seeds)
        yield system.label, run
  # The estimators predict values, and their streams never start anew.
  if 'river' in config.systems and not problem.classes and problem.resets is None:
    for estimator in systems.estimators():
      if config.wants(estimator.label):
        yield (
          estimator.label,
          functools.partial(systems.run_estimator, estimator, problem, config.seeds),
        )


def score(problem: Problem, forecasts: list[Forecast]) -> dict[str, Any]:
  """Return a line of the table: the test error of the setting chosen before.

  Args:
    problem: the stream.
    forecasts: forecasts for all settings and seeds.
  """
  tuning: dict[float, list[float]] = {}
  for run in forecasts:
    error = problem.error(run.values, problem.tuning)
    tuning.setdefault(run.setting, []).append(error if np.isfinite(error) else np.inf)
  best = min(tuning, key=lambda setting: float(np.mean(tuning[setting])))
  # NaN, the setting of a baseline, equals nothing.
  chosen = [run for run in forecasts if run.setting == best or len(tuning) == 1]
  errors = [problem.error(run.values, problem.test) for run in chosen]
  last = problem.error(problem.baselines['last value'], problem.test)
  error = float(np.mean(errors))
  line = {
    'error': error,
    'interval': interval(errors),
    'of_last_value': error / last,
    'setting': None if np.isnan(best) else best,
    'seeds': len(errors),
    'steps': int(problem.test.sum()),
  }
  speeds = [run.speed for run in chosen if np.isfinite(run.speed)]
  if speeds:
    line['median_steps_per_s'] = round(float(np.median(speeds)))
  return line


def write(
  folder: Path, about: dict[str, Any], measured: Iterable[dict[str, Any]]
) -> None:
  """Write the lines so far as JSON and as a table."""
  lines = list(measured)
  files.write_json(folder / 'stream.json', about | {'lines': lines})
  table = tabulate(lines, 'keys', floatfmt='.4g', missingval='-')
  files.write_text(folder / 'stream.txt', table + '\n')


if __name__ == '__main__':
  flags.run(main, Config)
