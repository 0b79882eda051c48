"""Optimizers from all of optax under the trainer: right, or refused before the first
step.
"""

import dataclasses
import functools
import threading

import helpers
from helpers import quick_trainer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.core import optimizers, recipe
import fptt_jax
from fptt_jax import losses
from fptt_jax._usable import check_usable

C = optax.contrib
SGD = optax.sgd(0.1)
FPTT = fptt_jax.fptt(SGD)
BATCH = helpers.regression_batch(4, 2)

OPTIMIZERS = {
  'acprop': C.acprop(1e-3),
  'ademamix': C.ademamix(1e-3),
  'adopt': C.adopt(1e-3),
  'cocob': C.cocob(),
  'dadapt_adamw': C.dadapt_adamw(),
  'dog': C.dog(),
  'dowg': C.dowg(),
  'mechanize': C.mechanize(SGD),
  'momo': C.momo(),
  'momo_adam': C.momo_adam(),
  'muon': C.muon(1e-3),
  'prodigy': C.prodigy(),
  'reduce_on_plateau': optax.chain(SGD, C.reduce_on_plateau()),
  'sam': C.sam(SGD, SGD),
  'schedule_free_adamw': C.schedule_free_adamw(1e-3),
  'schedule_free_sgd': C.schedule_free_sgd(1e-3),
  'simplified_ademamix': C.simplified_ademamix(1e-3),
  'split_real_and_imaginary': C.split_real_and_imaginary(SGD),
  'adabelief': optax.adabelief(1e-3),
  'backtracking': optax.chain(SGD, optax.scale_by_backtracking_linesearch(5)),
  'lbfgs': optax.lbfgs(),
  'lbfgs without a search': optax.lbfgs(0.01, linesearch=None),
  'lookahead-like ema': optax.chain(SGD, optax.ema(0.9)),
  'polyak_sgd': optax.polyak_sgd(),
  'noisy_sgd': optax.noisy_sgd(1e-3, key=0),
}
# Not in the oldest release that is supported.
for new, settings in {'galore': {'rank': 1}, 'madgrad': {}}.items():
  if hasattr(C, new):
    OPTIMIZERS[new] = getattr(C, new)(1e-3, **settings)


def stepped(optimizer, steps=2, **options):
  """Return losses of some steps on one batch."""
  method = options.pop('method', 'bptt')
  trainer = quick_trainer(
    helpers.elman(), losses.terminal_regression(), optimizer, method=method, **options
  )
  # Donates, where the test's compiled step does not: a buffer that is there twice is an
  # error.
  state = trainer.init(jax.random.key(0), BATCH)
  buffers = [
    leaf.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves((state.params, state.opt_state))
    if is_plain(leaf)
  ]
  assert len(set(buffers)) == len(buffers)
  seen = []
  for _ in range(steps):
    state, metrics = trainer.step(state, BATCH)
    seen.append(metrics.loss)
  return np.concatenate(seen)


def is_plain(leaf):
  return (
    isinstance(leaf, jax.Array)
    and leaf.size
    and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  )


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizers_run(name):
  """Each runs, starts from the same loss, and shares no buffer with the parameters."""
  found = stepped(OPTIMIZERS[name])
  assert np.isfinite(found).all()
  np.testing.assert_allclose(found[0], stepped.expected, rtol=1e-6)


stepped.expected = None


@pytest.fixture(scope='module', autouse=True)
def expected():
  stepped.expected = stepped(SGD, steps=1)[0]


@pytest.mark.parametrize(
  ('optimizer', 'message'),
  [
    (C.sophia(1e-3), 'obj_fn|argument'),
    (C.differentially_private_aggregate(1.0, 0.1, 0), 'batch|example|trainer'),
  ],
  ids=['sophia', 'dpsgd'],
)
def test_optimizers_that_ask_for_more_are_refused(optimizer, message):
  """When the trainer is made."""
  with pytest.raises((TypeError, ValueError), match=message):
    fptt_jax.make_trainer(
      helpers.elman(), losses.terminal_regression(), optimizer, method='bptt'
    )


