"""The train step against plain Python loops and plain jax.grad, in float64 where
numbers are compared.
"""

from collections.abc import Callable
import functools
import itertools
from typing import Any, NamedTuple

import chex
import helpers
from helpers import quick_trainer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import Batch, WindowView, losses
from fptt_jax._summary import find_states

F64 = dict(rtol=1e-10, atol=1e-12)
TIGHT = dict(rtol=1e-12, atol=1e-13)
GOOD = helpers.regression_batch(6, 2)
in_float64 = pytest.mark.usefixtures('x64')
double = functools.partial(helpers.elman, dtype=np.float64)


class Recorder(NamedTuple):
  """State of `record`: how many updates there were, and each one's gradient and
  `value`.
  """

  updates: jax.Array
  grads: Any
  values: jax.Array


def record(num_updates: int) -> optax.GradientTransformationExtraArgs:
  """Leaves the parameters where they are and keeps every gradient, so that all updates
  of a step are seen at the same W.
  """

  def init(params):
    grads = jax.tree.map(lambda p: jnp.zeros((num_updates, *p.shape), p.dtype), params)
    return Recorder(jnp.zeros([], jnp.int32), grads, jnp.zeros(num_updates))

  def update(grads, state, params=None, *, value, **extra_args):
    stored = jax.tree.map(
      lambda all_grads, g: all_grads.at[state.updates].set(g), state.grads, grads
    )
    return optax.tree.zeros_like(grads), Recorder(
      state.updates + 1, stored, state.values.at[state.updates].set(value)
    )

  return optax.GradientTransformationExtraArgs(init, update)


def run(
  trainer: fptt_jax.Trainer, *batches: Batch
) -> tuple[fptt_jax.TrainState, fptt_jax.StepMetrics]:
  """A step on each batch from seed 0: the last state and metrics."""
  state = trainer.init(jax.random.key(0), batches[0])
  for batch in batches:
    state, metrics = trainer.step(state, batch)
  return state, metrics


def by_hand(
  model: fptt_jax.Model,
  loss: losses.Loss,
  optimizer: optax.GradientTransformation,
  state: fptt_jax.TrainState,
  batch: Batch,
  cuts: list[int],
  inner_steps: int = 1,
  last_only: bool = False,
) -> tuple[fptt_jax.TrainState, fptt_jax.StepMetrics]:
  """Algorithm 2 as a Python loop. Windows have their true lengths: none is padded,
  only what lies past a sequence's end is masked. `last_only` asks the model as the
  trainer does, since what dropout draws depends on the outputs' shape.
  """
  num_steps, batch_size = batch.inputs.shape[:2]
  lengths = (
    jnp.full(batch_size, num_steps, jnp.int32)
    if batch.lengths is None
    else jnp.asarray(batch.lengths)
  )
  optimizer = optax.with_extra_args_support(optimizer)
  key = jax.random.fold_in(state.key, state.step_count)
  params, opt_state, loss_state, hidden = (
    state.params,
    state.opt_state,
    state.loss_state,
    model.initial_state(batch_size),
  )

  @helpers.quick
  def one_step(params, opt_state, hidden, loss_state, x, k, start, end):
    mask = (start + jnp.arange(len(x)))[:, None] < lengths[None, :]
    window = WindowView(
      k=k,
      num_windows=len(cuts) - 1,
      num_steps=num_steps,
      size=len(x),
      ragged=batch.lengths is not None,
      masked=batch.lengths is not None,
      start=start,
      end=end,
      lengths=lengths,
      seen=jnp.minimum(lengths, end),
      active=mask.any(0),
      last=jnp.clip(jnp.minimum(lengths, end) - start - 1, 0, len(x) - 1)
      if batch.lengths is not None
      else len(x) - 1,
      mask=mask,
    )

    def objective(params):
      only = (window.last,) if last_only else ()
      new_hidden, outputs = (model.apply_last if last_only else model.apply)(
        params, hidden, x, mask, jax.random.fold_in(key, k), *only
      )
      value, new_loss_state = loss.apply(outputs, batch.targets, window, loss_state)
      return value, (
        new_hidden,
        new_loss_state,
        loss.measure(outputs, batch.targets, window),
      )

    (value, aux), grads = jax.value_and_grad(objective, has_aux=True)(params)
    again = lambda p: jax.grad(objective, has_aux=True)(p)[0]
    changes, opt_state = optimizer.update(
      grads, opt_state, params, value=value, grad_fn=again, inner_steps=inner_steps
    )
    return (
      optax.apply_updates(params, changes),
      opt_state,
      aux,
      value,
      optax.tree.norm(grads),
    )

  values, norms, totals = [], [], []
  for k, (start, end) in enumerate(itertools.pairwise(cuts)):
    if start >= max(np.asarray(lengths)):
      values, norms = [*values, 0.0], [*norms, 0.0]
      continue
    for _ in range(inner_steps):
      place = [jnp.int32(n) for n in (k, start, end)]
      params, opt_state, aux, value, norm = one_step(
        params, opt_state, hidden, loss_state, batch.inputs[start:end], *place
      )
    hidden, loss_state, measured = aux
    values, norms, totals = [*values, value], [*norms, norm], [*totals, measured]
  totals, skipped = (
    jax.tree.map(lambda *t: sum(t), *totals),
    np.zeros(len(values), bool),
  )
  lambda_norm = optax.tree.norm([state.lam for state in find_states(opt_state)]).astype(
    jnp.float32
  )
  metrics = fptt_jax.StepMetrics(
    jnp.stack(values), jnp.stack(norms), totals, skipped, lambda_norm, invalid=skipped
  )
  return state._replace(
    params=params,
    opt_state=opt_state,
    hidden=hidden,
    loss_state=loss_state,
    step_count=state.step_count + 1,
  ), metrics


def mean_absolute_error(outputs, targets, window):
  error = jnp.abs(outputs - window.slice(targets)).mean(-1)
  return jnp.sum(error, where=window.mask) / jnp.maximum(window.mask.sum(), 1)


def same(got: Any, expected: Any, **tolerance: float) -> None:
  """Trees of equal numbers; typed keys by their data."""

  def number(x: Any) -> np.ndarray:
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)

  chex.assert_trees_all_close(
    jax.tree.map(number, got), jax.tree.map(number, expected), **(tolerance or F64)
  )


# The scan over windows is Algorithm 2.


@in_float64
@pytest.mark.parametrize(
  ('loss', 'batch', 'out'),
  [
    (losses.terminal_classification(3, ema_decay=0.5), helpers.label_batch, 3),
    (losses.sequence_classification(3, accuracy=True), helpers.tagging_batch, 3),
    (losses.from_function(mean_absolute_error), helpers.series_batch, 1),
  ],
  ids=['terminal_classification', 'sequence_classification', 'from_function'],
)
def test_step_equals_a_python_loop(loss, batch, out):
  """Two steps of FPTT on uneven windows (2, 3, 2, 3) of ragged sequences give the state
  and metrics of the loop above: the padded step of a short window and all masks leave
  nothing behind, and the second step goes on where the first ended.
  """
  model, optimizer = double(out=out), fptt_jax.fptt(optax.adam(1e-2), alpha=0.5)
  lengths = np.array([10, 3, 7], np.int32)
  first, second = (
    batch(10, 3, seed=seed, dtype=np.float64)._replace(lengths=lengths)
    for seed in (0, 1)
  )
  trainer = quick_trainer(model, loss, optimizer, num_windows=4)
  expected = trainer.init(jax.random.key(0), first)
  for data in (first, second):
    expected, expected_metrics = by_hand(
      model, loss, optimizer, expected, data, [0, 2, 5, 7, 10]
    )
  state, metrics = run(trainer, first, second)
  same(state, expected)
  same(metrics._replace(totals=None), expected_metrics._replace(totals=None))
  same(metrics.totals, expected_metrics.totals, rtol=1e-6)  # Totals are float32 sums.


@in_float64
def test_lstm_step_equals_a_python_loop():
  """The same for an LSTM with dropout on even windows, not ragged: masks of dropout
  come from the window's own key.
  """
  model, optimizer = (
    helpers.lstm(dtype=jnp.float64, dropout=0.3),
    fptt_jax.fptt(optax.sgd(0.1, momentum=0.9)),
  )
  loss, batch = (
    losses.terminal_regression(),
    helpers.regression_batch(6, 3, dtype=np.float64),
  )
  trainer = quick_trainer(model, loss, optimizer, num_windows=3)
  expected = by_hand(
    model,
    loss,
    optimizer,
    trainer.init(jax.random.key(0), batch),
    batch,
    [0, 2, 4, 6],
    last_only=True,
  )
  state, metrics = run(trainer, batch)
  same(
    (state, metrics._replace(totals=None)),
    (expected[0], expected[1]._replace(totals=None)),
  )


@pytest.mark.slow
def test_step_is_the_same_without_compilation():
  """Under jax.disable_jit every scan is a Python loop, run operation by operation: same
  numbers.
  """
  squares = losses.from_function(
    lambda outputs, targets, window: jnp.mean(outputs * outputs)
  )
  trainer = quick_trainer(
    helpers.elman(), squares, optax.sgd(0.1), method='tbptt', num_windows=2
  )
  start = trainer.init(jax.random.key(0), GOOD)
  batch = Batch(GOOD.inputs[:2], GOOD.targets)
  with jax.disable_jit():
    got = trainer.step(start, batch)
  same(got, trainer.step(start, batch), rtol=1e-5, atol=1e-6)


# Gradients, method by method.


def lstm_outputs(params: Any, x: np.ndarray) -> jax.Array:
  """The LSTM of `helpers.lstm`, unrolled from its equations."""
  lstm, head = params['layers'][0], params['layers'][2]
  h = c = jnp.zeros((x.shape[1], lstm['w_h'].shape[0]), x.dtype)
  outputs = []
  for x_t in x:
    i, f, g, o = jnp.split(
      x_t @ lstm['w_x'] + h @ lstm['w_h'] + lstm['bias'][None], 4, axis=-1
    )
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    outputs.append(h @ head['kernel'] + head['bias'][None])
  return jnp.stack(outputs)


