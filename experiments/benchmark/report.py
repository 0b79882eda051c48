"""The file of the benchmark's numbers, which several commands may share."""

from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.benchmark.cases import CASES
from experiments.core import files

GROUPS = {
  'rivals': 'case',
  'cells': 'layer',
  'latency': 'window',
  'growth': 'varied',
  'population': 'case',
  'influence': 'layer',
}
"""By part, the column whose rows are compared with each other: those of one value are
always of one command."""


NOT_SHOWN = ('all_ms', 'check_ms', 'exponents')
"""Columns that tables leave out: lists and dicts, which are in the JSON."""


def add_rows(
  folder: Path, part: str, about: dict[str, Any], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
  """Write rows of a part, and its table, beside what earlier commands measured.

  The file benchmark.json holds {'runs': [run, ...]}. A run is what one command measured
  of one part: `part`, the entries of `about`, and the rows as `lines`. New rows replace
  all earlier ones of the same case, layer or varied dimension.

  Args:
    folder: the folder to write to.
    part: name of the part.
    about: the command, the machine and settings.
    rows: all rows of this command so far.

  Returns:
    All rows of the part that the file holds now.
  """
  path = folder / 'benchmark.json'
  earlier = files.read_json(path, ('runs',))['runs'] if path.exists() else []
  group = GROUPS[part]
  measured = {row[group] for row in rows}
  runs = []
  for run in earlier:
    lines = run['lines']
    if run['part'] == part:
      lines = [line for line in lines if line[group] not in measured]
    if lines:
      runs.append(run | {'lines': lines})
  runs.append({'part': part, **about, 'lines': rows})
  files.write_json(path, {'runs': runs})
  merged = [line for run in runs if run['part'] == part for line in run['lines']]
  merged.sort(key=lambda line: _place(line[group]))
  files.write_text(folder / f'{part}.txt', make_table(merged) + '\n')
  return merged


def _place(name: str) -> int:
  """Return the place of a case among all; other names keep their order."""
  return list(CASES).index(name) if name in CASES else 0


def make_table(rows: list[dict[str, Any]]) -> str:
  """Return rows as a table in text."""
  lines = [
    {name: value for name, value in row.items() if name not in NOT_SHOWN}
    for row in rows
  ]
  return tabulate(lines, 'keys', floatfmt='.4g', missingval='-')
