"""The r-LSTM's auxiliary loss by hand, against slices of plain runs, and
its gradients.
"""

import math
from typing import Any

import chex
from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import Batch, OutputsWithPenalty, nn
from fptt_jax.nn import Reconstruction

in_float64 = pytest.mark.usefixtures('x64')


def model(
  kind: type = nn.LSTM,
  features: int = 2,
  hidden: int = 3,
  dtype: Any = jnp.float32,
  **options: Any,
) -> fptt_jax.Model:
  """A reconstructing layer and a readout."""

  def build(rngs: nnx.Rngs) -> nnx.Module:
    layer = kind(features, hidden, param_dtype=dtype, rngs=rngs)
    return nn.Sequential(
      Reconstruction(layer, features, rngs=rngs, **options),
      nnx.Linear(hidden, 1, param_dtype=dtype, rngs=rngs),
    )

  return nn.from_nnx(build)


def random_params(model: fptt_jax.Model, seed: int = 1) -> Any:
  """Draw parameters whose decoder differs from the layer."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype),
    model.init(jax.random.key(0)),
  )


def elman_pair() -> tuple[fptt_jax.Model, Any]:
  """Layer and decoder with one unit and two steps, so that anchor and segment are
  fixed.
  """

  def cell(w_x, w_h):
    return {
      'w_x': jnp.float32([[w_x]]),
      'w_h': jnp.float32([[w_h]]),
      'bias': jnp.float32([0]),
    }

  readout = {'kernel': jnp.float32([[2.0]]), 'bias': jnp.float32([0.25])}
  wrapped = nn.from_nnx(
    lambda rngs: Reconstruction(
      nn.ElmanRNN(1, 1, rngs=rngs), 1, segment=2, weight=3.0, rngs=rngs
    )
  )
  return wrapped, {
    'layer': cell(1.0, 0.5),
    'decoder': cell(-1.0, 2.0),
    'readout': readout,
  }


def test_penalty_by_hand() -> None:
  """With S = L = 2 the second input is predicted from the state after both and the
  first input. Every step carries w times the error. As a target, the second input is a
  constant.
  """
  wrapped, params = elman_pair()
  x1, x2 = 0.5, -1.0

  def penalty(x: jax.Array) -> jax.Array:
    return wrapped.apply(
      params, wrapped.initial_state(1), x[:, None, None], None, jax.random.key(0)
    )[1].penalty

  h = math.tanh(x2 + 0.5 * math.tanh(x1))
  d = math.tanh(-x1 + 2 * h)
  error = 2 * d + 0.25 - x2
  x = jnp.float32([x1, x2])
  value, gradient = helpers.quick(
    lambda x: (penalty(x), jax.grad(lambda x: penalty(x)[0, 0])(x))
  )(x)
  np.testing.assert_allclose(value, np.full((2, 1), 3 * error**2), rtol=1e-6)
  np.testing.assert_allclose(
    gradient[1], 3 * 2 * error * 2 * (1 - d**2) * 2 * (1 - h**2), rtol=1e-5
  )


def test_evaluation_is_the_layer_itself_and_training_keeps_its_outputs() -> None:
  """Without a key the result equals the layer's bit for bit. With one, state and
  outputs do. Short windows are allowed in evaluation.
  """
  wrapped, plain = (
    m._replace(apply=helpers.quick(m.apply))
    for m in (model(segment=3, anchors=2), helpers.lstm(hidden=3))
  )
  params = random_params(wrapped)
  plain_params = {'layers': {0: params['layers'][0]['layer'], 2: params['layers'][1]}}
  x = helpers.regression_batch(4, 2).inputs
  mask = jnp.array([[True, True], [True, True], [True, True], [True, False]])
  expected = plain.apply(plain_params, plain.initial_state(2), x, mask, None)
  evaluated = wrapped.apply(params, wrapped.initial_state(2), x, mask, None)
  state, trained = wrapped.apply(
    params, wrapped.initial_state(2), x, mask, jax.random.key(0)
  )
  chex.assert_trees_all_equal(evaluated, expected)
  assert isinstance(trained, OutputsWithPenalty)
  chex.assert_trees_all_equal((state, trained.outputs), expected)
  assert wrapped.apply(params, wrapped.initial_state(2), x[:1], None, None)[
    1
  ].shape == (1, 2, 1)


def errors_by_hand(
  kind: type, params: Any, x: jax.Array, steps: int, segment: int
) -> np.ndarray:
  """Compute one sequence's error for every anchor and segment from unmasked slices."""
  layer, errors = kind(2, 3, param_dtype=float, rngs=nnx.Rngs(0)), []

  def run(weights: Any, state: Any, x: jax.Array) -> Any:
    nnx.replace_by_pure_dict(variables := nnx.state(layer, nnx.Param), weights)
    nnx.update(layer, variables)
    return layer(state, x[:, None], None, None)

  readout = params['readout']
  with jax.disable_jit():  # A few steps of many lengths.
    for anchor in range(segment, steps + 1):
      state, _ = run(params['layer'], layer.initial_state(1), x[:anchor])
      for start in range(anchor - segment + 1):
        _, y = run(params['decoder'], state, x[start : start + segment - 1])
        predicted = y[:, 0] @ readout['kernel'] + readout['bias'][None]
        errors.append(np.mean((predicted - x[start + 1 : start + segment]) ** 2))
  return np.array(errors)


