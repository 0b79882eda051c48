"""A run's folder: its configuration, metrics, checkpoints and summary.

WORKDIR/config.json        what was asked for WORKDIR/NAME/metrics.jsonl one line an
interval (NAME is method, seed and values out of a grid) WORKDIR/NAME/checkpoints/  the
whole carry, so that the same command goes on where a killed run stopped
WORKDIR/NAME/broken/       checkpoints that could not be read again WORKDIR/NAME/lock
held by the process that trains it WORKDIR/NAME/result.json   what this run came to;
there when it has ended WORKDIR/NAME/parameters.npz  the parameters that it is measured
at, for experiments.load_run WORKDIR/data.json          what a model has to know of its
data, such as the vocabulary WORKDIR/summary.json       what came out, and on which
machine
"""

import asyncio
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from pathlib import Path
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
from typing import IO, Any, Literal, NoReturn
import zipfile
import zlib

import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import processes
from experiments.options import UserError, command
import fptt_jax

NO_SETTINGS = (
  *(
    'workdir',
    'data_dir',
    'devices',
    'population',
    'chunk',
    'host_data',
    'keep',
    'checkpoint_minutes',
    'allow_config_change',
  ),
  *('logger', 'tune', 'sample', 'prompt', 'temperature', 'sample_seed'),
  *('data_parallel', 'shard_params', 'coordinator', 'num_processes', 'process_id'),
)
"""Where and how a run runs, which is not what it is: it may go on otherwise."""
JOINING = ('method', 'seeds', 'grid')
"""What may differ from command to command in one folder: each run has a folder of its
own there.
"""


RECORDED = {'seconds', 'lines', 'config_sha256', 'arrays', 'sha256'}
"""What is kept beside each carry, whatever the script adds."""


PARAMETERS = 'parameters.npz'
"""Name of the file of a run's best parameters."""


class Broken(Exception):
  """A checkpoint cannot be read, or does not hold what was saved; it has been set
  aside, and the text says so.
  """


class _PatientLoop(asyncio.SelectorEventLoop):
  """An event loop that lets all tasks end before it closes.

  Orbax reads all arrays at once in a loop of its own and closes it at the first error;
  each read that ends later prints a traceback, "Event loop is closed".
  """

  def close(self) -> None:
    """Wait for the tasks, whatever becomes of them, and close the loop."""
    while not self.is_closed() and (tasks := asyncio.all_tasks(self)):
      self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    super().close()


@contextlib.contextmanager
def _patient_loops() -> Iterator[None]:
  """Make event loops that wait; orbax takes none from outside."""
  make_loop = asyncio.new_event_loop
  asyncio.new_event_loop = _PatientLoop
  try:
    yield
  finally:
    asyncio.new_event_loop = make_loop


