"""A batch with labels, ids or lengths out of range is skipped and reported."""

import chex
from flax import nnx
import helpers
from helpers import quick_trainer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses, nn

K, T, B, C = 2, 6, 4, 3
ADAM = optax.adam(1e-2)


def make(kind, optimizer=None, method='fptt', **options):
  """Return (trainer, good batch) of one kind of task."""
  rng = np.random.default_rng(0)
  if kind == 'sequence':
    loss = losses.sequence_classification(C, accuracy=True)
    batch = helpers.tagging_batch(T, B)
  else:
    ids = dict(num_examples=10) if kind == 'example' else {}
    loss = losses.terminal_classification(C, divergence=kind, **ids)
    batch = helpers.label_batch(T, B)
    if kind == 'example':
      batch = batch._replace(
        targets=(batch.targets, rng.permutation(10)[:B].astype(np.int32))
      )
  if optimizer is None:
    optimizer = fptt_jax.fptt(ADAM) if method == 'fptt' else ADAM
  options = dict(num_windows=K, carry_hidden=True, method=method) | options
  return quick_trainer(helpers.elman(out=C), loss, optimizer, **options), batch


def with_target(batch, value, at=1):
  """Return the batch with one label changed, of the first step if there are several."""
  labels = batch.targets[0] if isinstance(batch.targets, tuple) else batch.targets
  labels = labels.copy()
  labels.reshape(-1)[at] = value
  if isinstance(batch.targets, tuple):
    return batch._replace(targets=(labels, batch.targets[1]))
  return batch._replace(targets=labels)


def assert_skipped(trainer, good, bad):
  """Assert that the step on `bad` changes nothing and reports it."""
  state = trainer.init(jax.random.key(0), good)
  state, metrics = trainer.step(state, good)
  assert not metrics.invalid.any()
  assert fptt_jax.find_nonfinite(metrics) is None
  after, metrics = trainer.step(state, bad)
  assert metrics.invalid.all()
  assert metrics.skipped.all()
  assert np.isnan(metrics.loss).all()
  assert np.isnan(metrics.grad_norm).all()
  chex.assert_trees_all_equal(after[:4], state[:4])
  assert not any(np.any(total) for total in jax.tree.leaves(metrics.totals))
  assert after.step_count == state.step_count + 1
  with pytest.raises(
    FloatingPointError, match=r'out of range in window 0 .*validate_batch'
  ):
    fptt_jax.raise_if_nonfinite(metrics)


@pytest.mark.parametrize(
  'kind', ['class_ema', 'last_epoch', 'example', 'none', 'sequence']
)
def test_labels_out_of_range(kind):
  """Each kind of loss, with labels that are too large or negative.

  NumPy would count negative indices from the end.
  """
  trainer, good = make(kind)
  for value in (C, -1, 2**31 - 1):
    assert_skipped(trainer, good, with_target(good, value))


def test_example_ids_out_of_range():
  trainer, good = make('example')
  for value in (10, -1):
    ids = good.targets[1].copy()
    ids[2] = value
    assert_skipped(trainer, good, good._replace(targets=(good.targets[0], ids)))


@pytest.mark.parametrize(
  'kind', ['class_ema', 'last_epoch', 'example', 'sequence', 'regression']
)
def test_lengths_out_of_range(kind):
  """Lengths that are too large, 0 or negative, also for a loss without labels."""
  if kind == 'regression':
    good = helpers.regression_batch(T, B)
    trainer = quick_trainer(
      helpers.elman(),
      losses.terminal_regression(),
      fptt_jax.fptt(ADAM),
      num_windows=K,
      carry_hidden=True,
    )
  else:
    trainer, good = make(kind)
  good = good._replace(lengths=np.array([T, 4, 5, T], np.int32))
  for value in (0, -3, T + 1):
    bad = good._replace(lengths=np.array([T, 4, value, T], np.int32))
    assert_skipped(trainer, good, bad)
    totals, _ = trainer.evaluate(trainer.init(jax.random.key(0), good).params, bad)
    assert np.isnan(totals['loss'])


@pytest.mark.parametrize(
  ('method', 'kind'),
  [
    ('tbptt', 'sequence'),
    ('bptt', 'class_ema'),
    ('bptt_aux', 'sequence'),
    ('ftrl', 'sequence'),
    ('tbptt_final', 'class_ema'),
  ],
)
def test_methods(method, kind):
  """Every method skips the whole batch."""
  fixed = method in ('bptt', 'tbptt_final')
  options = dict(num_windows=None) if fixed else {}
  if method == 'tbptt_final':
    options |= dict(truncation_steps=T)
  trainer, good = make(kind, method=method, **options)
  assert_skipped(trainer, good, with_target(good, -1))


@pytest.mark.parametrize(
  ('optimizer', 'options'),
  [
    (fptt_jax.fptt(ADAM), dict(skip_nonfinite=True)),
    (fptt_jax.fptt(ADAM), dict(inner_steps=3)),
    (fptt_jax.fptt(ADAM, gradient_estimate='recomputed'), {}),
    (optax.MultiSteps(fptt_jax.fptt(ADAM), 2), {}),
  ],
  ids=['skip', 'inner steps', 'recomputed', 'MultiSteps'],
)
def test_optimizers(optimizer, options):
  trainer, good = make('class_ema', optimizer, **options)
  assert_skipped(trainer, good, with_target(good, C))


