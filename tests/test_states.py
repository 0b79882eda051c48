"""States that were donated, kept, saved in other formats, or taken out of a
population.
"""

import io
import pickle

import chex
from flax import serialization
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses

K = 2
BATCH = helpers.regression_batch(4, 2)
OPTIMIZER = fptt_jax.fptt(optax.adam(1e-2))


def layered():
  """Return a model whose parameters have integers for keys."""
  base = helpers.elman()
  wrap = lambda params: {
    'layers': {0: {k: params[k] for k in 'abc'}, 10: params['v'], 2: jnp.ones(3)}
  }
  unwrap = lambda params: params['layers'][0] | {'v': params['layers'][10]}

  def apply(params, *args):
    return base.apply(unwrap(params), *args)

  return fptt_jax.Model(lambda key: wrap(base.init(key)), base.initial_state, apply)


@pytest.fixture(scope='module')
def trainer():
  return fptt_jax.make_trainer(
    layered(), losses.terminal_regression(), OPTIMIZER, num_windows=K
  )


def fresh(trainer):
  return trainer.init(jax.random.key(0), BATCH)


def data(state):
  """Return the state with its key as data, for comparison."""
  return state._replace(key=jax.random.key_data(state.key))


# Donation.


@pytest.mark.parametrize(
  'function', ['step', 'evaluate', 'predict', 'end_epoch', 'scan']
)
def test_a_donated_array_is_named(trainer, function):
  """The error says what is gone, why, and both ways out."""
  state = fresh(trainer)
  trainer.step(state, BATCH)
  calls = {
    'step': lambda: trainer.step(state, BATCH),
    'evaluate': lambda: trainer.evaluate(state.params, BATCH),
    'predict': lambda: trainer.predict(state.params, BATCH.inputs),
    'end_epoch': lambda: trainer.end_epoch(state),
    'scan': lambda: fptt_jax.scan_train_steps(trainer)(
      state, (), jax.tree.map(lambda x: x[None], BATCH)
    ),
  }
  with pytest.raises(
    RuntimeError, match=r"\['layers'\].* donated .*jnp\.copy.*donate=False"
  ):
    calls[function]()


def test_one_array_in_two_places(trainer):
  state = fresh(trainer)
  state.params['layers'][2] = state.opt_state.w_bar['layers'][2]
  with pytest.raises(RuntimeError, match=r'two places.*layers.*2.*donate=False'):
    trainer.step(state, BATCH)


def test_without_donation():
  """Old states live on: of steps, programs of steps, populations."""
  trainer = fptt_jax.make_trainer(
    layered(), losses.terminal_regression(), OPTIMIZER, num_windows=K, donate=False
  )
  state = fresh(trainer)
  first, _ = trainer.step(state, BATCH)
  second, _ = trainer.step(state, BATCH)
  stacked = jax.tree.map(lambda x: x[None], BATCH)
  third, _ = fptt_jax.scan_train_steps(trainer)(state, (), stacked)
  chex.assert_trees_all_equal(first.params, second.params)
  chex.assert_trees_all_close(first.params, third.params, rtol=1e-6)
  many = fptt_jax.vmap_trainer(trainer)
  states = many.init(jax.random.split(jax.random.key(0), 2), BATCH)
  many.step(states, BATCH)
  assert np.isfinite(states.params['layers'][10]).all()


# Other formats.


def texts(tree):
  """Return dicts with texts for keys, and dicts for named tuples and lists."""
  if hasattr(tree, '_asdict'):
    tree = tree._asdict()
  if isinstance(tree, tuple | list):
    tree = dict(enumerate(tree))
  if isinstance(tree, dict):
    return {str(key): texts(value) for key, value in tree.items()}
  return np.asarray(tree)


