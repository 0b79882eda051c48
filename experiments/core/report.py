"""Report at the end of a command: the table of the runs and the best one."""

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
  """Write the summary and the plot, and print the table and the best run.

  Args:
    folder: the parent of the runs' folders.
    config: settings that list the runs.
    summaries: summary of each run.
    plot: the plot.
    choose: name, in the summaries, of the number that decides which run is best.
    digits: number of decimals in the table.
    best: `min` or `max`, the better value of `choose`.

  Raises:
    UserError: a file cannot be written.
  """
  if not processes.is_first():
    return
  # A run that diverged may have a score of the time before. Of a single run there is no
  # best one.
  scores = {
    one['run']: one[choose]
    for one in summaries
    if one.get(choose) is not None and 'lost' not in one
  }
  chosen = best(scores, key=lambda name: scores[name]) if len(scores) > 1 else None
  workdir.write_summary(folder, summaries, chosen)
  draw(folder, config, plot)
  # The descriptions of divergence are too long for a column; they follow the table.
  names = dict.fromkeys(
    name for summary in summaries for name in summary if name not in ('run', 'lost')
  )
  # The decimals of a score would round learning rates to 0.
  formats = ['g' if name in recipe.HYPERPARAMETERS else f'.{digits}f' for name in names]
  rows = [[summary.get(name) for name in names] for summary in summaries]
  headers = [name.replace('_', ' ') for name in names]
  print(tabulate(rows, headers, floatfmt=formats, missingval='-'))
  for summary in summaries:
    if 'lost' in summary:
      print(f'{summary["run"]} diverged: {summary["lost"]}')
  if chosen is not None:
    print(f'best {choose.replace("_", " ")}: {chosen}')
  methods = {summary['method'] for summary in summaries}
  rates = {summary.get('lr', config.lr) for summary in summaries}
  if len(methods) > 1 and len(rates) == 1 and (rate := rates.pop()) is not None:
    print(
      f'All methods had the learning rate {rate:g}, so these scores do not say which '
      'method is better; --grid=lr=... tries several rates for each.'
    )
  print(f'metrics, summary.json and {plot.file} are in {folder}')
