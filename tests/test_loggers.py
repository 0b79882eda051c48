"""Event files for TensorBoard beside metrics.jsonl."""

from collections.abc import Iterator
import importlib.util
from pathlib import Path
import struct
from typing import Any

from interruption import interrupted_at
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from test_images import make_config

from experiments import add_task, images
from experiments.core import files, loggers, population, schedule, workdir
import fptt_jax

TINY = dict(
  seq_len=12,
  num_windows=2,
  hidden=4,
  batch_size=8,
  batches=6,
  eval_every=2,
  test_size=16,
  steps_per_call=1,
)
STARTED = 1
"""A session log's status that tells TensorBoard to drop what was written later."""


def records(path: Path) -> Iterator[Any]:
  """The events of a file: each is framed by its length and checksums."""
  content = path.read_bytes()
  while content:
    (size,) = struct.unpack('<Q', content[:8])
    yield event_pb2.Event.FromString(content[12 : 12 + size])
    content = content[16 + size :]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
  """(step, value) by tag, as TensorBoard shows them: a restarted session drops later
  steps.
  """
  seen: list[tuple[int, str, float]] = []
  for path in sorted(folder.glob('events.out.tfevents.*')):
    for event in records(path):
      if event.session_log.status == STARTED:
        seen = [row for row in seen if row[0] < event.step]
      seen += [(event.step, one.tag, one.simple_value) for one in event.summary.value]
  tags: dict[str, list[tuple[int, float]]] = {}
  for step, tag, value in seen:
    tags.setdefault(tag, []).append((step, value))
  return {tag: rows for tag, rows in tags.items() if tag != 'evaluation/seconds'}


def test_curves_of_a_resumed_run_are_those_of_one_never_stopped(tmp_path: Path) -> None:
  """Loss, gradient norm and lambda's norm per chunk of batches, evaluations at theirs,
  none of them twice.
  """
  config = add_task.Config(
    method=('fptt',),
    logger='tensorboard',
    seeds=(0, 1),
    population=2,
    devices=1,
    **TINY,
  )
  add_task.run(config, str(tmp_path / 'whole'))
  with interrupted_at(
    3
  ):  # The first run's second checkpoint: the second run is to go back.
    add_task.run(config, str(tmp_path / 'cut'))
  add_task.run(config, str(tmp_path / 'cut'))
  for seed in config.seeds:
    whole, cut = (
      scalars(tmp_path / name / f'fptt-seed{seed}') for name in ('whole', 'cut')
    )
    assert cut == whole
    for tag in ('train/loss', 'train/grad_norm', 'train/lambda_norm'):
      assert [step for step, _ in whole[tag]] == [1, 2, 3, 4, 5, 6]
    rows = files.read_jsonl(tmp_path / 'cut' / f'fptt-seed{seed}' / 'metrics.jsonl')
    errors = [(row['step'], pytest.approx(row['test_mse'])) for row in rows]
    assert whole['evaluation/test_mse'] == errors
    assert whole['train/loss'][-1][1] == pytest.approx(rows[-1]['train_loss'])
    assert whole['train/grad_norm'][-1][1] == pytest.approx(rows[-1]['grad_norm'])
  assert scalars(tmp_path / 'cut' / 'fptt-seed0') != scalars(
    tmp_path / 'cut' / 'fptt-seed1'
  )


def test_curves_within_an_epoch(tmp_path: Path) -> None:
  """Scripts with epochs count batches too; a method without lambda logs none of it."""
  config = make_config(
    tmp_path, method=('tbptt',), logger='tensorboard', epochs=2, steps_per_call=2
  )
  images.run(config, str(tmp_path / 'run'))
  curves = scalars(tmp_path / 'run' / 'tbptt-seed0')
  assert [step for step, _ in curves['train/loss']] == [
    2,
    4,
    6,
    8,
    10,
    12,
  ]  # 48 images in batches of 8.
  assert [step for step, _ in curves['evaluation/valid_accuracy']] == [6, 12]
  assert 'train/lambda_norm' not in curves
  rows = files.read_jsonl(tmp_path / 'run' / 'tbptt-seed0' / 'metrics.jsonl')
  norms = [value for _, value in curves['train/grad_norm']]
  assert np.mean(norms[:3]) == pytest.approx(rows[0]['grad_norm'], rel=1e-5)


def test_updates_that_are_not_made_are_left_out(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Skipped ones, and windows after the end of all sequences."""
  config = add_task.Config(
    method=('tbptt',), logger='tensorboard', on_nonfinite='skip', **TINY
  )
  logged: list[tuple[int, dict[str, float]]] = []
  monkeypatch.setattr(
    loggers.TensorBoard, 'log', lambda self, step, values: logged.append((step, values))
  )
  member = schedule.list_members(config)[0]
  trainer, meshes = add_task.make_trainer(config, 'tbptt', 1)
  read = lambda _, key: add_task.draw_batch(
    add_task.jax.random.wrap_key_data(key), 12, 8
  )
  group = population.Population(trainer, read, (), [member], tmp_path, meshes)
  group._loggers = [loggers.TensorBoard(tmp_path / 'run', 0)]
  metrics = fptt_jax.StepMetrics(
    loss=np.array([[[1.0, np.nan, 5.0]], [[2.0, 3.0, 7.0]]]),
    grad_norm=np.array([[[2.0, np.nan, 9.0]], [[4.0, 6.0, 9.0]]]),
    totals={
      'loss': np.array([[np.nan], [6.0]]),
      'count': np.array([[4.0], [3.0]]),
    },
    skipped=np.array([[[False, True, False]], [[False, False, False]]]),
    lambda_norm=np.zeros((2, 1)),
  )
  group.observe(metrics, 10, np.array([2, 2]))
  group.close()
  assert logged == [(12, {'train/loss': 2.0, 'train/grad_norm': 4.0})]


def test_the_logger_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
  """A run goes on with another one."""
  config = add_task.Config(method=('bptt',), **TINY)
  workdir.open_workdir(str(tmp_path), 'add_task', config)
  workdir.open_workdir(
    str(tmp_path),
    'add_task',
    add_task.Config(method=('bptt',), logger='tensorboard', **TINY),
  )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  """Before anything is compiled, with what to install."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"--logger .*tensorboardX.*'tensorboard'"):
    add_task.Config(logger='tensorboard')
  add_task.Config()
