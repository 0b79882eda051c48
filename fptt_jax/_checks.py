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


def as_number(value: Any) -> float | None:
  """Return a real scalar as a float, or None for anything else.

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
  if not is_real:
    return None
  try:
    return float(value)
  except (TypeError, OverflowError):
    # The array is traced or abstract, or the integer exceeds every float.
    return None


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
  greatest = float(jnp.finfo(dtype).max)
  # NaN fails every comparison, so the range is tested, not its complement.
  if number is not None and low <= number <= high and abs(number) <= greatest:
    return number
  note = ''
  if number is not None and (
    greatest < abs(number) < math.inf or 0 < abs(number) < FLOAT32_TINY
  ):
    note = f', outside the range of {jnp.dtype(dtype)}'
  raise ValueError(f'{name} must be {expected}, got {value!r}{note}.')


def check_integer(name: str, value: Any, low: int, high: int, expected: str) -> int:
  """Return a whole number in a range as an int.

  Raises:
    ValueError: If `value` is not a whole number or is out of range.
  """
  number = as_number(value)
  if number is not None and low <= number <= high and number == int(number):
    return int(number)
  note = ''
  if number is not None and INT32_MAX < abs(number) < math.inf:
    note = ', outside the range of int32'
  raise ValueError(f'{name} must be {expected}, got {value!r}{note}.')


def check_size(name: str, value: Any) -> int:
  """Return a size as an int; raise ValueError unless it is an integer >= 1."""
  return check_integer(name, value, 1, INT32_MAX, 'an integer >= 1')


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
  """Raise ValueError unless `value` is one of the choices."""
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f'{name} must be one of {list(choices)}, got {value!r}.')


def check_flag(name: str, value: Any) -> bool:
  """Return a bool; raise TypeError for any other type, such as a text."""
  # A non-empty text such as 'False' would otherwise count as True.
  if not isinstance(value, bool | np.bool_):
    raise TypeError(f'{name} must be True or False, got {value!r}.')
  return bool(value)


def check_callable(name: str, value: Any) -> None:
  """Raise TypeError unless `value` is callable."""
  if not callable(value):
    raise TypeError(f'{name} must be a function, got {value!r}.')


def check_type(name: str, value: Any, expected: type, hint: str = '') -> None:
  """Raise TypeError unless `value` is of a type; `hint` says what makes one."""
  if not isinstance(value, expected):
    wanted = f'{expected.__module__.partition(".")[0]}.{expected.__name__}'
    # The repr of a state or a module may be pages long.
    is_short = isinstance(value, str | int | float | None)
    got = repr(value) if is_short else type(value).__name__
    article = 'an' if wanted[0] in 'aeio' else 'a'
    raise TypeError(f'{name} must be {article} {wanted}{hint}, got {got}.')


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
  other = ', or an integer dtype' if tokens else ''
  raise ValueError(
    f'{name} must be a floating-point dtype of 16 or 32 bits (64 with '
    f'jax_enable_x64){other}, got {value!r}.'
  )


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
  if not (jnp.issubdtype(dtype, jnp.floating) or dtype.kind in 'iu'):
    raise TypeError(f'{name} must be concrete real numbers, got {value!r}.')
  return array.astype(np.float64)


def check_array(name: str, value: Any) -> Any:
  """Return an array of NumPy or JAX; raise TypeError for anything else."""
  if not isinstance(value, ARRAYS):
    raise TypeError(f'{name} must be an array, got {type(value).__name__}.')
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
  if array.shape != shape or (dtype is not None and array.dtype != dtype):
    wanted = '' if dtype is None else f'{jnp.dtype(dtype)} '
    raise ValueError(
      f'{name} must be {wanted}{axes} = {list(shape)}, got '
      f'{array.dtype}{list(array.shape)}.'
    )
  return array


def check_arrays(name: str, tree: Any) -> None:
  """Raise TypeError unless all leaves of a tree are arrays or numbers."""
  for path, leaf in jax.tree.leaves_with_path(tree):
    if not isinstance(leaf, (*ARRAYS, int, float, complex)):
      place = jax.tree_util.keystr(path)
      raise TypeError(f'{name}{place} must be an array, got {leaf!r}.')


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
  if value.dtype != jnp.uint32 or value.shape[-1:] != words:
    raise TypeError(
      f'{name} must be a PRNG key, jax.random.key(seed), or the data uint32'
      f'{list(words)} of a key of the default implementation, got {value.dtype}'
      f'{list(value.shape)}. jax.random.wrap_key_data makes keys from other data.'
    )
  return jax.random.wrap_key_data(jnp.asarray(value))
