"""The code on every page of the documentation runs and prints what the page says."""

from collections.abc import Iterator
import contextlib
import io
from pathlib import Path
import re
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
  page
  for page in (ROOT / 'docs').rglob('*.md')
  if not {'_build', 'generated'} & set(page.parts)
)
LINK = re.compile(r'\]\(([^)#\s]+)(?:#[^)]*)?\)')


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
  """Yields (code, the lines it says it prints) of each block of Python.

  The comments that end a block are its output.
  """
  for code in re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE):
    lines = code.rstrip('\n').split('\n')
    printed: list[str] = []
    while lines and lines[-1].startswith('# '):
      printed.insert(0, lines.pop()[2:])
    yield '\n'.join(lines), printed


def name_of(page: Path) -> str:
  return str(page.relative_to(ROOT))


WITH_CODE = [page for page in PAGES if '```python' in page.read_text()]


@pytest.mark.parametrize('page', WITH_CODE, ids=name_of)
def test_code_runs_and_prints_what_the_page_says(page: Path) -> None:
  """The blocks of a page run one after the other, as a reader would run them."""
  if page.name == 'own_model.md':
    for package in ('equinox', 'haiku'):
      pytest.importorskip(package, reason=f'{package} is not installed.')
  if page.name == 'streams.md':
    pytest.importorskip('river', reason='river is not installed.')
  scope: dict[str, Any] = {}
  for code, expected in blocks(page.read_text()):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      exec(compile(code, name_of(page), 'exec'), scope)
    if expected:
      assert output.getvalue().split('\n')[:-1] == expected


@pytest.mark.parametrize('page', [ROOT / 'README.md', *PAGES], ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
  """Relative links name files of the repository."""
  for target in LINK.findall(page.read_text()):
    if not target.startswith(('http://', 'https://')):
      assert (page.parent / target).exists(), target