@in_float64
@pytest.mark.parametrize(
  ('method', 'options'), [('bptt', {}), ('tbptt', {'num_windows': 1})]
)
def test_one_window_has_bptts_gradient(method, options):
  """K = 1: the gradient is back-propagation through the whole unrolled sequence, and
  grad_norm its global norm.
  """
  batch = helpers.regression_batch(6, 3, dtype=np.float64)
  trainer = quick_trainer(
    helpers.lstm(dtype=jnp.float64),
    losses.terminal_regression(),
    record(1),
    method=method,
    **options,
  )
  objective = lambda params: jnp.mean(
    (lstm_outputs(params, batch.inputs)[-1, :, 0] - batch.targets) ** 2
  )
  value, expected = helpers.quick(jax.value_and_grad(objective))(
    trainer.init(jax.random.key(0), batch).params
  )
  state, metrics = run(trainer, batch)
  assert int(state.opt_state.updates) == 1
  same(jax.tree.map(lambda g: g[0], state.opt_state.grads), expected)
  same((metrics.loss[0], state.opt_state.values[0]), (value, value))
  same(
    metrics.grad_norm[0],
    np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(expected))),
  )


def window_losses(
  params: Any, batch: Batch, cuts: list[int], terminal: bool, stop: tuple[int, ...]
) -> jax.Array:
  """The windows' losses [K] of `helpers.elman`, each sequence run alone and unpadded
  in a Python loop.

  Terminal: β · squared error of the window's last output, β = t/length; else the
  squared error of each step; the mean is over what there is in a window, 0 if there is
  nothing. The gradient is stopped before the steps in `stop`.
  """
  num_steps, batch_size = batch.inputs.shape[:2]
  lengths = [num_steps] * batch_size if batch.lengths is None else batch.lengths
  terms = [[] for _ in cuts[1:]]
  for row, length in enumerate(lengths):
    h = jnp.zeros(params['b'].shape)
    for t in range(length):
      h = jax.lax.stop_gradient(h) if t in stop else h
      h = jnp.tanh(batch.inputs[t, row] @ params['a'] + h @ params['c'] + params['b'])
      k = int(np.searchsorted(cuts, t, side='right')) - 1
      target = batch.targets[row] if terminal else batch.targets[t, row, 0]
      error = ((h @ params['v'])[0] - target) ** 2
      if not terminal:
        terms[k].append(error)
      elif t + 1 in (cuts[k + 1], length):
        terms[k].append((t + 1) / length * error)
  return jnp.stack([sum(term) / max(len(term), 1) + 0.0 for term in terms])


@in_float64
@pytest.mark.parametrize(
  ('method', 'options', 'stop', 'objectives'),
  [
    ('tbptt', {'num_windows': 3}, (2, 4), np.eye(3)),
    ('bptt_aux', {'num_windows': 3}, (), np.ones((1, 3))),
    (
      'ftrl',
      {'num_windows': 3},
      (),
      (np.tril(np.ones((3, 3))) / np.arange(1, 4)[:, None]),
    ),
    ('tbptt_final', {'truncation_steps': 3}, (4,), np.array([[0, 0, 1]])),
    (
      'tbptt',
      {'num_windows': 3, 'loss_weights': [0.5, 2, 0]},
      (2, 4),
      np.diag([0.5, 2, 0]),
    ),
    (
      'bptt_aux',
      {'num_windows': 3, 'loss_weights': [0.5, 2, 0]},
      (),
      np.array([[0.5, 2, 0]]),
    ),
  ],
  ids=[
    'tbptt',
    'bptt_aux',
    'ftrl',
    'tbptt_final',
    'tbptt weighted',
    'bptt_aux weighted',
  ],
)
def test_each_methods_gradient(method, options, stop, objectives):
  """At the same W, the u-th update's objective and gradient are those of its
  combination of the windows' losses: window by window with the gradient stopped at
  borders (tbptt), their sum (bptt_aux), the mean of those so far (ftrl), the last with
  the gradient stopped at T - k (tbptt_final); windows here are (2, 2, 3).
  """
  batch = helpers.regression_batch(7, 2, dtype=np.float64)
  trainer = quick_trainer(
    double(),
    losses.terminal_regression(),
    record(len(objectives)),
    method=method,
    **options,
  )
  combined = lambda params: (
    objectives @ window_losses(params, batch, [0, 2, 4, 7], True, stop)
  )
  params = trainer.init(jax.random.key(0), batch).params
  values, grads = helpers.quick(lambda p: (combined(p), jax.jacrev(combined)(p)))(
    params
  )
  state, metrics = run(trainer, batch)
  assert int(state.opt_state.updates) == len(objectives)
  same(state.params, params)
  same(state.opt_state.grads, grads)
  same((metrics.loss, state.opt_state.values), (values, values))
  same(
    metrics.grad_norm,
    np.sqrt(
      sum(np.sum(np.square(g).reshape(len(g), -1), -1) for g in jax.tree.leaves(grads))
    ),
  )


@in_float64
@pytest.mark.parametrize('terminal', [True, False])
def test_mixed_lengths_equal_the_sequences_one_by_one(terminal):
  """Losses and gradients of a ragged batch are the means over what each sequence gives
  alone, unpadded: a sequence that has ended adds neither a term nor to the number
  divided by, and its last window's output is its own last.
  """
  make = helpers.regression_batch if terminal else helpers.series_batch
  batch = make(7, 3, dtype=np.float64)._replace(lengths=np.array([3, 5, 2], np.int32))
  loss = losses.terminal_regression() if terminal else losses.sequence_regression()
  trainer = quick_trainer(double(), loss, record(3), method='tbptt', num_windows=3)
  expected = functools.partial(
    window_losses, batch=batch, cuts=[0, 2, 4, 7], terminal=terminal, stop=(2, 4)
  )
  params = trainer.init(jax.random.key(0), batch).params
  values, grads = helpers.quick(lambda p: (expected(p), jax.jacrev(expected)(p)))(
    params
  )
  state, metrics = run(trainer, batch)
  same(state.opt_state.grads, grads)
  same(metrics.loss, values)


def test_no_gradient_crosses_a_border():
  """The second window's loss has gradient exactly 0 for inputs of the first window,
  though its value depends on them; with the gradient taken from the start (bptt_aux,
  ftrl, only the second loss weighted) it does not. A learning rate above 0 lets it
  through the update, so the zeros are not for want of a path. Nor does a gradient leave
  through the state's hidden.
  """
  batch = helpers.regression_batch(6, 2)

  def function(
    method: str, rate: float, weights: list[float]
  ) -> Callable[[jax.Array], Any]:
    trainer = fptt_jax.make_trainer(
      helpers.elman(),
      losses.terminal_regression(),
      optax.sgd(rate),
      method=method,
      num_windows=2,
      loss_weights=weights,
    )
    start = trainer.init(jax.random.key(0), batch)

    def second_loss(inputs):
      state, metrics = trainer.step(start, batch._replace(inputs=inputs))
      return metrics.loss[-1], state.hidden

    return second_loss

  def gradient(*arguments) -> np.ndarray:
    return np.asarray(
      helpers.quick(jax.grad(function(*arguments), has_aux=True))(batch.inputs)[0]
    )

  @helpers.quick
  def both(inputs):
    (value, hidden), pull_back = jax.vjp(function('tbptt', 0.0, [1, 1]), inputs)
    one, ones = jnp.ones_like(value), jnp.ones_like(hidden)
    return value, pull_back((one, 0 * ones))[0], pull_back((0 * one, ones))[0]

  value, loss_gradient, hidden_gradient = both(batch.inputs)
  moved = batch.inputs.copy()
  moved[:3] += 0.1
  assert abs(both(moved)[0] - value) > 1e-4
  np.testing.assert_array_equal(loss_gradient[:3], 0)
  np.testing.assert_array_equal(hidden_gradient, 0)
  assert np.any(loss_gradient[3:], axis=-1).all()
  assert np.any(gradient('tbptt', 0.1, [1, 1])[:3], axis=-1).all()
  for method in ('bptt_aux', 'ftrl'):
    assert np.any(gradient(method, 0.0, [0, 1])[:3], axis=-1).all()


# Masks.


@in_float64
def test_ragged_batch_equals_the_shorter_one():
  """Where all sequences end after L = 6 of T = 9 steps, with windows of 3 in both, a
  step does what it does on L steps: the third window moves neither parameters, Adam's
  moments, λ, W̄, their step counts, nor hidden and loss state.
  """
  loss = losses.terminal_classification(3, ema_decay=0.5)
  trainer = quick_trainer(
    double(out=3), loss, fptt_jax.fptt(optax.adam(1e-2)), window_size=3
  )
  long = helpers.label_batch(9, 2, dtype=np.float64)._replace(
    lengths=np.array([6, 6], np.int32)
  )
  short = Batch(long.inputs[:6], long.targets)
  padded, padded_metrics = run(trainer, long, long)
  state, metrics = run(trainer, short, short)
  assert int(padded.opt_state.step_count) == 4
  same(padded._replace(loss_state=None), state._replace(loss_state=None), **TIGHT)
  same(padded.loss_state['q'][:2], state.loss_state['q'], **TIGHT)
  np.testing.assert_allclose(padded.loss_state['q'][2], 1 / 3, rtol=1e-12)
  same(
    (padded_metrics.loss[:2], padded_metrics.grad_norm[:2]),
    (metrics.loss, metrics.grad_norm),
    **TIGHT,
  )
  assert (padded_metrics.loss[2], padded_metrics.grad_norm[2]) == (0, 0)
  same(padded_metrics.totals, metrics.totals)


@pytest.mark.parametrize('method', ['fptt', 'ftrl'])
def test_nothing_past_the_end_matters(method):
  """NaN, infinity and impossible labels past a sequence's end change no bit of state,
  metrics or evaluation.
  """
  lengths = np.array([7, 3, 4], np.int32)
  past = np.arange(10)[:, None] >= lengths
  clean = helpers.tagging_batch(10, 3)._replace(lengths=lengths)
  inputs, labels = clean.inputs.copy(), clean.targets.copy()
  inputs[past] = np.resize([np.nan, np.inf, -np.inf, 1e30], (past.sum(), 2))
  labels[past] = np.resize([-1, 999], past.sum())
  optimizer = fptt_jax.fptt(optax.adam(1e-2)) if method == 'fptt' else optax.adam(1e-2)
  trainer = quick_trainer(
    helpers.elman(out=3),
    losses.sequence_classification(3),
    optimizer,
    method=method,
    num_windows=4,
  )
  state, metrics = run(trainer, clean, clean)
  dirty_state, dirty_metrics = run(
    trainer, Batch(inputs, labels, lengths), Batch(inputs, labels, lengths)
  )
  chex.assert_tree_all_finite(state._replace(key=None))
  chex.assert_trees_all_equal(dirty_state._replace(key=None), state._replace(key=None))
  chex.assert_trees_all_equal(dirty_metrics, metrics)
  if method == 'fptt':
    chex.assert_trees_all_equal(
      trainer.evaluate(state.params, Batch(inputs, labels, lengths)),
      trainer.evaluate(state.params, clean),
    )


