"""Where the arrays of a train step lie on a mesh of devices, and the collective
operations between them.

A mesh has one axis, of n devices, which may belong to several processes.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fptt_jax._dtypes import at_least_float32

JOINED = 4096
"""Gradients of at most so many numbers are joined for the mean over devices."""


def named(specs: Any, mesh: jax.sharding.Mesh) -> Any:
  """Specs as shardings on the mesh."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def place(tree: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
  """Puts a tree on the mesh; of several processes each has to give the same. Keys go as
  their data: JAX takes only that there.
  """
  is_key = lambda x: (
    isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  )
  placed = jax.device_put(
    jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree),
    named(specs, mesh),
  )
  return jax.tree.map(
    lambda x, p: (
      jax.random.wrap_key_data(p, impl=jax.random.key_impl(x)) if is_key(x) else p
    ),
    tree,
    placed,
  )


def batch_specs(batch: Any, axis: str | None, terminal: bool) -> Any:
  """How a `fptt_jax.Batch` is split by rows; targets are [B, ...] for terminal tasks,
  else [T, B, ...] where their shape allows.
  """
  rows: Any = PartitionSpec(axis)
  columns: Any = PartitionSpec(None, axis)
  num_steps_and_rows = jnp.shape(jax.tree.leaves(batch.inputs)[0])[:2]
  time_major = lambda x: not terminal and jnp.shape(x)[:2] == num_steps_and_rows
  targets = jax.tree.map(lambda x: columns if time_major(x) else rows, batch.targets)
  return batch._replace(
    inputs=jax.tree.map(lambda _: columns, batch.inputs),
    targets=targets,
    lengths=None if batch.lengths is None else rows,
    mask=None if batch.mask is None else columns,
  )


def shard_specs(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Each leaf cut along its first axis that n divides, so that shards are contiguous;
  whole on each device where there is none.

  Leaves of one shape are cut alike: what an optimizer keeps for each parameter lies
    where the parameter does.
  """

  def spec(leaf: Any) -> PartitionSpec:
    fits = [length > 0 and length % mesh.size == 0 for length in jnp.shape(leaf)]
    return (
      PartitionSpec(*[None] * fits.index(True), mesh.axis_names[0])
      if any(fits)
      else PartitionSpec()
    )

  return jax.tree.map(spec, tree)


def gather_shards(tree: Any, specs: Any, axis: str) -> Any:
  """The whole of a tree of which each device has its shards; small arrays are
  joined.
  """

  def together(shards: list[jax.Array]) -> list[jax.Array]:
    joined, unravel = ravel_pytree(shards)
    return [
      shard.reshape(-1, *shard.shape[2:])
      for shard in jax.vmap(unravel)(jax.lax.all_gather(joined, axis))
    ]  # [n, d/n, ...]

  return _of_shards(
    tree,
    specs,
    together,
    lambda leaf, cut: jax.lax.all_gather(leaf, axis, axis=cut, tiled=True),
  )


def mean_over_devices(tree: Any, specs: Any, axis: str | None) -> Any:
  """The mean of all devices' trees; of leaves that are cut each device gets its shard.

  For each operand of a collective operation the devices meet, so small arrays are
  joined; to join large ones costs a CPU more than that. What is left whole takes one
  operation, with an operand for each large array.

  Args:
    tree: a device's own.
    specs: how the mean lies on the devices, or a prefix of it.
    axis: the mesh's; None for one device.
  """
  if axis is None:
    return tree
  # A sum of finite float16 numbers may be infinite: the mean is taken in float32.
  leaves, structure = jax.tree.flatten(tree)
  dtypes = [leaf.dtype for leaf in leaves]
  leaves = [leaf.astype(at_least_float32(leaf.dtype)) for leaf in leaves]
  whole = [number for number, cut in enumerate(_cuts(tree, specs)) if cut is None]
  small = [number for number in whole if leaves[number].size <= JOINED]
  large = [number for number in whole if leaves[number].size > JOINED]
  joined, unravel = ravel_pytree([leaves[number] for number in small])
  joined, means = jax.lax.pmean((joined, [leaves[number] for number in large]), axis)
  for number, mean in zip(small + large, unravel(joined) + means, strict=True):
    leaves[number] = mean
  n = jax.lax.axis_size(axis)

  def together(leaves: list[jax.Array]) -> list[jax.Array]:
    parts = [leaf.reshape(n, -1, *leaf.shape[1:]) for leaf in leaves]  # [n, d/n, ...]
    rows = jax.vmap(lambda part: ravel_pytree(part)[0])(parts)
    return ravel_pytree([part[0] for part in parts])[1](
      jax.lax.psum_scatter(rows, axis) / n
    )

  alone = lambda leaf, cut: (
    jax.lax.psum_scatter(leaf, axis, scatter_dimension=cut, tiled=True) / n
  )
  means = jax.tree.leaves(
    _of_shards(jax.tree.unflatten(structure, leaves), specs, together, alone)
  )
  return jax.tree.unflatten(
    structure, [mean.astype(dtype) for mean, dtype in zip(means, dtypes, strict=True)]
  )


def sum_over_devices(tree: Any, axis: str | None) -> Any:
  """The sum of all devices' trees."""
  return tree if axis is None else jax.lax.psum(tree, axis)


def _cuts(tree: Any, specs: Any) -> list[int | None]:
  """The axis along which each leaf is cut, None for those left whole."""
  return [
    len(spec) - 1 if spec else None
    for spec in jax.tree.leaves(jax.tree.broadcast(specs, tree))
  ]


def _of_shards(
  tree: Any,
  specs: Any,
  together: Callable[[list[jax.Array]], list[jax.Array]],
  alone: Callable[[jax.Array, int], jax.Array],
) -> Any:
  """Changes the leaves that are cut: small ones `together`, their axes of the cut in
  front, each large one `alone` (leaf, axis).
  """
  leaves, structure = jax.tree.flatten(tree)
  cuts = {
    number: cut for number, cut in enumerate(_cuts(tree, specs)) if cut is not None
  }
  small = [number for number in cuts if leaves[number].size <= JOINED]
  changed = (
    together([jnp.moveaxis(leaves[number], cuts[number], 0) for number in small])
    if small
    else []
  )
  for number, cut in cuts.items():
    if number not in small:
      leaves[number] = alone(leaves[number], cut)
  for number, leaf in zip(small, changed, strict=True):
    leaves[number] = jnp.moveaxis(leaf, 0, cuts[number])
  return jax.tree.unflatten(structure, leaves)
