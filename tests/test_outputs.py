"""Outputs of whole sequences: predicted, or as the train step saw them; and windows run
a few rows at a time.
"""

import functools

import chex
from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import Batch, losses, nn

D, C, T, B = 2, 3, 7, 4
ELMAN = helpers.elman(D, 4, C)
PARAMS = ELMAN.init(jax.random.key(1))
TAGGING = losses.sequence_classification(C)
TERMINAL = losses.terminal_classification(C)
MASK = np.array(
  [
    [0, 1, 0, 1],
    [0, 0, 0, 1],
    [1, 1, 0, 1],
    [1, 0, 0, 1],
    [1, 1, 0, 1],
    [1, 0, 0, 1],
    [1, 0, 0, 0],
  ],
  bool,
)


@functools.cache
def trainer_of(**options) -> fptt_jax.Trainer:
  return fptt_jax.make_trainer(
    ELMAN, TAGGING, optax.sgd(0.3), **{'method': 'tbptt', **options}
  )


def by_hand(batch: Batch) -> np.ndarray:
  """Outputs step by step, zeros at masked steps."""
  hidden, outputs = ELMAN.initial_state(B), []
  mask = np.ones((len(batch.inputs), B), bool) if batch.mask is None else batch.mask
  for x, valid in zip(batch.inputs, mask, strict=True):
    hidden, y = ELMAN.apply(
      PARAMS, hidden, jnp.asarray(x)[None], jnp.asarray(valid)[None], None
    )
    outputs.append(np.where(valid[:, None], y[0], 0))
  return np.stack(outputs), hidden


@pytest.mark.parametrize(('num_steps', 'masked'), [(1, False), (7, True), (9, False)])
def test_predict_gives_the_outputs_of_all_steps(num_steps, masked):
  """In order, whatever T; zeros at masked steps; time-major or batch-major; with the
  hidden state after them.
  """
  batch = helpers.tagging_batch(num_steps, B, D, C)
  if masked:
    batch = batch._replace(mask=np.resize(MASK, (num_steps, B)))
    batch.inputs[~batch.mask] = np.nan
  expected, last = by_hand(batch)
  predict = trainer_of().predict
  outputs, hidden = predict(PARAMS, batch.inputs, mask=batch.mask, return_hidden=True)
  np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(hidden, last, rtol=1e-5, atol=1e-6)
  other = None if batch.mask is None else batch.mask.T
  rows = predict(PARAMS, batch.inputs.swapaxes(0, 1), other, batch_major=True)
  np.testing.assert_allclose(rows, expected.swapaxes(0, 1), rtol=1e-5, atol=1e-6)


def test_predict_takes_lengths_and_goes_on_from_a_hidden_state():
  """Two halves, the state handed over, are the whole."""
  batch = helpers.tagging_batch(9, B, D, C)
  predict = trainer_of().predict
  whole = predict(PARAMS, batch.inputs)
  first, hidden = predict(PARAMS, batch.inputs[:5], return_hidden=True)
  second = predict(PARAMS, batch.inputs[5:], hidden=hidden)
  np.testing.assert_allclose(
    np.concatenate([first, second]), whole, rtol=1e-5, atol=1e-6
  )
  ragged = predict(PARAMS, batch.inputs, np.array([9, 1, 4, 5]))
  mask = np.arange(9)[:, None] < [9, 1, 4, 5]
  np.testing.assert_allclose(
    ragged, np.where(mask[..., None], whole, 0), rtol=1e-5, atol=1e-6
  )


def test_predict_takes_a_restored_hidden_state():
  """A dict in place of the tuple, as `evaluate` and `step` take it, too."""
  model = nn.from_nnx(
    lambda r: nn.Sequential(nn.LSTM(D, 4, rngs=r), nnx.Linear(4, C, rngs=r))
  )
  trainer = fptt_jax.make_trainer(model, TAGGING, optax.sgd(0.1), method='tbptt')
  params, batch = model.init(jax.random.key(0)), helpers.tagging_batch(T, B, D, C)
  hidden = jax.tree.map(lambda leaf: leaf + 0.5, model.initial_state(B))
  restored = fptt_jax.state_to_arrays(hidden)
  expected = trainer.predict(params, batch.inputs, hidden=hidden)
  got = trainer.predict(params, batch.inputs, hidden=restored)
  np.testing.assert_array_equal(got, expected)
  sums, _ = trainer.evaluate(params, batch, hidden)
  chex.assert_trees_all_equal(trainer.evaluate(params, batch, restored)[0], sums)
  with pytest.raises(ValueError, match=r'hidden must have the same leaves.*other'):
    trainer.predict(params, batch.inputs, hidden={'other': restored})


