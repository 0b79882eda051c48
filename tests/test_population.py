"""Runs side by side: the same numbers and files as one by one, whatever becomes of one
of them.
"""

import dataclasses
import json
from pathlib import Path
import re
from typing import Any

from interruption import interrupted_at, last_saved
import jax
import numpy as np
import pytest
from test_images import make_config

from experiments import add_task, images, language_model
from experiments.core import (
  checkpoints,
  devices,
  files,
  optimizers,
  population,
  recipe,
  schedule,
)

TINY = dict(
  seq_len=12,
  hidden=4,
  batch_size=8,
  batches=6,
  eval_every=2,
  test_size=16,
  num_windows=3,
)


def read(folder: Path, name: str) -> list[dict[str, Any]]:
  """A run's metrics without the clock's."""
  return [
    {**row, 'seconds': 0} for row in files.read_jsonl(folder / name / 'metrics.jsonl')
  ]


def assert_same_runs(a: Path, b: Path, names: list[str], tolerance: float) -> None:
  """Metrics and results agree."""
  for name in names:
    rows = [read(folder, name) for folder in (a, b)]
    assert [row['step'] for row in rows[0]] == [row['step'] for row in rows[1]]
    results = [
      json.loads((folder / name / 'result.json').read_text()) | {'seconds': 0}
      for folder in (a, b)
    ]
    for got, expected in [*zip(*rows, strict=True), results]:
      assert got.keys() == expected.keys()
      numbers = [
        key for key, value in expected.items() if isinstance(value, int | float)
      ]
      np.testing.assert_allclose(
        [got[key] for key in numbers],
        [expected[key] for key in numbers],
        rtol=tolerance,
        err_msg=name,
      )


