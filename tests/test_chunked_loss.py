"""Outputs computed a few steps at a time against those of a whole window at once."""

import re
from typing import Any

import chex
from flax import nnx
from helpers import optimized, quick, quick_trainer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses, nn
from fptt_jax._windows import valid_steps, window_at
from fptt_jax.training import _readout
from fptt_jax.training._readout import chunked_loss, steps_at_once

T, B, D, H, V = 10, 4, 3, 5, 7
RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, V, (T + 1, B)).astype(np.int32)
LENGTHS = np.array([10, 3, 6, 1], np.int32)


def build(kind: str, rngs: nnx.Rngs, dtype: Any = jnp.float64) -> nn.Sequential:
  """A language model; 'series' takes and gives numbers."""
  lstm = nn.LSTM(D, H, param_dtype=dtype, rngs=rngs)
  linear = lambda features, out: nnx.Linear(features, out, param_dtype=dtype, rngs=rngs)
  if kind == 'series':
    return nn.Sequential(
      lstm,
      linear(H, H),
      jnp.tanh,
      nnx.Dropout(0.3),
      linear(H, H),
      nnx.relu,
      linear(H, 2),
    )
  embed = nnx.Embed(V, D, param_dtype=dtype, rngs=rngs)
  if kind == 'linear':
    return nn.Sequential(embed, lstm, nnx.Dropout(0.3), linear(H, V))
  if kind == 'tied':
    return nn.Sequential(
      embed, lstm, linear(H, D), nn.LockedDropout(0.3), nn.TiedReadout(embed)
    )
  penalized = [
    nn.TemporalActivationPenalty(0.5),
    nn.LockedDropout(0.3),
    nn.ActivationPenalty(0.5),
  ]
  return nn.Sequential(
    nn.EmbeddingDropout(embed, 0.2),
    lstm,
    *penalized,
    nn.MixtureOfSoftmaxes(H, embed, 3, dropout=0.3, rngs=rngs),
  )


def make(
  kind: str, readout_chunk: int | None, *, explicit: bool = False, **options: Any
) -> fptt_jax.Trainer:
  """A trainer with windows of S = 4 and 3 steps."""
  options = {
    'method': 'fptt',
    'num_windows': 3,
    'readout_chunk': readout_chunk,
  } | options
  optimizer = optax.sgd(0.5, momentum=0.9)
  if options['method'] == 'fptt':
    wrap = fptt_jax.fptt_algorithm2 if explicit else fptt_jax.fptt
    optimizer = wrap(optimizer, alpha=0.5)
  loss = (
    losses.sequence_regression()
    if kind == 'series'
    else losses.sequence_classification(V, accuracy=True)
  )
  return quick_trainer(
    nn.from_nnx(lambda rngs: build(kind, rngs)), loss, optimizer, **options
  )


def train(trainer: fptt_jax.Trainer, kind: str, lengths: np.ndarray | None) -> Any:
  """All that comes of two steps, and of an evaluation: (in float64, totals in
  float32).
  """
  batch = fptt_jax.Batch(WORDS[:-1], WORDS[1:], lengths)
  if kind == 'series':
    numbers = np.random.default_rng(1)
    batch = batch._replace(
      inputs=numbers.normal(size=(T, B, D)), targets=numbers.normal(size=(T, B, 2))
    )
  state = quick(trainer.init)(jax.random.key(0), batch)
  seen = []
  for _ in range(2):
    state, metrics = trainer.step(state, batch)
    seen.append(metrics)
  totals, hidden = trainer.evaluate(state.params, batch)
  exact = (
    state._replace(key=None),
    hidden,
    [metrics._replace(totals={}) for metrics in seen],
  )
  return jax.tree.map(
    np.asarray, (exact, (totals, [metrics.totals for metrics in seen]))
  )


