"""Plots of the benchmark."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from experiments.benchmark import cost
from experiments.core import plotting

GROWTH_LABELS = {
  'median_ms': 'ms a batch',
  'temp_mib': 'temporary MiB',
  'compile_s': 's to compile',
}
"""Labels of the measures whose growth is fitted and drawn."""


def plot_population(path: Path, rows: list[dict[str, Any]]) -> None:
  """Draw the throughput of populations against R, a line per case.

  Args:
    path: the image to write.
    rows: rows of `measure_population`.
  """
  figure = Figure(figsize=(6, 4.5), layout='constrained')
  axes = figure.subplots()
  for case in dict.fromkeys(row['case'] for row in rows):
    chosen = [row for row in rows if row['case'] == case]
    sizes = [row['R'] for row in chosen]
    throughputs = [row['throughput'] for row in chosen]
    axes.plot(sizes, throughputs, marker='o', label=case)
  axes.set(
    xlabel='R, members side by side',
    ylabel='throughput / that of one alone',
    xscale='log',
    yscale='log',
  )
  axes.grid(alpha=0.3, which='both')
  axes.legend()
  plotting.save_figure(figure, path)


def update_steps(rows: list[dict[str, Any]], num_steps: int) -> float:
  """Return C, the time of one update in units of the time of one step.

  The time of a batch is fitted as a line in K. C is its slope over its intercept per
  step.

  Args:
    rows: rows of `measure_programs` for several K.
    num_steps: T of these rows.
  """
  # K = 1 is left out: its window is too long for the caches.
  points = [(row['value'], row['median_ms']) for row in rows if row['value'] > 1]
  windows, times = np.array(points).T
  slope, intercept = np.polyfit(windows, times, 1)
  return float(slope / (intercept / num_steps))


SHOWN_RIVALS = {
  'flax, one jit': ('Flax, one jit', 's', 'C0'),
  'flax, nnx.RNN': ('Flax, nnx.RNN', 'D', 'C0'),
  'Haiku': ('Haiku', '^', 'C2'),
  'PyTorch plain': ('PyTorch, plain', 'o', 'C1'),
  'PyTorch optimized': ('PyTorch, optimized', 'P', 'C3'),
  'PyTorch compiled': ('PyTorch, compiled', 'X', 'C5'),
  'PyTorch bfloat16': ('PyTorch, bfloat16', 'P', 'C3'),
  'PyTorch graph': ('PyTorch, CUDA graph', '*', 'C6'),
  'ours, float32': ('fptt_jax, float32', 'o', '0.4'),
}
"""Label, marker and color of the systems that the plot of rivals shows."""


def plot_rivals(path: Path, rows: list[dict[str, Any]]) -> None:
  """Draw how many times as long each system takes as ours, a row per case.

  The left panel compares systems in float32 with our float32, the right one PyTorch's
  bfloat16 and our float32 with our products of bfloat16. Our own times stand beside.

  Args:
    path: the image to write.
    rows: rows of `measure_rivals`.
  """
  names = list(dict.fromkeys(row['case'] for row in rows))
  times = {(row['case'], row['system']): row['median_ms'] for row in rows}
  figure = Figure(figsize=(10, 1.6 + 0.42 * len(names)), layout='constrained')
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  rounded_names = ('PyTorch bfloat16', 'ours, float32')
  float32 = {name: name for name in SHOWN_RIVALS if name not in rounded_names}
  rounded = {'PyTorch bfloat16': 'PyTorch bfloat16', 'ours': 'ours, float32'}
  _draw_ratios(left, names, times, 'ours', float32)
  _draw_ratios(right, names, times, 'ours, bfloat16', rounded)
  left.set_title('float32: times as long as fptt_jax')
  right.set_title('bfloat16: times as long as fptt_jax')
  plotting.save_figure(figure, path)


def _draw_ratios(
  axes: Axes,
  names: list[str],
  times: dict[tuple[str, str], float],
  ours: str,
  rivals: dict[str, str],
) -> None:
  """Draw the time of some systems over the time of one of ours.

  Args:
    axes: the panel.
    names: names of the cases, from the top.
    times: milliseconds by case and system; what was not timed is absent.
    ours: the system that has the ratio 1.
    rivals: by system its name in :data:`SHOWN_RIVALS`.
  """
  known = [name for name in names if (name, ours) in times]
  for system, shown in rivals.items():
    label, marker, color = SHOWN_RIVALS[shown]
    places = [names.index(name) for name in known if (name, system) in times]
    ratios = [times[names[n], system] / times[names[n], ours] for n in places]
    if places:
      axes.scatter(
        ratios, places, s=42, c=color, marker=marker, label=label, alpha=0.8, zorder=3
      )
  axes.axvline(1, color='black', linewidth=1.5, label='fptt_jax')
  labels = [
    f'{name}\n{times[name, ours]:.3g} ms' if name in known else name for name in names
  ]
  axes.set_yticks(range(len(names)), labels, fontsize=8)
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.set(xscale='log')
  low, high = axes.get_xlim()
  ticks = [tick for tick in (0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20) if low <= tick <= high]
  axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
  axes.set_xticks([], minor=True)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=3)


def fitted(growth: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
  """Return the exponents with which time, memory and the time to compile grow.

  Args:
    growth: rows of `measure_programs` by the name of the varied dimension.

  Returns:
    By dimension and measure the exponent p of y = c x^p.
  """
  exponents: dict[str, dict[str, float]] = {}
  for name, rows in growth.items():
    values = [row['value'] for row in rows]
    exponents[name] = {
      measure: cost.growth(values, [row[measure] for row in rows])
      for measure in GROWTH_LABELS
    }
  return exponents


def plot_growth(path: Path, rows: list[dict[str, Any]]) -> None:
  """Draw time, memory and time to compile, a panel per varied dimension.

  Args:
    path: the image to write.
    rows: rows of `measure_growth`.
  """
  growth: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    # The row of the fitted constants has no point.
    if 'value' in row:
      growth.setdefault(row['varied'], []).append(row)
  exponents = fitted(growth)
  figure = Figure(figsize=(3.5 * len(growth), 4), layout='constrained')
  panels = figure.subplots(1, len(growth), squeeze=False)[0]
  for axes, (name, points) in zip(panels, growth.items(), strict=True):
    values = [row['value'] for row in points]
    for measure, text in GROWTH_LABELS.items():
      label = f'{text}: {name}^{exponents[name][measure]:.2f}'
      axes.plot(values, [row[measure] for row in points], marker='o', label=label)
    axes.set(xlabel=name, xscale='log', yscale='log')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
  plotting.save_figure(figure, path)
