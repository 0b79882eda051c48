"""One of several processes that train together; run as `python peer.py PORT PROCESS
PROCESSES DEVICES FOLDER [CHECKPOINTS]`.

It trains, writes what came of it to FOLDER/PROCESS.npz, and goes on meeting the others
until it is stopped.
"""

from pathlib import Path
import sys
from typing import Any

import helpers
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

import fptt_jax
from fptt_jax import losses

T, B, N, OUT = 12, 16, 5, 3
LOSS = losses.sequence_regression()
BATCHES = [helpers.series_batch(T, B, out=OUT, seed=n) for n in range(N)]


def train(
  mesh: jax.sharding.Mesh, process: int, processes: int, checkpoints: str = ''
) -> dict[str, np.ndarray]:
  """What 20 updates come to, each array whole: parameters on each device and a call a
  batch, then in shards and one program.
  """
  optimizer = fptt_jax.fptt(
    optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.01))
  )
  model = helpers.elman(hidden=8, out=OUT)
  mine = slice(B // processes * process, B // processes * (process + 1))
  share = lambda batch: jax.tree.map(lambda x: x[..., mine, :], batch)
  batches = [fptt_jax.make_global_batch(share(batch), LOSS, mesh) for batch in BATCHES]
  stacked = fptt_jax.make_global_batch(
    share(jax.tree.map(lambda *leaves: np.stack(leaves), *BATCHES)),
    LOSS,
    mesh,
    stacked=True,
  )
  whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
  found = {}
  for shard_params in (False, True):
    options = dict(
      num_windows=4, carry_hidden=True, mesh=mesh, shard_params=shard_params
    )
    trainer = fptt_jax.make_trainer(model, LOSS, optimizer, **options)
    state, seen = trainer.init(jax.random.key(0), batches[0]), []
    if shard_params:
      state, metrics = fptt_jax.scan_train_steps(trainer)(state, (), stacked)
    else:
      for batch in batches:
        state, metrics = trainer.step(state, batch)
        seen.append(metrics)
      metrics = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
    if checkpoints:
      state = restored(
        state,
        trainer.init(jax.random.key(1), batches[0]),
        Path(checkpoints) / str(shard_params),
      )
    w_bar = fptt_jax.fptt_eval_params(state.opt_state, state.params)
    totals, _ = trainer.evaluate(w_bar, batches[0])
    kept = whole(trainer.end_epoch(state)._replace(key=(), opt_state=w_bar))
    leaves = jax.tree.leaves_with_path((metrics, totals, kept))
    found |= {
      f'{shard_params}{jax.tree_util.keystr(path)}': np.asarray(leaf)
      for path, leaf in leaves
    }
  return found


def restored(state: Any, other: Any, folder: Path) -> Any:
  """The state as a checkpoint gives it back, read into another one."""
  import orbax.checkpoint as ocp  # Takes seconds.

  with ocp.CheckpointManager(folder) as manager:
    manager.save(0, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    return manager.restore(0, args=ocp.args.StandardRestore(other))


def main() -> None:
  """Finds the others, trains with them, and goes on for as long as they do."""
  port, process, processes, devices = map(int, sys.argv[1:5])
  jax.config.update('jax_num_cpu_devices', devices)
  jax.distributed.initialize(
    f'127.0.0.1:{port}',
    processes,
    process,
    heartbeat_timeout_seconds=10,
    shutdown_timeout_seconds=10,
  )
  mesh = jax.sharding.Mesh(jax.devices(), ('batch',))
  found = train(mesh, process, processes, *sys.argv[6:])
  unfinished = Path(sys.argv[5]) / f'unfinished{process}.npz'
  np.savez(unfinished, **found)
  unfinished.rename(unfinished.with_name(f'{process}.npz'))
  numbers = jax.make_array_from_process_local_data(
    NamedSharding(mesh, PartitionSpec('batch')), np.ones(devices, np.float32)
  )
  meet = jax.jit(jnp.sum)
  while True:
    np.asarray(meet(numbers))


if __name__ == '__main__':
  main()
