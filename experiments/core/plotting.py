"""Tables and plots of the runs in a folder, made from their metrics."""

from collections.abc import Callable, Sequence
from pathlib import Path
import time
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.core import files, processes, recipe
from experiments.core.schedule import list_members
import fptt_jax

METHOD_COLORS = {name: f'C{number}' for number, name in enumerate(fptt_jax.METHODS)}
"""A method has the same color in every plot."""


LINE_STYLES = ('-', '--', '-.', ':')
"""Styles of the lines that share a method's color, in turn."""


MARKERS = (None, 'o', 's', '^', 'x')
"""Markers of these lines, the next one whenever the styles begin anew."""


REDRAW_SECONDS = 5.0
"""Least time between two drawings of a plot whose runs are still being trained."""


REDRAW_SHARE = 20
"""Drawing while runs are being trained takes at most one part of so many of the
time.
"""


class Curve(NamedTuple):
  """One line of a plot.

  Attributes:
    label: its name in the legend; several curves (seeds) may share one.
    method: the training method, which decides the color.
    x: where its points are.
    y: their values; None leaves a gap.
  """

  label: str
  method: str
  x: Sequence[float]
  y: Sequence[float | None]


class Plot(NamedTuple):
  """What to draw of the metrics of a folder's runs.

  Attributes:
    file: the name of the file.
    title: what stands above all panels.
    metric: the name of the metric.
    ylabel: the metric in words; one that ends in '%' gets a linear axis, all others
      a logarithmic one.
    panels: per panel, the name of the metric to draw against and its label.
    marks: names and values of horizontal lines.
  """

  file: str
  title: str
  metric: str
  ylabel: str
  panels: tuple[tuple[str, str], ...]
  marks: tuple[tuple[str, float], ...] = ()


def live(folder: Path, config: recipe.Recipe, plot: Plot | None) -> Callable[[], None]:
  """Returns what to call after each evaluation, so that the plot, if any, is drawn."""
  return (lambda: None) if plot is None else LivePlot(folder, config, plot)


class LivePlot:
  """Draws a plot anew after evaluations while the runs are being trained."""

  def __init__(self, folder: Path, config: recipe.Recipe, plot: Plot):
    """Takes the runs' folder, the configuration that lists them, and what to draw."""
    self._folder, self._config, self._plot = folder, config, plot
    self._due = time.monotonic()

  def __call__(self) -> None:
    """Draws the plot unless that was done a moment ago."""
    started = time.monotonic()
    if not processes.is_first() or started < self._due:
      return
    draw(self._folder, self._config, self._plot)
    now = time.monotonic()
    self._due = now + max(REDRAW_SECONDS, REDRAW_SHARE * (now - started))


def draw(folder: Path, config: recipe.Recipe, plot: Plot) -> None:
  """Draws one metric of all runs that have been evaluated at least once.

  Args:
    folder: the folder of the runs' folders, in which the plot is written.
    config: the configuration that lists the runs.
    plot: what to draw.

  Raises:
    UserError: the plot cannot be written.
  """
  curves: dict[str, list[Curve]] = {label: [] for _, label in plot.panels}
  for member in list_members(config):
    rows = files.read_jsonl(folder / member.name / 'metrics.jsonl')
    name = member.name.replace(f'-seed{member.seed}', '')
    for metric, label in plot.panels if rows else ():
      x, y = [row.get(metric) for row in rows], [row.get(plot.metric) for row in rows]
      curves[label].append(Curve(name, member.method, x, y))
  plot_curves(folder / plot.file, curves, plot.title, plot.ylabel, dict(plot.marks))


def plot_curves(
  path: Path,
  panels: dict[str, list[Curve]],
  title: str,
  ylabel: str,
  marks: dict[str, float],
  xscale: str = 'linear',
) -> None:
  """Writes the plot that :func:`curves_figure` makes of the other arguments.

  Raises:
    UserError: the plot cannot be written.
  """
  save_figure(curves_figure(panels, title, ylabel, marks, xscale), path)


def curves_figure(
  panels: dict[str, list[Curve]],
  title: str,
  ylabel: str,
  marks: dict[str, float],
  xscale: str = 'linear',
) -> Figure:
  """Draws panels side by side, one color per method and one line per seed.

  Args:
    panels: the curves of each panel, by the label of its horizontal axis.
    title: what stands above all panels.
    ylabel: the label of the vertical axes; see :class:`Plot`.
    marks: horizontal lines by name.
    xscale: matplotlib's name of the scale of the horizontal axes.

  Returns:
    The figure.
  """
  labels = dict.fromkeys(curve.label for curves in panels.values() for curve in curves)
  width = 7.0 if len(panels) == 1 else 4.6 * len(panels)
  beside = len(panels) > 1 or len(labels) + len(marks) > 6
  height = max(4.5, 0.3 * len(labels))
  figure = Figure(
    figsize=(width + (2.5 if beside else 0), height), layout='constrained'
  )
  figure.suptitle(title)
  for axes, (xlabel, curves) in zip(
    figure.subplots(1, len(panels), sharey=True, squeeze=False)[0],
    panels.items(),
    strict=True,
  ):
    _draw_panel(axes, curves, marks)
    yscale = 'linear' if ylabel.endswith('%') else 'log'
    axes.set(xlabel=xlabel, yscale=yscale, xscale=xscale)
    if len(panels) > 1:
      axes.set_title(f'against {xlabel}', fontsize='medium')
    if xscale == 'linear':
      axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(alpha=0.3, which='both')
  figure.axes[0].set_ylabel(ylabel)
  legend = figure.axes[-1].get_legend_handles_labels()
  if beside:  # Beside the curves, not over them.
    figure.legend(*legend, loc='outside right center')
  elif legend[0]:
    figure.axes[-1].legend()
  return figure


def _draw_panel(axes: Axes, curves: list[Curve], marks: dict[str, float]) -> None:
  """Draws the lines of one panel; the second variant of a method on is lighter."""
  variants: dict[str, list[str]] = {}
  for curve in curves:
    known = variants.setdefault(curve.method, [])
    is_first = curve.label not in known
    if is_first:
      known.append(curve.label)
    number = known.index(curve.label)
    axes.plot(
      curve.x,
      curve.y,
      LINE_STYLES[number % len(LINE_STYLES)],
      color=_lighter(METHOD_COLORS[curve.method], 0.5 * (1 - 0.75**number)),
      label=curve.label if is_first else None,
      linewidth=1.5,
      marker=_marker(number, len(curve.x)),
      markersize=4,
    )
  for number, (name, value) in enumerate(marks.items()):
    style = ('--', ':')[number % 2]
    axes.axhline(value, color='0.5', linestyle=style, linewidth=1, label=name)


def _marker(number: int, num_points: int) -> str | None:
  """Returns the marker of a method's line; a line of few points shows them."""
  marker = MARKERS[number // len(LINE_STYLES) % len(MARKERS)]
  return '.' if marker is None and num_points < 4 else marker


def _lighter(color: str, share: float) -> tuple[float, ...]:
  """Mixes a color with a share of white."""
  return tuple(channel + share * (1 - channel) for channel in to_rgb(color))


def save_figure(figure: Figure, path: Path) -> None:
  """Writes a plot whole or not at all.

  Raises:
    UserError: it cannot be written.
  """
  with files.user_errors(path):
    temporary = path.with_name(path.name + '.tmp')
    figure.savefig(temporary, dpi=120, format=path.suffix[1:])
    temporary.replace(path)