class Run:
  """One training run (a method and a seed) in its own folder, below that of
  :func:`open_workdir`.

  Attributes:
    folder: where it writes.
    rows: the metrics lines so far, restored ones included.
  """

  def __init__(self, folder: Path, keep: int = 2):
    self.folder = folder
    self.rows: list[dict[str, Any]] = []
    with self._writing():
      options = ocp.CheckpointManagerOptions(max_to_keep=keep)
      self._checkpoints = ocp.CheckpointManager(
        (folder / 'checkpoints').absolute(), options=options
      )
      with tempfile.TemporaryFile(dir=folder / 'checkpoints'):
        pass  # Orbax tells only after the first interval that it cannot write there.
    self._seconds_before = 0.0
    self._started = time.perf_counter()

  def restore(self, step: int, carry: Any) -> tuple[Any, dict[str, Any]]:
    """(carry, record) as they were saved after `step`, or (`carry`, {}) for step 0.

    What was written later is dropped: those steps are about to be run again.

    Raises:
      Broken: the checkpoint does not hold what was saved.
      UserError: it is of another configuration or shape than `carry`, or its metrics
        are gone.
    """
    record = self._read(step, record=ocp.args.JsonRestore()).record if step else {}
    if step:
      if not isinstance(record, dict) or not record.keys() >= RECORDED:
        self._set_aside(step, 'its record is not one of ours')
      self._check_fits(step, record, carry)
      carry = self._read(step, carry=ocp.args.StandardRestore(carry)).carry
      if fingerprint(carry) != record['sha256']:
        self._set_aside(step, 'it does not hold what was saved')
      self._seconds_before = record['seconds']
    self.rows = processes.told(self._rewind, step, record.get('lines', 0))
    with self._writing():
      for later in [saved for saved in self._checkpoints.all_steps() if saved > step]:
        self._checkpoints.delete(later)
    return carry, record

  def _rewind(self, step: int, lines: int) -> list[dict[str, Any]]:
    """The lines of metrics that a checkpoint counts on; those after them go."""
    metrics = self.folder / 'metrics.jsonl'
    rows = read_jsonl(metrics)
    if len(rows) < lines:
      raise UserError(
        f'{metrics} has {len(rows)} lines, the checkpoint after step {step} was saved '
        f'after {lines}: put it back.'
      )
    with self._writing(), replaced(metrics) as file:
      file.writelines(json.dumps(row) + '\n' for row in rows[:lines])
    return rows[:lines]

  def _read(self, step: int, **arguments: Any) -> Any:
    found, reason = None, ''
    try:
      with _patient_loops():
        found = self._checkpoints.restore(step, args=ocp.args.Composite(**arguments))
    except (MemoryError, jax.errors.JaxRuntimeError):  # Not the checkpoint's fault.
      raise
    except Exception as error:  # Of many types, one for each way to be broken.
      if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise UserError(f'cannot read {self.folder}: {_reason(error)}.') from error
      reason = _reason(error)
    if processes.agreed(bool(reason)):
      self._set_aside(step, reason or 'another process cannot read it')
    return found

  def _set_aside(self, step: int, reason: str) -> NoReturn:
    self._checkpoints.close()
    before = [saved for saved in saved_steps(self.folder) if saved != step]
    which = f'{self.folder}: the checkpoint after step {step} is broken ({reason})'
    if not before:
      raise UserError(
        f'{which}, and there is no other. Delete {self.folder} to start this run anew.'
      )
    target = Path(processes.told(self._move, step)).relative_to(self.folder)
    raise Broken(
      f'{which}; set aside as {target}, going on from the one after step {before[-1]}'
    )

  def _move(self, step: int) -> str:
    target = self.folder / 'broken' / f'{step}-{time.strftime("%Y%m%d-%H%M%S")}'
    with self._writing():
      target.parent.mkdir(exist_ok=True)
      (self.folder / 'checkpoints' / str(step)).rename(target)
    return str(target)

  def _check_fits(self, step: int, record: dict[str, Any], carry: Any) -> None:
    """Whether the checkpoint was saved under the folder's configuration, and holds
    arrays of the same shapes.
    """
    config = read_config(self.folder.parent)
    known = [
      config['sha256'],
      *(override['sha256'] for override in config['overrides']),
    ]
    which = f'{self.folder}: the checkpoint after step {step}'
    if record['config_sha256'] not in known:
      raise UserError(
        f'{which} was saved under a configuration that config.json does not name.'
      )
    differ = differences(record['arrays'], describe(carry))
    if differ:
      more = f' and {len(differ) - 3} more' if len(differ) > 3 else ''
      back = ' To go back: the settings that "overrides" of config.json say there were, with --allow_config_change.'
      raise UserError(
        f'{which} does not fit this model and optimizer; '
        f'{"; ".join(differ[:3])}{more}.{back if config["overrides"] else ""}'
      )

  def log(self, step: int, **metrics: Any) -> dict[str, Any]:
    """Appends a line to metrics.jsonl; `seconds` is the wall-clock, restarts included;
    numbers that are not finite become null.
    """
    finite = {
      name: value if math.isfinite(value) else None for name, value in metrics.items()
    }
    row = {'step': step, 'seconds': round(self.seconds, 2), **finite}
    self.rows.append(row)
    processes.told(self._append, row)
    return row

  def _append(self, row: dict[str, Any]) -> None:
    with (
      self._writing(),
      (self.folder / 'metrics.jsonl').open('a', encoding='utf-8') as file,
    ):
      file.write(json.dumps(row) + '\n')
      file.flush()
      os.fsync(
        file.fileno()
      )  # A checkpoint saved after it, which counts on it, outlives a power cut.

  def save(self, step: int, carry: Any, **record: Any) -> None:
    """Saves the carry after `step`, in the background."""
    described = {
      'seconds': self.seconds,
      'lines': len(self.rows),
      'config_sha256': config_sha256(self.folder.parent),
      'arrays': describe(carry),
      'sha256': fingerprint(carry),
    }
    arguments = ocp.args.Composite(
      carry=ocp.args.StandardSave(carry),
      record=ocp.args.JsonSave({**described, **record}),
    )
    with self._writing():
      self._checkpoints.save(step, args=arguments)

  def wait(self) -> None:
    """Waits for the last checkpoint."""
    with self._writing():
      self._checkpoints.wait_until_finished()

  def column(self, name: str) -> list[float]:
    """One metric of all rows so far."""
    return [row[name] for row in self.rows]

  @property
  def seconds(self) -> float:
    """Wall-clock of the run so far, that of earlier processes included."""
    return self._seconds_before + time.perf_counter() - self._started

  def close(self) -> None:
    """Waits for the last checkpoint; nothing more is saved."""
    with self._writing():
      self._checkpoints.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns what a full or read-only disk raises into one line."""
    try:
      yield
    except (OSError, ValueError) as error:  # tensorstore's, too, are ValueErrors.
      last = max(saved_steps(self.folder), default=0)
      state = (
        f'The checkpoint after step {last} is whole: the same command goes on from it.'
        if last
        else 'There is no checkpoint.'
      )
      raise UserError(
        f'cannot write to {self.folder}: {_reason(error)}. {state}'
      ) from error


def _reason(error: Exception) -> str:
  """The first line of what an exception says, or what it is."""
  line = next(iter(str(error).splitlines()), type(error).__name__)
  return textwrap.shorten(line, 300, placeholder=' ...').rstrip('.')


def describe(carry: Any) -> dict[str, str]:
  """Shape and dtype of each array, by where it is in the tree."""
  leaves = jax.tree.leaves_with_path(carry)
  return {
    jax.tree_util.keystr(path): f'{leaf.dtype}{list(leaf.shape)}'
    for path, leaf in leaves
  }


def fingerprint(carry: Any) -> str:
  """SHA-256 of all numbers in a tree of arrays, which file formats do not all check."""
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(carry):
    numbers = (
      jax.random.key_data(leaf)
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      else leaf
    )
    found.update(np.ascontiguousarray(processes.whole(numbers)).view(np.uint8))
  return found.hexdigest()


def open_workdir(workdir: str, script: str, config: Any, **identity: str) -> Path:
  """Makes the folder and writes config.json, or checks that the folder was made with
  the same configuration.

  Other methods, seeds and values of a grid may join those that are there: each run has
  its own folder. `identity` says what else makes it the same run, such as a hash of the
  data. With `config.allow_config_change` other settings are taken, and config.json says
  which were there before.

  Raises:
    UserError: the folder holds runs of another configuration, or cannot be written.
  """
  folder = Path(workdir).absolute()
  _check_letters(folder)
  described = {
    'script': script,
    **json.loads(json.dumps(dataclasses.asdict(config))),
    **identity,
  }
  for name in NO_SETTINGS:
    described.pop(name, None)
  described['sha256'] = hashlib.sha256(
    json.dumps(_settings(described), sort_keys=True).encode()
  ).hexdigest()
  alike = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if name not in ('workdir', 'data_dir', 'process_id')
  }
  settings = json.loads(json.dumps(alike))
  if processes.agreed(processes.told(lambda: settings) != settings):
    raise UserError(
      'the processes were started with different settings; only --process_id and '
      'folders may differ.'
    )
  return Path(processes.told(_claim, folder, described, config.allow_config_change))


def _check_letters(folder: Path) -> None:
  """Raise if orbax cannot take a folder's name.

  It takes Unicode; of bytes that the locale's encoding lacks Python makes something
  else.
  """
  try:
    str(folder).encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'--workdir={folder} has letters that the encoding {sys.getfilesystemencoding()} '
      'lacks: '
      'choose another name, or set PYTHONUTF8=1.'
    ) from error


def _claim(folder: Path, described: dict[str, Any], override: bool) -> str:
  """Writes config.json, or checks what is there; the folder is the first process's:
  those of others may have another date.
  """
  path, overrides = folder / 'config.json', []
  try:
    if path.exists():
      found = read_config(folder)
      overrides = found['overrides']
      differ = differences(_settings(found), _settings(described))
      if differ and not override:
        raise UserError(
          f'{folder} holds runs of another configuration; {"; ".join(differ)}. Choose '
          'another --workdir, or go on with '
          'these runs by --allow_config_change.'
        )
      if differ:
        print(f'{folder} goes on with other settings than before; {"; ".join(differ)}')
        overrides = [*overrides, {'sha256': found['sha256'], 'differences': differ}]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**described, 'overrides': overrides})
  except OSError as error:
    raise UserError(f'cannot write to --workdir={folder}: {error}') from error
  return str(folder)


def _settings(described: dict[str, Any]) -> dict[str, Any]:
  """What makes the runs of a folder what they are."""
  return {
    name: value
    for name, value in described.items()
    if name not in (*JOINING, 'sha256', 'overrides')
  }


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """What two descriptions do not agree in."""
  names = sorted({*was, *now})
  return [
    f'{name}: was {was.get(name)!r}, now {now.get(name)!r}'
    for name in names
    if was.get(name) != now.get(name)
  ]


@contextlib.contextmanager
def locked(folders: Sequence[Path]) -> Iterator[None]:
  """Keeps runs to this process, and those beside it, until they have been trained; a
  process that dies lets go of them.

  Raises:
    UserError: they are being trained elsewhere, or a folder cannot be written.
  """
  with contextlib.ExitStack() as held:

    def hold() -> None:
      for folder in folders:
        try:
          folder.mkdir(exist_ok=True)
          held.enter_context(filelock.FileLock(folder / 'lock', timeout=0))
        except filelock.Timeout as error:
          raise UserError(
            f'{folder} is being trained by another command; wait for it, or choose '
            'another --workdir.'
          ) from error
        except OSError as error:
          raise UserError(f'cannot write to {folder}: {error}') from error

    processes.told(hold)
    yield


def config_sha256(folder: Path) -> str:
  """Hash of the configuration that a folder's runs have."""
  found: str = read_config(folder)['sha256']
  return found