def test_lengths_out_of_range_predict_nothing():
  """Where `evaluate` gives NaN, so that nothing made of the outputs looks right."""
  batch = helpers.tagging_batch(T, B, D, C)
  outputs = trainer_of().predict(PARAMS, batch.inputs, np.full(B, T + 1))
  assert np.isnan(outputs).all()


def test_predict_is_without_dropout_and_penalties():
  model = nn.from_nnx(
    lambda r: nn.Sequential(
      nn.GRU(D, 4, rngs=r),
      nnx.Dropout(0.5),
      nn.ActivationPenalty(1.0),
      nnx.Linear(4, C, rngs=r),
    )
  )
  trainer = fptt_jax.make_trainer(model, TERMINAL, optax.sgd(0.1), method='tbptt')
  params, x = model.init(jax.random.key(0)), helpers.tagging_batch(T, B, D, C).inputs
  expected = model.apply(params, model.initial_state(B), jnp.asarray(x), None, None)[1]
  np.testing.assert_allclose(trainer.predict(params, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('rows', [B, 3])
def test_predict_under_a_mesh(rows):
  """Split over two devices, or whole on each where their number does not divide the
  rows.
  """
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('batch',))
  batch = helpers.tagging_batch(T, rows, D, C)
  lengths = np.arange(1, rows + 1)
  expected = trainer_of().predict(PARAMS, batch.inputs, lengths)
  got = fptt_jax.make_trainer(
    ELMAN, TAGGING, optax.sgd(0.3), method='tbptt', mesh=mesh
  ).predict(PARAMS, batch.inputs, lengths)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('split', [False, True])
def test_predict_of_a_population(split):
  """Outputs have the members' axis in front, hidden states too."""
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('members',)) if split else None
  many = fptt_jax.vmap_trainer(trainer_of(), mesh=mesh)
  params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
  x = helpers.tagging_batch(T, B, D, C).inputs
  outputs, hidden = many.predict(
    params, x.swapaxes(0, 1), batch_major=True, return_hidden=True
  )
  assert hidden.shape == (2, B, 4)
  expected = trainer_of().predict(jax.tree.map(lambda leaf: 2 * leaf, PARAMS), x)
  np.testing.assert_allclose(outputs[1], expected.swapaxes(0, 1), rtol=1e-5, atol=1e-6)
  assert many.predict(params, x, hidden=hidden).shape == (2, T, B, C)


def test_predict_keeps_outputs_alone():
  """The program's memory beside the outputs is that of a window, not of the
  sequence.
  """
  model = helpers.elman(D, 64, 1)
  trainer = fptt_jax.make_trainer(
    model, losses.sequence_regression(), optax.sgd(0.1), method='tbptt'
  )
  params = model.init(jax.random.key(0))
  compiled = helpers.optimized(
    trainer.predict.lower(params, jax.ShapeDtypeStruct((900, 8, D), jnp.float32))
  )
  states = 900 * 8 * 64 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < states / 4


@pytest.mark.parametrize(
  ('arguments', 'error', 'message'),
  [
    ({'inputs': np.zeros(3)}, ValueError, r'inputs .*\(3,\)'),
    ({'lengths': np.zeros((3, 3), int)}, ValueError, r'lengths .*\[3, 3\]'),
    ({'hidden': np.zeros((2, 4))}, ValueError, r'hidden state .*\[2, 4\]'),
    ({'params': {}}, ValueError, r'params'),
  ],
)
def test_predict_refuses_what_does_not_fit(arguments, error, message):
  good = {'params': PARAMS, 'inputs': np.zeros((T, B, D), np.float32)}
  with pytest.raises(error, match=message):
    trainer_of().predict(**{**good, **arguments})


# Outputs of a step.