@in_float64
@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU])
def test_anchors_and_sub_sequences_are_all_those_before_the_end(kind: type) -> None:
  """Over many keys the penalty takes every value of an anchor in L..n and a segment
  before it, and no other. Sequences with fewer than L valid steps do not count.
  """
  wrapped = nn.from_nnx(
    lambda rngs: Reconstruction(
      kind(2, 3, param_dtype=float, rngs=rngs), 2, segment=2, rngs=rngs
    )
  )
  params = random_params(wrapped)
  x = jnp.asarray(helpers.regression_batch(5, 2, dtype=np.float64).inputs)
  mask = jnp.arange(5)[:, None] < jnp.array([4, 1])[None]

  def run(key):
    return wrapped.apply(params, wrapped.initial_state(2), x, mask, key)[1].penalty

  penalties = np.asarray(
    helpers.quick(jax.vmap(run))(jax.random.split(jax.random.key(0), 200))
  )
  assert np.ptp(penalties, axis=(1, 2)).max() == 0
  expected = errors_by_hand(kind, params, x[:, 0], 4, 2)
  matches = np.isclose(penalties[:, 0, :1], expected[None], rtol=1e-10)
  assert matches.shape == (200, 6)
  assert (matches.sum(1) == 1).all()
  assert matches.any(0).all()


def objective(
  wrapped: fptt_jax.Model,
  params: Any,
  batch: Batch,
  method: str = 'bptt',
  **options: Any,
) -> np.ndarray:
  """Return the objectives that the trainer descends in one step from `params` with a
  fixed key.
  """
  trainer = helpers.quick_trainer(
    wrapped._replace(init=lambda key: params),
    fptt_jax.losses.terminal_regression(),
    optax.sgd(0.0),
    method=method,
    **options,
  )
  return np.asarray(trainer.step(trainer.init(jax.random.key(0), batch), batch)[1].loss)


@in_float64
def test_objective_is_the_loss_plus_the_weighted_mean_error() -> None:
  """In a ragged batch the objective is the plain layer's plus w times the mean error
  over anchors and long enough sequences.
  """
  batch = helpers.regression_batch(6, 3, dtype=np.float64)._replace(
    lengths=np.array([3, 2, 3], np.int32)
  )
  zero, two = (
    model(nn.ElmanRNN, dtype=float, segment=3, weight=w, anchors=2) for w in (0.0, 2.0)
  )
  params = random_params(zero)
  layer = params['layers'][0]
  without = nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.ElmanRNN(2, 3, param_dtype=float, rngs=rngs),
      nnx.Linear(3, 1, param_dtype=float, rngs=rngs),
    )
  )
  expected = objective(
    without, {'layers': {0: layer['layer'], 1: params['layers'][1]}}, batch
  )
  np.testing.assert_allclose(objective(zero, params, batch), expected, rtol=1e-12)
  # Sequences of L valid steps have one anchor and one sub-sequence.
  errors = [
    errors_by_hand(nn.ElmanRNN, layer, jnp.asarray(batch.inputs[:, row]), 3, 3).item()
    for row in (0, 2)
  ]
  np.testing.assert_allclose(
    objective(two, params, batch) - expected, 2 * np.mean(errors), rtol=1e-10
  )


