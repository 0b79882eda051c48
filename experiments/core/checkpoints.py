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
from collections.abc import Iterator
import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
import tempfile
import time
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.core import processes
from experiments.core.files import atomic_write, first_line, read_jsonl
from experiments.core.flags import UserError
from experiments.core.workdir import config_sha256, differences, read_config

RECORD_FIELDS = {'seconds', 'lines', 'config_sha256', 'arrays', 'sha256'}
"""What is kept beside each carry, whatever the script adds."""


class BrokenCheckpoint(Exception):
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
      if not isinstance(record, dict) or not record.keys() >= RECORD_FIELDS:
        self._set_aside(step, 'its record is not one of ours')
      self._check_fits(step, record, carry)
      carry = self._read(step, carry=ocp.args.StandardRestore(carry)).carry
      if fingerprint(carry) != record['sha256']:
        self._set_aside(step, 'it does not hold what was saved')
      self._seconds_before = record['seconds']
    self.rows = processes.on_first_process(self._rewind, step, record.get('lines', 0))
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
    with self._writing(), atomic_write(metrics) as file:
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
        raise UserError(f'cannot read {self.folder}: {first_line(error)}.') from error
      reason = first_line(error)
    if processes.any_process(bool(reason)):
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
    target = Path(processes.on_first_process(self._move, step)).relative_to(self.folder)
    raise BrokenCheckpoint(
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
      back = (
        ' To go back: the settings that "overrides" of config.json say there were, '
        'with --allow_config_change.'
      )
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
    processes.on_first_process(self._append, row)
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
        f'cannot write to {self.folder}: {first_line(error)}. {state}'
      ) from error


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
    found.update(np.ascontiguousarray(processes.gather_to_host(numbers)).view(np.uint8))
  return found.hexdigest()


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


def read_record(folder: Path, step: int) -> dict[str, Any]:
  """What was recorded beside the carry after that step; {} if that cannot be read."""
  try:
    record = json.loads(
      (folder / 'checkpoints' / str(step) / 'record' / 'metadata').read_bytes()
    )
  except (OSError, ValueError):
    return {}
  return record if isinstance(record, dict) else {}
