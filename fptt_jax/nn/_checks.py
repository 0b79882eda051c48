"""Argument validation for layers."""

from typing import Any

from flax import nnx
import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import (
  check_array,
  check_dtype,
  check_floats_or_tokens,
  check_shape,
  check_size,
  check_type,
  require,
)
from fptt_jax._trees import check_like

CARRY_STATE = (
  'Carry it in the hidden state. Use LayerNorm in place of batch normalization: it '
  'keeps no running statistics.'
)
"""What to do about state that a train step does not carry."""


def check_rngs(rngs: Any) -> None:
  """Raise a TypeError unless `rngs` are random streams; Flax names a missing one."""
  check_type('rngs', rngs, nnx.Rngs, ', such as nnx.Rngs(0)')


def check_batch_size(batch_size: Any) -> Any:
  """Return B as an int, or the symbolic size of `jax.export`.

  Raises:
    ValueError: B is not an integer >= 1.
  """
  if export.is_symbolic_dim(batch_size):
    return batch_size
  return check_size('batch_size', batch_size)


def steps_and_rows(x: Any) -> tuple[int, int]:
  """Return (S, B) of inputs [S, B, ...], an array or a tree of arrays."""
  steps, rows = jax.tree.leaves(x)[0].shape[:2]
  return steps, rows


def inputs_like(features_shape: Any, dtype: Any, *leading: int) -> Any:
  """Return shapes and dtypes [*leading, ...] of inputs, for one dtype or a dict."""
  if not isinstance(features_shape, dict):
    return jax.ShapeDtypeStruct((*leading, *features_shape), dtype)
  dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(features_shape, dtype)
  return {
    name: inputs_like(shape, dtypes[name], *leading)
    for name, shape in features_shape.items()
  }


def check_dtypes(dtype: Any, features_shape: Any) -> Any:
  """Return the dtype of the inputs, or a dict of them like `features_shape`."""
  if not isinstance(dtype, dict):
    return check_dtype('dtype', dtype, tokens=True)
  names = set(features_shape) if isinstance(features_shape, dict) else set()
  accepted = 'one dtype, or a dict with the keys of features_shape'
  require(set(dtype) == names, 'dtype', accepted, dtype)
  return {name: check_dtypes(dtype[name], features_shape[name]) for name in dtype}


def check_features_shape(features_shape: Any) -> Any:
  """Return the shape of one step, or a dict of them; a ValueError names what is not a
  shape.
  """
  if isinstance(features_shape, dict) and features_shape:
    return {name: check_features_shape(shape) for name, shape in features_shape.items()}
  is_shape = isinstance(features_shape, tuple | list)
  require(is_shape, 'features_shape', 'the shape (D,) of one step', features_shape)
  return tuple(check_size('features_shape', size) for size in features_shape)


def check_inputs(layer: nnx.Module, x: Any, features: int) -> jax.Array:
  """Return a layer's inputs as a JAX array.

  Args:
    layer: errors name its class.
    x: inputs [S, B, D].
    features: the D that the layer takes.

  Raises:
    ValueError: the shape is another one.
    TypeError: the inputs are not an array of floats or integers.
  """
  name = f'inputs of {type(layer).__name__}'
  x = check_array(name, x)
  fits = x.ndim == 3 and x.shape[-1] == features
  require(fits, name, f'[S, B, {features}]', x.shape)
  check_floats_or_tokens(name, x)
  return jnp.asarray(x)


def same_values(array: Any, other: Any) -> bool:
  """Return whether two arrays or typed PRNG keys are equal; NaN equals NaN."""
  if (array.shape, array.dtype) != (other.shape, other.dtype):
    return False
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    array, other = jax.random.key_data(array), jax.random.key_data(other)
  return np.array_equal(array, other, equal_nan=True)


def check_window(layer: Any, state: Any, x: jax.Array, mask: Any) -> Any:
  """Check that state and mask of a window fit its inputs [S, B, D].

  Returns:
    The state in the layer's own structure: it may come as a dict with the same names.

  Raises:
    ValueError: a part of the state has the wrong shape or dtype, or the mask is not
      bool [S, B].
    TypeError: the mask is not an array.
  """
  name = type(layer).__name__
  if mask is not None:
    check_shape(f'mask of {name}', mask, '[S, B]', steps_and_rows(x), bool)
  # Shapes only: the initial state is not computed.
  expected = jax.eval_shape(lambda: layer.initial_state(steps_and_rows(x)[1]))
  source = 'as initial_state gives it'
  return check_like(f'{name}: state', state, expected, source, exactly=True)
