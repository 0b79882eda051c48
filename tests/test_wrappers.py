"""FPTT inside flax's own optimizer wrappers, and plateau schedules inside the
trainer.
"""

from flax import nnx
from flax.training.train_state import TrainState
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses

TX = fptt_jax.fptt(optax.adam(0.1), alpha=0.3)


def loss_of(weights, x):
  return jnp.sum(jnp.square(x @ weights['kernel'] + weights['bias'][None] - 1.0))


def plain_run(tx, params, xs):
  """Optax alone: restart after two of the steps; (W, W̄, optimizer state)."""
  state = tx.init(params)
  for number, x in enumerate(xs):
    updates, state = tx.update(jax.grad(loss_of)(params, x), state, params)
    params = optax.apply_updates(params, updates)
    if number == 1:
      params, state = fptt_jax.fptt_restart(state, params)
  return params, fptt_jax.fptt_eval_params(state, params), state


XS = np.random.default_rng(0).normal(size=(4, 5, 2)).astype(np.float32)


@pytest.mark.parametrize('jitted', [False, True])
@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: tx,
    lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    lambda tx: optax.apply_if_finite(tx, 3),
    lambda tx: optax.inject_hyperparams(
      lambda alpha: fptt_jax.fptt(optax.adam(0.1), alpha=alpha)
    )(alpha=0.3),
  ],
  ids=['alone', 'chain', 'apply_if_finite', 'inject_hyperparams'],
)
def test_w_bar_and_restart_inside_an_nnx_optimizer(wrap, jitted):
  """Its variables, steps and restarts give what optax alone gives, in variables of the
  model's own type.
  """
  tx = wrap(TX)
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  start = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  expected = plain_run(tx, start, XS)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  def step(model, optimizer, x):
    grads = nnx.grad(
      lambda m: loss_of({'kernel': m.kernel[...], 'bias': m.bias[...]}, x)
    )(model)
    optimizer.update(model, grads)

  def restart(model, optimizer):
    params, optimizer.opt_state = fptt_jax.fptt_restart(
      optimizer.opt_state, nnx.state(model, nnx.Param)
    )
    nnx.update(model, params)

  if jitted:
    step, restart = nnx.jit(step), nnx.jit(restart)
  for number, x in enumerate(XS):
    step(model, optimizer, x)
    if number == 1:
      restart(model, optimizer)
  params = nnx.state(model, nnx.Param)
  w_bar = fptt_jax.fptt_eval_params(optimizer.opt_state, params)
  assert jax.tree.structure(w_bar) == jax.tree.structure(params)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, nnx.to_pure_dict(params), expected[0])
  jax.tree.map(close, nnx.to_pure_dict(w_bar), expected[1])
  assert np.abs(w_bar['kernel'][...] - model.kernel[...]).max() > 1e-4
  nnx.update(model, w_bar)
  close(model.kernel[...], expected[1]['kernel'])


def test_an_nnx_optimizer_of_another_model_is_refused():
  small, large = (nnx.Linear(2, size, rngs=nnx.Rngs(0)) for size in (3, 4))
  optimizer = nnx.Optimizer(small, TX, wrt=nnx.Param)
  for other in (large, nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))):
    with pytest.raises(ValueError, match=r'\(2, 3\)'):
      fptt_jax.fptt_eval_params(optimizer.opt_state, nnx.state(other, nnx.Param))


def test_w_bar_and_restart_inside_a_flax_train_state():
  params = {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}
  expected = plain_run(TX, params, XS)
  state = TrainState.create(apply_fn=None, params=params, tx=TX)
  for number, x in enumerate(XS):
    state = state.apply_gradients(grads=jax.grad(loss_of)(state.params, x))
    if number == 1:
      params, opt_state = fptt_jax.fptt_restart(state.opt_state, state.params)
      state = state.replace(params=params, opt_state=opt_state)
  w_bar = fptt_jax.fptt_eval_params(state.opt_state, state.params)
  jax.tree.map(np.testing.assert_array_equal, (state.params, w_bar), expected[:2])


@pytest.mark.parametrize('inner_steps', [1, 2])
def test_a_plateau_schedule_counts_sequences(inner_steps):
  """With accumulation_size = K (times the inner steps) the scale falls when that of a
  schedule of whole sequences does.
  """
  num_windows, patience = 3, 2
  options = {'factor': 0.5, 'patience': patience, 'rtol': 0.0, 'atol': 0.05}
  plateau = optax.contrib.reduce_on_plateau(
    accumulation_size=num_windows * inner_steps, **options
  )
  optimizer = fptt_jax.fptt(optax.chain(optax.sgd(0.02), plateau))
  model, batch = helpers.elman(), helpers.regression_batch(6, 4)
  trainer = helpers.quick_trainer(
    model,
    losses.terminal_regression(),
    optimizer,
    num_windows=num_windows,
    inner_steps=inner_steps,
  )
  by_sequence = optax.contrib.reduce_on_plateau(**options)
  state, reference = (
    trainer.init(jax.random.key(0), batch),
    by_sequence.init(model.init(jax.random.key(0))),
  )
  scales = []
  for _ in range(30):
    state, metrics = trainer.step(state, batch)
    if inner_steps == 1:
      value = metrics.loss.mean()
      _, reference = by_sequence.update({}, reference, value=value)
      assert float(optax.tree.get(state.opt_state, 'scale')) == float(reference.scale)
    scales.append(float(optax.tree.get(state.opt_state, 'scale')))
  assert scales[patience] == 1.0
  assert scales[-1] < 1.0
  # At most one change per `patience` sequences, where updates would be counted there
  # were several in each.
  falls = np.flatnonzero(np.diff(scales))
  assert len(falls) >= 2
  assert (np.diff(falls) >= patience).all()


def test_accumulated_updates_have_one_inner_step():
  """With `MultiSteps` around it, fptt would miss inner steps."""
  optimizer = optax.MultiSteps(fptt_jax.fptt(optax.sgd(0.1)), 2)
  loss = losses.terminal_regression()
  with pytest.raises(ValueError, match=r'inner_steps must be 1 .*MultiSteps.* got 2'):
    fptt_jax.make_trainer(
      helpers.elman(), loss, optimizer, num_windows=3, inner_steps=2
    )
