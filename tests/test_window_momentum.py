"""Momentum that joins gradients of the same window of different sequences."""

from helpers import assert_close, elman, quick, quick_trainer, regression_batch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import adam_by_window, losses, sgd_by_window


def feed(tx, grads, windows):
  """Updates [N] of a scalar weight, each gradient at its window."""
  params = jnp.zeros([])
  state = tx.init(params)
  found = []
  for g, window in zip(grads, windows, strict=True):
    update, state = tx.update(jnp.asarray(g), state, params, window=window)
    found.append(float(update))
  return np.array(found)


def test_adam_by_hand(x64):
  """A first moment and its count for each window; the second moment is common."""
  grads = np.random.default_rng(0).normal(size=14)
  windows = [0, 1, 2, 0, 1, 2, 0, 2, 0, 1, 2, 2, 1, 0]  # Some are left out.
  lr, b1, b2, eps = 0.1, 0.8, 0.95, 1e-3
  got = feed(adam_by_window(lr, 3, b1=b1, b2=b2, eps=eps), grads, windows)
  m, s, v = np.zeros(3), np.zeros(3), 0.0
  for t, (g, k) in enumerate(zip(grads, windows, strict=True), start=1):
    s[k] += 1
    m[k] = b1 * m[k] + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    expected = -lr * (m[k] / (1 - b1 ** s[k])) / (np.sqrt(v / (1 - b2**t)) + eps)
    assert got[t - 1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_is_optax_s_for_each_window(x64, nesterov):
  """Gradients of window k move as by SGD with momentum that sees these alone."""
  grads = np.random.default_rng(1).normal(size=15)
  windows = np.arange(15) % 3
  got = feed(sgd_by_window(0.1, 3, momentum=0.7, nesterov=nesterov), grads, windows)
  for k in range(3):
    tx = optax.sgd(0.1, 0.7, nesterov)
    params = jnp.zeros([])
    state = tx.init(params)
    for g, expected in zip(grads[k::3], got[k::3], strict=True):
      update, state = tx.update(jnp.asarray(g), state, params)
      assert float(update) == pytest.approx(expected, rel=1e-12)


def test_one_window_is_the_usual_optimizer(x64):
  grads = np.random.default_rng(2).normal(size=8)
  for tx, usual in (
    (adam_by_window(0.1, 1), optax.adam(0.1)),
    (sgd_by_window(0.1, 1), optax.sgd(0.1, 0.9)),
  ):
    state = usual.init(jnp.zeros([]))
    for g, update in zip(grads, feed(tx, grads, [0] * 8), strict=True):
      expected, state = usual.update(jnp.asarray(g), state)
      assert update == pytest.approx(float(expected), rel=1e-10)


def make_trainer(optimizer, quickly=True, **options):
  make = quick_trainer if quickly else fptt_jax.make_trainer
  options = dict(method='tbptt', num_windows=3) | options
  return make(elman(), losses.terminal_regression(), optimizer, **options)


def counts_of(state):
  return np.asarray(optax.tree.get(state.opt_state, 'update_counts'))


def test_trainer_passes_the_window():
  """Each window once a sequence, through `fptt`, a chain and injected settings."""
  batch = regression_batch(7, 4)

  def optimizer(learning_rate):
    return optax.chain(optax.clip(10.0), adam_by_window(learning_rate, 3))

  injected = optax.inject_hyperparams(optimizer)(learning_rate=0.1)
  trainer = make_trainer(injected)
  state = trainer.init(jax.random.key(0), batch)
  for _ in range(2):
    state, _ = trainer.step(state, batch)
  assert counts_of(state).tolist() == [2, 2, 2]
  regularized = make_trainer(
    fptt_jax.fptt(adam_by_window(0.1, 3), alpha=0.1), method='fptt'
  )
  state = regularized.init(jax.random.key(0), batch)
  state, _ = regularized.step(state, batch)
  assert counts_of(state).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
  ('method', 'updates'), [('bptt', [1]), ('bptt_aux', [1, 0, 0]), ('ftrl', [1, 1, 1])]
)
def test_methods_with_other_updates(method, updates):
  """One update per sequence is window 0; FTRL's k-th update is window k."""
  given = dict(num_windows=None) if method == 'bptt' else {}
  trainer = make_trainer(adam_by_window(0.1, len(updates)), method=method, **given)
  batch = regression_batch(6, 2)
  state = trainer.init(jax.random.key(0), batch)
  state, _ = trainer.step(state, batch)
  assert counts_of(state).tolist() == updates


