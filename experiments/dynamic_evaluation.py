"""Dynamic evaluation of trained language models.

This is the method of Krause, Kahembwe, Murray and Renals (ICML 2018). A text is read in
segments of a few words. The loss of each segment is measured first, and then the model
is trained on it. The step is scaled by the size of the gradients on the training text,
MS_g, and pulled back toward the trained weights θ_g:

    RMS_norm = sqrt(MS_g) / avg(sqrt(MS_g))
    θ       <- θ - lr g / (sqrt(MS_g) + ε) + decay (θ_g - θ) RMS_norm

It is the library's own train step: 'tbptt' with a window per segment and without
dropout. The two optax transformations here define the update of a segment. From a
model, its loss and its trained parameters to the cross-entropy per token:

    train = streams.sequences(text.train, 1000, 100)
    rms = gradient_statistics(model, loss, params, train)
    evaluate = evaluator(model, loss, params, rms)
    best = tune(evaluate, list(streams.sequences(text.valid, 4095, 1)))[0]
    test = streams.sequences(text.test, 4095, 1)
    nats = evaluate(test, best.learning_rate, best.decay)
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
"""Number of words per segment, as in the paper; characters have 20 per segment.

The best learning rate and decay grow with it.
"""


EPSILON = 2e-5
"""ε of the authors, for gradients of means over 5 words."""


STATISTICS_STREAMS = 100
"""Number of streams of the training text that MS_g is measured on, as the authors have.

