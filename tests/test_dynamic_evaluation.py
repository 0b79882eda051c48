"""Dynamic evaluation: its rule by hand, its order of measuring and learning, and what
it gains on a text that changes.
"""

from collections.abc import Iterator
import contextlib
import functools
import math
from pathlib import Path
from typing import Any

import chex
from flax import nnx
from helpers import quick, quick_trainer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import dynamic_evaluation, language_model
from experiments.data.streams import sequences
from experiments.dynamic_evaluation import (
  adaptation,
  evaluator,
  gradient_statistics,
  mean_squares,
  tune,
)
import fptt_jax
from fptt_jax import nn

V = 6
LOSS = fptt_jax.losses.sequence_classification(V)
MODEL = nn.from_nnx(
  lambda rngs: nn.Sequential(
    nnx.Embed(V, 5, rngs=rngs),
    nnx.Dropout(0.5),
    nn.ElmanRNN(5, 8, rngs=rngs),
    nnx.Dropout(0.5),
    nnx.Linear(8, V, rngs=rngs),
  )
)


def markov(length: int, step: int, seed: int) -> np.ndarray:
  """A text in which, nine times out of ten, the next word is `step` further on."""
  rng, words = np.random.default_rng(seed), [0]
  while len(words) < length:
    words.append((words[-1] + step) % V if rng.random() < 0.9 else int(rng.integers(V)))
  return np.array(words, np.int32)


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
  """Trainers made within compile quickly, and donate nothing."""
  make = fptt_jax.make_trainer
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      fptt_jax,
      'make_trainer',
      lambda *args, **kwargs: (t := make(*args, **kwargs))._replace(step=quick(t.step)),
    )
    yield


@functools.cache
def trained() -> Any:
  """Parameters trained briefly on the text of step 1."""
  trainer = quick_trainer(
    MODEL, LOSS, optax.adam(0.03), method='tbptt', num_windows=2, carry_hidden=True
  )
  batches = [
    batch for batch in sequences(markov(1600, 1, 0), 20, 8) if batch.lengths is None
  ]
  state = trainer.init(jax.random.key(0), batches[0])
  for _ in range(6):
    for batch in batches:
      state, _ = trainer.step(state, batch)
  return state.params


TEXT = markov(8 * 84, 1, 2)


@functools.cache
def statistics() -> Any:
  with quick_compilation():
    return gradient_statistics(MODEL, LOSS, trained(), sequences(TEXT, 40, 8))


@functools.cache
def evaluate() -> Any:
  return evaluator(MODEL, LOSS, trained(), statistics())


