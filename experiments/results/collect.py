"""Collects what a run folder holds into the results of an item.

A folder is that of `experiments.paper` (a folder per line, `tune/` for what was tried),
of one script (runs directly in it), or of a study or benchmark (reports as JSON).
"""

from collections.abc import Iterator
import dataclasses
from pathlib import Path
import re
from typing import Any

from experiments.core import files
from experiments.core.flags import UserError
from experiments.paper import items, studies
from experiments.results import store
from experiments.results.store import Row

NO_NUMBERS = ('run', 'method', 'seed', 'config_sha256')
"""What a result says beside what was measured."""
NO_SETTINGS = ('sha256', 'seeds', 'method', 'grid')
"""What a configuration says beside the settings that all of its runs have."""
REPORTS = {
  'table1': ('T', 'method', 'K'),
  'walltime': ('task', 'T', 'method', 'K'),
  'convergence': ('run',),
  'rivals': ('case', 'system'),
  'population': ('case', 'R'),
  'growth': ('varied', 'value'),
}
"""By the report of a study or benchmark, the columns that tell its lines apart."""
BENCHMARK = ('rivals', 'population', 'growth')
"""The reports of a benchmark."""
NO_SOURCE = (
  'item',
  'scale',
  'lines',
  'growth',
  'exponents',
  'C',
  'config',
  'best',
  'runs',
)
"""What a report or summary says beside where its numbers come from."""


@dataclasses.dataclass(frozen=True)
class Origin:
  """What a run folder does not say itself; an empty text leaves what it says.

  Attributes:
    series: the name of the runs that belong together; by default the scale.
    scale: 'full', 'short', 'cpu', or another name; by default what reports say.
    command: how the runs were started.
    commit: the revision of the code.
    notes: what a reader of the series has to know.
  """

  series: str = ''
  scale: str = ''
  command: str = ''
  commit: str = ''
  notes: str = ''


def collect_folder(folder: Path, name: str, origin: Origin, store_folder: Path) -> int:
  """Adds the runs and reports of a folder to an item, and saves the item.

  A run that is there already is replaced where it went on, and nothing else is. What
  did not change keeps its source, so that collecting a folder again changes nothing.

  Args:
    folder: the run folder.
    name: the item.
    origin: what the folder does not say.
    store_folder: where the item's files are.

  Returns:
    How many rows the folder gave.

  Raises:
    UserError: the folder holds no results, its scale is not known, or the series has
      other results of the same run.
  """
  if not folder.is_dir():
    raise UserError(f'--collect must be a run folder, got {folder}, which is none.')
  scale = origin.scale or reported_scale(folder, name)
  series = origin.series or scale
  rows = [*training_rows(folder, series), *report_rows(folder, name, series)]
  if not rows:
    raise UserError(
      f'--collect must be a folder with runs or reports, got {folder}, which has none.'
    )
  said = {
    key: getattr(origin, key) for key in ('command', 'commit') if getattr(origin, key)
  }
  rows = [dataclasses.replace(row, source=row.source | said) for row in rows]
  item = store.load(name, store_folder)
  known = item.series.get(series, {'scale': scale, 'notes': ''})
  if known['scale'] != scale:
    raise UserError(
      f'--scale must be {known["scale"]}, that of the series {series} of {name}, got '
      f'{scale}.'
    )
  item.series[series] = known | ({'notes': origin.notes} if origin.notes else {})
  merged = {row.key: row for row in item.rows}
  for row in rows:
    merged[row.key] = merge(merged.get(row.key), row, bool(said))
  item.rows = list(merged.values())
  store.save(item, store_folder)
  return len(rows)


def merge(old: Row | None, new: Row, source_is_given: bool) -> Row:
  """The newer one of two rows of one run, with the older source if nothing was measured
  since.

  Raises:
    UserError: they are two runs, neither of which goes on where the other one was.
  """
  if old is None:
    return new
  new = dataclasses.replace(new, notes=new.notes or old.notes)
  if (old.numbers, old.curves, old.status) == (new.numbers, new.curves, new.status):
    return new if source_is_given else dataclasses.replace(new, source=old.source)
  if old.status != 'unfinished' and not goes_on(old.curves, new.curves):
    raise UserError(
      f'--series must be another name than {old.series}, which has other results of '
      f'{old.line} {old.run}.'
    )
  return new


def goes_on(old: dict[str, list[Any]], new: dict[str, list[Any]]) -> bool:
  """Whether curves begin with what was measured before."""
  return bool(old) and all(
    new.get(name, [])[: len(values)] == values for name, values in old.items()
  )


