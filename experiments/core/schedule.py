"""Choice of the runs that share a program: seeds, and values of a grid.

Each run has its own folder, metrics and checkpoints. A run may therefore be resumed in
another program than the one it began in.
"""

from collections.abc import Callable, Iterator
import math
from pathlib import Path
import sys
from typing import Any, NamedTuple

import numpy as np

from experiments.core import (
  checkpoints,
  files,
  parameters,
  processes,
  recipe,
  signals,
  workdir,
)


class Member(NamedTuple):
  """One run.

  Attributes:
    config: settings of the run, with its values of the grid.
    method: training method.
    seed: seed of the run.
    varied: values of the grid by setting.
    placeholder: whether it only takes the place of a run that has ended. Results of
      placeholders are not kept.
  """

  config: Any
  method: str
  seed: int
  varied: dict[str, float]
  placeholder: bool = False

  @property
  def name(self) -> str:
    """Name of the run's folder."""
    return '-'.join([self.method, f'seed{self.seed}', *self._values()])

  @property
  def line(self) -> str:
    """Name of the run without its seed, the same for all seeds."""
    return '-'.join([self.method, *self._values()])

  def _values(self) -> list[str]:
    return [f'{name}{format_number(value)}' for name, value in self.varied.items()]

  @property
  def label(self) -> str:
    """Start of the lines that are printed about the run."""
    values = [f'{name} {format_number(value)}' for name, value in self.varied.items()]
    return ' '.join([f'{self.method:>11} seed {self.seed}', *values])


def format_number(value: float) -> str:
  """Return a text that stands for this number only."""
  # Six digits read best, but two runs must not get the same name.
  text = f'{value:g}'
  return text if float(text) == value else repr(value)


def list_members(config: recipe.Recipe) -> list[Member]:
  """Return all runs that a configuration asks for."""
  variants = config.variants()
  return [
    Member(chosen.for_method(method), method, seed, varied)
    for method in config.method
    for varied, chosen in variants
    for seed in config.seeds
  ]


def train_all(
  config: recipe.Recipe,
  folder: Path,
  size: int | None,
  train: Callable[[list[Member]], None],
) -> list[dict[str, Any]]:
  """Train the runs that have not ended, and return the summaries of all.

  Args:
    config: settings that list the runs.
    folder: the parent of the runs' folders.
    size: largest number of runs per program; None sets no limit.
    train: trains runs of one method. It must call :func:`finish_run` for each run that
      is not a placeholder.

  Returns:
    A summary per run, with the name of its folder as `run`.

  Raises:
    Stopped: a signal asked for the end; everything is saved.
    UserError: a folder is in use, or a file cannot be read or written.
  """
  everyone = list_members(config)
  with signals.catch_signals():
    for method in config.method:
      _train_method(everyone, method, folder, size, train)
    # Too late for the last run, but the caller must not go on with its own work.
    asked = processes.stopped_by()
    if asked:
      raise signals.Stopped(f'stopped by {asked}; all these runs are finished')

  def read_results() -> list[dict[str, Any]]:
    return [
      {'run': member.name, **files.read_json(_result_path(folder, member))}
      for member in everyone
    ]

  results = processes.on_first_process(read_results)
  return [
    {name: value for name, value in result.items() if name != 'config_sha256'}
    for result in results
  ]


def _train_method(
  everyone: list[Member],
  method: str,
  folder: Path,
  size: int | None,
  train: Callable[[list[Member]], None],
) -> None:
  """Train the runs of one method, program by program.

  Args:
    everyone: runs of all methods.
    method: the method.
    folder: the parent of the runs' folders.
    size: largest number of runs per program; None sets no limit.
    train: trains runs of one method.

  Raises:
    Stopped: a signal asked for the end.
  """

  def next_group() -> tuple[list[int], int]:
    # Looked up anew for each program: the one before may have been interrupted by a
    # broken checkpoint.
    return _next_group(everyone, method, folder, size)

  while True:
    numbers, places = processes.on_first_process(next_group)
    if not numbers:
      return
    asked = processes.stopped_by()
    if asked:
      raise signals.Stopped(f'stopped by {asked} between two runs')
    chosen = [everyone[number] for number in numbers]
    # A program of another size would round differently.
    placeholder = chosen[0]._replace(placeholder=True)
    padded = chosen + [placeholder] * (places - len(chosen))
    try:
      with workdir.lock_runs([folder / member.name for member in chosen]):
        train(padded)
    except checkpoints.BrokenCheckpoint as broken:
      # It has been moved away, so the runs can resume from an earlier one.
      print_warning(str(broken))


