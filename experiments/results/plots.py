"""Plots made of the results: curves of training, scores of tuning, studies,
benchmarks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import add_task
from experiments.benchmark import cost, plots
from experiments.core import plotting, workdir
from experiments.core.plotting import Curve
from experiments.paper import convergence, items
from experiments.paper.items import Score
from experiments.results import store, tables
from experiments.results.store import Row


def draw(name: str, out: Path, folder: Path = store.FOLDER) -> list[Path]:
  """Draws all plots of an item.

  Args:
    name: the item.
    out: where the plots go; ITEM-SERIES-WHAT.png.
    folder: where the results are.

  Returns:
    The plots.
  """
  out = workdir.make_folder(str(out))
  item = store.load(name, folder)
  drawn: list[Path] = []
  for series, rows in store.by_series(item):
    stem = f'{name}-{series}'
    for stage in dict.fromkeys(row.stage for row in rows):
      chosen = [row for row in rows if row.stage == stage]
      if stage == 'final':
        drawn += draw_curves(out, stem, chosen)
      elif stage == 'tuning':
        drawn += draw_tuning(out, stem, chosen)
      else:
        drawn += draw_report(out / f'{stem}-{stage}.png', stage, chosen)
  return drawn


def draw_curves(out: Path, stem: str, rows: Sequence[Row]) -> list[Path]:
  """The score of every run along its training, a plot per score."""
  drawn = []
  for score, of_score in tables.by_score(rows).items():
    curves = [
      Curve(
        row.line, row.settings['method'], row.curves['step'], row.curves[score.curve]
      )
      for row in of_score
      if row.curves
    ]
    if curves:
      drawn.append(out / f'{stem}-{score.test}.png')
      unit, marks = axis_of(score)
      plotting.plot_curves(drawn[-1], {unit: curves}, stem, score.label, marks)
  return drawn


def axis_of(score: Score) -> tuple[str, dict[str, float]]:
  """What the curves of a score run along, and the marks beside them."""
  if score is items.ERROR:
    return 'batches', {'chance': add_task.CHANCE}
  return 'epoch', {}


def draw_tuning(out: Path, stem: str, rows: Sequence[Row]) -> list[Path]:
  """The score of every rate that was tried, a plot per score."""
  drawn = []
  for score, of_score in tables.by_score(rows).items():
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in of_score:
      value = row.numbers.get(score.choose)
      if value is not None:
        lines.setdefault((row.line, row.settings['method']), []).append(
          (row.settings['lr'], value)
        )
    curves = []
    for (line, method), tries in lines.items():
      rates, values = zip(*sorted(tries), strict=True)
      curves.append(Curve(line, method, rates, values))
    if curves:
      drawn.append(out / f'{stem}-tuning-{score.choose}.png')
      panels, title = {'learning rate': curves}, f'{stem}: tuning'
      plotting.plot_curves(drawn[-1], panels, title, score.label, {}, xscale='log')
  return drawn


def draw_report(path: Path, kind: str, rows: Sequence[Row]) -> list[Path]:
  """The plot of a study or benchmark; none of one that only has a table."""
  lines: list[dict[str, Any]] = [row.settings | row.numbers for row in rows]
  if kind == 'table1':
    cost.plot(path, lines)
  elif kind == 'convergence':
    studied = {row.settings['run']: row.curves for row in rows}
    convergence.plot(path, {name: as_lines(curves) for name, curves in studied.items()})
  elif kind == 'rivals':
    plots.plot_rivals(path, lines)
  elif kind == 'population':
    plots.plot_population(path, lines)
  elif kind == 'growth':
    varied: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
      if 'value' in line:
        varied.setdefault(line['varied'], []).append(line)
    plots.plot_growth(path, varied)
  else:
    return []
  return [path]


def as_lines(curves: dict[str, list[Any]]) -> list[dict[str, Any]]:
  """Columns as one dictionary per interval."""
  return [
    dict(zip(curves, values, strict=True))
    for values in zip(*curves.values(), strict=True)
  ]
