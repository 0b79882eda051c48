"""Losses against the same formulas in NumPy, on numbers small enough to follow by
hand.
"""

import contextlib
import re

import chex
import helpers
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses
from fptt_jax._windows import valid_steps, window_at

C = 3
WITH_DIVERGENCE = ('class_ema', 'last_epoch', 'example', 'uniform')
EXACT = dict(rtol=3e-6, atol=1e-6)  # float32 rounding


def window(k: int, cuts: list[int], lengths: list[int]) -> fptt_jax.WindowView:
  """The k-th of the windows between the given borders, written out."""
  size = max(np.diff(cuts))
  steps = np.arange(cuts[k], cuts[k] + size)
  mask = (steps < cuts[k + 1])[:, None] & (steps[:, None] < np.array(lengths))
  number = lambda n: jnp.asarray(n, jnp.int32)
  return fptt_jax.WindowView(
    k=number(k),
    num_windows=len(cuts) - 1,
    num_steps=cuts[-1],
    size=int(size),
    ragged=True,
    masked=True,
    start=number(cuts[k]),
    end=number(cuts[k + 1]),
    lengths=number(lengths),
    seen=number(np.minimum(lengths, cuts[k + 1])),
    active=jnp.asarray(mask.any(0)),
    last=number(np.clip(np.minimum(lengths, cuts[k + 1]) - cuts[k] - 1, 0, size - 1)),
    mask=jnp.asarray(mask),
  )


