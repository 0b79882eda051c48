"""A step that the mask leaves out is as good as not there."""

from flax import nnx
import helpers
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import Batch, losses, nn

PROPERTY = settings(deadline=None, max_examples=12, derandomize=True)
T, B, D, C = 7, 3, 2, 3
LAYERS = {
  'lstm': lambda r: nn.LSTM(D, 4, rngs=r),
  'gru': lambda r: nn.GRU(D, 4, rngs=r),
  'plain scan': lambda r: nn.ElmanRNN(D, 4, implementation='scan', rngs=r),
  'antisymmetric': lambda r: nn.AntisymmetricRNN(D, 4, rngs=r),
  'fastgrnn': lambda r: nn.FastGRNN(D, 4, rngs=r),
  'incremental': lambda r: nn.IncrementalRNN(D, 4, rngs=r),
  'indrnn': lambda r: nn.IndRNN(D, 4, rngs=r),
  'flax cell': lambda r: nnx.GRUCell(D, 4, rngs=r),
}


def model_of(layer: str) -> fptt_jax.Model:
  return nn.from_nnx(
    lambda r: nn.Sequential(LAYERS[layer](r), nnx.Linear(4, C, rngs=r))
  )


def per_row(mask: np.ndarray, batch: Batch, sequence: bool) -> list[Batch]:
  """Each row that has valid steps as a batch of its own, without its masked steps."""
  rows = [b for b in range(mask.shape[1]) if mask[:, b].any()]
  inputs = [batch.inputs[mask[:, b], b : b + 1] for b in rows]
  if sequence:
    return [
      Batch(x, batch.targets[mask[:, b], b : b + 1])
      for x, b in zip(inputs, rows, strict=True)
    ]
  return [Batch(x, batch.targets[b : b + 1]) for x, b in zip(inputs, rows, strict=True)]


def value_and_gradient(model, loss, params, batch):
  """A whole sequence's loss and gradient, through a step of one window."""
  trainer = helpers.quick_trainer(model, loss, optax.sgd(1.0), method='bptt')
  state = trainer.init(jax.random.key(0), batch)
  new, metrics = trainer.step(state._replace(params=params), batch)
  return metrics, jax.tree.map(lambda w, v: w - v, params, new.params)


def spoiled(batch: Batch, mask: np.ndarray, value: float = np.nan) -> Batch:
  """The batch with NaN in all masked inputs."""
  inputs = batch.inputs.copy()
  inputs[~mask] = value
  return batch._replace(inputs=inputs, mask=mask)


MASK = np.array(
  [[0, 1, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]], bool
)
"""Padding in front, holes, and a row without any valid step."""


@pytest.mark.parametrize(
  ('layer', 'sequence'),
  [*((layer, True) for layer in LAYERS), ('lstm', False), ('plain scan', False)],
)
def test_loss_and_gradient_are_those_without_the_masked_steps(layer, sequence):
  """In one window, of every kind of layer; NaN at masked steps is never seen."""
  model = model_of(layer)
  params = model.init(jax.random.key(1))
  make, loss = (
    (helpers.tagging_batch, losses.sequence_classification(C))
    if sequence
    else (helpers.label_batch, losses.terminal_classification(C, divergence='none'))
  )
  batch = make(T, B, D, C)
  metrics, gradient = value_and_gradient(model, loss, params, spoiled(batch, MASK))

  def objective(params):
    parts = []
    for row in per_row(MASK, batch, sequence):
      state = model.initial_state(1)
      _, outputs = model.apply(params, state, jnp.asarray(row.inputs), None, None)
      if not sequence:
        outputs = outputs[-1]
      parts.append(
        optax.losses.softmax_cross_entropy_with_integer_labels(
          outputs, row.targets
        ).reshape(-1)
      )
    return jnp.concatenate(parts).mean()

  value, expected = helpers.quick(jax.value_and_grad(objective))(params)
  np.testing.assert_allclose(metrics.loss[0], value, rtol=1e-5)
  assert int(metrics.totals['count']) == (MASK.sum() if sequence else MASK.any(0).sum())
  jax.tree.map(
    lambda g, e: np.testing.assert_allclose(g, e, atol=2e-6), gradient, expected
  )