def reported_scale(folder: Path, name: str) -> str:
  """The scale that the reports of an item say.

  Raises:
    UserError: there is no report, or several scales.
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
  """One row per run in a folder."""
  found = (*folder.rglob('metrics.jsonl'), *folder.rglob('result.json'))
  tuned = (
    files.read_json(folder / 'tuned.json') if (folder / 'tuned.json').exists() else {}
  )
  for run in sorted({file.parent for file in found}):
    parts = run.parent.relative_to(folder).parts
    stage = 'tuning' if parts[:1] == ('tune',) else 'final'
    line = '/'.join(parts[1:] if stage == 'tuning' else parts) or line_of(run.name)
    yield training_row(run, series, stage, line, stage == 'final' and line in tuned)


def training_row(run: Path, series: str, stage: str, line: str, tuned: bool) -> Row:
  """The row of one run.

  Args:
    run: the run's folder.
    series: the runs that it belongs to.
    stage: 'final' or 'tuning'.
    line: the configuration's name.
    tuned: whether its rate was chosen among several.

  Returns:
    The row; 'unfinished' while the run has no result.

  Raises:
    UserError: there is no configuration beside the run, or a file is damaged.
  """
  if not (run.parent / 'config.json').exists():
    raise UserError(
      f'{run.parent / "config.json"} is missing: {run.name} cannot be told from others.'
    )
  path = run.parent / 'summary.json'
  summary = files.read_json(path) if path.exists() else {'runs': []}
  result = read_result(run, summary['runs'])
  settings = settings_of(run, result)
  given = (*NO_NUMBERS, *own_names(files.read_json(run.parent / 'config.json'), result))
  numbers = {name: value for name, value in result.items() if name not in given}
  status = 'unfinished' if not result else 'diverged' if 'lost' in result else 'done'
  return Row(
    series=series,
    stage=stage,
    line=line,
    run=run.name,
    seed=seed_of(run.name),
    tuned=tuned,
    status=status,
    settings=settings,
    source={name: value for name, value in summary.items() if name not in NO_SOURCE},
    numbers=numbers,
    curves=columns(files.read_jsonl(run / 'metrics.jsonl')),
  )


def read_result(run: Path, summaries: list[dict[str, Any]]) -> dict[str, Any]:
  """What a run came to: its own file, else what the summary says; empty before its
  end.
  """
  if (run / 'result.json').exists():
    return files.read_json(run / 'result.json')
  named = (
    summary
    for summary in summaries
    if summary.get('run', f'{summary["method"]}-seed{summary["seed"]}') == run.name
  )
  return next(named, {})


def settings_of(run: Path, result: dict[str, Any]) -> dict[str, Any]:
  """The run's own settings, out of those of the command that ran it beside others."""
  config = files.read_json(run.parent / 'config.json')
  method = run.name.partition('-seed')[0]
  settings = {'script': config['script'], 'method': method}
  settings |= {name: value for name, value in config.items() if name not in NO_SETTINGS}
  if not settings.get('overrides', True):
    del settings['overrides']
  for name in own_names(config, result):
    settings[name] = result[name] if name in result else grid_value(run.name, name)
  described = run.parent / 'data.json'
  if (
    described.exists()
    and (order := files.read_json(described).get('order')) is not None
  ):
    settings['permutation'] = order
  return settings


def own_names(config: dict[str, Any], result: dict[str, Any]) -> list[str]:
  """The settings of a run that its command does not say: out of a grid, or of its
  method.
  """
  tuned = ('lr', 'momentum') if 'tuned_rates' in config else ()
  unsaid = [name for name in tuned if config.get(name) is None and name in result]
  return list(dict.fromkeys([*grid_names(config), *unsaid]))


def grid_names(config: dict[str, Any]) -> list[str]:
  """The settings that differ from run to run."""
  return [axis.partition('=')[0] for axis in config.get('grid', ())]


def grid_value(run: str, name: str) -> float:
  """A setting out of a run's name, such as 0.25 for lr of 'fptt-seed0-lr0.25'."""
  found = re.search(rf'-{re.escape(name)}(-?[\d.]+(?:e[-+]?\d+)?)', run)
  if found is None:
    raise UserError(f'the run {run} does not name its {name}, which is one of several.')
  return float(found[1])


def seed_of(run: str) -> int:
  """The seed in a run's name."""
  found = re.search(r'-seed(\d+)', run)
  if found is None:
    raise UserError(f'the run {run} does not name its seed.')
  return int(found[1])


def line_of(run: str) -> str:
  """The name of a run's configuration: its own without the seed."""
  return re.sub(r'-seed\d+', '', run)


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
  """Lines of metrics as one list per metric; None where a line lacks one."""
  names = dict.fromkeys(name for row in rows for name in row)
  return {name: [row.get(name) for row in rows] for name in names}


def report_rows(folder: Path, name: str, series: str) -> Iterator[Row]:
  """One row per line of the reports of a study or benchmark."""
  for kind in BENCHMARK if name == 'benchmark' else (name,):
    path = folder / f'{kind}.json'
    if not path.exists():
      continue
    report = files.read_json(path)
    source = {key: value for key, value in report.items() if key not in NO_SOURCE}
    for line, curves in report_lines(report, folder):
      columns_of_line = REPORTS.get(
        kind, tuple(key for key in line if isinstance(line[key], str))
      )
      settings = {key: line[key] for key in columns_of_line if key in line}
      numbers = {key: value for key, value in line.items() if key not in settings}
      label = ', '.join(f'{key} {value}' for key, value in settings.items())
      yield Row(
        series, kind, label, '', None, None, 'done', settings, source, numbers, curves
      )


def report_lines(
  report: dict[str, Any], folder: Path
) -> Iterator[tuple[dict[str, Any], dict[str, list[Any]]]]:
  """The lines of a report, each with its curves, which are in files of their own."""
  for line in report.get('lines', ()):
    path = folder / f'{line.get("run")}-{report.get("scale")}.json'
    yield line, columns(files.read_rows(path)) if path.exists() else {}
  for varied, lines in report.get('growth', {}).items():
    for line in lines:
      yield {'varied': varied, **line}, {}
  fitted: dict[str, Any] = {
    name: report[name] for name in ('exponents', 'C') if name in report
  }
  if fitted:
    yield {'varied': 'fit', **fitted}, {}


def known_items() -> tuple[str, ...]:
  """The items that can be collected."""
  return (*items.ITEMS, *studies.STUDIES, 'add_task', 'benchmark')
