"""The estimators keep river's conventions, and learn what the learner learns."""

from collections.abc import Callable
import datetime
import functools
import itertools
import math
import pickle
from typing import Any

import helpers
import jax
import numpy as np
import optax
import pytest

pytest.importorskip('river', reason='river is not installed.')
pytest.importorskip('sklearn', reason="scikit-learn, of river's checks, is missing.")
from river import checks, evaluate, metrics, preprocessing

import fptt_jax
from fptt_jax import losses
from fptt_jax.river import Classifier, Regressor


def sgd() -> optax.GradientTransformation:
  return optax.sgd(0.05)


def small(num_features: int) -> fptt_jax.Model:
  return helpers.elman(features=num_features)


def ten_classes(num_features: int) -> fptt_jax.Model:
  return helpers.elman(features=num_features, out=10)


ESTIMATORS = (
  Regressor(model=small, optimizer=sgd, window_size=3, influence='none'),
  Classifier(model=ten_classes, optimizer=sgd, window_size=3, influence='none'),
)


def all_checks() -> list[Any]:
  """Return river's checks of each estimator, once for each of its data sets.

  Those on further data sets, and of memory over many steps, are slow.
  """
  found = []
  for estimator in ESTIMATORS:
    seen: set[str] = set()
    for check in checks.yield_checks(estimator):
      name = check.__name__
      slow = name in seen or name == 'check_bounded_memory_growth'
      seen.add(name)
      case_id = f'{type(estimator).__name__}-{name}'
      marks = [pytest.mark.slow] if slow else []
      found.append(pytest.param(estimator, check, id=case_id, marks=marks))
  return found


@pytest.mark.parametrize(('estimator', 'check'), all_checks())
def test_river_accepts_the_estimator(
  estimator: Any, check: Callable[[Any], None]
) -> None:
  check(estimator.clone())


def stream(num_steps: int) -> list[tuple[dict[str, float], float]]:
  """Return steps of two features and a label."""
  x, y = helpers.series_batch(num_steps, 1)[:2]
  return [
    ({'a': float(a), 'b': float(b)}, float(label))
    for (a, b), label in zip(x[:, 0], y[:, 0, 0], strict=True)
  ]


def reference(delay: int = 0) -> tuple[fptt_jax.Learner, fptt_jax.StreamState]:
  """Return the learner that the first estimator has, and its first state."""
  learner = fptt_jax.make_learner(
    small(2),
    losses.sequence_regression(),
    sgd(),
    window_size=3,
    influence='none',
    delay=delay,
    donate=False,
  )
  return learner, learner.init(jax.random.key(0), np.zeros((1, 1, 2), np.float32))


def arrays(steps: list[tuple[dict[str, float], float]]) -> tuple[Any, Any]:
  """Return steps as the learner takes them."""
  x = np.array([[[x['a'], x['b']]] for x, _ in steps], np.float32)
  return x, np.array([[[y]] for _, y in steps], np.float32)


def test_progressive_validation_is_a_run_of_the_learner() -> None:
  """Predict, then learn: the error is that of the learner's predictions."""
  steps = stream(20)
  error = evaluate.progressive_val_score(steps, ESTIMATORS[0].clone(), metrics.MAE())
  learner, state = reference()
  x, y = arrays(steps)
  _, outputs, _ = learner.step(state, x, y)
  assert error.get() == pytest.approx(np.abs(outputs - y).mean(), rel=1e-5)