ELMAN = helpers.elman(D, 4, C)
ELMAN_PARAMS = ELMAN.init(jax.random.key(1))
TERMINAL = fptt_jax.make_trainer(
  ELMAN,
  losses.terminal_classification(C),
  optax.sgd(0.1),
  method='tbptt',
  num_windows=3,
)
TAGGING = fptt_jax.make_trainer(
  ELMAN,
  losses.sequence_classification(C),
  optax.sgd(0.1),
  method='tbptt',
  num_windows=3,
)


@PROPERTY
@given(st.lists(st.booleans(), min_size=T * B, max_size=T * B))
def test_evaluation_is_that_of_the_rows_without_the_masked_steps(bits):
  """Whatever the mask, in windows: the sums over the rows, each alone and
  compressed.
  """
  mask = np.array(bits).reshape(T, B)
  for trainer, batch, sequence in (
    (TERMINAL, helpers.label_batch(T, B, D, C), False),
    (TAGGING, helpers.tagging_batch(T, B, D, C), True),
  ):
    totals, hidden = trainer.evaluate(ELMAN_PARAMS, spoiled(batch, mask))
    expected = np.zeros(2)
    for row in per_row(mask, batch, sequence):
      alone, _ = trainer.evaluate(ELMAN_PARAMS, row)
      expected += np.array([alone['count'], alone['loss']])
    np.testing.assert_allclose(
      [totals['count'], totals['loss']], expected, rtol=1e-5, atol=1e-6
    )
    assert np.isfinite(hidden).all()
    empty = ~mask.any(0)
    np.testing.assert_array_equal(np.asarray(hidden)[empty], 0)


@PROPERTY
@given(st.lists(st.integers(1, T), min_size=B, max_size=B))
def test_a_mask_of_ended_sequences_is_their_lengths(lengths):
  """State, loss and metrics agree bit for bit, the mask given by name or in the
  lengths' place.
  """
  batch = helpers.label_batch(T, B, D, C)
  ragged = batch._replace(lengths=np.array(lengths, np.int32))
  mask = np.arange(T)[:, None] < np.array(lengths)
  start = lambda: TERMINAL.init(jax.random.key(0), batch)
  expected = TERMINAL.step(start(), ragged)
  masked = [batch._replace(mask=mask), Batch(batch.inputs, batch.targets, mask)]
  masked.append(ragged._replace(mask=np.ones_like(mask)))
  for other in masked:
    got = TERMINAL.step(start(), other)
    kept = lambda result: (result[0].params, result[0].hidden, result[1])
    jax.tree.map(np.testing.assert_array_equal, kept(got), kept(expected))


def test_beta_counts_valid_steps():
  """Squared errors of 1 are weighed by the share of valid steps seen: of 4 steps, 1, 1,
  4.
  """
  outputs = jnp.ones((3, 2, 1))
  windows = fptt_jax.make_windows(9, num_windows=3)
  mask = np.array([1, 0, 0, 0, 0, 0, 1, 1, 1], bool)
  mask = np.stack([mask, np.zeros(9, bool)], axis=1)
  valid = fptt_jax._windows.valid_steps(windows, 2, None, mask)
  loss = losses.terminal_regression()
  values = []
  for k in range(3):
    window = fptt_jax._windows.window_at(windows, jnp.int32(k), valid)
    values.append(float(loss.apply(outputs, jnp.array([0.0, np.nan]), window, ())[0]))
  assert values == [0.25, 0.0, 1.0]
  assert valid.occupied().tolist() == [True, False, True]


