"""A learner for streams gives what the trainer gives, whatever way the steps come."""

from collections.abc import Callable, Sequence
import functools
import itertools
from pathlib import Path
import subprocess
import sys
import types
from typing import Any

import chex
from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses, nn
from fptt_jax.streaming import _window

LOSS = losses.sequence_regression()
ELMAN = helpers.elman()
SGD = optax.sgd(0.1)
FPTT = fptt_jax.fptt(optax.adam(1e-2), alpha=0.3)
Stream = tuple[np.ndarray, np.ndarray]


def draw(num_steps: int, batch_size: int = 1, seed: int = 0) -> Stream:
  """Return random inputs [n, B, 2] and labels [n, B, 1]."""
  batch = helpers.series_batch(num_steps, batch_size, seed=seed)
  return batch.inputs, batch.targets


@functools.cache
def make(
  optimizer: optax.GradientTransformation = SGD,
  model: fptt_jax.Model = ELMAN,
  loss: losses.Loss = LOSS,
  influence: str = 'none',
  **options: Any,
) -> fptt_jax.Learner:
  """Return a learner whose functions leave the old state alive.

  Tests with the same options share one, and what it compiled.
  """
  return fptt_jax.make_learner(
    model, loss, optimizer, influence=influence, donate=False, **options
  )


def begin(learner: fptt_jax.Learner, x: Any, y: Any = None) -> fptt_jax.StreamState:
  return learner.init(jax.random.key(0), x, y)


def numbers(state: fptt_jax.StreamState) -> dict[str, np.ndarray]:
  return fptt_jax.state_to_arrays(state)