def random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits.astype(np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def classification(divergence: str) -> losses.Loss:
  return losses.terminal_classification(
    C, divergence=divergence, num_examples=5 if divergence == 'example' else None
  )


def targets_for(divergence: str, labels: list[int] | np.ndarray) -> object:
  """Labels, with example ids 4, 3, 2, ... where the mode needs them."""
  labels = jnp.asarray(labels)
  return (labels, 4 - jnp.arange(len(labels))) if divergence == 'example' else labels


# Terminal classification.


@pytest.mark.parametrize('divergence', [*WITH_DIVERGENCE, 'none'])
def test_terminal_objective_by_hand(divergence):
  """β CE + (1 - β) Div at the window's last output, β = t/T = 2/6; Div = -Σ_c Q(c) log
  P(c) is a sum over the classes (the mean, as the release has it, would be C times
  smaller) and Q starts uniform. 'none' leaves β CE.
  """
  loss, labels = classification(divergence), [2, 0, 2, 1]
  outputs = random(2, 4, C)
  value, _ = loss.apply(
    outputs,
    targets_for(divergence, labels),
    window(0, [0, 2, 4, 6], [6] * 4),
    loss.init(3),
  )
  log_p = log_softmax(outputs[-1])
  cross_entropy = -log_p[np.arange(4), labels]
  div = 0 if divergence == 'none' else -(log_p / C).sum(-1)
  np.testing.assert_allclose(
    value, np.mean(2 / 6 * cross_entropy + 4 / 6 * div), **EXACT
  )


@pytest.mark.parametrize('divergence', [*WITH_DIVERGENCE, 'none'])
def test_one_window_is_plain_cross_entropy(divergence):
  """With K = 1 β is 1: the objective is the cross-entropy of the last output, whatever
  Q holds.
  """
  loss, labels, outputs = classification(divergence), [2, 0, 1], random(4, 3, C)
  anything = jax.tree.map(lambda q: jnp.asarray(random(*q.shape, seed=1)), loss.init(1))
  value, _ = loss.apply(
    outputs, targets_for(divergence, labels), window(0, [0, 4], [4] * 3), anything
  )
  np.testing.assert_allclose(
    value, -log_softmax(outputs[-1])[np.arange(3), labels].mean(), **EXACT
  )


def test_ragged_terminal_objective_by_hand():
  """β = t/length_i at each sequence's own last valid step; ended sequences contribute
  nothing and the mean is over the others.
  """
  loss = losses.terminal_classification(C, divergence='uniform')
  cuts, lengths, labels = [0, 2, 5, 7], [7, 3, 2, 4], [0, 1, 2, 1]
  outputs = random(3, 4, C)

  def expected(k: int) -> float:
    terms = []
    for row, length in enumerate(lengths):
      if length > cuts[k]:
        t = min(length, cuts[k + 1])
        log_p = log_softmax(outputs[t - cuts[k] - 1, row])
        terms.append(-t / length * log_p[labels[row]] - (1 - t / length) * log_p.mean())
    return np.mean(terms)

  for k in range(3):
    value, _ = loss.apply(
      outputs, jnp.array(labels), window(k, cuts, lengths), loss.init(3)
    )
    np.testing.assert_allclose(value, expected(k), **EXACT)


def test_class_ema_by_hand():
  """Q[k, c] moves by 1 - decay towards the mean prediction of the sequences of class c,
  only in window k and only where the batch has the class; the objective uses the table
  before the move.
  """
  loss = losses.terminal_classification(C, ema_decay=0.75)
  cuts, labels = [0, 1, 2], [2, 0, 2]  # no sequence of class 1
  state, table = loss.init(2), np.full((2, C, C), 1 / C)
  for visit, k in enumerate([0, 0, 1]):
    outputs = random(1, 3, C, seed=visit)
    log_p = log_softmax(outputs[0])
    beta = (k + 1) / 2
    expected = np.mean(
      -beta * log_p[np.arange(3), labels]
      - (1 - beta) * (table[k, labels] * log_p).sum(-1)
    )
    value, state = loss.apply(
      outputs, jnp.array(labels), window(k, cuts, [2] * 3), state
    )
    np.testing.assert_allclose(value, expected, **EXACT)
    p = np.exp(log_p)
    table[k, 0] = 0.75 * table[k, 0] + 0.25 * p[1]
    table[k, 2] = 0.75 * table[k, 2] + 0.25 * (p[0] + p[2]) / 2
    np.testing.assert_allclose(state['q'], table, **EXACT)
  np.testing.assert_allclose(state['q'][:, 1], 1 / C, rtol=1e-6)


def test_class_ema_leaves_out_ended_sequences():
  """A sequence that ended before the window tells nothing about its class there."""
  loss = losses.terminal_classification(C, ema_decay=0.0)
  outputs = random(2, 2, C)
  _, state = loss.apply(
    outputs, jnp.array([1, 1]), window(1, [0, 2, 4], [4, 2]), loss.init(2)
  )
  np.testing.assert_allclose(
    state['q'][1, 1], np.exp(log_softmax(outputs[1, 0])), **EXACT
  )


def test_last_epoch_by_hand():
  """Q stays what the last epoch's mean was while this one's predictions are summed; a
  class not seen keeps its Q.
  """
  loss = losses.terminal_classification(C, divergence='last_epoch')
  cuts = [0, 1, 2]
  state, q = loss.init(2), np.full((2, C, C), 1 / C)
  for epoch, labels in enumerate([[0, 1], [1, 1], [2, 0]]):
    seen = [[[] for _ in range(C)] for _ in range(2)]
    for batch in range(2):
      for k in range(2):
        outputs = random(1, 2, C, seed=100 * epoch + 10 * batch + k)
        log_p, beta = log_softmax(outputs[0]), (k + 1) / 2
        value, state = loss.apply(
          outputs, jnp.array(labels), window(k, cuts, [2, 2]), state
        )
        expected = np.mean(
          -beta * log_p[[0, 1], labels] - (1 - beta) * (q[k, labels] * log_p).sum(-1)
        )
        np.testing.assert_allclose(value, expected, **EXACT)
        np.testing.assert_allclose(state['q'], q, **EXACT)
        for row, label in enumerate(labels):
          seen[k][label].append(np.exp(log_p[row]))
    state = loss.end_epoch(state)
    for k in range(2):
      for c in range(C):
        q[k, c] = np.mean(seen[k][c], axis=0) if seen[k][c] else q[k, c]
    np.testing.assert_allclose(state['q'], q, **EXACT)
    assert not np.any(state['sum'])
    assert not np.any(state['count'])


def test_example_by_hand():
  """Q is what the same example's prediction was at the same window one visit ago,
  uniform on the first; only the visited examples' entries of that window change."""
  loss = losses.terminal_classification(C, divergence='example', num_examples=4)
  cuts, labels = [0, 1, 2], {0: 2, 1: 0, 3: 1}
  state, table = loss.init(2), np.full((4, 2, C), 1 / C)
  for visit, (ids, k) in enumerate(
    [((3, 1), 0), ((1, 0), 0), ((3, 1), 1), ((1, 3), 0)]
  ):
    outputs = random(1, 2, C, seed=visit)
    log_p, beta = log_softmax(outputs[0]), (k + 1) / 2
    y = [labels[i] for i in ids]
    expected = np.mean(
      -beta * log_p[[0, 1], y] - (1 - beta) * (table[list(ids), k] * log_p).sum(-1)
    )
    value, state = loss.apply(
      outputs, (jnp.array(y), jnp.array(ids)), window(k, cuts, [2, 2]), state
    )
    np.testing.assert_allclose(value, expected, **EXACT)
    table[list(ids), k] = np.exp(log_p)
    np.testing.assert_allclose(state['q'], table, **EXACT)
  np.testing.assert_allclose(table[2], 1 / C, rtol=1e-12)


def test_example_keeps_the_entry_of_an_ended_sequence():
  """No prediction at this window, no new entry."""
  loss = losses.terminal_classification(C, divergence='example', num_examples=2)
  before = {'q': jnp.asarray(random(2, 2, C))}
  outputs = random(2, 2, C, seed=1)
  _, after = loss.apply(
    outputs,
    (jnp.array([0, 1]), jnp.array([1, 0])),
    window(1, [0, 2, 4], [2, 3]),
    before,
  )
  expected = np.array(before['q'])
  expected[0, 1] = np.exp(log_softmax(outputs[0, 1]))
  np.testing.assert_allclose(after['q'], expected, **EXACT)


@pytest.mark.parametrize('ids', [[0, 1], [1, 0]])
def test_example_keeps_a_sequence_beside_one_without_a_step(ids):
  """A row that is wholly masked has no example, whatever its number is cleared to."""
  batch = helpers.label_batch(4, 2, classes=C)
  mask = jnp.array([[True, False]] * 4)
  batch = batch._replace(targets=(batch.targets, jnp.array(ids)), mask=mask)
  loss = losses.terminal_classification(C, divergence='example', num_examples=2)
  model = helpers.elman(out=C)
  trainer = helpers.quick_trainer(
    model, loss, optax.sgd(0.0), method='tbptt', num_windows=1
  )
  state = trainer.init(jax.random.key(0), batch)
  seen, _ = trainer.step(state, batch)
  q = np.asarray(seen.loss_state['q'])[:, 0]
  assert np.abs(q[ids[0]] - 1 / C).max() > 1e-3
  np.testing.assert_allclose(q[ids[1]], 1 / C, rtol=1e-6)


@pytest.mark.parametrize('divergence', ['class_ema', 'last_epoch', 'example'])
def test_no_gradient_flows_through_q(divergence):
  """With Q a constant the gradient at the last output is β (P - y) + (1 - β)(P - Q)
  over B, and 0 at the other outputs (also when Q holds this very prediction); the new
  loss state as a function of the outputs has gradient exactly 0.
  """
  loss, labels = classification(divergence), [1, 0]
  targets, place, outputs = (
    targets_for(divergence, labels),
    window(0, [0, 2, 4], [4, 4]),
    jnp.asarray(random(2, 2, C)),
  )
  _, state = loss.apply(outputs, targets, place, loss.init(2))
  state = loss.end_epoch(state)
  p = np.exp(log_softmax(np.asarray(outputs[1])))
  q = np.asarray(
    state['q'][targets[1], 0]
    if divergence == 'example'
    else state['q'][0, jnp.array(labels)]
  )
  gradient = jax.grad(lambda o: loss.apply(o, targets, place, state)[0])(outputs)
  expected = np.zeros((2, 2, C))
  expected[1] = (0.5 * (p - np.eye(C)[labels]) + 0.5 * (p - q)) / 2
  np.testing.assert_allclose(gradient, expected, **EXACT)
  through = jax.grad(
    lambda o: sum(
      jnp.sum(leaf**2)
      for leaf in jax.tree.leaves(loss.apply(o, targets, place, state)[1])
    )
  )(outputs)
  assert not np.any(through)


def test_bfloat16_logits_are_taken_up_to_float32():
  """Softmax, objective and tables of bfloat16 logits equal those of the same numbers in
  float32.
  """
  loss, labels, place = (
    classification('class_ema'),
    jnp.array([1, 0]),
    window(0, [0, 2, 4], [4, 4]),
  )
  low = jnp.asarray(random(2, 2, C), jnp.bfloat16)
  got = (
    *loss.apply(low, labels, place, loss.init(2)),
    loss.measure(low, labels, place),
  )
  high = low.astype(jnp.float32)
  chex.assert_trees_all_equal(
    got,
    (*loss.apply(high, labels, place, loss.init(2)), loss.measure(high, labels, place)),
  )
  chex.assert_type(
    [got[0], got[1]['q'], got[2]['loss']], [jnp.float32, float, jnp.float32]
  )


@pytest.mark.parametrize('divergence', [*WITH_DIVERGENCE, 'none'])
@pytest.mark.usefixtures('strict_dtypes')
def test_terminal_classification_promotes_nothing_implicitly(divergence):
  """All dtypes are meant: the loss runs under strict promotion, and its state keeps its
  dtypes.
  """
  loss, place = classification(divergence), window(0, [0, 2, 4], [4, 3])
  run = lambda outputs, labels, state: (
    loss.apply(outputs, targets_for(divergence, labels), place, state),
    loss.measure(outputs, targets_for(divergence, labels), place),
  )
  before = loss.init(2)
  (value, after), totals = jax.eval_shape(
    run, random(2, 2, C), np.array([1, 0], np.int32), before
  )
  assert value.dtype == totals['loss'].dtype == totals['accuracy'].dtype == jnp.float32
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), before
  )


