"""The files that hold the results: ITEM.json and ITEM.curves.jsonl.gz.

An item is a figure, a table or a study. ITEM.json has these parts:

series    by name: what was run and compared together, with its scale and notes
sources   by hash: command, commit, hardware and versions of measurements
settings  by hash: everything that makes a run what it is, but for its seed
rows      one per run or measured case, sorted; `settings` and `source` are hashes

ITEM.curves.jsonl.gz has one line per row that has curves: its key and its columns.
The bytes depend on the content alone, so that saving the same rows changes nothing.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import gzip
import hashlib
import json
from pathlib import Path
import re
from typing import Any

from experiments.core import files
from experiments.core.flags import UserError

FOLDER = Path(__file__).parent
"""Where the committed results are."""
STATUSES = ('done', 'diverged', 'unfinished')
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*')
"""What items, series and scales may be called: names that suit files and commands."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One training run, or one case of a study.

  Attributes:
    series: the name of the runs that it is compared with.
    stage: 'final', 'tuning', or the name of the study's report.
    line: the name of the configuration, as the table shows it.
    run: the name of the run within its line; empty in a study.
    seed: the run's seed; None in a study.
    tuned: whether the rate was chosen among several by validation scores; None in a
      study.
    status: one of `STATUSES`.
    settings: what makes the run what it is, but for its seed.
    source: command, commit, hardware and versions.
    numbers: what was measured at the end.
    curves: by metric, one number per interval of training.
    notes: what a reader of this row alone has to know.
  """

  series: str
  stage: str
  line: str
  run: str
  seed: int | None
  tuned: bool | None
  status: str
  settings: dict[str, Any]
  source: dict[str, Any]
  numbers: dict[str, Any]
  curves: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
  notes: str = ''

  @property
  def key(self) -> tuple[str, str, str, str]:
    """What tells the row from all others of its item."""
    return (self.series, self.stage, self.line, self.run)


@dataclasses.dataclass
class Item:
  """All that was measured for a figure, a table or a study.

  Attributes:
    name: the name of its files.
    series: by name, the scale and the notes of each series.
    rows: in the order of :func:`sort_key`.
  """

  name: str
  series: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
  rows: list[Row] = dataclasses.field(default_factory=list)


def digest(content: Any) -> str:
  """The first 12 hexadecimal digits of the SHA-256 of some JSON content."""
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def natural(text: str) -> list[tuple[int, float, str]]:
  """A sort key that puts 'K3' before 'K10'."""
  parts = re.split(r'(\d+(?:\.\d+)?)', text)
  return [
    (0, float(part), '') if number % 2 else (1, 0.0, part)
    for number, part in enumerate(parts)
  ]


def sort_key(row: Row) -> list[list[tuple[int, float, str]]]:
  """The order of rows in the file and in tables."""
  return [natural(part) for part in row.key]


def item_names(folder: Path = FOLDER) -> list[str]:
  """The items that have results, in natural order."""
  return sorted((path.stem for path in folder.glob('*.json')), key=natural)


def load(name: str, folder: Path = FOLDER) -> Item:
  """Reads an item.

  Args:
    name: the item.
    folder: where its files are.

  Returns:
    The item; without rows where it has no file.

  Raises:
    UserError: a file is damaged.
  """
  path = folder / f'{name}.json'
  if not path.exists():
    return Item(name)
  content = files.read_json(path)
  curves = _read_curves(curves_path(name, folder))
  rows = []
  for described in content['rows']:
    fields = dict(described)
    fields['settings'] = content['settings'][fields['settings']]
    fields['source'] = content['sources'][fields['source']]
    key = tuple(fields[part] for part in ('series', 'stage', 'line', 'run'))
    rows.append(Row(**fields, curves=curves.get(key, {})))
  return Item(name, content['series'], rows)


def save(item: Item, folder: Path = FOLDER) -> None:
  """Writes an item's files, those that change.

  Args:
    item: the item; its rows in any order.
    folder: where its files go.

  Raises:
    UserError: a file cannot be written.
  """
  rows = sorted(item.rows, key=sort_key)
  text = _as_json(item, rows)
  path = folder / f'{item.name}.json'
  if not path.exists() or path.read_text() != text:
    files.write_text(path, text)
  lines = [
    json.dumps({'key': row.key, 'curves': row.curves}) + '\n'
    for row in rows
    if row.curves
  ]
  packed_path = curves_path(item.name, folder)
  content = ''.join(lines).encode()
  # Other versions of zlib pack the same content into other bytes: only new content is
  # written.
  if lines and (not packed_path.exists() or _unpacked(packed_path) != content):
    packed_path.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))


def curves_path(name: str, folder: Path = FOLDER) -> Path:
  """Where the curves of an item are."""
  return folder / f'{name}.curves.jsonl.gz'


def _read_curves(path: Path) -> dict[tuple[str, ...], dict[str, list[Any]]]:
  if not path.exists():
    return {}
  described = (json.loads(line) for line in _unpacked(path).splitlines())
  return {tuple(entry['key']): entry['curves'] for entry in described}


def _unpacked(path: Path) -> bytes:
  try:
    return gzip.decompress(path.read_bytes())
  except (OSError, EOFError) as error:
    raise UserError(f'{path} is damaged: {error}.') from error


def _as_json(item: Item, rows: Iterable[Row]) -> str:
  """The JSON file, one line per entry, so that a difference shows what was added."""
  settings: dict[str, Any] = {}
  sources: dict[str, Any] = {}
  described = []
  for row in rows:
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    del fields['curves']
    if not row.notes:
      del fields['notes']
    fields['settings'], fields['source'] = digest(row.settings), digest(row.source)
    settings[fields['settings']] = row.settings
    sources[fields['source']] = row.source
    described.append(json.dumps(fields, ensure_ascii=False))
  parts = [
    f'"item": {json.dumps(item.name)}',
    *(
      f'"{name}": {{\n{_entries(part)}\n}}'
      for name, part in (
        ('series', item.series),
        ('sources', sources),
        ('settings', settings),
      )
    ),
    '"rows": [\n' + ',\n'.join(described) + '\n]',
  ]
  return '{\n' + ',\n'.join(parts) + '\n}\n'


def _entries(part: dict[str, Any]) -> str:
  names = sorted(part, key=natural)
  return ',\n'.join(
    f'{json.dumps(name)}: {json.dumps(part[name], ensure_ascii=False)}'
    for name in names
  )


def by_series(item: Item) -> Iterator[tuple[str, list[Row]]]:
  """The series of an item with their rows, in natural order."""
  for name in sorted(item.series, key=natural):
    yield name, [row for row in item.rows if row.series == name]