def test_skipped_and_empty_windows_count_nothing():
  """Neither a window whose loss is not finite nor one after all sequences' ends."""
  batch = regression_batch(6, 2)
  inputs = np.array(batch.inputs)
  inputs[0] = np.nan
  trainer = make_trainer(
    adam_by_window(0.1, 3),
    skip_nonfinite=True,
    loss_weights=[1.0, 1.0, 1.0],
  )
  state = trainer.init(jax.random.key(0), batch)
  state, metrics = trainer.step(state, batch._replace(inputs=inputs))
  made = (~np.asarray(metrics.skipped)).astype(int)
  assert 0 in made
  assert counts_of(state).tolist() == made.tolist()
  short = batch._replace(lengths=np.array([2, 3], np.int32))
  state = trainer.init(jax.random.key(0), short)
  state, _ = trainer.step(state, short)
  assert counts_of(state).tolist() == [1, 1, 0]


def test_members_side_by_side_equal_single_runs():
  trainer = make_trainer(adam_by_window(0.1, 3), quickly=False, carry_hidden=True)
  many = fptt_jax.vmap_trainer(trainer)
  batch = regression_batch(6, 2)
  keys = jax.random.split(jax.random.key(0), 2)
  state, _ = quick(many.step)(many.init(keys, batch), batch)
  alone, _ = quick(trainer.step)(trainer.init(keys[1], batch), batch)
  assert_close(fptt_jax.take_member(state, 1).params, alone.params, 1e-5)


@pytest.mark.parametrize('shard_params', [False, True])
def test_mesh_equals_one_device(shard_params):
  """The moments by window lie with the parameters, or are cut as they are."""
  mesh = jax.make_mesh((2,), ('rows',), devices=jax.devices()[:2])
  batch = regression_batch(8, 4)
  results = []
  for options in (dict(), dict(mesh=mesh, shard_params=shard_params)):
    trainer = make_trainer(adam_by_window(0.1, 4), num_windows=4, **options)
    state = trainer.init(jax.random.key(0), batch)
    for _ in range(2):
      state, _ = trainer.step(state, batch)
    results.append((state.params, optax.tree.get(state.opt_state, 'first_moments')))
  assert_close(jax.device_get(results[1]), jax.device_get(results[0]), 1e-4)


def test_too_few_windows_are_refused():
  trainer = make_trainer(adam_by_window(0.1, 2))
  with pytest.raises(ValueError, match=r'num_windows .* 3 updates.* got 2'):
    trainer.init(jax.random.key(0), regression_batch(6, 2))
  more = make_trainer(adam_by_window(0.1, 5))
  state = more.init(jax.random.key(0), regression_batch(6, 2))
  assert len(counts_of(state)) == 5


@pytest.mark.parametrize(
  ('window', 'message'),
  [
    (None, r'window .*0\.\.2.* got None'),
    (3, r'window must be .*0\.\.2.* got 3'),
    (-1, 'got -1'),
  ],
)
def test_window_missing_or_out_of_range(window, message):
  tx = sgd_by_window(0.1, 3)
  given = {} if window is None else {'window': window}
  with pytest.raises(ValueError, match=message):
    tx.update(jnp.ones([]), tx.init(jnp.zeros([])), jnp.zeros([]), **given)


def test_bad_number_of_windows():
  for make in (adam_by_window, sgd_by_window):
    with pytest.raises(ValueError, match='num_windows must be an integer >= 1, got 0'):
      make(0.1, 0)


def test_bfloat16_updates_and_float32_moments():
  tx = adam_by_window(0.1, 2)
  params = {'w': jnp.ones(3, jnp.bfloat16)}
  state = tx.init(params)
  updates, state = tx.update(params, state, params, window=1)
  assert updates['w'].dtype == jnp.bfloat16
  moments = optax.tree.get(state, 'first_moments')['w']
  assert moments.shape == (2, 3)
  assert moments.dtype == jnp.float32


def test_moments_of_bfloat16_gradients_are_computed_in_float32():
  """The update is that of the same numbers in float32, but for its own rounding."""
  rng = np.random.default_rng(0)
  found = []
  gradients = jnp.asarray(rng.normal(size=(8, 50)), jnp.bfloat16)
  for dtype in (jnp.float32, jnp.bfloat16):
    optimizer = fptt_jax.adam_by_window(1e-2, num_windows=2)
    params = jnp.zeros(50, dtype)
    state = optimizer.init(params)
    for number, gradient in enumerate(gradients):
      updates, state = optimizer.update(
        gradient.astype(dtype), state, params, window=number % 2
      )
    found.append(np.asarray(updates, np.float32))
  np.testing.assert_allclose(found[1], found[0], rtol=2**-7)