def read_config(folder: Path) -> dict[str, Any]:
  """Read a folder's config.json.

  Args:
    folder: a --workdir.

  Returns:
    The settings, with 'sha256' and 'overrides'.

  Raises:
    UserError: the file cannot be read, or is not one that a script wrote.
  """
  path = folder / 'config.json'
  config = read_json(path, ('script', 'sha256', 'overrides'))
  overrides = config['overrides']
  whole = isinstance(overrides, list) and all(
    isinstance(override, dict) and 'sha256' in override for override in overrides
  )
  if not whole:
    raise _damaged(str(path), '"overrides" is not a list of earlier settings')
  return config


def saved_steps(folder: Path) -> list[int]:
  """List the steps after which a run was saved, in order.

  What a killed process left half-made is not among them.

  Raises:
    UserError: the folder of the checkpoints is there and cannot be read.
  """
  path = folder / 'checkpoints'
  try:
    names = os.listdir(path)
  except FileNotFoundError:
    return []
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}.') from error
  return sorted(int(name) for name in names if name.isdigit())


def saved_beside(folder: Path, step: int) -> dict[str, Any]:
  """What was recorded beside the carry after that step; {} if that cannot be read."""
  try:
    record = json.loads(
      (folder / 'checkpoints' / str(step) / 'record' / 'metadata').read_bytes()
    )
  except (OSError, ValueError):
    return {}
  return record if isinstance(record, dict) else {}