def assert_same(got: Any, expected: Any) -> None:
  """Float64 to 1e-10; totals, sums in float32 of some ten numbers in another order, to
  1e-6.
  """
  chex.assert_trees_all_close(got[0], expected[0], rtol=1e-10, atol=1e-12)
  chex.assert_trees_all_close(got[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize(
  ('kind', 'lengths', 'options'),
  [
    ('linear', LENGTHS, {'explicit': True}),
    (
      'tied',
      None,
      {
        'inner_steps': 2,
        'method': 'tbptt',
        'loss_weights': [0.3, 1.0, 2.0],
        'carry_hidden': True,
      },
    ),
    ('mixture', LENGTHS, {'method': 'bptt_aux'}),
    ('series', None, {'method': 'ftrl'}),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
@pytest.mark.usefixtures('x64')
def test_training_is_that_of_whole_windows(
  kind: str, lengths: np.ndarray | None, options: dict[str, Any]
) -> None:
  """Three steps at a time, which windows of four are no multiple of, in float64: noise,
  penalties, masks, measures and gradients, also of weights that are used before the
  readout too, are those of whole windows, by each way the trainer asks for
  gradients.
  """
  whole, parts = (
    train(make(kind, steps, **options), kind, lengths) for steps in (T, 3)
  )
  assert_same(parts, whole)


@pytest.mark.usefixtures('x64')
def test_split_batches_and_members_too() -> None:
  """A ragged batch split over two devices, and two members side by side."""
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:2], ('batch',))
  whole, parts = (
    train(make('tied', steps, mesh=mesh, method='tbptt'), 'tied', LENGTHS)
    for steps in (T, 1)
  )
  assert_same(parts, whole)

  batch, keys = (
    fptt_jax.Batch(WORDS[:-1], WORDS[1:], LENGTHS),
    jax.random.split(jax.random.key(1), 2),
  )

  def members(steps: int) -> Any:
    model = nn.from_nnx(lambda rngs: build('linear', rngs))
    trainer = fptt_jax.make_trainer(
      model,
      losses.sequence_classification(V),
      optax.sgd(0.5),
      method='tbptt',
      num_windows=3,
      readout_chunk=steps,
    )
    many = fptt_jax.vmap_trainer(trainer)
    state, metrics = quick(many.step)(quick(many.init)(keys, batch), batch)
    return state.params, metrics.loss

  chex.assert_trees_all_close(members(1), members(T), rtol=1e-10, atol=1e-12)


def window_loss(
  readout: Any, per_step: Any, features: Any, targets: Any, steps: int
) -> Any:
  """(value, gradients) of `chunked_loss`, with a mask, the weight being 2."""
  num_steps, batch_size = features.shape[:2]
  windows = fptt_jax.make_windows(num_steps, num_windows=1)
  window = window_at(
    windows,
    jnp.int32(0),
    valid_steps(windows, batch_size, jnp.full(batch_size, num_steps)),
  )

  def run(weight: jax.Array, features: jax.Array) -> jax.Array:
    return chunked_loss(
      readout,
      per_step,
      {'used': weight, 'unused': weight},
      features,
      targets,
      window,
      None,
      steps=steps,
    ).loss

  return quick(jax.value_and_grad(run, argnums=(0, 1)))(
    jnp.asarray(2, features.dtype), features
  )


@pytest.mark.parametrize('steps', [1, 2, 4, 8])
def test_any_number_of_steps(steps: int) -> None:
  """A window of 7 steps in chunks of 1 to 8 steps, with features x and targets y in
  place of noise: Σ (2 x - y)² / 14.
  """
  x, y = (
    np.random.default_rng(seed).normal(size=(7, 2, 1)).astype(np.float32)
    for seed in (0, 1)
  )
  per_step = lambda outputs, targets: {'loss': jnp.square(outputs - targets)[..., 0]}
  value, (to_weight, to_features) = window_loss(
    lambda p, x, key: p['used'] * x, per_step, jnp.asarray(x), jnp.asarray(y), steps
  )
  np.testing.assert_allclose(value, np.square(2 * x - y).mean(), rtol=1e-5)
  np.testing.assert_allclose(to_weight, (2 * (2 * x - y) * x).mean(), rtol=1e-5)
  np.testing.assert_allclose(to_features, 4 * (2 * x - y) / 14, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures('strict_dtypes')
def test_gradient_of_low_precision_weights_is_summed_in_float32() -> None:
  """600 chunks, each adding 1/600: in bfloat16 the sum would stop growing at about
  0.4.
  """
  per_step = lambda outputs, targets: {'loss': outputs[..., 0].astype(jnp.float32)}
  ones = jnp.ones((600, 1, 1), jnp.bfloat16)
  value, (to_weight, _) = window_loss(
    lambda p, x, key: p['used'] * x, per_step, ones, ones, 1
  )
  assert value == pytest.approx(2, rel=1e-5)
  assert to_weight.dtype == jnp.bfloat16
  assert float(to_weight) == pytest.approx(1, rel=2**-8)


@pytest.mark.usefixtures('strict_dtypes')
def test_low_precision_models_promote_nothing_implicitly() -> None:
  """A bfloat16 model's step is traceable under strict promotion, gives a state of the
  dtypes it got and a float32 loss.
  """
  low: Any = {'param_dtype': jnp.bfloat16}
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.LSTM(D, H, **low, rngs=rngs),
      nnx.Linear(H, V, **low, dtype=jnp.bfloat16, rngs=rngs),
    )
  )
  loss, options = (
    losses.sequence_classification(V),
    {'method': 'tbptt', 'num_windows': 3, 'readout_chunk': 2},
  )
  trainer = fptt_jax.make_trainer(model, loss, optax.sgd(0.1), **options)
  batch = fptt_jax.Batch(
    jax.ShapeDtypeStruct((T, B, D), jnp.bfloat16),
    jax.ShapeDtypeStruct((T, B), jnp.int32),
  )
  state = jax.eval_shape(trainer.init, jax.random.key(0), batch)
  after, metrics = jax.eval_shape(trainer.step, state, batch)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    after._replace(key=None), state._replace(key=None)
  )
  assert metrics.loss.dtype == jnp.float32


