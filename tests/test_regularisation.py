"""AWD-LSTM's layers: what is dropped, how long, and what is added to the objective."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fptt_jax
from fptt_jax import nn

KEY = jax.random.key(3)


def test_locked_dropout_drops_the_same_units_at_every_step_of_a_window() -> None:
  """One mask [B, D], entries 0 or 1/(1 - rate), a share of `rate` zeros; another key, another mask; nothing in evaluation."""
  layer, x = nn.LockedDropout(0.25), jnp.ones((7, 40, 50))
  _, y = layer((), x, None, KEY)
  np.testing.assert_array_equal(y, np.broadcast_to(y[:1], y.shape))
  assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
  assert np.mean(np.asarray(y[0]) == 0) == pytest.approx(0.25, abs=0.03)
  assert not np.array_equal(y, layer((), x, None, jax.random.key(4))[1])
  np.testing.assert_array_equal(layer((), x, None, None)[1], x)


def test_embedding_dropout_drops_a_token_everywhere_or_nowhere() -> None:
  """Each token's vector is 0 or the row times 1/(1 - rate) at all its places."""
  embed = nnx.Embed(30, 4, rngs=nnx.Rngs(0))
  layer = nn.EmbeddingDropout(embed, 0.4)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (20, 5)))
  _, y = layer((), tokens, None, KEY)
  kept = {}
  for token in range(30):
    vectors = np.asarray(y)[np.asarray(tokens) == token]
    kept[token] = bool(vectors.any())
    np.testing.assert_allclose(vectors, kept[token] * np.broadcast_to(embed.embedding[token] / 0.6, vectors.shape), rtol=1e-6)
  assert 5 < sum(kept.values()) < 29
  np.testing.assert_array_equal(layer((), tokens, None, None)[1], embed(tokens))


@pytest.mark.parametrize('cell', [nn.LSTM, nn.GRU, nn.RNN])
def test_weight_drop_is_the_layer_with_a_thinned_matrix(cell: Any) -> None:
  """In training the output is that of the layer with some entries of w_h 0 and the others scaled; the parameter stays whole."""
  layer = cell(3, 6, rngs=nnx.Rngs(0))
  wrapped = nn.WeightDrop(layer, 0.5)
  x, before = jax.random.normal(KEY, (5, 2, 3)), np.asarray(layer.w_h[...])
  _, y = wrapped(wrapped.initial_state(2), x, None, KEY)
  keep = jax.random.bernoulli(jax.random.split(KEY)[0], 0.5, before.shape)
  thinned = cell(3, 6, rngs=nnx.Rngs(0))
  thinned.w_h[...] = jnp.where(keep, before / 0.5, 0)
  np.testing.assert_allclose(y, thinned(thinned.initial_state(2), x)[1], rtol=1e-6)
  np.testing.assert_array_equal(layer.w_h[...], before)
  np.testing.assert_array_equal(wrapped(wrapped.initial_state(2), x, None, None)[1], layer(layer.initial_state(2), x)[1])


def test_weight_drop_gives_dropped_entries_no_gradient() -> None:
  """Exactly those entries of w_h that the mask leaves have a gradient."""
  model = nn.from_nnx(lambda rngs: nn.Stack(nn.WeightDrop(nn.LSTM(2, 4, rngs=rngs), 0.5)))
  params = model.init(KEY)
  x = jax.random.normal(KEY, (6, 3, 2))
  loss = lambda p: jnp.sum(model.apply(p, model.initial_state(3), x, None, KEY)[1] ** 2)
  gradient = jax.grad(loss)(params)['layers'][0]['layer']['w_h']
  weight_key, _ = jax.random.split(jax.random.fold_in(KEY, 0))
  keep = np.asarray(jax.random.bernoulli(weight_key, 0.5, gradient.shape))
  np.testing.assert_array_equal(np.asarray(gradient) != 0, keep)


def test_penalties_are_the_mean_squares_of_outputs_and_of_their_changes() -> None:
  """AR and TAR in NumPy; both leave what passes as it is, and say nothing in evaluation."""
  x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
  _, ar = nn.ActivationPenalty(2.0)((), jnp.asarray(x), None, KEY)
  np.testing.assert_allclose(ar.penalty, 2 * np.mean(x**2, axis=-1), rtol=1e-6)
  _, tar = nn.TemporalActivationPenalty(3.0)((), jnp.asarray(x), None, KEY)
  np.testing.assert_allclose(tar.penalty[1:], 3 * np.mean(np.diff(x, axis=0) ** 2, axis=-1), rtol=1e-5)
  np.testing.assert_array_equal(tar.penalty[0], 0)
  for layer, result in ((nn.ActivationPenalty(2.0), ar), (nn.TemporalActivationPenalty(3.0), tar)):
    np.testing.assert_array_equal(result.outputs, x)
    np.testing.assert_array_equal(layer((), jnp.asarray(x), None, None)[1], x)


def test_a_stack_sums_its_layers_penalties_and_the_trainer_adds_them() -> None:
  """Objective of an AWD stack without dropout = loss + mean AR + mean TAR of the LSTM's outputs."""
  plain = lambda rngs: [nn.LSTM(2, 5, rngs=rngs)]
  head = lambda rngs: nnx.Linear(5, 3, rngs=rngs)
  penalties = [nn.TemporalActivationPenalty(0.5), nn.ActivationPenalty(0.25)]
  model = nn.from_nnx(lambda rngs: nn.Stack(*plain(rngs), *penalties, head(rngs)))
  inner = nn.from_nnx(lambda rngs: nn.Stack(*plain(rngs)))
  batch = problems.tagging_batch(6, 4)
  loss = fptt_jax.losses.sequence_classification(3)
  trainer = problems.quick_trainer(model, loss, optax.sgd(0.1), method='bptt')
  state = trainer.init(KEY, batch)
  params = {'layers': {0: state.params['layers'][0]}}
  _, h = inner.apply(params, inner.initial_state(4), jnp.asarray(batch.inputs), None, None)
  _, metrics = trainer.step(state, batch)
  expected = 0.25 * np.mean(np.square(h)) + 0.5 * np.sum(np.diff(h, axis=0) ** 2) / np.size(h)
  np.testing.assert_allclose(metrics.loss[0] - fptt_jax.means(metrics.totals)['loss'], expected, rtol=1e-4)


@pytest.mark.parametrize(
  ('build', 'error', 'message'),
  [
    (lambda: nn.LockedDropout(1.0), ValueError, r'rate must be in \[0, 1\), got 1.0'),
    (lambda: nn.EmbeddingDropout(nnx.Embed(3, 2, rngs=nnx.Rngs(0)), -0.1), ValueError, r'rate must be in \[0, 1\), got -0.1'),
    (lambda: nn.WeightDrop(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 0.1), TypeError, r'matrix w_h \(LSTM, GRU, RNN\), got Linear'),
    (lambda: nn.WeightDrop(nn.FastGRNN(2, 2, rngs=nnx.Rngs(0)), 0.1), TypeError, r'matrix w_h .*, got FastGRNN'),
    (lambda: nn.ActivationPenalty(-1.0), ValueError, 'factor must be a finite number >= 0, got -1.0'),
    (lambda: nn.TemporalActivationPenalty(float('inf')), ValueError, 'factor must be a finite number >= 0, got inf'),
  ],
)
def test_arguments_of_no_meaning_are_refused(build: Any, error: type[Exception], message: str) -> None:
  """Each message says what was got and what was expected."""
  with pytest.raises(error, match=message):
    build()