@pytest.mark.parametrize('divergence', ['class_ema', 'last_epoch', 'example'])
def test_loss_state_is_not_weakly_typed(divergence):
  """A weak type would compile the step anew when the state comes back strong, from a
  checkpoint say.
  """
  assert not any(
    leaf.weak_type for leaf in jax.tree.leaves(classification(divergence).init(2))
  )


# Terminal regression.


@pytest.mark.parametrize('shape', [(3,), (3, 1), (3, 2)])
def test_terminal_regression_by_hand(shape):
  """β · squared error of the last valid output, the mean over the O outputs and over
  the active sequences.
  """
  cuts, lengths = [0, 2, 5, 7], [7, 3, 2]
  targets = random(*shape, seed=1)
  expected_targets = targets.reshape(3, -1)
  outputs = random(3, 3, expected_targets.shape[1])
  loss = losses.terminal_regression()
  for k in range(3):
    terms, ended = [], []
    for row, length in enumerate(lengths):
      if length > cuts[k]:
        t = min(length, cuts[k + 1])
        error = np.mean((outputs[t - cuts[k] - 1, row] - expected_targets[row]) ** 2)
        terms.append(t / length * error)
        ended += [error] if t == length else []
    value, _ = loss.apply(
      outputs, jnp.asarray(targets), window(k, cuts, lengths), loss.init(3)
    )
    np.testing.assert_allclose(value, np.mean(terms), **EXACT)
    totals = loss.measure(outputs, jnp.asarray(targets), window(k, cuts, lengths))
    assert int(totals['count']) == len(ended)
    np.testing.assert_allclose(totals['loss'], sum(ended), **EXACT)


# Sequence-to-sequence.


def test_sequence_classification_by_hand():
  """Mean cross-entropy over the valid steps of the window; what outputs and labels hold
  elsewhere, nonsense included, is not read, and gets no gradient."""
  cuts, lengths = [0, 2, 5], [5, 3]
  outputs, labels = random(3, 2, C), np.random.default_rng(0).integers(0, C, (5, 2))
  labels[3:, 1] = [999, -1]
  loss = losses.sequence_classification(C, accuracy=True)
  for k, steps in (
    (0, [(0, 0), (1, 0), (0, 1), (1, 1)]),
    (1, [(2, 0), (3, 0), (4, 0), (2, 1)]),
  ):
    log_p = [log_softmax(outputs[t - cuts[k], b]) for t, b in steps]
    right = [labels[t, b] for t, b in steps]
    nats = [-row[label] for row, label in zip(log_p, right, strict=True)]
    place = window(k, cuts, lengths)
    run = lambda o: loss.apply(o, jnp.asarray(labels), place, ())[0]
    np.testing.assert_allclose(run(outputs), np.mean(nats), **EXACT)
    totals = loss.measure(outputs, jnp.asarray(labels), place)
    assert int(totals['count']) == 4
    np.testing.assert_allclose(totals['loss'], np.sum(nats), **EXACT)
    np.testing.assert_allclose(
      totals['accuracy'], np.sum(np.argmax(log_p, -1) == right), rtol=0
    )
    gradient = np.asarray(jax.grad(run)(jnp.asarray(outputs)))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.any(gradient, axis=-1), place.mask)


def test_sequence_classification_measures_accuracy_on_demand_only():
  """The pass over the logits is paid for when asked."""
  totals = losses.sequence_classification(C).measure(
    random(2, 2, C), jnp.zeros((2, 2), jnp.int32), window(0, [0, 2], [2, 2])
  )
  assert set(totals) == {'count', 'loss'}


def test_sequence_regression_by_hand():
  """Mean squared error over valid steps and the O outputs."""
  outputs, targets = random(3, 2, 4), random(5, 2, 4, seed=1)
  loss, place = losses.sequence_regression(), window(1, [0, 2, 5], [5, 3])
  errors = [
    (outputs[t - 2, b] - targets[t, b]) ** 2
    for t, b in [(2, 0), (3, 0), (4, 0), (2, 1)]
  ]
  value, _ = loss.apply(outputs, jnp.asarray(targets), place, ())
  np.testing.assert_allclose(value, np.mean(errors), **EXACT)
  totals = loss.measure(outputs, jnp.asarray(targets), place)
  assert int(totals['count']) == 4
  np.testing.assert_allclose(totals['loss'], np.sum(np.mean(errors, -1)), **EXACT)


