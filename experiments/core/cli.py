"""Common steps of a training script: open the folder, train and report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.core import devices, files, plotting, processes, report, workdir
from experiments.core.plotting import Plot
from experiments.core.recipe import Recipe
from experiments.core.schedule import Member, train_all

Train = Callable[[list[Member], Path, Callable[[], None]], None]
"""(runs of one method, parent folder, callback after evaluations) -> None."""


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
  """Make the folder of a script's runs, or check its configuration.

  A folder that exists must have been made with the same configuration.

  Args:
    config: settings of the runs.
    folder: the folder.
    script: name of the script.
    about: description of the task, which is printed.
    identity: further entries that must not change, such as a hash of the data.
    data: facts about the data set that a model needs, for `data.json`.

  Returns:
    The absolute path of the folder.

  Raises:
    UserError: the folder holds runs of another configuration, or cannot be written.
  """
  path = workdir.open_workdir(folder, script, config, **identity)
  if data is not None:
    # All processes share the folder; two writers would race for the temporary file.
    processes.on_first_process(files.write_json, path / 'data.json', data)
  print(f'{about}; writing to {path}')
  return path


def train_runs(
  config: Any, folder: Path, train: Train, plot: Plot | None, side_by_side: bool = True
) -> list[dict[str, Any]]:
  """Train a run for each method, seed and grid value, and redraw the plot.

  Args:
    config: settings of the runs.
    folder: the folder of :func:`open_task`.
    train: trains runs of one method.
    plot: the plot; None draws nothing.
    side_by_side: whether several runs may share a program.

  Returns:
    The summary of each run.
  """
  # Runs that draw their window lengths differ in shape and cannot share a program.
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
  """Join the other processes, train all runs and write the report.

  Args:
    config: settings of the runs, with the folder.
    run: (settings, folder, plot) -> the folder and a summary per run.
    wanted: contents of the report.

  Returns:
    The summaries.
  """
  # JAX can join other processes only before its first computation.
  processes.join(config.coordinator, config.num_processes, config.process_id)
  folder, summaries = run(config, config.workdir, wanted.plot)
  # The live plot is drawn every few seconds at most; the report draws it complete.
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
