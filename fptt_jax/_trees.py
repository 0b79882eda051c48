"""Paths, shapes and structures of trees of arrays."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fptt_jax._checks import ARRAYS, check_array, describe, require


def shapes(tree: Any) -> Any:
  """Return the tree with the shape of each leaf.

  A number has the shape (). A leaf without a shape is replaced by its type's name.
  """

  def shape(leaf: Any) -> Any:
    if isinstance(leaf, ARRAYS):
      return leaf.shape
    if isinstance(leaf, int | float | complex):
      return ()
    return type(leaf).__name__

  return jax.tree.map(shape, tree)


def leaf_paths(tree: Any) -> list[str]:
  """Return the path of each leaf of a tree, such as 'layers/0/kernel'.

  Keys, indices and field names are written alike, because some file formats turn
  integer keys into text and named tuples into dicts.
  """

  def entry(key: Any) -> str:
    for field in ('key', 'idx', 'name'):
      if hasattr(key, field):
        return str(getattr(key, field))
    return str(key)

  return ['/'.join(map(entry, path)) for path, _ in jax.tree.leaves_with_path(tree)]


def distinct_paths(name: str, tree: Any) -> list[str]:
  """Return the paths of a tree's leaves; raise ValueError if one has another's path.

  Args:
    name: What the tree is, in words.
    tree: The tree.
  """
  paths = leaf_paths(tree)
  repeated = [path for path, count in Counter(paths).items() if count > 1]
  require(not repeated, f'paths of the {name}', 'different', repeated)
  return paths


def arrange_like(name: str, got: Any, expected: Any, whose: str) -> Any:
  """Return the leaves of `got` in the structure of `expected`, matched by path.

  Args:
    name: The argument's name.
    got: A tree, or a flat dict from paths to leaves.
    expected: A tree of the expected structure.
    whose: Where that structure comes from, such as 'as init makes it'.

  Raises:
    ValueError: If the paths differ; names the first ones that do.
  """
  structure: Any = jax.tree.structure(expected)
  if jax.tree.structure(got) == structure:
    return got
  found = dict(zip(leaf_paths(got), jax.tree.leaves(got), strict=True))
  paths = leaf_paths(expected)
  missing = [path for path in paths if path not in found]
  unexpected = [path for path in found if path not in paths]
  if not missing and not unexpected and len(found) == len(paths):
    return structure.unflatten([found[path] for path in paths])
  differences = []
  if missing:
    differences.append(f'missing {_first_of(missing)}')
  if unexpected:
    differences.append(f'unexpected {_first_of(unexpected)}')
  # Paths repeat where keys differ in type only, such as 0 and '0'.
  got = '; '.join(differences) or 'repeated paths'
  raise ValueError(f'{name} must have the same leaves, {whose}; got {got}.')


def check_like(
  name: str, got: Any, expected: Any, whose: str, exactly: bool = False
) -> Any:
  """Return `got` in the structure of `expected` if its leaves have the same types.

  Args:
    name: The argument's name.
    got: A tree of arrays.
    expected: A tree of arrays, concrete or abstract.
    whose: Where the expected tree comes from, such as 'as init makes it'.
    exactly: Whether dtypes must be equal, not only of the same kind.

  Raises:
    ValueError: If paths, shapes or dtypes differ; names the first difference.
  """
  got = arrange_like(name, got, expected, whose)
  leaves = jax.tree.leaves_with_path(got)
  for (path, leaf), like in zip(leaves, jax.tree.leaves(expected), strict=True):
    same = _kind(leaf, exactly) == _kind(like, exactly)
    place = name + jax.tree_util.keystr(path)
    require(same, place, f'{describe(like)}, {whose}', describe(leaf))
  return got


def _first_of(paths: Sequence[str]) -> str:
  """Return the first three paths, and the number of the others."""
  # A large model in another layout has hundreds of differences.
  text = ', '.join(map(repr, paths[:3]))
  if len(paths) > 3:
    text += f' and {len(paths) - 3} more'
  return text


def _kind(leaf: Any, exactly: bool) -> Any:
  """Return shape and dtype of an array, or the kind of its dtype unless `exactly`."""
  if exactly or not isinstance(leaf, ARRAYS):
    return describe(leaf)
  kinds = (jnp.complexfloating, jnp.inexact, jnp.integer, jax.dtypes.prng_key)
  found = [kind for kind in kinds if jnp.issubdtype(leaf.dtype, kind)]
  return leaf.shape, found or leaf.dtype


def with_axes(x: jax.Array, like: jax.Array) -> jax.Array:
  """Return x with trailing axes of length 1, as many axes as `like` has."""
  return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def where_rows(rows: jax.Array, chosen: Any, other: Any) -> Any:
  """Return `other` with the rows of `chosen` where `rows`, bool [B], is True."""

  def put(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(with_axes(rows, b), a.astype(b.dtype), b)

  return jax.tree.map(put, chosen, other)


def zero_unless(valid: jax.Array, tree: Any) -> Any:
  """Return a tree of arrays with 0 where `valid`, of their leading axes, is False."""

  def put(leaf: jax.Array) -> jax.Array:
    return jnp.where(with_axes(valid, leaf), leaf, jnp.zeros([], leaf.dtype))

  return jax.tree.map(put, tree)


def nodes_of(tree: Any, *kinds: type) -> list[Any]:
  """Return the nodes of a tree that are of some types, but none inside another."""
  is_wanted = lambda node: isinstance(node, kinds)
  return [node for node in jax.tree.leaves(tree, is_leaf=is_wanted) if is_wanted(node)]


def is_floating(leaf: Any) -> bool:
  if isinstance(leaf, ARRAYS):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
  return isinstance(leaf, float | complex)


def have_same_structure(a: Any, b: Any) -> bool:
  structure: Any = jax.tree.structure(a)
  return bool(structure == jax.tree.structure(b))


def have_same_shapes(a: Any, b: Any) -> bool:
  """Return whether two trees have the same structure and shapes."""
  if not have_same_structure(a, b):
    return False
  return jax.tree.all(jax.tree.map(lambda x, y: shapes(x) == shapes(y), a, b))


def have_same_field(*leaves: Any) -> bool:
  """Return whether all leaves are floating point, and all real or all complex."""
  fields = {jnp.iscomplexobj(leaf) for leaf in leaves}
  return all(map(is_floating, leaves)) and len(fields) == 1


def leading_axis(name: str, tree: Any, axis: int = 0) -> int:
  """Return the length that all arrays of a tree have along an axis; at least 1."""
  leaves = [check_array(name, leaf) for leaf in jax.tree.leaves(tree)]
  lengths = {leaf.shape[axis : axis + 1] for leaf in leaves}
  fits = len(lengths) == 1 and not lengths & {(), (0,)}
  require(fits, name, f'arrays with an axis {axis} of one length >= 1', shapes(tree))
  return int(lengths.pop()[0])
