"""What the README shows works."""

from pathlib import Path
import re

import pytest

README = (Path(__file__).parents[1] / 'README.md').read_text()


def test_quickstart_runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
  """The quickstart is run as printed; its last line prints the accuracy on fresh
  sequences. What goes on from it runs too and prints what its comments say."""
  quickstart, more = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  assert len(quickstart.splitlines()) <= 20
  scope: dict[str, object] = {}
  exec(compile(quickstart, 'README.md', 'exec'), scope)
  accuracy = re.search(r"'accuracy': ([\d.]+)", capsys.readouterr().out)
  assert accuracy is not None
  assert float(accuracy[1]) > 0.85
  exec(compile(more, 'README.md', 'exec'), scope)
  assert capsys.readouterr().out.splitlines() == re.findall(
    r'print\(.*# (\(\d+, \d+\)):', more
  )


def test_map_of_the_tree_is_true() -> None:
  """Each path the README's map names exists."""
  [block] = re.findall(r'```text\n(.*?)```', README, re.DOTALL)
  paths = [line.split()[0] for line in block.splitlines() if line.strip()]
  assert len(paths) > 10
  for path in paths:
    assert (Path(__file__).parents[1] / path).exists(), path
