"""Credit across windows by random numbers, by repetition, and by checkpoints."""

import functools
import math
from typing import Any

import chex
from credit import (
  LENGTHS,
  SERIES,
  B,
  T,
  assert_close,
  batch_of,
  distance,
  elman,
  first_window,
  stack,
  total_gradient,
)
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import influence, nn
from fptt_jax.influence import _kronecker, _own, _units

pytestmark = pytest.mark.usefixtures('x64')

DRAWS = 4000


def credits_of(
  method: influence.Influence, model: fptt_jax.Model, size: int, draws: int
) -> np.ndarray:
  """Credit after T steps in windows of some size, for many keys: [draws, P]."""
  params = model.init(jax.random.key(0))
  batch = batch_of()
  rng = np.random.default_rng(1)
  delta = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), model.initial_state(B)
  )
  window = first_window(model, batch, slice(0, size))
  mask = jnp.asarray(np.arange(T)[:, None] < LENGTHS)

  @helpers.quick
  def run(key: jax.Array) -> jax.Array:
    hidden = model.initial_state(B)
    state = method.init(window, params, hidden)
    for start in range(0, T, size):
      part = slice(start, start + size)
      now = window._replace(x=jnp.asarray(batch.inputs[part]), mask=mask[part])
      key, own = jax.random.split(key)
      state = method.advance(now, params, hidden, state, own)
      hidden = now.run(params, hidden, now.x, now.mask)
    credit = method.credit(window, params, hidden, state, delta)
    return jax.flatten_util.ravel_pytree(credit)[0]

  return np.asarray(jax.vmap(run)(jax.random.split(jax.random.key(2), draws)))


@functools.cache
def small() -> fptt_jax.Model:
  """Two units whose recurrent weights are large."""
  options: Any = dict(init='flax', param_dtype=jnp.float64)
  return nn.from_nnx(lambda rngs: nn.ElmanRNN(2, 2, rngs=rngs, **options))


@functools.cache
def exact_credit() -> np.ndarray:
  [expected] = credits_of(influence.rtrl(), small(), T, 1)
  return expected


@functools.cache
def random_credits(method: influence.Influence, size: int) -> np.ndarray:
  return credits_of(method, small(), size, DRAWS)


def noise(method: influence.Influence, size: int = 2) -> float:
  """The root of the variance of the credit, summed over the parameters."""
  return float(np.sqrt(random_credits(method, size).var(0).sum()))


UORO = functools.cache(influence.uoro)
KRONECKER = functools.cache(influence.kronecker)
UNBIASED = {
  'uoro': (UORO(), 2),
  'one border': (UORO(), T),
  'rows together': (UORO(rows='together'), 2),
  'nobacktrack': (UORO(balance='unit'), 1),
  'scales of units': (UORO(balance='unit'), 2),
  'kf-rtrl': (KRONECKER(1, 'signs'), 2),
  'optimal sum': (KRONECKER(2), 2),
  'optimal sum, one border': (KRONECKER(3), T),
}


@pytest.mark.parametrize('name', UNBIASED)
def test_random_influences_have_the_exact_mean(name: str) -> None:
  """Within five standard errors in each coordinate, with rows that end early."""
  method, size = UNBIASED[name]
  got = random_credits(method, size)
  expected = exact_credit()
  error = got.std(0) / DRAWS**0.5
  assert np.abs(expected).max() > 0.1
  assert error.max() > 1e-4
  # The chance that one of ten coordinates is beyond is 6e-6.
  assert (np.abs(got.mean(0) - expected) <= 5 * error + 1e-12).all()


def test_the_noise_of_random_influences() -> None:
  """It falls with the root of the pairs, with longer windows, and with structure."""
  one = noise(UORO())
  assert one / noise(UORO(pairs=2)) == pytest.approx(2**0.5, rel=0.1)
  steps = noise(UORO(), size=1)
  assert steps > 1.1 * one
  assert noise(UORO(balance='unit'), size=1) < steps
  factors = noise(KRONECKER(1, 'signs'))
  assert factors < one
  assert noise(KRONECKER(2)) < 0.5 * factors


