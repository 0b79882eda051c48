"""Dynamic evaluation: its rule in NumPy, what it reduces to, and that it helps where the text changes."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems

from experiments import dynamic_evaluation, streams
from experiments.data import Text
import fptt_jax
from fptt_jax import nn

LOSS = fptt_jax.losses.sequence_classification(4)


def make_model() -> fptt_jax.Model:
  return nn.from_nnx(
    lambda rngs: nn.Stack(nnx.Embed(4, 6, rngs=rngs), nnx.Dropout(0.5), nn.RNN(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs))
  )


MODEL = make_model()


def markov(length: int, step: int, seed: int = 0) -> np.ndarray:
  """Tokens that go on by `step` modulo 4, one in five at random."""
  rng = np.random.default_rng(seed)
  tokens = np.zeros(length, np.int32)
  for n in range(1, length):
    tokens[n] = rng.integers(4) if rng.random() < 0.2 else (tokens[n - 1] + step) % 4
  return tokens


def test_one_update_is_the_paper_s_rule() -> None:
  """θ' - θ = λ min(RMS/mean RMS, 1/λ)(θ_trained - θ) - η g/(RMS + ε), by hand, the minimum reached by one entry."""
  w, anchor, rms, g = np.array([1.0, 2.0]), np.array([0.0, 5.0]), np.array([0.01, 3.99]), np.array([0.3, -0.2])
  optimizer = dynamic_evaluation.dynamic(epsilon=0.01)
  state = dynamic_evaluation.DynamicState({'w': anchor}, {'w': rms}, np.float32(0.1), np.float32(0.6))
  updates, _ = optimizer.update({'w': jnp.asarray(g)}, state, {'w': jnp.asarray(w)})
  expected = [0.6 * (0.01 / 2) * -1.0 - 0.1 * 0.3 / 0.02, 1.0 * 3.0 + 0.1 * 0.2 / 4.0]
  np.testing.assert_allclose(updates['w'], expected, rtol=1e-5)


def test_statistics_are_the_root_mean_squares_of_the_segments_gradients() -> None:
  """A loop over segments of 5 with plain jax.grad, hidden state carried, without dropout."""
  params = MODEL.init(jax.random.key(0))
  batches = list(streams.sequences(markov(100, 1), 10, 4))[:2]
  hidden, squares, count = MODEL.initial_state(4), None, 0
  for batch in batches:
    for start in (0, 5):
      x, y = (jnp.asarray(part[start : start + 5]) for part in (batch.inputs, batch.targets))

      def loss(p, x=x, y=y, hidden=hidden):
        new, logits = MODEL.apply(p, hidden, x, None, None)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

      grads, hidden = jax.grad(loss, has_aux=True)(params)
      square = jax.tree.map(jnp.square, grads)
      squares = square if squares is None else jax.tree.map(jnp.add, squares, square)
      count += 1
  rms = dynamic_evaluation.gradient_statistics(MODEL, LOSS, params, batches)
  for got, expected in zip(jax.tree.leaves(rms), jax.tree.leaves(squares), strict=True):
    np.testing.assert_allclose(got, np.sqrt(expected / count), rtol=1e-4, atol=1e-7)


def test_without_a_learning_rate_it_is_static_evaluation_and_with_one_it_follows_a_change() -> None:
  """Trained on a text that counts up. lr 0: exactly the trainer's evaluate, dropout off. On a text that counts down dynamic
  evaluation gets far below; the settings are found on the validation text, and the trained parameters are left alone."""
  up, down = markov(4000, 1), markov(700, 3, seed=1)
  trainer = problems.quick_trainer(MODEL, LOSS, optax.adam(1e-2), method='bptt')
  batches = list(streams.sequences(up, 50, 16))[:4]
  state = trainer.init(jax.random.key(0), batches[0])
  for _ in range(15):
    for batch in batches:
      state, _ = trainer.step(state, batch)
  params, copy = state.params, jax.tree.map(np.array, state.params)
  [batch] = streams.sequences(down, 699, 1)
  static = fptt_jax.means(trainer.evaluate(params, batch)[0])['loss']
  rms = dynamic_evaluation.gradient_statistics(MODEL, LOSS, params, batches)
  zero = dynamic_evaluation.run(MODEL, LOSS, params, rms, down, 0.0, 0.0)
  np.testing.assert_allclose(zero, static, rtol=1e-5)
  result = dynamic_evaluation.evaluate(MODEL, LOSS, params, Text(up, down, markov(700, 3, seed=2), ['a', 'b', 'c', 'd']), 50, 16)
  assert (result.learning_rate, result.decay) in dynamic_evaluation.GRID
  assert result.test < static - 0.5
  assert math.isfinite(result.valid)
  jax.tree.map(np.testing.assert_array_equal, params, copy)
