"""Windows of Haiku's LSTM."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark.cases import Case
import fptt_jax


def make_model(case: Case) -> fptt_jax.Model:
  """Return the model of a case in Haiku: an LSTM unrolled by `hk.dynamic_unroll`.

  Args:
    case: the shapes.

  Raises:
    ImportError: Haiku is not installed.
  """
  import haiku as hk

  def run(x: jax.Array, state: Any, last: Any = None) -> tuple[Any, jax.Array]:
    if case.words:
      x = hk.Embed(case.outputs, case.features)(x)
    y, state = hk.dynamic_unroll(hk.LSTM(case.hidden), x, state)
    if last is not None:
      y = jax.lax.dynamic_slice_in_dim(y, last, 1)
    return state, hk.Linear(case.outputs)(y)

  def initial_state(batch_size: int) -> Any:
    zeros = jnp.zeros((batch_size, case.hidden))
    return hk.LSTMState(zeros, zeros)

  example = jnp.zeros((1, 1, case.features))
  if case.words:
    example = jnp.zeros((1, 1), jnp.int32)
  pure: Any = hk.without_apply_rng(hk.transform(run))

  def init(key: jax.Array) -> Any:
    return pure.init(key, example, initial_state(1))

  def apply(
    params: Any, state: Any, x: Any, mask: Any, key: Any
  ) -> tuple[Any, jax.Array]:
    # The benchmark's batches have no masks, and the model has no dropout.
    return pure.apply(params, x, state)

  def apply_last(
    params: Any, state: Any, x: Any, mask: Any, key: Any, last: Any
  ) -> tuple[Any, jax.Array]:
    return pure.apply(params, x, state, last)

  return fptt_jax.Model(init, initial_state, apply, apply_last)