def test_scales_of_units_are_the_norms_of_a_steps_derivative() -> None:
  """Of each number of the state with respect to all parameters, in one step."""
  model = stack(nn.LSTM)
  params = model.init(jax.random.key(0))
  window = first_window(model, batch_of(), slice(0, 1))
  hidden = jax.tree.map(lambda leaf: leaf + 0.3, model.initial_state(B))
  units = _units.find_units(window, params, hidden)
  got = _own.own_norms(units, window, params, hidden)

  def end(params):
    state = window.run(params, hidden, window.x, None)
    return jnp.concatenate(jax.tree.leaves(state), 1)

  squares = [
    (leaf**2).reshape(*leaf.shape[:2], -1).sum(2)
    for leaf in jax.tree.leaves(jax.jacrev(end)(params))
  ]
  assert_close(got, jnp.sqrt(sum(squares)))


def test_enough_kronecker_products_are_exact() -> None:
  """As many as a matrix has inputs need no reduction: ragged, on a mesh, in a stack."""
  model = stack(nn.LSTM, nn.GRU)
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:2], ('batch',))
  long = batch_of(2 * T)._replace(lengths=np.array([2 * T, T + 2], np.int32))
  halves = [
    fptt_jax.Batch(long.inputs[part], long.targets[part], lengths=lengths)
    for part, lengths in (
      (slice(T), np.array([T, T], np.int32)),
      (slice(T, None), np.array([T, 2], np.int32)),
    )
  ]
  exact = influence.kronecker(terms=2 + 3 + 1)
  got, _ = total_gradient(
    model, halves, num_windows=3, influence=exact, carry_hidden=True, mesh=mesh
  )
  whole, _ = total_gradient(model, [long], 'bptt_aux', num_windows=6)
  assert_close(got, whole)


@pytest.mark.parametrize(
  ('values', 'terms'), [([5.0, 2.0, 1.0, 0.5, 0.25], 3), ([1.0, 0.9, 0.8, 0.0], 2)]
)
def test_the_optimal_reduction_has_the_least_variance(
  values: list[float], terms: int
) -> None:
  """That of Benzing et al., and the exact mean: only the tail is drawn."""
  keys = jax.random.split(jax.random.key(0), DRAWS)
  root = jax.vmap(lambda key: _kronecker._random_root(jnp.asarray(values), terms, key))(
    keys
  )
  products = np.einsum('tik,tjk->tij', root, root)
  error = products.std(0) / DRAWS**0.5
  assert (np.abs(products.mean(0) - np.diag(values)) <= 5 * error + 1e-12).all()
  kept = 1 if terms == 3 else 0
  tail = np.asarray(values[kept:])
  least = tail.sum() ** 2 / (terms - kept) - (tail**2).sum()
  assert products.var(0).sum() == pytest.approx(least, rel=0.05)


def test_kronecker_products_in_members_and_refused_models() -> None:
  """Members of a population draw for themselves; parameters without sums are named."""
  trainer = fptt_jax.make_trainer(
    stack(nn.ElmanRNN),
    SERIES,
    optax.sgd(0.5),
    method='tbptt',
    num_windows=3,
    influence='kronecker',
  )
  keys = jax.random.split(jax.random.key(0), 2)
  many = fptt_jax.vmap_trainer(trainer)
  states, metrics = many.step(many.init(keys, batch_of()), batch_of())
  assert (metrics.credit_norm[:, 1:] > 0).all()
  alone, _ = trainer.step(trainer.init(keys[1], batch_of()), batch_of())
  assert_close(fptt_jax.take_member(states, 1).params, alone.params)
  for kind, missing in ((nn.LRU, 'layers/0/b_im'), (nn.FastGRNN, 'layers/0/bias')):
    with pytest.raises(ValueError, match=f'kronecker.* with a bias, got .*{missing}'):
      total_gradient(stack(kind), [batch_of()], influence='kronecker')


