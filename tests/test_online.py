"""The script of the problems with long dependencies."""

import dataclasses
from pathlib import Path
from typing import Any

from interruption import assert_same_runs, interrupted_at
import numpy as np
import pytest

from experiments import online
from experiments.core import files
from experiments.core.flags import UserError
from experiments.core.trained import load_run
from experiments.data import memory
from experiments.paper import copying

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


def test_the_training_loss_does_not_depend_on_the_windows(tmp_path: Path) -> None:
  """Windows weight their objectives; what is reported is the loss of the batch."""
  settings = TINY | dict(task='recall', lr=1e-9, batches=2)
  found = {}
  for method in ('bptt', 'tbptt'):
    folder = tmp_path / method
    online.run(online.Config(method=(method,), **settings), str(folder))
    [row] = files.read_jsonl(folder / f'{method}-seed0' / 'metrics.jsonl')
    found[method] = row['train_loss']
  assert found['bptt'] == pytest.approx(found['tbptt'], rel=1e-5)
  assert found['bptt'] > 0


def test_an_interrupted_stream_goes_on_where_it_was(tmp_path: Path) -> None:
  """The resumed run reads the same part of the stream and ends at the same losses."""
  config = online.Config(task='lags', influence='snap1', seeds=(0, 1), **TINY)
  _, whole = online.run(config, str(tmp_path / 'whole'))
  with interrupted_at(3):
    online.run(config, str(tmp_path / 'cut'))
  _, cut = online.run(config, str(tmp_path / 'cut'))
  assert_same_runs(tmp_path, whole, cut)


def test_measurements_do_not_interrupt_a_stream(tmp_path: Path) -> None:
  """The hidden state and the influence go on, however often the loss is measured."""
  settings = TINY | dict(task='lags', influence='rtrl', lr=0.03)
  losses = []
  for interval in (2, 6):
    config = online.Config(**settings | dict(eval_every=interval))
    _, [summary] = online.run(config, str(tmp_path / str(interval)))
    losses.append(summary['test_lags'])
  assert losses[0] == losses[1]


def test_series_are_scored_after_a_lead(tmp_path: Path) -> None:
  """The hidden state at the first step that is scored is the one after the steps before
  it, and these are not scored.
  """
  config = online.Config(task='lorenz', **TINY)
  online.run(config, str(tmp_path))
  run = load_run(tmp_path / 'tbptt-seed0')
  test, lead = online.test_batch(config, 0)
  assert (len(lead.inputs), len(test.inputs)) == (memory.LEAD, config.test_steps)
  inputs = np.concatenate([lead.inputs, test.inputs])
  hidden = run.model.initial_state(config.batch_size)
  _, outputs = run.model.apply(run.params, hidden, inputs, None, None)
  error = float(((outputs[memory.LEAD :] - test.targets) ** 2).mean())
  assert run.result['test_lorenz'] == pytest.approx(error, rel=1e-4)
  assert online.test_batch(online.Config(task='lags', **TINY), 0).lead is None


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
  test, _ = online.test_batch(config, 0)
  assert test.inputs.shape == (12, 20, memory.RECALL_FEATURES)
  assert not np.isin(item['targets'], test.targets).any()


def test_sunspots_are_trained_on_until_1920_and_tested_later(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Targets are the next years', also where the training years begin anew."""
  package = tmp_path / 'spots'
  package.mkdir()
  (package / '__init__.py').touch()
  years = np.arange(1915, 1926)
  lines = [f'{year}.0,{year % 7}.5' for year in years]
  (package / 'spots.csv').write_text('\n'.join(['"YEAR","SUNACTIVITY"', *lines]))
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(memory, 'SUNSPOTS', ('spots', 'spots.csv'))
  counts = years % 7 + 0.5
  counts = (counts - counts[:6].mean()) / counts[:6].std()
  config = online.Config(task='sunspots', **TINY | dict(batches=2))
  items = online.draw_items(config, 0, 0, 2)
  inputs, targets = (items[name].reshape(24, 4) for name in ('inputs', 'targets'))
  np.testing.assert_allclose(inputs[:6], inputs[6:12])
  for row in range(4):
    start = np.flatnonzero(np.isclose(counts[:6], inputs[0, row]))[0]
    places = (start + np.arange(24)) % 6
    np.testing.assert_allclose(inputs[:, row], counts[places], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(targets[:, row], counts[places + 1], rtol=1e-5)
  monkeypatch.setattr(memory, 'LEAD', 2)
  monkeypatch.setitem(
    memory.PROBLEMS, 'sunspots', memory.PROBLEMS['sunspots']._replace(lead=2)
  )
  test, lead = online.test_batch(config, 0)
  np.testing.assert_allclose(test.inputs[:, 0, 0], counts[6:-1], rtol=1e-5)
  np.testing.assert_allclose(test.targets[:, 0, 0], counts[7:], rtol=1e-5)
  np.testing.assert_allclose(lead.inputs[:, 0, 0], counts[4:6], rtol=1e-5)
  monkeypatch.setattr(memory, 'SUNSPOTS', ('no_such_package', 'spots.csv'))
  with pytest.raises(UserError, match='pip install no_such_package'):
    online.test_batch(config, 0)


def test_sequences_to_copy_ask_for_the_bits_they_show() -> None:
  """In their order, and for the blank label before."""
  rng = np.random.default_rng(0)
  batch = copying.draw(rng, 32, 50, 9)
  assert set(batch.lengths) == set(range(8, 20, 2))
  for row, length in enumerate(batch.lengths):
    bits = length // 2
    shown = batch.inputs[:bits, row, 0]
    assert set(shown) <= {-1, 1}
    np.testing.assert_array_equal(batch.targets[bits:length, row], shown == 1)
    np.testing.assert_array_equal(batch.targets[:bits, row], copying.BLANK)
    np.testing.assert_array_equal(batch.inputs[bits:length, row], [[0, 1]] * bits)
    assert not batch.inputs[length:, row].any()


def test_sequences_to_copy_get_longer_once_they_are_learned() -> None:
  """Every run counts its own tokens; one bit of four steps is learned at once."""
  settings = copying.Settings(
    hidden=8, batch_size=8, batches=60, interval=20, longest=2, lr=0.03
  )
  rows = copying.study(settings, 'snap1', (0, 1))
  for row in rows:
    assert row['bits'] == 2
    # Intervals of one bit, of 20 batches of 8 sequences of two steps.
    assert row['tokens_to_2'] in (320, 640)
    assert row['tokens'] > row['tokens_to_2']
    assert row['tokens_to_4'] is None


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
