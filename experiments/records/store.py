"""Files of the results: ITEM.json and ITEM.curves.jsonl.gz.

An item is a figure, a table or a study. ITEM.json has these parts:

series    by name: scale and notes of runs that are compared with each other
sources   by hash: command, commit, hardware and versions of measurements
bases     by hash: the most common value of each setting, for each list of names
settings  by hash: all settings of a run except its seed, as the hash of a base and what
          differs from it
rows      one per run or measured case, sorted; `settings` and `source` are hashes

ITEM.curves.jsonl.gz has one line per row that has curves, with its key and its columns.
The bytes depend on the content alone, so saving the same rows changes nothing.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import gzip
import hashlib
import json
from pathlib import Path
import re
from typing import Any

from experiments.core import files
from experiments.core.flags import UserError

FOLDER = Path(__file__).parents[1] / 'results'
"""Folder of the committed results."""


STATUSES = ('done', 'diverged', 'unfinished')
"""Values of a row's status."""


NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*')
"""Accepted names of items, series and scales, which become parts of file names."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One training run, or one case of a study.

  Attributes:
    series: name of the series of runs that it is compared with.
    stage: 'final', 'tuning', or the name of the study's report.
    line: name of the configuration in the table.
    run: name of the run within its line; empty in a study.
    seed: the run's seed; None in a study.
    tuned: whether the learning rate was chosen among several by validation scores, or
      by scores on draws of another seed; None in a study.
    status: one of `STATUSES`.
    settings: all settings of the run except its seed.
    source: command, commit, hardware and versions.
    numbers: measurements at the end.
    curves: by metric, one number per interval of training.
    notes: remarks on this row alone.
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

  def score(self, name: str) -> float | None:
    """Return a number at the end, None if it is missing or the run diverged.

    A run that diverged may have a score of the weights before.
    """
    return None if self.status == 'diverged' else self.numbers.get(name)

  @property
  def key(self) -> tuple[str, str, str, str]:
    """Identity of the row within its item."""
    return (self.series, self.stage, self.line, self.run)


@dataclasses.dataclass
class Item:
  """All results of a figure, a table or a study.

  Attributes:
    name: name of its files.
    series: scale and notes of each series by name.
    rows: the rows, in the order of :func:`sort_key`.
  """

  name: str
  series: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
  rows: list[Row] = dataclasses.field(default_factory=list)


def digest(content: Any) -> str:
  """Return the first 12 hexadecimal digits of the SHA-256 of some JSON content."""
  # Sorted, so that the order in which settings were written does not matter.
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def natural(text: str) -> list[tuple[int, float, str]]:
  """Return a sort key that puts 'K3' before 'K10'."""
  # With a group in the pattern, `split` also returns the numbers, at odd places.
  parts = re.split(r'(\d+(?:\.\d+)?)', text)
  return [
    (0, float(part), '') if number % 2 else (1, 0.0, part)
    for number, part in enumerate(parts)
  ]


def sort_key(row: Row) -> list[list[tuple[int, float, str]]]:
  """Return the sort key of rows in the file and in tables."""
  return [natural(part) for part in row.key]


def item_names(folder: Path = FOLDER) -> list[str]:
  """Return the names of the items that have results, in natural order."""
  return sorted((path.stem for path in folder.glob('*.json')), key=natural)


def load(name: str, folder: Path = FOLDER) -> Item:
  """Read an item.

  Args:
    name: name of the item.
    folder: folder of its files.

  Returns:
    The item; it has no rows if it has no file.

  Raises:
    UserError: a file is damaged.
  """
  path = folder / f'{name}.json'
  if not path.exists():
    return Item(name)
  content = files.read_json(path, ('series', 'sources', 'bases', 'settings', 'rows'))
  curves = _read_curves(curves_path(name, folder))
  settings = {
    key: content['bases'][base] | differences
    for key, (base, differences) in content['settings'].items()
  }
  rows = []
  for described in content['rows']:
    fields = dict(described)
    fields['settings'] = settings[fields['settings']]
    fields['source'] = content['sources'][fields['source']]
    key = tuple(fields[part] for part in ('series', 'stage', 'line', 'run'))
    rows.append(Row(**fields, curves=curves.get(key, {})))
  return Item(name, content['series'], rows)


def save(item: Item, folder: Path = FOLDER) -> None:
  """Write the files of an item that have changed.

  Args:
    item: the item, with its rows in any order.
    folder: folder of its files.

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
  # Versions of zlib pack the same content into different bytes, so the content decides
  # whether to write. Without a time of modification the bytes depend on it alone.
  if lines and (not packed_path.exists() or _unpacked(packed_path) != content):
    packed_path.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))


