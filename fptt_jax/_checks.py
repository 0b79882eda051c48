"""Refusing what means nothing, with what was got and what was expected."""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOAT32_TINY, FLOAT32_MAX = (
  float(np.finfo(np.float32).tiny),
  float(np.finfo(np.float32).max),
)
"""The least number above 0 and the greatest one of float32: what is beyond would be
computed with as 0 or infinity.
"""
INT32_MAX = 2**31 - 1
"""The greatest int32: of sizes, and of numbers of steps."""
FLOATS = tuple(
  jnp.dtype(dtype) for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
)
ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
"""What has a shape and a dtype, whether it is concrete, traced or abstract."""


def as_number(value: Any) -> float | None:
  """`value` as a float, None if it is no real number or array [] of one; a bool is
  none.
  """
  if isinstance(value, ARRAYS):
    is_real = jnp.issubdtype(value.dtype, jnp.floating) or (
      jnp.issubdtype(value.dtype, jnp.integer) and value.dtype.kind != 'm'
    )
    is_real = is_real and value.shape == ()
  else:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_real:
    return None
  try:
    return float(value)
  except (
    TypeError,
    OverflowError,
  ):  # It is traced or abstract; it is an integer too large for any float.
    return None


def check_number(
  name: str,
  value: Any,
  low: float,
  high: float,
  expected: str,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> float:
  """`value` as a float; a ValueError that names it if it is no number, outside its
  range (NaN is) or more than `dtype` holds.
  """
  number = as_number(value)
  greatest = float(jnp.finfo(dtype).max)
  if number is None or not low <= number <= high or abs(number) > greatest:
    beyond = number is not None and (
      greatest < abs(number) < math.inf or 0 < abs(number) < FLOAT32_TINY
    )
    raise ValueError(
      f'{name} must be {expected}, got '
      f'{value!r}{f", beyond {jnp.dtype(dtype)}" if beyond else ""}.'
    )
  return number


def check_integer(name: str, value: Any, low: int, high: int, expected: str) -> int:
  """`value` as an int; a ValueError that names it if it is no whole number or outside
  its range.
  """
  number = as_number(value)
  if number is None or not low <= number <= high or number != int(number):
    beyond = (
      ', beyond int32'
      if number is not None and INT32_MAX < abs(number) < math.inf
      else ''
    )
    raise ValueError(f'{name} must be {expected}, got {value!r}{beyond}.')
  return int(number)


def check_size(name: str, value: Any) -> int:
  """`value` as an int; a ValueError that names it if it is no integer of at least 1."""
  return check_integer(name, value, 1, INT32_MAX, 'an integer >= 1')


def check_flag(name: str, value: Any) -> bool:
  """`value` as a bool; a TypeError that names it if it is none: a text, say, would
  count as True.
  """
  if not isinstance(value, bool | np.bool_):
    raise TypeError(f'{name} must be True or False, got {value!r}.')
  return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
  """A ValueError that names it unless `value` is one of the choices."""
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f'{name} must be one of {list(choices)}, got {value!r}.')


def check_callable(name: str, value: Any) -> None:
  """A TypeError that names it unless `value` is a function."""
  if not callable(value):
    raise TypeError(f'{name} must be a function, got {value!r}.')


def check_dtype(name: str, value: Any, *, tokens: bool = False) -> jnp.dtype:
  """`value` as JAX keeps it; a ValueError that names it if it is no floating-point
  dtype of 16 or 32 bits, or of 64 where they are kept. If it may be that of `tokens`,
  integers will do.
  """
  try:
    dtype = jnp.dtype(value) if isinstance(value, str | type | np.dtype) else None
  except (TypeError, ValueError):
    dtype = None
  known = dtype is not None and (dtype in FLOATS or (tokens and dtype.kind in 'iu'))
  kept = jnp.result_type(np.empty((), dtype)) if known else None
  if kept is None or (kept != dtype and value is not float and value is not int):
    other = ', or an integer one' if tokens else ''
    raise ValueError(
      f'{name} must be a floating-point dtype of 16 or 32 bits (64 with '
      f'jax_enable_x64){other}, got {value!r}.'
    )
  return kept


def as_floats(name: str, value: Any) -> np.ndarray:
  """`value`, real numbers in an array or in lists, as float64; a TypeError that names
  it if it is anything else.
  """
  try:
    array = np.asarray(value)
  except (TypeError, ValueError, RuntimeError):  # Traced, ragged, or deleted.
    array = np.asarray(None)
  dtype = array.dtype
  if dtype.kind == 'b' or not (
    jnp.issubdtype(dtype, jnp.floating) or dtype.kind in 'iu'
  ):
    raise TypeError(f'{name} must be concrete real numbers, got {value!r}.')
  return array.astype(np.float64)


