"""Dynamic evaluation of trained language models (Krause, Kahembwe, Murray and Renals,
ICML 2018).

The text to be evaluated is read in segments of a few words; each is measured first and
then learned from, by a step that is scaled by the gradients' size on the training text
(MS_g) and pulled back towards the trained weights θ_g:

    RMS_norm = sqrt(MS_g) / avg(sqrt(MS_g))
    θ       <- θ - lr g / (sqrt(MS_g) + ε) + decay (θ_g - θ) RMS_norm

It is the library's own train step, 'tbptt' with a window a segment and no dropout; the
two optax transformations here say what becomes of a segment's gradient. From a model,
its loss and trained params to a perplexity:

    rms = gradient_statistics(model, loss, params, streams.sequences(text.train, 1000,
    100)) evaluate = evaluator(model, loss, params, rms) best = tune(evaluate,
    list(streams.sequences(text.valid, 4095, 1)))[0] nats =
    evaluate(streams.sequences(text.test, 4095, 1), best.learning_rate, best.decay)
"""

from collections.abc import Callable, Iterable, Sequence
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fptt_jax

SEGMENT = 5
"""Words a segment, the authors' for words; 20 for characters. Learning rates and decays
grow with it.
"""

EPSILON = 2e-5
LEARNING_RATES = (3e-5, 4e-5, 5e-5, 6e-5, 7e-5, 1e-4)
DECAYS = (1e-3, 2e-3, 3e-3, 5e-3)
"""The grid the authors search for an AWD-LSTM on Penn Treebank, at segments of 5."""


class MeanSquaresState(NamedTuple):
  """State of :func:`mean_squares`.

  Attributes:
    segment_count: int32 [], gradients seen.
    mean_squares: MS_g, mean of their squares.
  """

  segment_count: jax.Array
  mean_squares: optax.Params


def mean_squares() -> optax.GradientTransformation:
  """Only looks: takes the mean of the squared gradients and moves nothing."""

  def init_fn(params: optax.Params) -> MeanSquaresState:
    return MeanSquaresState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

  def update_fn(
    grads: optax.Updates, state: MeanSquaresState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, MeanSquaresState]:
    count = optax.safe_increment(state.segment_count)
    means = jax.tree.map(
      lambda m, g: m + (g * g - m) / count.astype(m.dtype), state.mean_squares, grads
    )
    return optax.tree.zeros_like(grads), MeanSquaresState(count, means)

  return optax.GradientTransformation(init_fn, update_fn)


class AdaptationState(NamedTuple):
  """State of :func:`adaptation`; nothing in it moves.

  Attributes:
    trained: θ_g, the parameters to decay to.
    rms: sqrt(MS_g).
    rms_average: [], avg(sqrt(MS_g)).
    learning_rate: [], lr.
    decay: [], the decay rate λ.
  """

  trained: optax.Params
  rms: optax.Params
  rms_average: jax.Array
  learning_rate: jax.Array
  decay: jax.Array


def adaptation(rms: optax.Params, epsilon: float) -> optax.GradientTransformation:
  """The update of dynamic evaluation; its state holds 'learning_rate' and 'decay',
  which are to be set (both start at 0).

  A decay of more than 1 would overshoot: RMS_norm is clipped at 1/decay, as the paper
  has it. avg is the mean over the parameters' arrays of each array's mean, as in the
  authors' code, whose values of the decay are on this scale.

  Args:
    rms: sqrt(MS_g), a tree of arrays like the parameters, or of numbers [].
    epsilon: ε, keeps weights of next to no gradient in place.
  """

  def init_fn(params: optax.Params) -> AdaptationState:
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
    average = jnp.stack([leaf.mean() for leaf in jax.tree.leaves(rms)]).mean()
    return AdaptationState(
      copy(params),
      copy(rms),
      average,
      jnp.zeros([], jnp.float32),
      jnp.zeros([], jnp.float32),
    )

  def update_fn(
    grads: optax.Updates, state: AdaptationState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, AdaptationState]:
    def leaf(g: jax.Array, w: jax.Array, trained: jax.Array, r: jax.Array) -> jax.Array:
      decay = jnp.minimum(state.decay * (r / state.rms_average), 1)
      return (decay * (trained - w) - state.learning_rate * g / (r + epsilon)).astype(
        g.dtype
      )

    return jax.tree.map(leaf, grads, params, state.trained, state.rms), state

  return optax.GradientTransformation(init_fn, update_fn)


