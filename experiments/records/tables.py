"""Tables in Markdown, made from the results and kept between markers in pages.

<!-- table: ITEM -->            all series of an item
<!-- table: ITEM/SERIES -->     one of them
<!-- table: overview/SERIES --> methods and tasks of one series of the tournament
<!-- table: provenance -->      sources of all numbers
<!-- end table -->
"""

from collections.abc import Mapping, Sequence
import math
from pathlib import Path
import re
from typing import Any

import numpy as np

from experiments.core import files
from experiments.core.comparison import Comparison, interval
from experiments.core.flags import UserError
from experiments.paper import items
from experiments.paper.items import Score
from experiments.records import contest, store
from experiments.records.store import Item, Row

SCORES = [value for value in vars(items).values() if isinstance(value, Score)] + [
  *items.CREDIT.values()
]
"""Scores of all scripts, in the order in which a row is searched for them."""


Trials = Mapping[str, Mapping[float, float | None]]
"""Scores of tuning runs by line and learning rate; None for runs that diverged."""


BLOCK = re.compile(r'<!-- table: ([^\n]+?) -->\n.*?<!-- end table -->', re.DOTALL)
"""A marker with the name of a table, all that follows, and the end marker."""


LONG = ('all_ms', 'check_ms')
"""Lists of single times of a benchmark, which no table shows."""


MANY_TASKS = 5
"""Least number of tasks of a method in the overview of the tournament."""


def update_pages(pages: Sequence[Path], folder: Path = store.FOLDER) -> list[Path]:
  """Rewrite the tables of some pages.

  Args:
    pages: Markdown files.
    folder: folder of the results.

  Returns:
    The pages that changed.

  Raises:
    UserError: a marker does not name results.
  """
  changed = []
  for page in pages:
    text = page.read_text()
    updated = updated_text(text, folder)
    if updated != text:
      files.write_text(page, updated)
      changed.append(page)
  return changed


def updated_text(text: str, folder: Path = store.FOLDER) -> str:
  """Return the text of a page with new tables.

  Args:
    text: the text of the page.
    folder: folder of the results.

  Raises:
    UserError: a marker does not name results.
  """

  # A function, since a text would have its backslashes interpreted.
  def made(block: re.Match[str]) -> str:
    table = table_of(block[1], folder)
    return f'<!-- table: {block[1]} -->\n\n{table}\n\n<!-- end table -->'

  return BLOCK.sub(made, text)


def table_of(name: str, folder: Path = store.FOLDER) -> str:
  """Return the tables that a marker names.

  Args:
    name: 'ITEM', 'ITEM/SERIES', 'provenance' or 'overview/SERIES'.
    folder: folder of the results.

  Raises:
    UserError: there are no such results.
  """
  if name == 'provenance':
    return provenance(folder)
  item_name, _, wanted = name.partition('/')
  if item_name == 'overview':
    return overview(wanted, folder)
  item = store.load(item_name, folder)
  found = [
    (series, rows) for series, rows in store.by_series(item) if wanted in ('', series)
  ]
  if not found:
    known = ', '.join(store.item_names(folder))
    known += ', provenance or overview/SERIES'
    raise UserError(f'a table must be of {known}, got {name}.')
  tables = [
    series_table(item, series, rows, folder)
    for series, rows in found
    if not is_untuned(rows)
  ]
  untuned = [f'`{series}`' for series, rows in found if is_untuned(rows)]
  if untuned:
    tables.append(
      'Not shown, since their methods had no learning rates of their own: the series '
      f'{", ".join(untuned)}. The runs are in `experiments/results/{item_name}.json`, '
      'marked `"tuned": false`.'
    )
  return '\n\n'.join(tables)


def is_untuned(rows: Sequence[Row]) -> bool:
  """Return whether a series compares methods of which none had a rate tuned for it.

  Args:
    rows: its rows.
  """
  if any(row.tuned or row.stage != 'final' for row in rows):
    return False
  return any(
    len({row.settings['method'] for row in of_score}) > 1
    for of_score in by_score(rows).values()
  )


