"""Partition specs of batches and states, and arrays placed by them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fptt_jax._batch import Batch
from fptt_jax._windows import is_time_major


def named(specs: Any, mesh: jax.sharding.Mesh) -> Any:
  """Return a tree of partition specs as shardings on the mesh."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def place(tree: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
  """Put a tree on a mesh. Each of several processes passes the same tree."""

  def is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(
      leaf.dtype, jax.dtypes.prng_key
    )

  def data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf

  def restore(leaf: Any, placed: Any) -> Any:
    if not is_key(leaf):
      return placed
    return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(leaf))

  # JAX places the data of keys, but not keys, on a mesh of several processes.
  placed = jax.device_put(jax.tree.map(data, tree), named(specs, mesh))
  return jax.tree.map(restore, tree, placed)


def batch_specs(batch: Batch, axis: str | None, terminal: bool) -> Any:
  """Return the specs of a batch whose rows are split over an axis.

  Args:
    batch: Batch of arrays.
    axis: Name of the mesh axis; None leaves the batch whole.
    terminal: Whether the loss has one target per sequence. Targets of shape
      [T, B, ...] are split along their second axis, unless T = B then.
  """
  rows: Any = PartitionSpec(axis)
  columns: Any = PartitionSpec(None, axis)
  num_steps, batch_size = jnp.shape(jax.tree.leaves(batch.inputs)[0])[:2]

  def target_spec(target: Any) -> Any:
    split_later = is_time_major(target, num_steps, batch_size, terminal)
    return columns if split_later else rows

  return Batch(
    inputs=jax.tree.map(lambda _: columns, batch.inputs),
    targets=jax.tree.map(target_spec, batch.targets),
    lengths=None if batch.lengths is None else rows,
    mask=None if batch.mask is None else columns,
  )


def shard_specs(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Return specs that cut each leaf along the first axis that n divides.

  The first axis makes shards contiguous. Leaves of one shape are cut alike, so that an
  optimizer's moments lie where their parameter does.

  Args:
    tree: Tree of arrays. A leaf without such an axis is replicated.
    mesh: Mesh with one axis, of n devices.
  """

  def spec(leaf: Any) -> PartitionSpec:
    for number, length in enumerate(jnp.shape(leaf)):
      if length > 0 and length % mesh.size == 0:
        return PartitionSpec(*([None] * number), mesh.axis_names[0])
    return PartitionSpec()

  return jax.tree.map(spec, tree)