# All of them.


def mean_absolute_error(outputs, targets, window):
  error = jnp.abs(outputs - window.slice(targets)).mean(-1)
  return jnp.sum(error, where=window.mask) / jnp.maximum(window.mask.sum(), 1)


LOSSES = {
  'terminal_classification': (
    losses.terminal_classification(C, divergence='uniform'),
    jnp.array([2, 0]),
  ),
  'terminal_regression': (
    losses.terminal_regression(),
    jnp.array([[0.5, 1, 2], [1, 0, -1]]),
  ),
  'sequence_classification': (
    losses.sequence_classification(C, accuracy=True),
    jnp.array([[0, 1]] * 4 + [[2, 0]] * 2),
  ),
  'sequence_regression': (
    losses.sequence_regression(),
    jnp.asarray(random(6, 2, C, seed=1)),
  ),
  'from_function': (
    losses.from_function(mean_absolute_error),
    jnp.asarray(random(6, 2, C, seed=1)),
  ),
}
EACH_LOSS = pytest.mark.parametrize('name', list(LOSSES))


@EACH_LOSS
def test_window_without_sequences_gives_zero(name):
  """Objective, gradient and totals of a window in which no sequence is left are 0, not
  NaN.
  """
  loss, targets = LOSSES[name]
  place = window(2, [0, 2, 4, 6], [4, 1])
  value, gradient = jax.value_and_grad(
    lambda o: loss.apply(o, targets, place, loss.init(3))[0]
  )(jnp.asarray(random(2, 2, C)))
  assert float(value) == 0
  assert not np.any(gradient)
  assert all(
    float(total) == 0
    for total in loss.measure(jnp.asarray(random(2, 2, C)), targets, place).values()
  )


@EACH_LOSS
@settings(deadline=None, max_examples=12, derandomize=True)
@given(
  lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
  num_windows=st.sampled_from([1, 4]),
)
def test_totals_do_not_depend_on_the_windows(name, lengths, num_windows):
  """Summed over the windows, 'count' and totals are those of the sequences whole:
  windows are the trainer's business only. Terminal tasks count sequences, the others
  steps.
  """
  targets = LOSSES[name][1]
  outputs, windows = random(6, 2, C), fptt_jax.make_windows(6, num_windows=num_windows)
  sums = {}
  for k in range(num_windows):
    place = window_at(
      windows, jnp.int32(k), valid_steps(windows, len(lengths), np.asarray(lengths))
    )
    measured = _measure(name, windows.size, place, outputs, targets)
    sums = {key: sums.get(key, 0) + float(total) for key, total in measured.items()}
  whole = window(0, [0, 6], lengths)
  expected = _measure(name, 6, whole, outputs, targets)
  assert sums['count'] == (2 if name.startswith('terminal') else sum(lengths))
  chex.assert_trees_all_close(
    sums, {key: float(total) for key, total in expected.items()}, rtol=1e-5
  )


_COMPILED = {}


def _measure(name, size, place, outputs, targets):
  """`measure`, compiled once for each loss and window size."""
  loss = LOSSES[name][0]
  key = (name, size, place.num_windows)
  if key not in _COMPILED:
    _COMPILED[key] = jax.jit(
      lambda k, start, end, lengths, seen, active, last, mask, outputs, targets: (
        loss.measure(
          jax.lax.dynamic_slice_in_dim(outputs, start, size),
          targets,
          place._replace(
            k=k,
            start=start,
            end=end,
            lengths=lengths,
            seen=seen,
            active=active,
            last=last,
            mask=mask,
          ),
        )
      )
    )
  return _COMPILED[key](
    place.k,
    place.start,
    place.end,
    place.lengths,
    place.seen,
    place.active,
    place.last,
    place.mask,
    outputs,
    targets,
  )


def test_from_function_hands_over_what_it_gets():
  """The objective is the function's value; there is no loss state; the measure weighs a
  window by its valid steps.
  """
  seen = []

  def function(outputs, targets, window):
    seen.append((outputs.shape, targets, int(window.k)))
    return jnp.float32(7)

  loss, place = losses.from_function(function), window(1, [0, 2, 5], [5, 3])
  assert loss.init(2) == ()
  assert loss.end_epoch(()) == ()
  targets = np.zeros((5, 2, 4))
  value, state = loss.apply(jnp.zeros((3, 2, 1)), targets, place, ())
  totals = loss.measure(jnp.zeros((3, 2, 1)), targets, place)
  assert (float(value), state) == (7, ())
  assert {key: float(total) for key, total in totals.items()} == {
    'count': 4,
    'loss': 28,
  }
  assert [(shape, given is targets, k) for shape, given, k in seen] == [
    ((3, 2, 1), True, 1)
  ] * 2


# Terminal losses of one's own: one target per sequence, which shapes may not tell.


def last_error(outputs, targets, window):
  """The mean absolute error of the last output; targets [B], [B, O], or a pair of them
  and weights [B].
  """
  targets, weights = targets if isinstance(targets, tuple) else (targets, 1.0)
  error = jnp.abs(outputs[-1] - targets.reshape(len(targets), -1)).mean(-1)
  return jnp.mean(weights * error)


def evaluate_own(loss, model, batch, **options):
  """Returns the evaluated mean 'loss' of a model at its first parameters."""
  trainer = fptt_jax.make_trainer(
    model, loss, optax.sgd(0.1), method='tbptt', **options
  )
  params = model.init(jax.random.key(0))
  return fptt_jax.compute_metrics(trainer.evaluate(params, batch)[0])['loss'], params