def one_weight(w=2.0):
  return fptt_jax.Model(
    lambda key: {'w': jnp.array([w])},
    lambda n: jnp.zeros((n, 1)),
    lambda p, s, x, m, k: (s, x * p['w'][None, None]),
  )


@pytest.mark.parametrize('devices', [1, 3])
def test_line_search_equals_one_by_hand(devices):
  """Also over devices, each of which sees the mean."""
  x = np.array([1.0, 2.0, 3.0], np.float32).reshape(1, 3, 1)
  batch = fptt_jax.Batch(x, 2 * x)
  solver = optax.lbfgs()
  params = {'w': jnp.zeros(1)}
  objective = lambda p: jnp.mean((x * p['w'][None, None] - 2 * x) ** 2)
  state, by_hand = solver.init(params), []
  for _ in range(2):
    value, grad = jax.value_and_grad(objective)(params)
    by_hand.append(float(value))
    updates, state = solver.update(
      grad, state, params, value=value, grad=grad, value_fn=objective
    )
    params = optax.apply_updates(params, updates)
  mesh = jax.sharding.Mesh(jax.devices()[:devices], ('batch',)) if devices > 1 else None
  trainer = quick_trainer(
    one_weight(0.0), losses.sequence_regression(), solver, method='bptt', mesh=mesh
  )
  state, found = trainer.init(jax.random.key(0), batch), []
  for _ in range(2):
    state, metrics = trainer.step(state, batch)
    found.append(float(metrics.loss[0]))
  np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('inside', [False, True])
def test_sharpness_aware(inside):
  """The gradient of w² at w + 0.05; inside of fptt the first update is the same."""
  ascent = optax.chain(C.normalize(), optax.sgd(0.05))
  optimizer = C.sam(SGD, ascent, sync_period=2, opaque_mode=True)
  method = 'bptt'
  if inside:
    # The regularizer's gradient at the point that the ascent has found is alpha (w -
    # W̄).
    optimizer, method = fptt_jax.fptt(optimizer, alpha=0.5), 'fptt'
  trainer = quick_trainer(
    one_weight(),
    losses.sequence_regression(),
    optimizer,
    method=method,
    num_windows=1 if inside else None,
  )
  batch = fptt_jax.Batch(jnp.ones((2, 1, 1)), jnp.zeros((2, 1, 1)))
  state, _ = trainer.step(trainer.init(jax.random.key(0), batch), batch)
  slope = 2 * 2.05 + (0.5 * 0.05 if inside else 0)
  np.testing.assert_allclose(state.params['w'], [2 - 0.1 * slope], rtol=1e-6)


# What follows fptt.

PARAMS = {'a': jnp.ones(2), 'b': jnp.ones(3)}
MASK = {'a': True, 'b': False}


@pytest.mark.parametrize(
  'optimizer',
  [
    optax.chain(FPTT, optax.scale(0.5)),
    optax.chain(
      FPTT, optax.scale_by_schedule(optax.piecewise_constant_schedule(1.0, {1000: 0.5}))
    ),
    optax.chain(FPTT, optax.add_decayed_weights(0.1)),
    optax.chain(FPTT, optax.masked(optax.set_to_zero(), MASK)),
    optax.chain(FPTT, optax.transforms.freeze(MASK)),
    optax.chain(FPTT, optax.ema(0.9)),
    optax.chain(FPTT, optax.clip(0.1)),
    optax.chain(FPTT, optax.keep_params_nonnegative()),
    optax.chain(FPTT, FPTT),
    optax.chain(FPTT, optax.trace(0.9)),
    C.schedule_free(FPTT, 0.1),
    C.mechanize(FPTT),
    optax.flatten(optax.chain(FPTT, optax.scale(0.5))),
    optax.chain(FPTT, optax.apply_if_finite(optax.scale(0.5), 3)),
    optax.MultiSteps(optax.chain(FPTT, optax.scale(0.5)), 2).gradient_transformation(),
    optax.MultiSteps(
      optax.chain(FPTT, optax.add_decayed_weights(0.1)), 2
    ).gradient_transformation(),
    optax.apply_if_finite(optax.chain(FPTT, optax.clip(0.1)), 3),
    optax.apply_if_finite(optax.chain(FPTT, optax.transforms.freeze(MASK)), 3),
    optax.conditionally_mask(
      optax.chain(FPTT, optax.scale(0.5)), lambda step: step < 3
    ),
  ],
)
def test_what_changes_updates_after_fptt_is_refused(optimizer):
  with pytest.raises(ValueError, match=r'optimizer .* after fptt.*inside'):
    check_usable(
      optax.with_extra_args_support(optimizer), PARAMS, {'value': jnp.ones([])}
    )


