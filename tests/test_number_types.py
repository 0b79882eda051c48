"""Complex parameters, half precision, and arrays and keys as other programs give
them.
"""

from helpers import quick_trainer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import Batch, losses

# Complex parameters.

COMPLEX = {'w': jnp.array([1 + 1j, -0.5 + 2j]), 'v': jnp.array([0.7])}


def quadratic(params):
  """Return a model whose outputs are its parameters, real and imaginary parts."""

  def apply(params, state, x, mask, key):
    parts = [params['w'].real, params['w'].imag, params['v']]
    if not jnp.iscomplexobj(params['w']):
      parts = [params['w'], params['v']]
    numbers = jnp.concatenate(parts)
    return state, jnp.broadcast_to(numbers, (*x.shape[:2], len(numbers)))

  return fptt_jax.Model(lambda key: params, lambda n: jnp.zeros((n, 1)), apply)


def last_weights(params, optimizer, steps=3, **options):
  """Return W after some steps towards zero targets, as real numbers, and the
  metrics.
  """
  batch = Batch(jnp.ones((4, 2, 1)), jnp.zeros((4, 2, 5)))
  trainer = quick_trainer(
    quadratic(params), losses.sequence_regression(), optimizer, num_windows=2, **options
  )
  state = trainer.init(jax.random.key(0), batch)
  for _ in range(steps):
    state, metrics = trainer.step(state, batch)
  w = np.asarray(state.params['w'])
  if np.iscomplexobj(w):
    w = np.concatenate([w.real, w.imag])
  return np.concatenate([w, state.params['v']]), metrics


@pytest.mark.parametrize(
  ('optimizer', 'options'),
  [
    (optax.sgd(0.1), {}),
    (optax.sgd(0.1, momentum=0.9), dict(skip_nonfinite=True)),
    (optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)), {}),
    (optax.sgd(0.1), dict(inner_steps=2)),
    (fptt_jax.fptt(optax.sgd(0.1)), {}),
    (fptt_jax.fptt(optax.sgd(0.1), gradient_estimate='recomputed'), {}),
    (fptt_jax.fptt(optax.sgd(0.1), gradient_estimate='lagged'), {}),
  ],
  ids=['sgd', 'momentum', 'clipping', 'inner steps', 'fptt', 'recomputed', 'lagged'],
)
def test_complex_parameters_move_like_pairs_of_real_ones(optimizer, options):
  """Linear optimizers cannot tell a complex number from its two parts."""
  method = (
    'fptt' if isinstance(optimizer.init(COMPLEX), fptt_jax.FPTTState) else 'tbptt'
  )
  w = COMPLEX['w']
  real = COMPLEX | {'w': jnp.concatenate([w.real, w.imag])}
  got, metrics = last_weights(COMPLEX, optimizer, method=method, **options)
  expected, expected_metrics = last_weights(real, optimizer, method=method, **options)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  for name in ('loss', 'grad_norm', 'lambda_norm'):
    np.testing.assert_allclose(
      getattr(metrics, name), getattr(expected_metrics, name), rtol=1e-5
    )


@pytest.mark.parametrize('shard_params', [False, True])
def test_complex_parameters_on_a_mesh(shard_params):
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('batch',))
  optimizer = fptt_jax.fptt(optax.sgd(0.1))
  got, _ = last_weights(COMPLEX, optimizer, mesh=mesh, shard_params=shard_params)
  expected, _ = last_weights(COMPLEX, optimizer)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_complex_parameters_descend_by_adam():
  before, _ = last_weights(COMPLEX, optax.adam(0.1), steps=1, method='tbptt')
  after, _ = last_weights(COMPLEX, optax.adam(0.1), steps=10, method='tbptt')
  assert np.abs(after).max() < np.abs(before).max() / 2


# Half precision.