def true_last_error(model, params, batch):
  """Runs the model over each whole sequence and looks at the last output."""
  lengths = (
    np.full(batch.inputs.shape[1], len(batch.inputs))
    if batch.lengths is None
    else batch.lengths
  )
  outputs = model.apply(
    params, model.initial_state(len(lengths)), jnp.asarray(batch.inputs), None, None
  )[1]
  targets, weights = (
    batch.targets
    if isinstance(batch.targets, tuple)
    else (batch.targets, np.ones(len(lengths)))
  )
  errors = [
    np.abs(outputs[end - 1, row] - targets[row]).mean()
    for row, end in enumerate(lengths)
  ]
  return np.mean(weights * np.array(errors))


@pytest.mark.parametrize(
  ('num_steps', 'shape', 'terminal', 'ragged', 'weighted'),
  [
    (7, (4,), None, False, False),
    (7, (4,), None, True, True),
    (4, (4,), None, True, False),
    (1, (4,), None, False, True),
    (7, (4, 3), None, False, True),
    (4, (4, 4), True, False, False),
    (4, (4, 4), True, True, True),
  ],
)
def test_own_terminal_loss_is_evaluated_at_the_last_step(
  num_steps, shape, terminal, ragged, weighted
):
  """Also where B = T, in uneven windows, and at each sequence's own end."""
  outputs = shape[1] if len(shape) > 1 else 1
  model = helpers.elman(out=outputs)
  lengths = (
    np.array([1, num_steps, (num_steps + 1) // 2, num_steps], np.int32)
    if ragged
    else None
  )
  targets = random(*shape, seed=1)
  if weighted:
    targets = (targets, np.array([1, 2, 3, 4], np.float32))
  batch = fptt_jax.Batch(random(num_steps, 4, 2), targets, lengths)
  loss = losses.from_function(last_error, terminal=terminal)
  got, params = evaluate_own(loss, model, batch)
  assert got == pytest.approx(true_last_error(model, params, batch), rel=1e-5)


@pytest.mark.parametrize('ragged', [False, True])
@pytest.mark.parametrize('num_steps', [4, 7])
def test_own_terminal_loss_on_devices(num_steps, ragged):
  """Each of two devices has its share of the rows, also where B = T = O."""
  model = helpers.elman(out=4)
  lengths = np.array([1, 2, 3, 4], np.int32) if ragged else None
  batch = fptt_jax.Batch(random(num_steps, 4, 2), random(4, 4, seed=1), lengths)
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:2], ('batch',))
  got, params = evaluate_own(
    losses.from_function(last_error, terminal=True), model, batch, mesh=mesh
  )
  assert got == pytest.approx(true_last_error(model, params, batch), rel=1e-5)


@pytest.mark.parametrize('on_devices', [False, True])
def test_own_terminal_loss_may_have_targets_by_step_as_well(on_devices):
  """Weights [T, B] of steps beside labels [B], in a batch with an idle row: NaN in what
  belongs to that row counts for nothing.
  """
  steps, rows = 6, 4

  def error(outputs, targets, window):
    labels, weights = targets
    errors = (outputs[..., 0] - labels[None]) ** 2 * window.slice(weights)
    return window.mean(errors, window.mask)

  def measure(outputs, targets, window):
    return {'count': window.mask.sum(), 'loss': jnp.zeros([])}

  mask = np.ones((steps, rows), bool)
  mask[:, 1] = False
  labels, weights = random(rows, seed=1), random(steps, rows, seed=2) ** 2
  spoiled = labels.copy(), weights.copy()
  for target in spoiled:
    target[..., 1] = np.nan
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:2], ('batch',)) if on_devices else None
  trainer = helpers.quick_trainer(
    helpers.elman(),
    losses.from_function(error, measure, terminal=True),
    optax.sgd(0.1),
    method='tbptt',
    num_windows=2,
    mesh=mesh,
  )
  found = []
  for targets in ((labels, weights), spoiled):
    batch = fptt_jax.Batch(random(steps, rows, 2), targets, mask=mask)
    state = trainer.init(jax.random.key(0), batch)
    state, metrics = trainer.step(state, batch)
    found.append((state.params, metrics.loss))
  chex.assert_trees_all_equal(*found)
  assert np.isfinite(found[0][1]).all()
  assert (found[0][1] > 0).all()


def test_own_terminal_loss_sees_the_batch_together():
  """A loss that is no mean over rows keeps its meaning where all sequences end
  together.
  """
  spread = losses.from_function(lambda outputs, targets, window: outputs[-1].std())
  model = helpers.elman()
  batch = fptt_jax.Batch(random(7, 4, 2), random(4, seed=1))
  got, params = evaluate_own(spread, model, batch)
  outputs = model.apply(params, model.initial_state(4), batch.inputs, None, None)[1]
  assert got == pytest.approx(float(outputs[-1].std()), rel=1e-5)


def test_own_loss_says_itself_that_it_is_a_mean_over_steps():
  """`terminal=False` averages over steps, whatever the targets' shape."""
  every_step = losses.from_function(
    lambda outputs, targets, window: window.mean(
      jnp.abs(outputs[..., 0] - targets[None]), window.mask
    ),
    terminal=False,
  )
  model = helpers.elman()
  batch = fptt_jax.Batch(random(7, 4, 2), random(4, seed=1))
  got, params = evaluate_own(every_step, model, batch)
  outputs = model.apply(params, model.initial_state(4), batch.inputs, None, None)[1]
  assert got == pytest.approx(
    float(jnp.abs(outputs[..., 0] - batch.targets[None]).mean()), rel=1e-5
  )


@pytest.mark.parametrize(
  ('num_steps', 'targets'),
  [
    (4, np.zeros((4, 4, 1), np.float32)),
    (4, np.zeros((4, 4), np.float32)),
    (7, (np.zeros(4, np.float32), np.zeros((7, 4), np.float32))),
    (7, ()),
  ],
  ids=['B=T', 'B=T=O', 'mixed', 'none'],
)
def test_targets_of_ambiguous_shapes(num_steps, targets):
  """When the trainer looks at a batch, takes a step, or evaluates; with a measure of
  one's own nothing has to be told.
  """
  function = lambda outputs, targets, window: outputs.mean()
  batch = fptt_jax.Batch(np.zeros((num_steps, 4, 2), np.float32), targets)
  measure = lambda outputs, targets, window: {'count': 1, 'loss': 2.0}
  for loss, fails in (
    (losses.from_function(function), True),
    (losses.from_function(function, measure), False),
  ):
    trainer = fptt_jax.make_trainer(
      helpers.elman(), loss, optax.sgd(0.1), method='tbptt'
    )
    state = jax.eval_shape(trainer.init, jax.random.key(0), batch)
    for call in (
      lambda t=trainer: t.init(jax.random.key(0), batch),
      lambda t=trainer, s=state: jax.eval_shape(t.step, s, batch),
      lambda t=trainer, s=state: jax.eval_shape(t.evaluate, s.params, batch),
    ):
      with (
        pytest.raises(ValueError, match=r'^terminal .*, got None')
        if fails
        else contextlib.nullcontext()
      ):
        call()


