"""Test whether shared examples make momentum harmful in windows.

The adding problem is trained in windows in two orders. In the order 'sequential' all
windows of a batch come one after the other, as in every trainer of the library. In the
order 'interleaved' several batches advance side by side: the first window of each, then
the second window of each, and so on. Both orders have the same windows and as many
updates, and each window starts from the hidden state that the one before it left.
Consecutive updates come from the same examples in the first order and from independent
ones in the second. If shared examples make momentum harmful, it is harmless there.

The orders differ in two more ways. In the second one a hidden state is as many updates
old as batches advance side by side, not one, and consecutive updates have the same
window number.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import add_task
import fptt_jax

ORDERS = ('sequential', 'interleaved')
"""Orders of the updates."""

MOMENTA = (0.9, 0.0, -0.3)
"""Values of Adam's b1."""


class Settings(NamedTuple):
  """Settings of a study.

  Attributes:
    seq_len: T, a multiple of K.
    num_windows: K.
    hidden: H, units of the LSTM.
    batch_size: B.
    lanes: batches that advance side by side.
    rounds: number of times that `lanes` batches are drawn.
    test_size: sequences of the test set.
    rates: learning rates to choose from, of Adam. They fall to 0 along a half cosine.
    tune_seed: seed of the runs that choose a rate.
  """

  seq_len: int
  num_windows: int
  hidden: int
  batch_size: int
  lanes: int
  rounds: int
  test_size: int
  rates: tuple[float, ...]
  tune_seed: int = 1000


def train(
  settings: Settings, order: str, momentum: float, rate: jax.Array, seed: jax.Array
) -> jax.Array:
  """Train one run and return its test error.

  Args:
    settings: settings of the study.
    order: a name in :data:`ORDERS`.
    momentum: b1.
    rate: float [], the first learning rate.
    seed: int [], seed of the weights and of all batches.

  Returns:
    float32 [], the mean squared error of the last weights on the test set.
  """
  num_lanes, num_windows = settings.lanes, settings.num_windows
  model = add_task.make_model(add_task.Config(hidden=settings.hidden))
  updates = settings.rounds * num_lanes * num_windows
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.cosine_decay_schedule(rate, updates), b1=momentum),
  )
  weights_key, batch_key, test_key = jax.random.split(jax.random.key(seed), 3)

  def loss(
    params: Any, hidden: Any, x: jax.Array, targets: jax.Array, k: jax.Array
  ) -> tuple[jax.Array, Any]:
    hidden, last = _run(model, params, hidden, x)
    # The weight of the loss of window k is that of `losses.terminal_regression`.
    return (k + 1) / num_windows * jnp.mean((last - targets) ** 2), hidden

  def update(
    learned: Any, hidden: Any, x: jax.Array, targets: jax.Array, k: jax.Array
  ) -> tuple[Any, Any]:
    params, opt_state = learned
    grads, hidden = jax.grad(loss, has_aux=True)(params, hidden, x, targets, k)
    steps, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, steps), opt_state), hidden

  def train_round(learned: Any, number: jax.Array) -> tuple[Any, None]:
    key = jax.random.fold_in(batch_key, number)
    inputs, targets = _draw_lanes(settings, key)
    start = model.initial_state(settings.batch_size)
    hidden = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_lanes), start)

    def visit(carry: Any, place: jax.Array) -> tuple[Any, None]:
      learned, hidden = carry
      if order == 'interleaved':
        k, lane = jnp.divmod(place, num_lanes)
      else:
        lane, k = jnp.divmod(place, num_windows)
      own = jax.tree.map(lambda leaf: leaf[lane], hidden)
      learned, own = update(learned, own, inputs[k, lane], targets[lane], k)
      hidden = jax.tree.map(lambda leaf, new: leaf.at[lane].set(new), hidden, own)
      return (learned, hidden), None

    places = jnp.arange(num_lanes * num_windows)
    (learned, _), _ = jax.lax.scan(visit, (learned, hidden), places)
    return learned, None

  params = model.init(weights_key)
  learned = (params, optimizer.init(params))
  (params, _), _ = jax.lax.scan(train_round, learned, jnp.arange(settings.rounds))
  test = add_task.draw_batch(test_key, settings.seq_len, settings.test_size)
  start = model.initial_state(settings.test_size)
  _, last = _run(model, params, start, test.inputs)
  return jnp.mean((last - test.targets) ** 2)


def _run(
  model: fptt_jax.Model, params: Any, hidden: Any, x: jax.Array
) -> tuple[Any, jax.Array]:
  """Return the hidden state after a window and the last output, [B]."""
  hidden, outputs = model.apply(params, hidden, x, None, None)
  assert isinstance(outputs, jax.Array)
  return hidden, outputs[-1, :, 0]


def _draw_lanes(settings: Settings, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draw a batch per lane, cut into windows.

  Args:
    settings: settings of the study.
    key: PRNG key.

  Returns:
    Inputs float32 [K, L, S, B, 2] and targets float32 [L, B], for L lanes.
  """
  keys = jax.random.split(key, settings.lanes)
  draw = jax.vmap(add_task.draw_batch, in_axes=(0, None, None))
  inputs, targets = draw(keys, settings.seq_len, settings.batch_size)[:2]
  windows = inputs.reshape(settings.lanes, settings.num_windows, -1, *inputs.shape[2:])
  return windows.swapaxes(0, 1), targets


def study(
  settings: Settings, order: str, momentum: float, seeds: Sequence[int]
) -> list[dict[str, Any]]:
  """Choose the rate of an order and a momentum, and train with it.

  The rate is chosen by the test error of a seed that is none of `seeds` and has a test
  set of its own.

  Args:
    settings: settings of the study.
    order: a name in :data:`ORDERS`.
    momentum: b1.
    seeds: seeds of the reported runs.

  Returns:
    A row per seed, with `order`, `momentum`, `seed`, `rate`, `test_mse` and
    `is_inside`, whether the rate is neither the lowest nor the highest of those tried.
  """

  def errors(rates: Sequence[float], seeds: Sequence[int]) -> np.ndarray:
    # Runs side by side in one program take little longer than one.
    run = jax.jit(
      jax.vmap(lambda rate, seed: train(settings, order, momentum, rate, seed))
    )
    return np.asarray(run(jnp.array(rates), jnp.array(seeds)))

  rates = settings.rates
  tried = errors(rates, [settings.tune_seed] * len(rates))
  best = int(np.nanargmin(tried))
  found = errors([rates[best]] * len(seeds), seeds)
  return [
    {
      'order': order,
      'momentum': momentum,
      'seed': seed,
      'rate': rates[best],
      'test_mse': float(error),
      'is_inside': 0 < best < len(rates) - 1,
    }
    for seed, error in zip(seeds, found, strict=True)
  ]
