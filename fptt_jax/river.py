"""Learners of streams as estimators of river, a library for online machine learning.

This module needs river, which the extra 'river' of this package installs. `fptt_jax`
itself does not import it.

A prediction is a step of the stream: the next one starts from the hidden state after
it. A label belongs to the waiting step with equal features. If there is none, it goes
to the oldest waiting step, because a scaler in front of the estimator may have changed
the features meanwhile; such labels are counted, or refused with `match_features`. If no
step is waiting, features and label are learned as a new step.
"""

import abc
import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from river import base

from fptt_jax import losses
from fptt_jax._checks import (
  INT32_MAX,
  check_callable,
  check_choice,
  check_flag,
  check_integer,
  check_size,
  require,
)
from fptt_jax._states import state_from_arrays, state_to_arrays
from fptt_jax._types import Model
from fptt_jax.influence import INFLUENCES
from fptt_jax.streaming._learner import make_learner
from fptt_jax.streaming._types import Learner, StreamState

__all__ = ('Classifier', 'Regressor')

REMEMBERED = 1000
"""Number of steps without a label whose features are kept, to recognize late labels."""


class _Functions(NamedTuple):
  """The compiled functions of an estimator.

  Attributes:
    learner: Its learner.
    take: (state, x [n, 1, D], y, labeled) -> the state after steps with their labels.
    forecast: (state, x [n, 1, D]) -> the predictions [n, 1, O] of the next steps, which
      are not taken.
    take_and_forecast: (state, x, y, labeled, next_x) -> (state, predictions): both in
      one call, which takes little more time than either.
  """

  learner: Learner
  take: Callable[..., StreamState]
  forecast: Callable[..., jax.Array]
  take_and_forecast: Callable[..., tuple[StreamState, jax.Array]]


@dataclasses.dataclass
class _Step:
  """A step that was predicted and waits.

  Attributes:
    x: float32 [D], its features.
    outputs: float [O], its prediction.
    answered: Whether its label came.
    y: The label as the loss takes it, or None for none.
  """

  x: np.ndarray
  outputs: np.ndarray
  answered: bool = False
  y: float | None = None