def test_real_targets_past_the_end_do_not_matter():
  """As for inputs: NaN targets past the end leave the gradient finite."""
  batch = helpers.series_batch(4, 2)._replace(lengths=np.array([4, 3], np.int32))
  batch.targets[3, 1] = np.nan
  trainer = quick_trainer(
    helpers.elman(), losses.sequence_regression(), optax.sgd(0.1), method='bptt'
  )
  assert np.isfinite(run(trainer, batch)[1].grad_norm).all()


# Methods that must agree.


@functools.cache
def two_windows(method: str, regularized: bool) -> fptt_jax.Trainer:
  adam = optax.adam(1e-2)
  return quick_trainer(
    double(),
    losses.terminal_regression(),
    fptt_jax.fptt(adam) if regularized else adam,
    method=method,
    num_windows=2,
  )


@in_float64
def test_one_window_is_one_method():
  """With one window of the whole sequence tbptt, bptt, bptt_aux, ftrl and tbptt_final
  (all steps differentiated) are the same.
  """
  batch = helpers.regression_batch(4, 2, dtype=np.float64)
  make = functools.partial(
    quick_trainer, double(), losses.terminal_regression(), optax.adam(1e-2)
  )
  expected = run(make(method='bptt'), batch)
  for options in (
    dict(method='tbptt', num_windows=1),
    dict(method='bptt_aux', num_windows=1),
    dict(method='ftrl', window_size=4),
    dict(method='tbptt_final', truncation_steps=4),
  ):
    same(run(make(**options), batch), expected, **TIGHT)


@in_float64
def test_first_updates_agree():
  """Sequences that end with the first window leave the one update of it: fptt's (λ = 0,
  W = W̄) and ftrl's (the mean of one loss) are tbptt's. From the second update on, all
  three go their own ways.
  """
  batch = helpers.regression_batch(6, 2, dtype=np.float64)
  one, two = (batch._replace(lengths=np.full(2, n, np.int32)) for n in (3, 6))
  first = {
    name: run(two_windows(name, name == 'fptt'), one)[0]
    for name in ('tbptt', 'fptt', 'ftrl')
  }
  same(first['fptt'].params, first['tbptt'].params, **TIGHT)
  same(first['fptt'].opt_state.base_optimizer_state, first['tbptt'].opt_state, **TIGHT)
  same(
    (first['ftrl'].params, first['ftrl'].opt_state),
    (first['tbptt'].params, first['tbptt'].opt_state),
    **TIGHT,
  )
  both = {name: run(two_windows(name, name == 'fptt'), two)[0].params for name in first}
  for one_name, other in (('tbptt', 'fptt'), ('tbptt', 'ftrl'), ('fptt', 'ftrl')):
    assert np.abs(both[one_name]['c'] - both[other]['c']).max() > 1e-5


@in_float64
def test_methods_are_told_apart_by_their_settings_only():
  """A Method given as a value is the method of that name, bit for bit: names are only
  names.
  """
  batch = helpers.regression_batch(6, 2, dtype=np.float64)._replace(
    lengths=np.full(2, 6, np.int32)
  )
  expected = run(two_windows('tbptt', False), batch)
  chex.assert_trees_all_equal(
    run(two_windows(fptt_jax.METHODS['tbptt'], False), batch), expected
  )


@in_float64
def test_one_update_may_take_gradients_of_windows_alone():
  """A method of one's own: the sum of the windows' gradients, each cut at its border,
  in one step. It is that of truncated BPTT at fixed weights.
  """
  batch = helpers.regression_batch(6, 2, dtype=np.float64)

  def gradients(method, num_updates):
    trainer = quick_trainer(
      double(),
      losses.terminal_regression(),
      record(num_updates),
      method=method,
      num_windows=3,
    )
    state, _ = run(trainer, batch)
    return jax.tree.map(lambda g: g.sum(0), state.opt_state.grads)

  expected = gradients('tbptt', 3)
  same(gradients(fptt_jax.Method(False, False, False), 1), expected, **TIGHT)
  assert np.abs(gradients('bptt_aux', 1)['c'] - expected['c']).max() > 1e-5


def test_a_method_names_its_windows():
  with pytest.raises(ValueError, match=r"num_windows of a Method must be .*'bogus'"):
    two_windows(fptt_jax.Method(False, True, False, num_windows='bogus'), False)
  with pytest.raises(
    ValueError, match=r"method 'custom' takes neither of .*'num_windows': 2"
  ):
    fptt_jax.make_trainer(
      helpers.elman(),
      losses.terminal_regression(),
      optax.sgd(0.1),
      method=fptt_jax.Method(False, False, False, truncated=True),
      num_windows=2,
      truncation_steps=2,
    )