def test_uoro_in_a_trainer_draws_from_its_key() -> None:
  """The same key gives the same bits, as one program or not, and another one others."""
  batch = batch_of()
  trainer = fptt_jax.make_trainer(
    elman(),
    SERIES,
    optax.sgd(0.1),
    method='tbptt',
    num_windows=3,
    influence='uoro',
    donate=False,
  )
  states = {}
  twice = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), batch)
  for name, seed in (('once', 0), ('again', 0), ('other', 1)):
    state = trainer.init(jax.random.key(seed), batch)
    if name == 'other':
      state = state._replace(params=states['first'].params)
    states.setdefault('first', state)
    if name == 'again':
      states[name], _ = fptt_jax.scan_train_steps(trainer)(state, (), twice)
      continue
    for _ in range(2):
      state, metrics = trainer.step(state, batch)
    states[name] = state
    assert (metrics.credit_norm[1:] > 0).all()
  assert_close(states['again'].params, states['once'].params, 1e-12)
  assert distance(states['other'].params, states['once'].params) > 1e-6


def test_uoro_needs_nothing_but_a_plain_model() -> None:
  """Stacks, learned starts and large inputs; each device draws for its rows."""
  model = stack(nn.LSTM, lambda *a, **k: nn.LearnedInitialState(nn.LRU(*a, **k)))
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:2], ('batch',))
  batch = batch_of()._replace(lengths=LENGTHS)
  _, metrics = total_gradient(
    model, [batch], num_windows=4, influence=influence.uoro(pairs=2), mesh=mesh
  )
  assert metrics.credit_norm[0] == 0
  assert (metrics.credit_norm[1:] > 0).all()
  with pytest.raises(ValueError, match=r'B=2 rows on a mesh, got \(1, 1,'):
    total_gradient(
      model,
      [batch],
      num_windows=4,
      influence=influence.uoro(rows='together'),
      mesh=mesh,
    )


def test_looking_back_to_the_start_is_exact() -> None:
  """Through ragged rows and a learned initial state."""
  model = stack(nn.LSTM, lambda *a, **k: nn.LearnedInitialState(nn.GRU(*a, **k)))
  batch = batch_of()._replace(lengths=LENGTHS)
  got, _ = total_gradient(
    model, [batch], num_windows=4, influence=influence.lookback(4)
  )
  whole, _ = total_gradient(model, [batch], 'bptt_aux', num_windows=4)
  assert_close(got, whole)


def test_looking_back_cuts_the_gradient_before_the_last_windows() -> None:
  """Where a second window before the loss's begins."""
  model = elman()
  batch = batch_of()
  got, _ = total_gradient(model, [batch], num_windows=3, influence='lookback')
  plan = fptt_jax.make_windows(T, num_windows=3)
  x = jnp.asarray(batch.inputs)

  def loss(params: Any) -> jax.Array:
    total = jnp.zeros([])
    for k in range(3):
      begin = plan.starts[max(k - 1, 0)]
      fixed = jax.lax.stop_gradient(params)
      hidden, _ = model.apply(fixed, model.initial_state(B), x[:begin], None, None)
      part = slice(begin, plan.ends[k])
      _, outputs = model.apply(params, hidden, x[part], None, None)
      size = plan.ends[k] - plan.starts[k]
      error = outputs[-size:] - batch.targets[plan.starts[k] : plan.ends[k]]
      total += (error**2).mean()
    return total

  params = model.init(jax.random.split(jax.random.key(0))[0])
  assert_close(got, jax.grad(loss)(params))


def test_checkpointed_windows_have_the_same_gradient_and_less_memory() -> None:
  """Numbers to rounding; memory grows by a few states a window."""
  model = stack(nn.LSTM)
  options = dict(window_size=3)
  for method in ('bptt_aux', 'ftrl'):
    whole, _ = total_gradient(model, [batch_of(48)], method, **options)
    got, _ = total_gradient(
      model, [batch_of(48)], method, checkpoint_windows=True, **options
    )
    assert_close(got, whole, 1e-12)
  used = {}
  for kept in (False, True):
    trainer = fptt_jax.make_trainer(
      helpers.lstm(hidden=16),
      SERIES,
      optax.sgd(0.1),
      method='bptt_aux',
      window_size=16,
      checkpoint_windows=kept,
    )
    batch = jax.eval_shape(lambda: helpers.series_batch(256, 16))
    state = jax.eval_shape(trainer.init, jax.random.key(0), batch)
    compiled = helpers.optimized(trainer.step.lower(state, batch))
    used[kept] = compiled.memory_analysis().temp_size_in_bytes
  assert used[True] < used[False] / 4