@pytest.mark.parametrize('equal', [False, True])
def test_progressive_validation_with_late_labels(equal: bool) -> None:
  """Each label comes four steps late, and is that of its own step, although the
  features of steps that wait are equal.
  """
  steps = stream(20)
  if equal:
    steps = [({'a': 1.0, 'b': float(t // 7)}, y) for t, (_, y) in enumerate(steps)]
  estimator = ESTIMATORS[0].clone({'delay': 4})
  error = evaluate.progressive_val_score(steps, estimator, metrics.MAE(), delay=4)
  learner, state = reference(delay=4)
  x, y = arrays(steps)
  predicted = []
  for t in range(20):
    if t >= 4:
      state, _ = learner.learn(state, y[t - 4 : t - 3])
    state, outputs = learner.predict(state, x[t : t + 1])
    predicted.append(outputs)
  state, _ = learner.learn(state, y[16:])
  expected = np.abs(np.concatenate(predicted) - y).mean()
  assert error.get() == pytest.approx(expected, rel=1e-5)
  assert estimator.late == 0
  np.testing.assert_allclose(
    estimator._state.train.params['v'], state.train.params['v'], rtol=1e-5
  )


@pytest.mark.parametrize('delay', [0, 3])
def test_a_scaler_may_change_the_features_in_between(delay: int) -> None:
  """Labels find their steps by order: the stream has as many steps as samples."""
  model = preprocessing.StandardScaler() | ESTIMATORS[0].clone({'delay': delay})
  evaluate.progressive_val_score(stream(12), model, metrics.MAE(), delay=delay or None)
  model.predict_one(stream(1)[0][0])  # The last label is learned in the same call.
  state = model['Regressor']._state
  assert state.train.step_count == 4  # Windows of three steps.
  assert state.pending.length == (delay > 0)


def test_labels_out_of_order_find_their_steps() -> None:
  """They are learned in the order of the steps."""
  steps = stream(3)
  estimator, in_order = (ESTIMATORS[0].clone({'delay': 5}) for _ in range(2))
  for x, _ in steps:
    assert estimator.predict_one(x) == in_order.predict_one(x)
  for number in (2, 0, 1):
    estimator.learn_one(*steps[number])
  for x, y in steps:
    in_order.learn_one(x, y)
  assert pickle.dumps(estimator) == pickle.dumps(in_order)


def test_labels_that_come_too_late_are_counted() -> None:
  """They are dropped, and the labels of the steps that wait still count."""
  steps = stream(5)
  estimator = ESTIMATORS[0].clone({'delay': 1})
  for x, _ in steps[:4]:
    estimator.predict_one(x)
  estimator.learn_one(*steps[0])
  assert estimator.late == 1
  with pytest.raises(
    ValueError, match=r'x must be the features of a step that waits .* delay=1'
  ):
    estimator.learn_one(*steps[4])
  estimator.learn_one(steps[1][0], None)
  assert estimator.late == 1
  estimator.learn_one(*steps[3])
  estimator.learn_one(*steps[2])
  learner, state = reference()
  x, y = arrays(steps[:4])
  labeled = np.array([False, False, True, True])[:, None]
  state, _, _ = learner.step(state, x, y, labeled)
  np.testing.assert_allclose(
    estimator._state.train.params['v'], state.train.params['v'], rtol=1e-5
  )


def test_labels_of_unknown_features_are_counted_or_refused() -> None:
  """They are those of the oldest step that waits, where order may tell."""
  steps = stream(3)
  estimator, in_order = (ESTIMATORS[0].clone({'delay': 4}) for _ in range(2))
  for model in (estimator, in_order):
    model.predict_one(steps[0][0])
    model.predict_one(steps[1][0])
  estimator.learn_one({'a': 9.0, 'b': 9.0}, steps[0][1])
  in_order.learn_one(*steps[0])
  assert (estimator.by_order, in_order.by_order) == (1, 0)
  for model in (estimator, in_order):
    model.learn_one(*steps[1])
  assert estimator.predict_one(steps[2][0]) == in_order.predict_one(steps[2][0])
  strict = ESTIMATORS[0].clone({'match_features': True})
  strict.learn_one(*steps[0])  # No step waits, so that it is a new one.
  strict.predict_one(steps[1][0])
  with pytest.raises(ValueError, match=r'x must be of one of the 1 steps that wait'):
    strict.learn_one(*steps[2])
  strict.learn_one(*steps[1])
  assert strict.by_order == 0


def test_tables_without_rows_are_no_steps() -> None:
  """Their predictions are empty, and learning them changes nothing."""
  import pandas as pd

  empty = pd.DataFrame({'a': []})
  for estimator in (Regressor(), Classifier()):
    estimator.learn_many(empty, [])
    assert estimator._state is None
  assert len(Regressor().predict_many(empty)) == 0
  assert len(Classifier().predict_proba_many(empty)) == 0


def test_many_predictions_follow_a_step_that_waits() -> None:
  """They are those of the same steps one by one, and move nothing."""
  import pandas as pd

  steps = stream(3)
  estimator, one_by_one = (ESTIMATORS[0].clone() for _ in range(2))
  for model in (estimator, one_by_one):
    model.predict_one(steps[0][0])
  rows = pd.DataFrame([x for x, _ in steps[1:]], index=[7, 8])
  many = estimator.predict_many(rows)
  # No label closes a window, so that the weights stay.
  expected = [one_by_one.predict_one(x) for x, _ in steps[1:]]
  np.testing.assert_allclose(many.to_numpy(), expected, rtol=1e-5)
  assert many.index.tolist() == [7, 8]
  estimator.learn_one(*steps[0])
  assert estimator.by_order == 0


def test_asking_twice_is_one_step() -> None:
  """The prediction is the same, and the stream has moved once."""
  [(x, y), (other, _)] = stream(2)
  estimator, once = (ESTIMATORS[0].clone() for _ in range(2))
  assert estimator.predict_one(x) == estimator.predict_one(x) == once.predict_one(x)
  for model in (estimator, once):
    model.learn_one(x, y)
  assert estimator.predict_one(other) == once.predict_one(other)


@pytest.mark.parametrize('estimator', ESTIMATORS, ids=lambda e: type(e).__name__)
def test_a_pickled_stream_goes_on(estimator: Any) -> None:
  """Also with steps that wait for their labels, and bit for bit."""
  steps = [(x, y > 0) for x, y in stream(9)]
  model = estimator.clone({'delay': 2})
  for x, y in steps[:4]:
    model.learn_one(x, y)
  model.predict_one(steps[4][0])
  copy = pickle.loads(pickle.dumps(model))
  for one in (model, copy):
    for x, y in steps[4:]:
      one.learn_one(x, y)
  assert copy.predict_one(steps[0][0]) == model.predict_one(steps[0][0])


def test_unknown_features() -> None:
  """They raise an error where the features were named, and are ignored elsewhere."""
  x = {'a': 1.0, 'b': 2.0}
  strict = ESTIMATORS[0].clone({'features': ['b', 'a']})
  strict.predict_one(x)
  with pytest.raises(ValueError, match=r"'b', 'a'.* only, got \['c'\]"):
    strict.predict_one({**x, 'c': 1.0})
  lenient = ESTIMATORS[0].clone()
  lenient.learn_one(x, 1.0)
  lenient.learn_one({**x, 'c': 1.0}, 1.0)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'window_size': 0}, 'window_size must be an integer >= 1, got 0'),
    ({'influence': 'bptt'}, r"influence must be one of \['none', .*got 'bptt'"),
    ({'seed': -1}, 'seed must be an integer >= 0, got -1'),
    ({'features': 'ab'}, "features must be names or None, got 'ab'"),
    ({'match_features': 'yes'}, "match_features must be True or False, got 'yes'"),
    ({'num_classes': 0}, 'num_classes must be an integer >= 1, got 0'),
  ],
  ids=str,
)
def test_bad_options_are_refused_when_made(
  options: dict[str, Any], message: str
) -> None:
  with pytest.raises((ValueError, TypeError), match=message):
    Classifier(**options)


