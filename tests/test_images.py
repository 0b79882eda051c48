"""The image script, and the loop over epochs it shares with the language model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import nnx
from interruption import interrupted_at
import jax
import numpy as np
import optax
import pytest

from experiments import data, images
from experiments.core import averaging, cells, files, flags, loop, optimizers
from experiments.data import synthetic
import fptt_jax

TINY = dict(
  task='arrays',
  row=True,
  hidden=8,
  batch_size=8,
  valid_size=16,
  epochs=3,
  milestones=(2,),
  num_windows=2,
  lr=1e-2,
)


def make_config(folder: Path, **settings: Any) -> images.Config:
  return images.Config(
    **{
      **TINY,
      'data_dir': synthetic.data_files(folder / 'data')['images'],
      **settings,
    }
  )


def test_script_learns_and_reports(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """A bright row is told by its number after some epochs, far above chance; test is
  measured at the epoch of the best validation; the same command again trains nothing
  and prints the same table.
  """
  config = make_config(
    tmp_path,
    method=('fptt',),
    epochs=40,
    milestones=(),
    lr=3e-2,
    workdir=str(tmp_path / 'run'),
  )
  images.main(config)
  first = capsys.readouterr().out
  [summary] = json.loads((tmp_path / 'run' / 'summary.json').read_text())['runs']
  rows = files.read_jsonl(tmp_path / 'run' / 'fptt-seed0' / 'metrics.jsonl')
  best = max(row['valid_accuracy'] for row in rows)
  assert summary['valid_accuracy'] == best
  assert rows[summary['best_epoch'] - 1]['valid_accuracy'] == best
  assert summary['test_accuracy'] > 60  # chance: 17
  assert [row['updates'] for row in rows] == [
    2 * 6 * epoch for epoch in range(1, 41)
  ]  # 48 images in batches of 8, K = 2
  assert (tmp_path / 'run' / 'accuracy.png').stat().st_size > 10_000
  images.main(config)
  second = capsys.readouterr().out
  assert 'lr' not in second
  assert second.splitlines()[-3:] == first.splitlines()[-3:]


@pytest.mark.parametrize(
  'settings',
  [
    dict(divergence='example', dropout=0.3),
    pytest.param(
      dict(average_after=1, restart_each_epoch=True), marks=pytest.mark.slow
    ),
  ],
)
def test_interrupted_run_resumes_to_the_same_numbers(
  tmp_path: Path, settings: dict[str, Any]
) -> None:
  """Stopped after an epoch's metrics and before its checkpoint, a run goes on to the
  metrics and the result of one never stopped: order of the images, Q tables of every
  example, learning rate, averages and dropout included.
  """
  config = make_config(tmp_path, method=('fptt',), epochs=4, **settings)
  whole = images.run(config, str(tmp_path / 'whole'))[1]
  with interrupted_at(3):
    images.run(config, str(tmp_path / 'cut'))
  resumed = images.run(config, str(tmp_path / 'cut'))[1]
  assert [{**summary, 'seconds': 0} for summary in resumed] == [
    {**summary, 'seconds': 0} for summary in whole
  ]
  paths = [
    tmp_path / name / 'fptt-seed0' / 'metrics.jsonl' for name in ('whole', 'cut')
  ]
  curves = [[{**row, 'seconds': 0} for row in files.read_jsonl(file)] for file in paths]
  assert curves[0] == curves[1]


def test_averages_wait_for_an_accuracy_that_falls(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """What decides on the start of averages is the lower, the better."""
  seen = []

  def triggered(losses: list[float], after: int) -> bool:
    seen.append(losses)
    return False

  monkeypatch.setattr(averaging, 'triggered', triggered)
  config = make_config(tmp_path, method=('fptt',), average_after=1)
  images.run(config, str(tmp_path / 'run'))
  rows = files.read_jsonl(tmp_path / 'run' / 'fptt-seed0' / 'metrics.jsonl')
  assert seen[-1] == [-row['valid_accuracy'] for row in rows[: len(seen[-1])]]


def test_learning_rate_falls_at_the_milestones_and_on_a_plateau(tmp_path: Path) -> None:
  """Divided by milestone_factor after each milestone, by plateau_factor after each
  epoch that is no better (here all but the first: nothing is learned at such a rate);
  training stops below min_lr.
  """
  settings = dict(
    lr=1e-20,
    milestones=(1, 3),
    milestone_factor=10.0,
    plateau_factor=2.0,
    epochs=9,
    min_lr=1e-23,
  )
  config = make_config(tmp_path, method=('bptt',), **settings)
  images.run(config, str(tmp_path / 'run'))
  rows = files.read_jsonl(tmp_path / 'run' / 'bptt-seed0' / 'metrics.jsonl')
  expected = [1e-20, 1e-21, 5e-22, 2.5e-23, 1.25e-23]
  np.testing.assert_allclose([row['lr'] for row in rows], expected, rtol=1e-6)


def test_the_rate_that_is_printed_falls_with_decay(tmp_path: Path) -> None:
  """Along the half cosine of all three epochs, to 0."""
  config = make_config(tmp_path, method=('tbptt',), decay=True, milestones=(), lr=1e-2)
  images.run(config, str(tmp_path / 'run'))
  rows = files.read_jsonl(tmp_path / 'run' / 'tbptt-seed0' / 'metrics.jsonl')
  rates = [row['lr'] for row in rows]
  np.testing.assert_allclose(rates, [7.5e-3, 2.5e-3, 0], rtol=1e-5, atol=1e-9)


def test_a_run_all_of_whose_updates_are_skipped_ends(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """It has no training score, which is no reason to stop the runs beside it."""
  config = make_config(
    tmp_path, method=('tbptt',), on_nonfinite='skip', grid=('lr=0.01:1e38',)
  )
  _, summaries = images.run(config, str(tmp_path / 'run'))
  assert [summary.get('lost') for summary in summaries] == [
    None,
    'train_accuracy not finite after batch 6',
  ]


def test_each_epoch_takes_each_training_image_once(tmp_path: Path) -> None:
  """Shuffled by seed and epoch alone; the targets are the images' labels, the ids their
  places.
  """
  config = make_config(tmp_path, divergence='example')
  sequences, _ = images.load(config)
  task = images.make_task(config, sequences, 'fptt', 1)
  labels, ids = (
    np.concatenate(part)
    for part in zip(*(batch.targets for batch in read_epoch(task, 2, 5)), strict=True)
  )
  assert sorted(ids.tolist()) == list(range(48))
  np.testing.assert_array_equal(labels, sequences.splits.train.labels[ids])
  again, other, another = (
    np.concatenate([batch.targets[1] for batch in read_epoch(task, epoch, seed)])
    for epoch, seed in ((2, 5), (3, 5), (2, 6))
  )
  np.testing.assert_array_equal(again, ids)
  assert not np.array_equal(other, ids)
  assert not np.array_equal(another, ids)


def read_epoch(task: loop.Task, epoch: int, seed: int) -> list[fptt_jax.Batch]:
  """All batches of an epoch."""
  return [
    task.read(task.source, item)
    for portion in task.portions(epoch, seed)
    for item in portion.items
  ]


def test_the_permutation_is_fixed_and_kept_with_the_run(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Every split is read in the one order of --permutation_seed, which the run's folder
  holds.
  """
  rng = np.random.default_rng(0)
  pictures = synthetic.images(rng, size=5)
  monkeypatch.setattr(data, 'load_images', lambda name, data_dir: pictures)
  config = images.Config(
    **{
      **TINY,
      'task': 'permuted',
      'row': False,
      'permutation_seed': 3,
      'epochs': 1,
      'method': ('bptt',),
    }
  )
  path, _ = images.run(config, str(tmp_path / 'run'))
  order = json.loads((path / 'data.json').read_text())['order']
  assert sorted(order) == list(range(25))
  assert order != list(range(25))
  sequences, _ = images.load(config)
  for examples in sequences.splits:
    batch = sequences.read(examples.images[:2], examples.labels[:2], None)
    flat = examples.images[:2].reshape(2, 25)[:, order]
    np.testing.assert_allclose(
      batch.inputs[..., 0].T, (flat / 255 - 0.1307) / 0.3081, rtol=1e-5
    )


