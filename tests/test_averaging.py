"""Averaged SGD: a mean kept beside an optimizer it does not touch, and the trigger that
starts it.
"""

import chex
from helpers import elman, quick, tagging_batch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.core.averaging import (
  AveragedState,
  averaged,
  averaged_params,
  running_mean,
  running_params,
  schedule_free_params,
  start_averaging,
  triggered,
)
import fptt_jax

PARAMS = {'a': jnp.array([1.0, -2.0]), 'b': jnp.array([[0.5]])}


def gradients(step: int) -> dict[str, jax.Array]:
  return jax.tree.map(lambda p: p * 0.1 + 0.01 * step, PARAMS)


OPTIMIZERS = {
  'sgd': averaged(optax.sgd(0.5)),
  'around fptt': averaged(
    optax.chain(
      optax.clip(0.05), fptt_jax.fptt(optax.sgd(0.5, momentum=0.9), alpha=0.2)
    )
  ),
  'in a chain': optax.chain(optax.add_decayed_weights(0.1), averaged(optax.adam(0.1))),
  'injected': optax.inject_hyperparams(
    lambda learning_rate: averaged(optax.sgd(learning_rate))
  )(learning_rate=0.5),
  'around injected': averaged(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)),
}
BARE = {
  'sgd': optax.sgd(0.5),
  'around fptt': optax.chain(
    optax.clip(0.05), fptt_jax.fptt(optax.sgd(0.5, momentum=0.9), alpha=0.2)
  ),
  'in a chain': optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1)),
  'injected': optax.sgd(0.5),
  'around injected': optax.sgd(0.5),
}


@pytest.mark.parametrize('name', list(OPTIMIZERS))
def test_mean_of_the_weights_after_each_update(name: str) -> None:
  """Three updates, then the switch, then four: the weights are those without averaging
  throughout; before the first averaged update the current weights are returned, after
  it the mean of the iterates since the switch; switching on again changes nothing.
  """
  optimizer, bare = OPTIMIZERS[name], optax.with_extra_args_support(BARE[name])
  update = quick(lambda g, s, p: optimizer.update(g, s, p))
  params, state = PARAMS, optimizer.init(PARAMS)
  bare_params, bare_state = PARAMS, bare.init(PARAMS)
  iterates = []
  for step in range(7):
    if step in (3, 5):
      state = start_averaging(state)
    if step <= 3:
      chex.assert_trees_all_equal(averaged_params(state, params), params)
    updates, state = update(gradients(step), state, params)
    params = optax.apply_updates(params, updates)
    bare_updates, bare_state = bare.update(gradients(step), bare_state, bare_params)
    bare_params = optax.apply_updates(bare_params, bare_updates)
    chex.assert_trees_all_close(params, bare_params, rtol=1e-5, atol=1e-6)
    if step >= 3:
      iterates.append(params)
      mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *iterates)
      chex.assert_trees_all_close(
        averaged_params(state, params), mean, rtol=1e-5, atol=1e-6
      )


@pytest.mark.slow
def test_averaging_within_the_trainer() -> None:
  """Around an fptt that needs the trainer's extra arguments (two inner steps, explicit
  gradients) nothing of the training changes, switched on or not; fptt's own evaluation
  finds its state within, and the types of the state never change.
  """
  model, loss, batch = (
    elman(out=3),
    fptt_jax.losses.sequence_classification(3),
    tagging_batch(8, 4),
  )
  fptt = fptt_jax.fptt(optax.sgd(0.1), alpha=0.2, gradient_estimate='recomputed')
  plain = fptt_jax.make_trainer(model, loss, fptt, num_windows=4, inner_steps=2)
  trainer = fptt_jax.make_trainer(
    model, loss, averaged(fptt), num_windows=4, inner_steps=2
  )
  expected = plain.init(jax.random.key(0), batch)
  state = trainer.init(jax.random.key(0), batch)
  for on in (False, True):
    if on:
      switched = start_averaging(state.opt_state)
      assert jax.tree.map(jnp.result_type, switched) == jax.tree.map(
        jnp.result_type, state.opt_state
      )
      state = state._replace(opt_state=switched)
    with (
      jax.disable_jit()
    ):  # Operation by operation: two whole programs may be rounded differently.
      expected, _ = plain.step(expected, batch)
      state, _ = trainer.step(state, batch)
    chex.assert_trees_all_equal(state.params, expected.params)
    assert state.opt_state.averaged_count == (8 if on else 0)
  chex.assert_trees_all_equal(
    fptt_jax.fptt_eval_params(state.opt_state, state.params),
    fptt_jax.fptt_eval_params(expected.opt_state, expected.params),
  )
  mean = averaged_params(state.opt_state, state.params)
  assert optax.tree.norm(optax.tree.sub(mean, state.params)) > 0


