"""Tables in Markdown, made of the results and kept between markers in pages.

<!-- table: ITEM -->        all series of an item
<!-- table: ITEM/SERIES --> one of them
<!-- table: provenance -->  where all numbers come from
<!-- end table -->
"""

from collections.abc import Sequence
import math
from pathlib import Path
import re
from typing import Any

import numpy as np

from experiments.core import files
from experiments.core.flags import UserError
from experiments.paper import items
from experiments.paper.items import Score
from experiments.paper.tables import interval
from experiments.results import store
from experiments.results.store import Item, Row

SCORES = [value for value in vars(items).values() if isinstance(value, Score)]
"""What runs are measured by."""
BLOCK = re.compile(r'<!-- table: ([^\n]+?) -->\n.*?<!-- end table -->', re.DOTALL)
LONG = ('all_ms', 'check_ms')
"""Every single time of a benchmark, which no table shows."""


def update_pages(pages: Sequence[Path], folder: Path = store.FOLDER) -> list[Path]:
  """Makes the tables of some pages anew.

  Args:
    pages: Markdown files.
    folder: where the results are.

  Returns:
    The pages that changed.

  Raises:
    UserError: a marker names no results.
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
  """A page's text with all its tables made anew."""

  def made(block: re.Match[str]) -> str:
    table = table_of(block[1], folder)
    return f'<!-- table: {block[1]} -->\n\n{table}\n\n<!-- end table -->'

  return BLOCK.sub(made, text)


def table_of(name: str, folder: Path = store.FOLDER) -> str:
  """What stands between the markers of that name.

  Raises:
    UserError: there are no such results.
  """
  if name == 'provenance':
    return provenance(folder)
  item_name, _, wanted = name.partition('/')
  item = store.load(item_name, folder)
  found = [
    (series, rows) for series, rows in store.by_series(item) if wanted in ('', series)
  ]
  if not found:
    known = ', '.join(store.item_names(folder))
    raise UserError(f'a table must be of {known} or provenance, got {name}.')
  return '\n\n'.join(series_table(item, series, rows) for series, rows in found)


def series_table(item: Item, series: str, rows: Sequence[Row]) -> str:
  """The tables of one series under its name."""
  about = item.series[series]
  parts = [f'**{item.name}, {series}** (scale {about["scale"]})']
  for stage in dict.fromkeys(row.stage for row in rows):
    chosen = [row for row in rows if row.stage == stage]
    if stage == 'final':
      parts += final_tables(item.name, about['scale'], chosen)
    elif stage == 'tuning':
      parts += tuning_tables(chosen)
    else:
      parts += report_tables(chosen)
  if about['notes']:
    parts.append(about['notes'])
  return '\n\n'.join(parts)


def score_of(row: Row) -> Score | None:
  """What a run is measured by; None while it has neither result nor metrics."""
  known = {**row.numbers, **row.curves}
  return next(
    (score for score in SCORES if score.test in known or score.choose in known), None
  )


def by_score(rows: Sequence[Row]) -> dict[Score, list[Row]]:
  """Rows by what they are measured by."""
  found: dict[Score, list[Row]] = {}
  for row in rows:
    score = score_of(row)
    if score is not None:
      found.setdefault(score, []).append(row)
  return found


def final_tables(name: str, scale: str, rows: Sequence[Row]) -> list[str]:
  """A table of each score: one line per configuration, over its seeds."""
  entries = {}
  if name in items.ITEMS and scale in items.SCALES:
    entries = {entry.label: entry for entry in items.ITEMS[name](scale)}
  tables = []
  for score, of_score in by_score(rows).items():
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in of_score:
      lines.setdefault((row.line, store.digest(row.settings)), []).append(row)
    described = [
      final_line(score, found, entries.get(key[0])) for key, found in lines.items()
    ]
    tables.append(markdown(described))
  return [*tables, *unscored_tables(rows)]


def unscored_tables(rows: Sequence[Row]) -> list[str]:
  """What is known of the runs that no score measures, a line per run."""
  table = [
    {'run': row.run, 'line': row.line, 'status': row.status}
    | {name: shown(value) for name, value in row.numbers.items()}
    for row in rows
    if score_of(row) is None
  ]
  return [markdown(table)] if table else []


