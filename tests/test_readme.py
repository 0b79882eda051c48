"""What the README shows works."""

from pathlib import Path
import re
from typing import Any

import pytest

README = (Path(__file__).parents[1] / 'README.md').read_text()


def test_quickstart_learns_and_the_own_loop_runs(
  capsys: pytest.CaptureFixture[str],
) -> None:
  """The quickstart runs as printed; its last line prints the accuracy on fresh data."""
  quickstart, own_loop = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  assert len(quickstart.splitlines()) <= 20
  scope: dict[str, Any] = {}
  exec(compile(quickstart, 'README.md', 'exec'), scope)
  accuracy = re.search(r"'accuracy': ([\d.]+)", capsys.readouterr().out)
  assert accuracy is not None
  assert float(accuracy[1]) > 0.85
  scope = {}
  exec(compile(own_loop, 'README.md', 'exec'), scope)
  assert scope['opt_state'].step_count == 4


def test_it_is_short() -> None:
  """At most 150 lines, so that it can be read in a few minutes."""
  assert len(README.splitlines()) <= 150
