"""Collection of run folders into the committed results.

A run folder has one of three forms:

* `experiments.paper` makes a folder per line, and `tune/` with the trials of tuning;
* a script puts its runs directly into its folder;
* a study or benchmark writes reports as JSON.
"""

import ast
from collections.abc import Iterator
import dataclasses
from pathlib import Path
import re
from typing import Any

from experiments.core import files
from experiments.core.flags import UserError
from experiments.core.recipe import HYPERPARAMETERS
from experiments.paper import items, studies
from experiments.paper.entries import read_tuned
from experiments.records import store
from experiments.records.store import Row

NO_NUMBERS = ('run', 'method', 'seed', 'config_sha256')
"""Entries of a run's result that are not measurements."""


NO_SETTINGS = ('sha256', 'seeds', 'method', 'grid')
"""Entries of a configuration that are not settings common to all of its runs."""


REPORTS = {
  'table1': ('T', 'method', 'K'),
  'walltime': ('task', 'T', 'method', 'K'),
  'convergence': ('run',),
  'copying': ('influence', 'seed'),
  'costs': ('task', 'method'),
  'interleaving': ('order', 'momentum', 'seed'),
  'rivals': ('case', 'system'),
  'population': ('case', 'R'),
  'growth': ('varied', 'value'),
  'cells': ('layer', 'implementation', 'precision'),
  'latency': ('window', 'implementation'),
  'influence': ('layer', 'implementation', 'influence'),
  'stream': ('stream', 'system'),
}
"""Columns that identify a line, by the report of a study or benchmark."""


HOMES = {'costs': 'walltime'}
"""Items that keep the rows of a study besides their own, by the study."""


NO_SOURCE = (
  'item',
  'scale',
  'part',
  'lines',
  'config',
  'best',
  'runs',
)
"""Entries of a report or summary that do not say where its numbers come from."""


CURVE_DIGITS = 6
"""Significant digits of the numbers along a run; float32 has seven."""


@dataclasses.dataclass(frozen=True)
class Origin:
  """Facts about runs that their folder may not record.

  An empty text keeps what the folder records.

  Attributes:
    series: name of the runs that are compared with each other; by default the scale.
    scale: 'full', 'short', 'cpu' or another name; by default that of the reports.
    command: command that started the runs.
    commit: revision of the code.
    notes: remarks for the readers of the series.
  """

  series: str = ''
  scale: str = ''
  command: str = ''
  commit: str = ''
  notes: str = ''


def collect_folder(folder: Path, name: str, origin: Origin, store_folder: Path) -> int:
  """Add the runs and reports of a folder to an item, and save the item.

  A run that the item already has is replaced only if it was continued. Rows that did
  not change keep their source, so collecting a folder again changes nothing.

  Args:
    folder: the run folder.
    name: the item.
    origin: facts that the folder does not record.
    store_folder: the folder of the item's files.

  Returns:
    The number of rows that the folder has.

  Raises:
    UserError: the folder holds no results, its scale is not known, or the series has
      other results of the same run.
  """
  if not folder.is_dir():
    raise UserError(
      f'--collect must be a run folder, got {folder}, which is not a folder.'
    )
  scale = origin.scale or reported_scale(folder, name)
  series = origin.series or scale
  rows = [*training_rows(folder, series), *report_rows(folder, name, series)]
  if not rows:
    raise UserError(
      f'--collect must be a folder with runs or reports, got {folder}, which has none.'
    )
  given = {'command': origin.command, 'commit': origin.commit}
  given = {key: value for key, value in given.items() if value}
  rows = [dataclasses.replace(row, source=row.source | given) for row in rows]
  item = store.load(HOMES.get(name, name), store_folder)
  known = item.series.get(series, {'scale': scale, 'notes': ''})
  # The numbers of a series stand in one table, so they must be comparable.
  if known['scale'] != scale:
    raise UserError(
      f'--scale must be {known["scale"]}, that of the series {series} of {name}, got '
      f'{scale}.'
    )
  notes = origin.notes or known['notes']
  item.series[series] = known | {'notes': notes}
  merged = {row.key: row for row in item.rows}
  for row in rows:
    merged[row.key] = merge(merged.get(row.key), row, bool(given))
  item.rows = list(merged.values())
  store.save(item, store_folder)
  return len(rows)


def merge(old: Row | None, new: Row, source_is_given: bool) -> Row:
  """Return the newer of two rows of one run.

  It keeps the older source if nothing was measured since.

  Args:
    old: the row that the item has; None if it has none.
    new: the row of the folder.
    source_is_given: whether the user named the source.

  Raises:
    UserError: the rows are of two runs: the new one does not continue the old one.
  """
  if old is None:
    return new
  new = dataclasses.replace(new, notes=new.notes or old.notes)
  if (old.numbers, old.curves, old.status) == (new.numbers, new.curves, new.status):
    return new if source_is_given else dataclasses.replace(new, source=old.source)
  # A finished run that has other numbers now was trained anew; its old numbers would be
  # lost.
  if old.status != 'unfinished' and not goes_on(old.curves, new.curves):
    raise UserError(
      f'--series must be another name than {old.series}, which has other results of '
      f'{old.line} {old.run}.'
    )
  return new