@pytest.mark.parametrize('method', ['fptt', 'tbptt', 'bptt', 'bptt_aux', 'ftrl'])
def test_windows_without_a_valid_step_change_nothing(method):
  """An empty window among others leaves parameters and optimizer alone, an empty batch
  leaves all; labels do not matter there.
  """
  options = {} if method == 'bptt' else {'num_windows': 3}
  base = optax.adam(0.1)
  trainer = helpers.quick_trainer(
    ELMAN,
    losses.terminal_classification(C),
    fptt_jax.fptt(base) if method == 'fptt' else base,
    method=method,
    **options,
  )
  batch = helpers.label_batch(6, B, D, C)
  state = trainer.init(jax.random.key(0), batch)
  empty = batch._replace(
    mask=np.zeros((6, B), bool), inputs=np.full_like(batch.inputs, np.nan)
  )
  after, metrics = trainer.step(state, empty)
  for name in ('params', 'opt_state', 'hidden', 'loss_state'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(after, name), getattr(state, name)
    )
  assert not np.asarray(metrics.loss).any()
  assert int(metrics.totals['count']) == 0
  if method in ('fptt', 'tbptt', 'ftrl'):
    mask = np.array([1, 1, 0, 0, 1, 1], bool)[:, None].repeat(B, 1)
    after, _ = trainer.step(state, batch._replace(mask=mask))
    counts = [
      leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.dtype == jnp.int32
    ]
    assert [int(count) for count in counts] == [2] * len(counts)


def test_a_row_without_valid_steps_counts_for_nothing():
  """The others' loss is what it is without it, also with NaN as its target."""
  trainer = helpers.quick_trainer(
    helpers.elman(D, 4, 1),
    losses.terminal_regression(),
    optax.sgd(0.1),
    method='tbptt',
    num_windows=2,
  )
  batch = helpers.regression_batch(6, 3, D)
  targets = batch.targets.copy()
  targets[1] = np.nan
  mask = np.ones((6, 3), bool)
  mask[:, 1] = False
  with_empty = spoiled(batch._replace(targets=targets), mask)
  fptt_jax.validate_batch(with_empty, losses.terminal_regression())
  others = Batch(batch.inputs[:, ::2], batch.targets[::2])
  got, metrics = trainer.step(trainer.init(jax.random.key(0), with_empty), with_empty)
  expected, its_metrics = trainer.step(trainer.init(jax.random.key(0), others), others)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    got.params,
    expected.params,
  )
  np.testing.assert_allclose(metrics.loss, its_metrics.loss, rtol=1e-5)


@pytest.mark.parametrize('shard_params', [False, True])
def test_masks_under_a_mesh(shard_params):
  """Two devices with unlike numbers of valid steps give what one gives."""
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('batch',))
  loss = losses.sequence_classification(C)
  mask = np.random.default_rng(0).random((T, 4)) < 0.5
  mask[:, 0] = False
  mask[3:5] = False
  batch = spoiled(helpers.tagging_batch(T, 4, D, C), mask)
  results = []
  for options in ({}, {'mesh': mesh, 'shard_params': shard_params}):
    trainer = fptt_jax.make_trainer(
      ELMAN, loss, optax.sgd(0.1), method='tbptt', num_windows=3, **options
    )
    state, metrics = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    totals, _ = trainer.evaluate(state.params, batch)
    results.append(
      (jax.device_get(state.params), np.asarray(metrics.loss), jax.device_get(totals))
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *results
  )