def check_array(name: str, value: Any) -> Any:
  """`value`; a TypeError that names it if it is no array of NumPy or JAX."""
  if not isinstance(value, ARRAYS):
    raise TypeError(f'{name} must be an array, got {type(value).__name__}.')
  return value


def as_key(name: str, value: Any) -> Any:
  """Return a key, or keys, as typed ones, given those or their data for the default
  implementation.

  Raises:
    TypeError: it is neither.
  """
  if not isinstance(value, ARRAYS):
    raise TypeError(
      f'{name} must be a PRNG key, jax.random.key(seed), got {type(value).__name__}.'
    )
  if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
    return value
  words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
  if value.dtype != jnp.uint32 or value.shape[-1:] != words:
    raise TypeError(
      f'{name} must be a PRNG key, jax.random.key(seed), or the data '
      f'uint32{list(words)} of one of the default '
      f'implementation, got {value.dtype}{list(value.shape)}: jax.random.wrap_key_data '
      'makes keys of other data.'
    )
  return jax.random.wrap_key_data(jnp.asarray(value))


def check_arrays(name: str, tree: Any) -> None:
  """A TypeError that names it unless the leaves of `tree` are arrays or numbers."""
  for leaf in jax.tree.leaves(tree):
    if not isinstance(leaf, (*ARRAYS, int, float, complex)):
      raise TypeError(f'{name} must be a tree of arrays, got a leaf {leaf!r}.')


def shapes(tree: Any) -> Any:
  """The tree with the shape of each leaf, () for a number, or the type of what has
  none.
  """

  def shape(leaf: Any) -> Any:
    if isinstance(leaf, ARRAYS):
      return leaf.shape
    return () if isinstance(leaf, int | float | complex) else type(leaf).__name__

  return jax.tree.map(shape, tree)


def leaf_paths(tree: Any) -> list[str]:
  """Return where each leaf of a tree is, such as 'layers/0/kernel'.

  A key, an index and a field's name read alike: paths outlive formats that know no
  integer keys or named tuples.
  """

  def entry(key: Any) -> str:
    for field in ('key', 'idx', 'name'):
      if hasattr(key, field):
        return str(getattr(key, field))
    return str(key)

  return ['/'.join(map(entry, path)) for path, _ in jax.tree.leaves_with_path(tree)]


def arrange_like(name: str, got: Any, expected: Any, whose: str) -> Any:
  """Return the leaves of `got` in the structure of `expected`, matched by
  :func:`leaf_paths`.

  Args:
    name: what it is.
    got: a tree, or a flat dict from paths to leaves.
    expected: another.
    whose: why that is expected: 'as init makes it'.

  Raises:
    ValueError: their leaves are not at the same places; names the first that are not.
  """
  structure: Any = jax.tree.structure(expected)
  if jax.tree.structure(got) == structure:
    return got
  found = dict(zip(leaf_paths(got), jax.tree.leaves(got), strict=True))
  paths = leaf_paths(expected)
  missing = [path for path in paths if path not in found]
  unexpected = [path for path in found if path not in paths]
  if missing or unexpected or len(found) != len(paths):
    parts = [
      f'{which} '
      f'{", ".join(map(repr, some[:3]))}{f" and {len(some) - 3} more" if some[3:] else ""}'
      for which, some in (('none at', missing), ('some at', unexpected))
      if some
    ]
    raise ValueError(
      f'{name} must have its leaves at the same places, {whose}: '
      f'got {", ".join(parts) or "some twice"}.'
    )
  return structure.unflatten([found[path] for path in paths])


def check_like(
  name: str, got: Any, expected: Any, whose: str, exactly: bool = False
) -> Any:
  """Return `got` in the structure of `expected`, if it has the same leaves, shapes and
  kinds of numbers.

  Args:
    name: what is checked.
    got: a tree of arrays.
    expected: another.
    whose: why that is expected: 'as init makes it'.
    exactly: whether dtypes are to be the same, too.

  Raises:
    ValueError: names the first difference.
  """
  got = arrange_like(name, got, expected, whose)
  for (path, leaf), like in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
  ):
    if _described(leaf, exactly) != _described(like, exactly):
      where = f'{name}{jax.tree_util.keystr(path)}'
      raise ValueError(
        f'{where} must be {_described(like)}, {whose}, got {_described(leaf)}.'
      )
  return got


def _described(leaf: Any, exactly: bool = True) -> str:
  """float32[2, 3], or just how the dtype counts."""
  if not isinstance(leaf, ARRAYS):
    return type(leaf).__name__
  kinds = (
    kind
    for kind in (jnp.inexact, jnp.integer, jax.dtypes.prng_key)
    if jnp.issubdtype(leaf.dtype, kind)
  )
  return f'{leaf.dtype if exactly else next(kinds, leaf.dtype)}{list(leaf.shape)}'