def test_a_method_goes_by_its_true_name():
  """'fptt' around which no fptt(...) stands, and the other way round, would be reported
  as what it is not.
  """
  plain, wrapped = (
    optax.sgd(0.1),
    optax.chain(optax.clip_by_global_norm(1.0), fptt_jax.fptt(optax.sgd(0.1))),
  )
  for optimizer, method, message in (
    (
      plain,
      'fptt',
      r"optimizer must be one with fptt.*got one without it.*'fptt'",
    ),
    (
      wrapped,
      'bptt',
      r"optimizer must be one without fptt.*got one with it.*'bptt'",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      fptt_jax.make_trainer(
        helpers.elman(), losses.terminal_regression(), optimizer, method=method
      )


@in_float64
def test_ogd_updates_each_step():
  """Online gradient descent is tbptt with K = T."""
  batch = helpers.series_batch(4, 2, dtype=np.float64)
  make = functools.partial(
    quick_trainer, double(), losses.sequence_regression(), optax.sgd(0.1)
  )
  got = run(make(method='ogd'), batch)
  chex.assert_shape(got[1].loss, (4,))
  same(got, run(make(method='tbptt', num_windows=4), batch), **TIGHT)


# The hidden state between batches, and between inner steps.


@in_float64
def test_carried_hidden_state_joins_batches():
  """With carry_hidden two batches of T steps in K windows are one of 2T in 2K: same
  parameters, FPTT state, hidden, losses.
  """
  whole = helpers.series_batch(8, 2, dtype=np.float64)
  halves = [Batch(whole.inputs[i : i + 4], whole.targets[i : i + 4]) for i in (0, 4)]
  make = functools.partial(
    quick_trainer,
    double(),
    losses.sequence_regression(),
    fptt_jax.fptt(optax.adam(1e-2)),
    window_size=2,
    carry_hidden=True,
  )
  state, metrics = run(make(), *halves)
  expected, expected_metrics = run(make(), whole)
  same(state._replace(step_count=0), expected._replace(step_count=0), **TIGHT)
  assert (int(state.step_count), int(expected.step_count)) == (2, 1)
  same(metrics.loss, expected_metrics.loss[2:], **TIGHT)


def test_hidden_state_starts_anew_unless_carried():
  """Without carry_hidden a step does not read state.hidden, garbage in it changes no
  bit; with it, it does. `end_epoch` sets it to the model's initial state."""
  batch = helpers.series_batch(4, 2)
  for carry in (False, True):
    trainer = quick_trainer(
      helpers.elman(),
      losses.sequence_regression(),
      optax.sgd(0.1),
      method='tbptt',
      num_windows=2,
      carry_hidden=carry,
    )
    start = trainer.init(jax.random.key(0), batch)
    params = trainer.step(start, batch)[0].params
    state, _ = trainer.step(start._replace(hidden=jnp.ones_like(start.hidden)), batch)
    equal = [
      np.array_equal(a, b)
      for a, b in zip(
        jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True
      )
    ]
    assert not any(equal) if carry else all(equal)
    assert np.any(state.hidden)
    ended = trainer.end_epoch(state)
    np.testing.assert_array_equal(ended.hidden, np.zeros((2, 4)))
    chex.assert_trees_all_equal(
      ended._replace(hidden=None, key=None), state._replace(hidden=None, key=None)
    )


def test_end_epoch_does_the_losses_work():
  """The loss's own end_epoch runs: the last_epoch table takes over the sums."""
  batch = helpers.label_batch(2, 4)
  trainer = quick_trainer(
    helpers.elman(out=3),
    losses.terminal_classification(3, divergence='last_epoch'),
    optax.sgd(0.1),
    method='bptt',
  )
  state, _ = run(trainer, batch)
  seen = np.unique(batch.targets)
  expected = np.asarray(
    state.loss_state['sum'] / np.maximum(state.loss_state['count'], 1)[..., None]
  )[0, seen]
  ended = trainer.end_epoch(state)
  np.testing.assert_allclose(ended.loss_state['q'][0, seen], expected, rtol=1e-6)
  assert np.abs(expected - 1 / 3).max() > 0.01


@in_float64
def test_inner_steps_start_from_the_same_state_with_the_same_key():
  """n gradient steps a window: each from the window's own hidden state, loss state and
  dropout mask; W̄ and λ move once; the hidden and loss state carried on are the last
  pass's.
  """
  model, optimizer = (
    double(out=3, dropout=0.5),
    fptt_jax.fptt(optax.sgd(0.2)),
  )
  loss = losses.terminal_classification(3, ema_decay=0.5)
  batch = helpers.label_batch(4, 3, dtype=np.float64)
  trainer = quick_trainer(model, loss, optimizer, num_windows=2, inner_steps=3)
  expected, expected_metrics = by_hand(
    model,
    loss,
    optimizer,
    trainer.init(jax.random.key(0), batch),
    batch,
    [0, 2, 4],
    inner_steps=3,
  )
  state, metrics = run(trainer, batch)
  assert int(state.opt_state.step_count) == 6
  same(
    (state, metrics.loss, metrics.grad_norm),
    (expected, expected_metrics.loss, expected_metrics.grad_norm),
  )


@in_float64
def test_explicit_gradient_is_taken_from_the_windows_own_start():
  """After a step with gradient_estimate='recomputed' λ is the gradient of the last
  window's loss at W_{t+1}, the parameters now, from the hidden state that window
  started from, under the dropout mask it had.
  """
  model, batch = double(dropout=0.5), helpers.regression_batch(4, 3, dtype=np.float64)
  trainer = quick_trainer(
    model,
    losses.terminal_regression(),
    fptt_jax.fptt(optax.sgd(0.2), gradient_estimate='recomputed'),
    num_windows=2,
  )
  start = trainer.init(jax.random.key(0), batch)
  key = jax.random.fold_in(start.key, 0)
  hidden, _ = model.apply(
    start.params,
    model.initial_state(3),
    batch.inputs[:2],
    None,
    jax.random.fold_in(key, 0),
  )

  def objective(params):
    _, outputs = model.apply(
      params, hidden, batch.inputs[2:], None, jax.random.fold_in(key, 1)
    )
    return jnp.mean((outputs[-1, :, 0] - batch.targets) ** 2)

  state, _ = trainer.step(start, batch)
  same(state.opt_state.lam, helpers.quick(jax.grad(objective))(state.params))


# Updates that are not finite.


def remembering(loss: losses.Loss) -> losses.Loss:
  """`loss` with a state: the sum of its values."""

  def apply(outputs, targets, window, seen):
    value, _ = loss.apply(outputs, targets, window, ())
    return value, seen + jax.lax.stop_gradient(value)

  return loss._replace(init=lambda num_windows: jnp.zeros([]), apply=apply)


@functools.cache
def skipping(method: str, skip_nonfinite: bool = True) -> fptt_jax.Trainer:
  """Adam behind a clip, and two windows where the method leaves K open."""
  options = {'truncation_steps': 2} if method == 'tbptt_final' else {}
  if method != 'tbptt_final' and fptt_jax.METHODS[method].num_windows is None:
    options = {'num_windows': 2}
  base = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
  optimizer = fptt_jax.fptt(base) if method == 'fptt' else base
  loss = remembering(losses.sequence_regression())
  options |= {'method': method, 'carry_hidden': True, 'skip_nonfinite': skip_nonfinite}
  return quick_trainer(helpers.elman(), loss, optimizer, **options)


def spoiled(batch: Batch, kind: str) -> Batch:
  """The second row's objective is not finite, or (infinite inputs, of which tanh is 1
  and its gradient NaN) just its gradient.
  """
  inputs, targets = batch.inputs.copy(), batch.targets.copy()
  if kind == 'target':
    targets[:, 1] = 1e25  # Its square is infinite.
  else:
    inputs[:, 1, 0] = {'NaN': np.nan, 'infinity': np.inf}[kind]
  return batch._replace(inputs=inputs, targets=targets)


def train(
  trainer: fptt_jax.Trainer, batches: list[Batch]
) -> tuple[tuple[Any, ...], dict[str, jax.Array], fptt_jax.StepMetrics]:
  """What changes in a state, the totals, and all metrics."""
  state, seen = trainer.init(jax.random.key(0), batches[0]), []
  for batch in batches:
    state, metrics = trainer.step(state, batch)
    seen.append(metrics)
  metrics = jax.tree.map(lambda *leaves: np.stack(leaves), *seen)
  return state[:4], jax.tree.map(lambda total: total.sum(0), metrics.totals), metrics


@pytest.mark.parametrize('kind', ['NaN', 'infinity', 'target'])
@pytest.mark.parametrize('method', fptt_jax.METHODS)
def test_a_skipped_update_leaves_no_trace(method, kind):
  """Parameters, optimizer, hidden and loss state are, bit for bit, what they are
  without it, and totals but for the order in which they are summed up. Where each
  window has an update, two sequences with a good half each are one good sequence; else
  a bad sequence may as well not be there.
  """
  first, second = (helpers.series_batch(6, 3, seed=seed) for seed in (0, 1))
  bad = spoiled(first, kind)
  if fptt_jax.METHODS[method].update_each_window and method != 'ftrl':
    halves = lambda a, b: jax.tree.map(
      lambda x, y: np.concatenate([x[:3], y[3:]]), a, b
    )
    batches = [first, halves(second, bad), halves(bad, second), first]
    skipped = [[False, False], [False, True], [True, False], [False, False]]
  else:
    batches, skipped = [first, bad, second, first], [[False], [True], [False], [False]]
  trainer = skipping(method)
  state, totals, metrics = train(trainer, batches)
  expected, expected_totals, _ = train(trainer, [first, second, first])
  chex.assert_trees_all_equal(state, expected)
  chex.assert_trees_all_close(totals, expected_totals, rtol=1e-6)
  chex.assert_tree_all_finite((state, totals, metrics.lambda_norm))
  np.testing.assert_array_equal(
    metrics.skipped, np.repeat(skipped, metrics.skipped.shape[1] // len(skipped[0]), 1)
  )
  assert np.isfinite(metrics.loss[metrics.skipped]).all() == (kind == 'infinity')
  assert not np.isfinite(metrics.grad_norm[metrics.skipped]).any()
  if (
    kind == 'NaN' and method == 'fptt'
  ):  # Without the policy it does, and nothing counts as skipped.
    state, totals, metrics = train(skipping(method, skip_nonfinite=False), batches)
    assert not any(
      np.isfinite(leaf).any()
      for leaf in jax.tree.leaves((state[0], state[2:], totals['loss']))
    )
    assert not metrics.skipped.any()


def test_a_skipped_update_of_a_ragged_batch():
  """The policy and the rule that a window without sequences changes nothing go
  together; such a window is not skipped.
  """
  lengths = np.array([2, 4, 3], np.int32)
  good = helpers.series_batch(6, 3)._replace(lengths=lengths)
  bad = spoiled(good, 'NaN')
  halves = lambda a, b: Batch(
    np.concatenate([a.inputs[:2], b.inputs[2:]]), good.targets, lengths
  )
  optimizer = fptt_jax.fptt(optax.adam(1e-2))
  options = dict(num_windows=3, carry_hidden=True, skip_nonfinite=True)
  trainer = quick_trainer(
    helpers.elman(), remembering(losses.sequence_regression()), optimizer, **options
  )
  state, totals, metrics = train(trainer, [good, halves(good, bad), halves(bad, good)])
  expected, expected_totals, _ = train(trainer, [good, good])
  chex.assert_trees_all_equal(state, expected)
  chex.assert_trees_all_close(totals, expected_totals, rtol=1e-6)
  np.testing.assert_array_equal(
    metrics.skipped, [[False] * 3, [False, True, False], [True, False, False]]
  )


root = fptt_jax.Model(
  lambda key: jnp.ones([]),
  lambda batch_size: (),
  lambda p, h, x, mask, key: (h, p * jnp.ones((*x.shape[:2], 1))),
)
root_of_output = losses.from_function(
  lambda outputs, targets, window: jnp.sqrt(outputs.mean())
)


def test_any_inner_step_that_is_not_finite_skips_the_update():
  """√W from W = -1: NaN at the first inner step, which moves W to 1 whatever the
  gradient is, finite at the second.
  """
  moves = optax.stateless(lambda grads, params: 2 * jnp.ones([]))
  for start, skipped in ((-1.0, True), (1.0, False)):
    model = root._replace(init=lambda key: jnp.array(start))
    trainer = quick_trainer(
      model,
      root_of_output,
      moves,
      method='tbptt',
      num_windows=1,
      inner_steps=2,
      skip_nonfinite=True,
    )
    state, metrics = run(trainer, GOOD)
    assert np.isfinite(metrics.loss).all()
    assert np.isfinite(metrics.grad_norm).all()
    assert metrics.skipped.tolist() == [skipped]
    assert state.params == (start if skipped else start + 4)


def test_an_explicit_gradient_that_is_not_finite_skips_the_update():
  """√W at W = 1 has objective 1 and gradient 1/2; the step to -1 makes λ, the gradient
  there, NaN.
  """
  optimizer = fptt_jax.fptt(optax.sgd(4.0), gradient_estimate='recomputed')
  trainer = quick_trainer(
    root, root_of_output, optimizer, num_windows=1, skip_nonfinite=True
  )
  state, metrics = run(trainer, GOOD)
  assert (metrics.loss.item(), metrics.grad_norm.item(), metrics.skipped.item()) == (
    1.0,
    0.5,
    True,
  )
  assert (
    state.params.item(),
    state.opt_state.lam.item(),
    metrics.lambda_norm.item(),
  ) == (1.0, 0.0, 0.0)


def test_norm_of_lambda():
  """After the sequence, over all there are: two `fptt`s have parts of the parameters
  each, a third part has none.
  """
  labels = {'a': 'first', 'b': 'second', 'c': 'second', 'v': 'none'}
  parts = {
    'first': fptt_jax.fptt(optax.sgd(0.1)),
    'second': fptt_jax.fptt(optax.adam(0.1)),
    'none': optax.sgd(0.1),
  }
  trainer = quick_trainer(
    helpers.elman(),
    losses.terminal_regression(),
    optax.partition(parts, labels),
    num_windows=2,
  )
  state, metrics = run(trainer, GOOD)
  estimates = [
    np.square(leaf).sum()
    for part in find_states(state.opt_state)
    for leaf in jax.tree.leaves(part.lam)
  ]
  assert len(estimates) == 3
  assert metrics.lambda_norm == pytest.approx(np.sqrt(sum(estimates)), rel=1e-6)


# Compilation.


def test_one_trace_for_each_shape():
  """Steps of one shape trace the model and the loss once, whatever the values; another
  shape once more. The state keeps its structure, shapes and dtypes, none of them weak:
  a state from a checkpoint would be traced anew.
  """
  calls = {'model': 0, 'loss': 0}
  model, loss = helpers.elman(out=3), losses.terminal_classification(3)

  def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args):
      calls[name] += 1
      return function(*args)

    return wrapper

  assert loss.memory is not None
  memory = loss.memory._replace(observe=counted('loss', loss.memory.observe))
  trainer = fptt_jax.make_trainer(
    model._replace(apply=counted('model', model.apply)),
    loss._replace(memory=memory),
    fptt_jax.fptt(
      optax.sgd(optax.cosine_decay_schedule(1e-2, 10)),
      alpha=optax.constant_schedule(0.5),
    ),
    num_windows=2,
    skip_nonfinite=True,
  )
  batch = helpers.label_batch(4, 2)._replace(lengths=np.array([4, 3], np.int32))
  state = trainer.init(jax.random.key(0), batch)
  calls.update(model=0)  # The probe of an own model calls it, too.
  kinds = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert not any(x.weak_type for x in jax.tree.leaves(state._replace(key=None)))
  counts = []
  for seed in (0, 1, 2):
    state, _ = trainer.step(
      state,
      helpers.label_batch(4, 2, seed=seed)._replace(
        lengths=np.array([2, 4 - seed], np.int32)
      ),
    )
    counts.append(dict(calls))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == kinds
    assert not any(x.weak_type for x in jax.tree.leaves(state._replace(key=None)))
  assert counts[0] == counts[1] == counts[2]
  assert min(counts[0].values()) >= 1
  assert trainer.step._cache_size() == 1
  longer = helpers.label_batch(6, 2)._replace(lengths=np.array([6, 5], np.int32))
  for _ in range(2):
    state, _ = trainer.step(state, longer)
    assert calls == {name: 2 * count for name, count in counts[0].items()}
  assert trainer.step._cache_size() == 2


@pytest.mark.parametrize('method', ['fptt', 'ftrl', 'bptt_aux'])
@pytest.mark.parametrize(
  ('loss', 'batch', 'out'),
  [
    (losses.terminal_classification(3), helpers.label_batch, 3),
    (losses.terminal_regression(), helpers.regression_batch, 1),
    (losses.sequence_classification(3, accuracy=True), helpers.tagging_batch, 3),
    (losses.sequence_regression(), helpers.series_batch, 1),
  ],
  ids=[
    'terminal_classification',
    'terminal_regression',
    'sequence_classification',
    'sequence_regression',
  ],
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures('strict_dtypes')
def test_step_promotes_nothing_implicitly(method, loss, batch, out, dtype):
  """Every step is traceable under strict promotion of dtypes, bfloat16 models included,
  and gives a state of the dtypes it got.
  """
  batch = batch(6, 2)._replace(lengths=np.array([6, 5], np.int32))
  targets = jax.tree.map(
    lambda x: x.astype(dtype) if x.dtype == np.float32 else x, batch.targets
  )
  batch = batch._replace(inputs=batch.inputs.astype(dtype), targets=targets)
  optimizer = fptt_jax.fptt(optax.sgd(0.1)) if method == 'fptt' else optax.sgd(0.1)
  model = helpers.elman(out=out, dtype=dtype)
  trainer = fptt_jax.make_trainer(
    model, loss, optimizer, method=method, num_windows=4, skip_nonfinite=True
  )
  state = jax.eval_shape(trainer.init, jax.random.key(0), batch)
  after, metrics = jax.eval_shape(trainer.step, state, batch)
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert describe(after) == describe(state)
  assert state.params['c'].dtype == dtype
  assert metrics.totals['loss'].dtype == jnp.float32
  evaluated, _ = jax.eval_shape(trainer.evaluate, state.params, batch)
  assert describe(evaluated) == describe(metrics.totals)


@pytest.mark.parametrize('skip_nonfinite', [False, True])
def test_step_takes_over_the_old_state(skip_nonfinite):
  """The old state's buffers are donated, all of them (a warning, had one not been
  usable, is an error here).
  """
  batch = helpers.label_batch(4, 2)
  options = dict(num_windows=2, carry_hidden=True, skip_nonfinite=skip_nonfinite)
  trainer = fptt_jax.make_trainer(
    helpers.elman(out=3),
    losses.terminal_classification(3),
    fptt_jax.fptt(optax.adam(1e-2)),
    **options,
  )
  state = trainer.init(jax.random.key(0), batch)
  new_state, _ = trainer.step(state, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state._replace(key=None)))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new_state))