def series_table(
  item: Item, series: str, rows: Sequence[Row], folder: Path = store.FOLDER
) -> str:
  """Return the tables of one series under its name.

  Args:
    item: the item.
    series: name of the series.
    rows: its rows.
    folder: folder of the results.
  """
  about = item.series[series]
  parts = [f'**{item.name}, {series}** (scale {about["scale"]})']
  for stage in dict.fromkeys(row.stage for row in rows):
    chosen = [row for row in rows if row.stage == stage]
    if stage == 'final':
      tried = trials_of(item, series)
      parts += final_tables(item.name, about['scale'], chosen, tried, folder)
    elif stage == 'tuning':
      parts += tuning_tables(chosen)
    else:
      parts += report_tables(chosen)
  if about['notes']:
    parts.append(about['notes'])
  return '\n\n'.join(parts)


def score_of(row: Row) -> Score | None:
  """Return the score of a run; None while it has neither result nor metrics."""
  known = {**row.numbers, **row.curves}
  for score in SCORES:
    if score.test in known or score.choose in known:
      return score
  return None


def by_score(rows: Sequence[Row]) -> dict[Score, list[Row]]:
  """Group rows by their score; rows without a score are left out."""
  found: dict[Score, list[Row]] = {}
  for row in rows:
    score = score_of(row)
    if score is not None:
      found.setdefault(score, []).append(row)
  return found


def trials_of(item: Item, series: str) -> Trials:
  """Return the learning rates of the tuning runs that have ended and their scores.

  They are those of the series; of lines that it did not tune itself, those of the
  item's other series of the same scale.

  Args:
    item: the item.
    series: name of the series.
  """
  own: dict[str, dict[float, float | None]] = {}
  others: dict[str, dict[float, float | None]] = {}
  for row in item.rows:
    if row.stage != 'tuning' or row.status == 'unfinished':
      continue
    score = score_of(row)
    value = score and row.score(score.choose)
    if row.series == series:
      own.setdefault(row.line, {})[row.settings['lr']] = value
    elif item.series[row.series]['scale'] == item.series[series]['scale']:
      others.setdefault(row.line, {})[row.settings['lr']] = value
  return others | own


def describe_tuning(row: Row, score: Score, tried: Trials) -> str:
  """Return whether a run's rate was tuned, and whether it is at an end of its grid.

  Args:
    row: a final run.
    score: its score.
    tried: the learning rates tried and their scores, by line.
  """
  if not row.tuned:
    return 'no'
  # A line that was tuned with several numbers of windows has a grid for each.
  own_windows = f'{row.line}-K{row.settings.get("num_windows")}'
  trials = tried.get(own_windows) or tried.get(row.line, {})
  return items.describe_choice(score, trials, row.settings['lr'])


def final_tables(
  name: str,
  scale: str,
  rows: Sequence[Row],
  tried: Trials,
  folder: Path = store.FOLDER,
) -> list[str]:
  """Return a table per score, with a line per configuration over its seeds.

  Args:
    name: name of the item.
    scale: scale of the series.
    rows: rows of the final runs.
    tried: the learning rates tried and their scores, by line.
    folder: folder of the results.
  """
  if name == 'tournament':
    return contest_tables(rows, tried, costs_of(scale, folder))
  entries = {}
  # Series of other scales, and items that the paper does not have, have no numbers to
  # compare with.
  if name in items.ITEMS and scale in items.SCALES:
    entries = {entry.label: entry for entry in items.ITEMS[name](scale)}
  tables = []
  for score, of_score in by_score(rows).items():
    lines: dict[tuple[str, str], list[Row]] = {}
    # A line that was run with several settings has a row in the table for each.
    for row in of_score:
      lines.setdefault((row.line, store.digest(row.settings)), []).append(row)
    described = [
      final_line(score, found, entries.get(line), tried)
      for (line, _), found in lines.items()
    ]
    tables.append(markdown(described))
  return [*tables, *unscored_tables(rows)]