@pytest.mark.parametrize('cell', cells.WITH_KERNEL)
def test_layers_run_as_the_flags_say(cell: str) -> None:
  """Each layer gets the implementation and the precision of products."""
  settings = {**TINY, 'task': 'mnist', 'cell': cell}
  config = images.Config(**settings, implementation='custom_vjp', products='bfloat16')
  layer = cells.build(config, cell, 2, 3, None, nnx.Rngs(0))
  assert (layer.implementation, layer.products) == ('custom_vjp', 'bfloat16')
  default = cells.build(images.Config(**settings), cell, 2, 3, None, nnx.Rngs(0))
  assert (default.implementation, default.products) == ('auto', None)


@pytest.mark.parametrize('cell', list(cells.CELLS))
def test_every_cell_takes_a_step_by_fptt(cell: str) -> None:
  """All parameters move, the stacked layers' too."""
  config = images.Config(
    **{
      **TINY,
      'task': 'mnist',
      'cell': cell,
      'hidden': 6,
      'layers': 2,
      'readout_hidden': 32,
    }
  )
  model = images.make_model(config, 6, 2, 3)
  loss = fptt_jax.losses.terminal_classification(num_classes=3)
  rng = np.random.default_rng(0)
  batch = fptt_jax.Batch(
    rng.normal(size=(6, 4, 2)).astype(np.float32),
    rng.integers(0, 3, 4).astype(np.int32),
  )
  trainer = optimizers.make_trainer(config, 'fptt', model, loss, 6)
  state = trainer.init(jax.random.key(0), batch)
  before = jax.tree.map(np.array, state.params)
  state, _ = trainer.step(state, batch)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, state.params)
  assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(
  ('settings', 'recurrent'),
  [
    (dict(cell='lstm'), 67_584),
    (dict(cell='gru'), 50_688),
    (dict(cell='antisymmetric', hidden=256), 34_688),
  ],
)
def test_parameter_counts_are_the_paper_s(
  settings: dict[str, Any], recurrent: int
) -> None:
  """CIFAR-10, D=3: LSTM 67K and GRU 51K without the readout, Antisymmetric 37K with it
  (Table 2).
  """
  config = images.Config(task='cifar10', **settings)
  shapes = jax.eval_shape(
    images.make_model(config, 1024, 3, 10).init, jax.random.key(0)
  )
  assert cells.count(shapes['layers'][0]) == recurrent
  assert cells.count(shapes) == recurrent + 10 * config.hidden + 10
  if config.cell == 'antisymmetric':
    assert cells.count(shapes) == 37_258


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      dict(task='arrays', data_dir=''),
      "--data_dir must be a .npz with --task='arrays', got ''",
    ),
    (dict(dropout=1.0), r'--dropout must be .*, got 1.0'),
    (dict(valid_size=0), '--valid_size must be .*, got 0'),
    (
      dict(reconstruction=float('inf')),
      '--reconstruction must be .*, got inf',
    ),
    (
      dict(reconstruction_segment=1),
      '--reconstruction_segment must be .*, got 1',
    ),
    (
      dict(milestone_factor=0.1),
      '--milestone_factor must be .*, got 0.1',
    ),
    (dict(average_after=-1), '--average_after must be .*, got -1'),
    (
      dict(method=('tbptt',), averaging='schedule_free', momentum=0.0),
      r'--momentum must be above 0 with --averaging=schedule_free, got 0\.0',
    ),
    (
      dict(method=('tbptt',), averaging='schedule_free', bootstrap=0.5),
      r'--bootstrap must be 0 with --averaging=schedule_free, got 0\.5',
    ),
    (dict(alpha_warmup=-1), '--alpha_warmup must be .*, got -1'),
    (dict(weight_decay=-1.0), '--weight_decay must be .*, got -1.0'),
    (
      dict(cell='lru', implementation='native'),
      "--implementation must be 'auto' with --cell=lru, .* got 'native'",
    ),
    (
      dict(cell='fastgrnn', products='bfloat16'),
      "--products must be 'float32' with --cell=fastgrnn, .* got 'bfloat16'",
    ),
    (
      dict(implementation='scan', products='bfloat16'),
      "--products must be 'float32' with --implementation=scan, got 'bfloat16'",
    ),
  ],
)
def test_settings_of_no_meaning_are_refused(
  settings: dict[str, Any], message: str
) -> None:
  """Before anything is read or compiled."""
  with pytest.raises(ValueError, match=message):
    images.Config(**settings)


