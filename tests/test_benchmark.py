"""The benchmark, and that its rivals train what it trains."""

import importlib.util
import json
from pathlib import Path
import subprocess

import jax
import numpy as np
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import (
  cases,
  gpu_day,
  measurements,
  ours,
  plots,
  report,
  rivals_flax,
  rivals_haiku,
  rivals_torch,
  settings,
  timing,
)
from experiments.core.flags import UserError
import fptt_jax

CASES = [
  cases.Case('classes', 12, 3, 4, 2, 5, 3),
  cases.Case('regression', 12, 4, 4, 2, 5, 1),
  cases.Case('words', 12, 3, 4, 6, 5, 7, words=True),
]


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_loop_over_windows_equals_the_trainer(case):
  """The same cell: losses of two batches agree to float32's rounding."""
  model = ours.make_model(case, rivals_flax.flax_cell(case))
  trained, data = ours.train_step(case, model), cases.draw(case)
  params = model.init(jax.random.split(jax.random.key(0))[0])
  loop = rivals_flax.flax_loop(case, params)
  for _ in range(2):
    np.testing.assert_allclose(loop(*data), trained(*data), rtol=2e-5)


def test_one_buffer_trains_the_same():
  """Losses of two batches agree to float32's rounding."""
  case = CASES[0]
  steps = [
    ours.train_step(case, ours.lstm(case), one_buffer=flat) for flat in (False, True)
  ]
  for _ in range(2):
    np.testing.assert_allclose(*(step(*cases.draw(case)) for step in steps), rtol=1e-5)