def overview(series: str, folder: Path = store.FOLDER) -> str:
  """Return a table of the tournament's methods by task, compared with `tbptt`.

  A cell is the ratio of the losses, bold if the method is significantly better and
  italic if it is significantly worse. It is a dash if a run of either method diverged.
  Methods of a few tasks only are left out, and so are tasks of which a method is
  missing.

  Args:
    series: series of the tournament, such as 'cpu'.
    folder: folder of the results.

  Raises:
    UserError: the tournament has no such series.
  """
  lines: dict[str, dict[str, str]] = {}
  known = dict(store.by_series(store.load('tournament', folder)))
  if series not in known:
    accepted = ', '.join(known)
    raise UserError(f'an overview must be of one of {accepted}, got {series!r}.')
  rows = known[series]
  for task, found in standings(rows).items():
    # Holm's correction changes with the number of methods.
    if not contest.is_complete(task, ['tbptt', *found]):
      continue
    for name, standing in found.items():
      marks = {'better': '**', 'worse': '*', '': ''}[standing.outcome]
      text = '–' if standing.ratio is None else f'{standing.ratio:.2f}'
      line = lines.setdefault(name, {'method': f'`{name}`'})
      line[f'`{task}`'] = f'{marks}{text}{marks}'
  return markdown([line for line in lines.values() if len(line) - 1 >= MANY_TASKS])


def standings(rows: Sequence[Row]) -> dict[str, dict[str, contest.Standing]]:
  """Return by task how each method of the tournament stands to `tbptt`.

  Args:
    rows: rows of the tournament at one scale.
  """
  found = {}
  finals = [row for row in rows if row.stage == 'final']
  for task, methods in contest.by_task(finals).items():
    score = score_of(next(iter(methods.values()))[0])
    compared = {} if score is None else contest.standings(methods, score)
    if compared:
      found[task] = compared
  return found


def costs_of(scale: str, folder: Path) -> dict[str, dict[str, float]]:
  """Return the times of a batch that the study `costs` has, by task and method.

  Args:
    scale: scale of the tournament.
    folder: folder of the results.
  """
  found: dict[str, dict[str, float]] = {}
  item = store.load('walltime', folder)
  for row in item.rows:
    if row.stage == 'costs' and item.series[row.series]['scale'] == scale:
      of_task = found.setdefault(row.settings['task'], {})
      of_task[row.settings['method']] = row.numbers['batch_ms']
  return found


def contest_tables(
  rows: Sequence[Row], tried: Trials, costs: Mapping[str, Mapping[str, float]]
) -> list[str]:
  """Return a table per task of the tournament, with each method's comparisons.

  Args:
    rows: rows of the final runs.
    tried: the learning rates tried and their scores, by line.
    costs: time of a batch by task and method.
  """
  tables = []
  for task, methods in contest.by_task(rows).items():
    score = score_of(next(iter(methods.values()))[0])
    if score is None:
      continue
    found = [contest.comparisons(methods, score, rival) for rival in contest.RIVALS]
    equal = contest.at_equal_seconds(methods, score, costs.get(task, {}))
    table = []
    for name, of_method in methods.items():
      cells = contest_line(name, of_method, score, tried)
      for rival, compared in zip(contest.RIVALS, found, strict=True):
        cells |= contest_cells(rival, *compared.get(name, (None, None)))
      early = equal.get(name)
      cells['at equal seconds'] = '' if early is None else f'{early:.{score.digits}f}'
      cells[''] = contest.verdict(name, found)
      table.append(cells | {'remarks': remarks(of_method)})
    tables.append(f'Task `{task}`, {score.label}:\n\n{markdown(table)}')
  return tables


def contest_line(
  name: str, rows: Sequence[Row], score: Score, tried: Trials
) -> dict[str, str]:
  """Return the cells of a method's own results.

  Args:
    name: the method.
    rows: its runs, one per seed.
    score: their score.
    tried: the learning rates tried and their scores, by line.
  """
  values = [row.score(score.test) for row in rows]
  finite = [value for value in values if value is not None]
  return {
    'method': name,
    'rate': shown(rows[0].settings.get('lr')),
    'tuned': describe_tuning(rows[0], score, tried),
    'seeds': str(len(rows)),
    'test': mean_and_interval(finite, score.digits),
  }


def contest_cells(
  rival: str, compared: Comparison | None, p_value: float | None
) -> dict[str, str]:
  """Return the cells of a comparison.

  Args:
    rival: the method that was compared with.
    compared: the comparison, or None.
    p_value: its p-value after Holm's correction, or None.
  """
  if compared is None:
    return {f'better than {rival}': '', f'p, {rival}': ''}
  return {
    f'better than {rival}': f'{compared.wins} of {compared.seeds}',
    f'p, {rival}': '' if p_value is None else f'{p_value:.2g}',
  }