def goes_on(old: dict[str, list[Any]], new: dict[str, list[Any]]) -> bool:
  """Return whether new curves begin with the old ones.

  Args:
    old: curves by metric; without curves the result is false.
    new: curves by metric.
  """
  return bool(old) and all(
    new.get(name, [])[: len(values)] == values for name, values in old.items()
  )


def reported_scale(folder: Path, name: str) -> str:
  """Return the scale that the reports of an item record.

  Args:
    folder: the run folder.
    name: the item.

  Raises:
    UserError: there is no report, or the reports have several scales.
  """
  reports = [files.read_json(path) for path in sorted(folder.glob(f'{name}*.json'))]
  scales = {report['scale'] for report in reports if 'scale' in report}
  if len(scales) != 1:
    found = ', '.join(sorted(scales)) or 'no scale'
    raise UserError(
      f'--scale must be given: the reports of {name} in {folder} say {found}.'
    )
  return str(scales.pop())


def training_rows(folder: Path, series: str) -> Iterator[Row]:
  """Yield a row per training run in a folder.

  Args:
    folder: the run folder.
    series: name of the series that the runs belong to.
  """
  # A run that was stopped has no result yet, and one that diverged at once no metrics.
  found = (*folder.rglob('metrics.jsonl'), *folder.rglob('result.json'))
  tuned = read_tuned(folder)
  for run in sorted({file.parent for file in found}):
    parts = run.parent.relative_to(folder).parts
    is_trial = parts[:1] == ('tune',)
    stage = 'tuning' if is_trial else 'final'
    # The folder of a single script has runs but no lines.
    line = '/'.join(parts[1:] if is_trial else parts) or line_of(run.name)
    chosen = None if is_trial else tuned.get(line)
    yield training_row(run, series, stage, line, chosen)


def training_row(
  run: Path, series: str, stage: str, line: str, chosen: dict[str, Any] | None
) -> Row:
  """Return the row of one training run.

  Args:
    run: the run's folder.
    series: name of the series that it belongs to.
    stage: 'final' or 'tuning'.
    line: name of the configuration.
    chosen: what the folder's --tune chose for the line; None if nothing.

  Returns:
    The row; its status is 'unfinished' while the run has no result.

  Raises:
    UserError: the configuration of the run is missing, or a file is damaged.
  """
  if not (run.parent / 'config.json').exists():
    raise UserError(
      f'{run.parent / "config.json"} is missing: {run.name} cannot be told from others.'
    )
  path = run.parent / 'summary.json'
  summary = files.read_json(path) if path.exists() else {'runs': []}
  result = read_result(run, summary['runs'])
  settings = settings_of(run, result)
  config = files.read_json(run.parent / 'config.json')
  # A result repeats the settings that differ from run to run.
  others = (*NO_NUMBERS, *own_settings(run.name, config, result))
  numbers = {name: value for name, value in result.items() if name not in others}
  status = 'unfinished'
  if result:
    status = 'diverged' if 'lost' in result else 'done'
  return Row(
    series=series,
    stage=stage,
    line=line,
    run=run.name,
    seed=seed_of(run.name),
    tuned=_has_chosen(settings, chosen)
    or (stage == 'final' and has_tuned_rate(run.name, config)),
    status=status,
    settings=settings,
    source={name: value for name, value in summary.items() if name not in NO_SOURCE},
    numbers=numbers,
    curves=columns(files.read_jsonl(run / 'metrics.jsonl')),
  )


def _has_chosen(settings: dict[str, Any], chosen: dict[str, Any] | None) -> bool:
  """Return whether a run has the learning rate and K that a search chose.

  Args:
    settings: all settings of the run.
    chosen: the line's entry in tuned.json. A run that was made before the search, or
      with another choice, has other settings.
  """
  names = ('lr', 'num_windows')
  return chosen is not None and all(
    settings.get(name) == chosen[name] for name in names if name in chosen
  )


def read_result(run: Path, summaries: list[dict[str, Any]]) -> dict[str, Any]:
  """Return the result of a run; {} if it has not ended.

  Args:
    run: the run's folder.
    summaries: results in the summary of all runs.
  """
  if (run / 'result.json').exists():
    result: dict[str, Any] = files.read_json(run / 'result.json')
    config = files.read_json(run.parent / 'config.json')
    # A run that goes on with other settings has not ended under these.
    return result if result.get('config_sha256') in (None, config.get('sha256')) else {}
  # Older versions wrote results to the summary only, and some without the run's name.
  for summary in summaries:
    default = f'{summary["method"]}-seed{summary["seed"]}'
    if summary.get('run', default) == run.name:
      return summary
  return {}


