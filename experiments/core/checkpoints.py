"""Metrics and checkpoints of one training run, in the run's folder.

Scripts write these files; NAME is the method, the seed and the grid values of a run:

    WORKDIR/config.json          settings of all runs in the folder
    WORKDIR/data.json            facts about the data set that a model needs, such as
                                 the vocabulary
    WORKDIR/summary.json         results of all runs, and the machine
    WORKDIR/NAME/metrics.jsonl   one line per evaluation
    WORKDIR/NAME/checkpoints/    complete training state, from which the same command
                                 resumes a killed run
    WORKDIR/NAME/broken/         checkpoints that could not be read
    WORKDIR/NAME/lock            lock of the process that trains the run
    WORKDIR/NAME/result.json     result of the run, written when it has ended
    WORKDIR/NAME/parameters.npz  parameters of the result, for experiments.load_run
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
"""Entries that the record of every checkpoint has; scripts add more."""


class BrokenCheckpoint(Exception):
  """Error for a checkpoint that cannot be read or whose contents have changed.

  The checkpoint has been moved to the folder `broken`; the message names it.
  """


class _PatientLoop(asyncio.SelectorEventLoop):
  """Event loop that lets all tasks end before it closes.

  Orbax reads all arrays concurrently in a new event loop and closes the loop at the
  first error. Each read that ends later prints a traceback, "Event loop is closed".
  """

  def close(self) -> None:
    """Wait until all tasks have succeeded or failed, then close the loop."""
    # Repeated, since a task that ends may have started others.
    while not self.is_closed() and (tasks := asyncio.all_tasks(self)):
      self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    super().close()


@contextlib.contextmanager
def _patient_loops() -> Iterator[None]:
  """Replace asyncio's new event loops by patient ones within the context."""
  # Orbax has no argument for its event loop, so the constructor itself is replaced.
  make_loop = asyncio.new_event_loop
  asyncio.new_event_loop = _PatientLoop
  try:
    yield
  finally:
    asyncio.new_event_loop = make_loop