def test_windows_with_no_room_for_a_sub_sequence_have_no_penalty() -> None:
  """With windows of 2 and 3 steps and L = 3, only the second adds a penalty."""
  batch = helpers.regression_batch(5, 2)
  with_penalty, without = (model(nn.ElmanRNN, segment=3, weight=w) for w in (1.0, 0.0))
  params = random_params(without)
  difference = [
    objective(m, params, batch, 'tbptt', num_windows=2) for m in (with_penalty, without)
  ]
  assert difference[0][0] == difference[1][0]
  assert difference[0][1] > difference[1][1]


@pytest.mark.slow
def test_training_lowers_the_error_through_the_layer() -> None:
  """BPTT halves the reconstruction error. The penalty moves every weight of layer,
  decoder and readout, and no weight of the outputs.
  """
  wrapped = model(nn.GRU, hidden=8, segment=3)
  batch = helpers.regression_batch(6, 4)
  trainer = helpers.quick_trainer(
    wrapped, fptt_jax.losses.terminal_regression(), optax.adam(3e-2), method='bptt'
  )
  state = trainer.init(jax.random.key(0), batch)

  def error(params: Any) -> jax.Array:
    def run(key):
      return wrapped.apply(
        params, wrapped.initial_state(4), jnp.asarray(batch.inputs), None, key
      )[1].penalty.mean()

    return jax.vmap(run)(jax.random.split(jax.random.key(5), 8)).mean()

  error_and_gradient = helpers.quick(jax.value_and_grad(error))
  before, grads = error_and_gradient(state.params)
  reconstruction, outputs = grads['layers'][0], grads['layers'][1]
  assert all(jnp.abs(g).max() > 1e-4 for g in jax.tree.leaves(reconstruction))
  chex.assert_trees_all_equal(outputs, jax.tree.map(jnp.zeros_like, outputs))
  for _ in range(150):
    state, _ = trainer.step(state, batch)
  after, _ = error_and_gradient(state.params)
  assert after < 0.5 * before


def test_cells_of_flax_are_wrapped_too() -> None:
  """A per-step cell works, though its sizes and state have other forms."""
  wrapped = nn.from_nnx(
    lambda rngs: Reconstruction(nnx.GRUCell(2, 3, rngs=rngs), 2, segment=2, rngs=rngs)
  )
  params = wrapped.init(jax.random.key(0))
  assert params['readout']['kernel'].shape == (3, 2)
  assert 'cell' in params['decoder']


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(segment=1), r'segment .*1'),
    (dict(segment=2, anchors=0), r'anchors .*0'),
    (dict(segment=2, weight=-1.0), r'weight .*-1\.0'),
    (dict(segment=2, in_features=0), r'in_features .*0'),
  ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
  """The error names the argument and the value when the layer is built."""
  layer = nn.ElmanRNN(1, 1, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=message):
    Reconstruction(layer, options.pop('in_features', 1), rngs=nnx.Rngs(0), **options)


def test_bad_inputs() -> None:
  """Layers that do not run windows, short windows, wrong features and integers."""
  wrapped, params = elman_pair()
  state, key = wrapped.initial_state(1), jax.random.key(0)
  with pytest.raises(ValueError, match=r'segment=2, got 1'):
    wrapped.apply(params, state, jnp.ones((1, 1, 1)), None, key)
  with pytest.raises(ValueError, match=r'inputs .*\(3, 1, 2\)'):
    wrapped.apply(params, state, jnp.ones((3, 1, 2)), None, key)
  with pytest.raises(TypeError, match=r'inputs .*int32'):
    wrapped.apply(params, state, jnp.ones((3, 1, 1), jnp.int32), None, key)
  with pytest.raises(TypeError, match=r'recurrent .*Linear'):
    Reconstruction(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), 1, segment=2, rngs=nnx.Rngs(0))
