"""Readouts that share the token vectors: one parameter, right distributions, the published sizes."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from experiments import language_model
import fptt_jax
from fptt_jax import nn

KEY = jax.random.key(0)


def build_tied(rngs: nnx.Rngs) -> nn.Stack:
  embed = nnx.Embed(7, 4, rngs=rngs)
  return nn.Stack(embed, nn.RNN(4, 4, rngs=rngs), nn.TiedReadout(embed))


def test_the_shared_matrix_is_one_parameter_with_both_gradients() -> None:
  """V·D numbers once; its gradient is the sum of those of two untied copies."""
  tied = nn.from_nnx(build_tied)
  params = tied.init(KEY)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 7 * 4 + 4 * (4 + 4 + 1) + 7
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (5, 3)))
  cell = nn.from_nnx(lambda rngs: nn.RNN(4, 4, rngs=rngs))
  embedding, rnn, bias = params['layers'][0]['embedding'], params['layers'][1], params['layers'][2]['bias']

  def untied(inward, outward):
    _, h = cell.apply(rnn, cell.initial_state(3), inward[tokens], None, None)
    return jnp.sum(jnp.sin(h @ outward.T + bias[None, None]))

  together = lambda p: jnp.sum(jnp.sin(tied.apply(p, tied.initial_state(3), tokens, None, None)[1]))
  np.testing.assert_allclose(together(params), untied(embedding, embedding), rtol=1e-5)
  parts = jax.grad(untied, argnums=(0, 1))(embedding, embedding)
  np.testing.assert_allclose(jax.grad(together)(params)['layers'][0]['embedding'], parts[0] + parts[1], rtol=1e-4, atol=1e-5)


def test_a_tied_model_trains_by_fptt() -> None:
  """The recursion moves the shared matrix as one parameter."""
  model = nn.from_nnx(build_tied)
  tokens = np.random.default_rng(0).integers(0, 7, (9, 4)).astype(np.int32)
  batch = fptt_jax.Batch(tokens[:-1], tokens[1:])
  optimizer = fptt_jax.fptt(optax.sgd(0.1), alpha=0.5)
  trainer = problems.quick_trainer(model, fptt_jax.losses.sequence_classification(7), optimizer, num_windows=2)
  state = trainer.init(KEY, batch)
  moved, _ = trainer.step(state, batch)
  change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, moved.params)
  assert min(jax.tree.leaves(change)) > 0


def test_mixture_of_softmaxes_is_the_mixture_in_numpy() -> None:
  """log Σ π softmax(...), computed literally; rows sum to 1, so they are logits of themselves."""
  embed = nnx.Embed(6, 3, rngs=nnx.Rngs(1))
  layer = nn.MixtureOfSoftmaxes(5, embed, 4, rngs=nnx.Rngs(0))
  layer.readout.bias[...] = jnp.arange(6.0)
  x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
  _, log_p = layer((), jnp.asarray(x), None, None)
  softmax = lambda a: np.exp(a - a.max(-1, keepdims=True)) / np.exp(a - a.max(-1, keepdims=True)).sum(-1, keepdims=True)
  prior = softmax(x @ np.asarray(layer.prior.kernel[...]))
  latent = np.tanh(x @ np.asarray(layer.latent.kernel[...]) + np.asarray(layer.latent.bias[...])).reshape(2, 3, 4, 3)
  experts = softmax(latent @ np.asarray(embed.embedding[...]).T + np.arange(6.0))
  np.testing.assert_allclose(np.exp(log_p), (prior[..., None] * experts).sum(-2), rtol=1e-4)
  np.testing.assert_allclose(jax.nn.log_softmax(log_p), log_p, atol=1e-5)


def test_mixture_breaks_the_softmax_bottleneck() -> None:
  """One softmax over D=1 vectors gives log-probabilities of rank 2 at most (D + 1); a mixture exceeds that."""
  x = jax.random.normal(KEY, (1, 40, 5)) * 3
  rank = {}
  for experts in (1, 6):
    layer = nn.MixtureOfSoftmaxes(5, nnx.Embed(12, 1, rngs=nnx.Rngs(1)), experts, rngs=nnx.Rngs(0))
    layer.readout.embed.embedding[...] *= 5
    singular = np.linalg.svd(np.asarray(layer((), x, None, None)[1][0]), compute_uv=False)
    rank[experts] = int(np.sum(singular > 1e-4 * singular[0]))
  assert rank[1] <= 2 < rank[6]


@pytest.mark.parametrize(('task', 'millions'), [('ptb_c', '13.8'), ('ptb_w', '21.5')])
def test_full_configurations_have_the_published_size(task: str, millions: str) -> None:
  """Torch's second LSTM bias counted as there, PTB-c has its 13.8M parameters, PTB-w 21.5M of the 22M quoted."""
  config = language_model.Config(data_dir='x', task=task, **language_model.TASKS[task])
  vocabulary = 50 if config.by_characters else 10_000
  shapes = jax.eval_shape(language_model.make_model(config, vocabulary).init, KEY)
  ours = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  hidden = [config.hidden] * (config.layers - 1) + [config.last_hidden]
  assert f'{(ours + 4 * sum(hidden)) / 1e6:.1f}' == millions


def test_sizes_that_do_not_fit_are_refused() -> None:
  """The message names both."""
  with pytest.raises(ValueError, match=r'inputs of the embedding size D=4, got shape \(2, 3, 5\)'):
    nn.TiedReadout(nnx.Embed(7, 4, rngs=nnx.Rngs(0)))(jnp.zeros((2, 3, 5)))
  with pytest.raises(ValueError, match='experts must be an integer >= 1, got 0'):
    nn.MixtureOfSoftmaxes(4, nnx.Embed(7, 4, rngs=nnx.Rngs(0)), 0, rngs=nnx.Rngs(0))