@pytest.mark.parametrize(
  ('kind', 'shard_params'),
  [('class_ema', False), ('last_epoch', False), ('example', True)],
)
def test_mesh(kind, shard_params):
  """Only one device sees the label; all skip the update and keep their tables."""
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('batch',))
  trainer, good = make(kind, mesh=mesh, shard_params=shard_params)
  assert_skipped(trainer, good, with_target(good, C, at=3))


def test_scan_and_population():
  """One invalid batch of three, and one member of three whose batch is invalid."""
  loss = losses.terminal_classification(C)
  optimizer = fptt_jax.fptt(ADAM)
  trainer = fptt_jax.make_trainer(helpers.elman(out=C), loss, optimizer, num_windows=K)
  good = helpers.label_batch(T, B)
  bad = with_target(good, -1)
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), good, bad, good)
  state = trainer.init(jax.random.key(0), good)
  run = helpers.quick(fptt_jax.scan_train_steps(trainer))
  _, metrics = run(state, (), stacked)
  np.testing.assert_array_equal(metrics.invalid, [[False] * K, [True] * K, [False] * K])
  assert 'batch 1 of 3, window 0 of 2 (update 12)' in fptt_jax.find_nonfinite(
    metrics, first_update=10
  )

  many = helpers.quickened(fptt_jax.vmap_trainer(trainer, own_batches=True))
  keys = jax.random.split(jax.random.key(0), 3)
  states = many.init(keys, stacked)
  after, metrics = many.step(states, stacked)
  np.testing.assert_array_equal(metrics.invalid, [[False] * K, [True] * K, [False] * K])
  still = [
    np.array_equal(after.params['a'][r], states.params['a'][r]) for r in range(3)
  ]
  assert still == [False, True, False]


def test_masked_labels_may_be_anything():
  """Labels after the end of a sequence do not change the update."""
  trainer, good = make('sequence')
  good = good._replace(lengths=np.array([T, 4, 5, T], np.int32))
  padded = good._replace(targets=good.targets.copy())
  padded.targets[4:, 1] = -100
  state = trainer.init(jax.random.key(0), good)
  expected, _ = trainer.step(state, good)
  got, metrics = trainer.step(state, padded)
  assert not metrics.invalid.any()
  chex.assert_trees_all_equal(got.params, expected.params)


@pytest.mark.parametrize('kind', ['class_ema', 'sequence'])
def test_evaluation_gives_nan(kind):
  """The metrics of a batch with a label out of range are NaN."""
  trainer, good = make(kind)
  params = trainer.init(jax.random.key(0), good).params
  for value in (C, -1):
    totals, _ = trainer.evaluate(params, with_target(good, value))
    assert np.isnan(totals['loss'])
    assert np.isnan(totals['accuracy'])


@pytest.mark.parametrize('dtype', [np.uint8, np.int8, np.uint32, np.int64])
def test_labels_of_any_integer_dtype(dtype):
  """With more classes than 8 bits can hold, all dtypes give the numbers of int32."""
  classes = 300
  batch = helpers.label_batch(T, B, classes=100)
  trainer = quick_trainer(
    helpers.elman(out=classes),
    losses.terminal_classification(classes),
    fptt_jax.fptt(ADAM),
    num_windows=K,
  )
  state = trainer.init(jax.random.key(0), batch)
  expected, expected_metrics = trainer.step(state, batch)
  got, metrics = trainer.step(
    state, batch._replace(targets=batch.targets.astype(dtype))
  )
  assert not metrics.invalid.any()
  for a, b in ((got[:4], expected[:4]), (metrics.totals, expected_metrics.totals)):
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-7)


def test_chunked_readout():
  """A readout that runs a few steps at a time."""
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(nn.GRU(2, 4, rngs=rngs), nnx.Linear(4, C, rngs=rngs))
  )
  trainer = quick_trainer(
    model,
    losses.sequence_classification(C),
    fptt_jax.fptt(ADAM),
    num_windows=K,
    readout_chunk=1,
    carry_hidden=True,
  )
  good = helpers.tagging_batch(T, B)
  assert_skipped(trainer, good, with_target(good, -1))


@pytest.mark.parametrize('value', [-1, -100])
def test_validate_batch_explains_negative_labels(value):
  good = helpers.label_batch(T, B)
  loss = losses.terminal_classification(C)
  with pytest.raises(ValueError, match=rf'labels .*\[{value}\].* lengths'):
    fptt_jax.validate_batch(with_target(good, value), loss)


def test_valid_of_an_own_loss():
  """A user's `Loss.valid` decides which targets are valid."""
  mean = losses.from_function(lambda outputs, targets, window: jnp.mean(outputs))
  loss = mean._replace(valid=lambda targets, mask: jnp.all(targets <= 1))
  trainer = quick_trainer(helpers.elman(), loss, fptt_jax.fptt(ADAM), num_windows=K)
  good = helpers.series_batch(T, B)
  good = good._replace(targets=np.zeros_like(good.targets))
  state = trainer.init(jax.random.key(0), good)
  after, metrics = trainer.step(state, good._replace(targets=good.targets + 2))
  assert metrics.invalid.all()
  chex.assert_trees_all_equal(after.params, state.params)