@pytest.mark.parametrize('devices', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_seeds_and_grid_side_by_side(tmp_path: Path, devices: int) -> None:
  """Four runs of two seeds and two rates are what they are one by one; each has its
  folder; 'run' in the summaries names it.
  """
  settings = dict(
    method=('fptt',),
    seeds=(3, 5),
    grid=('lr=0.1:0.01', 'alpha=0.5'),
    optimizer='sgd',
    decay=True,
  )
  one = add_task.Config(population=1, devices=1, **settings, **TINY)
  many = add_task.Config(population=4, devices=devices, **settings, **TINY)
  _, expected = add_task.run(one, str(tmp_path / 'one'))
  _, summaries = add_task.run(many, str(tmp_path / 'many'))
  names = [
    f'fptt-seed{seed}-lr{lr}-alpha0.5' for lr in ('0.1', '0.01') for seed in (3, 5)
  ]
  assert (
    [summary['run'] for summary in summaries]
    == [summary['run'] for summary in expected]
    == names
  )
  assert [(summary['lr'], summary['seed']) for summary in summaries] == [
    (0.1, 3),
    (0.1, 5),
    (0.01, 3),
    (0.01, 5),
  ]
  assert_same_runs(tmp_path / 'many', tmp_path / 'one', names, 1e-4)
  assert len({summary['test_mse'] for summary in summaries}) == 4


@pytest.mark.slow
def test_epochs_side_by_side(tmp_path: Path) -> None:
  """Each run has its own order of the images, its own plateaus of the learning rate,
  its own best epoch; the last chunk of an epoch is shorter."""
  settings = dict(
    method=('fptt',),
    seeds=(0, 1, 2),
    epochs=4,
    plateau_factor=3.0,
    lr=0.1,
    optimizer='sgd',
    steps_per_call=2,
    devices=1,
  )
  one, many = (make_config(tmp_path, population=size, **settings) for size in (1, 3))
  images.run(one, str(tmp_path / 'one'))
  images.run(many, str(tmp_path / 'many'))
  assert_same_runs(
    tmp_path / 'many', tmp_path / 'one', [f'fptt-seed{seed}' for seed in range(3)], 1e-3
  )


def test_schedule_free_runs_have_momenta_of_their_own(tmp_path: Path) -> None:
  """Each is as it is in a program of its own, in training and in evaluation."""
  settings = dict(
    method=('tbptt',),
    averaging='schedule_free',
    grid=('momentum=0.9:0.5',),
    epochs=2,
    devices=1,
  )
  one, many = (make_config(tmp_path, population=size, **settings) for size in (1, 2))
  images.run(one, str(tmp_path / 'one'))
  images.run(many, str(tmp_path / 'many'))
  assert_same_runs(
    tmp_path / 'many',
    tmp_path / 'one',
    [f'tbptt-seed0-momentum{value}' for value in (0.9, 0.5)],
    1e-3,
  )


@pytest.mark.slow
def test_averaging_starts_for_each_by_itself(tmp_path: Path) -> None:
  """Averaged weights, which some of the runs begin to take while others do not yet."""
  settings = dict(
    method=('tbptt',),
    seeds=(0, 1, 2),
    epochs=5,
    lr=1.0,
    optimizer='sgd',
    average_after=1,
    devices=1,
  )
  one, many = (make_config(tmp_path, population=size, **settings) for size in (1, 3))
  images.run(one, str(tmp_path / 'one'))
  images.run(many, str(tmp_path / 'many'))
  assert_same_runs(
    tmp_path / 'many',
    tmp_path / 'one',
    [f'tbptt-seed{seed}' for seed in range(3)],
    1e-3,
  )


@pytest.mark.slow
def test_averaging_and_a_run_that_diverges(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Its validation score is no number to compare; the other goes on."""
  make_task, seen = images.make_task, []

  def made(*args: Any) -> Any:
    task = make_task(*args)
    validate = lambda params: (
      seen.append(0) or (np.nan if len(seen) == 5 else task.reporter.validate(params))
    )
    reporter = dataclasses.replace(task.reporter, validate=validate)
    return task._replace(reporter=reporter)

  monkeypatch.setattr(images, 'make_task', made)
  settings = dict(
    method=('tbptt',),
    seeds=(0, 1),
    epochs=4,
    optimizer='sgd',
    average_after=1,
    devices=1,
    population=2,
  )
  _, summaries = images.run(make_config(tmp_path, **settings), str(tmp_path / 'run'))
  assert [summary['epochs'] for summary in summaries] == [3, 4]


def test_one_diverges_and_one_stops(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """The others go on to the end; what became of each is said and kept, the best weights
  of the one that stopped included.
  """
  settings = dict(
    method=('tbptt',),
    optimizer='sgd',
    momentum=0.9,
    epochs=3,
    devices=1,
    milestones=(1,),
    min_lr=0.005,
  )
  config = make_config(tmp_path, grid=('lr=0.1:3e38:0.01',), population=3, **settings)
  _, summaries = images.run(config, str(tmp_path / 'run'))
  assert [summary['epochs'] for summary in summaries] == [3, 1, 1]
  assert [summary['test_accuracy'] is None for summary in summaries] == [
    False,
    True,
    False,
  ]
  assert 'lr 3e+38  epoch   1  diverged' in capsys.readouterr().out
  images.main(dataclasses.replace(config, workdir=str(tmp_path / 'run')))
  best = max(
    (summaries[0], summaries[2]), key=lambda summary: summary['valid_accuracy']
  )
  assert f'best valid accuracy: {best["run"]}\n' in capsys.readouterr().out
  assert (
    json.loads((tmp_path / 'run' / 'summary.json').read_text())['best'] == best['run']
  )
  assert [len(read(tmp_path / 'run', summary['run'])) for summary in summaries] == [
    3,
    1,
    1,
  ]


@pytest.mark.parametrize('steps_per_call', [pytest.param(1, marks=pytest.mark.slow), 0])
def test_chunks_change_nothing(tmp_path: Path, steps_per_call: int) -> None:
  """Batches one by one, or all of an interval in one program: the same run, which may
  even go on the other way.
  """
  config = add_task.Config(
    method=('bptt',), optimizer='sgd', steps_per_call=steps_per_call, **TINY
  )
  add_task.run(dataclasses.replace(config, steps_per_call=2), str(tmp_path / 'whole'))
  with interrupted_at(2):
    add_task.run(dataclasses.replace(config, steps_per_call=2), str(tmp_path / 'cut'))
  add_task.run(config, str(tmp_path / 'cut'))
  assert_same_runs(tmp_path / 'cut', tmp_path / 'whole', ['bptt-seed0'], 1e-6)


@pytest.mark.slow
def test_interrupted_while_the_runs_are_saved(tmp_path: Path) -> None:
  """Stopped when one of three has been saved and the others have not: it goes back to
  them, and all end as if never stopped.
  """
  config = add_task.Config(
    method=('fptt',),
    seeds=(0, 1, 2),
    population=3,
    devices=1,
    optimizer='sgd',
    **TINY,
  )
  add_task.run(config, str(tmp_path / 'whole'))
  with interrupted_at(5):
    add_task.run(config, str(tmp_path / 'cut'))
  assert [
    checkpoints.saved_steps(tmp_path / 'cut' / f'fptt-seed{seed}') for seed in range(3)
  ] == [[2, 4], [2], [2]]
  add_task.run(config, str(tmp_path / 'cut'))
  for seed in range(3):
    assert read(tmp_path / 'cut', f'fptt-seed{seed}') == read(
      tmp_path / 'whole', f'fptt-seed{seed}'
    )
    final = [
      jax.tree.leaves(restored(tmp_path / name, config, seed))
      for name in ('whole', 'cut')
    ]
    for a, b in zip(*final, strict=True):
      np.testing.assert_array_equal(a, b)


def test_those_that_have_ended_are_stood_in_for(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """One diverges and one stops, then the third is cut off: it goes on in a program of
  three, to the very same numbers.
  """
  settings = dict(
    method=('tbptt',),
    optimizer='sgd',
    momentum=0.9,
    epochs=4,
    devices=1,
    milestones=(1,),
    min_lr=0.005,
    dropout=0.2,
  )
  config = make_config(tmp_path, grid=('lr=0.1:3e38:0.01',), population=3, **settings)
  images.run(config, str(tmp_path / 'whole'))
  with interrupted_at(3):
    images.run(config, str(tmp_path / 'cut'))
  start, placeholders = population.Population.start, []
  monkeypatch.setattr(
    population.Population,
    'start',
    lambda self, *args: placeholders.append(self.placeholders) or start(self, *args),
  )
  images.run(config, str(tmp_path / 'cut'))
  assert placeholders == [{1, 2}]
  for name in ('lr0.1', 'lr3e+38', 'lr0.01'):
    assert read(tmp_path / 'cut', f'tbptt-seed0-{name}') == read(
      tmp_path / 'whole', f'tbptt-seed0-{name}'
    )
  cut, whole = (
    last_saved(tmp_path / which / 'tbptt-seed0-lr0.1') for which in ('cut', 'whole')
  )
  assert cut == whole


def restored(folder: Path, config: add_task.Config, seed: int) -> Any:
  """The weights of a run's last checkpoint."""
  run = checkpoints.Run(folder / f'fptt-seed{seed}')
  loss = add_task.fptt_jax.losses.terminal_regression()
  trainer = optimizers.make_trainer(
    config, 'fptt', add_task.make_model(config), loss, 12, decay=lambda count: 1.0
  )
  state = trainer.init(jax.random.key(0), add_task.draw_batch(jax.random.key(0), 12, 8))
  (state, _), _ = run.restore(checkpoints.saved_steps(run.folder)[-1], (state, ()))
  run.close()
  return state.params


@pytest.mark.slow
def test_more_seeds_join(tmp_path: Path) -> None:
  """What has ended is not trained again; new seeds and values are."""
  config = add_task.Config(
    method=('bptt',), seeds=(0, 1), population=2, devices=1, **TINY
  )
  add_task.run(config, str(tmp_path))
  before = (tmp_path / 'bptt-seed0' / 'metrics.jsonl').read_text()
  _, summaries = add_task.run(
    dataclasses.replace(config, seeds=(0, 1, 2, 7)), str(tmp_path)
  )
  assert [summary['seed'] for summary in summaries] == [0, 1, 2, 7]
  assert (tmp_path / 'bptt-seed0' / 'metrics.jsonl').read_text() == before


def test_names_tell_all_values_apart() -> None:
  """Values that print alike at six digits have folders of their own."""
  config = recipe.Recipe(grid=('lr=0.1:0.10000001:1:1e-05',))
  assert [member.name for member in schedule.list_members(config)] == [
    f'fptt-seed0-lr{value}' for value in ('0.1', '0.10000001', '1', '1e-05')
  ]


def test_each_member_is_warned_about(tmp_path: Path) -> None:
  """Not the first alone."""
  config = add_task.Config(
    method=('fptt',),
    optimizer='sgd',
    grid=('lr=0.1:30',),
    population=2,
    devices=1,
    **TINY,
  )
  with pytest.warns(
    UserWarning, match=r'FPTT with SGD at lr=30, alpha=0\.1, .* is unstable'
  ):
    add_task.run(config, str(tmp_path))


def test_lambda_that_runs_away_is_warned_about(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Once, while the loss is finite yet, and for the one it runs away for."""
  config = add_task.Config(
    method=('fptt',),
    optimizer='sgd',
    grid=('lr=0.01:2',),
    population=2,
    devices=1,
    kappa=2.0,
    **TINY,
  )
  config = dataclasses.replace(
    config,
    alpha=1.0,
    clip=0.0,
    decay=False,
    batches=40,
    eval_every=40,
    steps_per_call=2,
  )
  with pytest.warns(UserWarning, match='unstable'):
    add_task.run(config, str(tmp_path))
  said = [
    line for line in capsys.readouterr().err.splitlines() if 'lambda runs away' in line
  ]
  assert len(said) == 1
  assert re.search(
    r'warning: +fptt seed 0 lr 2: .* norm is \S+ after batch \d+, .* spectral '
    r'radius 1.82; lower lr',
    said[0],
  )
  rows = {name: read(tmp_path, f'fptt-seed0-lr{name}')[0] for name in ('0.01', '2')}
  assert int(re.search(r'after batch (\d+)', said[0])[1]) < rows['2']['step'] <= 40


@pytest.mark.parametrize(
  ('saved', 'size', 'expected'),
  [
    ([{0: 0}, {0: 0}, {0: 0}], None, [([0, 1, 2], 3)]),
    ([{0: 0}, {0: 0}, {0: 0}], 2, [([0, 1], 2), ([2], 1)]),
    ([{2: 3, 4: 3}, {0: 0, 2: 3}, {0: 0, 2: 3}], None, [([0, 1, 2], 3)]),
    ([{0: 0, 2: 3}, {0: 0}, {0: 0}], None, [([0, 1, 2], 3)]),
    (
      [{6: 1, 8: 1}, {0: 0}, {0: 0}],
      None,
      [([1, 2], 2), ([0], 1)],
    ),  # Too far ahead to go back.
    (
      [{2: 3, 4: 3}, {2: 3, 4: 3}, {4: 3, 6: 3}, {8: 1, 10: 1}],
      None,
      [([0, 1, 2], 3), ([3], 1)],
    ),
    ([{0: 0, 2: 1}, {0: 0}], 1, [([0], 1), ([1], 1)]),
    ([{2: 3, 4: 3}, {2: 3, 4: 3}], None, [([0, 1], 3)]),  # A third has ended.
    ([{2: 3, 4: 3}, {2: 3, 4: 3}], 2, [([0, 1], 2)]),
    (
      [{2: 3, 4: 3}, {2: 1, 4: 1}],
      None,
      [([0], 3), ([1], 1)],
    ),  # They have trained apart.
  ],
)
def test_groups(
  saved: list[dict[int, int]], size: int | None, expected: list[tuple[list[int], int]]
) -> None:
  """All of a group can go on from the same step; none goes back further than what is
  saved; programs keep their size.
  """
  assert schedule.group_runs(saved, size) == expected


def test_where_a_run_may_start(tmp_path: Path) -> None:
  """Anew only where next to nothing is lost by it and its program may have been killed
  during its first save: not when it was alone in its program, nor when all but one of
  its checkpoints were set aside.
  """
  saved = tmp_path / 'checkpoints'
  assert schedule.resume_points(tmp_path) == {0: 0}
  (saved / '900' / 'record').mkdir(parents=True)
  (saved / '900' / 'record' / 'metadata').write_text('{"places": 3}')
  assert schedule.resume_points(tmp_path) == {0: 0, 900: 3}
  (saved / '900' / 'record' / 'metadata').write_text('{"places": 1}')
  assert schedule.resume_points(tmp_path) == {900: 1}
  (saved / '900' / 'record' / 'metadata').write_text('{"places": 3}')
  (saved / '1000').mkdir()
  assert schedule.resume_points(tmp_path) == {900: 3, 1000: 1}
  (tmp_path / 'broken').mkdir()
  (saved / '1000').rename(tmp_path / 'broken' / '1000')
  assert schedule.resume_points(tmp_path) == {900: 3}


@pytest.mark.parametrize(
  ('number', 'size', 'lengths'),
  [(10, 4, {3, 4}), (10, 5, {5}), (3, 25, {3}), (7, 0, {7}), (429, 25, {23, 24})],
)
def test_chunks(number: int, size: int, lengths: set[int]) -> None:
  """In order, all, none too long, of two lengths at most."""
  parts = schedule.chunks(number, size)
  np.testing.assert_array_equal(np.concatenate(parts), np.arange(number))
  assert {len(part) for part in parts} == lengths


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(grid=('lr',)), r"--grid .*out of lr, momentum, .*got 'lr'"),
    (
      dict(grid=('lr=a:b',)),
      r"--grid must be .*, got 'lr=a:b'\.",
    ),
    (
      dict(grid=('hidden=1:2',)),
      r"--grid must be .*, got 'hidden=1:2'\.",
    ),
    (
      dict(grid=('lr=1:1',)),
      r"--grid must be .*, got 'lr=1:1'\.",
    ),
    (dict(grid=('lr=1', 'lr=2')), r'--grid must be of names given once each'),
    (dict(grid=('lr=-1:1',)), r'--lr must be .*, got -1\.0\.'),
    (
      dict(grid=('clip=0:1',)),
      r'--grid must be a list of values > 0, since a grid cannot switch clipping off',
    ),
    (
      dict(grid=('alpha=1:2',), method=('tbptt',)),
      r'--grid must be without alpha, which tbptt does not have',
    ),
    (dict(population=-1), r'--population must be .*, got -1\.'),
    (dict(steps_per_call=-1), r'--steps_per_call must be .*, got -1\.'),
  ],
)
def test_settings_of_no_meaning_are_refused(
  settings: dict[str, Any], message: str
) -> None:
  """What was got and what was expected."""
  with pytest.raises(ValueError, match=message):
    recipe.Recipe(**settings)


def test_how_many_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
  """On a CPU small networks only, on an accelerator all, or as told."""
  sizes = lambda **settings: [
    devices.population_size(recipe.Recipe(**settings), *shape)
    for shape in ((8, 16), (128, 128))
  ]
  assert sizes() == [None, 1]
  assert sizes(population=3) == [3, 3]
  monkeypatch.setattr(devices, 'is_cpu', lambda: False)
  assert sizes() == [None, None]


def test_populations_that_cannot_be() -> None:
  """Batches of random lengths differ from seed to seed."""
  with pytest.raises(
    ValueError, match='--population must be 0 or 1 with --random_lengths'
  ):
    language_model.Config(
      **{'task': 'ptb_w', 'population': 2, **language_model.TASKS['ptb_w']}
    )