def gradient_statistics(
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  params: Any,
  batches: Iterable[fptt_jax.Batch],
  *,
  segment: int = SEGMENT,
) -> optax.Params:
  """sqrt(MS_g): the root mean square of the gradients of the segments of a text, at the
  trained weights, without dropout.

  Args:
    model: the model as trained.
    loss: the loss it was trained on, a mean over the steps.
    params: the trained parameters.
    batches: the training text in order, each sequence going on where the one before
      ended (the authors read 100 streams side by side); T a multiple of `segment`.
    segment: steps a segment.

  Returns:
    A tree like `params`.

  Raises:
    ValueError: no batches, or T no multiple of `segment`.
  """
  state, _ = _read(
    _trainer(model, loss, params, mean_squares(), segment), batches, segment
  )
  return jax.tree.map(jnp.sqrt, state.opt_state.mean_squares)


def evaluator(
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  params: Any,
  rms: optax.Params | None = None,
  *,
  epsilon: float = EPSILON,
  segment: int = SEGMENT,
) -> Callable[[Iterable[fptt_jax.Batch], float, float], float]:
  """Makes the dynamic evaluation of one trained model, compiled once for all texts and
  settings.

  Args:
    model: the model as trained; dropout is off.
    loss: the loss it was trained on.
    params: the trained parameters, not changed.
    rms: what :func:`gradient_statistics` returned. None for plain gradient descent: θ -
      lr g + decay (θ_g - θ).
    epsilon: ε; the authors' value is for a mean gradient of 5 words. Not used in plain
      gradient descent.
    segment: steps a segment.

  Returns:
    A function (batches, learning_rate, decay) -> nats a step. Batches are a text
    in order, usually B = 1, T a multiple of `segment`; each call starts from the
    trained weights and the model's initial state. At learning rate 0 it is static
    evaluation.
  """
  if rms is None:
    rms, epsilon = jax.tree.map(lambda p: jnp.ones([], p.dtype), params), 0.0
  trainer = _trainer(model, loss, params, adaptation(rms, epsilon), segment)

  def evaluate(
    batches: Iterable[fptt_jax.Batch], learning_rate: float, decay: float
  ) -> float:
    return _read(trainer, batches, segment, learning_rate=learning_rate, decay=decay)[1]

  return evaluate


class Trial(NamedTuple):
  """One point of the grid and what came of it."""

  learning_rate: float
  decay: float
  nats: float


def tune(
  evaluate: Callable[[Iterable[fptt_jax.Batch], float, float], float],
  batches: Sequence[fptt_jax.Batch],
  learning_rates: Sequence[float] = LEARNING_RATES,
  decays: Sequence[float] = DECAYS,
) -> list[Trial]:
  """Tries each learning rate with each decay on the validation text: all trials, the
  best first, those that diverged last.
  """
  trials = [
    Trial(lr, decay, evaluate(batches, lr, decay))
    for lr, decay in itertools.product(learning_rates, decays)
  ]
  return sorted(
    trials, key=lambda trial: math.inf if math.isnan(trial.nats) else trial.nats
  )


def _trainer(
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  params: Any,
  optimizer: optax.GradientTransformation,
  segment: int,
) -> fptt_jax.Trainer:
  """A trainer that starts from `params` and takes one update a segment, without
  dropout.
  """
  trained = model._replace(
    init=lambda key: params,
    apply=lambda params, state, x, mask, key: model.apply(params, state, x, mask, None),
    apply_last=None,
    split=None,
  )
  return fptt_jax.make_trainer(
    trained, loss, optimizer, method='tbptt', window_size=segment, carry_hidden=True
  )


def _read(
  trainer: fptt_jax.Trainer,
  batches: Iterable[fptt_jax.Batch],
  segment: int,
  **settings: float,
) -> tuple[fptt_jax.TrainState, float]:
  """Reads a text from its beginning, with `settings` in the optimizer's state: (state
  at its end, nats a step).
  """
  state, totals = None, []
  for batch in batches:
    num_steps = jnp.shape(batch.inputs)[0]
    if num_steps % segment:
      raise ValueError(
        f'sequences must have a multiple of segment={segment} steps, got T={num_steps}.'
      )
    if state is None:
      state = trainer.init(jax.random.key(0), batch)
      values = {
        name: jnp.asarray(value, jnp.float32) for name, value in settings.items()
      }
      state = state._replace(opt_state=optax.tree.set(state.opt_state, **values))
    state, metrics = trainer.step(state, batch)
    totals.append(metrics.totals)
  if state is None:
    raise ValueError('there is no text to read: got no batches.')
  return state, sum(t['loss'].item() for t in totals) / sum(
    t['count'].item() for t in totals
  )