# Old releases say that the data of a key, which becomes a key, cannot be reused.
@pytest.mark.filterwarnings('ignore:Some donated buffers were not usable')
def test_texts_for_integer_keys(trainer):
  """Parameters and states as msgpack, JSON or orbax without a template give them
  back.
  """
  state = fresh(trainer)
  totals, _ = trainer.evaluate(state.params, BATCH)
  got, _ = trainer.evaluate(texts(state.params), BATCH)
  chex.assert_trees_all_equal(got, totals)
  outputs = trainer.predict(texts(state.params), BATCH.inputs)
  chex.assert_trees_all_equal(outputs, trainer.predict(state.params, BATCH.inputs))
  plain = fptt_jax.TrainState(
    texts(state.params),
    texts(state.opt_state),
    np.asarray(state.hidden),
    (),
    np.asarray(jax.random.key_data(state.key)),
    np.asarray(state.step_count),
  )
  stacked = jax.tree.map(lambda x: x[None], BATCH)
  scanned, _ = fptt_jax.scan_train_steps(trainer)(plain, (), stacked)
  expected, _ = trainer.step(state, BATCH)
  got, _ = trainer.step(plain, BATCH)
  chex.assert_trees_all_equal(data(got), data(expected))
  chex.assert_trees_all_close(scanned.params, expected.params, rtol=1e-6)


@pytest.mark.parametrize('form', ['npz', 'pickle', 'msgpack', 'nested'])
def test_there_and_back(trainer, form):
  """A state through a file goes on as the state would have."""
  state = fresh(trainer)
  arrays = fptt_jax.state_to_arrays(state)
  shapes = jax.eval_shape(trainer.init, jax.random.key(0), BATCH)
  if form == 'msgpack':
    packed = serialization.msgpack_serialize(arrays)
    back = fptt_jax.state_from_arrays(shapes, serialization.msgpack_restore(packed))
  elif form == 'npz':
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    back = fptt_jax.state_from_arrays(shapes, np.load(file))
  elif form == 'pickle':
    back = fptt_jax.state_from_arrays(state, pickle.loads(pickle.dumps(arrays)))
  else:
    back = fptt_jax.state_from_arrays(shapes, texts(data(state)))
  assert back.key.dtype == state.key.dtype
  chex.assert_trees_all_equal(data(back), data(state))
  expected, _ = trainer.step(state, BATCH)
  got, _ = trainer.step(jax.tree.map(jnp.asarray, back), BATCH)
  chex.assert_trees_all_equal(data(got), data(expected))


def test_differences_are_paths(trainer):
  """A few paths, not two trees."""
  state = fresh(trainer)
  params = texts(state.params)
  params['layers']['7'] = params['layers'].pop('2')
  with pytest.raises(
    ValueError, match=r"^params .*got .*'layers/2'.*'layers/7'"
  ) as error:
    trainer.evaluate(params, BATCH)
  assert len(str(error.value)) < 200
  arrays = fptt_jax.state_to_arrays(state)
  del arrays['params/layers/10']
  with pytest.raises(ValueError, match=r"arrays .*'params/layers/10'"):
    fptt_jax.state_from_arrays(state, arrays)
  arrays['params/layers/10'] = np.ones(7, np.float32)
  with pytest.raises(ValueError, match=r'layers.*10.*\[7\]'):
    fptt_jax.state_from_arrays(state, arrays)
  with pytest.raises(TypeError, match=r'^arrays must be a mapping.* got TrainState'):
    fptt_jax.state_from_arrays(arrays, state)


# Keys.


@pytest.mark.parametrize('implementation', ['threefry2x32', 'rbg', 'unsafe_rbg'])
def test_keys_of_any_implementation(trainer, implementation):
  state = trainer.init(jax.random.key(0, impl=implementation), BATCH)
  state, metrics = trainer.step(state, BATCH)
  assert jax.random.key_impl(state.key) == jax.random.key_impl(
    jax.random.key(0, impl=implementation)
  )
  assert np.isfinite(metrics.loss).all()
  back = fptt_jax.state_from_arrays(state, fptt_jax.state_to_arrays(state))
  assert back.key.dtype == state.key.dtype


def test_key_data_is_a_key(trainer):
  expected = trainer.init(jax.random.key(3), BATCH)
  got = trainer.init(np.asarray(jax.random.PRNGKey(3)), BATCH)
  chex.assert_trees_all_equal(data(got), data(expected))
  many = fptt_jax.vmap_trainer(trainer)
  states = many.init(jax.random.key_data(jax.random.split(jax.random.key(3), 2)), BATCH)
  assert states.key.shape == (2,)


# Types and byte order.