class _StreamEstimator:
  """Base class of the regressor and the classifier: features, waiting steps, copies.

  The learner itself is compiled code, which is not copied or pickled: copies find it by
  their options. Without a delay, a label is learned in the same call as the prediction
  that follows it, because a call costs more than what it computes.
  """

  model: Callable[[int], Model] | None
  optimizer: Callable[[], optax.GradientTransformation] | None
  window_size: int
  influence: str
  delay: int
  match_features: bool
  features: Sequence[Any] | None
  seed: int

  def _start(self) -> None:
    """Check the options and forget everything learned."""
    for name in ('model', 'optimizer'):
      if getattr(self, name) is not None:
        check_callable(name, getattr(self, name))
    self.window_size = check_size('window_size', self.window_size)
    check_choice('influence', self.influence, ['none', *INFLUENCES])
    accepted = 'an integer >= 0'
    self.seed = check_integer('seed', self.seed, 0, INT32_MAX, accepted)
    if isinstance(self.features, str):
      raise TypeError(f'features must be names or None, got {self.features!r}.')
    self.delay = check_integer('delay', self.delay, 0, INT32_MAX // 2, accepted)
    check_flag('match_features', self.match_features)
    self.late = 0
    self.by_order = 0
    self._names = None if self.features is None else tuple(self.features)
    self._state: StreamState | dict[str, np.ndarray] | None = None
    self._waiting: collections.deque[_Step] = collections.deque()
    self._unlabeled: collections.deque[bytes] = collections.deque(maxlen=REMEMBERED)

  def _num_classes(self) -> int | None:
    """Return C of a classifier, or None."""
    return None

  @abc.abstractmethod
  def _target(self, label: Any) -> float | None:
    """Return a label as the loss takes it, or None for a label that is missing."""

  def _keep_label(self, label: Any) -> None:
    """Note a label that is learned."""

  def __getstate__(self) -> dict[str, Any]:
    """Return the attributes, with the state as NumPy arrays by path."""
    attributes = self.__dict__.copy()
    if isinstance(self._state, StreamState):
      attributes['_state'] = state_to_arrays(self._state)
    return attributes

  def _functions(self) -> _Functions:
    return _make_functions(
      self.model,
      self.optimizer,
      len(self._names or ()),
      self._num_classes(),
      self.window_size,
      self.influence,
      self.delay,
    )

  def _ready(self) -> tuple[_Functions, StreamState]:
    """Return the functions and the state, made at the first step or from a copy."""
    functions = self._functions()
    if not isinstance(self._state, StreamState):
      x = np.zeros((1, 1, len(self._names or ())), np.float32)
      state = functions.learner.init(jax.random.key(self.seed), x)
      if self._state is not None:
        state = state_from_arrays(state, self._state)
      self._state = state
    return functions, self._state

  def _vector(self, x: Mapping[Any, Any]) -> np.ndarray:
    """Return the features [D] of a step; those that are missing are 0."""
    names = self._names
    if names is None:
      names = tuple(sorted(x, key=str))
    if not names:
      raise ValueError(f'x must have at least one feature, got {x!r}.')
    if self.features is not None:
      unknown = [name for name in x if name not in names]
      # Messages are composed on failure only: this runs for each step and value.
      if unknown:
        raise ValueError(f'x must have the features {names} only, got {unknown[:3]}.')
    vector = np.zeros(len(names), np.float32)
    for place, name in enumerate(names):
      value = x.get(name, 0)
      if not isinstance(value, int | float | np.number | np.bool_):
        raise TypeError(f'x[{name!r}] must be a number, got {value!r}.')
      vector[place] = value
    # Features that are refused must not become those of the stream.
    self._names = names
    return vector

  def _matrix(self, X: Any) -> np.ndarray:
    """Return the features [n, 1, D] of the rows of a pandas DataFrame."""
    names = self._names
    try:
      rows = [self._vector(row) for row in X.to_dict(orient='records')]
    except (TypeError, ValueError):
      self._names = names
      raise
    return np.stack(rows)[:, None]

  def _predict(self, x: Mapping[Any, Any]) -> np.ndarray:
    """Return the outputs [O] of a step, which waits for its label from now on."""
    vector = self._vector(x)
    # Where labels are late, steps that wait may well have equal features.
    if self.delay == 0 and self._waiting and not self._waiting[-1].answered:
      newest = self._waiting[-1]
      if _same(newest.x, vector):
        return newest.outputs
    if len(self._waiting) > self.delay and not self._waiting[0].answered:
      # The label of the oldest step is not waited for any longer.
      oldest = self._waiting[0]
      oldest.answered = True
      self._unlabeled.append(oldest.x.tobytes())
    step = _Step(vector, np.asarray(self._run(vector[None, None]))[0, 0])
    self._waiting.append(step)
    return step.outputs

  def _run(self, x: np.ndarray) -> jax.Array:
    """Return the outputs [1, 1, O] of a step x [1, 1, D], after all answered ones."""
    if self.delay > 0:
      self._hand_in()
      functions, state = self._ready()
      self._state, outputs = functions.learner.predict(state, x)
      return outputs
    functions, state = self._ready()
    if not self._waiting:
      return functions.forecast(state, x)
    before = self._waiting.popleft()
    labels = self._labels([before.y])
    taken = (before.x[None, None], *labels)
    self._state, outputs = functions.take_and_forecast(state, *taken, x)
    return outputs

  def _predict_many(self, X: Any) -> np.ndarray:
    """Return the outputs [n, O] of the next n steps, which are not taken yet."""
    if not len(X):
      return np.zeros((0, 1), np.float32)
    matrix = self._matrix(X)
    self._hand_in()
    if self.delay == 0:
      not_taken = [step.x[None, None] for step in self._waiting]
      matrix = np.concatenate([*not_taken, matrix])
    functions, state = self._ready()
    outputs = np.asarray(functions.forecast(state, matrix))
    return outputs[len(matrix) - len(X) :, 0]

  def _learn(self, x: Mapping[Any, Any], label: Any) -> None:
    """Give a label to a step, or take a step that was never predicted."""
    label = _none_if_missing(label)
    # Before the features: those of a step that is refused name none of the stream's.
    y = self._target(label)
    vector = self._vector(x)
    waiting = [step for step in self._waiting if not step.answered]
    same = [step for step in waiting if _same(step.x, vector)]
    if not same and vector.tobytes() in self._unlabeled:
      self._unlabeled.remove(vector.tobytes())
      self.late += y is not None
      return
    if not same and self._unlabeled:
      raise ValueError(
        f'x must be the features of a step that waits for its label, got {x!r}. It '
        'is uncertain which step this label belongs to, because '
        f'{len(self._unlabeled)} steps got no label within delay={self.delay} steps. '
        'Use a larger delay, or call learn_one(x, None) for steps without a label.'
      )
    if waiting and not same:
      self._check_order(x, len(waiting))
      self.by_order += y is not None
    # Not before: a label that is refused takes no place among the classes.
    self._keep_label(label)
    if not waiting:
      self._hand_in()
      self._take(vector[None, None], [y])
      return
    step = (same or waiting)[0]
    step.answered, step.y = True, y
    # Without a delay, the step is taken in the same call as the next prediction.
    if self.delay > 0:
      self._hand_in()

  def _check_order(self, x: Mapping[Any, Any], waiting: int) -> None:
    """Raise a ValueError if a label may not be given to a step by its order."""
    if self.match_features:
      raise ValueError(
        f'x must be of one of the {waiting} steps that wait for their labels, because '
        f'match_features=True, got {x!r}. Call predict_one(x) first, or make the '
        'estimator with match_features=False where labels come in order.'
      )

  def _take(self, x: np.ndarray, y: Sequence[float | None]) -> None:
    """Take steps [n, 1, D] together with their labels."""
    functions, state = self._ready()
    self._state = functions.take(state, x, *self._labels(y))

  def _learn_many(self, X: Any, labels: Sequence[Any]) -> None:
    """Learn from the rows of a pandas DataFrame."""
    same = len(X) == len(labels)
    require(same, 'y', f'a label for each of the {len(X)} rows of X', len(labels))
    labels = [_none_if_missing(label) for label in labels]
    self._hand_in()
    if not len(X):
      return
    # All rows are checked before one is learned.
    self._check_targets(labels)
    matrix = self._matrix(X)
    if self._waiting or self._unlabeled:
      for row, label in zip(X.to_dict(orient='records'), labels, strict=True):
        self._learn(row, label)
      return
    self._take(matrix, self._targets(labels))

  def _targets(self, labels: Sequence[Any]) -> list[float | None]:
    """Return labels that are learned, as the loss takes them."""
    return [self._target(label) for label in labels]

  def _check_targets(self, labels: Sequence[Any]) -> None:
    """Raise an error if a label is refused; note none of them."""
    self._targets(labels)

  def _hand_in(self) -> None:
    """Give the learner the labels that have come, in the order of their steps."""
    while self._waiting and self._waiting[0].answered:
      step = self._waiting.popleft()
      if self.delay == 0:
        self._take(step.x[None, None], [step.y])
        continue
      functions, state = self._ready()
      self._state, _ = functions.learner.learn(state, *self._labels([step.y]))

  def _labels(self, y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as the loss takes them, and which of them exist, bool [n, 1]."""
    numbers = [0 if label is None else label for label in y]
    labeled = np.array([[label is not None] for label in y])
    if self._num_classes() is None:
      return np.array(numbers, np.float32)[:, None, None], labeled
    return np.array(numbers, np.int32)[:, None], labeled


class Regressor(_StreamEstimator, base.MiniBatchRegressor):
  """A recurrent network that learns online, as a regressor of river.

  See :mod:`fptt_jax.river` for which step a label belongs to.

  Args:
    model: (number of features D) -> :class:`fptt_jax.Model` for inputs [S, 1, D] and
      outputs [S, 1, 1]. None makes a GRU of 32 units with a linear readout. An
      estimator can be pickled if this is a function of a module.
    optimizer: () -> optax transformation; like `model`, a function of a module. None is
      Adam with the learning rate 0.003.
    window_size: As in :func:`fptt_jax.make_learner`.
    influence: The name of an influence, as in :func:`fptt_jax.make_learner`.
    delay: How many steps late a label may come. Give `progressive_val_score` no larger
      delay. Labels that come later are dropped and counted in the attribute `late` if
      their features are those of their step, and raise a ValueError otherwise.
    match_features: Whether to refuse a label whose features are those of none of the
      steps, where some wait. By default it is the oldest one's, which is right where
      labels come in order. The attribute `by_order` counts these labels.
    features: Names of the features, in the order in which the model gets them. Others
      raise an error then. None takes those of the first step, sorted, and ignores
      others later. A feature that is missing in a step is 0.
    seed: Seed of the parameters.

  Raises:
    TypeError: `model` or `optimizer` is not a function, or `features` is a text. When
      called: a feature or a label is not a number. Nothing is learned then.
    ValueError: An option is out of range. When called: a label cannot be assigned
      to a step with certainty (see `delay` and `match_features`), or a step has
      features that `features` does not name.

  Example:
    >>> from fptt_jax.river import Regressor
    >>> from river import metrics, preprocessing
    >>> model = preprocessing.StandardScaler() | Regressor(window_size=4)
    >>> error = metrics.MAE()
    >>> for t in range(100):
    ...   x, y = {'a': t % 5, 'b': t % 2}, float((t + 1) % 5)
    ...   error.update(y, model.predict_one(x))
    ...   model.learn_one(x, y)
  """

  def __init__(
    self,
    model: Callable[[int], Model] | None = None,
    optimizer: Callable[[], optax.GradientTransformation] | None = None,
    window_size: int = 8,
    influence: str = 'snap1',
    delay: int = 0,
    match_features: bool = False,
    features: Sequence[Any] | None = None,
    seed: int = 0,
  ) -> None:
    """Keep the options, see the class."""
    self.model = model
    self.optimizer = optimizer
    self.window_size = window_size
    self.influence = influence
    self.delay = delay
    self.match_features = match_features
    self.features = features
    self.seed = seed
    self._start()

  def predict_one(self, x: dict[Any, Any]) -> float:
    """Predict the next step of the stream.

    Without a delay, asking twice for the same features, with no label in between, is
    one step. With a delay each call is a step.
    """
    return float(self._predict(x)[0])

  def learn_one(self, x: dict[Any, Any], y: Any) -> None:
    """Learn from the label of a step; None says that it has none."""
    self._learn(x, y)

  def predict_many(self, X: Any) -> Any:
    """Predict the next rows of a pandas DataFrame, without moving the hidden state."""
    import pandas as pd

    return pd.Series(self._predict_many(X)[:, 0], index=X.index)

  def learn_many(self, X: Any, y: Any) -> None:
    """Learn from rows of a pandas DataFrame, as steps one after the other."""
    self._learn_many(X, list(y))

  def _target(self, label: Any) -> float | None:
    """Return a label as a float, or None for a label that is missing."""
    if label is not None and not isinstance(label, int | float | np.number | np.bool_):
      raise TypeError(f'y must be a number or None, got {label!r}.')
    return None if label is None else float(label)


class Classifier(_StreamEstimator, base.MiniBatchClassifier):
  """A recurrent network that learns online, as a classifier of river.

  Args:
    num_classes: C, the largest number of different labels. They need not be known:
      each new label takes the next place.
    model: As in :class:`Regressor`, with outputs [S, 1, C].
    optimizer: As in :class:`Regressor`.
    window_size: As in :func:`fptt_jax.make_learner`.
    influence: The name of an influence, as in :func:`fptt_jax.make_learner`.
    delay: As in :class:`Regressor`.
    match_features: As in :class:`Regressor`.
    features: As in :class:`Regressor`.
    seed: Seed of the parameters.

  Raises:
    TypeError: As in :class:`Regressor`.
    ValueError: An option is out of range. When called: there are more labels than
      `num_classes`.

  Example:
    >>> from fptt_jax.river import Classifier
    >>> model = Classifier(num_classes=2)
    >>> model.learn_one({'a': 1.0}, 'up')
    >>> model.predict_proba_one({'a': 1.0})
    {'up': 1.0}
  """

  def __init__(
    self,
    num_classes: int = 10,
    model: Callable[[int], Model] | None = None,
    optimizer: Callable[[], optax.GradientTransformation] | None = None,
    window_size: int = 8,
    influence: str = 'snap1',
    delay: int = 0,
    match_features: bool = False,
    features: Sequence[Any] | None = None,
    seed: int = 0,
  ) -> None:
    """Keep the options, see the class."""
    self.model = model
    self.optimizer = optimizer
    self.window_size = window_size
    self.influence = influence
    self.delay = delay
    self.match_features = match_features
    self.features = features
    self.seed = seed
    self.num_classes = check_size('num_classes', num_classes)
    self._labels_seen: list[Any] = []
    self._start()

  def _num_classes(self) -> int | None:
    """Return C."""
    return self.num_classes

  @property
  def _multiclass(self) -> bool:
    """True: any number of labels up to C is accepted."""
    return True

  def predict_proba_one(self, x: dict[Any, Any], **kwargs: Any) -> dict[Any, float]:
    """Predict the probabilities of the labels seen so far, for the next step.

    Without a delay, asking twice for the same features, with no label in between, is
    one step. With a delay each call is a step.
    """
    return self._probabilities(self._predict(x))

  def learn_one(self, x: dict[Any, Any], y: Any) -> None:
    """Learn from the label of a step; None says that it has none."""
    self._learn(x, y)

  def predict_proba_many(self, X: Any) -> Any:
    """Predict the probabilities of the rows of a pandas DataFrame.

    The hidden state does not move.
    """
    import pandas as pd

    rows = [self._probabilities(row) for row in self._predict_many(X)]
    return pd.DataFrame(rows, index=X.index, columns=self._labels_seen)

  def learn_many(self, X: Any, y: Any) -> None:
    """Learn from rows of a pandas DataFrame, as steps one after the other."""
    self._learn_many(X, list(y))

  def _target(self, label: Any) -> int | None:
    """Return the place of a label, the next one if it was never seen."""
    if label is None:
      return None
    if label in self._labels_seen:
      return self._labels_seen.index(label)
    if len(self._labels_seen) == self.num_classes:
      raise ValueError(
        f'y must be one of num_classes={self.num_classes} labels, '
        f'{self._labels_seen[:10]}, got another one, {label!r}.'
      )
    return len(self._labels_seen)

  def _targets(self, labels: Sequence[Any]) -> list[float | None]:
    """Return the places of labels, all or none of which are noted."""
    before = list(self._labels_seen)
    found: list[float | None] = []
    try:
      for label in labels:
        found.append(self._target(label))
        self._keep_label(label)
    except ValueError:
      self._labels_seen = before
      raise
    return found

  def _check_targets(self, labels: Sequence[Any]) -> None:
    """Raise an error if a label is refused; note none of them."""
    before = list(self._labels_seen)
    self._targets(labels)
    self._labels_seen = before

  def _keep_label(self, label: Any) -> None:
    """Give a new label the next place."""
    if label is not None and label not in self._labels_seen:
      self._labels_seen.append(label)

  def _probabilities(self, logits: np.ndarray) -> dict[Any, float]:
    """Return the probabilities of the labels seen so far from logits [C]."""
    number = len(self._labels_seen)
    if number == 0:
      return {}
    seen = logits[:number].astype(np.float64)
    odds = np.exp(seen - seen.max())
    shares = (odds / odds.sum()).tolist()
    return dict(zip(self._labels_seen, shares, strict=True))


def _none_if_missing(label: Any) -> Any:
  """Return a label, or None for NaN and pandas' NA, which mark a missing one."""
  is_nan = isinstance(label, float | np.floating) and np.isnan(label)
  # Pandas is not imported for this: an NA can only come from it.
  return None if is_nan or type(label).__name__ == 'NAType' else label


def _same(x: np.ndarray, other: np.ndarray) -> bool:
  """Return whether two vectors of features are equal, where NaN equals NaN."""
  return np.array_equal(x, other, equal_nan=True)


@functools.lru_cache(maxsize=32)
def _make_functions(
  model: Callable[[int], Model] | None,
  optimizer: Callable[[], optax.GradientTransformation] | None,
  num_features: int,
  num_classes: int | None,
  window_size: int,
  influence: str,
  delay: int,
) -> _Functions:
  """Make the functions of an estimator; the same ones for the same options."""
  if num_classes is None:
    loss = losses.sequence_regression()
  else:
    loss = losses.sequence_classification(num_classes)
  if model is None:
    made = _default_model(num_features, num_classes or 1)
  else:
    made = model(num_features)
  learner = make_learner(
    made,
    loss,
    optax.adam(3e-3) if optimizer is None else optimizer(),
    window_size=window_size,
    influence=influence,
    delay=delay,
  )

  def take(state: StreamState, x: Any, y: Any, labeled: Any) -> StreamState:
    new_state, _, _ = learner.step(state, x, y, labeled)
    return new_state

  def forecast(state: StreamState, x: Any) -> jax.Array:
    _, outputs = learner.predict(state, x)
    return outputs

  def take_and_forecast(
    state: StreamState, x: Any, y: Any, labeled: Any, next_x: Any
  ) -> tuple[StreamState, jax.Array]:
    new_state = take(state, x, y, labeled)
    return new_state, forecast(new_state, next_x)

  return _Functions(
    learner,
    take=jax.jit(take, donate_argnums=0),
    forecast=jax.jit(forecast),
    take_and_forecast=jax.jit(take_and_forecast, donate_argnums=0),
  )


def _default_model(num_features: int, num_outputs: int) -> Model:
  """Return a GRU of 32 units with a linear readout."""
  from flax import nnx

  from fptt_jax import nn

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    return nn.Sequential(
      nn.GRU(num_features, 32, rngs=rngs), nnx.Linear(32, num_outputs, rngs=rngs)
    )

  return nn.from_nnx(build)