def assert_same_training(
  one: fptt_jax.StreamState,
  other: fptt_jax.StreamState,
  fields: Sequence[str] = ('train', 'live', 'fast', 'slow'),
) -> None:
  """Weights, optimizer, hidden state and faded metrics agree."""
  for field in fields:
    a, b = (fptt_jax.state_to_arrays(getattr(state, field)) for state in (one, other))
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('optimizer', [FPTT, SGD], ids=['fptt', 'sgd'])
@pytest.mark.parametrize('window_size', [1, 4])
def test_whole_windows_are_steps_of_the_trainer(
  optimizer: optax.GradientTransformation, window_size: int
) -> None:
  """Each window is predicted with the weights before it, and then trained on."""
  x, y = draw(12, batch_size=2)
  learner = make(optimizer, window_size=window_size)
  state, outputs, metrics = learner.step(begin(learner, x), x, y)
  trainer = fptt_jax.make_trainer(
    ELMAN,
    LOSS,
    optimizer,
    method='fptt' if optimizer is FPTT else 'tbptt',
    num_windows=1,
    carry_hidden=True,
    donate=False,
  )
  first = fptt_jax.Batch(x[:window_size], y[:window_size])
  train = trainer.init(jax.random.key(0), first)
  predicted, total = [], 0.0
  for start in range(0, 12, window_size):
    window = slice(start, start + window_size)
    predicted.append(trainer.predict(train.params, x[window], hidden=train.hidden))
    train, seen = trainer.step(train, fptt_jax.Batch(x[window], y[window]))
    total += float(seen.totals['loss'])
  arrays = [fptt_jax.state_to_arrays(tree) for tree in (state.train, train)]
  chex.assert_trees_all_close(*arrays, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(outputs, np.concatenate(predicted), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(metrics.totals['loss'], total, rtol=1e-5)
  assert metrics.totals['count'] == 24
  assert metrics.windows == 12 // window_size


@pytest.mark.parametrize('influence', ['none', 'rtrl'])
def test_single_steps_are_chunks(influence: str) -> None:
  """Steps may come one by one, in whole windows, or in chunks that cut windows."""
  x, y = draw(12, batch_size=2)
  learner = make(window_size=3, influence=influence)
  results = []
  for sizes in ([12], [1] * 12, [1, 10, 1]):
    state, predicted, loss, start = begin(learner, x), [], 0.0, 0
    for size in sizes:
      chunk = slice(start, start + size)
      state, outputs, metrics = learner.step(state, x[chunk], y[chunk])
      predicted.append(outputs)
      loss += float(metrics.totals['loss'])
      start += size
    results.append((state, np.concatenate(predicted), loss))
  state, predicted, loss = results[0]
  for other, other_predicted, other_loss in results[1:]:
    assert_same_training(state, other)
    np.testing.assert_allclose(predicted, other_predicted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)


RESUME = """
import sys
import jax, numpy as np
sys.path.insert(0, {tests!r})
import test_streaming as tests
learner, x, y = tests.long_stream()
template = tests.begin(learner, x)
with np.load({saved!r}) as arrays:
  state = tests.fptt_jax.state_from_arrays(template, arrays)
state = tests.run_chunks(learner, state, x[400:], y[400:])
np.savez({resumed!r}, **tests.numbers(state))
"""


def long_stream() -> tuple[fptt_jax.Learner, np.ndarray, np.ndarray]:
  """Return a learner whose windows no chunk ends with, and 1,000 steps."""
  return make(FPTT, window_size=7, delay=2), *draw(1000)


def run_chunks(
  learner: fptt_jax.Learner, state: fptt_jax.StreamState, x: Any, y: Any
) -> fptt_jax.StreamState:
  """Learn in chunks of 100 steps."""
  for start in range(0, len(x), 100):
    chunk = slice(start, start + 100)
    state, _, _ = learner.step(state, x[chunk], y[chunk])
  return state


def test_a_stream_goes_on_in_another_process(tmp_path: Path) -> None:
  """1,000 steps are 400 steps, a file, and 600 steps in a new process, bit for bit."""
  learner, x, y = long_stream()
  half = run_chunks(learner, begin(learner, x), x[:400], y[:400])
  assert half.pending.length == 400 % 7
  saved, resumed = str(tmp_path / 'saved.npz'), str(tmp_path / 'resumed.npz')
  np.savez(saved, **numbers(half))
  tests = str(Path(__file__).parent)
  program = RESUME.format(tests=tests, saved=saved, resumed=resumed)
  subprocess.run([sys.executable, '-c', program], check=True)
  whole = numbers(run_chunks(learner, half, x[400:], y[400:]))
  with np.load(resumed) as arrays:
    assert set(arrays.files) == set(whole)
    for name in arrays.files:
      np.testing.assert_array_equal(arrays[name], whole[name], err_msg=name)


def test_late_labels_train_the_same_weights() -> None:
  """Labels of step t come with step t + delay; the windows are the same."""
  x, y = draw(12, batch_size=2)
  delay = 4
  prompt = make(window_size=3)
  expected, _, _ = prompt.step(begin(prompt, x), x, y)
  learner = make(window_size=3, delay=delay)
  state, first = learner.predict(begin(learner, x), x[:delay])
  state, _, metrics = learner.step(state, x[delay:], y[:-delay])
  assert metrics.late == metrics.unmatched == 0
  assert state.pending.length >= delay
  state, _ = learner.learn(state, y[-delay:])
  assert_same_training(state, expected, fields=('train', 'live'))
  # Nothing was learned before the first predictions.
  before = begin(learner, x).train.params
  _, outputs = ELMAN.apply(before, jnp.zeros((2, 4)), x[:delay], None, None)
  np.testing.assert_allclose(first, outputs, rtol=1e-5)


def test_labels_that_come_too_late_are_dropped_and_counted() -> None:
  """The step counts as unlabeled, and later labels still find their steps."""
  x, y = draw(5)
  learner = make(delay=1)
  # Steps 0 and 1 are older than one step when step 3 has come.
  state, _ = learner.predict(begin(learner, x), x[:4])
  state, metrics = learner.learn(state, y[:3])
  assert (metrics.late, metrics.unmatched, metrics.windows) == (2, 0, 3)
  assert metrics.totals['count'] == 1
  state, metrics = learner.learn(state, y[3:5])
  assert (metrics.late, metrics.unmatched, metrics.windows) == (0, 1, 1)

  prompt = make()
  labeled = np.array([False, False, True, True])[:, None]
  expected, _, _ = prompt.step(begin(prompt, x), x[:4], y[:4], labeled)
  assert_same_training(state, expected, fields=('train', 'live'))


def test_a_window_without_labels_moves_the_hidden_state_alone() -> None:
  """Weights, λ, W̄ and moments stay, bit for bit; the influence moves."""
  x, y = draw(4)
  learner = make(FPTT, window_size=4, influence='rtrl')
  before = begin(learner, x)
  after, outputs, metrics = learner.step(before, x, y, np.zeros((4, 1), bool))
  for field in ('params', 'opt_state'):
    a, b = getattr(after.train, field), getattr(before.train, field)
    chex.assert_trees_all_equal(a, b)
  model = ELMAN
  hidden, expected = model.apply(
    before.train.params, before.train.hidden, x, None, None
  )
  np.testing.assert_allclose(outputs, expected, rtol=1e-5)
  np.testing.assert_allclose(after.live, hidden, rtol=1e-5)
  np.testing.assert_allclose(after.train.hidden, hidden, rtol=1e-5)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(after.train.influence))
  assert metrics.totals['count'] == metrics.skipped == 0
  assert np.isnan(metrics.fast['loss'])


@pytest.mark.parametrize('missing', ['mask', 'nan'])
def test_a_missing_label_leaves_the_mean(missing: str) -> None:
  """The update is one of the mean over the labeled steps of the window."""
  x, y = draw(3, batch_size=2)
  labeled = np.ones((3, 2), bool)
  labeled[1, 0] = labeled[2] = False
  learner = make(optax.sgd(0.5), window_size=3)
  start = begin(learner, x)
  if missing == 'mask':
    state, _, metrics = learner.step(start, x, y, labeled)
  else:
    holes = np.where(labeled[..., None], y, np.nan)
    state, _, metrics = learner.step(start, x, holes)

  def objective(params: Any) -> jax.Array:
    _, outputs = ELMAN.apply(params, jnp.zeros((2, 4)), x, None, None)
    return jnp.mean((outputs - y)[np.nonzero(labeled)] ** 2)

  params = start.train.params
  expected = jax.tree.map(lambda w, g: w - 0.5 * g, params, jax.grad(objective)(params))
  chex.assert_trees_all_close(state.train.params, expected, rtol=1e-5, atol=1e-6)
  assert metrics.totals['count'] == labeled.sum()


@pytest.mark.parametrize('missing', ['mask', 'nan'])
def test_a_step_without_input_changes_nothing(missing: str) -> None:
  """The stream with gaps learns what the stream without these steps learns."""
  x, y = draw(8)
  valid = np.array([True, False, True, True, False, False, True, True])[:, None]
  learner = make()
  if missing == 'mask':
    state, outputs, metrics = learner.step(begin(learner, x), x, y, valid=valid)
  else:
    holes = np.where(valid[..., None], x, np.inf)
    state, outputs, metrics = learner.step(begin(learner, x), holes, y)
  kept = valid[:, 0]
  short, short_outputs, _ = learner.step(begin(learner, x), x[kept], y[kept])
  state = state._replace(train=state.train._replace(step_count=short.train.step_count))
  assert_same_training(state, short)
  np.testing.assert_allclose(outputs[kept], short_outputs, rtol=1e-4)
  assert not np.any(outputs[~kept])
  assert metrics.totals['count'] == kept.sum()


def test_a_row_that_starts_anew_is_a_new_stream() -> None:
  """It starts from the initial state without influence; its window is closed early."""
  x, y = draw(10)
  reset = np.zeros((10, 1), bool)
  reset[6] = True
  learner = make(window_size=4, influence='rtrl')
  state, outputs, metrics = learner.step(begin(learner, x), x, y, reset=reset)
  assert metrics.windows == 3  # Steps 0 to 3, 4 and 5, and 6 to 9.
  part, first, _ = learner.step(begin(learner, x), x[:6], y[:6])
  assert part.pending.length == 2
  # The two steps left over are a window of their own.
  padded = np.concatenate([x[4:6], x[:2]]), np.concatenate([y[4:6], y[:2]])
  valid = np.array([True, True, False, False])[:, None]
  whole, _, _ = learner.step(begin(learner, x), x[:4], y[:4])
  closed, _, _ = learner.step(whole, *padded, valid=valid)
  fresh = begin(learner, x)
  fresh = fresh._replace(
    train=closed.train._replace(
      hidden=fresh.train.hidden, influence=fresh.train.influence
    )
  )
  expected, last, _ = learner.step(fresh, x[6:], y[6:])
  assert_same_training(state, expected, fields=('train', 'live'))
  np.testing.assert_allclose(outputs, np.concatenate([first, last]), rtol=1e-4)


def test_a_model_without_a_state_learns_from_a_stream() -> None:
  """The memoryless baseline."""
  learner = make(model=linear(), window_size=2)
  x, y = draw(5, batch_size=2)
  state, outputs, metrics = learner.step(begin(learner, x), x, y)
  assert outputs.shape == y.shape
  assert metrics.totals['count'] == 8  # The fifth step waits for its window.
  assert float(jnp.abs(state.train.params['w']).max()) > 0


@functools.cache
def linear() -> fptt_jax.Model:
  return fptt_jax.Model(
    init=lambda key: {'w': jnp.zeros((2, 1))},
    initial_state=lambda batch_size: (),
    apply=lambda params, hidden, x, mask, key: (hidden, x @ params['w']),
  )


def test_rows_that_share_products_start_anew() -> None:
  """What the rows of UORO share stays where one of two starts anew."""
  shared = fptt_jax.influence.uoro(rows='together')
  learner = make(influence=shared)
  x, y = draw(4, batch_size=2)
  reset = np.array([[False, False]] * 3 + [[True, False]])
  before, *_ = learner.step(begin(learner, x), x[:3], y[:3], reset=reset[:3])
  spec = types.SimpleNamespace(model=ELMAN, keeps_influence=False)
  anew = _window.start_rows_anew(spec, before.train, jnp.array([True, False])).influence
  old = before.train.influence
  np.testing.assert_array_equal(anew.of_state[0], 0)
  np.testing.assert_array_equal(anew.of_state[1], old.of_state[1])
  jax.tree.map(np.testing.assert_array_equal, anew.of_weights, old.of_weights)
  assert optax.tree.norm(old.of_weights) > 0
  state, *_ = learner.step(before, x[3:], y[3:], reset=reset[3:])
  assert np.isfinite(numbers(state)['train/params/c']).all()


def test_rows_start_anew_by_themselves() -> None:
  """With constant weights, each row predicts like a stream of its own."""
  x, y = draw(9, batch_size=2)
  reset = np.zeros((9, 2), bool)
  reset[4, 0] = reset[5, 1] = reset[7, 1] = True
  learner = make(optax.sgd(0.0), window_size=3)
  state, outputs, _ = learner.step(begin(learner, x), x, y, reset=reset)
  model, params = ELMAN, state.train.params
  for row, borders in enumerate([(0, 4, 9), (0, 5, 7, 9)]):
    for start, end in itertools.pairwise(borders):
      part = x[start:end, row : row + 1]
      _, expected = model.apply(params, jnp.zeros((1, 4)), part, None, None)
      got = outputs[start:end, row : row + 1]
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_learned_initial_state_is_trained_where_a_row_starts_anew() -> None:
  """The reset row's window is differentiated with respect to it."""
  base = ELMAN
  model = base._replace(
    init=lambda key: base.init(key) | {'start': jnp.full((4,), 0.1)},
    learned_initial_state=lambda params, batch_size: jnp.broadcast_to(
      params['start'], (batch_size, 4)
    ),
  )
  x, y = draw(2)
  learner = make(model=model)
  state, _, _ = learner.step(begin(learner, x), x[:1], y[:1])
  runs = [
    learner.step(state, x[1:], y[1:], reset=np.full((1, 1), reset))
    for reset in (True, False)
  ]
  moved = [
    np.any(run[0].train.params['start'] != state.train.params['start']) for run in runs
  ]
  assert moved == [True, False]


def test_memory_is_constant_and_compiled_once() -> None:
  """The state has the same arrays after 10 and after 1,000 steps."""
  x, y = draw(1000)
  learner = make(window_size=2, delay=3)
  state = begin(learner, x)
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
  for t in range(1000):
    state, _, _ = learner.step(state, x[t : t + 1], y[t : t + 1])
    if t in (9, 999):
      assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
  assert learner.step._cache_size() == 1


def test_unanswered_steps_leave_constant_memory() -> None:
  """Labels that never come are waited for `delay` steps."""
  x, _ = draw(50)
  learner = make(window_size=2, delay=3)
  state, _ = learner.predict(begin(learner, x), x)
  # Steps 46 to 49 are waited for.
  assert state.pending.length == 4
  assert state.pending.owed == 46


def test_faded_metrics_are_those_of_the_predictions() -> None:
  """Sums and counts fade by the factors, once in each window with a label."""
  x, y = draw(6)
  learner = make(window_size=2, fading=(0.5, 1.0))
  labeled = np.array([True, True, False, False, True, False])[:, None]
  state, outputs, metrics = learner.step(begin(learner, x), x, y, labeled)
  errors = np.square(outputs - y)[:, 0, 0]
  fast = (0.5 * (errors[0] + errors[1]) + errors[4]) / (0.5 * 2 + 1)
  np.testing.assert_allclose(metrics.fast['loss'], fast, rtol=1e-5)
  np.testing.assert_allclose(metrics.slow['loss'], errors[[0, 1, 4]].mean(), rtol=1e-5)
  assert state.slow['count'] == 3


def test_the_drift_hook_changes_the_learning_rate() -> None:
  """It sees the faded means after each learned window, and returns a state."""
  x, y = draw(6)
  y = np.concatenate([y[:3], y[3:] + 10])

  def on_drift(
    train: fptt_jax.TrainState, fast: dict[str, Any], slow: dict[str, Any]
  ) -> fptt_jax.TrainState:
    rate = jnp.where(fast['loss'] > 2 * slow['loss'], 0.5, 0.25)
    return train._replace(opt_state=optax.tree.set(train.opt_state, learning_rate=rate))

  optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
  learner = make(optimizer, fading=(0.1, 1.0), on_drift=on_drift)
  state, rates = begin(learner, x), []
  for t in range(6):
    state, _, metrics = learner.step(state, x[t : t + 1], y[t : t + 1])
    expected = 0.5 if metrics.fast['loss'] > 2 * metrics.slow['loss'] else 0.25
    rates.append(float(optax.tree.get(state.train.opt_state, 'learning_rate')))
    assert rates[-1] == expected
  assert 0.5 in rates
  assert 0.25 in rates


def test_a_drift_hook_must_be_a_function_that_keeps_the_structure() -> None:
  with pytest.raises(TypeError, match=r'on_drift must be a function, got 0\.1'):
    make(on_drift=0.1)
  x, y = draw(1)
  learner = make(on_drift=lambda train, fast, slow: train._replace(hidden=()))
  with pytest.raises(ValueError, match='the state that on_drift returns must have the'):
    learner.step(begin(learner, x), x, y)


def test_an_update_that_is_not_finite_is_left_out() -> None:
  """The weights stay, the window is counted, and the stream goes on."""
  x, y = draw(3)
  learner = make()
  huge = y.copy()
  huge[1] = 1e30  # Its square is infinite.
  state, outputs, metrics = learner.step(begin(learner, x), x, huge)
  assert metrics.skipped == 1
  assert metrics.totals['count'] == 2
  assert np.isfinite(outputs).all()
  assert np.isfinite(metrics.fast['loss'])
  params = state.train.params
  first, _, _ = learner.step(begin(learner, x), x[:1], y[:1])
  expected, _, _ = learner.step(first, x[2:], y[2:])
  chex.assert_trees_all_close(params, expected.train.params, rtol=1e-5)


def test_without_the_guard_a_nan_goes_through() -> None:
  x, y = draw(2)
  x[0] = np.nan
  learner = make(skip_nonfinite=False)
  state, outputs, metrics = learner.step(begin(learner, x), x, y)
  assert np.isnan(outputs).all()
  assert metrics.skipped == 0
  assert np.isnan(state.train.params['v']).all()


def test_a_live_state_that_runs_away_comes_back() -> None:
  """A prediction that overflows leaves the hidden state of its row as it was."""
  model = fptt_jax.Model(
    init=lambda key: {'w': jnp.ones([])},
    initial_state=lambda batch_size: jnp.zeros((batch_size, 1)),
    apply=lambda params, h, x, mask, key: (h + params['w'] * (x * x).sum(0), x * x),
  )
  learner = make(optax.sgd(0.0), model=model, delay=5)
  x = np.array([[[1.0]], [[1e30]], [[2.0]]], np.float32)
  state, outputs = learner.predict(begin(learner, x), x)
  assert np.isinf(outputs[1]).all()
  np.testing.assert_array_equal(state.live, [[5.0]])


def test_chunks_can_be_scanned() -> None:
  """A program of several chunks is as many calls."""
  x, y = draw(12)
  learner = make(window_size=2)
  chunks = x.reshape(3, 4, 1, 2), y.reshape(3, 4, 1, 1)

  @jax.jit
  def run(state: fptt_jax.StreamState) -> tuple[fptt_jax.StreamState, jax.Array]:
    def body(state: fptt_jax.StreamState, chunk: Any) -> Any:
      state, outputs, _ = learner.step(state, *chunk)
      return state, outputs

    return jax.lax.scan(body, state, chunks)

  state, outputs = run(begin(learner, x))
  expected, expected_outputs, _ = learner.step(begin(learner, x), x, y)
  assert_same_training(state, expected)
  np.testing.assert_allclose(outputs.reshape(12, 1, 1), expected_outputs, rtol=1e-4)


def test_learners_run_side_by_side() -> None:
  """`jax.vmap` over states and streams trains each by itself."""
  x, y = draw(6, batch_size=2)
  learner = make(window_size=2)
  streams = [(x[:, row : row + 1], y[:, row : row + 1]) for row in range(2)]
  stacked = [jnp.stack(arrays) for arrays in zip(*streams, strict=True)]
  keys = jax.random.split(jax.random.key(1), 2)
  init = functools.partial(learner.init, x=streams[0][0])
  states, outputs, _ = jax.vmap(learner.step)(jax.vmap(init)(keys), *stacked)
  for row, stream in enumerate(streams):
    state, expected, _ = learner.step(init(keys[row]), *stream)
    np.testing.assert_allclose(outputs[row], expected, rtol=1e-4, atol=1e-6)
    assert_same_training(fptt_jax.take_member(states, row), state)


def absolute_error(outputs: Any, targets: Any, window: Any) -> jax.Array:
  error = jnp.abs(outputs - window.slice(targets)).mean(-1)
  return window.mean(error, window.mask)


@pytest.mark.parametrize(
  ('loss', 'labels'),
  [
    (losses.sequence_classification(3, accuracy=True), [[0], [2], [1], [1]]),
    (losses.from_function(absolute_error, terminal=False), np.ones((4, 1, 3))),
  ],
  ids=['classification', 'own'],
)
def test_other_losses(loss: losses.Loss, labels: Any) -> None:
  """The metrics are those of the predictions, by the loss's own evaluation."""
  x, y = draw(4)[0], np.asarray(labels, None)
  learner = make(model=helpers.elman(out=3), loss=loss, window_size=2)
  labeled = np.array([True, False, True, True])[:, None]
  state, outputs, metrics = learner.step(begin(learner, x), x, y, labeled)
  if loss.per_step is not None:
    expected = loss.per_step(outputs, y.astype(np.int32))['loss'][:, 0]
    assert metrics.totals['accuracy'] == sum(
      outputs[t, 0].argmax() == y[t, 0] for t in (0, 2, 3)
    )
  else:
    expected = np.abs(outputs - 1).mean((1, 2))
  total = np.sum(np.asarray(expected)[[0, 2, 3]])
  np.testing.assert_allclose(metrics.totals['loss'], total, rtol=1e-5)
  assert metrics.totals['count'] == 3
  assert np.any(state.train.params['v'] != begin(learner, x).train.params['v'])


def test_a_label_out_of_range_is_not_learned() -> None:
  """Its window moves the hidden state alone and counts as skipped."""
  x = draw(2)[0]
  learner = make(
    model=helpers.elman(out=3), loss=losses.sequence_classification(3), window_size=2
  )
  before = begin(learner, x)
  after, _, metrics = learner.step(before, x, np.array([[1], [3]]))
  chex.assert_trees_all_equal(after.train.params, before.train.params)
  assert np.any(after.train.hidden != before.train.hidden)
  assert metrics.skipped == 1
  assert metrics.totals['count'] == 0


@pytest.mark.parametrize('options', [{'inner_steps': 2}, {'dropout': 0.5}], ids=str)
def test_predictions_are_made_before_the_update_and_without_noise(
  options: dict[str, Any],
) -> None:
  """Also where the training pass has other outputs."""
  model = helpers.elman(dropout=options.get('dropout', 0.0))
  x, y = draw(4)
  learner = make(model=model, window_size=2, inner_steps=options.get('inner_steps', 1))
  state = begin(learner, x)
  _, outputs, _ = learner.step(state, x[:2], y[:2])
  _, expected = model.apply(state.train.params, jnp.zeros((1, 4)), x[:2], None, None)
  np.testing.assert_allclose(outputs, expected, rtol=1e-5)


@pytest.mark.parametrize('influence', ['none', 'rtrl'])
def test_a_window_without_labels_moves_no_weights_even_within(influence: str) -> None:
  """With inner steps and momentum: its hidden state is that of the weights before, and
  so is its influence.
  """
  x, y = draw(4)
  labeled = np.array([[True], [True], [False], [False]])
  options = dict(window_size=2, influence=influence)
  optimizer = optax.sgd(0.1, momentum=0.9)
  learner = make(optimizer=optimizer, inner_steps=2, **options)
  state, _, _ = learner.step(begin(learner, x), x[:2], y[:2])
  # One inner step has none in which weights could move early.
  single = make(optimizer=optimizer, **options)
  expected, _, _ = single.step(state, x[2:], y[2:], labeled[2:])
  got, _, _ = learner.step(state, x[2:], y[2:], labeled[2:])
  chex.assert_trees_all_equal(got.train.params, state.train.params)
  chex.assert_trees_all_equal(got.train.opt_state, state.train.opt_state)
  chex.assert_trees_all_close(got.train.hidden, expected.train.hidden, rtol=1e-6)
  chex.assert_trees_all_close(got.train.influence, expected.train.influence, rtol=1e-5)


def test_several_inputs_and_labels() -> None:
  """Inputs and labels may be trees of arrays; labels are then shown to `init`."""
  base = ELMAN

  def apply(params: Any, h: Any, x: Any, mask: Any, key: Any) -> Any:
    return base.apply(params, h, jnp.concatenate([x['a'], x['b']], -1), mask, key)

  def error(outputs: Any, targets: Any, window: Any) -> jax.Array:
    low, high = map(window.slice, targets)
    outside = jax.nn.relu(low - outputs) + jax.nn.relu(outputs - high)
    return window.mean(outside[..., 0], window.mask)

  loss = losses.from_function(error, terminal=False)
  learner = make(model=base._replace(apply=apply), loss=loss)
  x, y = draw(3)
  x, y = {'a': x[..., :1], 'b': x[..., 1:]}, (y - 1, y + 1)
  with pytest.raises(ValueError, match=r'y must be given to init.*got None'):
    begin(learner, x)
  _, outputs, metrics = learner.step(begin(learner, x, y), x, y)
  assert outputs.shape == (3, 1, 1)
  assert metrics.totals['count'] == 3


X, Y = draw(3)
BAD_CALLS: dict[str, tuple[Callable[..., Any], str]] = {
  'features': (
    lambda learner, state: learner.step(state, X[..., :1], Y),
    r'x must be float32\[3, 1, 2\].*got float32\[3, 1, 1\]',
  ),
  'dtype': (
    lambda learner, state: learner.predict(state, X.astype(np.int32)),
    r'x must be float32\[3, 1, 2\].*got int32\[3, 1, 2\]',
  ),
  'batch': (
    lambda learner, state: learner.step(state, *draw(3, batch_size=2)),
    r'x must be float32\[3, 1, 2\].*got float32\[3, 2, 2\]',
  ),
  'labels': (
    lambda learner, state: learner.learn(state, np.ones((3, 1), np.int32)),
    r'y must be float32\[3, 1, 1\].*got int32\[3, 1\]',
  ),
  'number of labels': (
    lambda learner, state: learner.step(state, X, Y[:2]),
    r'y must be of the n=3 steps of x, got 2',
  ),
  'no steps': (
    lambda learner, state: learner.predict(state, X[:0]),
    r'x must be arrays .* >= 1, got \(0, 1, 2\)',
  ),
  'mask': (
    lambda learner, state: learner.step(state, X, Y, np.ones(3, np.float32)),
    r'labeled must be bool \[n, B\] = \[3, 1\], got float32\[3\]',
  ),
  'list': (
    lambda learner, state: learner.step(state, X.tolist(), Y),
    'x must be arrays',
  ),
  'state': (
    lambda learner, state: learner.step(state.train, X, Y),
    'state must be of type fptt_jax.StreamState, got TrainState',
  ),
}


@pytest.fixture(scope='module')
def donating() -> fptt_jax.Learner:
  """A learner as users make it."""
  return fptt_jax.make_learner(ELMAN, LOSS, SGD, window_size=3)


@pytest.mark.parametrize('case', BAD_CALLS)
def test_bad_calls_are_refused_and_the_state_is_intact(
  case: str, donating: fptt_jax.Learner
) -> None:
  """The error names the argument and its value; nothing was donated or learned."""
  call, message = BAD_CALLS[case]
  state = begin(donating, X)
  before = numbers(state)
  with pytest.raises((ValueError, TypeError), match=message):
    call(donating, state)
  chex.assert_trees_all_equal(numbers(state), before)


def test_the_old_state_is_donated(donating: fptt_jax.Learner) -> None:
  """Its arrays are gone after a step, and the error says so."""
  state = begin(donating, X)
  new, _, _ = donating.step(state, X, Y)
  with pytest.raises(RuntimeError, match='was given an array that no longer exists'):
    donating.step(state, X, Y)
  # No array of the new state is in two places, so that it can be donated in turn.
  donating.step(new, X, Y)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'window_size': 0}, 'window_size must be an integer >= 1, got 0'),
    ({'delay': -1}, 'delay must be an integer >= 0, got -1'),
    ({'inner_steps': 0}, 'inner_steps must be an integer >= 1, got 0'),
    ({'fading': (0.9,)}, r'fading must be two factors in \(0, 1\], got \(0.9,\)'),
    ({'fading': (0.9, 2)}, r'fading must be two factors in \(0, 1\], got 2'),
    ({'influence': 'bptt'}, "influence must be .* got 'bptt'"),
    ({'loss': losses.terminal_regression()}, 'loss must .*last_only.: True'),
    (
      {'loss': losses.from_function(absolute_error, terminal=True)},
      'loss .*terminal.: True.*last_only.: False',
    ),
    ({'loss': 'mse'}, "loss must be of type fptt_jax.Loss.*got 'mse'"),
  ],
  ids=lambda value: str(value)[:40],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
  with pytest.raises((ValueError, TypeError), match=message):
    make(**options)


