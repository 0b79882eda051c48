"""Search for the learning rate and number of windows of each line."""

import dataclasses
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.core import files, plotting
from experiments.core.plotting import Curve
from experiments.paper import items
from experiments.paper.entries import read_tuned, run_entry
from experiments.paper.items import Entry
from experiments.paper.settings import TUNE_SEED, Config

MAX_RATES = 8
"""Most learning rates that tuning tries per line and number of windows."""


def tune(config: Config, entries: list[Entry], folder: Path) -> None:
  """Tries each line's rates, and numbers of windows, from a seed of its own; writes
  tuned.json, the curves and a table.

  A grid whose best rate is its lowest or highest is extended on that side until the
  best lies inside.
  """
  rows: dict[items.Score, list[list[Any]]] = {}
  curves: dict[items.Score, list[Curve]] = {}
  for entry in entries:
    trials = [
      trial
      for windows in entry.windows or (None,)
      for trial in try_rates(entry, windows, folder)
    ]
    rows.setdefault(entry.score, []).extend(list(trial.values()) for trial in trials)
    finite = [trial for trial in trials if trial['score'] is not None]
    if not finite:
      continue
    best = best_trial(entry, finite)
    chosen = {'lr': best['lr'], entry.score.choose: best['score'], 'tried': trials}
    files.write_json(
      folder / 'tuned.json',
      read_tuned(folder) | {entry.label: chosen | windows_of(best)},
    )
    for windows in dict.fromkeys(trial['num_windows'] for trial in finite):
      points = sorted(
        (trial['lr'], trial['score'])
        for trial in finite
        if trial['num_windows'] == windows
      )
      label = entry.label if windows is None else f'{entry.label}, K={windows}'
      rates, scores = zip(*points, strict=True)
      curves.setdefault(entry.score, []).append(
        Curve(label, entry.config.method[0], rates, scores)
      )
  for score, lines in curves.items():
    title, panels = (
      f'{config.item}, scale {config.scale}: tuning',
      {'learning rate': lines},
    )
    plotting.plot_curves(
      folder / f'tuning-{score.choose}.png',
      panels,
      title,
      score.label,
      {},
      xscale='log',
    )
  for score, tries in rows.items():
    header = ['line', 'learning rate', 'K', score.choose.replace('_', ' ')]
    print(tabulate(tries, header, floatfmt='.4g', missingval='diverged'))
  print(
    f'chosen settings are in {folder / "tuned.json"}; the same command without --tune '
    'uses them'
  )


def try_rates(
  entry: Entry, num_windows: int | None, folder: Path
) -> list[dict[str, Any]]:
  """Runs one line's learning rates, by one number of windows, until the best lies
  inside: a dict per trial.
  """
  name = entry.label if num_windows is None else f'{entry.label}-K{num_windows}'
  rates = set(items.first_rates(entry))
  while True:
    config = dataclasses.replace(
      items.grid(entry, sorted(rates, reverse=True), num_windows), seeds=(TUNE_SEED,)
    )
    summaries = run_entry(entry, config, folder / 'tune' / name)
    trials = [
      {
        'line': entry.label,
        'lr': summary['lr'],
        'num_windows': num_windows,
        'score': summary[entry.score.choose],
      }
      for summary in summaries
    ]
    finite = [trial for trial in trials if trial['score'] is not None]
    more = (
      items.next_rate(entry, rates, best_trial(entry, finite)['lr']) if finite else None
    )
    if more is None or len(rates) >= MAX_RATES:
      return trials
    rates.add(more)


def best_trial(entry: Entry, trials: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the trial of the best score."""
  return (max if entry.score.higher_is_better else min)(
    trials, key=lambda trial: trial['score']
  )


def windows_of(trial: dict[str, Any]) -> dict[str, int]:
  """Returns the setting of K that a trial had, {} where it is the line's own."""
  return {} if trial['num_windows'] is None else {'num_windows': trial['num_windows']}
