"""Plots of the benchmark."""

from pathlib import Path
from typing import Any

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


def plot_rivals(path: Path, rows: list[dict[str, Any]]) -> None:
  """Draw the time of each system relative to ours, a group of bars per case.

  Args:
    path: the image to write.
    rows: rows of `measure_rivals`.
  """
  cases = list(dict.fromkeys(row['case'] for row in rows))
  names = list(dict.fromkeys(str(row['system']) for row in rows))
  width = 0.8 / len(names)
  figure = Figure(figsize=(max(7, 1.4 * len(cases)), 4.5), layout='constrained')
  axes = figure.subplots()
  for number, name in enumerate(names):
    # A system that failed or does not fit a case has no bar there.
    chosen = [row for row in rows if str(row['system']) == name]
    places = [cases.index(row['case']) + number * width for row in chosen]
    ratios = [row['times_ours'] for row in chosen]
    axes.bar(places, ratios, width, align='edge', label=name)
  axes.axhline(1, color='0.5', linewidth=1)
  axes.set(ylabel='time / ours (medians)', yscale='log')
  axes.set_xticks(np.arange(len(cases)) + 0.4, cases)
  axes.grid(alpha=0.3, axis='y', which='both')
  axes.legend()
  plotting.save_figure(figure, path)


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


def plot_growth(path: Path, growth: dict[str, list[dict[str, Any]]]) -> None:
  """Draw time, memory and time to compile, a panel per varied dimension.

  Args:
    path: the image to write.
    growth: rows of `measure_programs` by the name of the varied dimension.
  """
  exponents = fitted(growth)
  figure = Figure(figsize=(3.5 * len(growth), 4), layout='constrained')
  panels = figure.subplots(1, len(growth))
  for axes, (name, rows) in zip(panels, growth.items(), strict=True):
    values = [row['value'] for row in rows]
    for measure, text in GROWTH_LABELS.items():
      label = f'{text}: {name}^{exponents[name][measure]:.2f}'
      axes.plot(values, [row[measure] for row in rows], marker='o', label=label)
    axes.set(xlabel=name, xscale='log', yscale='log')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
  plotting.save_figure(figure, path)