def temporary_bytes(num_steps: int, **options: Any) -> int:
  """What the compiled step of a network of 32 units on 16 sequences needs beside its
  arguments and results.
  """
  optimizer = (
    fptt_jax.fptt(optax.sgd(0.1)) if options['method'] == 'fptt' else optax.sgd(0.1)
  )
  trainer = fptt_jax.make_trainer(
    helpers.elman(hidden=32), losses.terminal_regression(), optimizer, **options
  )
  batch = Batch(
    jax.ShapeDtypeStruct((num_steps, 16, 2), jnp.float32),
    jax.ShapeDtypeStruct((16,), jnp.float32),
  )
  state = jax.eval_shape(trainer.init, jax.random.key(0), batch)
  return (
    helpers.optimized(trainer.step.lower(state, batch))
    .memory_analysis()
    .temp_size_in_bytes
  )


def test_memory_is_bounded_by_the_window():
  """At fixed S temporary memory does not grow with T; BPTT's is proportional to T (four
  times the steps, about four times the memory), and FPTT's with K = 16 is a small part
  of it.
  """
  short, long = (
    temporary_bytes(num_steps, method='tbptt', window_size=16)
    for num_steps in (64, 1024)
  )
  assert abs(long - short) < 0.05 * short
  bptt_short, bptt_long = (
    temporary_bytes(num_steps, method='bptt') for num_steps in (256, 1024)
  )
  assert 3.5 < bptt_long / bptt_short < 4.5
  assert temporary_bytes(1024, method='fptt', num_windows=16) < bptt_long / 8
  assert long < bptt_long / 16


def test_initialization_from_shapes_and_over_seeds():
  """Abstract batches give the concrete ones' state; eval_shape gives its shapes; under
  vmap over keys each seed gets its own parameters, those of a call of its own, and a
  step vmapped over such states is the steps one by one.
  """
  batch = helpers.regression_batch(4, 2)
  plain = fptt_jax.make_trainer(
    helpers.elman(),
    losses.terminal_regression(),
    fptt_jax.fptt(optax.sgd(0.1)),
    num_windows=2,
  )
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  concrete = plain.init(jax.random.key(0), batch)
  same(plain.init(jax.random.key(0), shapes), concrete, rtol=0)
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert describe(jax.eval_shape(plain.init, jax.random.key(0), shapes)) == describe(
    concrete
  )
  keys = jax.random.split(jax.random.key(1), 3)
  step = helpers.quick(plain.step)
  many = helpers.quick(jax.vmap(lambda key: plain.init(key, batch)))(keys)
  stepped = helpers.quick(jax.vmap(plain.step, in_axes=(0, None)))(many, batch)
  assert len(np.unique(many.params['b'])) == many.params['b'].size
  for i, key in enumerate(keys):
    one = plain.init(key, batch)
    same(jax.tree.map(lambda x: x[i], many), one, rtol=1e-6)
    same(jax.tree.map(lambda x: x[i], stepped), step(one, batch), rtol=1e-5, atol=1e-6)


@in_float64
def test_steps_inside_an_outer_scan():
  """A compiled scan of `step` over stacked batches is the loop over them."""
  batches = [
    helpers.regression_batch(4, 2, seed=seed, dtype=np.float64) for seed in range(3)
  ]
  trainer = quick_trainer(
    double(dropout=0.5),
    losses.terminal_regression(),
    fptt_jax.fptt(optax.sgd(0.1, momentum=0.9)),
    num_windows=2,
  )
  plain = fptt_jax.make_trainer(
    double(dropout=0.5),
    losses.terminal_regression(),
    fptt_jax.fptt(optax.sgd(0.1, momentum=0.9)),
    num_windows=2,
  )
  stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
  state, metrics = helpers.quick(
    lambda state: jax.lax.scan(plain.step, state, stacked)
  )(trainer.init(jax.random.key(0), batches[0]))
  expected, last = run(trainer, *batches)
  same(state, expected, **TIGHT)
  same(jax.tree.map(lambda x: x[-1], metrics), last, **TIGHT)


# Randomness.


def noise_model() -> fptt_jax.Model:
  """Outputs are the noise of each window's key, 0 without one; the state adds it up."""

  def apply(params, state, x, mask, key):
    noise = jnp.zeros([]) if key is None else jax.random.uniform(key)
    return state + noise, params * noise * jnp.ones((*x.shape[:2], 1))

  return fptt_jax.Model(
    lambda key: jnp.ones((1, 1, 1)),
    lambda batch_size: jnp.zeros((batch_size, 1)),
    apply,
  )


mean_output = losses.from_function(lambda outputs, targets, window: outputs.mean())


def test_noise_is_fresh_in_each_window_and_step_and_absent_from_evaluation():
  """Every window of every step has its own noise; the same seed gives the same numbers,
  another seed others; evaluation has none."""
  trainer = quick_trainer(
    noise_model(), mean_output, optax.sgd(0.0), method='tbptt', num_windows=3
  )

  def noise(seed: int) -> np.ndarray:
    state, seen = trainer.init(jax.random.key(seed), GOOD), []
    for _ in range(3):
      state, metrics = trainer.step(state, GOOD)
      seen.append(np.asarray(metrics.loss))
    return np.stack(seen)

  first = noise(0)
  assert len(np.unique(first)) == 9
  np.testing.assert_array_equal(noise(0), first)
  assert not np.isin(noise(1), first).any()
  totals, hidden = trainer.evaluate(jnp.ones((1, 1, 1)), GOOD)
  assert float(totals['loss']) == 0
  assert not np.any(hidden)


def test_tbptt_finals_prefix_has_noise_of_its_own():
  """The steps before the differentiated ones run as in training, with noise, under a
  key that is not the last window's.
  """
  trainer = quick_trainer(
    noise_model(), mean_output, optax.sgd(0.0), method='tbptt_final', truncation_steps=2
  )
  state, metrics = run(trainer, GOOD)
  of_prefix = float(state.hidden[0, 0] - metrics.loss[0])
  assert abs(of_prefix) > 1e-3
  assert abs(of_prefix - float(metrics.loss[0])) > 1e-3


# Evaluation.


