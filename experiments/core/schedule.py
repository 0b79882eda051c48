"""Runs that are trained side by side, by one program: seeds, and values out of a grid.

Each has its folder, its metrics and its checkpoints as if it were alone, so a run may
go on with others than it began with.
"""

from collections.abc import Callable, Iterator
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
    config: its settings, those out of the grid among them.
    method: its method.
    seed: its seed.
    varied: which settings are out of the grid.
    placeholder: whether it only fills a program up, in place of a run that has ended:
      nothing of it is kept.
  """

  config: Any
  method: str
  seed: int
  varied: dict[str, float]
  placeholder: bool = False

  @property
  def name(self) -> str:
    """Name of its folder."""
    return '-'.join(
      [
        self.method,
        f'seed{self.seed}',
        *(f'{name}{format_number(value)}' for name, value in self.varied.items()),
      ]
    )

  @property
  def label(self) -> str:
    """What is shown of it."""
    return ' '.join(
      [
        f'{self.method:>11} seed {self.seed}',
        *(f'{name} {format_number(value)}' for name, value in self.varied.items()),
      ]
    )


def format_number(value: float) -> str:
  """A number as a text of no other number."""
  text = f'{value:g}'
  return text if float(text) == value else repr(value)


def list_members(config: recipe.Recipe) -> list[Member]:
  """All runs that a configuration asks for."""
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
  """Trains what has not ended before and returns the summary of each run; 'run' in it
  is the name of its folder.

  Args:
    config: what is asked for.
    folder: where the runs' folders are.
    size: how many runs of a method to train at once; None for all.
    train: trains runs of one method; each is ended by :func:`end`, but for those that
      stand in for others.

  Raises:
    Stopped: a signal asked for it, be it after the last batch; all is saved.
  """
  everyone = list_members(config)

  def next_group(method: str) -> tuple[list[int], int]:
    """Who is trained next, by number, and in a program of how many; nobody when all
    have ended.
    """
    waiting = [
      n
      for n, member in enumerate(everyone)
      if member.method == method and not has_ended(folder, member)
    ]
    if not waiting:
      return [], 0
    chosen, places = group_runs(
      [resume_points(folder / everyone[number].name) for number in waiting], size
    )[0]
    return [waiting[number] for number in chosen], places

  with signals.catch_signals():
    for method in config.method:
      while (group := processes.on_first_process(next_group, method))[0]:
        if asked := processes.stopped_by():
          raise signals.Stopped(f'stopped by {asked} between two runs')
        chosen = [everyone[number] for number in group[0]]
        try:
          with workdir.lock_runs([folder / member.name for member in chosen]):
            train(
              chosen + [chosen[0]._replace(placeholder=True)] * (group[1] - len(chosen))
            )
        except (
          checkpoints.BrokenCheckpoint
        ) as broken:  # Set aside: what is left is looked at anew.
          print_warning(str(broken))
    if (
      asked := processes.stopped_by()
    ):  # Too late for the last run, not for what the caller would do next.
      raise signals.Stopped(f'stopped by {asked}, all these runs have ended')
  results = processes.on_first_process(
    lambda: [
      {'run': member.name, **files.read_json(_result_path(folder, member))}
      for member in everyone
    ]
  )
  return [
    {name: value for name, value in result.items() if name != 'config_sha256'}
    for result in results
  ]


def finish_run(
  folder: Path, member: Member, summary: dict[str, Any], params: Any
) -> None:
  """Keep what a run came to; under the same configuration it is not trained again.

  Args:
    folder: the --workdir.
    member: the run.
    summary: what it came to.
    params: the parameters that this is measured at; None if the run has none.
  """
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
  """Says it once, however many processes there are."""
  if processes.is_first():
    print(f'warning: {text}', file=sys.stderr, flush=True)


def has_ended(folder: Path, member: Member) -> bool:
  """Whether a run has come to its end under the folder's configuration."""
  result = _result_path(folder, member)
  return files.exists(result) and files.read_json(result).get(
    'config_sha256'
  ) == workdir.config_sha256(folder)


def _result_path(folder: Path, member: Member) -> Path:
  return folder / member.name / 'result.json'


def resume_points(folder: Path) -> dict[int, int]:
  """Steps that a run may go on from, and how many runs were in the program until then:
  steps after which it was saved, and 0 (of 0) when at most one checkpoint has ever been
  written.
  """
  saved = {
    step: checkpoints.read_record(folder, step).get('places', 1)
    for step in checkpoints.saved_steps(folder)
  }
  return saved if len(saved) > 1 or (folder / 'broken').exists() else {0: 0, **saved}


def group_runs(
  saved: list[dict[int, int]], size: int | None
) -> list[tuple[list[int], int]]:
  """Which runs to train together, by number, all of which can go on from the same step,
  and in a program of how many: of as many as before, whoever has ended since, so that
  they round as before. At most `size`.

  A process may have been killed while it saved its runs: some are one interval ahead,
    and go back to where the others are.

  Args:
    saved: what :func:`starts` tells of each run.
  """
  last = [max(steps) for steps in saved]
  left, chosen = (
    sorted(range(len(saved)), key=lambda number: (last[number], number)),
    [],
  )
  while left:
    common = last[left[0]]
    places = saved[left[0]][common]
    fits = sorted(n for n in left if saved[n].get(common) == places)[:size]
    chosen.append((fits, max(len(fits), min(places, size or places))))
    left = [number for number in left if number not in fits]
  return chosen


def chunks(number: int, size: int) -> list[np.ndarray]:
  """0..N-1 cut into parts of at most `size`, 0 for all, of as few lengths as can be:
  each length is a program to compile.
  """
  return np.array_split(np.arange(number), -(-number // size) if size else 1)


def remaining(parts: list[np.ndarray], done: int) -> Iterator[np.ndarray]:
  """What is left of the parts of 0..N-1 when the first `done` numbers are: the same
  parts, whenever it was that they were left.
  """
  for part in parts:
    if part[-1] >= done:
      yield part[part >= done]