@pytest.mark.skipif(
  importlib.util.find_spec('torch') is None,
  reason='needs PyTorch, which is not a dependency',
)
@pytest.mark.parametrize(
  ('kind', 'tolerance'),
  [
    ('plain', 1e-5),
    ('optimized', 1e-5),
    ('bfloat16', 2e-2),
    # The compiler of PyTorch takes most of a minute.
    pytest.param('compiled', 1e-5, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_pytorch_equals_the_trainer(case, kind, tolerance):
  """From the same weights: losses of three batches agree to rounding."""
  data, trainer = (
    cases.draw(case),
    ours.make_trainer(case, ours.lstm(case)),
  )
  state = trainer.init(jax.random.key(0), fptt_jax.Batch(*data))
  step = rivals_torch.torch_loop(case, kind, jax.tree.map(np.array, state.params))
  for _ in range(3):
    state, metrics = trainer.step(state, fptt_jax.Batch(*data))
    np.testing.assert_allclose(
      step(*rivals_torch.tensors(*data, device='cpu')), metrics.loss, rtol=tolerance
    )


def run_benchmark(folder: Path, part: str, rounds: int = 1) -> dict[str, list[dict]]:
  """Run the command on toys; returns the rows of the shared file by part."""
  benchmark.main(
    settings.Config(part, cases=('smoke',), rounds=rounds, workdir=str(folder))
  )
  found: dict[str, list[dict]] = {}
  for run in json.loads((folder / 'benchmark.json').read_text())['runs']:
    assert run['hardware']
    assert run['versions']
    found.setdefault(run['part'], []).extend(run['lines'])
  return found


def test_benchmark_runs_whole(tmp_path: Path, monkeypatch):
  """All parts at a toy's size: every system of the case has its row, and tables, JSON
  and plots are there.
  """
  monkeypatch.setattr(measurements, 'PAUSE', 0)
  parts = run_benchmark(tmp_path, 'all', rounds=2)
  assert list(parts) == ['rivals', 'cells', 'latency', 'population', 'growth']
  lines = parts['rivals']
  names = {line['system'] for line in lines}
  rounded = {line['system'] for line in lines if line['precision'] == 'bfloat16'}
  assert {name for name in rounded if 'ours' in name} <= {'ours, bfloat16'}
  assert {'ours', 'ours, 4 batches a program', 'flax, one jit', 'flax, a loop'} <= names
  assert {'flax, nnx.RNN', 'Haiku'} <= names
  assert all(
    0 < line['min_ms'] <= line['median_ms'] <= line['max_ms'] for line in lines
  )
  assert all(
    len(line['all_ms']) == 2 and 0 < line['peak_gflops'] < 1e4 for line in lines
  )
  assert all(
    line['of_peak'] == pytest.approx(line['gflops'] / line['peak_gflops'])
    for line in lines
  )
  assert lines[0]['times_ours'] == 1
  *growth, fit = parts['growth']
  assert set(fit['exponents']) == set('TKHB')
  assert [(row['varied'], row['value']) for row in growth] == [
    *(('T', value) for value in (32, 64)),
    *(('K', value) for value in (1, 3, 12)),
    *(('H', value) for value in (4, 8)),
    *(('B', value) for value in (4, 8)),
  ]
  assert all(
    (tmp_path / name).stat().st_size > 5000
    for name in ('rivals.png', 'growth.png', 'population.png')
  )
  members = parts['population']
  assert [(row['case'], row['R']) for row in members] == [('smoke', 1), ('smoke', 2)]
  assert members[0]['throughput'] == 1
  assert all(row['throughput'] > 0 for row in members)
  by_scan, by_hand, last = parts['cells']
  assert (by_scan['layer'], by_scan['implementation']) == ('LSTM', 'scan')
  assert by_scan['times_scan'] == last['times_scan'] == 1
  assert by_hand['times_scan'] == by_scan['step_us'] / by_hand['step_us']
  assert by_hand['step_us'] == 1e3 * by_hand['median_ms'] / 12
  assert all(
    row['window_us'] == pytest.approx(1e3 * row['median_ms'] / 8)
    for row in parts['latency']
  )
  for row in (*lines, *growth, *members, *parts['cells'], *parts['latency']):
    assert row['precision'] in ('float32', 'bfloat16')
    assert row['threads'] >= 1


def test_commands_share_a_file(tmp_path: Path):
  """New rows replace those of the same case; other cases and parts stay, and cases are
  in their order.
  """

  def add(part: str, rounds: int, *rows: tuple[str, float]) -> list[tuple[str, float]]:
    lines = [{'case': case, 'median_ms': ms} for case, ms in rows]
    merged = report.add_rows(tmp_path, part, {'rounds': rounds}, lines)
    return [(line['case'], line['median_ms']) for line in merged]

  add('population', 1, ('M28', 9.0))
  add('rivals', 2, ('add', 1.0), ('add', 2.0), ('tiny', 3.0))
  merged = add('rivals', 3, ('M28', 4.0), ('tiny', 5.0))
  assert merged == [('M28', 4.0), ('add', 1.0), ('add', 2.0), ('tiny', 5.0)]
  runs = json.loads((tmp_path / 'benchmark.json').read_text())['runs']
  assert [(run['part'], run['rounds'], len(run['lines'])) for run in runs] == [
    ('population', 1, 1),
    ('rivals', 2, 2),
    ('rivals', 3, 2),
  ]
  assert len((tmp_path / 'rivals.txt').read_text().splitlines()) == 2 + 4


def test_models_of_rivals_are_the_same_network():
  """From the weights of Flax's cell, `nnx.RNN` and Haiku give the same outputs; Haiku
  adds 1 to the forget gate, orders gates i, g, f, o and joins both matrices.
  """
  case = CASES[0]
  x = cases.draw(case)[0]
  flax = rivals_flax.rnn_model(case)
  params = flax.init(jax.random.key(3))
  _, expected = flax.apply(params, flax.initial_state(4), x, None, None)
  _, last = flax.apply_last(params, flax.initial_state(4), x, None, None, 11)
  np.testing.assert_allclose(last[0], expected[11], rtol=1e-6)
  cell, readout = params[0]['cell'], params[1]
  i, f, g, o = np.split(np.arange(4 * case.hidden), 4)
  columns = np.concatenate([i, g, f, o])
  kernels = [cell['dense_i']['kernel'], cell['dense_h']['kernel']]
  bias = np.array(cell['dense_h']['bias'])
  bias[f] -= 1
  weights = {
    'lstm/linear': {'w': np.concatenate(kernels)[:, columns], 'b': bias[columns]},
    'linear': {'w': readout['kernel'], 'b': readout['bias']},
  }
  haiku = rivals_haiku.make_model(case)
  state = haiku.initial_state(4)
  _, outputs = haiku.apply(weights, state, x, None, None)
  np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_times_with_credit_are_relative_to_those_without(tmp_path: Path):
  """Each layer's first row is the step without an influence."""
  lines = run_benchmark(tmp_path, 'influence')['influence']
  assert [line['influence'] for line in lines] == ['none', 'rtrl']
  for line in lines:
    assert line['times_none'] > 0
    assert (line['state_mib'] > 0) == (line['influence'] != 'none')
    if line['influence'] == 'none':
      assert line['times_none'] == 1


def test_best_threads():
  """The number of threads with the least median stays."""
  rows = {
    name: {'median_ms': ms}
    for name, ms in (('ours', 1.0), ('x, threads 1', 3.0), ('x, threads 2', 4.0))
  }
  assert list(timing.best_threads(rows)) == ['ours', 'x, threads 1']


def test_disturbed_calls_do_not_count():
  """Those whose check took more than 1.3 times the quickest of all; where all were
  disturbed, all count.
  """
  calls = {'a': [(3.0, 1.0), (9.0, 2.0), (5.0, 1.2)], 'b': [(7.0, 1.4), (8.0, 1.5)]}
  rows = timing.drop_noisy_calls(
    {name: [timing.Call(*call) for call in several] for name, several in calls.items()}
  )
  assert [
    (row['min_ms'], row['median_ms'], row['max_ms'], row['disturbed'])
    for row in rows.values()
  ] == [
    (3000, 4000, 5000, 1),
    (7000, 7500, 8000, 2),
  ]
  assert rows['a']['all_ms'] == [3000, 9000, 5000]
  assert rows['a']['check_ms'] == [1000, 2000, 1200]


def test_update_steps():
  """Time 10 + 0.5 K at T = 100: a step takes 0.1, an update 5 of them; K = 1 is left
  out.
  """
  rows = [{'value': k, 'median_ms': 10 + 0.5 * k} for k in (2, 10, 50)] + [
    {'value': 1, 'median_ms': 99.0}
  ]
  assert plots.update_steps(rows, 100) == pytest.approx(5)


def test_flops():
  """LSTM 8 H (H + D) a step and row, readout 2 H C a window or step, three times, but
  for the gradient of inputs that are data.
  """
  case = cases.Case('', 10, 2, 3, 4, 5, 6)
  assert cases.flops(case) == 3 * (
    3 * (10 * 8 * 5 * 9 + 2 * 2 * 5 * 6) - 10 * 8 * 5 * 4
  )
  assert cases.flops(case._replace(words=True)) == 3 * 3 * (
    10 * 8 * 5 * 9 + 10 * 2 * 5 * 6
  )


def test_what_is_not_there_is_left_out_and_said(monkeypatch):
  """Kernels and PyTorch."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(measurements.devices, 'is_cpu', lambda: True)
  reasons = {
    'ours, kernel': 'needs an NVIDIA GPU',
    'Haiku': 'not installed',
    'PyTorch': 'not installed',
  }
  assert measurements.left_out() == reasons
  assert not any(
    'PyTorch' in name or 'kernel' in name or 'Haiku' in name
    for name in measurements.systems(cases.CASES['M28'])
  )


def test_a_rival_that_fails_is_left_out_and_said(tmp_path: Path, monkeypatch, capsys):
  """The others are timed, except those that --without names, and the reason is kept."""

  def fail(*args):
    raise RuntimeError('out of memory\nand so on')

  monkeypatch.setattr(rivals_flax, 'flax_loop', fail)
  monkeypatch.setattr(measurements, 'PAUSE', 0)
  benchmark.main(
    settings.Config(
      'rivals', ('smoke',), ('PyTorch', 'ours, '), 1, workdir=str(tmp_path)
    )
  )
  [content] = json.loads((tmp_path / 'benchmark.json').read_text())['runs']
  assert content['left_out']['smoke: flax, a loop'] == 'RuntimeError: out of memory'
  names = [line['system'] for line in content['lines']]
  assert names == ['ours', 'flax, one jit', 'flax, nnx.RNN', 'Haiku']
  assert (
    'not timed: smoke: flax, a loop (RuntimeError: out of memory)\n'
    in capsys.readouterr().out
  )


@pytest.mark.parametrize('devices', [1, 2])
def test_batches_are_where_they_are_wanted(monkeypatch, devices):
  """Split over the devices that 'ours' is split over, whole on all of them as a source,
  and on one device for the others.
  """
  mesh = None if devices == 1 else jax.sharding.Mesh(jax.devices()[:2], ('devices',))
  monkeypatch.setattr(measurements, 'choose_mesh', lambda case: mesh)
  case, rows = (
    cases.CASES['smoke'],
    lambda name: measurements.place_batch(case, name)[0].addressable_shards,
  )
  assert [shard.data.shape for shard in rows('ours')] == [
    (12, 4 // devices, 1)
  ] * devices
  assert [shard.data.shape for shard in rows(f'ours, {ours.MANY_NAME}')] == [
    (12, 4, 1)
  ] * devices
  for name in ('ours, one device', 'flax, one jit'):
    assert [shard.data.shape for shard in rows(name)] == [(12, 4, 1)]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write to --workdir=.*file/run'):
    benchmark.main(
      settings.Config(cases=('smoke',), workdir=str(tmp_path / 'file' / 'run'))
    )


def test_unknown_cases_are_refused():
  with pytest.raises(ValueError, match=r"--cases must be .*, got 'M29'"):
    settings.Config(cases=('M29',))


@pytest.mark.parametrize(
  ('code', 'last'), [(1, '1 failed in 3.0s'), (0, '9 skipped in 0.1s')]
)
def test_skipped_tests_of_a_gpu_are_no_result(
  code: int, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """They would never be repeated, as one that failed is."""
  done = subprocess.CompletedProcess([], code, f'why\n{last}\n', '')
  monkeypatch.setattr(gpu_day.subprocess, 'run', lambda *args, **options: done)
  with pytest.raises(RuntimeError, match=last):
    gpu_day.run_gpu_tests()


def test_a_day_on_a_gpu_goes_on_where_it_stopped(tmp_path: Path, capsys):
  """Results stay, failures are repeated, and no stage starts when time is over."""
  calls = []

  def stage(name: str, fails: bool = False) -> gpu_day.Stage:
    def run() -> str:
      calls.append(name)
      if fails:
        raise ValueError(f'no {name}')
      return f'result of {name}'

    return gpu_day.Stage(name, run)

  path = tmp_path / 'gpu-day.json'
  first = [stage('a'), stage('b', fails=True), stage('c')]
  content = gpu_day.run_stages(first, path, minutes=1)
  assert content['stages']['b']['error'] == 'ValueError: no b'
  assert 'left: b;' in capsys.readouterr().out
  gpu_day.run_stages([stage('a'), stage('b'), stage('c'), stage('d')], path, minutes=0)
  assert calls == ['a', 'b', 'c']
  gpu_day.run_stages([stage('a'), stage('b'), stage('c'), stage('d')], path, minutes=1)
  assert calls == ['a', 'b', 'c', 'b', 'd']
  stages = json.loads(path.read_text())['stages']
  assert {name: entry['result'] for name, entry in stages.items()} == {
    name: f'result of {name}' for name in 'abcd'
  }


@pytest.mark.slow
def test_a_day_on_a_gpu_runs_through_without_one(tmp_path: Path, monkeypatch):
  """Kernels are left to the tests of the emulation; the GPU's tests are skipped."""
  monkeypatch.setattr(measurements, 'PAUSE', 0)
  config = settings.Config(
    part='gpu-day', cases=('smoke',), rounds=2, workdir=str(tmp_path)
  )
  benchmark.main(config)
  stages = json.loads((tmp_path / 'gpu-day.json').read_text())['stages']
  assert list(stages) == ['kernels', 'tests', 'rivals smoke', 'population smoke']
  assert 'runs on NVIDIA GPUs' in stages['kernels']['error']
  assert 'skipped' in stages['tests']['error']
  assert stages['rivals smoke']['result']['lines'][0]['system'] == 'ours'
  assert [row['R'] for row in stages['population smoke']['result']] == [1, 2]