@pytest.mark.parametrize(
  'lengths', [None, np.array([10, 4, 7], np.int32)], ids=['whole', 'ragged']
)
@pytest.mark.parametrize('terminal', [True, False], ids=['terminal', 'sequence'])
def test_evaluation_equals_the_whole_sequence(terminal, lengths):
  """MetricSums over evaluation's windows (3, 3, 4) are those of one pass over each
  whole sequence: cross-entropy and hits at the sequence's last step, or at every step;
  dropout is off. The hidden state is the one at each sequence's end.
  """
  model = helpers.elman(out=3, dropout=0.5)
  batch = (helpers.label_batch if terminal else helpers.tagging_batch)(10, 3)._replace(
    lengths=lengths
  )
  loss = (
    losses.terminal_classification(3)
    if terminal
    else losses.sequence_classification(3, accuracy=True)
  )
  trainer = quick_trainer(model, loss, optax.sgd(0.1), method='tbptt')
  params = model.init(jax.random.key(0))
  totals, hidden = trainer.evaluate(params, batch)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  nats, hits = [], []
  for row, length in enumerate([10, 10, 10] if lengths is None else lengths):
    h = np.zeros(4)
    for t in range(length):
      h = np.tanh(batch.inputs[t, row] @ p['a'] + h @ p['c'] + p['b'])
      logits = h @ p['v']
      label = batch.targets[row] if terminal else batch.targets[t, row]
      if not terminal or t + 1 == length:
        nats.append(np.log(np.exp(logits).sum()) - logits[label])
        hits.append(np.argmax(logits) == label)
    np.testing.assert_allclose(hidden[row], h, rtol=1e-4, atol=1e-5)
  expected = {'count': len(nats), 'loss': sum(nats), 'accuracy': sum(hits)}
  assert {name: float(total) for name, total in totals.items()} == pytest.approx(
    expected, rel=1e-4
  )
  assert fptt_jax.compute_metrics(totals) == pytest.approx(
    {'loss': np.mean(nats), 'accuracy': np.mean(hits)}, rel=1e-4
  )


def test_evaluation_goes_on_from_a_given_hidden_state():
  """Two halves, the second from the first's hidden state, have the whole's totals and
  hidden state; from the start they do not.
  """
  whole = helpers.tagging_batch(8, 2)
  halves = [Batch(whole.inputs[i : i + 4], whole.targets[i : i + 4]) for i in (0, 4)]
  trainer = quick_trainer(
    helpers.elman(out=3),
    losses.sequence_classification(3),
    optax.sgd(0.1),
    method='tbptt',
  )
  params = helpers.elman(out=3).init(jax.random.key(0))
  first, hidden = trainer.evaluate(params, halves[0])
  second, hidden = trainer.evaluate(params, halves[1], hidden)
  expected, expected_hidden = trainer.evaluate(params, whole)
  same(hidden, expected_hidden, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    first['loss'] + second['loss'], expected['loss'], rtol=1e-5
  )
  assert (
    abs(float(trainer.evaluate(params, halves[1])[0]['loss'] - second['loss'])) > 1e-3
  )


@pytest.mark.parametrize('method', ['bptt_aux', 'ftrl'])
def test_totals_are_the_measures_of_the_step(method):
  """With parameters that stay where they are, a step's totals are evaluation's, for a
  method that sees all windows in one update and for ftrl, which sees the first one K
  times.
  """
  batch = helpers.regression_batch(6, 3)._replace(lengths=np.array([6, 2, 3], np.int32))
  optimizer = optax.sgd(0.0)
  trainer = quick_trainer(
    helpers.elman(),
    losses.terminal_regression(),
    optimizer,
    method=method,
    num_windows=3,
  )
  state, metrics = run(trainer, batch)
  assert int(metrics.totals['count']) == 3
  same(metrics.totals, trainer.evaluate(state.params, batch)[0], rtol=1e-5)


# What is refused.


def make(method: str = 'tbptt', **options: Any) -> fptt_jax.Trainer:
  return fptt_jax.make_trainer(
    helpers.elman(),
    losses.terminal_regression(),
    optax.sgd(0.1),
    method=method,
    **options,
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_windows': 0}, r'num_windows must be an integer >= 1, got 0\.'),
    ({'window_size': 0}, r'window_size must be an integer >= 1, got 0\.'),
    (
      {'num_windows': 2, 'window_size': 3},
      r"'tbptt' takes at most one of .* got {'num_windows': 2, 'window_size': 3}",
    ),
    (
      {'method': 'bppt'},
      r"method must be one of \['fptt', 'tbptt', .*\] or a Method, got 'bppt'\.",
    ),
    (
      {'method': 'bptt', 'num_windows': 2},
      r"method 'bptt' takes neither of .* got {'num_windows': 2}",
    ),
    (
      {'method': 'ogd', 'window_size': 2},
      r"method 'ogd' takes neither of .* got {'window_size': 2}",
    ),
    (
      {'method': 'tbptt_final'},
      r"truncation_steps must be .* got None\. The method is 'tbptt_final'\.",
    ),
    (
      {'method': 'bptt', 'truncation_steps': 2},
      r"truncation_steps must be .* got 2\. The method is 'bptt'\.",
    ),
    (
      {'method': 'tbptt_final', 'truncation_steps': 0},
      r'truncation_steps must be an integer >= 1, got 0\.',
    ),
    ({'inner_steps': 0}, r'inner_steps must be an integer >= 1, got 0\.'),
    ({'inner_steps': 1.5}, r'inner_steps must be an integer >= 1, got 1\.5\.'),
    (
      {'loss_weights': [1.0, np.nan]},
      r'loss_weights must be K finite numbers, got \[1\.0, nan\]\.',
    ),
    (
      {'loss_weights': [[1.0]]},
      r'loss_weights must be K finite numbers, got \[\[1\.0\]\]\.',
    ),
  ],
)
def test_impossible_settings_are_refused(options, message):
  """Settings that mean nothing fail where the trainer is made, with the value given."""
  with pytest.raises(ValueError, match=message):
    make(**options)


@pytest.mark.parametrize(
  'flag',
  [
    *('carry_hidden', 'skip_nonfinite', 'return_outputs', 'checkpoint_windows'),
    *('donate', 'shard_params'),
  ],
)
def test_a_text_is_no_flag(flag):
  """It would count as True, whatever it says."""
  with pytest.raises(TypeError, match=f"{flag} must be True or False, got 'False'"):
    make(**{flag: 'False'})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'num_windows': 7},
      r'num_windows must be an integer between 1 and the sequence length T=6, got 7\.',
    ),
    (
      {'window_size': 7},
      r'window_size must be an integer between 1 and the sequence length T=6, got 7\.',
    ),
    (
      {'method': 'tbptt_final', 'truncation_steps': 7},
      r'truncation_steps must be at most the sequence length T=6, got 7\.',
    ),
    (
      {'num_windows': 3, 'loss_weights': [1, 2]},
      r'one factor for each of the K=3 windows, got 2\.',
    ),
    (
      {'method': 'tbptt_final', 'truncation_steps': 2, 'loss_weights': [1, 2]},
      r'one factor for each of the K=1 windows, got 2\.',
    ),
  ],
)
def test_settings_that_do_not_fit_the_sequence_are_refused(options, message):
  """What depends on T fails with the first batch, in `init` and, for another length
  later, in `step`.
  """
  with pytest.raises(ValueError, match=message):
    make(**options).init(jax.random.key(0), GOOD)
  state = make(method='bptt').init(jax.random.key(0), GOOD)
  with pytest.raises(ValueError, match=message):
    make(**options).step(state, GOOD)


@pytest.mark.parametrize(
  ('batch', 'error', 'message'),
  [
    (
      Batch(np.zeros((6, 0, 2)), np.zeros(0)),
      ValueError,
      r'inputs must be .*not empty, got \(6, 0, 2\)\.',
    ),
    (
      Batch(np.zeros((0, 2, 2)), np.zeros(2)),
      ValueError,
      r'inputs must be .*not empty, got \(0, 2, 2\)\.',
    ),
    (
      Batch(np.zeros(6), np.zeros(2)),
      ValueError,
      r'inputs must be time-major \[T, B, \.\.\.\].*, got \(6,\)\.',
    ),
    (
      Batch(np.zeros((6, 2), bool), np.zeros(2)),
      TypeError,
      r'inputs must be .* got bool',
    ),
    (
      Batch(np.zeros((6, 2), np.complex64), np.zeros(2)),
      TypeError,
      r'inputs must be .* got complex64',
    ),
    (
      Batch(np.full((6, 2), 'a'), np.zeros(2)),
      TypeError,
      r'inputs must be .* got <U1',
    ),
    (
      Batch(GOOD.inputs, np.zeros(5, np.float32)),
      ValueError,
      r'with B=2, T=6, got \(5,\)\.',
    ),
    (
      GOOD._replace(lengths=np.full(3, 6)),
      ValueError,
      r'lengths .*must be \[B\] = \[2\], got int64\[3\]',
    ),
    (
      GOOD._replace(lengths=np.full((2, 1), 6)),
      ValueError,
      r'lengths .*must be \[B\] = \[2\], got int64\[2, 1\]',
    ),
    (
      GOOD._replace(lengths=np.full(2, 6.0)),
      TypeError,
      r'lengths must be integers, got float',
    ),
    (
      Batch(GOOD.inputs.tolist(), GOOD.targets),
      TypeError,
      r'inputs\S* must be an array, got float\.',
    ),
  ],
)
def test_batches_of_wrong_shape_or_dtype_are_refused(batch, error, message):
  """Shapes and dtypes are looked at in `init` and in `validate_batch`."""
  with pytest.raises(error, match=message):
    make().init(jax.random.key(0), batch)
  with pytest.raises(error, match=message):
    fptt_jax.validate_batch(batch, losses.terminal_regression())


def changed(
  model: fptt_jax.Model, change: Callable[[Any, jax.Array], Any]
) -> fptt_jax.Model:
  """`model` with `change` at the end of its apply."""
  return model._replace(apply=lambda *args: change(*model.apply(*args)))


SAME_HIDDEN = (
  r"the hidden state that model\.apply returns must be like the model's initial "
  r'state for this batch, '
)


