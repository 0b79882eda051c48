"""Plots of the runs in a folder, made from their metrics."""

from collections.abc import Callable, Sequence
from pathlib import Path
import time
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np

from experiments.core import files, processes, recipe
from experiments.core.schedule import list_members
import fptt_jax

METHOD_COLORS = {name: f'C{number}' for number, name in enumerate(fptt_jax.METHODS)}
"""Color of each method, the same in every plot."""


LINE_STYLES = ('-', '--', '-.', ':')
"""Styles of the lines that share a method's color, used in turn."""


MARKERS = (None, 'o', 's', '^', 'x')
"""Markers of these lines; the next one is used when all styles have been used."""


REDRAW_SECONDS = 5.0
"""Least number of seconds between two drawings of a plot during training."""


REDRAW_SHARE = 20
"""Least ratio of training time to drawing time while runs are trained."""


class Curve(NamedTuple):
  """One line of a plot.

  Attributes:
    label: name in the legend; several curves, such as seeds, may share it.
    method: training method, which decides the color.
    x: horizontal positions of the points.
    y: values of the points; None leaves a gap.
  """

  label: str
  method: str
  x: Sequence[float]
  y: Sequence[float | None]


class Plot(NamedTuple):
  """Description of a plot of the runs in a folder.

  Attributes:
    file: name of the file.
    title: title above all panels.
    metric: name of the metric to draw.
    ylabel: the metric in words. If it ends in '%', the vertical axis is linear, else
      logarithmic.
    panels: per panel, name and label of the metric on the horizontal axis.
    marks: names and values of horizontal lines.
  """

  file: str
  title: str
  metric: str
  ylabel: str
  panels: tuple[tuple[str, str], ...]
  marks: tuple[tuple[str, float], ...] = ()


def live(folder: Path, config: recipe.Recipe, plot: Plot | None) -> Callable[[], None]:
  """Return a callback for evaluations that keeps a plot up to date.

  Args:
    folder: the parent of the runs' folders.
    config: settings that list the runs.
    plot: the plot; None draws nothing.
  """
  return (lambda: None) if plot is None else LivePlot(folder, config, plot)


class LivePlot:
  """Callback that redraws a plot while the runs are trained."""

  def __init__(self, folder: Path, config: recipe.Recipe, plot: Plot):
    """Store the arguments of :func:`draw`."""
    self._folder = folder
    self._config = config
    self._plot = plot
    self._due = time.monotonic()

  def __call__(self) -> None:
    """Draw the plot unless it was drawn a moment ago."""
    started = time.monotonic()
    if not processes.is_first() or started < self._due:
      return
    draw(self._folder, self._config, self._plot)
    now = time.monotonic()
    # Many runs take seconds to draw, which would slow down short evaluations.
    self._due = now + max(REDRAW_SECONDS, REDRAW_SHARE * (now - started))


def draw(folder: Path, config: recipe.Recipe, plot: Plot) -> None:
  """Draw one metric of all runs that have been evaluated at least once.

  Args:
    folder: the parent of the runs' folders, to which the plot is written.
    config: settings that list the runs.
    plot: description of the plot.

  Raises:
    UserError: the plot cannot be written.
  """
  curves: dict[str, list[Curve]] = {label: [] for _, label in plot.panels}
  for member in list_members(config):
    rows = files.read_jsonl(folder / member.name / 'metrics.jsonl')
    for metric, label in plot.panels if rows else ():
      x: list[Any] = [row.get(metric) for row in rows]
      y = [row.get(plot.metric) for row in rows]
      curves[label].append(Curve(member.line, member.method, x, y))
  plot_curves(folder / plot.file, curves, plot.title, plot.ylabel, dict(plot.marks))


def plot_curves(
  path: Path,
  panels: dict[str, list[Curve]],
  title: str,
  ylabel: str,
  marks: dict[str, float],
  xscale: str = 'linear',
) -> None:
  """Write the figure that :func:`curves_figure` returns for the other arguments.

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
  """Draw panels side by side, with a color per method and a line per seed.

  Args:
    panels: the curves of each panel by the label of its horizontal axis.
    title: title above all panels.
    ylabel: label of the vertical axes, see :class:`Plot`.
    marks: values of horizontal lines by name.
    xscale: matplotlib's name of the scale of the horizontal axes.

  Returns:
    The figure.
  """
  labels = dict.fromkeys(curve.label for curves in panels.values() for curve in curves)
  width = 7.0 if len(panels) == 1 else 4.6 * len(panels)
  # A long legend would hide the curves, so it goes next to the panels.
  beside = len(panels) > 1 or len(labels) + len(marks) > 6
  height = max(4.5, 0.3 * len(labels))
  figure = Figure(
    figsize=(width + (2.5 if beside else 0), height), layout='constrained'
  )
  figure.suptitle(title)
  all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for axes, (xlabel, curves) in zip(all_axes, panels.items(), strict=True):
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
  if beside:
    figure.legend(*legend, loc='outside right center')
  elif legend[0]:
    figure.axes[-1].legend()
  return figure


def _draw_panel(axes: Axes, curves: list[Curve], marks: dict[str, float]) -> None:
  """Draw the lines of one panel; further variants of a method are lighter.

  Args:
    axes: the panel.
    curves: its curves.
    marks: values of horizontal lines by name.
  """
  variants: dict[str, list[str]] = {}
  for curve in curves:
    known = variants.setdefault(curve.method, [])
    is_first = curve.label not in known
    if is_first:
      known.append(curve.label)
    number = known.index(curve.label)
    axes.plot(
      curve.x,
      # NumPy makes NaN of None, at which matplotlib leaves a gap.
      np.array(curve.y, float),
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
  """Return the marker of a method's line.

  Args:
    number: number of the line among those of the method.
    num_points: number of its points. A line of few points always shows them.
  """
  marker = MARKERS[number // len(LINE_STYLES) % len(MARKERS)]
  return '.' if marker is None and num_points < 4 else marker


def _lighter(color: str, share: float) -> tuple[float, ...]:
  """Return a color mixed with a share of white."""
  return tuple(channel + share * (1 - channel) for channel in to_rgb(color))


def save_figure(figure: Figure, path: Path) -> None:
  """Write a figure to a file, completely or not at all.

  Raises:
    UserError: the file cannot be written.
  """
  with files.user_errors(path), files.atomic_write(path, 'wb') as file:
    figure.savefig(file, dpi=120, format=path.suffix[1:])
