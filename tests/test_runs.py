"""A run's folder: what is saved can be read again or is refused, and nothing passes for
what it is not.
"""

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import gc
import json
import os
from pathlib import Path
import resource
import shutil
import subprocess
import sys
from typing import Any

import filelock
from interruption import interrupted_at
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import add_task
from experiments.core import checkpoints, files, plotting, schedule, workdir
from experiments.core.flags import UserError
from experiments.core.schedule import Member, has_ended

pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)

ROOT = Path(__file__).parents[1]
TINY = dict(
  method=('fptt',),
  seq_len=12,
  hidden=4,
  batch_size=8,
  batches=6,
  eval_every=2,
  test_size=16,
  num_windows=3,
)
WEIGHTS = {
  'w': jax.random.normal(jax.random.key(0), (50, 50), jnp.float32),
  'n': jnp.int32(3),
  'm': jnp.ones(3, jnp.bfloat16),
}
CARRY = (WEIGHTS, jax.random.key(7))


@pytest.fixture(autouse=True)
def leftovers() -> Iterator[None]:
  """What orbax leaves behind of reading that failed complains when it is collected:
  here, not in a test of something else.
  """
  yield
  gc.collect()


def saved_run(folder: Path, *steps: int) -> Path:
  """A run saved after some steps, a line of metrics before each."""
  workdir.open_workdir(str(folder), 'add_task', add_task.Config())
  run = checkpoints.Run(folder / 'run')
  for step in steps:
    run.log(step, loss=1.0)
    run.save(step, CARRY, note=step)
  run.close()
  return folder / 'run'


def largest(folder: Path) -> Path:
  return max(
    (path for path in folder.rglob('*') if path.is_file()),
    key=lambda path: path.stat().st_size,
  )


