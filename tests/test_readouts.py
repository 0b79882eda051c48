"""Tied readouts share the embedding's parameter; the mixture of softmaxes equals its
definition.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
from helpers import quick
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import language_model
import fptt_jax
from fptt_jax import nn

# Layers without a state are tested alone.
pytestmark = pytest.mark.filterwarnings('ignore:.*no hidden state:UserWarning')
KEY = jax.random.key(0)
S, B, H, E, V, M = 3, 2, 6, 4, 7, 3


def tied(rngs: nnx.Rngs) -> nn.Sequential:
  embed = nnx.Embed(V, E, rngs=rngs)
  return nn.Sequential(
    nn.EmbeddingDropout(embed, 0.0),
    nnx.Linear(E, E, use_bias=False, rngs=rngs),
    nn.TiedReadout(embed),
  )


def words(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, V, (S, B)).astype(np.int32)


def test_tied_readout_shares_its_parameter() -> None:
  """The matrix occurs once in params, and logits are E[w] A Eᵀ + b. Its gradient is the
  sum of an untied model's two gradients.
  """
  model = nn.from_nnx(tied)
  params = quick(model.init)(KEY)
  assert sorted(leaf.shape for leaf in jax.tree.leaves(params)) == [
    (E, E),
    (V,),
    (V, E),
  ]
  x, y = words(0), words(1)
  labels = jax.nn.one_hot(y, V)

  def untied(e_in, a, e_out, bias):
    return (
      -(jax.nn.log_softmax(e_in[x] @ a @ e_out.T + bias[None, None]) * labels)
      .sum(-1)
      .mean()
    )

  def values(p):
    layers = p['layers']
    return (
      layers[0]['embed']['embedding'],
      layers[1]['kernel'],
      layers[0]['embed']['embedding'],
      layers[2]['bias'],
    )

  optimizer = fptt_jax.fptt(optax.sgd(0.5), alpha=0.2)
  trainer = fptt_jax.make_trainer(
    model._replace(init=lambda key: params),
    fptt_jax.losses.sequence_classification(V),
    optimizer,
    num_windows=1,
  )
  state = trainer.init(KEY, fptt_jax.Batch(x, y))
  after, metrics = quick(trainer.step)(state, fptt_jax.Batch(x, y))
  value, grads = quick(jax.value_and_grad(untied, argnums=(0, 1, 2, 3)))(
    *values(params)
  )
  assert metrics.loss[0] == pytest.approx(value.item(), rel=1e-6)
  old, new = values(params), values(after.params)
  np.testing.assert_allclose(
    new[0], old[0] - 0.5 * (grads[0] + grads[2]), rtol=1e-5, atol=1e-7
  )
  np.testing.assert_allclose(new[3], old[3] - 0.5 * grads[3], rtol=1e-5, atol=1e-7)
  logits = quick(lambda p: model.apply(p, model.initial_state(B), x, None, None)[1])(
    after.params
  )
  expected = np.asarray(new[0])[x] @ np.asarray(new[1]) @ np.asarray(
    new[0]
  ).T + np.asarray(new[3])
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def build_mixture(
  rngs: nnx.Rngs, experts: int = M, features: int = E, dropout: float = 0.0
) -> nn.MixtureOfSoftmaxes:
  return nn.MixtureOfSoftmaxes(
    H, nnx.Embed(V, features, rngs=rngs), experts, dropout=dropout, rngs=rngs
  )


def mixture(**options: Any) -> tuple[dict[str, Any], Callable[..., jax.Array]]:
  """Return parameters of a mixture and its run (params, x, key) ->
  log-probabilities.
  """
  model = nn.from_nnx(lambda rngs: build_mixture(rngs, **options))
  return quick(model.init)(KEY), lambda params, x, key=None: model.apply(
    params, (), x, None, key
  )[1]


def test_mixture_is_its_definition_and_serves_as_logits() -> None:
  """exp of the outputs is Σ_m π_m softmax(E z_m + b) and sums to 1. Outputs and
  gradients are finite where the probabilities underflow.
  """
  params, run = mixture()
  params['bias'] = np.arange(V, dtype=np.float32) / 5
  x = np.random.default_rng(2).normal(size=(S, B, H)).astype(np.float32)
  log_p = quick(run)(params, x)
  weights = jax.tree.map(lambda w: np.asarray(w, np.float64), params)

  def softmax(a):
    return np.exp(a) / np.exp(a).sum(-1, keepdims=True)

  z = np.tanh(x @ weights['latent']['kernel'] + weights['latent']['bias']).reshape(
    S, B, M, E
  )
  experts = softmax(z @ weights['embed']['embedding'].T + weights['bias'])
  p = (softmax(x @ weights['prior']['kernel'])[..., None] * experts).sum(-2)
  np.testing.assert_allclose(np.exp(log_p), p, rtol=1e-5)
  y, loss = words(1), fptt_jax.losses.sequence_classification(V)
  windows = fptt_jax.make_windows(S, num_windows=1)
  window = fptt_jax._windows.window_at(
    windows, jnp.int32(0), fptt_jax._windows.valid_steps(windows, B, jnp.full(B, S))
  )
  nll = -np.log(np.take_along_axis(p, y[..., None], -1)).mean()
  assert loss.apply(log_p, jnp.asarray(y), window, ())[0] == pytest.approx(
    nll, rel=1e-5
  )

  params['bias'] = np.array([300.0, *[0.0] * (V - 1)], np.float32)
  log_p, grads = quick(
    lambda p: (run(p, 100 * x), jax.grad(lambda p: run(p, 100 * x).sum())(p))
  )(params)
  assert log_p[..., 1:].max() < -200
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_mixture_drops_its_latents_for_the_window() -> None:
  """In training, equal inputs give equal outputs at all steps, which differ between
  sequences and from evaluation.
  """
  params, run = mixture(dropout=0.5)
  x = jnp.ones((S, B, H))
  y = np.asarray(quick(run)(params, x, KEY))
  np.testing.assert_allclose(y, np.broadcast_to(y[:1], y.shape), rtol=1e-6)
  assert np.any(y[0, 0] != y[0, 1])
  assert np.any(y != quick(run)(params, x))


def test_mixture_breaks_the_softmax_bottleneck() -> None:
  """With one feature per word, one softmax has log-probabilities of rank 2 (E + 1), a
  mixture more.
  """
  x, rank = np.random.default_rng(0).normal(size=(1, 40, H)) * 3, {}
  for experts in (1, 6):
    params, run = mixture(experts=experts, features=1)
    params['embed']['embedding'] *= 5
    singular = np.linalg.svd(
      np.asarray(quick(run)(params, x.astype(np.float32)))[0], compute_uv=False
    )
    rank[experts] = int(np.sum(singular > 1e-4 * singular[0]))
  assert rank[1] <= 2 < rank[6]


@pytest.mark.parametrize(
  ('task', 'vocabulary', 'one_bias', 'two_biases', 'published'),
  [
    ('ptb_c', 50, 13_778_850, 13_787_650, 13.8e6),
    ('ptb_w', 10_000, 21_490_460, 21_500_620, 22e6),
  ],
)
def test_full_size_models_have_the_published_number_of_parameters(
  task: str, vocabulary: int, one_bias: int, two_biases: int, published: float
) -> None:
  """The PTB-c and PTB-w models are counted without allocation. The published counts
  include torch's second biases of 4H numbers.
  """
  config = language_model.Config(
    data_dir='folder', task=task, **language_model.TASKS[task]
  )
  shapes = jax.eval_shape(language_model.make_model(config, vocabulary).init, KEY)
  hidden = [config.hidden] * (config.layers - 1) + [config.last_hidden]
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert (count, count + 4 * sum(hidden)) == (one_bias, two_biases)
  assert two_biases == pytest.approx(published, rel=0.025)
  assert sum(leaf.shape[0] == vocabulary for leaf in jax.tree.leaves(shapes)) == 2


def test_invalid_sizes_raise() -> None:
  """The error names the layer or the argument, and the shape or value."""
  rngs = nnx.Rngs(0)
  layer = build_mixture(rngs)
  with pytest.raises(ValueError, match=r'inputs of TiedReadout .*\(3, 2, 5\)'):
    nn.TiedReadout(layer.embed)(jnp.ones((S, B, E + 1)))
  with pytest.raises(
    ValueError,
    match=r'inputs of MixtureOfSoftmaxes .*\(3, 6\)',
  ):
    layer((), jnp.ones((S, H)))
  with pytest.raises(ValueError, match=r'experts .*0'):
    build_mixture(rngs, experts=0)
  with pytest.raises(ValueError, match=r'rate .*1\.0'):
    build_mixture(rngs, dropout=1.0)