More streams average more noise away, which makes MS_g smaller and each step larger. The
learning rates below are for this number.
"""


LEARNING_RATES = (3e-5, 4e-5, 5e-5, 6e-5, 7e-5, 1e-4)
"""Learning rates that the authors try for an AWD-LSTM on Penn Treebank."""


DECAYS = (1e-3, 2e-3, 3e-3, 5e-3)
"""Decays that the authors try for an AWD-LSTM on Penn Treebank."""


class MeanSquaresState(NamedTuple):
  """State of :func:`mean_squares`.

  Attributes:
    segment_count: int32 [], number of gradients so far.
    mean_squares: MS_g, mean of their squares; tree like the parameters.
  """

  segment_count: jax.Array
  mean_squares: optax.Params


def mean_squares() -> optax.GradientTransformation:
  """Return an optimizer that averages squared gradients and moves no parameters."""

  def init_fn(params: optax.Params) -> MeanSquaresState:
    return MeanSquaresState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

  def update_fn(
    grads: optax.Updates, state: MeanSquaresState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, MeanSquaresState]:
    del params
    count = optax.safe_increment(state.segment_count)
    # A running mean: a sum over a whole text would lose digits.
    means = jax.tree.map(
      lambda m, g: m + (g * g - m) / count.astype(m.dtype), state.mean_squares, grads
    )
    return optax.tree.zeros_like(grads), MeanSquaresState(count, means)

  return optax.GradientTransformation(init_fn, update_fn)


class AdaptationState(NamedTuple):
  """State of :func:`adaptation`, which updates do not change.

  Attributes:
    trained: θ_g, the parameters that the weights decay to.
    rms: sqrt(MS_g).
    rms_average: [], avg(sqrt(MS_g)).
    learning_rate: [], lr.
    decay: [], decay.
  """

  trained: optax.Params
  rms: optax.Params
  rms_average: jax.Array
  learning_rate: jax.Array
  decay: jax.Array


def adaptation(rms: optax.Params, epsilon: float) -> optax.GradientTransformation:
  """Return the update of dynamic evaluation.

  The state holds 'learning_rate' and 'decay', which start at 0 and must be set. As in
  the paper, RMS_norm is clipped at 1/decay, since a decay of more than 1 would
  overshoot. avg is the mean over the parameters' arrays of each array's mean, as in the
  authors' code, whose values of the decay are on this scale.

  Args:
    rms: sqrt(MS_g), a tree of arrays like the parameters, or of numbers [].
    epsilon: ε, which keeps weights with a gradient near 0 in place.
  """

  def init_fn(params: optax.Params) -> AdaptationState:
    # Copies, since the train step donates its state.
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
      step = state.learning_rate * g / (r + epsilon)
      return (decay * (trained - w) - step).astype(g.dtype)

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
  """Return sqrt(MS_g), the root mean square of the gradients of a text's segments.

  The gradients are those at the trained weights, without dropout.

  Args:
    model: the trained model.
    loss: its loss, a mean over the steps.
    params: the trained parameters.
    batches: the training text in order, each sequence continuing the one before. T must
      be a multiple of `segment`. The authors read 100 parallel streams.
    segment: number of steps per segment.

  Returns:
    A tree like `params`.

  Raises:
    ValueError: there are no batches, or T is not a multiple of `segment`.
  """
  trainer = _trainer(model, loss, params, mean_squares(), segment)
  state, _ = _read(trainer, batches, segment)
  return jax.tree.map(jnp.sqrt, state.opt_state.mean_squares)


def evaluator(
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  params: Any,
  rms: optax.Params | None = None,
  *,
  segment: int = SEGMENT,
) -> Callable[[Iterable[fptt_jax.Batch], float, float], float]:
  """Return the dynamic evaluation of a trained model.

  It is compiled once for all texts and settings.

  Args:
    model: the trained model; dropout is off.
    loss: its loss.
    params: the trained parameters; they are not changed.
    rms: the result of :func:`gradient_statistics`. None stands for plain gradient
      descent, θ - lr g + decay (θ_g - θ).
    segment: number of steps per segment.

  Returns:
    A function (batches, learning_rate, decay) -> mean cross-entropy per step in nats.
    The batches are a text in order, usually with B = 1; T must be a multiple of
    `segment`. Each call starts from the trained weights and the model's initial state.
    Learning rate 0 is static evaluation.
  """
  epsilon = EPSILON
  if rms is None:
    rms = jax.tree.map(lambda p: jnp.ones([], p.dtype), params)
    epsilon = 0.0
  trainer = _trainer(model, loss, params, adaptation(rms, epsilon), segment)

  def evaluate(
    batches: Iterable[fptt_jax.Batch], learning_rate: float, decay: float
  ) -> float:
    _, nats = _read(trainer, batches, segment, learning_rate=learning_rate, decay=decay)
    return nats

  return evaluate


class Trial(NamedTuple):
  """One point of the grid with its score.

  Attributes:
    learning_rate: learning rate.
    decay: decay.
    nats: mean cross-entropy per step; NaN if the weights diverged.
  """

  learning_rate: float
  decay: float
  nats: float


def tune(
  evaluate: Callable[[Iterable[fptt_jax.Batch], float, float], float],
  batches: Sequence[fptt_jax.Batch],
  learning_rates: Sequence[float] = LEARNING_RATES,
  decays: Sequence[float] = DECAYS,
) -> list[Trial]:
  """Try each learning rate with each decay on the validation text.

  Args:
    evaluate: the function that :func:`evaluator` returns.
    batches: the validation text in order.
    learning_rates: learning rates to try.
    decays: decays to try.

  Returns:
    All trials, the best first; trials that diverged come last.
  """
  trials = [
    Trial(lr, decay, evaluate(batches, lr, decay))
    for lr, decay in itertools.product(learning_rates, decays)
  ]

  def rank(trial: Trial) -> float:
    # NaN is not ordered, so `sorted` would leave it anywhere.
    return math.inf if math.isnan(trial.nats) else trial.nats

  return sorted(trials, key=rank)


def _trainer(
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  params: Any,
  optimizer: optax.GradientTransformation,
  segment: int,
) -> fptt_jax.Trainer:
  """Return a trainer that starts from `params` and makes an update per segment.

  Args:
    model: the model.
    loss: its loss.
    params: the parameters.
    optimizer: the optimizer of the segments.
    segment: number of steps per segment.
  """
  # Without a key the model has no dropout.
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
  """Read a text from its beginning.

  Args:
    trainer: the trainer of :func:`_trainer`.
    batches: the text in order.
    segment: number of steps per segment.
    **settings: values to set in the optimizer's state.

  Returns:
    (state at the end of the text, mean cross-entropy per step in nats).

  Raises:
    ValueError: there are no batches, or T is not a multiple of `segment`.
  """
  state = None
  totals = []
  for batch in batches:
    num_steps = jnp.shape(batch.inputs)[0]
    if num_steps % segment:
      raise ValueError(
        f'sequences must have a multiple of segment={segment} steps, got T={num_steps}.'
      )
    if state is None:
      state = trainer.init(jax.random.key(0), batch)
      # Arrays, so that other settings do not compile the step again.
      values = {
        name: jnp.asarray(value, jnp.float32) for name, value in settings.items()
      }
      state = state._replace(opt_state=optax.tree.set(state.opt_state, **values))
    state, metrics = trainer.step(state, batch)
    totals.append(metrics.totals)
  if state is None:
    raise ValueError('there is no text to read: got no batches.')
  loss = sum(total['loss'].item() for total in totals)
  return state, loss / sum(total['count'].item() for total in totals)
