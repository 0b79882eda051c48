"""Studies of minutes, run on demand: `pytest -m slow`."""

import dataclasses
from pathlib import Path

import pytest

from experiments import add_task


@pytest.mark.slow
def test_add_task_is_solved_by_default(tmp_path: Path) -> None:
  """The paper's point (Fig. 1) at the script's defaults: FPTT gets below 0.01 from several seeds, BPTT stays at chance."""
  config = add_task.Config(method=('fptt',), seeds=(0, 1, 2))
  _, summaries = add_task.run(config, str(tmp_path / 'fptt'))
  assert max(summary['test_mse'] for summary in summaries) < 0.01
  short = dataclasses.replace(config, method=('bptt',), seeds=(0,), batches=config.batches // 2)
  _, [summary] = add_task.run(short, str(tmp_path / 'bptt'))
  assert summary['test_mse'] > 0.9 * add_task.CHANCE
