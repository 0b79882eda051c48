"""FPTT's regularizer added to the update instead of the gradient."""

import helpers
from helpers import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fptt_jax import fptt, losses, spectral_radius
from fptt_jax._summary import find_states


def run(tx, grads, params):
  """Weights and states after each of several gradients."""
  state = tx.init(params)
  history = []
  for g in grads:
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    history.append((params, state))
  return history


def random_gradients(count, seed=0):
  rng = np.random.default_rng(seed)
  return [
    {'w': jnp.asarray(rng.normal(size=3)), 'b': jnp.asarray(rng.normal(size=()))}
    for _ in range(count)
  ]


PARAMS = {'w': np.array([1.0, -2.0, 0.5]), 'b': np.array(0.3)}


@pytest.mark.parametrize(
  'options',
  [dict(), dict(kappa=2.0), dict(kappa=1.5, beta=0.3, linear_scale=0.5)],
  ids=str,
)
def test_equals_the_gradient_s_form_for_sgd(x64, options):
  """With α here = η α there, W and W̄ are the same and Λ is η λ."""
  lr, alpha = 0.1, 0.7
  params = jax.tree.map(jnp.asarray, PARAMS)
  grads = random_gradients(12)
  inside = run(fptt(optax.sgd(lr), alpha=alpha, **options), grads, params)
  outside = run(
    fptt(optax.sgd(lr), alpha=lr * alpha, coupling='update', **options), grads, params
  )
  for (w, s), (w_out, s_out) in zip(inside, outside, strict=True):
    assert_close((w_out, s_out.w_bar), (w, s.w_bar), 1e-13)
    assert_close(s_out.lam, jax.tree.map(lambda lam: lr * lam, s.lam), 1e-13)


@pytest.mark.parametrize('inner_steps', [1, 2])
def test_a_trainer_s_windows_are_the_same_in_both_forms(x64, inner_steps):
  """By SGD, with α here = η α there, also where a window takes several steps."""
  lr, alpha = 0.1, 0.7
  batch = helpers.regression_batch(6, 4, dtype=np.float64)
  found = []
  for options in (dict(alpha=alpha), dict(alpha=lr * alpha, coupling='update')):
    trainer = helpers.quick_trainer(
      helpers.elman(dtype=jnp.float64),
      losses.terminal_regression(),
      fptt(optax.sgd(lr), **options),
      num_windows=3,
      inner_steps=inner_steps,
    )
    state = trainer.init(jax.random.key(0), batch)
    for _ in range(3):
      state, _ = trainer.step(state, batch)
    [tied] = find_states(state.opt_state)
    found.append((state.params, tied.w_bar))
  assert_close(found[1], found[0], 1e-12)


def test_by_the_equations_with_adam(x64):
  """W, Λ and W̄ in NumPy, on the updates that Adam makes of the loss gradients alone."""
  a, kappa, beta, c = 0.3, 1.0, 0.4, 0.8
  params = jax.tree.map(jnp.asarray, PARAMS)
  grads = random_gradients(9, seed=1)
  tx = fptt(
    optax.adam(0.01),
    alpha=a,
    kappa=kappa,
    beta=beta,
    linear_scale=c,
    coupling='update',
  )
  adam = optax.adam(0.01)
  adam_state = adam.init(params)
  w = w_bar = PARAMS['w']
  lam = np.zeros(3)
  for g, (got, _) in zip(grads, run(tx, grads, params), strict=True):
    updates, adam_state = adam.update(g, adam_state)
    w = w + np.asarray(updates['w']) + c * lam - kappa * a * (w - w_bar)
    lam = lam - a * (w - w_bar)
    w_bar = (1 - beta) * w_bar + beta * w - beta / a * lam
    np.testing.assert_allclose(got['w'], w, rtol=0, atol=1e-12)