@pytest.mark.parametrize(
  ('model', 'loss', 'batch', 'error', 'message'),
  [
    (
      changed(helpers.elman(), lambda h, y: (h.astype(jnp.bfloat16), y)),
      losses.terminal_regression(),
      GOOD,
      ValueError,
      SAME_HIDDEN + r'float32\[2, 4\], got bfloat16\[2, 4\]\.',
    ),
    (
      changed(helpers.elman(), lambda h, y: (h[:, :3], y)),
      losses.terminal_regression(),
      GOOD,
      ValueError,
      SAME_HIDDEN + r'float32\[2, 4\], got float32\[2, 3\]\.',
    ),
    (
      changed(helpers.elman(), lambda h, y: ((h,), y)),
      losses.terminal_regression(),
      GOOD,
      ValueError,
      SAME_HIDDEN,
    ),
    (
      changed(helpers.elman(), lambda h, y: (h, y[-1])),
      losses.terminal_regression(),
      GOOD,
      ValueError,
      r'outputs that model\.apply returns must be \[S, B, \.\.\.\] = \[3, 2\], got '
      r'float32\[2, 1\]\.',
    ),
    (
      helpers.elman(out=2),
      losses.terminal_regression(),
      GOOD,
      ValueError,
      r'outputs must be of shape \[S, B, 1\], got \(3, 2, 2\)\.',
    ),
    (
      helpers.elman(),
      losses.terminal_regression(),
      Batch(GOOD.inputs, np.zeros(5, np.float32)),
      ValueError,
      r'B=2, T=6, got',
    ),
    (
      helpers.elman(out=3),
      losses.terminal_classification(3),
      GOOD,
      TypeError,
      r'labels .*must be integers, got float32\[2\]',
    ),
    (
      helpers.elman(),
      losses.sequence_regression(),
      Batch(GOOD.inputs, np.zeros((5, 2, 1), np.float32)),
      ValueError,
      r'time-major, \[T, B, \.\.\.\] = \(6, 2\), got \(5, 2, '
      r'1\)\.',
    ),
    (
      helpers.elman(),
      losses.sequence_regression(),
      Batch(GOOD.inputs, np.zeros((2, 6, 1), np.float32)),
      ValueError,
      r'time-major, \[T, B, \.\.\.\] = \(6, 2\), got \(2, 6, '
      r'1\)\.',
    ),
  ],
  ids=[
    'dtype',
    'shape',
    'structure',
    'outputs',
    'features',
    'targets',
    'float labels',
    'targets too short',
    'targets batch-major',
  ],
)
def test_models_and_targets_that_do_not_fit_are_refused(
  model, loss, batch, error, message
):
  """Found when the step is traced, before anything is computed."""
  trainer = fptt_jax.make_trainer(
    model, loss, optax.sgd(0.1), method='tbptt', num_windows=2
  )
  state = jax.eval_shape(
    trainer.init, jax.random.key(0), GOOD
  )  # Abstract: values are not looked at.
  with pytest.raises(error, match=message):
    jax.eval_shape(trainer.step, state, batch)


def test_carried_hidden_state_of_another_batch_size_is_refused():
  """Rows of the next batch continue rows of the last: there must be as many. Without
  carry_hidden another size is welcome.
  """
  other = helpers.regression_batch(6, 3)
  trainer = make(carry_hidden=True)
  message = (
    r'the carried hidden state .* float32\[3, 4\], got '
    r'float32\[2, 4\]\.'
  )
  with pytest.raises(ValueError, match=message):
    trainer.step(trainer.init(jax.random.key(0), GOOD), other)
  message = (
    r'the given hidden state .* for this batch, float32\[3, 4\], got '
    r'float32\[2, 4\]\.'
  )
  with pytest.raises(ValueError, match=message):
    trainer.evaluate(
      trainer.init(jax.random.key(0), GOOD).params,
      other,
      helpers.elman().initial_state(2),
    )
  state, _ = jax.eval_shape(make().step, make().init(jax.random.key(0), GOOD), other)
  assert state.hidden.shape == (3, 4)


def test_truncated_final_loss_takes_no_ragged_batch():
  """tbptt_final counts its steps from T."""
  trainer = make(method='tbptt_final', truncation_steps=2)
  with pytest.raises(ValueError, match=r"lengths .*'tbptt_final', got int32"):
    trainer.step(
      trainer.init(jax.random.key(0), GOOD),
      GOOD._replace(lengths=np.array([6, 5], np.int32)),
    )


@pytest.mark.parametrize('key', [np.zeros(3, np.uint32), np.zeros(2, np.int32), 0])
def test_what_is_no_key_is_refused(key):
  """Seeds, and words that are no key's data."""
  with pytest.raises(TypeError, match=r'key must be .*got '):
    make().init(key, GOOD)


def with_value(batch: Batch, place: tuple[int, ...], value: float) -> Batch:
  inputs = np.array(batch.inputs)
  inputs[place] = value
  return batch._replace(inputs=inputs)


@pytest.mark.parametrize(
  ('batch', 'message'),
  [
    (
      with_value(GOOD, (4, 1), np.nan),
      r'NaN or infinity in 1 places, the first at .*\(4, 1\)',
    ),
    (
      with_value(GOOD, (2, 0, 1), -np.inf),
      r'NaN or infinity in 1 places, the first at .*\(2, 0\)',
    ),
    (
      with_value(GOOD, (4, 1), np.nan)._replace(lengths=np.array([3, 5])),
      r'NaN or infinity in 1 places',
    ),
    (
      GOOD._replace(lengths=np.array([6, 7])),
      r'lengths must be in 1\.\.T=6, got 6 to 7\.',
    ),
    (
      GOOD._replace(lengths=np.array([0, 6])),
      r'lengths must be in 1\.\.T=6, got 0 to 6\.',
    ),
    (
      GOOD._replace(targets=np.array([0, np.inf])),
      r'targets must be finite, got NaN or infinity in 1 places',
    ),
    (
      GOOD._replace(inputs=jnp.full((6, 2, 2), jnp.nan, jnp.bfloat16)),
      r'NaN or infinity in 12 places',
    ),
  ],
)
def test_check_batch_finds_values_that_mean_nothing(batch, message):
  """Values are looked at on the host only."""
  with pytest.raises(ValueError, match=message):
    fptt_jax.validate_batch(batch, losses.terminal_regression())


def test_check_batch_refuses_labels_that_mean_nothing():
  """Labels outside 0..C-1 and labels that are not integers, which a compiled gather
  would turn into NaN or nonsense.
  """
  loss = losses.terminal_classification(3)
  with pytest.raises(ValueError, match=r'labels must be in 0\.\.2, got \[3\]\.'):
    fptt_jax.validate_batch(Batch(GOOD.inputs, np.array([3, 1])), loss)
  with pytest.raises(TypeError, match=r'labels .*must be integers'):
    fptt_jax.validate_batch(Batch(GOOD.inputs, np.array([0.0, 1.0])), loss)


def test_check_batch_accepts_what_a_step_runs_on():
  """Good batches pass: plain, ragged with NaN past the end, tokens, lengths at both
  ends of their range.
  """
  fptt_jax.validate_batch(GOOD, losses.terminal_regression())
  fptt_jax.validate_batch(
    with_value(GOOD, (5, 1), np.nan)._replace(lengths=np.array([1, 5])),
    losses.terminal_regression(),
  )
  fptt_jax.validate_batch(
    Batch(np.zeros((6, 2), np.int32), np.full((6, 2), 2)),
    losses.sequence_classification(3),
  )


def test_check_batch_accepts_bfloat16_targets():
  """bfloat16 is floating point."""
  fptt_jax.validate_batch(
    Batch(GOOD.inputs, jnp.zeros(2, jnp.bfloat16)), losses.terminal_regression()
  )


@pytest.mark.parametrize(
  ('loss', 'make_batch', 'padding'),
  [
    (losses.sequence_classification(3), helpers.tagging_batch, -1),
    (losses.sequence_regression(), helpers.series_batch, np.nan),
  ],
)
def test_check_batch_does_not_look_past_the_end(loss, make_batch, padding):
  """The usual padding, -1 or NaN, passes in targets as it does in inputs: a step does
  not read it.
  """
  batch = make_batch(4, 2)._replace(lengths=np.array([4, 3], np.int32))
  batch.targets[3, 1] = padding
  fptt_jax.validate_batch(batch, loss)


def test_init_looks_at_a_concrete_batch():
  """Values that mean nothing are found before anything is trained; a traced batch
  passes on its shapes alone.
  """
  bad = with_value(GOOD, (4, 1), np.nan)
  with pytest.raises(
    ValueError, match=r'NaN or infinity in 1 places, the first at .*\(4, 1\)'
  ):
    make().init(jax.random.key(0), bad)
  jax.eval_shape(make().init, jax.random.key(0), bad)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      (lambda p, x: x, losses.terminal_regression(), optax.sgd(0.1)),
      r'model must be of type fptt_jax\.Model, .* got function\.',
    ),
    (
      (helpers.elman(), mean_absolute_error, optax.sgd(0.1)),
      r'loss must be of type fptt_jax\.Loss, .*from_function',
    ),
    (
      (helpers.elman(), losses.terminal_regression(), 0.1),
      r'optimizer must be of type optax\.GradientTransformation, got 0\.1\.',
    ),
  ],
)
def test_parts_of_the_wrong_kind_are_refused(arguments, message):
  """Each part says what it must be and where to get it; so does a batch that is a bare
  pair.
  """
  with pytest.raises(TypeError, match=message):
    fptt_jax.make_trainer(*arguments)
  with pytest.raises(
    TypeError,
    match=(r'batch must be of type fptt_jax\.Batch, got tuple\.'),
  ):
    make().init(jax.random.key(0), (GOOD.inputs, GOOD.targets))


@pytest.mark.parametrize(
  ('function', 'got'),
  [
    (lambda outputs, targets, window: outputs[0, :, 0], r'float32\[2\]'),
    (lambda outputs, targets, window: jnp.int32(1), r'int32\[\]'),
  ],
)
def test_a_loss_that_is_no_number_is_refused(function, got):
  """A loss of one's own must return one floating-point number."""
  trainer = fptt_jax.make_trainer(
    helpers.elman(), losses.from_function(function), optax.sgd(0.1), method='tbptt'
  )
  state = jax.eval_shape(trainer.init, jax.random.key(0), GOOD)
  with pytest.raises(
    ValueError,
    match=rf'the result of a loss must be one .* per window, got {got}\.',
  ):
    jax.eval_shape(trainer.step, state, GOOD)