def linear() -> fptt_jax.Model:
  """h' = a h + b x, with two weights."""

  def apply(params, h, x, mask, key):
    def step(h, x_t):
      h = params['a'] * h + params['b'] * x_t
      return h, h

    return jax.lax.scan(step, h, x)

  weights = {'a': jnp.full((1, 1), 0.3), 'b': jnp.full((1, 1), -0.2)}
  return fptt_jax.Model(lambda key: weights, lambda size: jnp.zeros((size, 1)), apply)


@pytest.mark.parametrize('name', ['none', 'rtrl'])
def test_fptt_converges_to_a_zero_of_the_gradient_it_is_given(name: str) -> None:
  """The whole gradient with exact credit, and without it that of the windows alone."""
  x = np.random.default_rng(0).normal(size=(T, 1, 1))
  batch = fptt_jax.Batch(x, np.concatenate([np.zeros((2, 1, 1)), x[:-2]]))
  model = linear()
  # A large α keeps the weights still within a sequence; the inner steps solve for them.
  trainer = fptt_jax.make_trainer(
    model,
    SERIES,
    fptt_jax.fptt(optax.sgd(0.008), alpha=100.0),
    num_windows=T,
    inner_steps=20,
    influence=name,
  )
  state = trainer.init(jax.random.key(0), batch)
  sequences = np.arange(1000)
  run = fptt_jax.scan_train_steps(trainer, lambda source, item: source)
  state, _ = run(state, batch, sequences)
  weights = fptt_jax.fptt_eval_params(state.opt_state, state.params)

  def loss(params: Any, cut: bool) -> jax.Array:
    h = model.initial_state(1)
    total = jnp.zeros([])
    for x_t, y_t in zip(jnp.asarray(x), batch.targets, strict=True):
      h = jax.lax.stop_gradient(h) if cut else h
      h, outputs = model.apply(params, h, x_t[None], None, None)
      total += ((outputs[0] - y_t) ** 2).mean()
    return total

  whole, cut = (
    float(optax.tree.norm(jax.grad(loss)(weights, cut))) for cut in (False, True)
  )
  zero, other = (whole, cut) if name == 'rtrl' else (cut, whole)
  assert zero < 0.006
  assert other > 0.03


def test_refused_options() -> None:
  """Each error names what it got."""
  with pytest.raises(ValueError, match=r'pairs must be an integer >= 1, got 0'):
    influence.uoro(pairs=0)
  with pytest.raises(ValueError, match=r"rows must be one of .*, got 'all'"):
    influence.uoro(rows='all')
  with pytest.raises(ValueError, match=r"balance must be one of .*, got 'all'"):
    influence.uoro(balance='all')
  with pytest.raises(ValueError, match=r"balance .*rows='together', got 'unit'"):
    influence.uoro(rows='together', balance='unit')
  with pytest.raises(ValueError, match=r"balance .*several units, got 'unit'"):
    total_gradient(
      stack(nn.IncrementalRNN),
      [batch_of()],
      influence=influence.uoro(balance='unit'),
    )
  with pytest.raises(ValueError, match=r'terms must be an integer >= 1, got 0'):
    influence.kronecker(terms=0)
  with pytest.raises(ValueError, match=r"reduction must be one of .*, got 'svd'"):
    influence.kronecker(reduction='svd')
  with pytest.raises(ValueError, match=r"terms must be 1 .*'signs', got 2"):
    influence.kronecker(terms=2, reduction='signs')
  with pytest.raises(ValueError, match=r'windows must be an integer >= 2.*got 1'):
    influence.lookback(1)
  for method in ('tbptt', 'bptt'):
    with pytest.raises(ValueError, match=rf"checkpoint_windows=True, got '{method}'"):
      fptt_jax.make_trainer(
        elman(), SERIES, optax.sgd(0.1), method=method, checkpoint_windows=True
      )