def test_weights_are_averaged_in_one_way() -> None:
  with pytest.raises(
    ValueError, match="--averaging must be 'none' with --average_after"
  ):
    images.Config(average_after=5, averaging='running')


def test_settings_that_do_not_fit_the_data_are_refused(tmp_path: Path) -> None:
  """One line, once the images are there."""
  with pytest.raises(
    flags.UserError, match='between 1 and the sequence length T=6, got 7'
  ):
    images.run(make_config(tmp_path, num_windows=7), str(tmp_path / 'a'))
  with pytest.raises(
    flags.UserError,
    match=r'--momentum_windows must be 0, or at least .* K=2, got 1',
  ):
    images.run(make_config(tmp_path, momentum_windows=1), str(tmp_path / 'c'))
  with pytest.raises(
    flags.UserError,
    match=r'--batch_size must be .*, got 49',
  ):
    images.run(make_config(tmp_path, batch_size=49), str(tmp_path / 'b'))
  with pytest.raises(
    flags.UserError,
    match=(
      r"--reconstruction_segment must be at most 3, the shortest window's .* 'fptt', "
      r'got 4'
    ),
  ):
    images.run(
      make_config(tmp_path, reconstruction=1.0, reconstruction_segment=4),
      str(tmp_path / 'd'),
    )
  with pytest.raises(
    flags.UserError,
    match=r"--reconstruction must be 0 with the method 'tbptt_final', got 1\.0",
  ):
    images.run(
      make_config(tmp_path, reconstruction=1.0, method=('tbptt_final',)),
      str(tmp_path / 'e'),
    )
  with pytest.raises(
    flags.UserError,
    match='validation split must have 1 to 63 of the 64 training images, got 64',
  ):
    images.run(make_config(tmp_path, valid_size=64), str(tmp_path / 'c'))


