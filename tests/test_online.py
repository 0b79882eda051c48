"""The script of the problems with long dependencies."""

import dataclasses
from pathlib import Path
from typing import Any

from interruption import interrupted_at
import numpy as np
import pytest

from experiments import online
from experiments.core import files
from experiments.data import memory

TINY: dict[str, Any] = dict(
  cell='rnn',
  hidden=4,
  seq_len=12,
  num_windows=3,
  batch_size=4,
  batches=6,
  eval_every=2,
  test_steps=20,
)


@pytest.mark.parametrize('task', ['lags', 'recall', 'lorenz'])
def test_a_run_ends_with_the_costs_of_its_influence(tmp_path: Path, task: str) -> None:
  config = online.Config(task=task, influence='rtrl', seeds=(0, 1), **TINY)
  _, summaries = online.run(config, str(tmp_path))
  for summary in summaries:
    assert np.isfinite(summary[f'last_quarter_{task}'])
    assert summary['updates'] == 18
    assert summary['influence'] == 'rtrl'
    # B N P numbers of the layer: N = H, and P = (D + H + 1) H.
    size = 4 * 4 * (memory.PROBLEMS[task].features + 4 + 1) * 4
    assert summary['influence_mib'] == 4 * size / 2**20
    assert summary['step_mib'] > 0


def test_an_interrupted_stream_goes_on_where_it_was(tmp_path: Path) -> None:
  """The resumed run reads the same part of the stream and ends at the same losses."""
  config = online.Config(task='lags', influence='snap1', **TINY)
  online.run(config, str(tmp_path / 'whole'))
  with interrupted_at(2):
    online.run(config, str(tmp_path / 'cut'))
  online.run(config, str(tmp_path / 'cut'))
  rows = [
    files.read_jsonl(tmp_path / name / 'tbptt-seed0' / 'metrics.jsonl')
    for name in ('whole', 'cut')
  ]
  timeless = [[{**row, 'seconds': 0} for row in found] for found in rows]
  assert timeless[0] == timeless[1]


def test_a_stream_goes_on_from_batch_to_batch() -> None:
  config = online.Config(task='henon', **TINY)
  together = online.draw_items(config, 0, 0, 4)
  apart = [online.draw_items(config, 0, n, n + 1) for n in range(4)]
  for name in ('inputs', 'targets'):
    parts = [one[name] for one in apart]
    np.testing.assert_array_equal(together[name], np.concatenate(parts))
  inputs = together['inputs'].reshape(-1, 4, 1)
  targets = together['targets'].reshape(-1, 4, 1)
  np.testing.assert_array_equal(inputs[1:], targets[:-1])


def test_episodes_end_with_zeros_and_are_never_those_of_the_test() -> None:
  config = online.Config(task='recall', **TINY)
  item = {name: leaf[0] for name, leaf in online.draw_items(config, 0, 0, 1).items()}
  batch = online.read_batch(config, item)
  assert batch.inputs.shape == (12, 4, memory.RECALL_FEATURES)
  assert not np.asarray(batch.inputs[1:]).any()
  test = online.test_batch(config, 0)
  assert test.inputs.shape == (12, 20, memory.RECALL_FEATURES)
  assert not np.isin(item['targets'], test.targets).any()


def test_an_influence_of_a_whole_gradient_is_refused() -> None:
  with pytest.raises(
    ValueError, match=r"--influence must be 'none'.*bptt.* got 'rtrl'"
  ):
    online.Config(task='lags', method=('tbptt', 'bptt'), influence='rtrl')


def test_presets_fit_the_settings() -> None:
  """Each task has defaults, and each default is a setting."""
  assert set(online.TASKS) == set(memory.PROBLEMS)
  for task, preset in online.TASKS.items():
    config = online.Config(task=task, **preset)
    assert dataclasses.asdict(config).items() >= preset.items()