def test_no_dead_zone_under_adam(x64):
  """Small steady gradients: inside Adam the regularizer stops a weight whose gradient
  is below α lr; outside all weights keep the same share of their speed, 1 / (1 + a).
  """
  lr, alpha = 1e-3, 0.1
  grads = [{'w': jnp.array([1e-5, 1.0])}] * 3000
  params = {'w': jnp.zeros(2)}

  def speed(tx):
    def step(carry, g):
      params, state = carry
      updates, state = tx.update(g, state, params)
      return (optax.apply_updates(params, updates), state), params['w']

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    _, path = jax.lax.scan(step, (params, tx.init(params)), stacked)
    return np.asarray(path[-2000] - path[-1]) / 1999 / lr

  assert speed(optax.adam(lr)) == pytest.approx([1.0, 1.0], abs=2e-3)
  # |g| = 1e-5 is a tenth of α lr = 1e-4, so that about |g|/α of a step is left.
  assert speed(fptt(optax.adam(lr), alpha=alpha))[0] == pytest.approx(0.1, abs=0.01)
  decoupled = fptt(optax.adam(lr), alpha=0.3, coupling='update')
  assert speed(decoupled) == pytest.approx([1 / 1.3, 1 / 1.3], abs=2e-3)


@pytest.mark.parametrize(('kappa', 'limit'), [(1.0, 1.67), (2.0, 1.25)])
def test_stability_on_a_flat_loss_is_that_of_alpha_alone(kappa, limit):
  """The documented limits of lr α are those of α, at any rate; a long run agrees."""
  for lr in (1e-3, 2.0):
    for alpha, stable in ((limit - 0.02, True), (limit + 0.02, False)):
      radius = spectral_radius(lr, alpha, kappa=kappa, coupling='update')
      assert (radius < 1) == stable
      momentum = spectral_radius(
        lr, alpha, kappa=kappa, momentum=0.5, coupling='update'
      )
      assert momentum == pytest.approx(radius)
  for alpha, stable in ((limit - 0.1, True), (limit + 0.1, False)):
    tx = fptt(optax.sgd(1.0), alpha=alpha, kappa=kappa, coupling='update')
    kicks = [{'w': jnp.ones(1)}] + [{'w': jnp.zeros(1)}] * 150
    params, _ = run(tx, kicks, {'w': jnp.zeros(1)})[-1]
    assert (abs(float(params['w'][0])) < 10) == stable


def test_radius_equals_the_gradient_s_form_for_sgd():
  """On a curved loss, without momentum, and with SGD's η α in the place of α."""
  lr, alpha, options = 0.3, 0.9, dict(kappa=1.4, beta=0.4, curvature=1.7)
  assert spectral_radius(lr, lr * alpha, coupling='update', **options) == pytest.approx(
    spectral_radius(lr, alpha, **options)
  )


@pytest.mark.parametrize('estimate', ['lagged', 'recomputed'])
def test_other_estimates_are_refused(estimate):
  with pytest.raises(ValueError, match=r"gradient_estimate .*coupling='update', got"):
    fptt(optax.sgd(0.1), coupling='update', gradient_estimate=estimate)


def test_unknown_coupling_is_refused():
  with pytest.raises(ValueError, match=r"coupling must be one of.*'both'"):
    fptt(optax.sgd(0.1), coupling='both')
  with pytest.raises(ValueError, match='coupling must be one of'):
    spectral_radius(0.1, 0.1, coupling='weights')


def test_inner_steps_move_the_state_once_a_window(x64):
  """With SGD the two forms agree for several steps per window, too."""
  lr, alpha = 0.1, 0.7
  params = jax.tree.map(jnp.asarray, PARAMS)
  forms = (
    fptt(optax.sgd(lr), alpha=alpha),
    fptt(optax.sgd(lr), alpha=lr * alpha, coupling='update'),
  )
  results = []
  for tx in forms:
    state, weights = tx.init(params), params
    for g in random_gradients(6, seed=2):
      updates, state = tx.update(g, state, weights, inner_steps=3)
      weights = optax.apply_updates(weights, updates)
    results.append((weights, state.w_bar))
  assert_close(results[1], results[0], 1e-13)
