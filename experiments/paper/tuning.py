"""Search for the learning rate and number of windows of each line."""

from collections.abc import Iterable
import dataclasses
from pathlib import Path
from typing import Any

import filelock
from tabulate import tabulate

from experiments.core import files, plotting
from experiments.core.plotting import Curve
from experiments.paper import items
from experiments.paper.entries import read_tuned, run_entry
from experiments.paper.items import Entry
from experiments.paper.settings import TUNE_SEED, Config

MAX_RATES = 8
"""Largest number of learning rates to try per line and number of windows."""


def tune(config: Config, entries: list[Entry], folder: Path) -> None:
  """Try learning rates and numbers of windows for each line, and choose the best.

  A grid whose best rate is its lowest or highest is extended on that side until the
  best rate lies inside. It is extended upward while no rate is better than chance. The
  results are tuned.json, plots and printed tables.

  Args:
    config: settings of the command.
    entries: the lines.
    folder: the item's folder.
  """
  rows: dict[items.Score, list[list[Any]]] = {}
  curves: dict[items.Score, list[Curve]] = {}
  for entry in entries:
    if not entry.can_tune:
      print(f'{entry.label}: not tuned, since a choice would see the test data.')
      continue
    trials = [
      trial
      for windows in entry.windows or (None,)
      for trial in try_rates(entry, windows, folder)
    ]
    # A missing score is that of a run that diverged; a line's own K is left blank.
    rows.setdefault(entry.score, []).extend(
      [trial['line'], trial['lr'], trial['num_windows'] or '', trial['score']]
      for trial in trials
    )
    finite = [trial for trial in trials if trial['score'] is not None]
    # A line all of whose runs diverged keeps its declared settings.
    if not finite:
      continue
    best = best_trial(entry, finite)
    chosen = {'lr': best['lr'], entry.score.choose: best['score'], 'tried': trials}
    if entry.score.is_chance(best['score']):
      print(f'{entry.label}: no learning rate is better than chance.')
    else:
      _remark_on_edge(trials, best)
    # Written after each line: tuning takes hours and may be stopped. Other commands may
    # tune other lines at the same time.
    path = folder / 'tuned.json'
    with files.user_errors(path), filelock.FileLock(f'{path}.lock'):
      tuned = read_tuned(folder) | {entry.label: chosen | windows_of(best)}
      files.write_json(path, tuned)
    curves.setdefault(entry.score, []).extend(_trial_curves(entry, finite))
  title = f'{config.item}, scale {config.scale}: tuning'
  for score, lines in curves.items():
    path = folder / f'tuning-{score.choose}.png'
    panels = {'learning rate': lines}
    plotting.plot_curves(path, panels, title, score.label, {}, xscale='log')
  for score, tries in rows.items():
    header = ['line', 'learning rate', 'K', score.choose.replace('_', ' ')]
    print(tabulate(tries, header, floatfmt='.4g', missingval='diverged'))
  print(
    f'chosen settings are in {folder / "tuned.json"}; the same command without --tune '
    'uses them'
  )


def scores_of(
  trials: Iterable[dict[str, Any]], num_windows: int | None
) -> dict[float, float | None]:
  """Return the scores of the learning rates that were tried with a number of windows.

  Args:
    trials: trials of a line, see :func:`try_rates`.
    num_windows: K, as the trials name it.
  """
  return {
    trial['lr']: trial['score']
    for trial in trials
    if trial['num_windows'] == num_windows
  }


def _remark_on_edge(trials: list[dict[str, Any]], best: dict[str, Any]) -> None:
  """Print a remark if the best rate of a line is the highest or lowest tried.

  Args:
    trials: all trials of the line.
    best: the best of them.
  """
  edge = items.edge_of(scores_of(trials, best['num_windows']), best['lr'])
  if edge:
    windows = '' if best['num_windows'] is None else f', K={best["num_windows"]}'
    print(
      f'{best["line"]}{windows}: the best learning rate, {best["lr"]:g}, is the {edge} '
      'tried; a better one may lie beyond it.'
    )


def _trial_curves(entry: Entry, trials: list[dict[str, Any]]) -> list[Curve]:
  """Return the score as a function of the learning rate, a curve per K.

  Args:
    entry: the line.
    trials: its trials that have a score.
  """
  curves = []
  for windows in dict.fromkeys(trial['num_windows'] for trial in trials):
    points = sorted(
      (trial['lr'], trial['score'])
      for trial in trials
      if trial['num_windows'] == windows
    )
    label = entry.label if windows is None else f'{entry.label}, K={windows}'
    rates, scores = zip(*points, strict=True)
    curves.append(Curve(label, entry.config.method[0], rates, scores))
  return curves


def try_rates(
  entry: Entry, num_windows: int | None, folder: Path
) -> list[dict[str, Any]]:
  """Run learning rates of a line until the best of them is not at an end.

  If none of them is better than chance, higher ones are tried; if all diverge, lower
  ones.

  Args:
    entry: the line.
    num_windows: K; None keeps the line's own.
    folder: the item's folder.

  Returns:
    A trial per rate, with `line`, `lr`, `num_windows` and `score`. The score is None if
    the run diverged.
  """
  name = entry.label if num_windows is None else f'{entry.label}-K{num_windows}'
  rates = set(items.first_rates(entry))
  while True:
    # The whole grid each time: runs that have ended are read back, not repeated.
    grid = items.grid(entry, sorted(rates, reverse=True), num_windows)
    config = dataclasses.replace(grid, seeds=(TUNE_SEED,))
    summaries = run_entry(entry, config, folder / 'tune' / name)
    trials = [
      {
        'line': entry.label,
        'lr': summary['lr'],
        'num_windows': num_windows,
        'score': score_of(entry, summary),
      }
      for summary in summaries
    ]
    if len(rates) >= MAX_RATES:
      return trials
    rate = items.next_rate(entry, rates, _promising(entry, trials))
    if rate is None:
      return trials
    rates.add(rate)


def score_of(entry: Entry, summary: dict[str, Any]) -> float | None:
  """Return the score that a trial is chosen by; None if it diverged.

  Args:
    entry: the line.
    summary: summary of the trial.
  """
  # A run that diverged may have a score, of the weights before.
  if 'lost' in summary and not entry.score.chooses_early:
    return None
  score: float | None = summary[entry.score.choose]
  return score


def _promising(entry: Entry, trials: list[dict[str, Any]]) -> float:
  """Return the learning rate beyond which a search goes on if it is at an end.

  Args:
    entry: the line.
    trials: its trials so far with one number of windows.
  """
  finite = [trial for trial in trials if trial['score'] is not None]
  rates = [trial['lr'] for trial in trials]
  # Where all rates diverge, lower ones may not.
  if not finite:
    return min(rates)
  best = best_trial(entry, finite)
  # Where no rate has learned anything, one of them is the best by accident, and higher
  # ones may learn.
  return max(rates) if entry.score.is_chance(best['score']) else best['lr']


def best_trial(entry: Entry, trials: list[dict[str, Any]]) -> dict[str, Any]:
  """Return the trial with the best score; all trials must have one."""
  better = max if entry.score.higher_is_better else min
  return better(trials, key=lambda trial: trial['score'])


def windows_of(trial: dict[str, Any]) -> dict[str, int]:
  """Return the setting of K that a trial changed; {} if it kept the line's own."""
  num_windows = trial['num_windows']
  return {} if num_windows is None else {'num_windows': num_windows}
