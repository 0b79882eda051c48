"""Several processes on one machine train as one does; when one dies the others say so,
and all of them go on together.
"""

import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import chex
from interruption import last_saved
import numpy as np
import pytest
from test_kills import FAMILIES, cache

from experiments import add_task, images, language_model
from experiments.core import files, flags, processes, recipe, workdir
from experiments.data import synthetic

SCRIPTS: dict[str, Any] = {
  'add_task': add_task,
  'images': images,
  'language_model': language_model,
}


def run_here(
  family: str, folder: Path, name: str, **settings: Any
) -> list[dict[str, Any]]:
  """A script to its end in this process."""
  places = synthetic.data_files(folder / 'data')
  data = {
    'images': {'data_dir': places['images'], 'row': True},
    'language_model': {'data_dir': places['text']},
  }.get(family, {})
  script = SCRIPTS[family]
  return script.run(
    script.Config(**{**FAMILIES[family], 'method': ('fptt',), **data, **settings}),
    str(folder / name),
  )[1]


def pair(
  family: str, folder: Path, *flags: str, slurm: bool = False
) -> list[subprocess.Popen[str]]:
  """Two processes of a script, each with one core, so one device; what they compile is
  kept. They are told of each other by flags, or by the environment that SLURM gives
  them.
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  job = (
    {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}
    if slurm
    else {}
  )
  core = {min(os.sched_getaffinity(0))}
  settings = [f'--{name}={value}' for name, value in FAMILIES[family].items()]
  command = [
    sys.executable,
    '-m',
    f'experiments.{family}',
    *settings,
    f'--workdir={folder / "pair"}',
    *flags,
  ]
  started = []
  for number in range(2):
    told = (
      ['--data_parallel']
      if slurm
      else [
        f'--coordinator=localhost:{port}',
        '--num_processes=2',
        f'--process_id={number}',
      ]
    )
    own = (
      {**job, 'SLURM_PROCID': str(number), 'SLURM_LOCALID': str(number)}
      if slurm
      else {}
    )
    pipes = dict(
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, **cache(folder), **own},
    )
    started.append(subprocess.Popen([*command, *told], **pipes))
  for process in started:
    os.sched_setaffinity(process.pid, core)
  return started


def finish(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
  """(exit code, output, errors) of both."""
  try:
    ended = [process.communicate(timeout=300) for process in started]
  finally:
    for process in started:
      process.kill()
  return [
    (process.returncode, *texts) for process, texts in zip(started, ended, strict=True)
  ]


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_one_of_two_processes_is_killed_and_both_go_on(
  tmp_path: Path, family: str
) -> None:
  """The survivor ends with a message, not silently and not never; started again, the
  two end with the numbers of one process that has two devices; one of them speaks."""
  places = synthetic.data_files(tmp_path / 'data')
  data = {
    'images': {'data_dir': places['images']},
    'language_model': {'data_dir': places['text']},
  }.get(family, {})
  flags = [f'--{name}={value}' for name, value in data.items()]
  started = pair(family, tmp_path, *flags)
  metrics = tmp_path / 'pair' / 'fptt-seed0' / 'metrics.jsonl'
  deadline = time.monotonic() + 200
  while len(files.read_jsonl(metrics)) < 4 and time.monotonic() < deadline:
    time.sleep(0.02)
  started[1].kill()
  code, _, errors = finish(started)[0]
  # By ours where a collective operation failed, by JAX's own where it waited for the
  # other.
  assert code in (1, -signal.SIGABRT), errors
  said = (
    'If another process has stopped, start all of them again; to resume, run',
    'another task died',
  )
  assert said[code < 0] in errors
  (code, output, errors), (other_code, other_output, _) = finish(
    pair(family, tmp_path, *flags)
  )
  assert (code, other_code) == (0, 0), errors
  assert 'fptt seed 0' in output
  assert other_output == ''

  [expected] = run_here(family, tmp_path, 'one', devices=2)
  rows = [
    files.read_jsonl(tmp_path / name / 'fptt-seed0' / 'metrics.jsonl')
    for name in ('pair', 'one')
  ]
  assert len(rows[0]) == len(rows[1])
  for got, wanted in zip(*rows, strict=True):
    names = [name for name in wanted if name != 'seconds']
    np.testing.assert_allclose(
      [got[name] for name in names], [wanted[name] for name in names], rtol=2e-4
    )
  assert files.read_json(tmp_path / 'pair' / 'fptt-seed0' / 'result.json').keys() == {
    *expected,
    'config_sha256',
  } - {'run'}
  assert (
    last_saved(tmp_path / 'pair' / 'fptt-seed0')[0]
    == last_saved(tmp_path / 'one' / 'fptt-seed0')[0]
  )


@pytest.mark.slow
def test_two_processes_that_slurm_started(tmp_path: Path) -> None:
  """The same command twice, without a word of the other."""
  (code, output, errors), (other_code, other_output, _) = finish(
    pair('add_task', tmp_path, slurm=True)
  )
  assert (code, other_code, other_output) == (0, 0, ''), errors
  assert 'on each of 2 devices' in output


def test_an_allocation_of_slurm_is_not_two_processes(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Within `salloc --ntasks=2` a command is one; srun would start two."""
  monkeypatch.setenv('SLURM_JOB_ID', '7')
  monkeypatch.setenv('SLURM_NTASKS', '2')
  processes.join('', None, None)
  assert processes.is_first()


