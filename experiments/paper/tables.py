"""Tables and learning curves of an item."""

from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from experiments.core import files, plotting
from experiments.core.comparison import interval
from experiments.core.plotting import Curve
from experiments.paper import items, quoted, tuning
from experiments.paper.entries import read_tuned
from experiments.paper.items import Entry
from experiments.paper.settings import Config


def table_row(
  entry: Entry,
  summaries: list[dict[str, Any]],
  measures: list[str],
  tuned: dict[str, Any] | None,
) -> dict[str, Any]:
  """Return a line of the table, over all its seeds.

  Args:
    entry: the line.
    summaries: summaries of its runs.
    measures: names of the scores in the summaries. Diverged runs may lack them; they
      are counted and left out of the means.
    tuned: what --tune chose for the line, and the trials; None without tuning.
  """
  measured: dict[str, Any] = {}
  for measure in measures:
    scores = [summary.get(measure) for summary in summaries if 'lost' not in summary]
    values = [score for score in scores if score is not None]
    measured[measure] = float(np.mean(values)) if values else None
    measured[f'± {measure}'] = interval(values)
  return {
    'line': entry.label,
    'method': entry.config.method[0],
    'K': summaries[0]['K'],
    'lr': entry.config.lr,
    'tuned': _describe_tuning(entry.score, tuned),
    # Runs of older versions lack the numbers of parameters.
    'parameters': summaries[0].get('parameters'),
    'recurrent': summaries[0].get('recurrent_parameters'),
    'seeds': len(summaries),
    'diverged': sum(
      'lost' in summary or summary[entry.score.test] is None for summary in summaries
    ),
    **measured,
    'paper': entry.paper,
    'replication': entry.replication or None,
    'seconds per run': float(np.mean([summary['seconds'] for summary in summaries])),
  }


def _describe_tuning(score: items.Score, tuned: dict[str, Any] | None) -> str:
  """Return whether a line's rate was tuned, and whether it is at an end of its grid.

  Args:
    score: what the line is scored by.
    tuned: what --tune chose for the line, and the trials; None without tuning.
  """
  if tuned is None:
    return 'no'
  trials = tuning.scores_of(tuned.get('tried', ()), tuned.get('num_windows'))
  return items.describe_choice(score, trials, tuned['lr'])


def write_tables(
  config: Config,
  entries: list[Entry],
  results: list[list[dict[str, Any]]],
  folder: Path,
) -> None:
  """Write and print a table and learning curves for each score of an item.

  Args:
    config: settings of the command.
    entries: lines of the item.
    results: summaries of the runs of each line.
    folder: the item's folder.
  """
  # The systems that the paper quotes had the paper's data and sizes.
  rivals = quoted.QUOTED.get(config.item, {}) if config.scale == 'full' else {}
  quotes = _quote_lines(rivals)
  title = f'{config.item}, scale {config.scale}'
  # Language models have two scores: bits per character and perplexity.
  for score in dict.fromkeys(entry.score for entry in entries):
    pairs = [
      (entry, summaries)
      for entry, summaries in zip(entries, results, strict=True)
      if entry.score == score
    ]
    name = f'{config.item}-{score.test}'
    table = _table(score, pairs, read_tuned(folder))
    text = _table_text(score, table)
    print(text)
    files.write_text(folder / f'{name}.txt', '\n'.join([title, text, *quotes]) + '\n')
    files.write_json(
      folder / f'{name}.json',
      {'item': config.item, 'scale': config.scale, 'lines': table, 'quoted': rivals},
    )
    panels = {score.axis: learning_curves(folder, pairs, score.curve)}
    path = folder / f'{name}.png'
    plotting.plot_curves(path, panels, title, score.label, dict(score.marks))
  for quote in quotes:
    print(quote)
  _print_scale(config.scale)
  print(f'tables, plots and the runs are in {folder}')


def _quote_lines(rivals: dict[str, dict[str, float]]) -> list[str]:
  """Return a line of text per measure that the paper quotes results for."""
  lines = []
  for measure, systems in rivals.items():
    numbers = ', '.join(f'{name} {number:g}' for name, number in systems.items())
    lines.append(f'the paper quotes, {measure}: {numbers}')
  return lines


def _table(
  score: items.Score,
  results: list[tuple[Entry, list[dict[str, Any]]]],
  tuned: dict[str, Any],
) -> list[dict[str, Any]]:
  """Return the rows of the table for a score.

  Args:
    score: the score.
    results: lines with this score, and the summaries of their runs.
    tuned: what --tune chose, by the label of the line.
  """
  known = {
    name for _, summaries in results for summary in summaries for name in summary
  }
  # Every row has the same measures, even if the line's runs lack some: numbers must
  # stay in their columns.
  measures = [name for name in (score.test, f'dynamic_{score.test}') if name in known]
  return [
    table_row(entry, summaries, measures, tuned.get(entry.label))
    for entry, summaries in results
  ]


def _table_text(score: items.Score, table: list[dict[str, Any]]) -> str:
  """Return a table as text, with the decimals that suit its score."""
  # The decimals of a score would round learning rates to 0.
  formats = ['g' if name == 'lr' else f'.{score.digits}f' for name in table[0]]
  rows = [list(row.values()) for row in table]
  return str(tabulate(rows, list(table[0]), floatfmt=formats, missingval='-'))


def _print_scale(scale: str) -> None:
  """Print how far numbers at a scale can be compared with the paper's."""
  if scale == 'short':
    print(
      "scale short: the paper's model, data and length, but fewer epochs and another "
      'schedule of the learning rate'
    )
  elif scale != 'full':
    print(
      f"scale {scale}: reduced settings, not the paper's; the paper's numbers are for "
      '--scale=full'
    )


def learning_curves(
  folder: Path, results: list[tuple[Entry, list[dict[str, Any]]]], metric: str
) -> list[Curve]:
  """Return the learning curve of each run.

  Args:
    folder: the item's folder.
    results: lines and the summaries of their runs.
    metric: name of the metric in the files of metrics.
  """
  curves = []
  for entry, summaries in results:
    for summary in summaries:
      rows = files.read_jsonl(folder / entry.label / summary['run'] / 'metrics.jsonl')
      x = [row['step'] for row in rows]
      y = [row[metric] for row in rows]
      curves.append(Curve(entry.label, entry.config.method[0], x, y))
  return curves