def settings_of(run: Path, result: dict[str, Any]) -> dict[str, Any]:
  """Return the settings of one run out of the configuration of all runs.

  Args:
    run: the run's folder.
    result: its result, which repeats the settings that differ from run to run.
  """
  config = files.read_json(run.parent / 'config.json')
  settings = {'script': config['script'], 'method': method_of(run.name)}
  settings |= {name: value for name, value in config.items() if name not in NO_SETTINGS}
  # Older versions wrote no list of overrides; an empty one means the same.
  if not settings.get('overrides', True):
    del settings['overrides']
  settings |= own_settings(run.name, config, result)
  # The order of the pixels is drawn, so no flag tells it.
  described = run.parent / 'data.json'
  order = files.read_json(described).get('order') if described.exists() else None
  if order is not None:
    settings['permutation'] = order
  return settings


def own_settings(
  run: str, config: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
  """Return the settings of a run that its configuration does not fix.

  They come from a grid, or from the table of tuned rates by method.

  Args:
    run: the run's name, which has the values of a grid. The grid in the configuration
      is that of the last command, and the run may be of an earlier one.
    config: the configuration of all runs.
    result: the result of the run, which repeats the values.
  """
  varied = [axis.partition('=')[0] for axis in config.get('grid', ())]
  found = {
    name: result.get(name, value)
    for name in dict.fromkeys((*varied, *HYPERPARAMETERS))
    if (value := value_in_name(run, name)) is not None
  }
  tuned = ('lr', 'momentum') if 'tuned_rates' in config else ()
  by_method = [name for name in tuned if config.get(name) is None and name in result]
  return found | {name: result[name] for name in by_method}


def has_tuned_rate(run: str, config: dict[str, Any]) -> bool:
  """Return whether a run has the rate that a table of tuned rates gives its method.

  Args:
    run: the run's name.
    config: the configuration of all runs.
  """
  if 'tuned_rates' not in config or config.get('lr') is not None:
    return False
  is_varied = value_in_name(run, 'lr') is not None
  return not is_varied and method_of(run) in ast.literal_eval(config['tuned_rates'])


def method_of(run: str) -> str:
  """Return the method in a run's name."""
  return run.partition('-seed')[0]


def value_in_name(run: str, name: str) -> float | None:
  """Return a setting in a run's name, such as lr = 0.25 in 'fptt-seed0-lr0.25'.

  It is None if the name does not have the setting.
  """
  found = re.search(rf'-{re.escape(name)}(-?[\d.]+(?:e[-+]?\d+)?)', run)
  return None if found is None else float(found[1])


def seed_of(run: str) -> int:
  """Return the seed in a run's name.

  Raises:
    UserError: the name has no seed.
  """
  found = re.search(r'-seed(\d+)', run)
  if found is None:
    raise UserError(f'the run {run} does not name its seed.')
  return int(found[1])


def line_of(run: str) -> str:
  """Return the name of a run without its seed."""
  return re.sub(r'-seed\d+', '', run)


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
  """Return rows of metrics as one list per metric; None where a row lacks it.

  Numbers keep `CURVE_DIGITS` significant digits, which halves the files of the curves.
  """
  names = dict.fromkeys(name for row in rows for name in row)
  return {name: [_rounded(row.get(name)) for row in rows] for name in names}


def _rounded(value: Any) -> Any:
  """Return a number of a curve with fewer digits, and any other value as it is."""
  return float(f'{value:.{CURVE_DIGITS}g}') if isinstance(value, float) else value


def report_rows(folder: Path, name: str, series: str) -> Iterator[Row]:
  """Yield a row per line of the reports of a study or benchmark.

  Args:
    folder: the folder of the reports.
    name: the item.
    series: name of the series that the lines belong to.
  """
  for kind, report in _reports(folder, name):
    source = {key: value for key, value in report.items() if key not in NO_SOURCE}
    for line in report['lines']:
      # In a report of another kind the texts are taken for the names of a line.
      texts = tuple(key for key in line if isinstance(line[key], str))
      names = REPORTS.get(kind, texts)
      settings = {key: line[key] for key in names if key in line}
      yield Row(
        series=series,
        stage=kind,
        line=', '.join(f'{key} {value}' for key, value in settings.items()),
        run='',
        seed=None,
        tuned=None,
        status='done',
        settings=settings,
        source=source,
        numbers={key: value for key, value in line.items() if key not in settings},
        curves=_curves_of(line, report, folder),
      )


def _reports(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yield the reports of a study, or of each part of a benchmark, with their kind."""
  path = folder / f'{name}.json'
  if not path.exists():
    return
  report = files.read_json(path)
  # Commands share the file of a benchmark: each has a run there for each of its parts.
  if name == 'benchmark':
    yield from ((run['part'], run) for run in report['runs'])
  else:
    yield name, report


def _curves_of(
  line: dict[str, Any], report: dict[str, Any], folder: Path
) -> dict[str, list[Any]]:
  """Return the curves of a line, which have a file of their own; {} without one."""
  path = folder / f'{line.get("run")}-{report.get("scale")}.json'
  return columns(files.read_rows(path)) if path.exists() else {}


def known_items() -> tuple[str, ...]:
  """Return the names of the items that can be collected."""
  return (*items.ITEMS, *studies.STUDIES, 'add_task', 'benchmark', 'stream')
