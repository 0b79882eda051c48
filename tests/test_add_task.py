"""The adding problem's script, and what every script shares: flags, run folders,
resuming.
"""

import dataclasses
import json
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

import chex
from interruption import interrupted_at
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import add_task
from experiments.core import checkpoints, files, flags, optimizers, recipe, workdir
import fptt_jax

TINY = dict(
  seq_len=12,
  num_windows=3,
  hidden=4,
  batch_size=8,
  batches=6,
  eval_every=2,
  test_size=16,
)


def read_rows(folder: Path) -> list[dict[str, Any]]:
  """Metrics without the wall-clock."""
  return [
    {k: v for k, v in row.items() if k != 'seconds'}
    for row in files.read_jsonl(folder / 'metrics.jsonl')
  ]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.add_task', *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


def test_draw_batch_has_one_marker_in_each_half_and_their_sum_as_target() -> None:
  """The definition of the task (Sec. 4.4), and its chance level: answering 1 errs by
  1/6 on average.
  """
  batch = add_task.draw_batch(jax.random.key(3), 21, 4000)
  values, markers = np.asarray(batch.inputs[..., 0]), np.asarray(batch.inputs[..., 1])
  np.testing.assert_array_equal(markers[:10].sum(0), 1)
  np.testing.assert_array_equal(markers[10:].sum(0), 1)
  assert set(np.unique(markers)) == {0.0, 1.0}
  assert markers.mean(1).min() > 0  # each step is marked in some sequence
  np.testing.assert_allclose(batch.targets, (values * markers).sum(0), rtol=1e-6)
  assert np.mean((batch.targets - 1) ** 2) == pytest.approx(add_task.CHANCE, rel=0.05)