def test_alpha_grows_to_its_value() -> None:
  """--alpha_warmup=4: alpha/10 at the first window, alpha from the fifth on; it is what
  λ moves by.
  """
  config = dataclasses.replace(
    images.Config(), alpha=0.5, alpha_warmup=4, optimizer='sgd', lr=1.0
  )
  optimizer = optimizers.regularize(
    config, optax.sgd(1.0), config.alpha, config.beta, config.kappa
  )
  params = {'w': np.zeros(1, np.float32)}
  state, seen = optimizer.init(params), []
  for _ in range(6):
    lam, w_bar = state.lam['w'], state.w_bar['w']
    updates, state = optimizer.update({'w': np.ones(1, np.float32)}, state, params)
    params = {'w': params['w'] + updates['w']}
    seen.append(float(((lam - state.lam['w']) / (params['w'] - w_bar))[0]))
  np.testing.assert_allclose(seen, [0.05, 0.1625, 0.275, 0.3875, 0.5, 0.5], rtol=1e-4)


def test_images_are_cut_and_pooled(tmp_path: Path) -> None:
  """--train_size takes the first images of the training split alone, --pool fewer
  pixels.
  """
  places = synthetic.data_files(tmp_path)['images']
  config = images.Config(
    task='arrays', data_dir=places, valid_size=16, batch_size=8, num_windows=2
  )
  whole, _ = images.load(config)
  few, _ = images.load(dataclasses.replace(config, train_size=20, pool=2))
  labels = whole.splits.train.labels
  np.testing.assert_array_equal(few.splits.train.labels, labels[:20])
  assert len(few.splits.valid.labels) == len(whole.splits.valid.labels)
  assert few.shape[0] == whole.shape[0] // 4
