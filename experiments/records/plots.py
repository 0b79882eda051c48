"""Plots of the results: training curves, scores of tuning, studies and benchmarks."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from experiments.benchmark import cost, plots
from experiments.core import plotting, workdir
from experiments.core.plotting import Curve
from experiments.paper import convergence
from experiments.records import contest, store, tables
from experiments.records.store import Row

LEAST_RATIO = 0.05
"""Least ratio of losses that an axis shows; the greatest is its inverse."""


RATIO_TICKS = {
  10.0: (0.05, 0.2, 1.0, 5.0, 20.0),
  2.0: (0.6, 0.8, 1.0, 1.5, 2.0, 3.0),
  1.0: (0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6),
}
"""Ratios of losses to name, by the least factor that the axis spans."""


def draw(name: str, out: Path, folder: Path = store.FOLDER) -> list[Path]:
  """Draw all plots of an item.

  Args:
    name: name of the item.
    out: folder to write to. Files are named ITEM-SERIES-PLOT.png.
    folder: folder of the results.

  Returns:
    The files of the plots.

  Raises:
    UserError: a file cannot be written.
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
    if name == 'tournament' and tables.standings(rows):
      drawn.append(draw_standings(out / f'{stem}-overview.png', rows))
  return drawn


def draw_standings(path: Path, rows: Sequence[Row]) -> Path:
  """Draw the loss of the tournament's methods over that of `tbptt`, a panel per task.

  Bars are 95 % confidence intervals over the seeds. Methods that are significantly
  better or worse have a color. An arrow stands for a ratio beyond the axis.

  Args:
    path: the image to write.
    rows: rows of the tournament at one scale.

  Returns:
    The file of the plot.
  """
  found = tables.standings(rows)
  counts = Counter(method for standings in found.values() for method in standings)
  methods = [name for name, count in counts.items() if count >= tables.MANY_TASKS]
  figure = Figure(figsize=(11, 6.4), layout='constrained')
  panels = figure.subplots(2, -(-len(found) // 2), sharey=True, squeeze=False).ravel()
  for axes, (task, standings) in zip(panels, found.items(), strict=False):
    places = {name: place for place, name in enumerate(methods) if name in standings}
    draw_ratios(axes, {place: standings[name] for name, place in places.items()})
    axes.set_title(task, fontsize='medium')
    axes.set_yticks(range(len(methods)), methods)
  for axes in panels[len(found) :]:
    axes.set_visible(False)
  panels[0].invert_yaxis()
  figure.supxlabel("loss over tbptt's; below 1 is better")
  plotting.save_figure(figure, path)
  return path


def draw_ratios(axes: Axes, standings: dict[int, contest.Standing]) -> None:
  """Draw ratios of losses with their intervals, a row per method.

  Args:
    axes: the panel.
    standings: how each method stands, by its row.
  """
  known = [one for one in standings.values() if one.ratio is not None]
  ends = [end for one in known for end in (one.low, one.high, one.ratio) if end]
  # The line at 1 is on the axis even if all ratios are far from it.
  left = max(0.93 * min([1.0, *ends]), LEAST_RATIO)
  right = min(1.07 * max([1.0, *ends]), 1 / LEAST_RATIO)
  axes.set_xscale('log')
  axes.set_xlim(left, right)
  axes.axvline(1.0, color='black', linewidth=0.6)
  for place, one in standings.items():
    if one.ratio is None:
      continue
    color = {'better': 'C2', 'worse': 'C3', '': 'gray'}[one.outcome]
    shown = min(max(one.ratio, left), right)
    marker = '<' if one.ratio < left else '>' if one.ratio > right else 'o'
    axes.plot(shown, place, marker, color=color, markersize=4, clip_on=False)
    if one.low is not None and one.high is not None:
      axes.plot((one.low, one.high), (place, place), color=color)
  ticks = next(ticks for span, ticks in RATIO_TICKS.items() if right > span * left)
  axes.xaxis.set_major_locator(FixedLocator(ticks))
  axes.xaxis.set_major_formatter(FormatStrFormatter('%g'))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.tick_params(axis='x', labelsize='small')


def draw_curves(out: Path, stem: str, rows: Sequence[Row]) -> list[Path]:
  """Draw the learning curve of every run, a plot per score.

  Args:
    out: folder to write to.
    stem: start of the names of the files.
    rows: rows of the final runs.

  Returns:
    The files of the plots.
  """
  drawn = []
  for score, of_score in tables.by_score(rows).items():
    curves = []
    for row in of_score:
      # A run that diverged before its first evaluation has no curve.
      if row.curves:
        x, y = row.curves['step'], row.curves[score.curve]
        curves.append(Curve(row.line, row.settings['method'], x, y))
    if curves:
      path = out / f'{stem}-{score.test}.png'
      marks = dict(score.marks)
      plotting.plot_curves(path, {score.axis: curves}, stem, score.label, marks)
      drawn.append(path)
  return drawn


def draw_tuning(out: Path, stem: str, rows: Sequence[Row]) -> list[Path]:
  """Draw the score of every rate that was tried, a plot per score.

  Args:
    out: folder to write to.
    stem: start of the names of the files.
    rows: rows of the tuning runs.

  Returns:
    The files of the plots.
  """
  drawn = []
  for score, of_score in tables.by_score(rows).items():
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in of_score:
      value = row.score(score.choose)
      # A diverged run has no score to draw.
      if value is not None:
        key = (row.line, row.settings['method'])
        lines.setdefault(key, []).append((row.settings['lr'], value))
    curves = []
    for (line, method), tries in lines.items():
      rates, values = zip(*sorted(tries), strict=True)
      curves.append(Curve(line, method, rates, values))
    if curves:
      path = out / f'{stem}-tuning-{score.choose}.png'
      panels = {'learning rate': curves}
      title = f'{stem}: tuning'
      plotting.plot_curves(path, panels, title, score.label, {}, xscale='log')
      drawn.append(path)
  return drawn


def draw_report(path: Path, kind: str, rows: Sequence[Row]) -> list[Path]:
  """Draw the plot of a study or benchmark.

  Args:
    path: the image to write.
    kind: name of the report.
    rows: its rows.

  Returns:
    The files of the plots; none for a report that has only a table.
  """
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
    plots.plot_growth(path, lines)
  else:
    return []
  return [path]


def as_lines(curves: dict[str, list[Any]]) -> list[dict[str, Any]]:
  """Return curves by metric as one row per interval."""
  return [
    dict(zip(curves, values, strict=True))
    for values in zip(*curves.values(), strict=True)
  ]