def flip(path: Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


def truncate(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
  """Arrays of several dtypes, keys, the record; what was written later is dropped."""
  folder = saved_run(tmp_path, 1, 2, 3)
  run = checkpoints.Run(folder)
  carry, record = run.restore(2, CARRY)
  run.close()
  assert checkpoints.fingerprint(carry) == checkpoints.fingerprint(CARRY)
  assert record['note'] == 2
  assert (
    [row['step'] for row in run.rows]
    == [row['step'] for row in files.read_jsonl(folder / 'metrics.jsonl')]
    == [1, 2]
  )
  assert checkpoints.saved_steps(folder) == [2]


@pytest.mark.parametrize(
  'damage',
  [
    lambda folder: flip(largest(folder)),  # Read without complaint: its content tells.
    lambda folder: truncate(largest(folder)),
    lambda folder: largest(folder).unlink(),
    lambda folder: truncate(folder / 'carry' / '_METADATA'),
    lambda folder: (folder / 'carry' / 'manifest.ocdbt').unlink(),
    lambda folder: flip(folder / 'record' / 'metadata'),
    lambda folder: truncate(folder / 'record' / 'metadata'),
    lambda folder: (folder / 'record' / 'metadata').unlink(),
  ],
)
def test_a_broken_checkpoint_is_set_aside(
  tmp_path: Path, damage: Callable[[Path], None]
) -> None:
  """However it is broken: it is said, kept, and the one before it can be gone on
  from.
  """
  folder = saved_run(tmp_path, 1, 2)
  damage(folder / 'checkpoints' / '2')
  said = (
    r'the checkpoint after step 2 is broken \(.+\); set aside as broken/2-\d+-\d+; '
    r'resuming from the one after step 1'
  )
  with pytest.raises(checkpoints.BrokenCheckpoint, match=said):
    checkpoints.Run(folder).restore(2, CARRY)
  assert checkpoints.saved_steps(folder) == [1]
  assert len(list((folder / 'broken').iterdir())) == 1
  run = checkpoints.Run(folder)
  carry, _ = run.restore(1, CARRY)
  run.close()
  assert checkpoints.fingerprint(carry) == checkpoints.fingerprint(CARRY)


def test_a_run_goes_on_from_the_newest_intact_checkpoint(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """A whole script: it says so and ends with the numbers of a run that nothing befell;
  without one it does nothing.
  """
  config = add_task.Config(**TINY)
  add_task.run(config, str(tmp_path / 'whole'))
  expected = json.loads(
    (tmp_path / 'whole' / 'fptt-seed0' / 'result.json').read_text()
  ) | {'seconds': 0}
  folder = tmp_path / 'cut'
  with interrupted_at(3):
    add_task.run(config, str(folder))
  shutil.copytree(folder, tmp_path / 'lost')
  flip(largest(folder / 'fptt-seed0' / 'checkpoints' / '4'))
  capsys.readouterr()
  add_task.run(config, str(folder))
  assert 'resuming from the one after step 2' in capsys.readouterr().err
  assert (
    json.loads((folder / 'fptt-seed0' / 'result.json').read_text()) | {'seconds': 0}
    == expected
  )
  lost = tmp_path / 'lost' / 'fptt-seed0'
  for step in (2, 4):
    flip(largest(lost / 'checkpoints' / str(step)))
  metrics = (lost / 'metrics.jsonl').read_text()
  for _ in range(2):
    with pytest.raises(
      UserError,
      match=(
        r'after step 2 is broken \(.*\), and there is no other\. Delete .*fptt-seed0 '
        r'to'
      ),
    ):
      add_task.run(config, str(tmp_path / 'lost'))
  assert (lost / 'metrics.jsonl').read_text() == metrics


@pytest.mark.parametrize(
  'error',
  [MemoryError(), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')],
)
def test_what_is_not_the_checkpoints_fault_sets_nothing_aside(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
  """A device without room today."""
  folder = saved_run(tmp_path, 1, 2)
  run = checkpoints.Run(folder)

  def fail(*args: Any, **kwargs: Any) -> None:
    raise error

  monkeypatch.setattr(run._checkpoints, 'restore', fail)
  with pytest.raises(type(error)):
    run.restore(2, CARRY)
  run.close()
  assert checkpoints.saved_steps(folder) == [1, 2]


@pytest.mark.parametrize('record', ['{}', '[]'])
def test_a_record_of_something_else_is_broken(tmp_path: Path, record: str) -> None:
  """JSON, but not what was saved."""
  folder = saved_run(tmp_path, 1, 2)
  (folder / 'checkpoints' / '2' / 'record' / 'metadata').write_text(record)
  with pytest.raises(
    checkpoints.BrokenCheckpoint,
    match=r'after step 2 is broken \(its record is not one of ours\)',
  ):
    checkpoints.Run(folder).restore(2, CARRY)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
  """Nothing is set aside: it is whole, and for another model."""
  folder = saved_run(tmp_path, 1)
  other = (CARRY[0] | {'w': jnp.zeros((50, 60))}, CARRY[1])
  with pytest.raises(
    UserError,
    match=(
      r"after step 1 does not fit this model and optimizer; \[0\]\['w'\]: was "
      r"'float32\[50, 50\]', now"
    ),
  ):
    checkpoints.Run(folder).restore(1, other)
  assert checkpoints.saved_steps(folder) == [1]


def test_a_checkpoint_of_a_configuration_nobody_knows_is_refused(
  tmp_path: Path,
) -> None:
  """config.json was changed by hand, or the folder was put together from two."""
  folder = saved_run(tmp_path, 1)
  config = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config | {'sha256': '0'}))
  with pytest.raises(
    UserError, match=r'saved under a configuration that config\.json does not name'
  ):
    checkpoints.Run(folder).restore(1, CARRY)


def test_metrics_that_are_gone_or_damaged_are_not_made_up_for(tmp_path: Path) -> None:
  """Fewer lines than the checkpoint knows of, and a line that is no JSON."""
  folder = saved_run(tmp_path, 1, 2)
  metrics = folder / 'metrics.jsonl'
  lines = metrics.read_text().splitlines(keepends=True)
  metrics.write_text(lines[0])
  with pytest.raises(
    UserError,
    match=(
      r'metrics\.jsonl has 1 lines, the checkpoint after step 2 was saved after 2: '
      r'put it back'
    ),
  ):
    checkpoints.Run(folder).restore(2, CARRY)
  metrics.write_text('{"step": 1, }\n' + lines[1])
  with pytest.raises(
    UserError,
    match=(
      r'line 1 of .*metrics\.jsonl is damaged: .*Put it back, or choose another '
      r'--workdir'
    ),
  ):
    checkpoints.Run(folder).restore(2, CARRY)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(UserError, match=r'config\.json is damaged'):
    workdir.open_workdir(str(tmp_path), 'add_task', add_task.Config())


def test_reads_under_way_end_before_their_loop_is_closed(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """After the first error, too, or each of them would print a traceback."""
  ended: list[str] = []

  class Observed(checkpoints._PatientLoop):
    def close(self) -> None:
      super().close()
      ended.append('closed')

  async def read() -> None:
    await asyncio.sleep(0.02)
    ended.append('read')

  async def fail() -> None:
    tasks.append(asyncio.ensure_future(read()))
    raise OSError('the first error')

  tasks: list[Any] = []
  make_loop = asyncio.new_event_loop
  monkeypatch.setattr(checkpoints, '_PatientLoop', Observed)
  with checkpoints._patient_loops():
    loop = asyncio.new_event_loop()
  with pytest.raises(OSError, match='first'):
    loop.run_until_complete(fail())
  loop.close()
  assert ended == ['read', 'closed']
  folder = saved_run(tmp_path, 1, 2)
  ended.clear()
  checkpoints.Run(saved_run(tmp_path / 'intact', 1)).restore(1, CARRY)
  # Orbax before 0.12 reads in a loop of nest_asyncio's, which stays open.
  closes_loops = 'closed' in ended
  assert closes_loops or 'nest_asyncio' in sys.modules
  ended.clear()
  truncate(largest(folder / 'checkpoints' / '2'))
  with pytest.raises(checkpoints.BrokenCheckpoint):
    checkpoints.Run(folder).restore(2, CARRY)
  assert ('closed' in ended) == closes_loops
  assert asyncio.new_event_loop is make_loop


KINDS = [
  '[1]',
  '3',
  'null',
  '"text"',
  'true',
  '{}',
  '',
  '{"step": 1',
  '\0\0',
  '\ufeff{}',
  '[' * 100_000,
]


@pytest.mark.parametrize('content', KINDS, ids=[content[:9] for content in KINDS])
@pytest.mark.parametrize('name', ['config.json', 'metrics.jsonl', 'result.json'])
def test_json_of_another_kind_is_refused(
  name: str, content: str, tmp_path: Path
) -> None:
  """Whatever it holds: one line with the file's name. A result of no configuration is
  none: the run goes on.
  """
  member = Member(add_task.Config(), 'fptt', 0, {})
  folder = workdir.open_workdir(str(tmp_path), 'add_task', member.config) / member.name
  folder.mkdir()
  path = tmp_path / name if name == 'config.json' else folder / name
  path.write_text(content + '\n', encoding='utf-8')
  read: dict[str, Callable[[], Any]] = {
    'config.json': lambda: workdir.open_workdir(
      str(tmp_path), 'add_task', add_task.Config()
    ),
    'metrics.jsonl': lambda: files.read_jsonl(folder / name),
    'result.json': lambda: has_ended(tmp_path, member),
  }
  if (name, content) == ('result.json', '{}'):
    assert not has_ended(tmp_path, member)
    return
  with pytest.raises(UserError, match=rf'{name} is damaged: ') as caught:
    read[name]()
  assert '\n' not in str(caught.value)
  assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize('name', ['config.json', 'metrics.jsonl', 'result.json'])
def test_a_folder_in_a_file_s_place_is_refused(name: str, tmp_path: Path) -> None:
  """As is what may not be read."""
  (tmp_path / name).mkdir()
  read = files.read_jsonl if name.endswith('l') else files.read_json
  with pytest.raises(UserError, match=rf'cannot read .*{name}: Is a directory'):
    read(tmp_path / name)


def test_checkpoints_that_cannot_be_written_are_said_before_training(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A folder that is read-only while those around it are not; the tests' user may write
  everywhere.
  """
  folder = saved_run(tmp_path, 1)

  def refuse(dir: Path) -> Any:
    raise PermissionError(13, 'Permission denied', str(dir))

  monkeypatch.setattr(checkpoints.tempfile, 'TemporaryFile', refuse)
  with pytest.raises(
    UserError, match=r'cannot write to .*checkpoints.*step 1 is complete'
  ):
    checkpoints.Run(folder)


def test_checkpoints_that_cannot_be_read_are_not_taken_for_none(tmp_path: Path) -> None:
  """A file stands in their place: the run does not start anew."""
  folder = saved_run(tmp_path, 1)
  shutil.rmtree(folder / 'checkpoints')
  assert checkpoints.saved_steps(folder) == []
  (folder / 'checkpoints').write_text('')
  with pytest.raises(UserError, match=r'cannot read .*checkpoints: Not a directory'):
    checkpoints.saved_steps(folder)


def test_files_that_may_not_be_looked_at_are_said(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Made under umask 0777: neither taken for missing nor a traceback."""

  def refuse(path: Path, **options: Any) -> Any:
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr(Path, 'stat', refuse)
  with pytest.raises(
    UserError, match=r'cannot read .*metrics\.jsonl: Permission denied'
  ):
    files.read_jsonl(tmp_path / 'metrics.jsonl')
  monkeypatch.setattr(Path, 'open', refuse)
  monkeypatch.setattr(Path, 'read_bytes', refuse)
  with pytest.raises(UserError, match=r'cannot read .*config\.json: Permission denied'):
    workdir.read_config(tmp_path)


def test_a_folder_of_bytes_without_letters_is_refused(tmp_path: Path) -> None:
  """Orbax could not take it."""
  with pytest.raises(UserError, match=r'--workdir=.*PYTHONUTF8'):
    workdir.open_workdir(str(tmp_path / 'K\udcff'), 'add_task', add_task.Config())


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path: Path) -> None:
  """Here: files may not grow beyond 4 kB. What was saved before is whole, and it is
  said.
  """
  folder = saved_run(tmp_path, 1)
  run = checkpoints.Run(folder)
  carry, _ = run.restore(1, CARRY)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    with pytest.raises(
      UserError,
      match=(
        r'cannot write to .*/run: .*\. The checkpoint after step 1 is complete: the '
        r'same command'
      ),
    ):
      _ = (
        run.save(2, carry),
        run.wait(),
      )  # In the background: either may be the first to know.
    with contextlib.suppress(UserError):
      run.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  again = checkpoints.Run(folder)
  assert checkpoints.fingerprint(again.restore(1, CARRY)[0]) == checkpoints.fingerprint(
    CARRY
  )
  again.close()


def test_a_full_disk_while_metrics_are_written(tmp_path: Path) -> None:
  """The device that is always full."""
  folder = saved_run(tmp_path)
  run = checkpoints.Run(folder)
  (folder / 'metrics.jsonl').symlink_to('/dev/full')
  with pytest.raises(
    UserError,
    match=r'cannot write to .*No space left on device\. There is no checkpoint\.',
  ):
    run.log(1, loss=1.0)
  run.close()


def test_a_full_disk_when_a_run_has_ended(tmp_path: Path) -> None:
  """Its result is made again by the same command."""
  config, result = (
    add_task.Config(**TINY),
    tmp_path / 'fptt-seed0' / f'result.json.{os.getpid()}.tmp',
  )
  result.parent.mkdir()
  result.symlink_to('/dev/full')
  with pytest.raises(
    UserError,
    match=(
      r'cannot write .*/fptt-seed0/result\.json: .*No space left on device\. The '
      r'same command'
    ),
  ):
    add_task.run(config, str(tmp_path))
  result.unlink()
  assert add_task.run(config, str(tmp_path))[1][0]['batches'] == 6


def test_a_run_keeps_the_settings_that_it_was_opened_with(tmp_path: Path) -> None:
  """Another command changes the folder's configuration while a run is trained: the
  run's result is of the settings it was trained with, and has not ended under the
  others.
  """
  config = add_task.Config(lr=1e-3, **TINY)
  [member] = schedule.list_members(config)
  workdir.open_workdir(str(tmp_path), 'add_task', config)
  opened = json.loads((tmp_path / 'config.json').read_text())['sha256']
  other = f"""
import sys
from experiments import add_task
from experiments.core import workdir
config = add_task.Config(lr=3e-2, allow_config_change=True, **{TINY!r})
workdir.open_workdir(sys.argv[1], 'add_task', config)
"""
  subprocess.run([sys.executable, '-c', other, tmp_path], check=True, cwd=ROOT)
  changed = json.loads((tmp_path / 'config.json').read_text())['sha256']
  (tmp_path / member.name).mkdir()
  schedule.finish_run(tmp_path, member, {'test_mse': 0.5}, None)
  result = json.loads((tmp_path / member.name / 'result.json').read_text())
  assert result['config_sha256'] == opened != changed
  assert schedule.has_ended(tmp_path, member)
  workdir.open_workdir(str(tmp_path), 'add_task', dataclasses.replace(config, lr=3e-2))
  assert not schedule.has_ended(tmp_path, member)


def test_files_of_one_folder_may_be_written_side_by_side(tmp_path: Path) -> None:
  """No command takes another one's half-written file."""
  path = tmp_path / 'plot.json'
  with files.atomic_write(path) as file:
    file.write('{"first": 1}')
    program = 'import sys; from experiments.core import files; from pathlib import Path'
    program += "; files.write_json(Path(sys.argv[1]), {'second': 2})"
    subprocess.run([sys.executable, '-c', program, path], check=True, cwd=ROOT)
    assert json.loads(path.read_text()) == {'second': 2}
  assert json.loads(path.read_text()) == {'first': 1}
  assert [one.name for one in tmp_path.iterdir()] == ['plot.json']


def test_the_length_of_intervals_cannot_change_within_a_run(tmp_path: Path) -> None:
  """Intervals that were counted before would stand for other batches."""
  config = add_task.Config(**TINY)
  add_task.run(config, str(tmp_path))
  longer = dataclasses.replace(
    config, batches=12, eval_every=4, allow_config_change=True
  )
  with pytest.raises(UserError, match=r'--eval_every must stay .*was 2, now 4'):
    add_task.run(longer, str(tmp_path))
  # As it was, the run goes on.
  again = dataclasses.replace(longer, eval_every=2)
  _, [summary] = add_task.run(again, str(tmp_path))
  assert summary['batches'] == 12


def test_other_settings_by_override(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Refused, with what differs; or taken, said and kept: the learning rate is the new
  one, a run that had ended goes on.
  """
  config = add_task.Config(optimizer='sgd', lr=1e-3, decay=False, **TINY)
  add_task.run(config, str(tmp_path))
  before = files.read_jsonl(tmp_path / 'fptt-seed0' / 'metrics.jsonl')
  other = dataclasses.replace(config, batches=8, lr=1e-30)
  with pytest.raises(
    UserError,
    match=(
      r'batches: was 6, now 8; lr: was 0.001, now 1e-30\. Choose another --workdir, '
      r'or .*--allow_config_change'
    ),
  ):
    add_task.run(other, str(tmp_path))
  _, [summary] = add_task.run(
    dataclasses.replace(other, allow_config_change=True), str(tmp_path)
  )
  assert (
    'is resumed with other settings; batches: was 6, now 8; lr: was 0.001, '
    'now 1e-30' in capsys.readouterr().out
  )
  rows = files.read_jsonl(tmp_path / 'fptt-seed0' / 'metrics.jsonl')
  assert rows[:-1] == before
  assert (summary['batches'], rows[-1]['test_mse']) == (
    8,
    pytest.approx(before[-1]['test_mse'], rel=1e-6),
  )
  [override] = json.loads((tmp_path / 'config.json').read_text())['overrides']
  assert override['differences'] == [
    'batches: was 6, now 8',
    'lr: was 0.001, now 1e-30',
  ]
  add_task.run(other, str(tmp_path))  # From now on they are the folder's.


def test_a_run_that_has_ended_keeps_its_settings(tmp_path: Path) -> None:
  """With no batch left a new rate would only be a new label; settings that were changed
  and changed back are no change.
  """
  config = add_task.Config(lr=1e-3, decay=False, **TINY)
  _, [before] = add_task.run(config, str(tmp_path))
  other = dataclasses.replace(config, lr=1.0, allow_config_change=True)
  with pytest.raises(
    UserError, match=r'fptt-seed0 is finished.*lr: was 0\.001, now 1\.0'
  ):
    add_task.run(other, str(tmp_path))
  assert files.read_json(tmp_path / 'fptt-seed0' / 'result.json')['lr'] == 1e-3
  back = dataclasses.replace(config, allow_config_change=True)
  _, [after] = add_task.run(back, str(tmp_path))
  assert after['test_mse'] == before['test_mse']


def test_a_model_of_other_size_is_refused_even_so(tmp_path: Path) -> None:
  """Before anything is trained."""
  config = add_task.Config(**TINY)
  with interrupted_at(2):
    add_task.run(config, str(tmp_path))
  said = (
    r"does not fit this model and optimizer; .*hidden\[0\]\.c: was 'float32\[8, "
    r"4\]', now 'float32\[8, 5\]'; .* and 19 more\. "
    r'To go back, pass the earlier settings, which "overrides" of config\.json lists, '
    r'with --allow_config_change'
  )
  with pytest.raises(UserError, match=said):
    add_task.run(
      dataclasses.replace(config, hidden=5, allow_config_change=True), str(tmp_path)
    )
  _, [summary] = add_task.run(
    dataclasses.replace(config, allow_config_change=True), str(tmp_path)
  )
  assert summary['batches'] == 6


def test_two_commands_in_one_folder_do_not_train_the_same_run(tmp_path: Path) -> None:
  """The second is told so, and may go on with it when the first has ended."""
  config = add_task.Config(**{**TINY, 'seeds': (0, 1), 'population': 1})
  (tmp_path / 'run' / 'fptt-seed1').mkdir(parents=True)
  with (
    filelock.FileLock(tmp_path / 'run' / 'fptt-seed1' / 'lock'),
    pytest.raises(
      UserError, match='fptt-seed1 is being trained by another command; wait'
    ),
  ):
    add_task.run(config, str(tmp_path / 'run'))
  assert (tmp_path / 'run' / 'fptt-seed0' / 'result.json').exists()
  assert not (tmp_path / 'run' / 'fptt-seed1' / 'metrics.jsonl').exists()
  assert len(add_task.run(config, str(tmp_path / 'run'))[1]) == 2


def test_a_full_disk_while_a_plot_is_drawn(tmp_path: Path) -> None:
  """One line, as for all other files."""
  (tmp_path / f'plot.png.{os.getpid()}.tmp').symlink_to('/dev/full')
  curve = plotting.Curve('fptt', 'fptt', [1, 2], [0.1, 0.2])
  with pytest.raises(
    UserError,
    match=r'cannot write .*/plot\.png: .*No space left on device\. The same command',
  ):
    plotting.plot_curves(
      tmp_path / 'plot.png', {'batches': [curve]}, 'Adding problem', 'MSE', {}
    )


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
  """As many as asked for."""
  add_task.run(
    add_task.Config(max_to_keep=3, checkpoint_minutes=1e-9, steps_per_call=1, **TINY),
    str(tmp_path),
  )
  assert checkpoints.saved_steps(tmp_path / 'fptt-seed0') == [4, 5, 6]


def test_fingerprints_tell_arrays_apart() -> None:
  """One bit of one number does."""
  one = np.zeros(3, np.float32)
  other = one.copy()
  other.view(np.uint8)[0] = 1
  carries: list[Any] = [{'a': jnp.asarray(x)} for x in (one, other)]
  assert checkpoints.fingerprint(carries[0]) != checkpoints.fingerprint(carries[1])