@pytest.mark.parametrize(
  ('method', 'last_only'),
  [
    ('tbptt', False),
    ('bptt', True),
    ('bptt_aux', False),
    ('ftrl', True),
    ('tbptt_final', False),
  ],
)
def test_step_returns_outputs_on_request(method, last_only):
  """Uneven windows, masked steps: what `predict` gives, where the rate is 0; the state
  is what it is without the request.
  """
  options = {'bptt': {}, 'tbptt_final': {'truncation_steps': 3}}.get(
    method, {'num_windows': 3}
  )
  batch = (
    helpers.label_batch(T, B, D, C) if last_only else helpers.tagging_batch(T, B, D, C)
  )
  batch = batch if method == 'tbptt_final' else batch._replace(mask=MASK)
  loss = TERMINAL if last_only else TAGGING
  results = []
  for wanted in (False, True):
    trainer = helpers.quick_trainer(
      ELMAN, loss, optax.sgd(0.0), method=method, return_outputs=wanted, **options
    )
    state = trainer.init(jax.random.key(1), batch)
    results.append(trainer.step(state, batch))
  (plain, without), (same, metrics) = results
  assert without.outputs is None
  np.testing.assert_allclose(without.loss, metrics.loss, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
    plain.hidden,
    same.hidden,
  )
  expected = np.array(trainer.predict(state.params, batch.inputs, mask=batch.mask))
  if method == 'tbptt_final':
    expected[: T - 3] = 0
  np.testing.assert_allclose(metrics.outputs, expected, rtol=1e-5, atol=1e-6)


def test_outputs_are_those_before_each_update():
  """Each window's are of the parameters that its loss was computed with."""
  batch = helpers.tagging_batch(T, B, D, C)
  trainer = trainer_of(num_windows=3, return_outputs=True)
  state = trainer.init(jax.random.key(0), batch)
  params, hidden = jax.device_get(state.params), ELMAN.initial_state(B)
  state, metrics = trainer.step(state, batch)
  windows, loss = fptt_jax.make_windows(T, num_windows=3), 0.0
  for k, (start, end) in enumerate(zip(windows.starts, windows.ends, strict=True)):

    def objective(params):
      new, outputs = ELMAN.apply(
        params, hidden, jnp.asarray(batch.inputs[start:end]), None, None
      )
      values = optax.losses.softmax_cross_entropy_with_integer_labels(
        outputs, batch.targets[start:end]
      )
      return values.mean(), (new, outputs)

    (loss, (hidden, outputs)), grads = jax.value_and_grad(objective, has_aux=True)(
      params
    )
    np.testing.assert_allclose(
      metrics.outputs[start:end], outputs, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(metrics.loss[k], loss, rtol=1e-5)
    params = jax.tree.map(lambda w, g: w - 0.3 * g, params, grads)


@pytest.mark.parametrize('shard_params', [False, True])
def test_outputs_of_a_step_under_a_mesh(shard_params):
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('batch',))
  batch = helpers.tagging_batch(T, B, D, C)._replace(mask=MASK)
  seen = []
  for options in ({}, {'mesh': mesh, 'shard_params': shard_params}):
    trainer = trainer_of(num_windows=3, return_outputs=True, **options)
    _, metrics = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    seen.append(np.asarray(metrics.outputs))
  np.testing.assert_allclose(*seen, rtol=1e-5, atol=1e-6)


def test_outputs_in_compiled_epochs_and_populations():
  batch = helpers.tagging_batch(T, B, D, C)
  trainer = trainer_of(num_windows=3, return_outputs=True)
  two = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
  _, metrics = fptt_jax.scan_train_steps(trainer)(
    trainer.init(jax.random.key(0), batch), None, two
  )
  state = trainer.init(jax.random.key(0), batch)
  alone = []
  for _ in range(2):
    state, one = trainer.step(state, batch)
    alone.append(one.outputs)
  np.testing.assert_allclose(metrics.outputs, alone, rtol=1e-5, atol=1e-6)
  many = fptt_jax.vmap_trainer(trainer)
  _, metrics = many.step(
    many.init(jax.random.split(jax.random.key(0), 2), batch), batch
  )
  assert metrics.outputs.shape == (2, T, B, C)


def test_outputs_do_not_go_with_readout_steps():
  model = helpers.lstm(D, 4, C)
  with pytest.raises(ValueError, match=r'readout_chunk .*return_outputs=True, got 2'):
    fptt_jax.make_trainer(
      model,
      TAGGING,
      optax.sgd(0.1),
      method='tbptt',
      readout_chunk=2,
      return_outputs=True,
    )


# Micro-batches.