def test_alone_all_is_as_if_there_were_no_others() -> None:
  """No collective operation, no detour."""
  processes.join('', None, None)
  processes.join('', 1, None)
  assert processes.is_first()
  assert processes.on_first_process(lambda x: x, 3) == 3
  assert [processes.any_process(asked) for asked in (True, False)] == [True, False]
  tree = {'a': np.ones(3)}
  assert processes.replicated(tree) is tree


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      dict(coordinator='localhost:1'),
      '--coordinator must be given with --num_processes and --process_id',
    ),
    (
      dict(coordinator='localhost:1', num_processes=2, process_id=2),
      '--process_id must be from 0 to 1, one less than --num_processes',
    ),
    (
      dict(num_processes=2, process_id=1),
      '--num_processes must be .*, got 2',
    ),
    (dict(num_processes=0), '--num_processes must be .*, got 0'),
    (dict(shard_params=True), '--shard_params must be false without --data_parallel'),
    (
      dict(data_parallel=True, population=2),
      '--population must be 0 or 1 with --data_parallel',
    ),
  ],
)
def test_settings_of_no_meaning_are_refused(
  settings: dict[str, Any], message: str
) -> None:
  """What was got and what was expected."""
  with pytest.raises(ValueError, match=message):
    recipe.Recipe(**settings)


ONE_OF_TWO = """
import atexit, jax
from experiments import add_task
from experiments.core import flags
jax.process_count = lambda: 2
atexit.register(print, 'waited for the other')
def fail(config):
  raise {}
flags.run(fail, add_task.Config)
"""


@pytest.mark.parametrize(
  ('error', 'said', 'code'),
  [
    ("flags.UserError('no data')", 'error: no data', 1),
    ("OSError('gone')", 'OSError: gone', 1),
    ('KeyboardInterrupt', 'Ctrl-C', 130),
  ],
)
def test_one_of_several_that_fails_does_not_wait_for_the_others(
  error: str, said: str, code: int
) -> None:
  """They wait for it: only its end ends them."""
  ended = subprocess.run(
    [sys.executable, '-c', ONE_OF_TWO.format(error)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert (ended.returncode, ended.stdout) == (code, ''), ended.stderr
  assert said in ended.stderr


def test_all_processes_write_to_the_folder_of_the_first(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Without --workdir each names one after its own clock."""
  monkeypatch.setattr(
    processes,
    'on_first_process',
    lambda function, *args: str(tmp_path / 'first') if args else function(),
  )
  assert (
    workdir.open_workdir(str(tmp_path / 'second'), 'add_task', add_task.Config())
    == tmp_path / 'first'
  )


@pytest.mark.parametrize(
  'shard_params', [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_data_parallel_is_one_device(
  tmp_path: Path, shard_params: bool, capsys: pytest.CaptureFixture[str]
) -> None:
  """On all eight simulated devices, weights split or not: the metrics of one; a batch
  they do not divide is refused.
  """
  settings = {
    **FAMILIES['add_task'],
    'method': ('fptt',),
    'batches': 6,
    'optimizer': 'sgd',
    'lr': 0.1,
  }
  add_task.run(add_task.Config(**settings, devices=1), str(tmp_path / 'one'))
  add_task.run(
    add_task.Config(**settings, data_parallel=True, shard_params=shard_params),
    str(tmp_path / 'all'),
  )
  whole, here = map(
    float,
    re.search(
      r'optimizer state: (\S+) MB, (\S+) MB on each of 8 devices',
      capsys.readouterr().out,
    ).groups(),
  )
  assert (here < 0.5 * whole) == shard_params
  rows = [
    files.read_jsonl(tmp_path / name / 'fptt-seed0' / 'metrics.jsonl')
    for name in ('one', 'all')
  ]
  for got, wanted in zip(*rows, strict=True):
    names = [name for name in wanted if name != 'seconds']
    np.testing.assert_allclose(
      [got[name] for name in names], [wanted[name] for name in names], rtol=1e-5
    )
  with pytest.raises(
    flags.UserError,
    match=r'--batch_size must be .*, got 9\.',
  ):
    add_task.run(
      add_task.Config(**{**settings, 'batch_size': 9}, data_parallel=True),
      str(tmp_path / 'other'),
    )


def test_data_on_the_host(tmp_path: Path) -> None:
  """Images handed over chunk by chunk are the images read on the device; the programs
  sum up in orders of their own.
  """
  settings = {
    **FAMILIES['images'],
    'data_dir': synthetic.data_files(tmp_path / 'data')['images'],
    'method': ('fptt',),
    'row': True,
  }
  results = []
  for host_data in (False, True):
    config = images.Config(
      **{
        **settings,
        'epochs': 2,
        'divergence': 'example',
        'steps_per_call': 2,
        'host_data': host_data,
      }
    )
    images.run(config, str(tmp_path / str(host_data)))
    results.append(
      [
        {**row, 'seconds': 0}
        for row in files.read_jsonl(
          tmp_path / str(host_data) / 'fptt-seed0' / 'metrics.jsonl'
        )
      ]
    )
  chex.assert_trees_all_close(*results, rtol=1e-5)
