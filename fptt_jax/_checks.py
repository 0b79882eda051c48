"""Argument validation.

Errors name the argument, the value received and the values accepted.
"""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOAT32_TINY = float(np.finfo(np.float32).tiny)
"""Smallest positive normal float32; a value below it may underflow to 0."""
FLOAT32_MAX = float(np.finfo(np.float32).max)
"""Largest float32; a value above it overflows to infinity."""
INT32_MAX = 2**31 - 1
"""Largest int32, the limit of sizes and of numbers of steps."""
FLOATS = tuple(
  jnp.dtype(dtype) for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
)
ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
"""Types with a shape and a dtype: concrete, traced or abstract arrays."""


def require(
  condition: Any,
  name: str,
  expected: str,
  got: Any,
  hint: str = '',
  error: type[Exception] = ValueError,
) -> None:
  """Raise an error unless a condition holds.

  Args:
    condition: What must be true.
    name: The argument's name.
    expected: What is accepted, such as 'an integer >= 1'.
    got: The value received, or a short description of it.
    hint: One more sentence where the user would not know what to do.
    error: The error's type.
  """
  if not condition:
    raise error(f'{name} must be {expected}, got {got!r}. {hint}'.rstrip())


class Words(str):
  """A text that messages show without quotes."""

  __repr__ = str.__str__


def describe(value: Any) -> Words:
  """Return a text such as float32[2, 3] for an array, else the name of the type."""
  if isinstance(value, ARRAYS):
    return Words(f'{value.dtype}{list(value.shape)}')
  return Words(type(value).__name__)


def require_type(
  condition: Any, name: str, expected: str, value: Any, hint: str = ''
) -> None:
  """Raise a TypeError that describes a value unless a condition holds."""
  require(condition, name, expected, describe(value), hint, TypeError)


def as_number(value: Any) -> float:
  """Return a real scalar as a float, or NaN for anything else.

  A scalar is a Python number or a concrete array []. Bools are rejected.
  """
  if isinstance(value, ARRAYS):
    dtype = value.dtype
    # NumPy counts timedelta64, kind 'm', among the integers.
    is_integer = jnp.issubdtype(dtype, jnp.integer) and dtype.kind != 'm'
    is_real = is_integer or jnp.issubdtype(dtype, jnp.floating)
    is_real = is_real and value.shape == ()
  else:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
  try:
    return float(value) if is_real else math.nan
  except (TypeError, OverflowError):
    # The array is traced or abstract, or the integer exceeds every float.
    return math.nan