def test_penalties_across_holes():
  """The temporal penalty takes differences of valid steps; reconstruction sees none but
  valid inputs.
  """
  layer = nn.TemporalActivationPenalty(1.0)
  x = jnp.array([1.0, 9.0, 3.0, 7.0, 4.0])[:, None, None]
  mask = jnp.array([False, True, False, True, True])[:, None]
  got = layer((), x, mask, jax.random.key(0))[1].penalty
  expected = layer((), x[jnp.array([1, 3, 4])], None, jax.random.key(0))[1].penalty
  np.testing.assert_allclose(jnp.sum(got, where=mask) / 3, expected.mean(), rtol=1e-6)
  front = layer((), x, jnp.ones((5, 1), bool).at[2:].set(False), jax.random.key(0))[
    1
  ].penalty
  np.testing.assert_allclose(front[:2].sum() / 2, 64.0)

  model = nn.from_nnx(
    lambda r: nn.Reconstruction(nn.ElmanRNN(1, 3, rngs=r), 1, segment=3, rngs=r)
  )
  params = model.init(jax.random.key(0))
  run = lambda x, mask: (
    model.apply(params, model.initial_state(1), x, mask, jax.random.key(2))[1].penalty
  )
  padded = jnp.concatenate([x[jnp.array([1, 3, 4])], jnp.zeros((2, 1, 1))])
  ended = jnp.array([True, True, True, False, False])[:, None]
  np.testing.assert_allclose(
    run(jnp.where(mask[..., None], x, 0), mask)[0], run(padded, ended)[0], rtol=1e-5
  )


@pytest.mark.parametrize(
  ('mask', 'message'),
  [
    (np.ones((T, B + 1), bool), r'mask .*bool\[7, 4\]'),
    (np.ones((T, B), np.int32), r'mask .*int32\[7, 3\]'),
    (np.ones((B,), bool), r'mask .*bool\[3\]'),
  ],
)
def test_masks_of_wrong_shape_or_dtype_are_refused(mask, message):
  batch = helpers.label_batch(T, B, D, C)._replace(mask=mask)
  with pytest.raises(ValueError, match=message):
    TERMINAL.init(jax.random.key(0), batch)


def test_a_ragged_tbptt_final_is_refused():
  trainer = fptt_jax.make_trainer(
    ELMAN,
    losses.terminal_classification(C),
    optax.sgd(0.1),
    method='tbptt_final',
    truncation_steps=2,
  )
  batch = helpers.label_batch(T, B, D, C)
  state = trainer.init(jax.random.key(0), batch)
  with pytest.raises(ValueError, match=r'mask .*tbptt_final.* got bool'):
    trainer.step(state, batch._replace(mask=np.ones((T, B), bool)))


def test_check_batch_looks_at_valid_steps_alone():
  """NaN and labels that mean nothing are said where they count, and there alone."""
  loss = losses.sequence_classification(C)
  batch = helpers.tagging_batch(T, B, D, C)
  labels = np.where(MASK, batch.targets, -100).astype(np.int32)
  fptt_jax.validate_batch(spoiled(batch._replace(targets=labels), MASK), loss)
  for bad, message in (
    (spoiled(batch, MASK)._replace(mask=~MASK), 'NaN'),
    (batch._replace(targets=labels), '-100'),
  ):
    with pytest.raises(ValueError, match=message):
      fptt_jax.validate_batch(bad, loss)


def test_an_own_terminal_loss_is_evaluated_at_the_last_valid_step():
  """Of any mask, where the function looks at each sequence's last step: that of the
  sequence without the masked steps.
  """

  def error(outputs, targets, window):
    last = (
      outputs[0]
      if outputs.shape[0] == 1
      else fptt_jax._windows.take_steps(outputs, window.last)[0]
    )
    return window.mean(jnp.square(last[:, 0] - targets), window.active)

  trainer = fptt_jax.make_trainer(
    ELMAN, losses.from_function(error, terminal=True), optax.sgd(0.1), method='tbptt'
  )
  batch = helpers.regression_batch(T, B, D)
  totals, _ = trainer.evaluate(ELMAN_PARAMS, spoiled(batch, MASK))
  alone = [
    trainer.evaluate(ELMAN_PARAMS, row)[0]['loss']
    for row in per_row(MASK, batch, False)
  ]
  assert int(totals['count']) == 2
  np.testing.assert_allclose(totals['loss'], sum(alone), rtol=1e-5)