def test_integers_alone_are_a_state() -> None:
  """A counter is the whole hidden state, which cannot run away."""
  counter = fptt_jax.Model(
    init=lambda key: {'w': jnp.zeros((2, 1))},
    initial_state=lambda batch_size: jnp.zeros(batch_size, jnp.int32),
    apply=lambda params, hidden, x, mask, key: (hidden + len(x), x @ params['w']),
  )
  learner = make(model=counter, window_size=2)
  x, y = draw(4)
  state, *_ = learner.step(begin(learner, x), x, y)
  assert state.train.hidden.tolist() == [4]


@pytest.mark.parametrize('delay', [0, 3])
def test_a_state_that_ran_away_without_labels_starts_anew(delay: int) -> None:
  """One window is left out; an unlabeled step far off does not end all learning."""
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(nn.LRU(1, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs))
  )
  learner = make(model=model, window_size=2, influence='snap1', delay=delay)
  x = np.random.default_rng(0).normal(size=(16, 1, 1)).astype(np.float32)
  x[4] = 1e11
  labeled = np.ones((16, 1), bool)
  labeled[4:6] = False
  state, far, skipped = begin(learner, x), False, 0
  for t in range(16):
    state, _ = learner.predict(state, x[t : t + 1])
    if t >= delay:
      late = slice(t - delay, t - delay + 1)
      state, metrics = learner.learn(state, x[late], labeled[late])
      far |= bool(np.abs(state.train.hidden[0]).max() > 1e6)
      skipped += int(metrics.skipped)
  assert far
  assert skipped == 1
  for hidden in (state.train.hidden, state.live):
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(hidden)) < 1e3
