"""Dtype promotion for sums and products of low-precision numbers."""

import jax
import jax.numpy as jnp


def at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Return `dtype`, or float32 if it has fewer than 32 bits."""
  # Sums of many bfloat16 or float16 numbers lose their low digits or overflow.
  if jnp.finfo(dtype).bits >= 32:
    return jnp.dtype(dtype)
  return jnp.dtype(jnp.float32)


def widen(x: jax.Array) -> jax.Array:
  """Return `x` in its own dtype, or in float32 if that has fewer than 32 bits."""
  return x.astype(at_least_float32(x.dtype))