class Run:
  """Files of one training run: metrics and checkpoints.

  Attributes:
    folder: the run's folder.
    rows: lines of metrics so far, including restored ones.
  """

  def __init__(self, folder: Path, keep: int = 2):
    """Open the folder of a run and create it if it is missing.

    Args:
      folder: the run's folder, inside the folder of the script's configuration.
      keep: number of checkpoints to keep. With 2 the run survives a broken last one.

    Raises:
      UserError: the folder cannot be written.
    """
    self.folder = folder
    self.rows: list[dict[str, Any]] = []
    with self._writing():
      options = ocp.CheckpointManagerOptions(max_to_keep=keep)
      self._checkpoints = ocp.CheckpointManager(
        # Orbax refuses relative paths.
        (folder / 'checkpoints').absolute(),
        options=options,
      )
      with tempfile.TemporaryFile(dir=folder / 'checkpoints'):
        pass  # Orbax reports a read-only folder only at the first save, much later.
    self._seconds_before = 0.0
    self._started = time.perf_counter()

  def restore(self, step: int, carry: Any) -> tuple[Any, dict[str, Any]]:
    """Restore the checkpoint after a step and drop all that was saved later.

    Args:
      step: the step; 0 restores nothing and starts the run anew.
      carry: training state with the shapes to restore; any tree of arrays.

    Returns:
      The saved carry and its record, or (`carry`, {}) for step 0.

    Raises:
      BrokenCheckpoint: the checkpoint is damaged.
      UserError: the checkpoint has another configuration or other shapes than `carry`,
        or lines of metrics are missing.
    """
    # The record comes first: orbax would report other shapes as a damaged file.
    record = self._read(step, record=ocp.args.JsonRestore()).record if step else {}
    if step:
      if not isinstance(record, dict) or not record.keys() >= RECORD_FIELDS:
        self._set_aside(step, 'its record is not one of ours')
      self._check_fits(step, record, carry)
      carry = self._read(step, carry=ocp.args.StandardRestore(carry)).carry
      # Not all file formats of orbax have checksums: flipped bits can pass unseen.
      if fingerprint(carry) != record['sha256']:
        self._set_aside(step, 'it does not hold what was saved')
      self._seconds_before = record['seconds']
    self.rows = processes.on_first_process(self._rewind, step, record.get('lines', 0))
    # Orbax silently skips a save whose step is not above all saved ones.
    with self._writing():
      for later in [saved for saved in self._checkpoints.all_steps() if saved > step]:
        self._checkpoints.delete(later)
    return carry, record

  def _rewind(self, step: int, lines: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl to its first lines and return their rows."""
    metrics = self.folder / 'metrics.jsonl'
    rows = read_jsonl(metrics)
    if len(rows) < lines:
      # Plots and the trigger of the averaging need the lines of all epochs.
      raise UserError(
        f'{metrics} has {len(rows)} lines, the checkpoint after step {step} was saved '
        f'after {lines}: put it back.'
      )
    with self._writing(), atomic_write(metrics) as file:
      file.writelines(json.dumps(row) + '\n' for row in rows[:lines])
    return rows[:lines]

  def _read(self, step: int, **arguments: Any) -> Any:
    """Read items of a checkpoint; set it aside if any process cannot."""
    found = None
    reason = ''
    try:
      with _patient_loops():
        found = self._checkpoints.restore(step, args=ocp.args.Composite(**arguments))
    except (MemoryError, jax.errors.JaxRuntimeError):
      # A machine or device short of memory; the checkpoint may be intact.
      raise
    except Exception as error:  # Each kind of damage raises another type.
      # A disk or network that fails now may work later, so nothing is moved.
      if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise UserError(f'cannot read {self.folder}: {first_line(error)}.') from error
      reason = first_line(error)
    # The processes must agree: one that went on alone would wait for the others.
    if processes.any_process(bool(reason)):
      self._set_aside(step, reason or 'another process cannot read it')
    return found

  def _set_aside(self, step: int, reason: str) -> NoReturn:
    """Raise for a broken checkpoint, and move it away if there is another."""
    self._checkpoints.close()
    before = [saved for saved in saved_steps(self.folder) if saved != step]
    which = f'{self.folder}: the checkpoint after step {step} is broken ({reason})'
    # Starting anew would discard hours of metrics; that is the user's decision.
    if not before:
      raise UserError(
        f'{which}, and there is no other. Delete {self.folder} to start this run anew.'
      )
    target = Path(processes.on_first_process(self._move, step)).relative_to(self.folder)
    raise BrokenCheckpoint(
      f'{which}; set aside as {target}; resuming from the one after step {before[-1]}'
    )

  def _move(self, step: int) -> str:
    """Move a checkpoint to the folder `broken` and return its new path."""
    # The time keeps names apart: a step that is saved again may break again.
    target = self.folder / 'broken' / f'{step}-{time.strftime("%Y%m%d-%H%M%S")}'
    with self._writing():
      target.parent.mkdir(exist_ok=True)
      (self.folder / 'checkpoints' / str(step)).rename(target)
    return str(target)

  def _check_fits(self, step: int, record: dict[str, Any], carry: Any) -> None:
    """Check the configuration and the shapes of a checkpoint.

    Raises:
      UserError: it has another configuration or other shapes.
    """
    config = read_config(self.folder.parent)
    # Checkpoints from before an --allow_config_change have an earlier hash.
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
        ' To go back, pass the earlier settings, which "overrides" of config.json '
        'lists, with --allow_config_change.'
      )
      raise UserError(
        f'{which} does not fit this model and optimizer; '
        f'{"; ".join(differ[:3])}{more}.{back if config["overrides"] else ""}'
      )

  def log(self, step: int, **metrics: Any) -> dict[str, Any]:
    """Append a line to metrics.jsonl.

    Args:
      step: number of the epoch or batch that the line is counted by.
      **metrics: numbers; NaN and infinity are written as null.

    Returns:
      The line, with `seconds` of wall-clock time over all restarts.

    Raises:
      UserError: the file cannot be written.
    """
    # JSON has no NaN or infinity; Python's own spelling breaks other readers.
    finite = {
      name: value if math.isfinite(value) else None for name, value in metrics.items()
    }
    row = {'step': step, 'seconds': round(self.seconds, 2), **finite}
    self.rows.append(row)
    processes.on_first_process(self._append, row)
    return row

  def _append(self, row: dict[str, Any]) -> None:
    """Write a row to the disk."""
    with (
      self._writing(),
      (self.folder / 'metrics.jsonl').open('a', encoding='utf-8') as file,
    ):
      file.write(json.dumps(row) + '\n')
      file.flush()
      # The next checkpoint counts this line. After a power cut there must be no
      # checkpoint on the disk whose lines are missing.
      os.fsync(file.fileno())

  def save(self, step: int, carry: Any, **record: Any) -> None:
    """Save the training state after a step, in the background.

    Args:
      step: the step.
      carry: training state, a tree of arrays.
      **record: further entries of the checkpoint's record, as JSON.

    Raises:
      UserError: the checkpoint cannot be written.
    """
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
    """Wait until the last checkpoint is on the disk."""
    with self._writing():
      self._checkpoints.wait_until_finished()

  def column(self, name: str) -> list[float]:
    """Return the values of one metric in all rows so far."""
    return [row[name] for row in self.rows]

  @property
  def seconds(self) -> float:
    """Wall-clock seconds of the run so far, including earlier processes."""
    return self._seconds_before + time.perf_counter() - self._started

  def close(self) -> None:
    """Wait for the last checkpoint and end the saving."""
    with self._writing():
      self._checkpoints.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turn errors of a full or read-only disk into a one-line UserError."""
    try:
      yield
    except (OSError, ValueError) as error:  # tensorstore raises ValueError.
      last = max(saved_steps(self.folder), default=0)
      state = (
        f'The checkpoint after step {last} is complete: the same command resumes it.'
        if last
        else 'There is no checkpoint.'
      )
      raise UserError(
        f'cannot write to {self.folder}: {first_line(error)}. {state}'
      ) from error


def describe(carry: Any) -> dict[str, str]:
  """Return the type and shape of each array by its path in the tree."""
  leaves = jax.tree.leaves_with_path(carry)
  return {
    jax.tree_util.keystr(path): f'{leaf.dtype}{list(leaf.shape)}'
    for path, leaf in leaves
  }


def fingerprint(carry: Any) -> str:
  """Return the SHA-256 of all numbers in a tree of arrays.

  Every process of a distributed run must call it, since the arrays are gathered.
  """
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(carry):
    # NumPy cannot view typed PRNG keys as bytes.
    is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    numbers = jax.random.key_data(leaf) if is_key else leaf
    array = np.ascontiguousarray(processes.gather_to_host(numbers))
    found.update(array.view(np.uint8).data)
  return found.hexdigest()


def saved_steps(folder: Path) -> list[int]:
  """List the steps of a run's complete checkpoints, in ascending order.

  Raises:
    UserError: the folder of the checkpoints exists and cannot be read.
  """
  path = folder / 'checkpoints'
  try:
    names = os.listdir(path)
  except FileNotFoundError:
    return []
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}.') from error
  # Orbax renames a checkpoint to its bare step only when it is complete.
  return sorted(int(name) for name in names if name.isdigit())


def read_record(folder: Path, step: int) -> dict[str, Any]:
  """Return the record of a checkpoint, or {} if it cannot be read."""
  # Read as a plain file: a manager of orbax would create folders and threads. Damage
  # is reported later, by the restore.
  try:
    record = json.loads(
      (folder / 'checkpoints' / str(step) / 'record' / 'metadata').read_bytes()
    )
  except (OSError, ValueError):
    return {}
  return record if isinstance(record, dict) else {}
