"""Scripts killed for real, at any moment, and started again: they end with the very
numbers of a script never killed.
"""

import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import time

from interruption import assert_same_runs
import pytest

from experiments.core import files, signals
from experiments.data import synthetic

FAMILIES = {
  'add_task': dict(
    method='fptt',
    seq_len=12,
    hidden=4,
    batch_size=8,
    num_windows=3,
    batches=90,
    eval_every=3,
  ),
  'images': dict(
    task='arrays',
    row='true',
    hidden=8,
    batch_size=8,
    valid_size=16,
    epochs=30,
    num_windows=2,
    dropout=0.2,
  ),
  'language_model': dict(
    task='text',
    seq_len=10,
    num_windows=3,
    batch_size=4,
    embedding=8,
    hidden=8,
    epochs=30,
  ),
}
SIDE_BY_SIDE = [
  '--seeds=0:3',
  '--population=3',
  '--devices=1',
  '--checkpoint_minutes=0.0005',
  '--steps_per_call=2',
]


def cache(folder: Path) -> dict[str, str]:
  """An environment in which what is compiled is kept. (Some releases say much when they
  read it again, more than a pipe holds.)
  """
  variables = {
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  return {**variables, 'TF_CPP_MIN_LOG_LEVEL': '3'}


def start(family: str, folder: Path, name: str, *flags: str) -> subprocess.Popen[str]:
  """A script under way; what it compiles is kept for the next one."""
  places = synthetic.data_files(folder / 'data')
  data = {
    'images': [f'--data_dir={places["images"]}'],
    'language_model': [f'--data_dir={places["text"]}'],
  }.get(family, [])
  settings = [f'--{name}={value}' for name, value in FAMILIES[family].items()]
  command = [
    sys.executable,
    '-m',
    f'experiments.{family}',
    *settings,
    *data,
    f'--workdir={folder / name}',
    *flags,
  ]
  as_users = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  return subprocess.Popen(
    command,
    env={**as_users, **cache(folder)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(family: str, folder: Path, name: str, *flags: str) -> None:
  """A script to its end."""
  process = start(family, folder, name, *flags)
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors


def wait_for_lines(process: subprocess.Popen[str], path: Path, number: int) -> None:
  """Until a run has written so many lines of metrics."""
  deadline = time.monotonic() + 200
  while len(files.read_jsonl(path)) < number:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.005)


def assert_same(folder: Path) -> None:
  """Metrics, results and weights of all runs, but for the clock."""
  names = sorted(path.name for path in (folder / 'whole').glob('fptt-*'))
  assert names
  whole, cut = (
    [files.read_json(folder / which / name / 'result.json') for name in names]
    for which in ('whole', 'cut')
  )
  whole = [{**result, 'run': name} for result, name in zip(whole, names, strict=True)]
  cut = [{**result, 'run': name} for result, name in zip(cut, names, strict=True)]
  assert_same_runs(folder, whole, cut)


@pytest.mark.parametrize(
  'family',
  [
    'add_task',
    # The scripts share one training loop.
    pytest.param('images', marks=pytest.mark.slow),
    pytest.param('language_model', marks=pytest.mark.slow),
  ],
)
def test_killed_once(tmp_path: Path, family: str) -> None:
  """SIGKILL some time after metrics were written, and for the first family SIGTERM
  later on.
  """
  finish(family, tmp_path, 'whole')
  metrics = tmp_path / 'cut' / 'fptt-seed0' / 'metrics.jsonl'
  process = start(family, tmp_path, 'cut')
  wait_for_lines(process, metrics, 4)
  time.sleep(random.Random(family).uniform(0, 0.1))
  process.kill()
  process.communicate()
  if family == 'add_task':
    process = start(family, tmp_path, 'cut')
    wait_for_lines(process, metrics, len(files.read_jsonl(metrics)) + 2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == signals.EXIT_CODE
    assert 'stopped by SIGTERM, saved after batch' in said
    assert said.rstrip().endswith(f'--workdir={tmp_path / "cut"}')
  assert not (tmp_path / 'cut' / 'fptt-seed0' / 'result.json').exists()
  finish(family, tmp_path, 'cut')
  assert_same(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('flags', [[], SIDE_BY_SIDE])
@pytest.mark.parametrize('family', FAMILIES)
def test_killed_again_and_again(tmp_path: Path, family: str, flags: list[str]) -> None:
  """At least eight times each: while it starts, trains, writes metrics, saves, ends;
  alone, and as a population that saves by the clock as well."""
  finish(family, tmp_path, 'whole', *flags)
  draw, kills, began = random.Random(f'{family}{flags}'), 0, time.monotonic()
  finish(family, tmp_path, 'timed', *flags)
  duration = time.monotonic() - began
  while kills < 8:
    try:
      process = start(family, tmp_path, 'cut', *flags)
      process.communicate(timeout=draw.uniform(0.2, 1.0) * duration)
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      kills += 1
    if process.returncode == 0:  # Came to its end between two kills.
      assert_same(tmp_path)
      shutil.rmtree(tmp_path / 'cut')
  finish(family, tmp_path, 'cut', *flags)
  assert_same(tmp_path)