def unscored_tables(rows: Sequence[Row]) -> list[str]:
  """Return a table of the runs without a score, a line per run."""
  table = []
  for row in rows:
    if score_of(row) is None:
      numbers = {name: shown(value) for name, value in row.numbers.items()}
      cells = {'run': row.run, 'line': row.line, 'status': row.status}
      table.append(cells | numbers)
  return [markdown(table)] if table else []


def final_line(
  score: Score,
  rows: Sequence[Row],
  entry: items.Entry | None,
  tried: Trials,
) -> dict[str, str]:
  """Return a line of a table of results.

  Args:
    score: score of the runs.
    rows: runs of one configuration, one per seed.
    entry: the line as `experiments.paper` declares it, with the paper's number; None if
      it is not declared.
    tried: the learning rates tried and their scores, by line.

  Returns:
    The cells by column; an unknown number has an empty cell.
  """
  first = rows[0]
  parts = {'valid': 'validation', 'last': 'last quarter', 'first': 'first 30 %'}
  # The adding problem chooses by its test score, which is one column then.
  chosen_by = parts.get(score.choose.partition('_')[0], 'test')
  measures = {score.choose: chosen_by, score.test: 'test'}
  measures |= {
    f'dynamic_{score.test}': 'test, dynamic evaluation',
    'best_mse': 'lowest',
  }
  cells = {
    'line': first.line,
    'method': first.settings['method'],
    'K': shown(first.numbers.get('K')),
    'rate': shown(first.settings.get('lr')),
    'tuned': describe_tuning(first, score, tried),
    'seeds': ', '.join(str(row.seed) for row in rows),
  }
  for measure, label in measures.items():
    numbers = [row.score(measure) for row in rows]
    values = [number for number in numbers if number is not None]
    cells[label] = mean_and_interval(values, score.digits)
  cells['below 0.01 after'] = ', '.join(
    shown(row.numbers['below_0.01_at']) or 'never'
    for row in rows
    if 'below_0.01_at' in row.numbers
  )
  seconds = [row.numbers['seconds'] for row in rows if 'seconds' in row.numbers]
  cells['seconds per run'] = f'{np.mean(seconds):.0f}' if seconds else ''
  cells['paper'] = shown(entry.paper) if entry else ''
  cells['replication'] = entry.replication if entry else ''
  cells['remarks'] = remarks(rows)
  return cells


def remarks(rows: Sequence[Row]) -> str:
  """Return remarks on the runs that diverged or are unfinished, and the rows' notes."""
  found = []
  for status in ('diverged', 'unfinished'):
    count = sum(row.status == status for row in rows)
    if count:
      found.append(status if len(rows) == 1 else f'{count} of {len(rows)} {status}')
  for row in rows:
    if row.status == 'unfinished' and row.curves:
      found.append(f'seed {row.seed} after {row.curves["step"][-1]}')
  notes = [row.notes for row in rows if row.notes]
  # Without repetitions: a note often concerns all seeds.
  return '; '.join(dict.fromkeys([*found, *notes]))


def mean_and_interval(values: Sequence[float], digits: int) -> str:
  """Return the mean ± half the width of its 95 % confidence interval, as text.

  Args:
    values: numbers, one per seed; none give an empty text.
    digits: number of decimals.
  """
  if not values:
    return ''
  half = interval(values)
  mean = f'{np.mean(values):.{digits}f}'
  return mean if half is None else f'{mean} ± {half:.{digits}f}'


def tuning_tables(rows: Sequence[Row]) -> list[str]:
  """Return a table per score of the settings that were tried, the best in bold."""
  tables = []
  for score, of_score in by_score(rows).items():
    best = max if score.higher_is_better else min
    lines: dict[str, dict[str, Any]] = {}
    for row in of_score:
      value = row.score(score.choose)
      lines.setdefault(row.line, {})[tried(row)] = value
    columns = sorted(
      {column for values in lines.values() for column in values}, key=store.natural
    )
    table = []
    for line, values in lines.items():
      finite = [value for value in values.values() if value is not None]
      top = best(finite, default=None)
      cells = {'line': line}
      for column in columns:
        cells[column] = tuning_cell(values, column, score.digits, top)
      table.append(cells)
    title = f'Scores that rates were chosen by, {score.label}:'
    tables.append(f'{title}\n\n{markdown(table)}')
  return tables


