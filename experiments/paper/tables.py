"""Tables and learning curves of an item."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tabulate import tabulate

from experiments import add_task
from experiments.core import files, plotting
from experiments.core.plotting import Curve
from experiments.paper import items, quoted
from experiments.paper.items import Entry
from experiments.paper.settings import Config


def interval(values: list[float]) -> float | None:
  """Half the width of the 95 % confidence interval of the mean (Student's t); None for
  fewer than two values.
  """
  if len(values) < 2:
    return None
  return float(
    stats.t.ppf(0.975, len(values) - 1)
    * np.std(values, ddof=1)
    / math.sqrt(len(values))
  )


def table_row(
  entry: Entry, summaries: list[dict[str, Any]], measures: list[str]
) -> dict[str, Any]:
  """A line of the table, of all its seeds; `measures` are names in their summaries,
  which those of diverged runs may lack.
  """
  measured: dict[str, Any] = {}
  for measure in measures:
    values = [
      summary[measure] for summary in summaries if summary.get(measure) is not None
    ]
    measured |= {
      measure: float(np.mean(values)) if values else None,
      f'± {measure}': interval(values),
    }
  return {
    'line': entry.label,
    'method': entry.config.method[0],
    'K': summaries[0]['K'],
    'lr': entry.config.lr,
    'parameters': summaries[0].get('parameters'),  # Older versions' runs lack them.
    'recurrent': summaries[0].get('recurrent_parameters'),
    'seeds': len(summaries),
    'diverged': sum(summary[entry.score.test] is None for summary in summaries),
    **measured,
    'paper': entry.paper,
    'replication': entry.replication or None,
    'seconds a run': float(np.mean([summary['seconds'] for summary in summaries])),
  }


def write_tables(
  config: Config,
  entries: list[Entry],
  results: list[list[dict[str, Any]]],
  folder: Path,
) -> None:
  """Table as text and JSON, and the curves."""
  rivals = quoted.QUOTED.get(config.item, {}) if config.scale == 'full' else {}
  quotes = [
    f'the paper quotes, {measure}: '
    + ', '.join(f'{name} {number:g}' for name, number in systems.items())
    for measure, systems in rivals.items()
  ]
  for score in dict.fromkeys(entry.score for entry in entries):
    pairs = [
      (entry, summaries)
      for entry, summaries in zip(entries, results, strict=True)
      if entry.score == score
    ]
    known = {
      name for _, summaries in pairs for summary in summaries for name in summary
    }
    measures = [name for name in (score.test, f'dynamic_{score.test}') if name in known]
    table = [table_row(entry, summaries, measures) for entry, summaries in pairs]
    formats = ['g' if name == 'lr' else f'.{score.digits}f' for name in table[0]]
    text = tabulate(
      [list(row.values()) for row in table],
      list(table[0]),
      floatfmt=formats,
      missingval='-',
    )
    print(text)
    name = f'{config.item}-{score.test}'
    files.write_text(
      folder / f'{name}.txt',
      '\n'.join([f'{config.item}, scale {config.scale}', text, *quotes]) + '\n',
    )
    files.write_json(
      folder / f'{name}.json',
      {'item': config.item, 'scale': config.scale, 'lines': table, 'quoted': rivals},
    )
    step = 'batches' if score is items.ERROR else 'epoch'
    marks = {'chance': add_task.CHANCE} if score is items.ERROR else {}
    panels = {step: learning_curves(folder, pairs, score.curve)}
    title = f'{config.item}, scale {config.scale}'
    plotting.plot_curves(folder / f'{name}.png', panels, title, score.label, marks)
  if quotes:
    print('\n'.join(quotes))
  if config.scale == 'short':
    print(
      "scale short: the paper's model, data and length in fewer epochs; its numbers "
      'are of other schedules'
    )
  elif config.scale != 'full':
    print(
      f"scale {config.scale}: reduced settings, not the paper's; its numbers stand "
      'beside --scale=full only'
    )
  print(f'tables, plots and the runs are in {folder}')


def learning_curves(
  folder: Path, results: list[tuple[Entry, list[dict[str, Any]]]], metric: str
) -> list[Curve]:
  """Returns one curve of a metric per run of each line."""
  curves = []
  for entry, summaries in results:
    for summary in summaries:
      rows = files.read_jsonl(folder / entry.label / summary['run'] / 'metrics.jsonl')
      x, y = [row['step'] for row in rows], [row[metric] for row in rows]
      curves.append(Curve(entry.label, entry.config.method[0], x, y))
  return curves
