"""FPTT around Flax's own LSTM: its cell, and its `nnx.RNN`."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.cases import Case
from experiments.benchmark.ours import make_model, make_optimizer
import fptt_jax


def flax_cell(case: Case) -> Callable[[nnx.Rngs], Any]:
  """Return a function (rngs) -> Flax's own LSTM."""
  return lambda rngs: nnx.OptimizedLSTMCell(case.features, case.hidden, rngs=rngs)


def rnn_model(case: Case) -> fptt_jax.Model:
  """Return the model of a case by `nnx.RNN`, which scans Flax's own cell.

  Args:
    case: the shapes.
  """

  def build(key: jax.Array) -> nnx.List[Any]:
    rngs = nnx.Rngs(key)
    embedding = nnx.Embed(case.outputs, case.features, rngs=rngs)
    rnn = nnx.RNN(flax_cell(case)(rngs), time_major=True, return_carry=True)
    readout = nnx.Linear(case.hidden, case.outputs, rngs=rngs)
    return nnx.List([embedding, rnn, readout] if case.words else [rnn, readout])

  parts: Any = nnx.split(build(jax.random.key(0)), nnx.Param, ...)
  structure, _, others = parts

  def init(key: jax.Array) -> Any:
    return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

  def initial_state(batch_size: int) -> tuple[jax.Array, jax.Array]:
    zeros = jnp.zeros((batch_size, case.hidden))
    return zeros, zeros

  def run(params: Any, state: Any, x: jax.Array, last: Any = None) -> tuple[Any, Any]:
    *embedding, rnn, readout = nnx.merge(structure, params, others)
    inputs = embedding[0](x) if embedding else x
    state, y = rnn(inputs, initial_carry=state)
    if last is not None:
      y = jax.lax.dynamic_slice_in_dim(y, last, 1)
    return state, readout(y)

  def apply(params: Any, state: Any, x: Any, mask: Any, key: Any) -> tuple[Any, Any]:
    # The benchmark's batches have no masks, and the model has no dropout.
    return run(params, state, x)

  def apply_last(
    params: Any, state: Any, x: Any, mask: Any, key: Any, last: Any
  ) -> tuple[Any, Any]:
    return run(params, state, x, last)

  return fptt_jax.Model(init, initial_state, apply, apply_last)


def flax_loop(case: Case, params: Any = None) -> Callable[..., Any]:
  """Return a train step that loops over the windows in Python.

  Each window is one compiled program, a scan of Flax's cell over its steps. People who
  do not put the windows into a scan write such a loop.

  Args:
    case: model and shapes; K must divide T.
    params: parameters to start from; drawn from seed 0 if None.

  Returns:
    (inputs [T, B, ...], targets) -> list of the losses of the windows.
  """
  model = make_model(case, flax_cell(case))
  optimizer = make_optimizer()
  params = model.init(jax.random.key(0)) if params is None else params
  opt_state = optimizer.init(params)
  loss = _window_loss(case, model.apply)

  @jax.jit
  def window(
    params: Any,
    opt_state: Any,
    hidden: Any,
    inputs: jax.Array,
    targets: jax.Array,
    start: np.int32,
  ) -> tuple[Any, ...]:
    # The start is an argument, so one program serves all windows.
    x = jax.lax.dynamic_slice_in_dim(inputs, start, case.size)
    if case.words:
      targets = jax.lax.dynamic_slice_in_dim(targets, start, case.size)
    beta = (start + case.size) / case.num_steps
    (value, hidden), grads = jax.value_and_grad(loss, has_aux=True)(
      params, hidden, x, targets, beta
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, hidden, value

  def step(inputs: Any, targets: Any) -> list[jax.Array]:
    nonlocal params, opt_state
    hidden = model.initial_state(case.batch_size)
    values = []
    for start in range(0, case.num_steps, case.size):
      params, opt_state, hidden, value = window(
        params, opt_state, hidden, inputs, targets, np.int32(start)
      )
      values.append(value)
    return jax.block_until_ready(values)

  return step


def _window_loss(
  case: Case, apply: Callable[..., tuple[Any, Any]]
) -> Callable[..., tuple[jax.Array, Any]]:
  """Return the loss of a window as a function of the parameters.

  Args:
    case: the kind of the loss.
    apply: `Model.apply` of the model.

  Returns:
    (params, hidden, x [S, B, D], targets, beta) -> (loss, hidden after the window).
  """

  def loss(
    params: Any, hidden: Any, x: jax.Array, targets: jax.Array, beta: jax.Array
  ) -> tuple[jax.Array, Any]:
    hidden, outputs = apply(params, hidden, x, None, None)
    if case.words:
      each = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, targets)
      return each.mean(), hidden
    if case.outputs == 1:
      return beta * jnp.mean(jnp.square(outputs[-1, :, 0] - targets)), hidden
    each = optax.losses.softmax_cross_entropy_with_integer_labels(outputs[-1], targets)
    return beta * each.mean(), hidden

  return loss