def test_every_method_runs_and_writes_its_folder(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """One command gives a table, a plot, a summary, and a line of metrics an interval,
  for all seven methods.
  """
  config = add_task.Config(
    method=recipe.METHODS,
    truncation_steps=5,
    workdir=str(tmp_path / 'run'),
    **TINY,
  )
  monkeypatch.setattr(
    add_task, 'announce', lambda config, folder: None
  )  # Compiles all again.
  add_task.main(config)
  folder = tmp_path / 'run'
  summary = json.loads((folder / 'summary.json').read_text())
  assert [run['method'] for run in summary['runs']] == list(recipe.METHODS)
  updates = {run['method']: run['updates'] for run in summary['runs']}
  assert updates == {
    'fptt': 18,
    'tbptt': 18,
    'ogd': 72,
    'bptt': 6,
    'tbptt_final': 6,
    'bptt_aux': 6,
    'ftrl': 18,
  }
  for method in recipe.METHODS:
    rows = read_rows(folder / f'{method}-seed0')
    assert [row['step'] for row in rows] == [2, 4, 6]
    assert all(np.isfinite(row['test_mse']) and row['grad_norm'] > 0 for row in rows)
  assert (folder / 'convergence.png').stat().st_size > 10_000
  assert json.loads((folder / 'config.json').read_text())['seq_len'] == 12
  printed = capsys.readouterr().out
  assert str(folder) in printed
  assert 'chance is 0.167' in printed
  best = min(summary['runs'], key=lambda run: run['last_quarter_mse'])
  assert f'best last quarter mse: {best["run"]}\n' in printed


@pytest.mark.parametrize(
  'method', ['fptt', pytest.param('bptt', marks=pytest.mark.slow)]
)
def test_interrupted_run_resumes_to_the_same_numbers(
  tmp_path: Path, method: str
) -> None:
  """A run stopped between two checkpoints, started again, ends with the very metrics
  and weights of a run never stopped; on two devices and on one."""
  devices = {'fptt': 2, 'bptt': 1}[method]
  config = add_task.Config(
    method=(method,),
    seeds=(3,),
    optimizer='sgd',
    momentum=0.9,
    lr=0.1,
    decay=False,
    devices=devices,
    **TINY,
  )
  _, [whole] = add_task.run(config, str(tmp_path / 'whole'))

  with interrupted_at(2):
    add_task.run(config, str(tmp_path / 'cut'))
  assert [row['step'] for row in read_rows(tmp_path / 'cut' / f'{method}-seed3')] == [
    2,
    4,
  ]
  _, [resumed] = add_task.run(config, str(tmp_path / 'cut'))

  assert read_rows(tmp_path / 'cut' / f'{method}-seed3') == read_rows(
    tmp_path / 'whole' / f'{method}-seed3'
  )
  assert {**resumed, 'seconds': 0} == {**whole, 'seconds': 0}
  trainer = optimizers.make_trainer(
    config,
    method,
    add_task.make_model(config),
    add_task.fptt_jax.losses.terminal_regression(),
    12,
  )
  states = []
  for name in ('whole', 'cut'):
    run = checkpoints.Run(tmp_path / name / f'{method}-seed3')
    assert checkpoints.saved_steps(run.folder)[-1] == 6
    (state, _), _ = run.restore(
      6,
      (
        trainer.init(jax.random.key(0), add_task.draw_batch(jax.random.key(0), 12, 8)),
        (),
      ),
    )
    run.close()
    states.append(state._replace(key=jax.random.key_data(state.key)))
  chex.assert_trees_all_equal(*states)


def test_interrupted_before_the_first_checkpoint_no_line_is_doubled(
  tmp_path: Path,
) -> None:
  """Lines without a checkpoint behind them, a cut-off one too, go when the run starts
  again.
  """
  config = add_task.Config(method=('bptt',), **TINY)

  with interrupted_at(1):
    add_task.run(config, str(tmp_path))
  metrics = tmp_path / 'bptt-seed0' / 'metrics.jsonl'
  metrics.write_text(metrics.read_text() + '{"step": 4, "se')
  add_task.run(config, str(tmp_path))
  assert [row['step'] for row in read_rows(tmp_path / 'bptt-seed0')] == [2, 4, 6]


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
  """Results of two configurations never mix: the message lists what differs, and
  nothing is written.
  """
  config = add_task.Config(workdir=str(tmp_path), **TINY)
  workdir.open_workdir(config.workdir, 'add_task', config)
  assert workdir.open_workdir(config.workdir, 'add_task', config) == tmp_path
  other = dataclasses.replace(config, clip=0.5)
  with pytest.raises(
    flags.UserError,
    match=r'another configuration; clip: was 1.0, now 0.5\. Choose another --workdir',
  ):
    workdir.open_workdir(config.workdir, 'add_task', other)
  (tmp_path / 'file').write_text('')
  with pytest.raises(flags.UserError, match='cannot write to --workdir'):
    workdir.open_workdir(str(tmp_path / 'file' / 'below'), 'add_task', config)


def test_newer_settings_are_recorded_where_they_change_something(
  tmp_path: Path,
) -> None:
  """Folders of earlier versions, whose configuration has none of them, go on."""
  config = add_task.Config(workdir=str(tmp_path), **TINY)
  newer = workdir.NEWER_SETTINGS['all'] | workdir.NEWER_SETTINGS['add_task']
  fields = {field.name: field.default for field in dataclasses.fields(config)}
  assert newer == {name: fields[name] for name in newer}
  workdir.open_workdir(config.workdir, 'add_task', config)
  assert not newer.keys() & workdir.read_config(tmp_path).keys()
  other = dataclasses.replace(config, averaging='running')
  with pytest.raises(flags.UserError, match="averaging: was None, now 'running'"):
    workdir.open_workdir(config.workdir, 'add_task', other)


def test_metrics_cut_off_by_a_kill_are_left_out(tmp_path: Path) -> None:
  """A line without its end is not data."""
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert files.read_jsonl(path) == [{'step': 1}, {'step': 2}]
  assert files.read_jsonl(tmp_path / 'none') == []


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      dict(method=('fptp',)),
      r"--method must be .*, got 'fptp'",
    ),
    (dict(seeds=(-1,)), '--seeds must be .*, got'),
    (dict(num_windows=0), '--num_windows must be .*, got 0'),
    (
      dict(num_windows=121),
      'num_windows must be an integer between 1 and the sequence length T=120, got 121',
    ),
    (
      dict(method=('tbptt_final',), truncation_steps=121),
      '--truncation_steps must be .*, got 121',
    ),
    (dict(method=('fptt', 'fptt')), '--method must be .*, got'),
    (dict(seeds=(1, 1)), '--seeds must be .*, got'),
    (
      dict(gradient_estimate='recomputed', clip_regularizer=False),
      '--clip_regularizer must be .*, got',
    ),
    (dict(lr=0.0), '--lr must be .*, got 0.0'),
    (dict(lr=float('nan')), '--lr must be .*, got nan'),
    (dict(momentum=1.0), r'--momentum must be .*, got 1.0'),
    (dict(clip=-1.0), '--clip must be a finite number >= 0'),
    (dict(alpha=0.0), 'alpha must be a finite number > 0'),
    (dict(batches=0), '--batches must be .*, got 0'),
    (dict(seq_len=1), '--seq_len must be .*, got'),
    (dict(inner_steps=0), 'inner_steps must be an integer >= 1'),
    (
      dict(influence='snap1'),
      "--influence must be 'none' for methods whose gradient is whole, bptt, got "
      "'snap1'",
    ),
  ],
)
def test_settings_of_no_meaning_are_refused(
  settings: dict[str, Any], message: str
) -> None:
  """Each is refused before anything is compiled, saying what was got and what was
  expected.
  """
  with pytest.raises(ValueError, match=message):
    add_task.Config(**settings)


