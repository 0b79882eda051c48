"""Cooperation of several processes on one or more machines.

Each process has a share of the devices and of every batch. All processes see the same
files. Process 0 writes the files, except for checkpoints, which all processes write,
and it alone prints. Decisions that depend on files are made by process 0 and broadcast,
since the processes would hang if they disagreed.
"""

from collections.abc import Callable, Iterable, Iterator
import json
import os
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from experiments.core import signals
from experiments.core.flags import UserError

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead.

The other processes end then.
"""


def join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
  """Join the other processes of a distributed run.

  A process is one of several if a coordinator is given, or if SLURM or the hosts of a
  TPU have started it. Otherwise nothing happens.

  Args:
    coordinator: HOST:PORT of the first process; '' if the scheduler knows it.
    num_processes: number of processes; None if the scheduler knows it. 1 without a
      coordinator ignores the scheduler.
    process_id: number of this process; None if the scheduler knows it.

  Raises:
    UserError: the other processes cannot be reached.
  """
  # `salloc` sets the number of tasks as well, but a command within it runs alone. Only
  # `srun` sets the list of nodes.
  by_slurm = (
    int(os.environ.get('SLURM_NTASKS', '1')) > 1 and 'SLURM_STEP_NODELIST' in os.environ
  )
  by_hosts = ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
  if not coordinator and (num_processes is not None or not (by_slurm or by_hosts)):
    return
  try:
    jax.distributed.initialize(
      coordinator or None,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=HEARTBEAT,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'cannot join {num_processes or "the"} processes at '
      f'{coordinator or "the scheduler"}: {error}'
    ) from error
  # At the level of the file descriptor, since libraries print from C++, too.
  if not is_first():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_first() -> bool:
  """Return whether this is process 0, which writes the files."""
  return jax.process_index() == 0


def any_process(asked: bool) -> bool:
  """Return whether the argument is true on any process; all must call it."""
  if jax.process_count() == 1:
    return asked
  return bool(multihost_utils.process_allgather(np.asarray(asked)).any())


def stopped_by() -> str | None:
  """Return the cause if any process received a signal, else None.

  The cause is the signal's name, or 'another process'. All processes must call it.
  """
  # A scheduler may signal a single process, but all of them have to stop.
  if not any_process(signals.requested() is not None):
    return None
  return signals.requested() or 'another process'


def until_stopped(items: Iterable[Any]) -> Iterator[Any]:
  """Yield the items of work that saves nothing, such as a long evaluation.

  Args:
    items: the items.

  Raises:
    Stopped: a signal asked for the end.
  """
  for item in items:
    asked = stopped_by()
    if asked:
      raise signals.Stopped(
        f'stopped by {asked} after training, before the result of this run was written'
      )
    yield item


def on_first_process(function: Callable[..., Any], *args: Any) -> Any:
  """Call a function on process 0 and broadcast its result.

  All processes must call it.

  Args:
    function: returns something that JSON can hold, or raises UserError.
    *args: its arguments.

  Raises:
    UserError: the function raised it; all processes raise the same error.
  """
  if jax.process_count() == 1:
    return function(*args)
  answer: dict[str, Any] = {}
  if is_first():
    try:
      answer = {'value': function(*args)}
    except UserError as error:
      answer = {'error': str(error)}
  answer = json.loads(_from_first(json.dumps(answer).encode()))
  if 'error' in answer:
    raise UserError(answer['error'])
  return answer['value']


def _from_first(content: bytes) -> bytes:
  """Broadcast bytes from process 0; the argument of other processes is ignored."""
  # All processes must pass arrays of one shape, so the length goes first.
  size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(content))))
  buffer = np.frombuffer(content, np.uint8) if is_first() else np.zeros(size, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8).tobytes()


def replicated(tree: Any) -> Any:
  """Return arrays that are equal on all processes as JAX accepts them in a program.

  Together with arrays that are split over processes, JAX takes NumPy arrays for
  replicated, but arrays on one process's devices are an error.

  Args:
    tree: a tree of arrays with the same values on all processes.
  """
  return tree if jax.process_count() == 1 else jax.tree.map(np.asarray, tree)


def fetch_rows(
  fetch: Callable[[Any], Any], items: np.ndarray, mesh: jax.sharding.Mesh
) -> Any:
  """Fetch the rows of batches on the process that holds them.

  Args:
    fetch: (items [N, b]) -> arrays [N, b, ...] of this process's rows.
    items: [N, B], the same on all processes.
    mesh: the devices of all processes.

  Returns:
    Global arrays [N, B, ...], split by rows.
  """
  share = items.shape[1] // jax.process_count()
  start = jax.process_index() * share
  mine = fetch(items[:, start : start + share])
  place = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))
  return jax.tree.map(
    lambda leaf: jax.make_array_from_process_local_data(place, leaf), mine
  )


def gather_to_host(leaf: Any) -> np.ndarray:
  """Return an array as a NumPy array, also if it is split over processes.

  All processes must call it.
  """
  if (
    isinstance(leaf, jax.Array)
    and not leaf.is_fully_addressable
    and not leaf.is_fully_replicated
  ):
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
  return np.asarray(leaf)
