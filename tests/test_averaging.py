"""Averaged SGD: a mean beside the training, and when it begins."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import averaging
import fptt_jax


@pytest.mark.parametrize('base', [optax.sgd(0.1), fptt_jax.fptt(optax.adam(0.1), alpha=0.5)], ids=['sgd', 'fptt'])
def test_the_mean_of_the_weights_after_activation(base: optax.GradientTransformation) -> None:
  """The trajectory is that of the bare optimiser; from activation on the average is the mean of the weights after each update."""
  optimizer, params = averaging.averaged(base), {'w': jnp.asarray([1.0, -2.0])}
  bare, state, other = params, optimizer.init(params), base.init(params)
  visited = []
  for step in range(6):
    grads = {'w': jnp.sin(params['w'] + step)}
    updates, state = optimizer.update(grads, state, params)
    bare_updates, other = base.update(grads, other, bare)
    params, bare = optax.apply_updates(params, updates), optax.apply_updates(bare, bare_updates)
    np.testing.assert_array_equal(params['w'], bare['w'])
    visited.append(np.asarray(params['w']))
    if step == 1:
      np.testing.assert_array_equal(averaging.averaged_params(state, params)['w'], params['w'])
      state = averaging.activate(state)
      np.testing.assert_array_equal(averaging.averaged_params(state, params)['w'], params['w'])
  np.testing.assert_allclose(averaging.averaged_params(state, params)['w'], np.mean(visited[2:], axis=0), rtol=1e-6)
  assert int(state.average_count) == 4


def test_extra_arguments_reach_the_optimiser() -> None:
  """The trainer's grad_fn gets through to fptt's explicit estimate, which refuses to go without."""
  optimizer = averaging.averaged(fptt_jax.fptt(optax.sgd(0.1), gradient_estimate='explicit'))
  params = {'w': jnp.ones(2)}
  _, state = optimizer.update(params, optimizer.init(params), params, grad_fn=lambda p: {'w': 3 * p['w']})
  np.testing.assert_allclose(state.optimizer_state.lam['w'], 3 * 0.9 * np.ones(2), rtol=1e-6)


@pytest.mark.parametrize(
  ('losses', 'expected'),
  [
    ([], False),
    ([5, 4, 3], False),
    ([5, 4, 3, 3.5], False),  # 3.5 is below 5, the only check more than n = 2 ago but one
    ([3, 4, 5, 2.5], False),
    ([3, 4, 5, 3.5], True),  # worse than 3, of three checks ago
    ([3, 2, 5, 2.5, 2.2], True),
  ],
)
def test_the_trigger_looks_past_the_last_n_checks(losses: list[float], expected: bool) -> None:
  """Algorithm 1 of Merity et al. with n = 2: worse than the best of more than n checks ago."""
  assert averaging.triggered(losses, 2) == expected