def test_means_divide_by_the_count():
  """Means are host floats without the count; over nothing they are NaN, not an
  error.
  """
  totals = {'count': jnp.int32(4), 'loss': jnp.float32(2), 'accuracy': jnp.float32(3)}
  assert fptt_jax.compute_metrics(totals) == {'loss': 0.5, 'accuracy': 0.75}
  assert np.isnan(
    fptt_jax.compute_metrics({'count': jnp.int32(0), 'loss': jnp.float32(0)})['loss']
  )


@pytest.mark.parametrize(
  'totals', [{'loss': 2.0}, {'count': 2, 'loss': np.ones(3)}, {}], ids=str
)
def test_sums_without_a_count_or_of_other_shapes(totals):
  """An error shows the shapes of the sums."""
  with pytest.raises(ValueError, match=r'^totals .*count.* got'):
    fptt_jax.compute_metrics(totals)


@pytest.mark.parametrize('value', ['x', None, True, 1j])
def test_sums_that_are_not_numbers(value):
  """An error names the sum and shows the value."""
  with pytest.raises(TypeError, match=f'^loss .* got {value!r}'):
    fptt_jax.compute_metrics({'count': 2, 'loss': value})


def test_metrics_of_both_results_of_evaluate_are_refused() -> None:
  """The sums are the first of the two."""
  sums = {'count': jnp.int32(2), 'loss': jnp.float32(1)}
  with pytest.raises(
    TypeError, match=r'^totals .*first .*Trainer\.evaluate.*got tuple'
  ):
    fptt_jax.compute_metrics((sums, None))


# References of the user's.


def smoothed_labels(num_examples: int | None = None) -> losses.Loss:
  """A loss whose Q is the label, smoothed by the number of windows seen so far."""

  def lookup(state: jax.Array, examples: losses.Examples) -> jax.Array:
    uniform = 1 / examples.num_classes
    share = state / 10
    if examples.ids is not None:
      share = share * examples.ids[:, None]
    one_hot = jax.nn.one_hot(examples.labels, examples.num_classes)
    return (1 - share) * one_hot + share * uniform

  reference = losses.Reference(
    init=lambda num_windows, num_classes: jnp.zeros([]),
    lookup=lookup,
    observe=lambda state, examples, predictions: jnp.ones([]),
    update=lambda state, note, keep: state + jnp.where(keep, note, 0),
    end_epoch=lambda state: state - 1,
  )
  return losses.terminal_classification(
    C, divergence=reference, num_examples=num_examples
  )


def test_own_reference_by_hand():
  """β CE - (1 - β) Σ_c Q(c) log P(c), with Q from the reference."""
  labels = np.array([2, 0])
  outputs = random(3, 2, C)
  place = window(0, [0, 3, 6], [6, 6])
  log_p = log_softmax(outputs[-1])
  for ids, shares in ((None, 0.3), (np.array([1, 2]), np.array([[0.3], [0.6]]))):
    loss = smoothed_labels(None if ids is None else 5)
    targets = labels if ids is None else (labels, ids)
    state = loss.init(2) + 3
    value, new_state = loss.apply(outputs, targets, place, state)
    q = (1 - shares) * np.eye(C)[labels] + shares / C
    cross_entropy = -log_p[np.arange(2), labels]
    expected = np.mean(0.5 * cross_entropy - 0.5 * (q * log_p).sum(-1))
    np.testing.assert_allclose(value, expected, **EXACT)
    assert new_state == 4
    assert loss.end_epoch(new_state) == 3


@pytest.mark.parametrize('divergence', ['own', 'class_ema', 'last_epoch', 'example'])
def test_references_keep_their_state_where_an_update_is_skipped(divergence):
  """It moves with each window, but not in an invalid batch, nor with an update that is
  left out since the gradient is not finite.
  """
  batch = helpers.label_batch(6, 4)
  loss = smoothed_labels()
  ids = None
  if divergence != 'own':
    ids = np.array([0, 4, 2, 1]) if divergence == 'example' else None
    loss = losses.terminal_classification(
      C, divergence=divergence, num_examples=None if ids is None else 5
    )

  def with_labels(labels):
    return batch._replace(targets=labels if ids is None else (labels, ids))

  trainer = helpers.quick_trainer(
    helpers.elman(out=C),
    loss,
    optax.sgd(0.1),
    method='tbptt',
    num_windows=3,
    skip_nonfinite=True,
  )
  valid = with_labels(batch.targets)
  first = trainer.init(jax.random.key(0), valid)
  state, _ = trainer.step(first, valid)
  if divergence == 'own':
    assert state.loss_state == 3
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(state.loss_state, first.loss_state)
  invalid = with_labels(np.full_like(batch.targets, C))
  after, metrics = trainer.step(state, invalid)
  assert metrics.invalid.all()
  chex.assert_trees_all_equal(after.loss_state, state.loss_state)
  inputs = np.array(batch.inputs)
  inputs[:, 0] = np.nan
  after, metrics = trainer.step(state, valid._replace(inputs=inputs))
  assert metrics.skipped.all()
  chex.assert_trees_all_equal(after.loss_state, state.loss_state)