def test_refused_steps_leave_no_trace() -> None:
  """Neither features nor labels of a step that was refused are kept."""
  classifier = ESTIMATORS[1].clone()
  with pytest.raises(TypeError, match=r"x\['b'\] must be a number, got 'cold'"):
    classifier.learn_one({'b': 'cold'}, 'red')
  regressor = ESTIMATORS[0].clone()
  with pytest.raises(TypeError, match=r"y must be a number or None, got 'high'"):
    regressor.learn_one({'a': 1.0}, 'high')
  steps = stream(2)
  untouched = ESTIMATORS[1].clone()
  for model in (classifier, untouched):
    model.learn_one(steps[0][0], 'blue')
  expected = untouched.predict_proba_one(steps[1][0])
  assert classifier.predict_proba_one(steps[1][0]) == expected == {'blue': 1.0}


def test_a_step_that_is_not_finite_is_one_without_input() -> None:
  """Its prediction is 0, its label is not learned, and the stream goes on."""
  steps = stream(2)
  estimator, fresh = (ESTIMATORS[0].clone() for _ in range(2))
  missing = {'a': float('nan'), 'b': 1.0}
  assert estimator.predict_one(missing) == 0
  estimator.learn_one(missing, 5.0)
  assert estimator.by_order == 0
  assert estimator.predict_one(steps[0][0]) == fresh.predict_one(steps[0][0])


def test_a_step_without_features_is_refused() -> None:
  """The stream then begins with the step after it."""
  estimator = ESTIMATORS[0].clone()
  with pytest.raises(ValueError, match=r'x must have at least one feature, got \{\}'):
    estimator.predict_one({})
  assert estimator.predict_one({'a': 1.0, 'b': 0.5}) is not None


def test_options_may_be_numbers_of_other_types() -> None:
  steps = stream(1)
  first, second = Regressor(seed=1), Regressor(seed=1.0, delay=np.int64(0))
  assert first.predict_one(steps[0][0]) == second.predict_one(steps[0][0])