def test_the_loss_gradient_is_clipped_alone() -> None:
  """Two updates by SGD with --noclip_regularizer, by hand: the gradient 5 u of norm 5
  is clipped to u. After the first update W = W̄ and λ = 0.05 u, so the second one is
  along u - λ = 0.95 u; clipped with the regularizer, it would be along u.
  """
  config = recipe.Recipe(
    optimizer='sgd', lr=0.1, alpha=0.5, clip=1.0, clip_regularizer=False
  )
  optimizer = optimizers.make_optimizer(config, 'fptt')
  params = jnp.zeros(2)
  state = optimizer.init(params)
  for _ in range(2):
    updates, state = optimizer.update(jnp.array([3.0, 4.0]), state, params)
    params = params + updates
  np.testing.assert_allclose(params, -0.195 * np.array([0.6, 0.8]), rtol=1e-6)


def test_unstable_sgd_is_warned_about() -> None:
  """The trainer knows the learning rate: past radius 1 the advisor speaks; below it,
  and for Adam, it is silent.
  """
  unstable = add_task.Config(optimizer='sgd', lr=4.0, alpha=1.0)
  with pytest.warns(
    UserWarning, match=r'lr=4, alpha=1.* spectral radius [1-9]\.\d\d > 1'
  ):
    optimizers.make_optimizer(unstable, 'fptt')
  optimizers.make_optimizer(unstable, 'tbptt')
  optimizers.make_optimizer(dataclasses.replace(unstable, lr=0.5), 'fptt')
  optimizers.make_optimizer(dataclasses.replace(unstable, optimizer='adam'), 'fptt')


@pytest.mark.parametrize('other', [{'nesterov': True}, {'momentum_windows': 20}])
def test_other_momenta_have_no_known_radius(other: dict[str, Any]) -> None:
  """The analysis is of heavy-ball momentum from update to update."""
  config = add_task.Config(optimizer='sgd', lr=2.0, alpha=0.5, kappa=2.0, momentum=0.9)
  assert optimizers.flat_loss_radius(config, 'fptt') is not None
  changed = dataclasses.replace(config, **other)
  assert optimizers.flat_loss_radius(changed, 'fptt') is None


def draw_some_nan(
  key: jax.Array, seq_len: int, batch_size: int
) -> add_task.fptt_jax.Batch:
  """Batches as always, but for NaN in a training batch now and then."""
  batch = draw(key, seq_len, batch_size)
  bad = (batch_size == TINY['batch_size']) & (batch.targets.max() > 1.8)
  return batch._replace(inputs=jnp.where(bad, jnp.nan, batch.inputs))


draw = add_task.draw_batch