def scaled(dtype, features=1):
  """Return a model of one weight vector: outputs are inputs times it."""

  def apply(params, state, x, mask, key):
    outputs = x.astype(dtype) * params['w'][None, None]
    return state, outputs.sum(-1, keepdims=True)

  return fptt_jax.Model(
    lambda key: {'w': jnp.ones(features, dtype)},
    lambda n: jnp.zeros((n, 1), dtype),
    apply,
  )


def absolute(outputs, targets, window):
  """Return a loss of the user's own, a mean in the dtype of the outputs."""
  return jnp.abs(outputs - window.slice(targets)).mean()


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
  ('loss', 'steps', 'rows', 'error', 'expected'),
  [
    (losses.sequence_regression(), 512, 130, 0.5, 0.25),  # More than 65,504 steps.
    (losses.sequence_regression(), 64, 32, 8.0, 64.0),  # The sum is 131,072.
    (losses.sequence_regression(), 4, 2, 300.0, 9e4),  # The square is above 65,504.
    (losses.terminal_regression(), 4, 128, 30.0, 900.0),
    (losses.terminal_regression(), 4, 2, 300.0, 9e4),
    (losses.terminal_regression(), 70_000, 2, 1.0, 1.0),  # β = t/T.
    (losses.from_function(absolute), 289, 300, 2.0, 2.0),  # Even windows: no mask.
  ],
)
def test_half_precision_means(dtype, loss, steps, rows, error, expected):
  """The objective and the evaluation's totals are means that float32 holds."""
  targets = jnp.zeros((rows,) if loss.last_only else (steps, rows, 1), dtype)
  batch = Batch(jnp.full((steps, rows, 1), error, dtype), targets)
  trainer = quick_trainer(scaled(dtype), loss, optax.sgd(0.0), method='bptt')
  state = trainer.init(jax.random.key(0), batch)
  totals, _ = trainer.evaluate(state.params, batch)
  _, metrics = trainer.step(state, batch)
  assert metrics.loss.dtype == metrics.grad_norm.dtype == jnp.float32
  np.testing.assert_allclose(metrics.loss, [expected], rtol=0.01)
  assert fptt_jax.compute_metrics(totals)['loss'] == pytest.approx(expected, rel=0.01)
  if error < 300:  # Else the gradient itself is beyond float16.
    assert np.isfinite(metrics.grad_norm).all()


@pytest.mark.parametrize('devices', [1, 4])
def test_half_precision_gradient_norm(devices):
  """A finite gradient is not skipped for a norm, or a sum over devices, beyond
  float16.
  """
  mesh = jax.sharding.Mesh(jax.devices()[:devices], ('batch',)) if devices > 1 else None
  trainer = quick_trainer(
    scaled(jnp.float16, 4),
    losses.sequence_regression(),
    optax.sgd(1e-5),
    method='bptt',
    skip_nonfinite=True,
    mesh=mesh,
  )
  batch = Batch(jnp.ones((2, 4, 4), jnp.float16), jnp.full((2, 4, 1), -14_996.0))
  state = trainer.init(jax.random.key(0), batch)
  state, metrics = trainer.step(state, batch)
  np.testing.assert_allclose(metrics.grad_norm, [6e4], rtol=1e-3)
  assert not metrics.skipped.any()
  np.testing.assert_allclose(state.params['w'], np.full(4, 0.7), rtol=1e-3)


def test_half_precision_sum_over_windows():
  """The objective of all windows together is above 65,504."""
  trainer = quick_trainer(
    scaled(jnp.float16),
    losses.from_function(absolute),
    optax.sgd(0.0),
    method='bptt_aux',
    num_windows=4,
  )
  batch = Batch(
    jnp.full((8, 2, 1), 3e4, jnp.float16), jnp.zeros((8, 2, 1), jnp.float16)
  )
  _, metrics = trainer.step(trainer.init(jax.random.key(0), batch), batch)
  np.testing.assert_allclose(metrics.loss, [12e4], rtol=1e-3)
