"""Studies of minutes, run on demand: `pytest -m slow`."""

import dataclasses
from pathlib import Path

import pytest

from experiments import add_task


@pytest.mark.slow
def test_add_task_is_solved_by_default(tmp_path: Path) -> None:
  """The paper's point (Fig. 1) at the script's defaults: FPTT gets below 0.01 from several seeds, BPTT stays at chance."""
  config = add_task.Config()
  for seed in range(3):
    assert add_task.train(config, 'fptt', seed, tmp_path)['test_mse'] < 0.01
  short = dataclasses.replace(config, batches=config.batches // 2)
  assert add_task.train(short, 'bptt', 0, tmp_path)['test_mse'] > 0.9 * add_task.CHANCE
