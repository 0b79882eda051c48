"""FPTT around Flax's own LSTM cell."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.cases import Case
from experiments.benchmark.ours import make_model, make_optimizer


def flax_cell(case: Case) -> Callable[[nnx.Rngs], Any]:
  """Flax's own LSTM."""
  return lambda rngs: nnx.OptimizedLSTMCell(case.features, case.hidden, rngs=rngs)


def flax_loop(case: Case, params: Any = None) -> Callable[..., Any]:
  """Flax's cell in a scan over the steps of a window, compiled; the windows in a Python
  loop. `params` are what it starts from.
  """
  model, optimizer = make_model(case, flax_cell(case)), make_optimizer()
  params = model.init(jax.random.key(0)) if params is None else params
  carry = [params, optimizer.init(params)]

  def loss(
    params: Any, hidden: Any, x: jax.Array, targets: jax.Array, beta: jax.Array
  ) -> tuple[jax.Array, Any]:
    hidden, outputs = model.apply(params, hidden, x, None, None)
    if case.words:
      return optax.losses.softmax_cross_entropy_with_integer_labels(
        outputs, targets
      ).mean(), hidden
    if case.outputs == 1:
      return beta * jnp.mean(jnp.square(outputs[-1, :, 0] - targets)), hidden
    return beta * optax.losses.softmax_cross_entropy_with_integer_labels(
      outputs[-1], targets
    ).mean(), hidden

  @jax.jit
  def window(
    params: Any,
    opt_state: Any,
    hidden: Any,
    inputs: jax.Array,
    targets: jax.Array,
    start: np.int32,
  ) -> tuple[Any, ...]:
    cut = lambda array: jax.lax.dynamic_slice_in_dim(array, start, case.size)
    x, labels, beta = (
      cut(inputs),
      cut(targets) if case.words else targets,
      (start + case.size) / case.num_steps,
    )
    (value, hidden), grads = jax.value_and_grad(loss, has_aux=True)(
      params, hidden, x, labels, beta
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, hidden, value

  def step(inputs: Any, targets: Any) -> list[jax.Array]:
    hidden, values = model.initial_state(case.batch_size), []
    for start in range(0, case.num_steps, case.size):
      *carry[:], hidden, value = window(
        *carry, hidden, inputs, targets, np.int32(start)
      )
      values.append(value)
    return jax.block_until_ready(values)

  return step
