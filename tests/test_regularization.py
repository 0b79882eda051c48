"""Locked dropout, dropped weights and activation penalties act in training only."""

from typing import Any

import chex
from flax import nnx
from helpers import quick
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import nn

# Layers without a state are tested alone.
pytestmark = pytest.mark.filterwarnings('ignore:.*no hidden state:UserWarning')
KEY = jax.random.key(3)
S, B, D, H, V = 4, 3, 5, 6, 8


def random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def awd(rngs: nnx.Rngs) -> nn.Sequential:
  """Build all layers of this file in the release's order."""
  return nn.Sequential(
    nn.EmbeddingDropout(nnx.Embed(V, D, rngs=rngs), 0.3),
    nn.LockedDropout(0.3),
    nn.WeightDrop(nn.LSTM(D, H, rngs=rngs), 0.4),
    nn.TemporalActivationPenalty(1.0),
    nn.LockedDropout(0.5),
    nn.ActivationPenalty(2.0),
    nnx.Linear(H, V, rngs=rngs),
  )


def test_locked_dropout_holds_one_mask_for_all_steps() -> None:
  """On ones, outputs are 0 or 1/(1 - rate), equal at all steps, and differ between
  units, sequences and keys. Without a key nothing changes.
  """
  layer, x = nn.LockedDropout(0.25), jnp.ones((S, 40, 50))
  state, y = layer((), x, None, KEY)
  assert (state, layer.initial_state(B)) == ((), ())
  np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
  np.testing.assert_array_equal(y, np.broadcast_to(y[:1], y.shape))
  assert y[0].mean() == pytest.approx(
    1, abs=0.05
  )  # 2000 units: three standard deviations
  assert np.any(y[0, 0] != y[0, 1])
  assert np.any(y != layer((), x, None, jax.random.key(4))[1])
  np.testing.assert_array_equal(layer((), x)[1], x)


def test_embedding_dropout_drops_words_everywhere() -> None:
  """A dropped word is 0 at all its places and a kept one is its row over 1 - rate, in
  value and gradient. Without a key the layer is the embedding.
  """
  embed = nnx.Embed(V, D, rngs=nnx.Rngs(0))
  layer, words = (
    nn.EmbeddingDropout(embed, 0.5),
    jnp.asarray(np.random.default_rng(0).integers(0, V, (20, B))),
  )
  _, y = layer((), words, None, KEY)
  rows = {
    word: np.unique(np.asarray(y)[np.asarray(words) == word], axis=0)
    for word in range(V)
  }
  kept = np.array([[bool(np.any(rows[word]))] for word in range(V)])
  assert 0 < kept.sum() < V
  matrix = np.where(kept, np.asarray(embed.embedding[...]) / 0.5, 0)
  for word in range(V):
    np.testing.assert_allclose(rows[word], matrix[word : word + 1], rtol=1e-6)
  model = nn.from_nnx(lambda rngs: nn.EmbeddingDropout(embed, 0.5))

  def run(p):
    return model.apply(p, (), words, None, KEY)[1].sum()

  gradient = quick(jax.grad(run))({'embed': {'embedding': embed.embedding[...]}})[
    'embed'
  ]['embedding']
  counts = np.bincount(np.asarray(words).ravel(), minlength=V)[:, None]
  np.testing.assert_allclose(
    gradient, np.broadcast_to(np.where(kept, 2 * counts, 0), (V, D)), rtol=1e-6
  )
  np.testing.assert_array_equal(layer((), words)[1], embed(words))


