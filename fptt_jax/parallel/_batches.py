"""Batches whose rows belong to several processes."""

import jax
from jax.sharding import PartitionSpec

from fptt_jax._batch import (
  Batch,
  check_shapes,
  is_addressable,
  targets_by_row,
  with_mask,
)
from fptt_jax._checks import check_flag, check_type, require
from fptt_jax._trees import leading_axis, shapes
from fptt_jax.losses import Loss
from fptt_jax.parallel._devices import check_divisible, one_axis
from fptt_jax.parallel._specs import batch_specs, named


def make_global_batch(
  batch: Batch, loss: Loss, mesh: jax.sharding.Mesh, *, stacked: bool = False
) -> Batch:
  """Make one batch from the rows of all processes, split over all their devices.

  With `jax.distributed`, each process calls the same functions in the same order:
  `make_trainer(mesh=...)` with a mesh over `jax.devices()`, `init` with the same key,
  and `step` with the batch returned here. Metrics and totals are the same on every
  process, where `np.asarray` reads them. The hidden state, and with `shard_params` also
  parameters and optimizer state, are split: all processes together write a checkpoint
  of them (use orbax). Values identical on all processes, such as the source of
  `scan_train_steps`, may be passed as NumPy arrays.

  Args:
    batch: This process's rows, B / (number of processes) of them, in NumPy arrays. The
      processes' rows follow each other in the order of their devices in the mesh.
    loss: Loss whose targets the batch holds.
    mesh: Mesh of the trainer.
    stacked: Whether all leaves have a leading axis of length N, as items of
      `scan_train_steps`.

  Returns:
    The batch of B rows. With one process it is the given batch, put on the mesh.

  Raises:
    ValueError: The rows are not a multiple of this process's devices, or shapes do not
      fit.
    TypeError: Arrays are traced, abstract or not fully addressable.

  Example:
    >>> import jax, numpy as np, fptt_jax
    >>> # After jax.distributed.initialize(...), these are all processes' devices.
    >>> mesh = jax.sharding.Mesh(jax.devices(), ('batch',))
    >>> mine = fptt_jax.Batch(np.ones((20, 8, 1), np.float32), np.ones(8, np.float32))
    >>> loss = fptt_jax.losses.terminal_regression()
    >>> batch = fptt_jax.make_global_batch(mine, loss, mesh)
    >>> batch.inputs.shape[1] == 8 * jax.process_count()
    True
  """
  mesh, axis = one_axis(mesh)
  check_type('batch', batch, Batch)
  check_type('loss', loss, Loss)
  leaves = jax.tree.leaves(batch)
  concrete = all(map(is_addressable, leaves))
  require(concrete, 'batch', 'of concrete arrays', shapes(batch), error=TypeError)
  one = batch
  if check_flag('stacked', stacked):
    leading_axis('batch with stacked=True', batch)
    one = jax.tree.map(lambda x: x[0], batch)
  one = with_mask(one)
  if one.mask is not None and batch.mask is None:
    batch = batch._replace(lengths=None, mask=batch.lengths)
  _, rows = check_shapes(one)
  devices = len(mesh.local_devices)
  check_divisible("a process's rows", rows, devices)
  specs = batch_specs(one, axis, targets_by_row(loss))
  for leaf, spec in zip(
    jax.tree.leaves(one.targets), jax.tree.leaves(specs.targets), strict=True
  ):
    accepted = f'[B, ...], or [T, B, ...] for sequence losses, with B={rows}'
    require(leaf.shape[len(spec) - 1] == rows, 'targets', accepted, leaf.shape)
  if stacked:
    specs = jax.tree.map(lambda spec: PartitionSpec(None, *spec), specs)
  return jax.make_array_from_process_local_data(named(specs, mesh), batch)