@pytest.mark.parametrize(
  'options', [{}, dict(micro_batches=2), dict(readout_chunk=1)], ids=str
)
def test_a_replaced_part_of_a_loss_is_the_one_that_runs(options):
  """The parts of the loss it was made of would compute something else: where chunks
  need them, they are missing.
  """
  base = losses.sequence_classification(C)

  def tenfold(outputs, targets, window, state):
    value, state = base.apply(outputs, targets, window, state)
    return 10 * value, state

  def measure(outputs, targets, window):
    return base.measure(outputs, targets, window) | {'ten': jnp.float32(10)}

  batch = helpers.tagging_batch(6, 4, 2, C)
  made = []
  for loss in (base, base._replace(apply=tenfold), base._replace(measure=measure)):

    def make(loss=loss):
      return helpers.quick_trainer(
        helpers.lstm(2, 4, C), loss, optax.sgd(0.1), method='bptt', **options
      )

    if loss is not base and 'readout_chunk' in options:
      with pytest.raises(ValueError, match=r'readout_chunk .*per_step=None'):
        make()
      continue
    trainer = make()
    _, metrics = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    made.append(metrics)
  if len(made) == 1:
    assert 'readout_chunk' in options
    return
  np.testing.assert_allclose(made[1].loss, 10 * made[0].loss, rtol=1e-5)
  assert 'ten' in made[2].totals


@pytest.mark.parametrize('terminal', [None, True])
def test_targets_of_idle_rows_may_be_nan(terminal):
  """Also where the shapes alone say that there is one target per sequence."""
  batch = helpers.regression_batch(6, 3)
  targets = np.array(batch.targets)
  targets[1] = np.nan
  mask = np.ones((6, 3), bool)
  mask[:, 1] = False

  def error(outputs, targets, window):
    last = outputs[window.last, jnp.arange(outputs.shape[1]), 0]
    return window.mean((last - targets) ** 2, window.active)

  trainer = helpers.quick_trainer(
    helpers.elman(),
    losses.from_function(error, terminal=terminal),
    optax.sgd(0.1),
    method='tbptt',
    num_windows=2,
  )
  batch = batch._replace(targets=targets, mask=mask)
  state = trainer.init(jax.random.key(0), batch)
  _, metrics = trainer.step(state, batch)
  assert np.isfinite(metrics.grad_norm).all()
  totals, _ = trainer.evaluate(state.params, batch)
  assert np.isfinite(totals['loss'])


def test_a_mask_of_another_shape_is_refused():
  """It would be broadcast, and the mean would have another divisor."""
  view = window(0, [0, 3, 6], [6, 6])
  with pytest.raises(ValueError, match=r'where must be of the shape of values, \(3, 2'):
    view.mean(jnp.ones((3, 2)), view.active)


def test_a_memory_of_one_s_own_is_the_loss_in_two_parts():
  """With and without it the state is the same, also where an update is skipped."""

  def observe(outputs, targets, window, state):
    error = jnp.abs(outputs - window.slice(targets)).mean(-1)
    return window.mean(error, window.mask), error.sum()

  def write(state, note, keep):
    return state + jnp.where(keep, note, 0)

  def apply(outputs, targets, window, state):
    value, note = observe(outputs, targets, window, state)
    return value, write(state, note, True)

  whole = losses.from_function(lambda outputs, targets, window: jnp.zeros([]))._replace(
    init=lambda num_windows: jnp.zeros([]), apply=apply
  )
  in_parts = whole._replace(memory=losses.Memory(apply, observe, write))
  batch = helpers.series_batch(6, 4)
  inputs = np.array(batch.inputs)
  inputs[3, 0] = np.nan
  found = []
  for loss in (whole, in_parts):
    trainer = helpers.quick_trainer(
      helpers.elman(),
      loss,
      optax.sgd(0.1),
      num_windows=3,
      skip_nonfinite=True,
      method='tbptt',
    )
    state = trainer.init(jax.random.key(0), batch)
    state, _ = trainer.step(state, batch)
    state, metrics = trainer.step(state, batch._replace(inputs=inputs))
    assert metrics.skipped.tolist() == [False, True, False]
    found.append((state.params, state.loss_state))
  chex.assert_trees_all_close(found[0], found[1], rtol=1e-6)
  assert found[0][1] > 0


# Invalid arguments and targets.


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: losses.terminal_classification(1),
      '^num_classes .* got 1',
    ),
    (
      lambda: losses.sequence_classification(0),
      '^num_classes .* got 0',
    ),
    (
      lambda: losses.terminal_classification(3, divergence='kl'),
      "^divergence .*'class_ema'.* got 'kl'",
    ),
    (
      lambda: losses.terminal_classification(3, ema_decay=1.0),
      r'^ema_decay .* got 1\.0',
    ),
    (
      lambda: losses.terminal_classification(3, ema_decay=-0.1),
      r'^ema_decay .* got -0\.1',
    ),
    (
      lambda: losses.terminal_classification(3, divergence='example'),
      '^num_examples .* got None',
    ),
    (
      lambda: losses.terminal_classification(3, num_examples=10),
      '^num_examples .* got 10',
    ),
  ],
)
def test_arguments_out_of_range(make, message):
  """An error names the argument and shows the value."""
  with pytest.raises(ValueError, match=message):
    make()


INTS, FLOATS = np.array([0, 1]), np.array([0.0, 1.0], np.float32)