@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.ElmanRNN])
def test_weight_drop_runs_the_layer_with_dropped_weights(kind: type) -> None:
  """A window equals that of a layer whose w_h is multiplied by 0 or 1/(1 - rate).
  Gradients of dropped weights are exactly 0. Names and evaluation are the layer's.
  """
  plain = nn.from_nnx(lambda rngs: kind(D, H, rngs=rngs))
  model = nn.from_nnx(lambda rngs: nn.WeightDrop(kind(D, H, rngs=rngs), 0.4))
  params = quick(model.init)(KEY)
  weights = {name: np.asarray(leaf) for name, leaf in params['layer'].items()}
  assert weights.keys() == jax.eval_shape(plain.init, KEY).keys()
  x, start = (
    random(S, B, D),
    jax.tree.map(lambda s: jnp.full_like(s, 0.3), plain.initial_state(B)),
  )

  @quick
  def run(params: Any) -> Any:
    def loss(p):
      return jnp.square(model.apply(p, start, x, None, KEY)[1]).sum()

    return (
      jax.grad(loss)(params),
      model.apply(params, start, x, None, KEY),
      model.apply(params, start, x, None, None),
    )

  grads, got, evaluated = run(params)
  grad = np.asarray(grads['layer']['w_h'])
  assert 0.25 < np.mean(grad == 0) < 0.6
  run_plain = quick(lambda p: plain.apply(p, start, x, None, None))
  dropped = {**weights, 'w_h': np.where(grad == 0, 0, weights['w_h'] / np.float32(0.6))}
  chex.assert_trees_all_close(got, run_plain(dropped), rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(evaluated, run_plain(weights), rtol=1e-6)


def test_weight_drop_leaves_its_layer_alone() -> None:
  """Training outside an adapter changes neither weights nor structure of the layer."""
  module = nn.WeightDrop(nn.ElmanRNN(D, H, rngs=nnx.Rngs(0)), 0.4)
  before, graph = np.array(module.layer.w_h[...]), nnx.graphdef(module)
  jax.eval_shape(
    lambda x: module(module.initial_state(B), x, None, KEY), random(S, B, D)
  )
  np.testing.assert_array_equal(module.layer.w_h[...], before)
  assert nnx.graphdef(module) == graph


def test_penalties_by_hand() -> None:
  """h = (1, 2), (3, 2), (3, 5). AR at α = 2 is 2 · (5, 13, 34)/2. TAR at β = 1 has the
  squared differences (4 + 0)/2 and (0 + 9)/2, times 3 steps / 2 differences.
  """
  h = jnp.array([[[1.0, 2.0]], [[3.0, 2.0]], [[3.0, 5.0]]])
  state, (outputs, penalty) = nn.ActivationPenalty(2.0)((), h, None, KEY)
  assert state == ()
  np.testing.assert_array_equal(outputs, h)
  np.testing.assert_allclose(penalty, [[5], [13], [34]])
  _, (outputs, penalty) = nn.TemporalActivationPenalty(1.0)((), h, None, KEY)
  np.testing.assert_array_equal(outputs, h)
  np.testing.assert_allclose(penalty, np.array([[0], [2], [4.5]]) * 3 / 2)
  assert penalty.mean() == pytest.approx(np.square(h[1:] - h[:-1]).mean())
  for layer in (nn.ActivationPenalty(2.0), nn.TemporalActivationPenalty(1.0)):
    np.testing.assert_array_equal(layer((), h)[1], h)
  _, single = nn.TemporalActivationPenalty(1.0)((), h[:1], None, KEY)
  np.testing.assert_array_equal(single.penalty, [[0]])


def test_temporal_penalty_of_a_ragged_window_is_the_mean_over_its_differences() -> None:
  """For sequences of 4, 2 and 1 steps, the mean over the 7 valid steps is the plain
  mean over the 4 valid differences.
  """
  h, lengths = random(4, 3, H), [4, 2, 1]
  mask = np.arange(4)[:, None] < lengths
  _, (_, penalty) = nn.TemporalActivationPenalty(0.5)(
    (), jnp.asarray(h), jnp.asarray(mask), KEY
  )
  differences = [
    np.square(np.diff(h[:length, row], axis=0)).mean(-1)
    for row, length in enumerate(lengths)
  ]
  assert np.asarray(penalty)[mask].mean() == pytest.approx(
    0.5 * np.concatenate(differences).mean(), rel=1e-5
  )


def test_stack_trains_on_loss_plus_penalties_and_evaluates_without() -> None:
  """Each window's objective is cross-entropy plus AR of dropped plus TAR of raw
  outputs, computed layer by layer. Evaluation equals the bare model's.
  """
  model = nn.from_nnx(awd)
  params = quick(model.init)(KEY)
  words = np.random.default_rng(1).integers(0, V, (2 * S + 1, B)).astype(np.int32)
  batch = fptt_jax.Batch(words[:-1], words[1:])
  loss = fptt_jax.losses.sequence_classification(V)
  optimizer = fptt_jax.fptt(optax.sgd(0.0), alpha=0.1)
  trainer = fptt_jax.make_trainer(
    model._replace(init=lambda key: params), loss, optimizer, num_windows=2
  )
  state = trainer.init(KEY, batch)
  _, metrics = quick(trainer.step)(state, batch)
  graph = nnx.graphdef(nnx.eval_shape(lambda: awd(nnx.Rngs(0))))

  @quick
  def by_hand(
    params: Any, hidden: Any, x: jax.Array, y: jax.Array, key: jax.Array
  ) -> Any:
    layers = nnx.merge(graph, nnx.State(params)).layers
    keys = [jax.random.fold_in(key, number) for number in range(7)]
    for number in (0, 1):
      _, x = layers[number]((), x, None, keys[number])
    hidden, raw = layers[2](hidden, x, None, keys[2])
    _, dropped = layers[4]((), raw, None, keys[4])
    nll = (
      -(jax.nn.log_softmax(layers[6](dropped)) * jax.nn.one_hot(y, V)).sum(-1).mean()
    )
    return (
      nll + 2 * jnp.square(dropped).mean() + jnp.square(raw[1:] - raw[:-1]).mean(),
      hidden,
      dropped,
    )

  hidden, masks = model.initial_state(B)[2], []
  for k in range(2):
    window_key = jax.random.fold_in(jax.random.fold_in(state.key, 0), k)
    rows = slice(k * S, (k + 1) * S)
    objective, hidden, dropped = by_hand(
      params, hidden, batch.inputs[rows], batch.targets[rows], window_key
    )
    assert metrics.loss[k] == pytest.approx(objective.item(), rel=1e-5)
    masks.append(np.asarray(dropped) == 0)
  assert np.any(masks[0] != masks[1])

  bare = nn.from_nnx(
    lambda rngs: nn.Sequential(
      nnx.Embed(V, D, rngs=rngs), nn.LSTM(D, H, rngs=rngs), nnx.Linear(H, V, rngs=rngs)
    )
  )
  layers = params['layers']
  weights = {'layers': {0: layers[0]['embed'], 1: layers[2]['layer'], 2: layers[6]}}

  def run(model, params):
    return quick(
      lambda p: model.apply(p, model.initial_state(B), words, None, None)[1]
    )(params)

  np.testing.assert_allclose(run(model, params), run(bare, weights), rtol=1e-6)


@pytest.mark.parametrize(
  ('build', 'error', 'message'),
  [
    (lambda: nn.LockedDropout(1.0), ValueError, r'rate .*1\.0'),
    (
      lambda: nn.WeightDrop(nn.ElmanRNN(2, 2, rngs=nnx.Rngs(0)), -0.1),
      ValueError,
      r'rate .*-0\.1',
    ),
    (
      lambda: nn.WeightDrop(nn.AntisymmetricRNN(2, 2, rngs=nnx.Rngs(0)), 0.1),
      TypeError,
      r'layer .*w_h.* AntisymmetricRNN',
    ),
    (
      lambda: nn.EmbeddingDropout(nnx.Embed(2, 2, rngs=nnx.Rngs(0)), float('nan')),
      ValueError,
      r'rate .*nan',
    ),
    (
      lambda: nn.ActivationPenalty(-1.0),
      ValueError,
      r'alpha .*-1\.0',
    ),
    (
      lambda: nn.ActivationPenalty(float('inf')),
      ValueError,
      r'alpha .*inf',
    ),
    (
      lambda: nn.LockedDropout('half'),
      ValueError,
      r"rate .*'half'",
    ),
    (
      lambda: nn.TemporalActivationPenalty(-1.0),
      ValueError,
      r'beta .*-1\.0',
    ),
  ],
)
def test_invalid_arguments_raise(build, error, message) -> None:
  """The error names the argument and the value."""
  with pytest.raises(error, match=message):
    build()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures('strict_dtypes')
def test_activations_keep_their_dtype(dtype) -> None:
  """Outputs have the parameters' dtype and penalties at least float32, under strict
  promotion.
  """
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.EmbeddingDropout(
        nnx.Embed(V, D, dtype=dtype, param_dtype=dtype, rngs=rngs), 0.1
      ),
      nn.WeightDrop(nn.LSTM(D, H, param_dtype=dtype, rngs=rngs), 0.1),
      nn.TemporalActivationPenalty(1.0),
      nn.LockedDropout(0.1),
      nn.ActivationPenalty(1.0),
    )
  )

  def run(key, x):
    return model.apply(model.init(key), model.initial_state(B), x, None, key)[1]

  y = jax.eval_shape(run, KEY, jax.ShapeDtypeStruct((S, B), jnp.int32))
  assert (y.outputs.dtype, y.penalty.dtype) == (dtype, jnp.float32)


