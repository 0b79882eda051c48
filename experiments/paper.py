"""One command for each figure and table of the paper.

    python -m experiments.paper --item=table6 --scale=cpu

An item is a list of runs, each in a folder of its own: stop it at any time, the same
command goes on. --tune first tries the declared learning rates on each line (at scale
'short' also numbers of windows), chosen by validation, and later runs of the item in
the same folder use what was found. It ends with a table (mean, ± half the width of its
95 % confidence interval over the seeds, beside the number that the paper has, measured
or quoted, and an independent replication's where the setting is theirs) as text, JSON
and plot.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tabulate import tabulate

from experiments import add_task, items, options, reporting, runs, smoke, studies
from experiments.items import Entry
from experiments.options import UserError, check, option
from experiments.reporting import Curve
import fptt_jax

TUNE_SEED = 1000
"""No reported run uses it: what is drawn for tuning is drawn for nothing else."""
MOST_RATES = 8
"""Most learning rates that tuning tries per line and number of windows."""


@dataclasses.dataclass(frozen=True)
class Config:
  """Which item, and how much of it."""

  item: str = option('fig2', 'figure, table or study', (*items.ITEMS, *studies.STUDIES))
  scale: str = option(
    'cpu',
    "'full': the paper's setting; 'short': its model, data and length in fewer epochs, "
    "rate annealed to 0; 'cpu': reduced, for two "
    "cores; 'smoke': seconds, means nothing",
    items.SCALES,
  )
  methods: tuple[str, ...] = option(
    ('all',), f'only lines of these methods: {", ".join(fptt_jax.METHODS)}'
  )
  lines: tuple[str, ...] = option(
    ('all',), 'only the lines of these names, as the table shows them'
  )
  seeds: tuple[int, ...] = option((0,), 'seeds, one run each: 0,1,2 or 0:3')
  tune: bool = option(
    False, 'try the declared learning rates, choose by validation, and stop'
  )
  allow_config_change: bool = option(
    False, 'go on with the runs in --workdir under other settings than they began with'
  )
  data_dir: str = option(
    '',
    'folder with the official data files (or mnist/, cifar10/, ptb/ in it); default a '
    'prepared copy or a download',
  )
  workdir: str = option(
    '', 'folder; default runs/ITEM-SCALE, so that the same command resumes'
  )

  def __post_init__(self) -> None:
    options.check_fields(self)
    known = {'all', *fptt_jax.METHODS}
    check(
      set(self.methods) <= known,
      'methods',
      self.methods,
      f'out of {", ".join(sorted(known))}',
    )
    check(
      bool(self.seeds) and min(self.seeds, default=-1) >= 0,
      'seeds',
      self.seeds,
      'integers >= 0',
    )
    check(
      TUNE_SEED not in self.seeds,
      'seeds',
      self.seeds,
      f'without {TUNE_SEED}, which tuning draws from',
    )
    check(
      len(set(self.seeds)) == len(self.seeds),
      'seeds',
      self.seeds,
      'different from each other',
    )
    if self.item in studies.STUDIES:
      check(
        self.scale != 'short',
        'scale',
        self.scale,
        f'another one with --item={self.item}, which trains nothing to an end',
      )
      for name, only in (
        ('methods', ('all',)),
        ('lines', ('all',)),
        ('seeds', (0,)),
        ('allow_config_change', False),
      ):
        check(
          getattr(self, name) == only,
          name,
          getattr(self, name),
          f'left out with --item={self.item}, which is one study',
        )
    check(
      self.item in items.ITEMS or not self.tune,
      'tune',
      self.tune,
      f'false with --item={self.item}, which has nothing to tune',
    )


def chosen_entries(config: Config, folder: Path) -> list[Entry]:
  """The item's lines that are asked for, with the data's place and the settings tuned
  before.

  Raises:
    UserError: a name that is no line, or nothing left.
  """
  entries = items.ITEMS[config.item](config.scale)
  labels = [entry.label for entry in entries]
  unknown = sorted(set(config.lines) - {'all', *labels})
  if unknown:
    raise UserError(
      f'--lines must be out of {", ".join(labels)}, got {", ".join(unknown)}.'
    )
  wanted = lambda entry: (
    'all' in config.methods or entry.config.method[0] in config.methods
  )
  entries = [
    entry
    for entry in entries
    if wanted(entry) and ('all' in config.lines or entry.label in config.lines)
  ]
  if not entries:
    raise UserError(
      f'--methods={",".join(config.methods)} and --lines={",".join(config.lines)} '
      f'leave no line of {config.item}.'
    )
  tuned = (
    {} if config.tune else read_tuned(folder)
  )  # The grid is that of the declared setting, every time.
  place = (
    smoke.data_files(folder / 'data')
    if config.scale == 'smoke'
    else dict.fromkeys(('images', 'text'), config.data_dir)
  )
  kinds = {'experiments.images': 'images', 'experiments.language_model': 'text'}

  def prepared(entry: Entry) -> Entry:
    settings: dict[str, Any] = dict(allow_config_change=config.allow_config_change)
    if entry.label in tuned:
      found = tuned[entry.label]
      settings |= {name: found[name] for name in ('lr', 'num_windows') if name in found}
    if entry.script.__name__ in kinds:
      settings['data_dir'] = place[kinds[entry.script.__name__]]
    return entry._replace(config=dataclasses.replace(entry.config, **settings))

  return [prepared(entry) for entry in entries]


def run_entry(entry: Entry, config: Any, folder: Path) -> list[dict[str, Any]]:
  """Runs a configuration in a folder of its own, every seed, and writes its summary."""
  path, summaries = entry.script.run(config, str(folder))
  runs.write_summary(path, summaries)
  return summaries


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
    runs.write_json(
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
    reporting.plot_curves(
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
    if more is None or len(rates) >= MOST_RATES:
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


def interval(values: list[float]) -> float | None:
  """Half the width of the 95 % confidence interval of the mean (Student's t); None for
  fewer than two values.
  """
  if len(values) < 2:
    return None
  return float(
    stats.t.ppf(0.975, len(values) - 1)
    * np.std(values, ddof=1)
    / math.sqrt(len(values))
  )


def line(
  entry: Entry, summaries: list[dict[str, Any]], measures: list[str]
) -> dict[str, Any]:
  """A line of the table, of all its seeds; `measures` are names in their summaries,
  which those of diverged runs may lack.
  """
  measured: dict[str, Any] = {}
  for measure in measures:
    values = [
      summary[measure] for summary in summaries if summary.get(measure) is not None
    ]
    measured |= {
      measure: float(np.mean(values)) if values else None,
      f'± {measure}': interval(values),
    }
  return {
    'line': entry.label,
    'method': entry.config.method[0],
    'K': summaries[0]['K'],
    'lr': entry.config.lr,
    'parameters': summaries[0].get('parameters'),  # Older versions' runs lack them.
    'recurrent': summaries[0].get('recurrent_parameters'),
    'seeds': len(summaries),
    'diverged': sum(summary[entry.score.test] is None for summary in summaries),
    **measured,
    'paper': entry.paper,
    'replication': entry.replication or None,
    'seconds a run': float(np.mean([summary['seconds'] for summary in summaries])),
  }


def report(
  config: Config,
  entries: list[Entry],
  results: list[list[dict[str, Any]]],
  folder: Path,
) -> None:
  """Table as text and JSON, and the curves."""
  quoted = items.QUOTED.get(config.item, {}) if config.scale == 'full' else {}
  quotes = [
    f'the paper quotes, {measure}: '
    + ', '.join(f'{name} {number:g}' for name, number in systems.items())
    for measure, systems in quoted.items()
  ]
  for score in dict.fromkeys(entry.score for entry in entries):
    pairs = [
      (entry, summaries)
      for entry, summaries in zip(entries, results, strict=True)
      if entry.score == score
    ]
    known = {
      name for _, summaries in pairs for summary in summaries for name in summary
    }
    measures = [name for name in (score.test, f'dynamic_{score.test}') if name in known]
    table = [line(entry, summaries, measures) for entry, summaries in pairs]
    formats = ['g' if name == 'lr' else f'.{score.digits}f' for name in table[0]]
    text = tabulate(
      [list(row.values()) for row in table],
      list(table[0]),
      floatfmt=formats,
      missingval='-',
    )
    print(text)
    name = f'{config.item}-{score.test}'
    runs.write_text(
      folder / f'{name}.txt',
      '\n'.join([f'{config.item}, scale {config.scale}', text, *quotes]) + '\n',
    )
    runs.write_json(
      folder / f'{name}.json',
      {'item': config.item, 'scale': config.scale, 'lines': table, 'quoted': quoted},
    )
    step = 'batches' if score is items.ERROR else 'epoch'
    marks = {'chance': add_task.CHANCE} if score is items.ERROR else {}
    panels = {step: learning_curves(folder, pairs, score.curve)}
    title = f'{config.item}, scale {config.scale}'
    reporting.plot_curves(folder / f'{name}.png', panels, title, score.label, marks)
  if quotes:
    print('\n'.join(quotes))
  if config.scale == 'short':
    print(
      "scale short: the paper's model, data and length in fewer epochs; its numbers "
      'are of other schedules'
    )
  elif config.scale != 'full':
    print(
      f"scale {config.scale}: reduced settings, not the paper's; its numbers stand "
      'beside --scale=full only'
    )
  print(f'tables, plots and the runs are in {folder}')


def learning_curves(
  folder: Path, results: list[tuple[Entry, list[dict[str, Any]]]], metric: str
) -> list[Curve]:
  """Returns one curve of a metric per run of each line."""
  curves = []
  for entry, summaries in results:
    for summary in summaries:
      rows = runs.read_jsonl(folder / entry.label / summary['run'] / 'metrics.jsonl')
      x, y = [row['step'] for row in rows], [row[metric] for row in rows]
      curves.append(Curve(entry.label, entry.config.method[0], x, y))
  return curves


def read_tuned(folder: Path) -> dict[str, Any]:
  """What --tune chose for each line; {} before that."""
  path = folder / 'tuned.json'
  return runs.read_json(path) if path.exists() else {}


def main(config: Config) -> None:
  """Runs what is missing of an item and reports it."""
  folder = runs.make_folder(config.workdir)
  if config.item in studies.STUDIES:
    studies.STUDIES[config.item](config.scale, folder)
    return
  entries = chosen_entries(config, folder)
  if config.tune:
    tune(config, entries, folder)
    return
  results = []
  for entry in entries:
    print(f'--- {config.item}: {entry.label}', flush=True)
    results.append(
      run_entry(
        entry,
        dataclasses.replace(entry.config, seeds=config.seeds),
        folder / entry.label,
      )
    )
  report(config, entries, results, folder)


if __name__ == '__main__':
  options.run(main, Config, workdir=lambda config: f'runs/{config.item}-{config.scale}')