@pytest.mark.parametrize(
  ('loss', 'features', 'targets', 'error', 'message'),
  [
    (
      classification('none'),
      3,
      FLOATS,
      TypeError,
      r'^labels .* got float32\[2\]',
    ),
    (
      classification('none'),
      4,
      INTS,
      ValueError,
      r'^outputs .*3\], got \(2, 2, 4\)',
    ),
    (
      classification('none'),
      3,
      (INTS, INTS),
      TypeError,
      '^labels .*got tuple',
    ),
    (
      classification('example'),
      3,
      INTS,
      ValueError,
      r'^targets .*example ids.*B=2, got \(2,\)',
    ),
    (
      losses.terminal_regression(),
      1,
      INTS,
      TypeError,
      r'^targets .* got int64\[2\]',
    ),
    (
      classification('none'),
      3,
      INTS[:, None],
      ValueError,
      r'^labels .*\[2\], got int64\[2, 1\]',
    ),
    (
      losses.terminal_regression(),
      2,
      random(1, 2),
      ValueError,
      r'^targets .*B=2, got \(1, 2\)',
    ),
    (
      losses.terminal_regression(),
      2,
      FLOATS,
      ValueError,
      r'^outputs .*1\], got \(2, 2, 2\)',
    ),
    (
      losses.sequence_classification(3),
      3,
      np.zeros((2, 2)),
      TypeError,
      '^targets .* got float',
    ),
    (
      losses.sequence_classification(3),
      2,
      np.zeros((2, 2), int),
      ValueError,
      r'^outputs .*3\], got \(2, 2, 2\)',
    ),
    (
      losses.sequence_regression(),
      3,
      random(2, 2, 1),
      ValueError,
      r'^targets .*\[2, 2, 3\], got float\d*\[2, 2, 1\]',
    ),
    (
      losses.sequence_regression(),
      1,
      random(2, 2),
      ValueError,
      r'^targets .*\[2, 2, 1\], got float\d*\[2, 2\]',
    ),
  ],
)
def test_outputs_and_targets_that_do_not_match(loss, features, targets, error, message):
  """Shapes and dtypes are checked when the step is traced, before anything
  broadcasts.
  """
  with pytest.raises(error, match=message):
    loss.apply(random(2, 2, features), targets, window(0, [0, 2], [2, 2]), loss.init(1))


@pytest.mark.parametrize(
  ('loss', 'targets', 'error', 'message'),
  [
    (
      classification('none'),
      np.array([0, 3]),
      ValueError,
      r'^labels .*0\.\.2, got .*3',
    ),
    (
      classification('none'),
      np.array([-1, 0]),
      ValueError,
      r'^labels .*0\.\.2, got .*-1',
    ),
    (
      classification('none'),
      np.array([[0, 1]]),
      ValueError,
      r'^labels .*\[2\], got int64\[1, 2\]',
    ),
    (classification('none'), FLOATS, TypeError, '^labels .* got float32'),
    (
      classification('example'),
      (INTS, np.array([0, 5])),
      ValueError,
      r'^example ids .*0\.\.4, got .*5',
    ),
    (
      losses.terminal_regression(),
      INTS,
      TypeError,
      '^targets .* got int64',
    ),
    (
      losses.terminal_regression(),
      np.zeros(3),
      ValueError,
      r'^targets .*\(2,\), got \(3,\)',
    ),
    (
      losses.terminal_regression(),
      np.array([0, np.nan]),
      ValueError,
      '^targets .*finite, got NaN or infinity in 1 ',
    ),
    (
      losses.sequence_classification(3),
      np.full((4, 2), 3),
      ValueError,
      r'^targets .*0\.\.2, got .*3',
    ),
    (
      losses.sequence_classification(3),
      np.zeros((3, 2), int),
      ValueError,
      r'^targets .*\[4, 2\], got int64\[3, 2\]',
    ),
    (
      losses.sequence_regression(),
      np.zeros((3, 2, 1)),
      ValueError,
      r'^targets .*\(4, 2\), got \(3, 2, 1\)',
    ),
    (
      losses.sequence_regression(),
      np.zeros((4, 2, 1), int),
      TypeError,
      '^targets .* got int64',
    ),
  ],
)
def test_check_rejects_invalid_targets(loss, targets, error, message):
  """`check` looks at concrete values on the host, T = 4 and B = 2 here."""
  with pytest.raises(error, match=message):
    loss.check(targets, np.ones((4, 2), bool))


@EACH_LOSS
def test_check_accepts_valid_targets(name):
  """The targets of the tests above pass, where the same targets for another batch size
  do not (from_function checks the steps of a target alone).
  """
  loss, targets = LOSSES[name]
  loss.check(np.asarray(targets), np.ones((6, 2), bool))
  if name != 'from_function':
    with pytest.raises(ValueError, match=r'^(targets|labels) .* got'):
      loss.check(np.asarray(targets), np.ones((6, 3), bool))


@pytest.mark.parametrize('skip_nonfinite', [False, True])
@pytest.mark.parametrize('divergence', ['class_ema', 'last_epoch', 'example'])
def test_a_window_writes_its_part_of_a_table_in_place(divergence, skip_nonfinite):
  """The compiled step neither copies the table nor selects one of two, so its time is
  linear in the number of windows.
  """
  classes, num_examples, num_windows = 48, 90, 5
  loss = losses.terminal_classification(
    classes,
    divergence=divergence,
    num_examples=num_examples if divergence == 'example' else None,
  )
  batch = fptt_jax.Batch(
    np.zeros((10, 3, 2), np.float32), targets_for(divergence, np.arange(3))
  )
  trainer = fptt_jax.make_trainer(
    helpers.elman(out=classes),
    loss,
    optax.sgd(0.1),
    method='tbptt',
    num_windows=num_windows,
    skip_nonfinite=skip_nonfinite,
  )
  state = jax.eval_shape(trainer.init, jax.random.key(0), batch)
  text = helpers.optimized(trainer.step.lower(state, batch)).as_text()
  [shape] = {leaf.shape for leaf in jax.tree.leaves(state.loss_state) if leaf.ndim == 3}
  whole = re.findall(rf'= f32\[{",".join(map(str, shape))}\]\S* (copy|select)\(', text)
  assert not whole


def test_a_replaced_apply_of_a_loss_with_a_memory_is_used() -> None:
  """It is not bypassed by the parts that the loss was made with."""
  loss = losses.terminal_classification(3)

  def doubled(outputs, targets, window, loss_state):
    value, loss_state = loss.apply(outputs, targets, window, loss_state)
    return 2 * value, loss_state

  batch = helpers.label_batch(6, 4)
  seen = []
  for chosen in (loss, loss._replace(apply=doubled)):
    optimizer = fptt_jax.fptt(optax.sgd(0.0))
    trainer = helpers.quick_trainer(
      helpers.elman(out=3), chosen, optimizer, num_windows=2
    )
    state = trainer.init(jax.random.key(0), batch)
    seen.append(trainer.step(state, batch)[1].loss)
  np.testing.assert_allclose(seen[1], 2 * seen[0], rtol=1e-6)