class Noisy(nnx.Module):
  """A module with a random stream of its own."""

  def __init__(self, rngs: nnx.Rngs):
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.dropout(x)


def test_streams_and_layers_draw_independent_noise() -> None:
  """A number is kept by both of two dropouts a quarter of the time: one in a nested
  `Sequential`, the other in a module with a stream of its own.
  """
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.GRU(1, 16, rngs=rngs), nn.Sequential(nnx.Dropout(0.5)), Noisy(rngs)
    )
  )
  params = model.init(jax.random.key(0))
  start = model.initial_state(1)
  _, y = model.apply(params, start, jnp.ones((250, 1, 1)), None, jax.random.key(1))
  kept = np.asarray(y != 0).mean()
  # The standard error is 0.007.
  assert abs(kept - 0.25) < 0.04


def test_a_vmapped_stack_of_layers_has_noise() -> None:
  """Flax's idiom for a stack: its stream holds a key for each layer."""

  class Stack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
      make = nnx.split_rngs(splits=3)(nnx.vmap(Noisy))
      self.layers = make(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
      run = nnx.scan(
        lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
      )
      return run(self.layers, x)

  model = nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.GRU(1, 2, rngs=rngs), lambda x: jnp.ones((*x.shape[:-1], 4000)), Stack(rngs)
    )
  )
  params = model.init(jax.random.key(0))
  start, x = model.initial_state(1), jnp.ones((1, 1, 1))
  _, y = model.apply(params, start, x, None, jax.random.key(1))
  # Three independent masks keep an eighth; the standard error is 0.005.
  assert abs(np.asarray(y != 0).mean() - 0.125) < 0.03
  _, y = model.apply(params, start, x, None, None)
  assert (y == 1).all()