@pytest.mark.parametrize(
  ('parts', 'kind', 'method'),
  [
    (2, 'tagging', 'fptt'),
    (4, 'tagging', 'ftrl'),
    (4, 'terminal', 'fptt'),
    (2, 'example', 'bptt_aux'),
    (2, 'own loss', 'fptt'),
  ],
)
def test_micro_batches_give_the_whole_batchs_numbers(parts, kind, method):
  """Two steps of a ragged batch whose rows have unlike lengths: state, tables and
  metrics agree up to rounding.
  """
  loss = {
    'tagging': TAGGING,
    'terminal': TERMINAL,
    'example': losses.terminal_classification(C, divergence='example', num_examples=B),
    'own loss': losses.from_function(own_loss, own_measure),
  }[kind]
  batch = (
    helpers.tagging_batch(T, B, D, C)
    if kind in ('tagging', 'own loss')
    else helpers.label_batch(T, B, D, C)
  )
  batch = batch._replace(mask=MASK)
  if kind == 'example':
    batch = batch._replace(targets=(batch.targets, np.arange(B)))
  optimizer = fptt_jax.fptt(optax.sgd(0.3)) if method == 'fptt' else optax.sgd(0.3)
  model = helpers.lstm(D, 3, C)
  results = []
  for number in (1, parts):
    trainer = helpers.quick_trainer(
      model,
      loss,
      optimizer,
      method=method,
      num_windows=2,
      micro_batches=number,
      skip_nonfinite=True,
    )
    state = trainer.init(jax.random.key(0), batch)
    for _ in range(2):
      state, metrics = trainer.step(state, batch)
    results.append((state._replace(key=0), metrics))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *results
  )


def own_loss(outputs, targets, window):
  """A mean over the whole batch, without `window.mean`."""
  values = optax.losses.softmax_cross_entropy_with_integer_labels(
    outputs, window.slice(targets)
  )
  return jnp.sum(values, where=window.mask) / jnp.maximum(window.mask.sum(), 1)


def own_measure(outputs, targets, window):
  count = window.mask.sum()
  return {'count': count, 'loss': count * own_loss(outputs, targets, window)}


@pytest.mark.parametrize('shard_params', [False, True])
def test_micro_batches_under_a_mesh(shard_params):
  """Each device's share in two parts, with outputs, is the whole batch on one."""
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('batch',))
  batch = helpers.tagging_batch(T, B, D, C)._replace(mask=MASK)
  results = []
  for options in ({}, {'mesh': mesh, 'shard_params': shard_params, 'micro_batches': 2}):
    trainer = trainer_of(num_windows=3, return_outputs=True, **options)
    state, metrics = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    results.append(
      (
        jax.device_get(state.params),
        np.asarray(metrics.loss),
        np.asarray(metrics.outputs),
      )
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *results
  )


def test_micro_batches_with_penalties():
  """Penalties of each step are the same; of ragged batches they are refused, since some
  are means over rows.
  """
  model = nn.from_nnx(
    lambda r: nn.Sequential(
      nn.GRU(D, 4, rngs=r),
      nn.TemporalActivationPenalty(2.0),
      nn.ActivationPenalty(1.0),
      nnx.Linear(4, C, rngs=r),
    )
  )
  batch = helpers.tagging_batch(T, B, D, C)
  seen = []
  for number in (1, 2):
    trainer = helpers.quick_trainer(
      model,
      TAGGING,
      optax.sgd(0.3),
      method='tbptt',
      num_windows=2,
      micro_batches=number,
    )
    state, metrics = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    seen.append((state.params, metrics.loss))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *seen
  )
  with pytest.raises(ValueError, match=r'micro_batches .*got 2'):
    trainer.step(trainer.init(jax.random.key(0), batch), batch._replace(mask=MASK))


def test_micro_batches_need_less_memory():
  """A window's in four parts is less than half of the whole's."""
  batch = Batch(
    jax.ShapeDtypeStruct((64, 64, D), jnp.float32),
    jax.ShapeDtypeStruct((64,), jnp.int32),
  )
  model, sizes = helpers.lstm(D, 64, C), []
  for number in (1, 4):
    trainer = fptt_jax.make_trainer(
      model,
      TERMINAL,
      optax.sgd(0.1),
      method='tbptt',
      num_windows=1,
      micro_batches=number,
    )
    state = jax.eval_shape(trainer.init, jax.random.key(0), batch)
    sizes.append(
      helpers.optimized(trainer.step.lower(state, batch))
      .memory_analysis()
      .temp_size_in_bytes
    )
  assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize('number', [0, -1, 1.5, None, '2'])
def test_micro_batches_must_be_a_size(number):
  with pytest.raises(ValueError, match='micro_batches'):
    trainer_of(micro_batches=number)


def test_micro_batches_must_divide_the_rows():
  batch = helpers.tagging_batch(T, B, D, C)
  with pytest.raises(ValueError, match=r'micro_batches.* 4 .*got 3'):
    trainer_of(micro_batches=3).init(jax.random.key(0), batch)
  state = trainer_of().init(jax.random.key(0), batch)
  with pytest.raises(ValueError, match=r'micro_batches.* 4 .*got 3'):
    trainer_of(micro_batches=3).step(state, batch)