# By size.

WIDE, ROWS, STEPS = 10_000, 64, 16
LOGITS = 4 * WIDE * ROWS * STEPS


def lowered(words: int, readout_chunk: int | None) -> Any:
  """A train step of two windows of STEPS, not compiled."""
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(
      nnx.Embed(words, 16, rngs=rngs),
      nn.LSTM(16, 16, rngs=rngs),
      nnx.Linear(16, words, rngs=rngs),
    )
  )
  loss, optimizer = losses.sequence_classification(words), fptt_jax.fptt(optax.sgd(0.1))
  trainer = fptt_jax.make_trainer(
    model, loss, optimizer, num_windows=2, readout_chunk=readout_chunk
  )
  tokens = jax.ShapeDtypeStruct((2 * STEPS, ROWS), jnp.int32)
  batch = fptt_jax.Batch(tokens, tokens)
  return trainer.step.lower(
    jax.eval_shape(trainer.init, jax.random.key(0), batch), batch
  )


def products(text: str) -> int:
  return len(re.findall(r'= \S+ dot\(', text))


def test_large_vocabularies_are_read_out_in_parts() -> None:
  """The compiled step of 10,000 words needs less memory than one window's logits, where
  whole windows need more than two of them, and has no more products: the outputs are
  not computed again for the gradient, which is not copied in another order either.
  """
  assert LOGITS > _readout.CHUNK_THRESHOLD_BYTES
  parts, whole = (optimized(lowered(WIDE, steps)) for steps in (None, STEPS))
  assert products(parts.as_text()) == products(whole.as_text()) > 0
  assert (
    parts.memory_analysis().temp_size_in_bytes < 0.7 * LOGITS
  )  # Two chunks of a quarter, and the parameters.
  assert whole.memory_analysis().temp_size_in_bytes > 2 * LOGITS
  rows = _readout.CHUNK_BYTES * STEPS // LOGITS * ROWS
  assert f'f32[{rows},{WIDE}]' in parts.as_text()
  assert f'f32[{WIDE},{rows}]' not in parts.as_text()


