"""Plots of the benchmark."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from experiments.benchmark import cost
from experiments.core import plotting


def plot_population(path: Path, rows: list[dict[str, Any]]) -> None:
  """Throughput against R."""
  figure = Figure(figsize=(6, 4.5), layout='constrained')
  axes = figure.subplots()
  for case in dict.fromkeys(row['case'] for row in rows):
    chosen = [row for row in rows if row['case'] == case]
    axes.plot(
      [row['R'] for row in chosen],
      [row['throughput'] for row in chosen],
      marker='o',
      label=case,
    )
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
  """C, the time of one update in steps: the slope of the time over K > 1 by the time of
  a step. (K = 1 uses the caches less.)
  """
  windows, times = np.array(
    [(row['value'], row['median_ms']) for row in rows if row['value'] > 1]
  ).T
  slope, intercept = np.polyfit(windows, times, 1)
  return float(slope / (intercept / num_steps))


def plot_rivals(path: Path, rows: list[dict[str, Any]]) -> None:
  """Time of each system over ours, a group of bars a case."""
  cases = list(dict.fromkeys(row['case'] for row in rows))
  names = list(dict.fromkeys(row['system'].partition(', threads')[0] for row in rows))
  figure = Figure(figsize=(max(7, 1.4 * len(cases)), 4.5), layout='constrained')
  axes = figure.subplots()
  for number, name in enumerate(names):
    chosen = [row for row in rows if row['system'].partition(', threads')[0] == name]
    places = [cases.index(row['case']) + 0.8 * (number / len(names)) for row in chosen]
    axes.bar(
      places,
      [row['times_ours'] for row in chosen],
      0.8 / len(names),
      align='edge',
      label=name,
    )
  axes.axhline(1, color='0.5', linewidth=1)
  axes.set(ylabel='time / ours (medians)', yscale='log')
  axes.set_xticks(np.arange(len(cases)) + 0.4, cases)
  axes.grid(alpha=0.3, axis='y', which='both')
  axes.legend()
  plotting.save_figure(figure, path)


def fitted(growth: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
  """By what is varied, the exponents with which time, memory and the time to compile
  grow.
  """
  of = lambda rows, measure: cost.growth(
    [row['value'] for row in rows], [row[measure] for row in rows]
  )
  return {
    name: {
      measure: of(rows, measure) for measure in ('median_ms', 'temp_mib', 'compile_s')
    }
    for name, rows in growth.items()
  }


def plot_growth(path: Path, growth: dict[str, list[dict[str, Any]]]) -> None:
  """Time, memory and time to compile against what is varied, each with its exponent."""
  exponents = fitted(growth)
  figure = Figure(figsize=(3.5 * len(growth), 4), layout='constrained')
  for axes, (name, rows) in zip(
    figure.subplots(1, len(growth)), growth.items(), strict=True
  ):
    values = [row['value'] for row in rows]
    for measure, label in (
      ('median_ms', 'ms a batch'),
      ('temp_mib', 'temporary MiB'),
      ('compile_s', 's to compile'),
    ):
      axes.plot(
        values,
        [row[measure] for row in rows],
        marker='o',
        label=f'{label}: {name}^{exponents[name][measure]:.2f}',
      )
    axes.set(xlabel=name, xscale='log', yscale='log')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
  plotting.save_figure(figure, path)