def test_what_is_not_finite_ends_a_run(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """At once, not at the next evaluation; it is said where, and kept."""
  monkeypatch.setattr(add_task, 'draw_batch', draw_some_nan)
  config = add_task.Config(
    method=('fptt',),
    **{**TINY, 'batches': 40, 'eval_every': 40},
    steps_per_call=2,
  )
  add_task.main(dataclasses.replace(config, workdir=str(tmp_path)))
  rows = read_rows(tmp_path / 'fptt-seed0')
  assert [row['test_mse'] for row in rows] == [None]
  assert rows[0]['step'] < 40
  lost = files.read_json(tmp_path / 'fptt-seed0' / 'result.json')['lost']
  said = (
    r'loss is nan in batch \d of 2, window 0 of 3 \(update \d+\): gradient norm nan; '
    r'(the last finite|norm of)'
  )
  assert re.search(said, lost)
  assert capsys.readouterr().out.count(lost) == 2


def test_a_score_that_is_not_finite_ends_a_run(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The losses of training are finite, the test error is not: the run diverged, and its
  result says so and has no parameters.
  """

  def draw(key: jax.Array, seq_len: int, batch_size: int) -> fptt_jax.Batch:
    batch = draw_batch(key, seq_len, batch_size)
    # The test set alone has this size.
    is_test = batch_size == TINY['test_size']
    return batch._replace(targets=batch.targets * (jnp.inf if is_test else 1.0))

  draw_batch = add_task.draw_batch
  monkeypatch.setattr(add_task, 'draw_batch', draw)
  _, [summary] = add_task.run(add_task.Config(method=('tbptt',), **TINY), str(tmp_path))
  assert summary['lost'] == 'test_mse not finite after batch 2'
  assert not (tmp_path / 'tbptt-seed0' / 'parameters.npz').exists()


def test_integers_are_numbers_too(tmp_path: Path) -> None:
  """Settings given from Python."""
  config = add_task.Config(method=('fptt',), **TINY, clip=1, alpha=1, momentum=0, lr=1)
  _, [summary] = add_task.run(config, str(tmp_path))
  assert summary['batches'] == 6


def test_what_is_not_finite_is_not_saved(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A checkpoint by the clock right then: --allow_config_change with a lower rate goes
  on from finite weights.
  """
  monkeypatch.setattr(add_task, 'draw_batch', draw_some_nan)
  config = add_task.Config(
    method=('fptt',),
    **{**TINY, 'batches': 40, 'eval_every': 40},
    steps_per_call=1,
    checkpoint_minutes=1e-9,
  )
  _, [summary] = add_task.run(config, str(tmp_path))
  finite = int(re.search(r'update (\d+)\)', summary['lost'])[1]) // 3
  assert checkpoints.saved_steps(tmp_path / 'fptt-seed0')[-1] == finite


def test_what_is_not_finite_is_skipped(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The run goes on as if these batches were not; their updates are counted, through a
  stop and a resumption as well.
  """
  monkeypatch.setattr(add_task, 'draw_batch', draw_some_nan)
  config = add_task.Config(
    method=('fptt',),
    on_nonfinite='skip',
    optimizer='sgd',
    lr=0.1,
    decay=False,
    **{**TINY, 'batches': 40},
  )
  _, [whole] = add_task.run(config, str(tmp_path / 'whole'))
  with interrupted_at(15):
    add_task.run(config, str(tmp_path / 'cut'))
  _, [resumed] = add_task.run(config, str(tmp_path / 'cut'))
  rows = read_rows(tmp_path / 'whole' / 'fptt-seed0')
  assert rows == read_rows(tmp_path / 'cut' / 'fptt-seed0')
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
    jax.random.split(jax.random.key(0), 3)[1], np.arange(1, 41)
  )
  bad = int((jax.vmap(lambda key: draw(key, 12, 8))(keys).targets.max(1) > 1.8).sum())
  assert 0 < bad < 40
  assert (rows[-1]['skipped'], rows[-1]['updates']) == (3 * bad, 3 * (40 - bad))
  assert 0 < whole['test_mse'] == resumed['test_mse']


def test_command_line(tmp_path: Path) -> None:
  """Help shows the flags, a bad value is one line, a range of seeds runs, and the same
  command again only reports.
  """
  shown = command('--help')
  assert shown.returncode == 0
  assert '--alpha=0.1 ' in shown.stdout
  bad = command('--lr=-1')
  assert (bad.returncode, bad.stderr.strip()) == (
    1,
    'error: --lr must be a finite number > 0, got -1.0. See --help.',
  )
  letters = command('--seeds=0,x')
  assert (
    letters.stderr.strip()
    == "error: --seeds must be integers, or a range such as 0:3, got 'x'. See --help."
  )
  flags = [f'--{name}={value}' for name, value in TINY.items()] + [
    '--method=tbptt',
    '--seeds=0:2',
    f'--workdir={tmp_path}',
  ]
  first, again = command(*flags), command(*flags)
  assert first.returncode == 0, first.stderr
  assert first.stdout.count('batch      6') == 2
  assert again.stdout.count('batch      6') == 0
  assert first.stdout.splitlines()[-4:] == again.stdout.splitlines()[-4:]