def _next_group(
  everyone: list[Member], method: str, folder: Path, size: int | None
) -> tuple[list[int], int]:
  """Return the numbers of the runs to train next, and the size of their program.

  Without a run that has not ended, the result is ([], 0).
  """
  waiting = [
    number
    for number, member in enumerate(everyone)
    if member.method == method and not has_ended(folder, member)
  ]
  if not waiting:
    return [], 0
  saved = [resume_points(folder / everyone[number].name) for number in waiting]
  chosen, places = group_runs(saved, size)[0]
  return [waiting[number] for number in chosen], places


def finish_run(
  folder: Path, member: Member, summary: dict[str, Any], params: Any
) -> None:
  """Write the result of a run, which is not trained again with these settings.

  Args:
    folder: the --workdir.
    member: the run.
    summary: its result.
    params: the parameters of the result; None if the run has none.

  Raises:
    UserError: a file cannot be written.
  """
  # The result comes last: with it the run counts as ended.
  if params is not None:
    parameters.write_parameters(folder / member.name, params)
  described = {'method': member.method, 'seed': member.seed, **member.varied, **summary}
  processes.on_first_process(
    lambda: files.write_json(
      _result_path(folder, member),
      {**described, 'config_sha256': workdir.config_sha256(folder)},
    )
  )


def print_warning(text: str) -> None:
  """Print a warning on the first process."""
  if processes.is_first():
    print(f'warning: {text}', file=sys.stderr, flush=True)


def has_ended(folder: Path, member: Member) -> bool:
  """Return whether a run has ended under the folder's configuration.

  Args:
    folder: the --workdir.
    member: the run.

  Raises:
    UserError: a file cannot be read.
  """
  path = _result_path(folder, member)
  if not files.exists(path):
    return False
  # A result from before an --allow_config_change is of other settings.
  result = files.read_json(path)
  return bool(result.get('config_sha256') == workdir.config_sha256(folder))


def _result_path(folder: Path, member: Member) -> Path:
  """Return the path of a run's result."""
  return folder / member.name / 'result.json'


def resume_points(folder: Path) -> dict[int, int]:
  """Return the steps from which a run can be resumed.

  Args:
    folder: the run's folder.

  Returns:
    The number of runs in the program until then, by step. Step 0, with 0 runs, is among
    them if at most one checkpoint has ever been written, and not by a run alone in its
    program.
  """
  saved = {
    step: checkpoints.read_record(folder, step).get('places', 1)
    for step in checkpoints.saved_steps(folder)
  }
  # If a program is killed during its first save, some of its runs have a checkpoint and
  # others have none. They all start anew then. A run alone in its program goes on.
  if len(saved) > 1 or [*saved.values()] == [1] or (folder / 'broken').exists():
    return saved
  return {0: 0, **saved}


def group_runs(
  saved: list[dict[int, int]], size: int | None
) -> list[tuple[list[int], int]]:
  """Group runs that can resume from the same step in one program.

  A process may have been killed while it saved its runs. Runs that are one interval
  ahead then go back to the step of the others.

  Args:
    saved: :func:`resume_points` of each run.
    size: largest number of runs per group; None sets no limit.

  Returns:
    (numbers of the runs, size of the program) per group, those that are furthest behind
    first. A program is as large as before, even if some of its runs have ended, so that
    results are rounded as before.
  """
  last = [max(steps) for steps in saved]
  left = sorted(range(len(saved)), key=lambda number: (last[number], number))
  groups = []
  while left:
    step = last[left[0]]
    places = saved[left[0]][step]
    # Runs of programs of another size cannot join: they were rounded differently.
    fits = sorted(n for n in left if saved[n].get(step) == places)[:size]
    # As many places as before within the limit, and at least one per run.
    limit = places if size is None else min(places, size)
    groups.append((fits, max(len(fits), limit)))
    left = [number for number in left if number not in fits]
  return groups


def chunks(number: int, size: int) -> list[np.ndarray]:
  """Split the numbers 0..N-1 into parts of nearly equal length.

  Args:
    number: N.
    size: largest length of a part; 0 sets no limit.
  """
  # Equal parts have at most two lengths, and each length is a program to compile.
  return np.array_split(np.arange(number), math.ceil(number / size) if size else 1)


def remaining(parts: list[np.ndarray], done: int) -> Iterator[np.ndarray]:
  """Yield the rest of the parts when the first numbers are done.

  Apart from the first, they are the same parts wherever the work was interrupted.

  Args:
    parts: the parts of 0..N-1 from :func:`chunks`.
    done: how many numbers are done.
  """
  for part in parts:
    if part[-1] >= done:
      yield part[part >= done]
