"""From Linen per-step modules to the pure functions of `fptt_jax.Model`."""

from collections.abc import Callable
from typing import Any

from flax import linen
import jax
import jax.numpy as jnp
import optax

from fptt_jax._checks import describe, require
from fptt_jax._probe import (
  check_new_model,
  check_state_rows,
)
from fptt_jax._types import Model
from fptt_jax.nn._checks import (
  CARRY_STATE,
  check_batch_size,
  check_dtypes,
  check_features_shape,
  inputs_like,
  steps_and_rows,
)
from fptt_jax.nn._recurrent import scan_cell


def from_linen(
  module: linen.Module,
  features_shape: tuple[int, ...] | dict[str, Any],
  dtype: jax.typing.DTypeLike | dict[str, Any] = jnp.float32,
) -> Model:
  """Turn a Linen per-step module into a :class:`fptt_jax.Model`.

  Args:
    module: follows the protocol of flax's cells: `module(carry, x_t) -> (carry, y_t)`
      and `initialize_carry(key, input_shape)`. It may hold an embedding, several cells
      and a readout.
    features_shape: shape of one step of one sequence: (D,), or () for tokens; a dict of
      shapes for inputs that are a dict. `initialize_carry` then gets a dict, too.
    dtype: dtype of the inputs, or a dict of dtypes.

  Returns:
    The model. Its params are the module's 'params' collection. In training, the stream
    'dropout' gets a new key at each step. In evaluation there is none, so
    `self.has_rng('dropout')` is False.

  Raises:
    TypeError: the module does not follow the protocol, or has other collections than
      'params'.
    ValueError: `features_shape` is not a shape, `dtype` is neither floating point nor
      integer, or their keys differ.

  Example:
    >>> from flax import linen
    >>> from fptt_jax import nn
    >>> model = nn.from_linen(linen.OptimizedLSTMCell(16), (1,))
  """
  is_cell = isinstance(module, linen.Module) and hasattr(module, 'initialize_carry')
  accepted = 'a per-step cell with initialize_carry(key, input_shape)'
  got = module if isinstance(module, type) else describe(module)
  require(is_cell, 'module', accepted, got, error=TypeError)
  features_shape = check_features_shape(features_shape)
  dtype = check_dtypes(dtype, features_shape)

  def initial_state(batch_size: int) -> Any:
    like = inputs_like(features_shape, dtype, check_batch_size(batch_size))
    shape = jax.tree.map(lambda leaf: leaf.shape, like)
    return module.initialize_carry(jax.random.key(0), shape)

  def init(key: jax.Array) -> Any:
    x = optax.tree.zeros_like(inputs_like(features_shape, dtype, 1))
    return module.init(key, initial_state(1), x).get('params', {})

  def apply(
    params: Any, state: Any, x: jax.Array, mask: jax.Array | None, key: jax.Array | None
  ) -> tuple[Any, jax.Array]:
    def step(
      state: Any, inputs: tuple[jax.Array, jax.Array | None]
    ) -> tuple[Any, jax.Array]:
      x_t, key_t = inputs
      rngs = None if key_t is None else {'dropout': key_t}
      result: Any = module.apply({'params': params}, state, x_t, rngs=rngs)
      return result

    keys = None if key is None else jax.random.split(key, steps_and_rows(x)[0])
    return scan_cell(step, state, (x, keys), mask)

  name = type(module).__name__
  check_state_rows(name, initial_state)
  x_t = inputs_like(features_shape, dtype, 1)
  others = _other_collections(module, initial_state, x_t)
  accepted = "'params' only"
  require(not others, 'collections of module', accepted, others, CARRY_STATE, TypeError)
  model = Model(init, initial_state, apply)
  check_new_model(model, inputs_like(features_shape, dtype, 1, 1), name)
  return model


def _other_collections(
  module: linen.Module, initial_state: Callable[[int], Any], x: jax.ShapeDtypeStruct
) -> list[str]:
  """Return the names of a Linen module's collections other than 'params'."""

  def init(key: jax.Array, x: jax.Array) -> Any:
    return module.init(key, initial_state(1), x)

  collections = jax.eval_shape(init, jax.random.key(0), x)
  return sorted(set(collections) - {'params'})