def test_a_file_of_bfloat16() -> None:
  """NumPy's own files keep its bits and not its name."""
  state = {'w': jnp.array([1.0, -2.5], jnp.bfloat16), 'n': jnp.int32(3)}
  file = io.BytesIO()
  np.savez(file, **fptt_jax.state_to_arrays(state))
  file.seek(0)
  chex.assert_trees_all_equal(fptt_jax.state_from_arrays(state, np.load(file)), state)
  # Arrays that know their type are converted.
  half = {'w': jnp.zeros(2, jnp.float16), 'n': jnp.int32(0)}
  got = fptt_jax.state_from_arrays(half, fptt_jax.state_to_arrays(state))
  np.testing.assert_array_equal(np.asarray(got['w'], np.float32), [1.0, -2.5])
  assert got['w'].dtype == jnp.float16


def test_a_state_saved_in_half_width_trains_in_full_width(trainer):
  """λ and W̄ hold differences that 16 bits would lose."""
  state = fresh(trainer)
  arrays = {
    path: array.astype(np.float16) if array.dtype == np.float32 else array
    for path, array in fptt_jax.state_to_arrays(state).items()
  }
  back = fptt_jax.state_from_arrays(state, arrays)
  chex.assert_trees_all_equal_dtypes(back, state)
  chex.assert_trees_all_close(data(back), data(state), rtol=1e-3, atol=1e-6)
  imaginary = {'w': jnp.zeros(2, jnp.complex64)}
  with pytest.raises(ValueError, match=r'w.* must be float32\[2\].*got complex64'):
    fptt_jax.state_from_arrays({'w': jnp.zeros(2)}, imaginary)


def test_arrays_of_another_byte_order(trainer):
  """As big-endian files have them, and memory-mapped or read-only."""
  inputs = BATCH.inputs.astype('>f4')
  inputs.setflags(write=False)
  batch = fptt_jax.Batch(inputs, BATCH.targets.astype('>f4'), np.array([4, 3], '>i2'))
  native = fptt_jax.Batch(BATCH.inputs, BATCH.targets, np.array([4, 3], np.int32))
  got, _ = trainer.step(trainer.init(jax.random.key(0), batch), batch)
  expected, _ = trainer.step(fresh(trainer), native)
  chex.assert_trees_all_equal(got.params, expected.params)
  chex.assert_trees_all_equal(
    *(trainer.evaluate(got.params, b)[0] for b in (batch, native))
  )


# Members of a population.


def test_population_and_their_means(trainer):
  many = fptt_jax.vmap_trainer(trainer)
  keys = jax.random.split(jax.random.key(0), 3)
  states = many.init(keys, BATCH)
  alone = fptt_jax.take_member(states, 1)
  chex.assert_trees_all_equal(data(alone), data(trainer.init(keys[1], BATCH)))
  totals, _ = many.evaluate(states.params, BATCH)
  means = fptt_jax.compute_metrics(totals)
  assert means['loss'].shape == (3,)
  one, _ = trainer.evaluate(alone.params, BATCH)
  np.testing.assert_allclose(
    means['loss'][1], fptt_jax.compute_metrics(one)['loss'], rtol=1e-5
  )
  assert fptt_jax.compute_metrics(fptt_jax.take_member(totals, 1))[
    'loss'
  ] == pytest.approx(means['loss'][1])
  stacked = jax.tree.map(lambda x: np.stack([x] * 2), BATCH)
  states, metrics = fptt_jax.scan_train_steps(many)(states, (), stacked)
  assert metrics.loss.shape == (2, 3, K)
  np.testing.assert_array_equal(
    fptt_jax.take_member(metrics, 2, axis=1).loss, metrics.loss[:, 2]
  )
  alone = fptt_jax.take_member(states, 1)
  many.step(states, BATCH)
  assert np.isfinite(alone.params['layers'][10]).all()
  for member, axis in ((3, 0), (-1, 0), (0, 2)):
    with pytest.raises(ValueError, match=rf'got {member if axis < 2 else axis}'):
      fptt_jax.take_member(
        alone if axis == 2 else metrics, member, axis=1 if axis == 0 else axis
      )


def test_arrays_of_one_path_are_not_lost():
  with pytest.raises(ValueError, match=r"paths of the state .*'a/b'"):
    fptt_jax.state_to_arrays({'a/b': jnp.ones(1), 'a': {'b': jnp.zeros(1)}})
