"""Train states as plain NumPy arrays, for files that know neither named tuples nor
keys.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import require_type
from fptt_jax._trees import arrange_like, check_like, distinct_paths


def state_to_arrays(state: Any) -> dict[str, np.ndarray]:
  """Return a state, or any tree of arrays, as NumPy arrays by path.

  Args:
    state: A tree of concrete arrays. PRNG keys become their data.

  Returns:
    {'params/layers/0/kernel': array, ..., 'key': uint32 array}, as
    `numpy.savez`, `pickle` or `flax.serialization.msgpack_serialize` take them.

  Raises:
    ValueError: Two arrays have the same path, because a name contains '/'.

  Example:
    >>> import jax.numpy as jnp, fptt_jax
    >>> fptt_jax.state_to_arrays({'layers': [jnp.ones(2)]})
    {'layers/0': array([1., 1.], dtype=float32)}
  """

  def as_array(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)

  paths = distinct_paths('state', state)
  return dict(zip(paths, map(as_array, jax.tree.leaves(state)), strict=True))


def state_from_arrays(template: Any, arrays: Mapping[str, Any]) -> Any:
  """Return the state whose arrays :func:`state_to_arrays` returned.

  Args:
    template: A state of the same structure, such as a fresh one, or its shapes as
      `jax.eval_shape(trainer.init, key, batch)` gives them.
    arrays: What :func:`state_to_arrays` returned, or `numpy.load` or
      `flax.serialization.msgpack_restore` of it; also a nested tree, such as a state
      that was restored without a template.

  Returns:
    A tree like `template`, of JAX's arrays. Floating-point numbers have the template's
    dtypes, in which large ones may become infinite. Keys are of the template's
    implementation.

  Raises:
    ValueError: Paths are missing or unexpected, or an array has another shape or kind
      of numbers; named by path.
    TypeError: `arrays` is not a mapping.

  Example:
    >>> import jax.numpy as jnp
    >>> import fptt_jax
    >>> state = {'w': jnp.ones(2)}
    >>> fptt_jax.state_from_arrays(state, fptt_jax.state_to_arrays(state))
    {'w': Array([1., 1.], dtype=float32)}
  """
  accepted = 'a mapping of names to arrays'
  require_type(isinstance(arrays, Mapping), 'arrays', accepted, arrays)
  name, whose = 'arrays', 'as the template has it'
  tree = arrange_like(name, {path: arrays[path] for path in arrays}, template, whose)

  def restored(array: Any, like: Any) -> jax.Array:
    if _is_key(array):
      return array
    # NumPy's files do not tell types that it lacks, such as bfloat16.
    raw = getattr(array, 'dtype', np.dtype(bool))
    is_nameless = raw.type is np.void and raw.fields is None
    if is_nameless and raw.itemsize == like.dtype.itemsize:
      array = array.view(like.dtype)
    if _is_key(like):
      implementation = jax.random.key_impl(jnp.empty(0, like.dtype))
      return jax.random.wrap_key_data(jnp.asarray(array), impl=implementation)
    return jnp.asarray(array)

  tree = check_like(name, jax.tree.map(restored, tree, template), template, whose)
  # A state that was saved in another width, such as float16, trains in the template's.
  return jax.tree.map(_in_width_of, tree, template)


def _in_width_of(leaf: jax.Array, like: Any) -> jax.Array:
  """Return a floating-point or complex array in the dtype of another one."""
  if not jnp.issubdtype(leaf.dtype, jnp.inexact):
    return leaf
  return leaf.astype(jax.dtypes.canonicalize_dtype(like.dtype))


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