def decaying() -> fptt_jax.Model:
  """h' = a h + b x by units, with the state as its output."""
  weights = {'a': jnp.array([[0.8, -0.5]]), 'b': jnp.array([[1.0, 0.7]])}

  def apply(params, h, x, mask, key):
    def step(h, inputs):
      x_t, mask_t = inputs
      new = params['a'] * h + params['b'] * x_t
      h = new if mask_t is None else jnp.where(mask_t[:, None], new, h)
      return h, h

    return jax.lax.scan(step, h, (x, mask))

  return fptt_jax.Model(lambda key: weights, lambda size: jnp.zeros((size, 2)), apply)


def test_synthetic_gradients_learn_the_credit_of_a_linear_network() -> None:
  """Of a loss h²/2 in each step, the steps after h send back h a²/(1 - a²).

  The inputs are independent, so that they add nothing in the mean.
  """
  rows = 256
  trainer = fptt_jax.make_trainer(
    decaying(),
    SERIES,
    optax.set_to_zero(),
    method='tbptt',
    window_size=2,
    carry_hidden=True,
    influence=influence.synthetic(optax.sgd(0.05)),
  )
  nothing = np.zeros((4, rows, 2))

  def make_batch(source: Any, key: jax.Array) -> fptt_jax.Batch:
    return fptt_jax.Batch(jax.random.normal(key, (4, rows, 2)), nothing)

  keys = jax.random.split(jax.random.key(1), 600)
  state = trainer.init(jax.random.key(0), make_batch((), keys[0]))
  run = fptt_jax.scan_train_steps(trainer, make_batch)
  state, metrics = run(state, (), keys)
  a = np.array([0.8, -0.5])
  # A window's objective is the mean over two steps and two outputs of h².
  expected = np.diag(2 * a**2 / (1 - a**2)) / 4
  weights = state.influence.weights
  np.testing.assert_allclose(weights['out'][0], expected, atol=0.08)
  np.testing.assert_allclose(weights['bias'][0], 0, atol=0.08)
  assert metrics.credit_norm[0, 0] == 0
  assert (metrics.credit_norm[1:] > 0).all()


def test_synthetic_gradients_do_not_learn_where_sequences_start() -> None:
  """With one window nothing is ever carried on. In batches that go on, the second one
  starts where the first ended.
  """
  for carries in (False, True):
    trainer = helpers.quick_trainer(
      elman(),
      SERIES,
      optax.sgd(0.1),
      method='tbptt',
      num_windows=1,
      influence='synthetic',
      carry_hidden=carries,
    )
    state = trainer.init(jax.random.key(0), batch_of())
    for _ in range(2):
      state, _ = trainer.step(state, batch_of())
    bias = np.abs(state.influence.weights['bias']).max()
    assert (bias > 0) == carries


def test_a_synthetic_gradient_of_zero_is_none_and_ends_with_the_sequence() -> None:
  """It is kept from batch to batch, and rows end where their last valid step is."""
  model = decaying()
  x = np.random.default_rng(0).normal(size=(T, B, 2))
  batch = fptt_jax.Batch(x, np.zeros((T, B, 2)), lengths=LENGTHS)
  start = influence.synthetic(optax.sgd(0.0), hidden_features=3)
  got, _ = total_gradient(model, [batch], num_windows=3, influence=start)
  plain, _ = total_gradient(model, [batch], num_windows=3)
  jax.tree.map(np.testing.assert_array_equal, got, plain)

  trainer = helpers.quick_trainer(
    model, SERIES, optax.sgd(0.0), method='tbptt', num_windows=3, influence=start
  )
  state = trainer.init(jax.random.key(0), batch)
  weights = state.influence.weights | {'bias': jnp.ones((1, 2))}
  state = state._replace(influence=state.influence._replace(weights=weights))
  state, metrics = trainer.step(state, batch)
  np.testing.assert_array_equal(state.influence.weights['bias'], 1.0)
  a, b = np.array([0.8, -0.5]), np.array([1.0, 0.7])
  h = np.zeros((B, 2))
  for k in range(3):
    squares = np.zeros(2)
    of_a = np.zeros((B, 2))
    of_b = np.zeros((B, 2))
    for t in range(2 * k, 2 * k + 2):
      valid = (t < LENGTHS)[:, None]
      of_a = np.where(valid, a * of_a + h, of_a)
      of_b = np.where(valid, a * of_b + x[t], of_b)
      h = np.where(valid, a * h + b * x[t], h)
    goes_on = (2 * k + 2 < LENGTHS)[:, None]
    parts = [np.where(goes_on, part, 0).sum(0) / B for part in (of_a, of_b)]
    squares = sum((part**2).sum() for part in parts)
    np.testing.assert_allclose(metrics.credit_norm[k], squares**0.5)