@quick
def segment_gradient(params: Any, hidden: Any, x: jax.Array, y: jax.Array) -> Any:
  """(loss, hidden state after, gradient) of one segment [S, B], from the model's own
  functions.
  """

  def loss(params: Any) -> Any:
    state, logits = MODEL.apply(params, hidden, x, None, None)
    return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(y, V)).sum(-1).mean(), state

  (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return value, state, grads


def segments(text: np.ndarray, rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """The text as `rows` streams, cut into segments of 5 (the last may be shorter)."""
  streams = text[: len(text) // rows * rows].reshape(rows, -1).T
  return [
    (streams[k : min(k + 5, len(streams) - 1)], streams[k + 1 : k + 6])
    for k in range(0, len(streams) - 1, 5)
  ]


@pytest.mark.slow
def test_learning_rate_0_is_static_evaluation() -> None:
  """The language-model script's own figure for the same text, whatever the decay;
  dropout is off.
  """
  text = markov(198, 1, 1)
  trainer = quick_trainer(MODEL, LOSS, optax.sgd(0.1), method='tbptt')
  static = language_model.nats(trainer, trained(), text)
  for decay in (0.0, 0.3):
    assert evaluate()(sequences(text, 40, 1), 0.0, decay) == pytest.approx(
      static, rel=1e-6
    )


def test_rule_by_hand() -> None:
  """Two steps of lr g/(rms + ε) and the decay, in NumPy: RMS_norm is over the mean of
  the two arrays' means, (2 + 4)/2, and where decay · RMS_norm passes 1 the weight goes
  all the way back to its trained value. Nothing else in the state moves.
  """
  rms = {'a': np.array([1.0, 3.0], np.float32), 'b': np.array([[4.0]], np.float32)}
  trained = {'a': np.array([0.5, -0.5], np.float32), 'b': np.array([[2.0]], np.float32)}
  grads = [
    {'a': np.array([0.2, -0.1]), 'b': np.array([[1.0]])},
    {'a': np.array([-0.3, 0.4]), 'b': np.array([[2.0]])},
  ]
  optimizer = adaptation(rms, epsilon=0.5)
  initial = optax.tree.set(
    optimizer.init(trained), learning_rate=jnp.asarray(0.1), decay=jnp.asarray(0.9)
  )
  state, params, expected = initial, trained, trained
  for grad in grads:
    updates, state = optimizer.update(jax.tree.map(jnp.float32, grad), state, params)
    params = optax.apply_updates(params, updates)
    rule = lambda w, w0, g, r: (
      w - 0.1 * g / (r + 0.5) + 0.9 * np.minimum(r / 3, 1 / 0.9) * (w0 - w)
    )
    expected = jax.tree.map(rule, expected, trained, grad, rms)
  chex.assert_trees_all_close(params, expected, rtol=1e-5)
  np.testing.assert_allclose(
    params['b'], [[2 - 0.1 * 2 / 4.5]], rtol=1e-6
  )  # 0.9 · 4/3 > 1: no trace of the first step
  chex.assert_trees_all_equal(state, initial)


def test_statistics_are_the_root_mean_square_of_the_segments_gradients() -> None:
  """Over a text of whole and broken segments in eight streams: the mean in NumPy of the
  squares of gradients taken one by one; and the transformation that gathers them moves
  nothing.
  """
  hidden, squares = MODEL.initial_state(8), []
  for x, y in segments(TEXT, 8):
    _, hidden, grads = segment_gradient(trained(), hidden, x, y)
    squares.append(jax.tree.map(lambda g: np.square(np.asarray(g, np.float64)), grads))
  assert [len(x) for x, _ in segments(TEXT, 8)] == [5] * 16 + [3]
  expected = jax.tree.map(lambda *leaves: np.sqrt(np.mean(leaves, axis=0)), *squares)
  chex.assert_trees_all_close(statistics(), expected, rtol=1e-4, atol=1e-7)
  updates, _ = mean_squares().update(grads, mean_squares().init(grads))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_large_readouts_see_no_dropout_either(monkeypatch: pytest.MonkeyPatch) -> None:
  """Where the trainer would compute outputs a few steps at a time, by other functions
  of the model, the statistics are the same.
  """
  params, expected = trained(), statistics()
  monkeypatch.setattr(fptt_jax.training._readout, 'CHUNK_THRESHOLD_BYTES', 0)
  monkeypatch.setattr(fptt_jax.training._readout, 'CHUNK_BYTES', 1)
  with quick_compilation():
    got = gradient_statistics(MODEL, LOSS, params, sequences(TEXT, 40, 8))
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('plain', [False, True])
def test_each_segment_is_measured_before_it_is_learned_from(plain: bool) -> None:
  """Nats a word equal those of a loop that adds up a segment's loss, then takes the
  step: with the statistics, and as plain gradient descent. The hidden state goes on
  from the pass that was measured; the trained parameters are unchanged after it.
  """
  text, params = markov(63, 2, 3), trained()
  before = jax.tree.map(np.array, params)
  if plain:
    rms, epsilon, lr, decay = jax.tree.map(np.ones_like, before), 0.0, 0.05, 0.02
    with quick_compilation():
      got = evaluator(MODEL, LOSS, params)(sequences(text, 40, 1), lr, decay)
  else:
    rms, epsilon, lr, decay = statistics(), dynamic_evaluation.EPSILON, 0.004, 0.02
    got = evaluate()(sequences(text, 40, 1), lr, decay)
  average = np.mean([leaf.mean() for leaf in jax.tree.leaves(rms)])
  rule = lambda w, w0, g, r: (
    w - lr * g / (r + epsilon) + np.minimum(decay * r / average, 1) * (w0 - w)
  )
  hidden, total = MODEL.initial_state(1), 0.0
  for x, y in segments(text, 1):
    value, hidden, grads = segment_gradient(params, hidden, x, y)
    total += value.item() * len(x)
    params = jax.tree.map(rule, params, before, grads, rms)
  assert got == pytest.approx(total / 62, rel=1e-4)
  chex.assert_trees_all_equal(trained(), before)


def test_it_adapts_to_a_text_of_another_rule() -> None:
  """On words two apart, where training had one apart, perplexity falls from far above
  chance to less than half of it; settings chosen on one text hold on another of the
  rule.
  """
  valid, test = (list(sequences(markov(401, 2, seed), 40, 1)) for seed in (4, 5))
  best, *others = tune(evaluate(), valid, (1e-3, 2e-2), (0.0, 1e-2))
  assert len(others) == 3
  assert evaluate()(valid, best.learning_rate, best.decay) == best.nats
  assert (
    math.exp(evaluate()(test, best.learning_rate, best.decay))
    < V / 2
    < V
    < math.exp(evaluate()(test, 0.0, 0.0))
  )


def test_grid_is_sorted_with_what_diverged_last() -> None:
  """By nats, NaN after all numbers, wherever it came in the grid."""
  trials = tune(
    lambda batches, lr, decay: math.nan if lr == 1 else lr + decay,
    [],
    (1.0, 3.0, 2.0),
    (0.5, 0.0),
  )
  assert [(lr, decay) for lr, decay, _ in trials] == [
    (2, 0),
    (2, 0.5),
    (3, 0),
    (3, 0.5),
    (1, 0.5),
    (1, 0),
  ]


def test_text_that_cannot_be_cut_is_refused() -> None:
  """A length that is no multiple of the segment, and no text at all."""
  with pytest.raises(
    ValueError, match='must have a multiple of segment=5 steps, got T=42'
  ):
    evaluate()(sequences(markov(100, 1, 0), 42, 1), 0.1, 0.1)
  with pytest.raises(ValueError, match='got no batches'):
    gradient_statistics(MODEL, LOSS, trained(), [])


def test_a_search_that_was_stopped_goes_on(tmp_path: Path) -> None:
  """What was tried is read from the file, NaN too, and all else is run; trials of
  other weights are not used.
  """
  path, ran = tmp_path / 'dynamic_evaluation.json', []

  def evaluate(batches: Any, lr: float, decay: float) -> float:
    ran.append((lr, decay))
    if len(ran) == 3:
      raise KeyboardInterrupt
    return math.nan if lr == 1 else lr + decay

  search = lambda identity: tune(
    language_model.remembered(evaluate, path, identity), [], (1.0, 2.0), (0.5, 0.0)
  )
  with pytest.raises(KeyboardInterrupt):
    search('a')
  trials = search('a')
  assert ran == [(1, 0.5), (1, 0), (2, 0.5), (2, 0.5), (2, 0)]
  assert trials[:2] == [(2, 0, 2), (2, 0.5, 2.5)]
  assert [math.isnan(trial.nats) for trial in trials[2:]] == [True, True]
  search('b')
  assert len(ran) == 9