def check_number(
  name: str,
  value: Any,
  low: float,
  high: float,
  expected: str,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> float:
  """Return a number in a range as a float.

  Args:
    name: The argument's name.
    value: The value to validate.
    low: Smallest accepted value.
    high: Largest accepted value.
    expected: The range in words.
    dtype: Floating-point dtype that must be able to hold the value.

  Raises:
    ValueError: If `value` is not a real scalar, is NaN, is out of range, or exceeds
      the range of `dtype`.
  """
  number = as_number(value)
  size, greatest = abs(number), float(jnp.finfo(dtype).max)
  is_extreme = greatest < size < math.inf or 0 < size < FLOAT32_TINY
  hint = f'It is outside the range of {jnp.dtype(dtype)}.' if is_extreme else ''
  # NaN fails every comparison, so the range is tested, not its complement.
  fits = low <= number <= high and size <= greatest
  require(fits, name, expected, value, hint)
  return number


def check_integer(name: str, value: Any, low: int, high: int, expected: str) -> int:
  """Return a whole number in a range as an int.

  Raises:
    ValueError: If `value` is not a whole number or is out of range.
  """
  number = as_number(value)
  is_extreme = high <= INT32_MAX < abs(number) < math.inf
  hint = 'It is outside the range of int32.' if is_extreme else ''
  fits = low <= number <= high and number.is_integer()
  require(fits, name, expected, value, hint)
  return int(number)


def check_size(name: str, value: Any) -> int:
  """Return a size as an int; raise ValueError unless it is an integer >= 1."""
  return check_integer(name, value, 1, INT32_MAX, 'an integer >= 1')


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
  """Raise ValueError unless `value` is one of the choices."""
  known = isinstance(value, str) and value in choices
  require(known, name, f'one of {list(choices)}', value)


def check_flag(name: str, value: Any) -> bool:
  """Return a bool; raise TypeError for any other type, such as a text."""
  # A non-empty text such as 'False' would otherwise count as True.
  is_flag = isinstance(value, bool | np.bool_)
  require(is_flag, name, 'True or False', value, error=TypeError)
  return bool(value)


def check_callable(name: str, value: Any) -> None:
  """Raise TypeError unless `value` is callable."""
  require(callable(value), name, 'a function', value, error=TypeError)


def check_type(name: str, value: Any, expected: type, hint: str = '') -> None:
  """Raise TypeError unless `value` is of a type; `hint` says what makes one."""
  package = expected.__module__.partition('.')[0]
  # The repr of a state or a module may be pages long.
  is_short = isinstance(value, str | int | float | None)
  got = value if is_short else describe(value)
  wanted = f'of type {package}.{expected.__name__}{hint}'
  require(isinstance(value, expected), name, wanted, got, error=TypeError)


def check_dtype(name: str, value: Any, *, tokens: bool = False) -> jnp.dtype:
  """Return a floating-point dtype as JAX would store it.

  Args:
    name: The argument's name.
    value: The dtype, its name or its scalar type.
    tokens: Whether integer dtypes are accepted as well.

  Raises:
    ValueError: If `value` is not a dtype of 16 or 32 bits, or of 64 bits with x64.
  """
  try:
    dtype = jnp.dtype(value) if isinstance(value, str | type | np.dtype) else None
  except (TypeError, ValueError):
    dtype = None
  known = dtype is not None and (dtype in FLOATS or (tokens and dtype.kind in 'iu'))
  kept = jnp.result_type(np.empty((), dtype)) if known else None
  # `float` and `int` mean 64 bits to NumPy and the default width to JAX.
  if kept is not None and (kept == dtype or value is float or value is int):
    return kept
  kinds = 'a floating-point or integer' if tokens else 'a floating-point'
  bits = '16 or 32 bits (64 with jax_enable_x64)'
  raise ValueError(f'{name} must be {kinds} dtype of {bits}, got {value!r}.')


def as_floats(name: str, value: Any) -> np.ndarray:
  """Return concrete real numbers, in an array or in lists, as float64.

  Raises:
    TypeError: If `value` is anything else, such as bools or a traced array.
  """
  try:
    array = np.asarray(value)
  except (TypeError, ValueError, RuntimeError):
    # The array is traced or deleted, or the lists are ragged.
    array = np.asarray(None)
  dtype = array.dtype
  # `issubdtype` knows bfloat16, which has NumPy's kind 'V'.
  is_real = jnp.issubdtype(dtype, jnp.floating) or dtype.kind in 'iu'
  require(is_real, name, 'concrete real numbers', value, error=TypeError)
  return array.astype(np.float64)


def check_array(name: str, value: Any) -> Any:
  """Return an array of NumPy or JAX; raise TypeError for anything else."""
  is_array = isinstance(value, ARRAYS)
  require_type(is_array, name, 'an array', value)
  return value


def check_shape(
  name: str, value: Any, axes: str, shape: tuple[int, ...], dtype: Any = None
) -> Any:
  """Return an array; raise unless it has a shape and, where given, a dtype.

  Args:
    name: The argument's name.
    value: The value to validate.
    axes: The names of the axes, such as '[T, B]'.
    shape: Their lengths.
    dtype: The dtype, or None for any.

  Raises:
    TypeError: If `value` is not an array.
    ValueError: If its shape or dtype is another.
  """
  array = check_array(name, value)
  fits = array.shape == shape and (dtype is None or array.dtype == dtype)
  wanted = axes if dtype is None else f'{jnp.dtype(dtype)} {axes}'
  require(fits, name, f'{wanted} = {list(shape)}', describe(array))
  return array


def check_floats_or_tokens(name: str, array: Any) -> None:
  """Raise TypeError unless an array is of floats or integers.

  A mask of bools that is passed as inputs would otherwise be cast silently.
  """
  is_float = jnp.issubdtype(array.dtype, jnp.floating)
  accepted = is_float or jnp.issubdtype(array.dtype, jnp.integer)
  require_type(accepted, name, 'floats or integers', array)


def check_arrays(name: str, tree: Any) -> None:
  """Raise TypeError unless all leaves of a tree are arrays or numbers."""
  for path, leaf in jax.tree.leaves_with_path(tree):
    if not isinstance(leaf, int | float | complex):
      check_array(f'{name}{jax.tree_util.keystr(path)}', leaf)


def as_key(name: str, value: Any) -> Any:
  """Return a typed PRNG key, or an array of them.

  Args:
    name: The argument's name.
    value: Typed keys, or uint32 key data of the default implementation.

  Raises:
    TypeError: If `value` is neither.
  """
  check_array(name, value)
  if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
    return value
  words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
  is_data = value.dtype == jnp.uint32 and value.shape[-1:] == words
  accepted = f'a PRNG key, jax.random.key(seed), or its data uint32{list(words)}'
  hint = 'jax.random.wrap_key_data makes keys from other data.'
  require_type(is_data, name, accepted, value, hint)
  return jax.random.wrap_key_data(jnp.asarray(value))
