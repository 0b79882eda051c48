"""Refusing what layers cannot be made of or run on, with what was got and what was
expected.
"""

from typing import Any

from flax import nnx
import jax
from jax import export
import jax.numpy as jnp

from fptt_jax._checks import check_array, check_like, check_size


def check_rngs(rngs: Any) -> None:
  """A TypeError unless parameters can be drawn from `rngs`."""
  if not isinstance(rngs, nnx.Rngs) or not ('params' in rngs or 'default' in rngs):
    raise TypeError(
      "rngs must be nnx.Rngs with a stream for 'params', such as nnx.Rngs(0), got "
      f'{rngs!r}.'
    )


def check_embed(embed: Any) -> None:
  """A TypeError unless it is an embedding."""
  if not isinstance(embed, nnx.Embed):
    raise TypeError(f'embed must be an nnx.Embed, got {embed!r}.')


def check_batch_size(batch_size: Any) -> Any:
  """B as an int, or as the symbol it may be in `jax.export`; a ValueError if it is no
  integer >= 1.
  """
  return (
    batch_size
    if export.is_symbolic_dim(batch_size)
    else check_size('batch_size', batch_size)
  )


def check_inputs(layer: nnx.Module, x: Any, features: int) -> jax.Array:
  """Inputs [S, B, D] of D = `features` as a JAX array; a ValueError or TypeError that
  names the layer if they are none.
  """
  name = type(layer).__name__
  x = check_array(f'inputs of {name}', x)
  if x.ndim != 3 or x.shape[-1] != features:
    raise ValueError(f'{name} expected inputs [S, B, {features}], got shape {x.shape}.')
  if not (
    jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
  ):
    raise TypeError(f'{name} expected inputs that are numbers, got dtype {x.dtype}.')
  return jnp.asarray(x)


def check_window(layer: Any, state: Any, x: jax.Array, mask: Any) -> None:
  """Raises unless a window's state and mask fit its inputs [S, B, D]."""
  name = type(layer).__name__
  if mask is not None:
    mask = check_array(f'mask of {name}', mask)
    if mask.shape != x.shape[:2] or mask.dtype != bool:
      raise ValueError(
        f'{name} expected a mask bool[S, B] = bool{list(x.shape[:2])}, got '
        f'{mask.dtype}{list(mask.shape)}.'
      )
  expected = jax.eval_shape(lambda: layer.initial_state(x.shape[1]))
  check_like(
    f'{name}: state', state, expected, 'as initial_state gives it', exactly=True
  )
