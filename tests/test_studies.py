"""Studies of minutes, run on demand: `pytest -m slow`."""

from pathlib import Path

import pytest

from experiments import add_task


@pytest.mark.slow
def test_each_method_solves_the_adding_problem_by_default(tmp_path: Path) -> None:
  """At its own rate every method gets far below chance, BPTT with a fraction of the
  updates.
  """
  _, summaries = add_task.run(add_task.Config(), str(tmp_path))
  assert (
    max(summary['last_quarter_mse'] for summary in summaries) < 0.5 * add_task.CHANCE
  )