def test_bfloat16_parameters_are_averaged_in_float32() -> None:
  """256 times 1 and then 256 times 1 + 1/128 average to the number halfway; a bfloat16
  mean would have stopped moving.
  """
  optimizer = averaged(optax.sgd(1.0))
  params = {'w': jnp.ones(1, jnp.bfloat16)}
  state = start_averaging(optimizer.init(params))

  def body(carry, grad):
    params, state = carry
    updates, state = optimizer.update({'w': grad[None]}, state, params)
    return (optax.apply_updates(params, updates), state), None

  grads = jnp.zeros(512, jnp.bfloat16).at[256].set(-1 / 128)
  (params, state), _ = quick(lambda c, g: jax.lax.scan(body, c, g))(
    (params, state), grads
  )
  assert isinstance(state, AveragedState)
  assert state.mean_params['w'].item() == pytest.approx(1 + 1 / 256, abs=1e-5)
  assert averaged_params(state, params)['w'].dtype == jnp.bfloat16


def test_running_mean_forgets_after_its_horizon() -> None:
  """The mean of all weights so far, then an exponential one, in NumPy; the weights are
  the base optimizer's.
  """
  optimizer, base = running_mean(optax.sgd(0.5), horizon=3), optax.sgd(0.5)
  params, expected_params = PARAMS, PARAMS
  state, base_state = optimizer.init(params), base.init(params)
  mean = np.zeros(2)
  for step in range(6):
    updates, state = optimizer.update(gradients(step), state, params)
    params = optax.apply_updates(params, updates)
    updates, base_state = base.update(gradients(step), base_state)
    expected_params = optax.apply_updates(expected_params, updates)
    mean = mean + (np.asarray(params['a']) - mean) / min(step + 1, 3)
  chex.assert_trees_all_equal(params, expected_params)
  np.testing.assert_allclose(running_params(state, params)['a'], mean, rtol=1e-5)


def test_schedule_free_params_are_optax_s() -> None:
  """For one run, and for two of different b1 that are stacked."""
  runs, expected = [], []
  for b1 in (0.8, 0.5):
    optimizer = optax.contrib.schedule_free(optax.sgd(0.5), 0.5, b1=b1)
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(3):
      updates, state = optimizer.update(gradients(step), state, params)
      params = optax.apply_updates(params, updates)
    runs.append((state, params))
    expected.append(optax.contrib.schedule_free_eval_params(state, params))
    found = schedule_free_params((state,), params, b1)
    chex.assert_trees_all_close(found, expected[-1])
  stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *runs)
  found = schedule_free_params(*stacked, jnp.array([0.8, 0.5]))
  all_expected = jax.tree.map(lambda *parts: jnp.stack(parts), *expected)
  chex.assert_trees_all_close(found, all_expected)


@pytest.mark.parametrize(
  ('losses', 'interval', 'expected'),
  [
    ([], 5, False),
    (
      [5, 4, 3, 2, 1, 2],
      5,
      False,
    ),  # nothing lies more than five epochs before the sixth
    ([5, 4, 3, 2, 1, 2, 6], 5, True),  # the seventh, 6, is worse than the first, 5
    (
      [5, 4, 3, 2, 1, 2, 4.5],
      5,
      False,
    ),  # it is worse than the last five but not than the first
    ([3, 4, 2], 1, False),
    ([3, 4, 5], 1, True),
    ([3, 2, 2.5, float('nan')], 1, False),
  ],
)
def test_trigger_by_hand(losses: list[float], interval: int, expected: bool) -> None:
  """Algorithm 1's condition on short histories."""
  assert triggered(losses, interval) is expected


def test_misuse_is_refused() -> None:
  """A state without averaging, an update without parameters, an interval of no
  epochs.
  """
  state = optax.sgd(0.1).init(PARAMS)
  for call in (lambda: start_averaging(state), lambda: averaged_params(state, PARAMS)):
    with pytest.raises(
      ValueError,
      match=r'expected the state of an optimizer wrapped in averaged\(\), got a tuple',
    ):
      call()
  optimizer = averaged(optax.sgd(0.1))
  with pytest.raises(ValueError, match='averaged needs the current parameters'):
    optimizer.update(PARAMS, optimizer.init(PARAMS))
  with pytest.raises(
    ValueError, match='non_monotone_interval must be at least 1, got 0'
  ):
    triggered([1.0], 0)