def tried(row: Row) -> str:
  """Return the settings of a grid in a run's name, such as 'lr0.25'."""
  return re.sub(r'^.*-seed\d+-?', '', row.run)


def tuning_cell(
  values: dict[str, Any], column: str, digits: int, best: float | None
) -> str:
  """Return a score as text.

  Args:
    values: scores by the settings that were tried; None for a diverged run.
    column: the settings; the cell is empty if they were not tried.
    digits: number of decimals.
    best: the best score, which is printed in bold.
  """
  if column not in values:
    return ''
  value = values[column]
  if value is None:
    return 'diverged'
  text = f'{value:.{digits}f}'
  return f'**{text}**' if value == best else text


def report_tables(rows: Sequence[Row]) -> list[str]:
  """Return the tables of a report of a study or benchmark.

  Args:
    rows: rows of the report. Those with the same columns share a table.
  """
  found: dict[tuple[str, ...], list[dict[str, str]]] = {}
  for row in rows:
    cells = {name: shown(value) for name, value in row.settings.items()}
    for name, value in row.numbers.items():
      if name not in LONG:
        cells |= flat(name, value)
    found.setdefault(tuple(cells), []).append(cells)
  return [markdown(table) for table in found.values()]


def flat(name: str, value: Any) -> dict[str, str]:
  """Return a number by its name; nested numbers are named by their path."""
  if not isinstance(value, dict):
    return {name: shown(value)}
  cells: dict[str, str] = {}
  for inner, number in value.items():
    cells |= flat(f'{name} {inner}', number)
  return cells


def provenance(folder: Path = store.FOLDER) -> str:
  """Return the table of commands, commits, machines and versions.

  Args:
    folder: folder of the results.

  Returns:
    A table with a line per series and source.
  """
  table = []
  for name in store.item_names(folder):
    item = store.load(name, folder)
    for series, rows in store.by_series(item):
      # Sources that differ in nothing that is shown share a line.
      sources: dict[str, list[Row]] = {}
      for row in rows:
        sources.setdefault(store.digest(source_cells(row.source)), []).append(row)
      for of_source in sources.values():
        cells = {'item': name, 'series': series, 'runs': str(len(of_source))}
        table.append(cells | source_cells(of_source[0].source))
  return markdown(table)


def source_cells(source: dict[str, Any]) -> dict[str, str]:
  """Return the cells of the table of sources for one of them."""
  hardware = source.get('hardware', {})
  versions = source.get('versions', {})
  cores = f'{hardware["cpu_cores"]} cores' if 'cpu_cores' in hardware else ''
  # JAX calls every CPU 'cpu'; its model is a field of its own.
  devices = ', '.join(
    device for device in hardware.get('devices', ()) if device != 'cpu'
  )
  packages = [
    f'{name} {versions[name]}' for name in ('jax', 'torch') if name in versions
  ]
  command = source.get('command')
  return {
    'command': f'`{command}`' if command else '',
    'commit': source.get('commit') or '',
    'machine': ', '.join(filter(None, (devices, hardware.get('cpu') or '', cores))),
    'versions': ', '.join(packages),
  }


def shown(value: Any) -> str:
  """Return a setting or number as text, with four digits; None is empty."""
  if value is None:
    return ''
  if isinstance(value, float) and math.isfinite(value):
    return f'{value:.4g}'
  return str(value)


def markdown(table: Sequence[dict[str, str]]) -> str:
  """Return lines of cells as a Markdown table, without columns that are all empty."""
  names = dict.fromkeys(name for cells in table for name in cells)
  used = [name for name in names if any(cells.get(name) for cells in table)]
  lines = [
    [cells.get(name, '').replace('|', r'\|') for name in used] for cells in table
  ]
  # Cells are not padded to one width, so that a new line changes no other line.
  return '\n'.join(
    f'| {" | ".join(cells)} |' for cells in [used, ['---'] * len(used), *lines]
  )