@pytest.mark.parametrize(
  'optimizer',
  [
    FPTT,
    optax.chain(optax.clip_by_global_norm(1.0), FPTT),
    fptt_jax.fptt(optax.chain(SGD, optax.scale(0.5), optax.transforms.freeze(MASK))),
    optax.MultiSteps(FPTT, 2).gradient_transformation(),
    optax.apply_if_finite(FPTT, 3),
    optax.apply_if_finite(optax.MultiSteps(FPTT, 2).gradient_transformation(), 3),
    optax.flatten(FPTT),
    optax.MultiSteps(optax.flatten(FPTT), 2).gradient_transformation(),
    optax.MultiSteps(
      FPTT, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    optax.partition({'x': FPTT, 'y': optax.set_to_zero()}, {'a': 'x', 'b': 'y'}),
    optax.transforms.selective_transform(FPTT, freeze_mask=MASK),
    optax.inject_hyperparams(lambda alpha: fptt_jax.fptt(SGD, alpha=alpha))(0.1),
    SGD,
  ],
)
def test_what_leaves_updates_alone_is_not_refused(optimizer):
  check_usable(
    optax.with_extra_args_support(optimizer), PARAMS, {'value': jnp.ones([])}
  )


def test_a_trainer_that_changes_updates_after_fptt_is_not_made():
  with pytest.raises(ValueError, match=r'optimizer .* after fptt'):
    fptt_jax.make_trainer(
      helpers.elman(),
      losses.terminal_regression(),
      optax.chain(FPTT, optax.scale(0.5)),
      num_windows=2,
    )


def test_calls_that_are_skipped_do_not_shift_the_inner_steps():
  make = functools.partial(
    fptt_jax.make_trainer,
    helpers.elman(),
    losses.terminal_regression(),
    optax.apply_if_finite(FPTT, 3),
    num_windows=2,
  )
  make()
  with pytest.raises(ValueError, match=r'inner_steps must be 1 .*apply_if_finite.* 2'):
    make(inner_steps=2)


def test_another_thread_may_trace_an_update_meanwhile():
  """Nothing of the check of one optimizer is in the program of another."""
  tx = fptt_jax.fptt(SGD)
  state = tx.init(PARAMS)
  compiled = []

  def update(grads, state, params=None, **extra_args):
    other = lambda: compiled.append(jax.jit(tx.update)(PARAMS, state, PARAMS))
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    return tx.update(grads, state, params, **extra_args)

  check_usable(
    optax.GradientTransformationExtraArgs(lambda _: state, update),
    PARAMS,
    {'inner_steps': 2},
  )
  assert len(compiled) == 1


@pytest.mark.parametrize(
  'base',
  [
    optax.MultiSteps(SGD, 2).gradient_transformation(),
    optax.apply_if_finite(SGD, 2),
    optax.chain(optax.apply_every(2), SGD),
    optax.lbfgs(),
  ],
  ids=['MultiSteps', 'apply_if_finite', 'apply_every', 'line search'],
)
def test_what_does_not_go_into_fptt(base):
  with pytest.raises(ValueError, match=r'^base '):
    fptt_jax.fptt(base).init(PARAMS)


# Schedules.


def from_window(window, before, after):
  return lambda t: jnp.where(t < window, before, after)


@pytest.mark.parametrize(
  ('name', 'good', 'bad'),
  [
    ('alpha', 0.5, 0.0),
    ('alpha', 0.5, -1.0),
    ('alpha', 0.5, np.nan),
    ('beta', 0.5, 1.5),
    ('beta', 0.5, 0.0),
    ('kappa', 1.0, -1.0),
    ('linear_scale', 1.0, 1.5),
  ],
)
@pytest.mark.parametrize('window', [1, 1000, 65_535])
def test_schedules_that_leave_their_range_are_refused(name, good, bad, window):
  """With the window and the value."""
  with pytest.raises(ValueError, match=rf'{name} at window {window} .* got {bad:g}'):
    fptt_jax.fptt(SGD, **{name: from_window(window, good, bad)})


def test_a_value_that_leaves_its_range_unseen_is_nan():
  """Of a schedule after the windows that are looked at, and of one set in the state."""
  with pytest.raises(ValueError, match='alpha at window'):
    fptt_jax.fptt(SGD, alpha=optax.linear_schedule(0.5, 0.0, 300_000))
  optimizer = optax.inject_hyperparams(lambda alpha: fptt_jax.fptt(SGD, alpha=alpha))(
    0.1
  )
  state = optax.tree.set(optimizer.init(PARAMS), alpha=jnp.float32(-0.1))
  updates, _ = jax.jit(optimizer.update)(PARAMS, state, PARAMS)
  assert np.isnan(updates['a']).all()


def test_evaluate_at_reads_the_summary() -> None:
  """Of --evaluate_at=w_bar the weights are W̄, and of w the last ones."""
  config = recipe.Recipe(optimizer='sgd', lr=0.1, alpha=0.5)
  optimizer = optimizers.make_optimizer(config, 'fptt')
  params = {'w': jnp.ones(2)}
  opt_state = optimizer.init(params)
  grads = {'w': jnp.array([3.0, 4.0])}
  updates, opt_state = optimizer.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  state = fptt_jax.TrainState(params, opt_state, (), (), (), ())
  chosen = {
    place: optimizers.evaluation_params(
      dataclasses.replace(config, evaluate_at=place), 'fptt', state
    )['w']
    for place in ('w', 'w_bar')
  }
  summary = fptt_jax.fptt_eval_params(opt_state, params)['w']
  np.testing.assert_array_equal(chosen['w'], params['w'])
  np.testing.assert_array_equal(chosen['w_bar'], summary)
  assert np.any(chosen['w'] != chosen['w_bar'])


@pytest.mark.parametrize('optimizer', ['sgd', 'adam'])
def test_momentum_windows_is_momentum_by_window(optimizer: str) -> None:
  """The optimizer of --momentum_windows makes the library's updates by window."""
  config = recipe.Recipe(
    method=('tbptt',),
    optimizer=optimizer,
    lr=0.1,
    momentum=0.9,
    momentum_windows=2,
    clip=0.0,
  )
  made = optax.with_extra_args_support(optimizers.make_optimizer(config, 'tbptt'))
  library = {
    'sgd': fptt_jax.sgd_by_window(0.1, num_windows=2, momentum=0.9),
    'adam': fptt_jax.adam_by_window(0.1, num_windows=2),
  }[optimizer]
  params = {'w': jnp.zeros(1)}
  state, expected = made.init(params), library.init(params)
  for window, gradient in ((0, 1.0), (1, -2.0), (0, 3.0)):
    grads = {'w': jnp.full(1, gradient)}
    updates, state = made.update(grads, state, params, window=window)
    same, expected = library.update(grads, expected, params, window=window)
    np.testing.assert_allclose(updates['w'], same['w'], rtol=1e-6)
