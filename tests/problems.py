"""Small problems that several tests share."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import fptt_jax
from fptt_jax import nn


def lstm(
  in_features: int = 2, hidden: int = 5, out: int = 1, dtype: jax.typing.DTypeLike = jnp.float32, dropout: float = 0.0
) -> fptt_jax.Model:
  """A one-layer LSTM with a readout."""
  return nn.from_nnx(
    lambda rngs: nn.Stack(
      nn.LSTM(in_features, hidden, forget_bias=1.0, param_dtype=dtype, rngs=rngs),
      nnx.Dropout(dropout),
      nnx.Linear(hidden, out, param_dtype=dtype, rngs=rngs),
    )
  )


def regression_batch(num_steps: int, batch_size: int, features: int = 2, seed: int = 0, dtype: type = np.float32) -> fptt_jax.Batch:
  """Random sequences with one real target each."""
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(num_steps, batch_size, features)).astype(dtype)
  return fptt_jax.Batch(inputs, rng.normal(size=batch_size).astype(dtype))


def tagging_batch(
  num_steps: int, batch_size: int, features: int = 2, classes: int = 3, seed: int = 0, dtype: type = np.float32
) -> fptt_jax.Batch:
  """Random sequences with a label each step."""
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(num_steps, batch_size, features)).astype(dtype)
  return fptt_jax.Batch(inputs, rng.integers(0, classes, (num_steps, batch_size)).astype(np.int32))
