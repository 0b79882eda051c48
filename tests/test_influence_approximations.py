"""Credit across windows by random numbers, by repetition, and by checkpoints."""

from typing import Any

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

pytestmark = pytest.mark.usefixtures('x64')

DRAWS = 4000


def credits_of(
  method: influence.Influence, model: fptt_jax.Model, size: int, draws: int
) -> np.ndarray:
  """Credit after T steps in windows of some size, for many keys: [draws, P]."""
  params = model.init(jax.random.key(0))
  batch = batch_of()
  delta = jnp.asarray(np.random.default_rng(1).normal(size=(B, 2)))
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


@pytest.fixture(scope='module')
def small() -> fptt_jax.Model:
  return helpers.elman(hidden=2, dtype='float64')


@pytest.mark.parametrize(('rows', 'size'), [('each', 2), ('each', T), ('together', 2)])
def test_uoro_has_the_exact_mean(small: fptt_jax.Model, rows: str, size: int) -> None:
  """Within five standard errors in each coordinate, with rows that end early."""
  got = credits_of(influence.uoro(rows=rows), small, size, DRAWS)
  [expected] = credits_of(influence.rtrl(), small, size, 1)
  error = got.std(0) / DRAWS**0.5
  assert np.abs(expected).max() > 0.1
  # The chance that one of ten coordinates is beyond is 6e-6.
  assert (np.abs(got.mean(0) - expected) <= 5 * error + 1e-12).all()


def test_the_noise_of_uoro(small: fptt_jax.Model) -> None:
  """It falls with the root of the pairs, and with longer windows."""

  def noise(size: int = 2, **options: Any) -> float:
    got = credits_of(influence.uoro(**options), small, size, DRAWS)
    return float(np.sqrt(got.var(0).sum()))

  one = noise()
  assert one / noise(pairs=2) == pytest.approx(2**0.5, rel=0.1)
  assert noise(size=1) > 1.1 * one


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
  with pytest.raises(ValueError, match=r'B=2 rows on a mesh, got shape \(1, 1,'):
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
  whole, _ = total_gradient(model, [batch_of(48)], 'bptt_aux', **options)
  got, _ = total_gradient(
    model, [batch_of(48)], 'bptt_aux', checkpoint_windows=True, **options
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
  with pytest.raises(ValueError, match=r'windows must be an integer >= 2.*got 1'):
    influence.lookback(1)
  for method in ('tbptt', 'bptt'):
    with pytest.raises(ValueError, match=rf"checkpoint_windows.*method '{method}'"):
      fptt_jax.make_trainer(
        elman(), SERIES, optax.sgd(0.1), method=method, checkpoint_windows=True
      )
  with pytest.raises(TypeError, match='checkpoint_windows must be True or False'):
    total_gradient(elman(), [batch_of()], 'bptt_aux', checkpoint_windows=1)