def final_line(
  score: Score, rows: Sequence[Row], entry: items.Entry | None
) -> dict[str, str]:
  """One line of a table of results.

  Args:
    score: what the runs are measured by.
    rows: the runs of one configuration, one per seed.
    entry: what the paper has for it; None where it has nothing.

  Returns:
    The cells by column; empty where there is nothing to say.
  """
  first = rows[0]
  measures = {score.choose: 'validation', score.test: 'test'}
  measures |= {
    f'dynamic_{score.test}': 'test, dynamic evaluation',
    'best_mse': 'lowest',
  }
  cells = {
    'line': first.line,
    'method': first.settings['method'],
    'K': shown(first.numbers.get('K')),
    'rate': shown(first.settings.get('lr')),
    'tuned': 'yes' if first.tuned else 'no',
    'seeds': ', '.join(str(row.seed) for row in rows),
  }
  for measure, label in measures.items():
    values = [
      row.numbers[measure] for row in rows if row.numbers.get(measure) is not None
    ]
    label = 'test' if measure == score.test else label
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
  """What became of runs that did not end as meant, and what is noted of single ones."""
  found = []
  for status in ('diverged', 'unfinished'):
    count = sum(row.status == status for row in rows)
    if count:
      found.append(status if len(rows) == 1 else f'{count} of {len(rows)} {status}')
  for row in rows:
    if row.status == 'unfinished' and row.curves:
      found.append(f'seed {row.seed} after {row.curves["step"][-1]}')
  return '; '.join(dict.fromkeys([*found, *(row.notes for row in rows if row.notes)]))


def mean_and_interval(values: Sequence[float], digits: int) -> str:
  """'mean ± half the width of its 95 % confidence interval', as text."""
  if not values:
    return ''
  half = interval(list(values))
  mean = f'{np.mean(values):.{digits}f}'
  return mean if half is None else f'{mean} ± {half:.{digits}f}'


def tuning_tables(rows: Sequence[Row]) -> list[str]:
  """A table of each score: lines by what was tried, the best one bold."""
  tables = []
  for score, of_score in by_score(rows).items():
    best = max if score.higher_is_better else min
    lines: dict[str, dict[str, Any]] = {}
    for row in of_score:
      value = row.numbers.get(score.choose)
      lines.setdefault(row.line, {})[tried(row)] = value
    columns = sorted(
      {column for values in lines.values() for column in values}, key=store.natural
    )
    table = []
    for line, values in lines.items():
      finite = [value for value in values.values() if value is not None]
      cells = {'line': line}
      for column in columns:
        cells[column] = tuning_cell(
          values, column, score.digits, best(finite, default=None)
        )
      table.append(cells)
    tables.append(
      f'Scores that rates were chosen by, {score.label}:\n\n{markdown(table)}'
    )
  return tables


def tried(row: Row) -> str:
  """The settings of a grid in a run's name, such as 'lr0.25'."""
  return re.sub(r'^.*-seed\d+-?', '', row.run)


def tuning_cell(
  values: dict[str, Any], column: str, digits: int, best: float | None
) -> str:
  """A score as text: bold if it is the best, empty if it was not tried."""
  if column not in values:
    return ''
  value = values[column]
  if value is None:
    return 'diverged'
  text = f'{value:.{digits}f}'
  return f'**{text}**' if value == best else text


def report_tables(rows: Sequence[Row]) -> list[str]:
  """The lines of a study's or benchmark's report, a table per set of columns."""
  found: dict[tuple[str, ...], list[dict[str, str]]] = {}
  for row in rows:
    cells = {name: shown(value) for name, value in row.settings.items()}
    for name, value in row.numbers.items():
      if name not in LONG:
        cells |= flat(name, value)
    found.setdefault(tuple(cells), []).append(cells)
  return [markdown(table) for table in found.values()]


def flat(name: str, value: Any) -> dict[str, str]:
  """A number by its name; numbers within numbers by joined names."""
  if not isinstance(value, dict):
    return {name: shown(value)}
  cells: dict[str, str] = {}
  for inner, number in value.items():
    cells |= flat(f'{name} {inner}', number)
  return cells


def provenance(folder: Path = store.FOLDER) -> str:
  """One line per series and source: command, commit, machine and notes."""
  table = []
  for name in store.item_names(folder):
    item = store.load(name, folder)
    for series, rows in store.by_series(item):
      sources: dict[str, list[Row]] = {}
      for row in rows:
        sources.setdefault(store.digest(source_cells(row.source)), []).append(row)
      for of_source in sources.values():
        cells = {'item': name, 'series': series, 'runs': str(len(of_source))}
        table.append(cells | source_cells(of_source[0].source))
  return markdown(table)


def source_cells(source: dict[str, Any]) -> dict[str, str]:
  """What a table shows of a source."""
  hardware, versions = source.get('hardware', {}), source.get('versions', {})
  cores = f'{hardware["cpu_cores"]} cores' if 'cpu_cores' in hardware else ''
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
  """A setting or number as text; empty for none."""
  if value is None:
    return ''
  if isinstance(value, float) and math.isfinite(value):
    return f'{value:.4g}'
  return str(value)


def markdown(table: Sequence[dict[str, str]]) -> str:
  """Lines as a Markdown table, without the columns that are empty in all of them."""
  names = dict.fromkeys(name for cells in table for name in cells)
  used = [name for name in names if any(cells.get(name) for cells in table)]
  lines = [
    [cells.get(name, '').replace('|', r'\|') for name in used] for cells in table
  ]
  # Cells are not padded to one width, so that a new line changes no other line.
  return '\n'.join(
    f'| {" | ".join(cells)} |' for cells in [used, ['---'] * len(used), *lines]
  )