def test_own_measure_of_a_loss():
  """`from_function` evaluates what its measure says, in windows of evaluation's own."""
  measure = lambda outputs, targets, window: {
    'count': jnp.int32(1),
    'steps': window.mask.sum(),
  }
  loss = losses.from_function(mean_absolute_error, measure)
  batch = helpers.series_batch(9, 2)
  trainer = fptt_jax.make_trainer(helpers.elman(), loss, optax.sgd(0.1), method='bptt')
  totals, _ = trainer.evaluate(trainer.init(jax.random.key(0), batch).params, batch)
  assert (int(totals['count']), int(totals['steps'])) == (3, 18)


def test_inner_steps_must_reach_fptt():
  """A wrapper that drops the extra argument would move λ and W̄ on every call."""
  inner = fptt_jax.fptt(optax.sgd(0.1))
  wrapper = optax.GradientTransformation(
    inner.init, lambda grads, state, params=None: inner.update(grads, state, params)
  )
  with pytest.raises(
    ValueError, match=r'^inner_steps of fptt must be the 2 .* got \[1\]'
  ):
    fptt_jax.make_trainer(
      helpers.elman(), losses.terminal_regression(), wrapper, inner_steps=2
    )


def test_multi_steps_with_the_explicit_gradient():
  """optax.MultiSteps, which is no transformation itself, gets `grad_fn` as well: λ
  moves every second window.
  """
  optimizer = optax.MultiSteps(
    fptt_jax.fptt(optax.sgd(0.1), gradient_estimate='recomputed'), 2
  )
  trainer = quick_trainer(
    helpers.elman(), losses.terminal_regression(), optimizer, num_windows=2
  )
  state, _ = run(trainer, GOOD)
  [fptt_state] = find_states(state.opt_state)
  assert int(fptt_state.step_count) == 1
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(fptt_state.lam))


def test_state_owns_its_buffers_and_types():
  """Weights of one's own, weakly typed or used twice, can start two runs: the step
  donates copies, and is compiled once.
  """
  zeros = jnp.zeros((2, 4))
  own = jax.tree.map(
    lambda leaf: leaf + 0.0, helpers.elman().init(jax.random.key(0))
  ) | {'b': jnp.full((4,), 0.1)}
  model = helpers.elman()._replace(
    init=lambda key: own, initial_state=lambda batch_size: zeros
  )
  trainer = fptt_jax.make_trainer(
    model, losses.terminal_regression(), fptt_jax.fptt(optax.sgd(0.1)), num_windows=2
  )
  for _ in range(2):
    state = trainer.init(jax.random.key(0), GOOD)
    assert not any(
      leaf.weak_type
      for leaf in jax.tree.leaves((state.params, state.hidden, state.loss_state))
    )
    for _ in range(2):
      state, _ = trainer.step(state, GOOD)
  assert trainer.step._cache_size() == 1
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((own, zeros)))


def test_ftrl_reads_the_loss_state_of_the_sequences_start():
  """A window gone through again is measured against the Q it had when first seen, not
  the one this sequence has moved: with a learning rate of 0 the u-th objective is the
  mean of the first u window losses.
  """
  batch = helpers.label_batch(6, 3)
  batch = batch._replace(targets=(batch.targets, np.arange(3, dtype=np.int32)))
  loss = losses.terminal_classification(3, divergence='example', num_examples=3)
  metrics = {}
  for method in ('tbptt', 'ftrl'):
    trainer = quick_trainer(
      helpers.elman(out=3), loss, optax.sgd(0.0), method=method, num_windows=3
    )
    state = trainer.init(jax.random.key(0), batch)
    q = jax.random.dirichlet(jax.random.key(5), jnp.ones(3), (3, 3))
    _, metrics[method] = trainer.step(state._replace(loss_state={'q': q}), batch)
  running_mean = np.cumsum(metrics['tbptt'].loss) / np.arange(1, 4)
  np.testing.assert_allclose(metrics['ftrl'].loss, running_mean, rtol=1e-5)


@pytest.mark.parametrize('ragged', [False, True])
def test_a_penalty_of_the_model_is_added_as_its_mean_over_valid_steps(
  ragged: bool,
) -> None:
  """Objective = loss + mean penalty over the window's valid steps, gradient included;
  what is measured leaves it out.
  """
  plain = helpers.elman()

  def apply(params, h, x, mask, key):
    h, y = plain.apply(params, h, x, mask, key)
    return h, fptt_jax.OutputsWithPenalty(y, jnp.square(y[..., 0]))

  batch = helpers.regression_batch(8, 4)
  lengths = np.array([8, 8, 7, 3], np.int32)
  batch = batch._replace(lengths=lengths) if ragged else batch
  loss = fptt_jax.losses.terminal_regression()
  optimizer = optax.sgd(0.1)
  penalized = quick_trainer(plain._replace(apply=apply), loss, optimizer, method='bptt')
  state = penalized.init(jax.random.key(0), batch)
  new_state, metrics = penalized.step(state, batch)

  def objective(params):
    valid = jnp.asarray(np.arange(8)[:, None] < (lengths if ragged else 8)) & jnp.ones(
      (8, 4), bool
    )
    _, y = plain.apply(
      params, plain.initial_state(4), jnp.asarray(batch.inputs), valid, None
    )
    last = (lengths if ragged else np.full(4, 8)) - 1
    error = jnp.mean(jnp.square(y[last, np.arange(4), 0] - batch.targets))
    return error + jnp.mean(jnp.square(y[..., 0]), where=valid), error

  (value, error), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
  np.testing.assert_allclose(metrics.loss, [value], rtol=1e-5)
  np.testing.assert_allclose(
    fptt_jax.compute_metrics(metrics.totals)['loss'], error, rtol=1e-5
  )
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, state.params, grads)
  chex.assert_trees_all_close(new_state.params, expected, rtol=1e-4, atol=1e-6)


def test_a_penalty_of_another_shape_is_refused() -> None:
  """The message names what was got and what was expected."""
  plain = helpers.elman()

  def wrong(*arguments: Any) -> Any:
    hidden, outputs = plain.apply(*arguments)
    return hidden, fptt_jax.OutputsWithPenalty(outputs, jnp.zeros(4))

  trainer = quick_trainer(
    plain._replace(apply=wrong),
    fptt_jax.losses.terminal_regression(),
    optax.sgd(0.1),
    method='bptt',
  )
  batch = helpers.regression_batch(8, 4)
  with pytest.raises(
    ValueError,
    match=(
      r'penalty that model.apply returns must be \[S, B\] = \[8, 4\], got '
      r'float32\[4\]'
    ),
  ):
    trainer.step(trainer.init(jax.random.key(0), batch), batch)


@pytest.mark.parametrize('micro_batches', [1, 2])
def test_a_replaced_apply_is_the_model_that_trains(micro_batches: int) -> None:
  """With outputs of 0, the losses are those of an answer of 0 in training, evaluation
  and prediction: no part of the old model runs.
  """
  model = helpers.lstm()
  silent = model._replace(
    apply=lambda *args: (lambda h, y: (h, 0 * y))(*model.apply(*args))
  )
  trainer = helpers.quick_trainer(
    silent,
    losses.terminal_regression(),
    optax.sgd(0.0),
    method='tbptt',
    num_windows=1,
    micro_batches=micro_batches,
  )
  batch = helpers.regression_batch(4, 4)
  state = trainer.init(jax.random.key(0), batch)
  expected = np.mean(batch.targets**2)
  _, metrics = trainer.step(state, batch)
  assert float(metrics.loss[0]) == pytest.approx(expected)
  sums, _ = trainer.evaluate(state.params, batch)
  assert fptt_jax.compute_metrics(sums)['loss'] == pytest.approx(expected)
  assert not np.any(trainer.predict(state.params, batch.inputs))


def test_a_step_to_infinite_weights_is_skipped() -> None:
  """Also without the regularizer, whose λ would show them: later updates go on."""
  trainer = helpers.quick_trainer(
    helpers.elman(),
    losses.terminal_regression(),
    optax.sgd(3e38),
    method='tbptt',
    num_windows=2,
    skip_nonfinite=True,
  )
  batch = helpers.regression_batch(4, 3)
  state = trainer.init(jax.random.key(0), batch)
  start = state.params
  batch = batch._replace(targets=1e3 * batch.targets)
  state, metrics = trainer.step(state, batch)
  assert metrics.skipped is not None
  assert metrics.skipped.all()
  assert np.isfinite(metrics.grad_norm).all()
  chex.assert_trees_all_equal(state.params, start)


def test_weights_that_begin_infinite_do_not_stop_training() -> None:
  """A mask of -inf among the parameters is the model's own."""
  model = helpers.elman()
  masked = model._replace(
    init=lambda key: (model.init(key), jnp.array([-jnp.inf, 0.0]))
  )
  masked = masked._replace(
    apply=lambda params, *args: model.apply(params[0], *args), original=None
  )
  trainer = helpers.quick_trainer(
    masked,
    losses.terminal_regression(),
    optax.sgd(0.01),
    method='tbptt',
    num_windows=2,
    skip_nonfinite=True,
  )
  batch = helpers.regression_batch(4, 3)
  state = trainer.init(jax.random.key(0), batch)
  _, metrics = trainer.step(state, batch)
  assert metrics.skipped is not None
  assert not metrics.skipped.any()


def test_a_replaced_apply_has_no_chunked_readout() -> None:
  """The message says where the split has gone; per-step losses see the new outputs."""
  model = helpers.lstm()
  silent = model._replace(
    apply=lambda *args: (lambda h, y: (h, 0 * y))(*model.apply(*args))
  )
  loss = losses.sequence_regression()
  options = dict(method='tbptt', num_windows=1)
  with pytest.raises(
    ValueError, match=r'readout_chunk .*A replaced apply drops the spl'
  ):
    fptt_jax.make_trainer(silent, loss, optax.sgd(0.0), readout_chunk=1, **options)
  trainer = helpers.quick_trainer(silent, loss, optax.sgd(0.0), **options)
  batch = helpers.series_batch(4, 3)
  state = trainer.init(jax.random.key(0), batch)
  _, metrics = trainer.step(state, batch)
  assert float(metrics.loss[0]) == pytest.approx(np.mean(batch.targets**2))