def test_synthetic_gradients_learn_from_what_arrives() -> None:
  """One update of the map by hand, and refused options."""
  model = decaying()
  method = influence.synthetic(optax.sgd(1.0))
  params = model.init(jax.random.key(0))
  window = first_window(model, batch_of(), slice(0, 1))._replace(
    x=jnp.ones((1, B, 2)), ends=jnp.array([False, True])
  )
  h = jnp.array([[1.0, 2.0], [3.0, 4.0]])
  state = method.init(window, params, h)
  state = state._replace(weights=state.weights | {'bias': jnp.array([[0.5, 1.0]])})
  delta = jnp.array([[0.1, 0.2], [0.3, 0.4]])
  moved = method.observe(window, params, h, state, delta)
  # The guess of the first row goes back through the decay; the second row ends.
  arrived = np.array([[0.8 * 0.5, -0.5 * 1.0], [0.0, 0.0]])
  error = np.array([[0.5, 1.0]] * 2) - (B * np.asarray(delta) + arrived)
  np.testing.assert_allclose(moved.weights['out'][0], -np.asarray(h).T @ error / B)
  np.testing.assert_allclose(
    moved.weights['bias'][0], np.array([0.5, 1.0]) - error.mean(0)
  )
  # Momentum goes on only where there is something to learn from.
  adam = influence.synthetic(optax.adam(0.1))
  learned = adam.observe(window, params, h, adam.init(window, params, h), delta)
  idle = window._replace(mask=jnp.zeros((1, B), bool))
  chex.assert_trees_all_equal(adam.observe(idle, params, h, learned, delta), learned)
  with pytest.raises(ValueError, match=r'hidden_features must be an integer >= 1'):
    influence.synthetic(hidden_features=0)
  with pytest.raises(
    TypeError, match=r'optimizer must be of type optax.Gradient.*got 3'
  ):
    influence.synthetic(3)
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:2], ('batch',))
  with pytest.raises(ValueError, match=r"B=2 rows on a mesh, .*'synthetic'"):
    total_gradient(elman(), [batch_of()], influence='synthetic', mesh=mesh)


def test_a_map_of_synthetic_gradients_that_is_not_finite_is_put_back() -> None:
  """The map of before the update stays, with its first layer, and training goes on."""
  trainer = helpers.quick_trainer(
    elman(),
    SERIES,
    optax.sgd(0.1),
    method='tbptt',
    num_windows=3,
    influence=influence.synthetic(optax.sgd(math.inf), hidden_features=3),
    skip_nonfinite=True,
  )
  state = trainer.init(jax.random.key(0), batch_of())
  before = jax.tree.map(np.array, state.influence)
  assert np.abs(before.weights['into']).max() > 0
  state, metrics = trainer.step(state, batch_of())
  assert not metrics.skipped.any()
  chex.assert_trees_all_equal(state.influence, before)


def test_a_learner_keeps_the_map_of_synthetic_gradients_where_a_row_starts_anew() -> (
  None
):
  """What was learned is of no row."""
  learner = fptt_jax.make_learner(
    decaying(),
    SERIES,
    optax.set_to_zero(),
    influence=influence.synthetic(optax.sgd(0.1)),
    donate=False,
  )
  x = jnp.ones((1, B, 2))
  state = learner.init(jax.random.key(0), x, jnp.zeros((1, B, 2)))
  reset = np.array([[True, False]])
  for now in (None, None, reset):
    before = state
    state, _, _ = learner.step(state, x, jnp.zeros((1, B, 2)), reset=now)
  weights = state.train.influence.weights
  assert weights['bias'].shape == (1, 2)
  old = before.train.influence.weights['bias']
  assert optax.tree.norm(old) > 0
  # The last step has moved the map a little, not begun it anew.
  assert optax.tree.norm(weights['bias'] - old) < optax.tree.norm(old)