def curves_path(name: str, folder: Path = FOLDER) -> Path:
  """Return the path of the file with the curves of an item."""
  return folder / f'{name}.curves.jsonl.gz'


def _read_curves(path: Path) -> dict[tuple[str, ...], dict[str, list[Any]]]:
  """Read the curves of an item by the key of their row."""
  if not path.exists():
    return {}
  described = (json.loads(line) for line in _unpacked(path).splitlines())
  return {tuple(entry['key']): entry['curves'] for entry in described}


def _unpacked(path: Path) -> bytes:
  """Return the content of a compressed file.

  Raises:
    UserError: the file is damaged.
  """
  try:
    return gzip.decompress(path.read_bytes())
  except (OSError, EOFError) as error:
    raise UserError(f'{path} is damaged: {error}.') from error


def _as_json(item: Item, rows: Iterable[Row]) -> str:
  """Return the text of an item's JSON file.

  Each entry has one line, so a difference between versions shows the added entries,
  and besides the settings of a script whose most common value has changed.

  Args:
    item: the item.
    rows: its rows, sorted.
  """
  settings: dict[str, Any] = {}
  sources: dict[str, Any] = {}
  described = []
  for row in rows:
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    del fields['curves']
    if not row.notes:
      del fields['notes']
    # Many rows share their settings and sources, which are long.
    fields['settings'] = digest(row.settings)
    fields['source'] = digest(row.source)
    settings[fields['settings']] = row.settings
    sources[fields['source']] = row.source
    described.append(json.dumps(fields, ensure_ascii=False))
  bases, differences = _as_differences(settings)
  parts = [
    f'"item": {json.dumps(item.name)}',
    f'"series": {_entries(item.series)}',
    f'"sources": {_entries(sources)}',
    f'"bases": {_entries(bases)}',
    f'"settings": {_entries(differences)}',
    '"rows": [\n' + ',\n'.join(described) + '\n]',
  ]
  return '{\n' + ',\n'.join(parts) + '\n}\n'


def _as_differences(
  settings: Mapping[str, dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Describe settings by what differs from the most common values.

  An item has hundreds of settings that differ in a few values. There is a base for each
  list of names, which is that of a script; tables show settings in its order.

  Args:
    settings: settings of runs by hash.

  Returns:
    The bases by hash; and (hash of the base, differences) by the hash of a run's
    settings.
  """
  groups: dict[tuple[str, ...], list[str]] = {}
  for member, values in settings.items():
    groups.setdefault(tuple(values), []).append(member)
  bases: dict[str, Any] = {}
  described: dict[str, Any] = {}
  for names, members in groups.items():
    base = {
      name: _most_common(settings[member][name] for member in members) for name in names
    }
    # The digest ignores the order of a dict's names, which counts here.
    key = digest(list(base.items()))
    bases[key] = base
    for member in members:
      differences = {
        name: value
        for name, value in settings[member].items()
        if json.dumps(value) != json.dumps(base[name])
      }
      described[member] = [key, differences]
  return bases, described


def _most_common(values: Iterable[Any]) -> Any:
  """Return the most frequent value; of equally frequent ones, the first as JSON."""
  counts = collections.Counter(json.dumps(value) for value in values)
  return json.loads(min(counts, key=lambda text: (-counts[text], text)))


def _entries(part: Mapping[str, Any]) -> str:
  """Return a part of an item's JSON file, one line per entry in natural order."""
  lines = [
    f'{json.dumps(name)}: {json.dumps(part[name], ensure_ascii=False)}'
    for name in sorted(part, key=natural)
  ]
  return '{\n' + ',\n'.join(lines) + '\n}'


def by_series(item: Item) -> Iterator[tuple[str, list[Row]]]:
  """Yield the series of an item with their rows, in natural order."""
  for name in sorted(item.series, key=natural):
    yield name, [row for row in item.rows if row.series == name]
