"""Several processes, one a machine or more: each has its share of the devices and of
every batch, all see the same files.

The first one writes the files, but for checkpoints, which all write; the others keep
silent. What is read from files and decides how to go on is read by the first and told
to all.
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
"""Seconds after which a process that gives no sign of life is taken for dead, and the
others end.
"""


def join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
  """Makes this process one of several, if it is meant to be: told so, or started by
  SLURM or on a TPU's hosts.

  Raises:
    UserError: the others are not there.
  """
  by_slurm = (
    int(os.environ.get('SLURM_NTASKS', '1')) > 1 and 'SLURM_STEP_NODELIST' in os.environ
  )  # By srun, not within salloc.
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
  if not is_first():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_first() -> bool:
  """Whether this process writes."""
  return jax.process_index() == 0


def any_process(asked: bool) -> bool:
  """Whether any process asked for it."""
  return (
    asked
    if jax.process_count() == 1
    else bool(multihost_utils.process_allgather(np.asarray(asked)).any())
  )


def stopped_by() -> str | None:
  """What asked all processes for an end: the signal's name, or that another process was
  sent one.
  """
  return (
    (signals.requested() or 'another process')
    if any_process(signals.requested() is not None)
    else None
  )


def until_stopped(items: Iterable[Any]) -> Iterator[Any]:
  """The items, for what has nothing of its own to save.

  Raises:
    Stopped: a signal asked for it.
  """
  for item in items:
    if asked := stopped_by():
      raise signals.Stopped(
        f'stopped by {asked} after training, before this run has come to its result'
      )
    yield item


def on_first_process(function: Callable[..., Any], *args: Any) -> Any:
  """What `function(*args)` came to in the first process, the only one to call it:
  something JSON can hold, or a UserError.
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
  size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(content))))
  buffer = np.frombuffer(content, np.uint8) if is_first() else np.zeros(size, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8).tobytes()


def replicated(tree: Any) -> Any:
  """Arrays that each process has the same of, as JAX takes them beside those that are
  split over processes.
  """
  return tree if jax.process_count() == 1 else jax.tree.map(np.asarray, tree)


def fetch_rows(
  fetch: Callable[[Any], Any], items: np.ndarray, mesh: jax.sharding.Mesh
) -> Any:
  """What `fetch(items)` gives, arrays [N, B, ...] for items [N, B], split by rows; each
  process fetches its own rows alone.
  """
  share = items.shape[1] // jax.process_count()
  mine = fetch(items[:, jax.process_index() * share :][:, :share])
  place = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))
  return jax.tree.map(
    lambda leaf: jax.make_array_from_process_local_data(place, leaf), mine
  )


def gather_to_host(leaf: Any) -> np.ndarray:
  """All numbers of an array, wherever they are."""
  if (
    isinstance(leaf, jax.Array)
    and not leaf.is_fully_addressable
    and not leaf.is_fully_replicated
  ):
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
  return np.asarray(leaf)