def test_bad_input_is_refused() -> None:
  x = {'a': datetime.datetime(2026, 1, 1)}
  with pytest.raises(TypeError, match=r"x\['a'\] must be a number, got datetime"):
    ESTIMATORS[0].clone().predict_one(x)
  with pytest.raises(TypeError, match=r'optimizer must be a function, got 0\.1'):
    Regressor(optimizer=0.1)
  with pytest.raises(ValueError, match='delay must be an integer >= 0, got -1'):
    Classifier(delay=-1)
  assert type(Classifier(num_classes=3.0).num_classes) is int
  classifier = Classifier(2, model=lambda features: helpers.elman(1, out=2))
  classifier.learn_one({'a': 1}, 'red')
  classifier.learn_one({'a': 1}, 'green')
  with pytest.raises(ValueError, match=r"num_classes=2 labels.*another one, 'blue'"):
    classifier.learn_one({'a': 1}, 'blue')
  assert set(classifier.predict_proba_one({'a': 1})) == {'red', 'green'}
  # A label that is refused is not known later.
  strict = Classifier(
    2, model=lambda features: helpers.elman(1, out=2), delay=1, match_features=True
  )
  strict.predict_one({'a': 1})
  with pytest.raises(ValueError, match='match_features=True'):
    strict.learn_one({'a': 2}, 'red')
  assert strict.predict_proba_one({'a': 3}) == {}


def test_a_classifier_learns_labels() -> None:
  """Which of two labels comes next depends on the step before."""
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 2, 600)
  steps = [
    ({'bit': float(bit)}, 'high' if before else 'low')
    for before, bit in itertools.pairwise(bits)
  ]
  estimator = Classifier(
    num_classes=2,
    model=lambda features: helpers.elman(features, out=2),
    optimizer=functools.partial(optax.adam, 0.03),
    window_size=4,
    influence='none',
  )
  accuracy = metrics.Accuracy()
  for number, (x, y) in enumerate(steps):
    if number >= 400:
      accuracy.update(y, estimator.predict_one(x))
    else:
      estimator.predict_one(x)
    estimator.learn_one(x, y)
  assert accuracy.get() > 0.95


def test_many_labels_are_as_many_as_rows() -> None:
  import pandas as pd

  with pytest.raises(ValueError, match='y must be a label for each of the 2 rows'):
    Regressor().learn_many(pd.DataFrame({'a': [1.0, 2.0]}), [1.0])


@pytest.mark.parametrize(
  ('labels', 'seen'),
  [
    (['u', None, 'v'], ['u', 'v']),
    ([0, None, 1], [0, 1]),
    ([math.nan, math.nan, math.nan], []),
  ],
)
@pytest.mark.parametrize('dtype', [None, 'object', 'Int64'])
def test_missing_labels_are_no_class(
  labels: list[Any], seen: list[Any], dtype: str | None
) -> None:
  """Pandas turns None into NaN or NA, each of which is one of its own."""
  import pandas as pd

  if dtype == 'Int64' and 'u' in labels:
    pytest.skip('texts are no integers')
  estimator = Classifier(2, window_size=2)
  rows = pd.DataFrame({'a': [1.0, 2.0, 3.0]})
  estimator.learn_many(rows, pd.Series(labels, dtype=dtype))
  estimator.learn_one({'a': 4.0}, math.nan)
  assert estimator._labels_seen == seen


@pytest.mark.parametrize('waits', [False, True])
def test_rows_with_a_bad_one_are_not_learned(waits: bool) -> None:
  """Neither the rows before it nor their names and labels count."""
  import pandas as pd

  rows = pd.DataFrame({'a': [1.0, 2.0, 3.0]})
  bad = pd.DataFrame({'a': [1.0, 2.0, 'x']})
  for estimator, good, wrong in (
    (Regressor(), [1.0, 2.0, 3.0], [1.0, 2.0, 'bad']),
    (Classifier(2), ['u', 'v', 'u'], ['u', 'v', 'w']),
  ):
    predict = getattr(estimator, 'predict_proba_one', None) or estimator.predict_one
    if waits:
      predict({'a': 0.0})
    for table, labels in ((rows, wrong), (bad, good)):
      with pytest.raises((TypeError, ValueError)):
        estimator.learn_many(table, labels)
    assert estimator.by_order == 0
    assert len(estimator._waiting) == int(waits)
    assert estimator._names == (('a',) if waits else None)
    assert getattr(estimator, '_labels_seen', []) == []


def test_a_refused_label_names_no_features() -> None:
  estimator = Regressor()
  with pytest.raises(TypeError):
    estimator.learn_one({'a': 1.0, 'b': 2.0}, 'bad')
  estimator.learn_one({'c': 1.0}, 1.0)
  assert estimator._names == ('c',)
