"""Hidden states as rows of numbers, and parameters by their path."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._dtypes import widen
from fptt_jax._trees import leaf_paths
from fptt_jax._types import Hidden, Params

TINY = 1e-7
"""Added to the norms of two factors, so that the ratio of two zeros is 1."""

Weights = dict[str, jax.Array]
"""Parameters by path, such as 'layers/0/w_x'."""


def join(hidden: Hidden) -> jax.Array:
  """Return the real numbers of a hidden state as rows.

  Args:
    hidden: Tree of arrays [R, ...]. Integers and keys are left out.

  Returns:
    [R, N], at least float32.
  """
  leaves = [leaf for leaf in jax.tree.leaves(hidden) if is_real(leaf)]
  return jnp.concatenate([widen(leaf).reshape(len(leaf), -1) for leaf in leaves], 1)


def split(rows: jax.Array, like: Hidden) -> Hidden:
  """Return the hidden state whose real numbers are the given rows.

  Args:
    rows: [R, N].
    like: Tree of arrays [R, ...] with the structure, the dtypes, and the integers.
  """
  leaves, structure = jax.tree.flatten(like)
  first = 0
  for number, leaf in enumerate(leaves):
    if is_real(leaf):
      size = int(np.prod(leaf.shape[1:]))
      part = rows[:, first : first + size]
      leaves[number] = part.reshape(leaf.shape).astype(leaf.dtype)
      first += size
  return jax.tree.unflatten(structure, leaves)


def unit_cotangents(hidden: Hidden) -> jax.Array:
  """Return a gradient for each real number of the hidden state, [N, R, N]."""
  rows = join(hidden)
  eye = jnp.eye(rows.shape[1], dtype=rows.dtype)
  return jnp.broadcast_to(eye[:, None], (len(eye), *rows.shape))


def row_size(hidden: Hidden) -> int:
  """Return N, how many real numbers a row of the hidden state has."""
  leaves = [leaf for leaf in jax.tree.leaves(hidden) if is_real(leaf)]
  return sum(int(np.prod(leaf.shape[1:])) for leaf in leaves)


def is_real(leaf: Any) -> bool:
  """Return whether an array holds real floating-point numbers."""
  return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def take_arrays(hidden: Hidden, arrays: tuple[int, ...]) -> list[jax.Array]:
  """Return some of the floating-point arrays of a hidden state."""
  leaves = [leaf for leaf in jax.tree.leaves(hidden) if is_real(leaf)]
  return [leaves[number] for number in arrays]


def by_path(params: Params) -> Weights:
  """Return the parameters by path."""
  return dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))


def select(params: Params, paths: Iterable[str]) -> Weights:
  """Return some of the parameters by path."""
  weights = by_path(params)
  return {path: weights[path] for path in paths}


def replace(params: Params, weights: Weights) -> Params:
  """Return the parameters with some of them replaced."""
  return _map_paths(lambda path, leaf: weights.get(path, leaf), params)


def spread(params: Params, gradients: Weights) -> Params:
  """Return gradients of some parameters as a tree like all of them, 0 elsewhere."""

  def leaf_of(path: str, leaf: jax.Array) -> jax.Array:
    if path in gradients:
      return gradients[path].astype(leaf.dtype)
    return jnp.zeros_like(leaf)

  return _map_paths(leaf_of, params)


def _map_paths(function: Callable[[str, Any], Any], tree: Any) -> Any:
  leaves, structure = jax.tree.flatten(tree)
  pairs = zip(leaf_paths(tree), leaves, strict=True)
  return jax.tree.unflatten(structure, [function(*pair) for pair in pairs])
