"""Collective operations over the devices of a mesh with one axis.

The mesh has n devices, which may belong to several processes.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from fptt_jax._dtypes import widen

MAX_JOINED = 4096
"""Largest array, in numbers, that is joined with others for a collective operation."""


def gather_shards(tree: Any, specs: Any, axis: str) -> Any:
  """Return the whole of a tree of which each device has its shards.

  Args:
    tree: One device's shards.
    specs: Partition specs of the leaves, or a prefix of them.
    axis: Name of the mesh axis.
  """

  def gather_small(shards: list[jax.Array]) -> list[jax.Array]:
    joined, unravel = ravel_pytree(shards)
    rows = jax.lax.all_gather(joined, axis)
    # Each is [n, d/n, ...].
    gathered = jax.vmap(unravel)(rows)
    return [shard.reshape(-1, *shard.shape[2:]) for shard in gathered]

  def gather_large(shard: jax.Array, cut: int) -> jax.Array:
    return jax.lax.all_gather(shard, axis, axis=cut, tiled=True)

  return _map_shards(tree, specs, gather_small, gather_large)


def mean_over_devices(tree: Any, specs: Any, axis: str) -> Any:
  """Return the mean of all devices' trees, or each device's shard of it.

  The devices meet once per operand of a collective operation, so that small arrays are
  joined. Joining large arrays costs a CPU more than it saves. All replicated leaves
  take one operation, with one operand per large array.

  Args:
    tree: One device's tree.
    specs: Partition specs of the mean's leaves, or a prefix of them. A device gets its
      shard of each leaf that is cut.
    axis: Name of the mesh axis.
  """
  leaves, structure = jax.tree.flatten(tree)
  dtypes = [leaf.dtype for leaf in leaves]
  # The sum of finite float16 numbers may be infinite.
  leaves = [widen(leaf) for leaf in leaves]
  leaves = _mean_of_replicated(leaves, _cuts(tree, specs), axis)
  n = jax.lax.axis_size(axis)

  def scatter_small(leaves: list[jax.Array]) -> list[jax.Array]:
    # The cut axes are in front: [n, d/n, ...].
    parts = [leaf.reshape(n, -1, *leaf.shape[1:]) for leaf in leaves]
    rows = jax.vmap(lambda part: ravel_pytree(part)[0])(parts)
    first = [part[0] for part in parts]
    _, unravel = ravel_pytree(first)
    mean = jax.lax.psum_scatter(rows, axis) / n
    shards: list[jax.Array] = unravel(mean)
    return shards

  def scatter_large(leaf: jax.Array, cut: int) -> jax.Array:
    total = jax.lax.psum_scatter(leaf, axis, scatter_dimension=cut, tiled=True)
    return total / n

  tree = jax.tree.unflatten(structure, leaves)
  means = _map_shards(tree, specs, scatter_small, scatter_large)
  leaves = [
    mean.astype(dtype)
    for mean, dtype in zip(jax.tree.leaves(means), dtypes, strict=True)
  ]
  return jax.tree.unflatten(structure, leaves)


def _mean_of_replicated(
  leaves: list[jax.Array], cuts: list[int | None], axis: str
) -> list[jax.Array]:
  """Replace the leaves that are not cut by their means over the devices."""
  whole = [number for number, cut in enumerate(cuts) if cut is None]
  small = [number for number in whole if leaves[number].size <= MAX_JOINED]
  large = [number for number in whole if leaves[number].size > MAX_JOINED]
  small_leaves = [leaves[number] for number in small]
  large_leaves = [leaves[number] for number in large]
  joined, unravel = ravel_pytree(small_leaves)
  # One operation, with one operand for the small arrays and one per large array.
  joined, large_means = jax.lax.pmean((joined, large_leaves), axis)
  means = unravel(joined) + large_means
  leaves = list(leaves)
  for number, mean in zip(small + large, means, strict=True):
    leaves[number] = mean
  return leaves


def sum_over_devices(tree: Any, axis: str | None) -> Any:
  """Return the sum of all devices' trees; the tree itself without an axis."""
  return tree if axis is None else jax.lax.psum(tree, axis)


def max_over_devices(x: jax.Array, axis: str | None) -> jax.Array:
  """Return the largest of all devices' numbers; `x` itself without an axis."""
  return x if axis is None else jax.lax.pmax(x, axis)


def any_over_devices(flags: jax.Array, axis: str | None) -> jax.Array:
  """Return whether flags are set on any device; the flags themselves without an
  axis.
  """
  return flags if axis is None else jax.lax.pmax(flags.astype(jnp.int32), axis) > 0


def all_over_devices(flags: jax.Array, axis: str | None) -> jax.Array:
  """Return whether flags are set on all devices; the flags themselves without an
  axis.
  """
  return flags if axis is None else jax.lax.pmin(flags.astype(jnp.int32), axis) > 0


def fold_device(key: jax.Array, axis: str | None) -> jax.Array:
  """Fold the device's number into a PRNG key; return the key itself without an axis."""
  return key if axis is None else jax.random.fold_in(key, jax.lax.axis_index(axis))


def _cuts(tree: Any, specs: Any) -> list[int | None]:
  """Return the axis along which each leaf is cut; None for replicated leaves."""
  of_leaves = jax.tree.leaves(jax.tree.broadcast(specs, tree))
  return [len(spec) - 1 if spec else None for spec in of_leaves]


def _map_shards(
  tree: Any,
  specs: Any,
  small_leaves: Callable[[list[jax.Array]], list[jax.Array]],
  large_leaf: Callable[[jax.Array, int], jax.Array],
) -> Any:
  """Map the leaves of a tree that are cut.

  Args:
    tree: Tree of arrays.
    specs: Partition specs of the leaves, or a prefix of them.
    small_leaves: Maps all small leaves together, their cut axes moved to the front.
    large_leaf: Maps one large leaf, given the axis along which it is cut.
  """
  leaves, structure = jax.tree.flatten(tree)
  all_cuts = enumerate(_cuts(tree, specs))
  cuts = {number: cut for number, cut in all_cuts if cut is not None}
  small = [number for number in cuts if leaves[number].size <= MAX_JOINED]
  changed: list[jax.Array] = []
  if small:
    moved = [jnp.moveaxis(leaves[number], cuts[number], 0) for number in small]
    changed = small_leaves(moved)
  for number, cut in cuts.items():
    if number not in small:
      leaves[number] = large_leaf(leaves[number], cut)
  for number, leaf in zip(small, changed, strict=True):
    leaves[number] = jnp.moveaxis(leaf, 0, cuts[number])
  return jax.tree.unflatten(structure, leaves)