def write_summary(
  folder: Path, runs: list[dict[str, Any]], best: str | None = None
) -> None:
  """Writes what came out, which run was the best, and what they ran on."""
  chosen = {} if best is None else {'best': best}
  write_json(
    folder / 'summary.json',
    {'config': read_config(folder), **chosen, 'runs': runs, **machine()},
  )


def machine(*packages: str) -> dict[str, Any]:
  """What this process is, and what it runs on.

  Args:
    *packages: packages whose versions are told, too, if they are installed.

  Returns:
    command and commit (None where they are not known), hardware, versions.
  """
  devices = sorted({device.device_kind for device in jax.devices()})
  versions = {'python': platform.python_version(), 'fptt_jax': fptt_jax.__version__}
  for package in ('jax', 'jaxlib', 'flax', 'optax', 'numpy', *packages):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {
    'command': command(),
    'commit': _commit(),
    'hardware': {
      'devices': devices,
      'number': len(jax.devices()),
      'cpu': _cpu(),
      'cpu_cores': os.cpu_count(),
      'machine': platform.machine(),
    },
    'versions': versions,
  }


def _commit() -> str | None:
  """The revision of this code, '-dirty' if files differ; None outside a repository."""
  describe_command = [
    'git',
    'describe',
    '--always',
    '--dirty',
    '--exclude=*',
    '--abbrev=12',
  ]
  try:
    found = subprocess.run(
      describe_command,
      cwd=Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip()


def _cpu() -> str | None:
  """The processor's name, where the system tells."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor() or None
  return next(
    (line.partition(':')[2].strip() for line in lines if line.startswith('model name')),
    None,
  )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
  """Read the whole lines of a metrics file; a last line cut off by a kill is left out.

  Args:
    path: the file; one that is not there has no lines.

  Returns:
    A row per line.

  Raises:
    UserError: the file cannot be read, or a line is not a row of metrics.
  """
  if not exists(path):
    return []
  rows = []
  for number, line in enumerate(_read_bytes(path).splitlines(keepends=True), start=1):
    if line.endswith(b'\n'):
      rows.append(_parsed(line, f'line {number} of {path}', ('step',)))
  return rows


def read_json(path: Path, names: Sequence[str] = ()) -> dict[str, Any]:
  """Read a JSON file that holds an object.

  Args:
    path: the file.
    names: what the object must have.

  Returns:
    The object.

  Raises:
    UserError: the file cannot be read, or holds something else.
  """
  return _parsed(_read_bytes(path), str(path), names)


def exists(path: Path) -> bool:
  """Return whether a file is there.

  Raises:
    UserError: the folder that it would be in cannot be read.
  """
  try:
    return path.exists()
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}.') from error


def _read_bytes(path: Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}.') from error


def read_rows(path: Path) -> list[dict[str, Any]]:
  """Read a JSON file that holds a list of objects.

  Args:
    path: the file.

  Returns:
    The objects.

  Raises:
    UserError: the file cannot be read, or holds something else.
  """
  content = _json(_read_bytes(path), str(path))
  if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
    raise _damaged(
      str(path), f'it holds {json.dumps(content)[:40]}, not a list of objects'
    )
  return content


def _parsed(text: bytes, which: str, names: Sequence[str]) -> dict[str, Any]:
  content = _json(text, which)
  if not isinstance(content, dict):
    raise _damaged(which, f'it holds {json.dumps(content)[:40]}, not an object')
  missing = [name for name in names if name not in content]
  if missing:
    raise _damaged(which, f'it has no "{missing[0]}"')
  return content


def _json(text: bytes, which: str) -> Any:
  try:
    return json.loads(text.decode())
  except (ValueError, RecursionError) as error:
    raise _damaged(which, str(error)) from error


def _damaged(which: str, reason: str) -> UserError:
  return UserError(
    f'{which} is damaged: {reason}. Put it back, or choose another --workdir.'
  )


def make_folder(path: str) -> Path:
  """The folder, made if need be.

  Raises:
    UserError: it cannot be.
  """
  folder = Path(path).absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'cannot write to --workdir={folder}: {error}') from error
  return folder


def write_parameters(folder: Path, params: Any) -> None:
  """Write a run's best parameters; in several processes all call it, the first one
  writes.

  Args:
    folder: the run's folder.
    params: a tree of arrays.

  Raises:
    UserError: the file cannot be written.
  """
  leaves = jax.tree.leaves_with_path(params)
  arrays = {
    jax.tree_util.keystr(place): processes.whole(leaf) for place, leaf in leaves
  }
  path = folder / PARAMETERS

  def write() -> None:
    with user_errors(path), replaced(path, 'wb') as file:
      np.savez(file, **arrays, config_sha256=np.array(config_sha256(folder.parent)))

  processes.told(write)


def read_parameters(folder: Path, template: Any, config_sha256: str) -> Any:
  """Read what :func:`write_parameters` wrote.

  Args:
    folder: the run's folder.
    template: a tree of arrays, or of shapes and dtypes, as the parameters have.
    config_sha256: hash of the configuration that they are of.

  Returns:
    A tree like `template`, of JAX arrays.

  Raises:
    UserError: the file is not there, damaged or of another model.
  """
  path = folder / PARAMETERS
  try:
    with path.open('rb') as raw, np.load(raw) as file:
      arrays = {name: file[name] for name in file.files}
  except FileNotFoundError as error:
    raise UserError(
      f'there is no {path}: put it back, or train this run again.'
    ) from error
  except (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise UserError(
      f'{path} is damaged: {_reason(error)}. Put it back, or train this run again.'
    ) from error
  found = str(arrays.pop('config_sha256', ''))
  if found != config_sha256:
    raise UserError(
      f'{path} is of another configuration than config.json: put it back, or train '
      'this run again.'
    )
  differ = differences(
    describe(template),
    {name: f'{leaf.dtype}{list(leaf.shape)}' for name, leaf in arrays.items()},
  )
  if differ:
    raise UserError(
      f'{path} does not fit the model of config.json; {"; ".join(differ[:3])}.'
    )
  fetch = lambda place, leaf: jax.numpy.asarray(arrays[jax.tree_util.keystr(place)])
  return jax.tree.map_with_path(fetch, template)


def write_json(path: Path, content: Any) -> None:
  """As :func:`write_text`, as JSON."""
  write_text(path, json.dumps(content, indent=2) + '\n')


def write_text(path: Path, text: str) -> None:
  """Writes it whole or not at all.

  Raises:
    UserError: it cannot be written.
  """
  with user_errors(path), replaced(path) as file:
    file.write(text)


@contextlib.contextmanager
def user_errors(path: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write {path}: {error}. The same command goes on from what is saved.'
    ) from error


@contextlib.contextmanager
def replaced(path: Path, mode: Literal['w', 'wb'] = 'w') -> Iterator[IO[Any]]:
  """Open a file, of text or bytes, that takes the place of `path` when it is
  complete.
  """
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open(mode, encoding='utf-8' if mode == 'w' else None) as file:
    yield file
  temporary.replace(path)
