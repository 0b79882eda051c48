"""Small problems, comparators and compilation options that tests share."""

from collections.abc import Callable, Iterator
import contextlib
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import fptt_jax
from fptt_jax import nn

AS_FOR_USERS = {
  'xla_backend_optimization_level': 3,
  'xla_cpu_parallel_codegen_split_count': 32,
  'xla_cpu_use_fusion_emitters': True,
}
QUICK = {
  'xla_backend_optimization_level': 0,
  'xla_cpu_parallel_codegen_split_count': 1,
  'xla_cpu_use_fusion_emitters': False,
}
"""Options by which XLA compiles several times faster for the CPU, to slower programs:
for all but speed and memory.
"""
if tuple(map(int, jax.__version__.split('.')[:2])) > (
  0,
  10,
):  # Later ones have one kind of fusion alone.
  del AS_FOR_USERS['xla_cpu_use_fusion_emitters'], QUICK['xla_cpu_use_fusion_emitters']
QUICK_FLAGS = ' '.join(
  f'--{name}={str(value).lower()}' for name, value in QUICK.items()
)
"""The same as `XLA_FLAGS`."""


@contextlib.contextmanager
def default_float64(enabled: bool = True) -> Iterator[None]:
  """Lets arrays of 64 bits exist, or not, within the context.

  JAX names its own context manager for this `jax.experimental.enable_x64` in old
  releases and `jax.enable_x64` in new ones; the option has one name in all of them.

  Args:
    enabled: Whether float64 and int64 are allowed.
  """
  before = jax.config.read('jax_enable_x64')
  jax.config.update('jax_enable_x64', enabled)
  try:
    yield
  finally:
    jax.config.update('jax_enable_x64', before)


def assert_close(got: Any, expected: Any, tolerance: float, least: float = 1.0) -> None:
  """Compares each leaf to `tolerance` times its largest number, which counts as `least`
  at least.
  """
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = np.abs(b).max(initial=least)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def quick(function: Callable[..., Any]) -> Callable[..., Any]:
  """`jax.jit` with the options above, whatever the suite runs with."""
  return jax.jit(function, compiler_options=QUICK)


def optimized(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """The program that a user has of it."""
  return lowered.compile(
    compiler_options=AS_FOR_USERS if jax.default_backend() == 'cpu' else None
  )


def quick_trainer(*args: Any, **kwargs: Any) -> fptt_jax.Trainer:
  """`fptt_jax.make_trainer` compiled by `quick`; its step keeps the old state alive."""
  return quickened(fptt_jax.make_trainer(*args, **kwargs))


def quickened(trainer: fptt_jax.Trainer) -> fptt_jax.Trainer:
  """A trainer compiled by `quick`; nothing may be made of it, such as a population."""
  return trainer._replace(step=quick(trainer.step), evaluate=quick(trainer.evaluate))


def lstm(
  in_features: int = 2,
  hidden: int = 5,
  out: int = 1,
  dtype: jax.typing.DTypeLike = jnp.float32,
  dropout: float = 0.0,
) -> fptt_jax.Model:
  """A one-layer LSTM with a readout."""
  return nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.LSTM(in_features, hidden, forget_bias=1.0, param_dtype=dtype, rngs=rngs),
      nnx.Dropout(dropout),
      nnx.Linear(hidden, out, param_dtype=dtype, rngs=rngs),
    )
  )


def regression_batch(
  num_steps: int,
  batch_size: int,
  features: int = 2,
  seed: int = 0,
  dtype: type = np.float32,
) -> fptt_jax.Batch:
  """Random sequences with one real target each."""
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(num_steps, batch_size, features)).astype(dtype)
  return fptt_jax.Batch(inputs, rng.normal(size=batch_size).astype(dtype))


def tagging_batch(
  num_steps: int,
  batch_size: int,
  features: int = 2,
  classes: int = 3,
  seed: int = 0,
  dtype: type = np.float32,
) -> fptt_jax.Batch:
  """Random sequences with a label each step."""
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(num_steps, batch_size, features)).astype(dtype)
  return fptt_jax.Batch(
    inputs, rng.integers(0, classes, (num_steps, batch_size)).astype(np.int32)
  )


def label_batch(
  num_steps: int,
  batch_size: int,
  features: int = 2,
  classes: int = 3,
  seed: int = 0,
  dtype: type = np.float32,
) -> fptt_jax.Batch:
  """Random sequences with one label each."""
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(num_steps, batch_size, features)).astype(dtype)
  return fptt_jax.Batch(inputs, rng.integers(0, classes, batch_size).astype(np.int32))


def series_batch(
  num_steps: int,
  batch_size: int,
  features: int = 2,
  out: int = 1,
  seed: int = 0,
  dtype: type = np.float32,
) -> fptt_jax.Batch:
  """Random sequences with a real target each step."""
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(num_steps, batch_size, features)).astype(dtype)
  return fptt_jax.Batch(
    inputs, rng.normal(size=(num_steps, batch_size, out)).astype(dtype)
  )


# A new model is probed when it is first trained, which takes longer than the training.
@functools.cache
def elman(
  features: int = 2,
  hidden: int = 4,
  out: int = 1,
  dtype: jax.typing.DTypeLike = jnp.float32,
  dropout: float = 0.0,
) -> fptt_jax.Model:
  """h' = tanh(x A + h C + b), y = h V as plain functions: quick to compile, and
  independent of `fptt_jax.nn` and Flax.
  """

  def init(key: jax.Array) -> dict[str, jax.Array]:
    a, b, c, v = jax.random.split(key, 4)
    return {
      'a': jax.random.normal(a, (features, hidden), dtype),
      'b': jax.random.normal(b, (hidden,), dtype),
      'c': jax.random.normal(c, (hidden, hidden), dtype) / hidden**0.5,
      'v': jax.random.normal(v, (hidden, out), dtype),
    }

  def apply(params, h, x, mask, key):
    def step(h, inputs):
      x_t, mask_t = inputs
      new = jnp.tanh(x_t @ params['a'] + h @ params['c'] + params['b'][None])
      h = new if mask_t is None else jnp.where(mask_t[:, None], new, h)
      return h, new

    h, hs = jax.lax.scan(step, h, (x, mask))
    if dropout and key is not None:
      hs = (
        hs
        * jax.random.bernoulli(key, 1 - dropout, hs.shape).astype(hs.dtype)
        / (1 - dropout)
      )
    return h, hs @ params['v']

  return fptt_jax.Model(
    init, lambda batch_size: jnp.zeros((batch_size, hidden), dtype), apply
  )
