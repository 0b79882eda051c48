"""The table and the best run at the end of a command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.core import processes, recipe, workdir
from experiments.core.plotting import Plot, draw


def write_report(
  folder: Path,
  config: recipe.Recipe,
  summaries: list[dict[str, Any]],
  plot: Plot,
  choose: str,
  digits: int,
  best: Callable[..., str] = min,
) -> None:
  """Writes the summary and the plot, and prints the table and the best run.

  Args:
    folder: the folder of the runs' folders.
    config: the configuration that lists the runs.
    summaries: what each run came to.
    plot: what to draw.
    choose: the name, in the summaries, of the number that decides which run is best.
    digits: decimals of the table's numbers.
    best: `min` or `max`, the better value of `choose`.

  Raises:
    UserError: a file cannot be written.
  """
  if not processes.is_first():
    return
  scores = {one['run']: one[choose] for one in summaries if one.get(choose) is not None}
  chosen = best(scores, key=lambda name: scores[name]) if len(scores) > 1 else None
  workdir.write_summary(folder, summaries, chosen)
  draw(folder, config, plot)
  names = dict.fromkeys(
    name for summary in summaries for name in summary if name not in ('run', 'lost')
  )
  formats = ['g' if name in recipe.HYPERPARAMETERS else f'.{digits}f' for name in names]
  rows = [[summary.get(name) for name in names] for summary in summaries]
  headers = [name.replace('_', ' ') for name in names]
  print(tabulate(rows, headers, floatfmt=formats, missingval='-'))
  for summary in summaries:
    if 'lost' in summary:
      print(f'{summary["run"]} diverged: {summary["lost"]}')
  if chosen is not None:
    print(f'best {choose.replace("_", " ")}: {chosen}')
  print(f'metrics, summary.json and {plot.file} are in {folder}')