def test_small_vocabularies_and_accelerators_are_read_out_whole(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Up to the limit, and where JAX does not run on a CPU, a window's logits are one
  array; above it on a CPU they are not.
  """

  def is_whole(words: int) -> bool:
    return f'tensor<{STEPS}x{ROWS}x{words}xf32>' in lowered(words, None).as_text()

  assert is_whole(WIDE * _readout.CHUNK_THRESHOLD_BYTES // LOGITS)
  assert not is_whole(WIDE)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert is_whole(WIDE)


def test_a_chunk_has_the_steps_that_fit() -> None:
  """By the largest array of the readout, a mixture's [S, B, M, V] too, and one step at
  least.
  """
  features = lambda steps, rows: jax.ShapeDtypeStruct((steps, rows, 2), jnp.float32)
  readout = lambda width: (
    lambda params, x, key: jnp.broadcast_to(
      x[..., None, :1], (*x.shape[:2], width, 1)
    ).sum(2)
  )
  mebi = 2**20 // 4
  assert steps_at_once(readout(mebi), (), features(32, 1), None) == 32
  assert steps_at_once(readout(mebi), (), features(33, 1), None) == 10
  assert steps_at_once(readout(mebi), (), features(33, 4), None) == 2
  assert steps_at_once(readout(mebi), (), features(33, 20), None) == 1


@pytest.mark.filterwarnings('ignore:Sequential carries no hidden state')
def test_models_without_a_recurrent_layer_are_read_out_whole() -> None:
  """Features that are tokens have no gradient: all of a window at once, whatever was
  asked for.
  """
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, V, rngs=rngs))
  )
  batch = fptt_jax.Batch(WORDS[:-1], WORDS[1:])

  def text(steps: int) -> str:
    trainer = fptt_jax.make_trainer(
      model,
      losses.sequence_classification(V),
      optax.sgd(0.1),
      method='tbptt',
      num_windows=2,
      readout_chunk=steps,
    )
    return trainer.step.lower(
      jax.eval_shape(trainer.init, jax.random.key(0), batch), batch
    ).as_text()

  assert text(1) == text(T)


@pytest.mark.parametrize(
  ('model', 'loss', 'steps', 'message'),
  [
    (
      'words',
      losses.sequence_classification(V),
      0,
      r'readout_chunk must be an integer >= 1, got 0\.',
    ),
    (
      'words',
      losses.terminal_classification(V),
      2,
      r'readout_chunk .*per_step=None, got 2',
    ),
    (
      'recurrent',
      losses.sequence_classification(V),
      2,
      r'readout_chunk .*split=None, got 2',
    ),
  ],
)
def test_what_cannot_be_read_out_in_parts_is_refused(
  model: str, loss: fptt_jax.Loss, steps: int, message: str
) -> None:
  """With what was got, where the trainer is made."""
  made = nn.from_nnx(
    lambda rngs: (
      build('linear', rngs, jnp.float32)
      if model == 'words'
      else nn.LSTM(D, V, rngs=rngs)
    )
  )
  with pytest.raises(ValueError, match=message):
    fptt_jax.make_trainer(
      made, loss, optax.sgd(0.1), method='tbptt', readout_chunk=steps
    )


def evaluated_loss(kind: str, implementation: str, readout_chunk: int) -> Any:
  """Returns a model, and (params, hidden) -> the evaluated loss of a ragged batch plus
  a number that reads `hidden`.
  """
  dtype = jnp.float64

  def build_small(rngs: nnx.Rngs) -> nn.Sequential:
    lstm = nn.LSTM(D, 3, implementation=implementation, param_dtype=dtype, rngs=rngs)
    if kind == 'mixture':
      embed = nnx.Embed(3, 2, param_dtype=dtype, rngs=rngs)
      return nn.Sequential(lstm, nn.MixtureOfSoftmaxes(3, embed, 2, rngs=rngs))
    return nn.Sequential(lstm, nnx.Linear(3, 3, param_dtype=dtype, rngs=rngs))

  model = nn.from_nnx(build_small)
  inputs = np.random.default_rng(1).normal(size=(T, B, D))
  loss = losses.sequence_classification(3, accuracy=True)
  batch = fptt_jax.Batch(inputs, WORDS[1:] % 3, LENGTHS)
  if kind == 'series':
    loss = losses.sequence_regression()
    batch = batch._replace(targets=np.random.default_rng(2).normal(size=(T, B, 3)))
  trainer = fptt_jax.make_trainer(
    model, loss, optax.sgd(0.1), method='tbptt', readout_chunk=readout_chunk
  )

  def evaluated(params: Any, hidden: Any) -> jax.Array:
    totals, hidden = trainer.evaluate(params, batch, hidden)
    return totals['loss'] + sum(leaf.sum() for leaf in jax.tree.leaves(hidden))

  return model, evaluated


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('kind', ['linear', 'series', 'mixture'])
def test_evaluation_has_the_gradient_of_whole_windows(kind: str) -> None:
  """With respect to parameters and initial state, chunks of two steps in windows of
  three or four.
  """
  gradients = []
  for readout_chunk in (T, 2):
    model, evaluated = evaluated_loss(kind, 'custom_vjp', readout_chunk)
    params = model.init(jax.random.key(0))
    gradients.append(
      quick(jax.grad(evaluated, argnums=(0, 1)))(params, model.initial_state(B))
    )
  # The cotangents pass through totals, which are sums in float32.
  chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-7)
  assert optax.tree.norm(gradients[0]) > 0.1


@pytest.mark.usefixtures('x64')
def test_evaluation_has_second_and_forward_derivatives() -> None:
  """Layers that run by the plain scan have them, and so has their evaluation."""
  found = []
  for readout_chunk in (T, 2):
    model, evaluated = evaluated_loss('linear', 'scan', readout_chunk)
    params, hidden = model.init(jax.random.key(0)), model.initial_state(B)
    along = lambda p, f=evaluated, h=hidden: jax.jvp(lambda q: f(q, h), (p,), (p,))[1]
    found.append(quick(jax.value_and_grad(along))(params))
  chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)
