"""The course of a training script: open the folder, train the runs, report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.core import devices, files, plotting, processes, report, workdir
from experiments.core.plotting import Plot
from experiments.core.recipe import Recipe
from experiments.core.schedule import Member, train_all

Train = Callable[[list[Member], Path, Callable[[], None]], None]
"""(runs of one method, folder of their folders, callback after evaluations) -> None."""


class Report(NamedTuple):
  """Contents of the report at the end of a script.

  Attributes:
    plot: the plot of the runs.
    choose: name, in the summaries, of the number that decides which run is best.
    digits: decimals of the table's numbers.
    best: `min` or `max`, the better value of `choose`.
  """

  plot: Plot
  choose: str
  digits: int
  best: Callable[..., str] = min


def open_task(
  config: Recipe,
  folder: str,
  script: str,
  about: str,
  identity: dict[str, str],
  data: dict[str, Any] | None = None,
) -> Path:
  """Makes the folder of a script's runs, or checks that it has the same configuration.

  Args:
    config: settings of the runs.
    folder: the folder.
    script: name of the script.
    about: description of the task, which is printed.
    identity: what else makes the runs the same, such as a hash of the data.
    data: what a model has to know of its data, for `data.json`.

  Returns:
    The absolute path of the folder.

  Raises:
    UserError: the folder holds runs of another configuration, or cannot be written.
  """
  path = workdir.open_workdir(folder, script, config, **identity)
  if data is not None:
    processes.on_first_process(files.write_json, path / 'data.json', data)
  print(f'{about}; writing to {path}')
  return path


def train_runs(
  config: Any, folder: Path, train: Train, plot: Plot | None, side_by_side: bool = True
) -> list[dict[str, Any]]:
  """Trains by each method from each seed, and redraws the plot meanwhile.

  Args:
    config: settings of the runs.
    folder: the folder of :func:`open_task`.
    train: trains runs of one method.
    plot: the plot; None draws nothing.
    side_by_side: whether several runs may share a program.

  Returns:
    A summary per run.
  """
  size: int | None = 1
  if side_by_side:
    size = devices.population_size(config, config.batch_size, config.hidden)
  evaluated = plotting.live(folder, config, plot)
  return train_all(
    config, folder, size, lambda chosen: train(chosen, folder, evaluated)
  )


def run_task(
  config: Recipe,
  run: Callable[[Any, str, Plot | None], tuple[Path, list[dict[str, Any]]]],
  wanted: Report,
) -> list[dict[str, Any]]:
  """Joins the other processes, trains and reports.

  Args:
    config: settings of the runs, with the folder.
    run: (settings, folder, plot) -> the folder and a summary per run.
    wanted: contents of the report.

  Returns:
    The summaries.
  """
  processes.join(config.coordinator, config.num_processes, config.process_id)
  folder, summaries = run(config, config.workdir, wanted.plot)
  report.write_report(
    folder,
    config,
    summaries,
    wanted.plot,
    wanted.choose,
    digits=wanted.digits,
    best=wanted.best,
  )
  return summaries
