"""The convergence study's three numbers: by hand, at the arg-min, against plain
jax.grad; and that measuring changes nothing.
"""

from pathlib import Path
from typing import Any

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import add_task
from experiments.paper import convergence
import fptt_jax
from fptt_jax import Batch, fptt

in_float64 = pytest.mark.usefixtures('x64')


def walk(
  optimizer: optax.GradientTransformationExtraArgs,
  grad: Any,
  w: float,
  targets: Any,
  inner_steps: int = 1,
) -> Any:
  """The optimizer's state after `inner_steps` updates on each window, a loss with
  gradient `grad(w, target)`.
  """
  w = jnp.asarray(w, float)
  state = optimizer.init(w)

  def update(carry: Any, target: jax.Array) -> tuple[Any, None]:
    w, state = carry
    grad_fn = lambda p: grad(p, target)
    updates, state = optimizer.update(
      grad_fn(w), state, w, grad_fn=grad_fn, inner_steps=inner_steps
    )
    return (optax.apply_updates(w, updates), state), None

  (_, state), _ = jax.lax.scan(
    update, (w, state), jnp.repeat(jnp.asarray(targets), inner_steps)
  )
  return state


@in_float64
@pytest.mark.parametrize('chained', [False, True])
def test_numbers_by_hand(chained: bool) -> None:
  """Three windows of ℓ_t = (w - b_t)², b = 1, -1, 1/2, from w = 1, SGD and α both 1/4,
  the recursion in plain numbers.
  """
  targets, alpha, lr = [1.5, -1.0, 0.5], 0.25, 0.25
  w, w_bar, lam, distance, gap, total = 1.0, 1.0, 0.0, 0.0, 0.0, 0.0
  for b in targets:
    w = w - lr * (2 * (w - b) - lam + alpha * (w - w_bar))
    lam = lam - alpha * (w - w_bar)
    w_bar = (w_bar + w) / 2 - lam / (2 * alpha)
    true = 2 * (w - b)
    distance, gap, total = (
      distance + abs(w - w_bar),
      gap + abs(lam - true) / abs(true),
      total + true,
    )
  optimizer = fptt(optax.sgd(lr), alpha=alpha)
  optimizer = (
    optax.chain(optax.clip_by_global_norm(100.0), optimizer) if chained else optimizer
  )
  state = walk(convergence.monitored(optimizer), lambda p, b: 2 * (p - b), 1.0, targets)
  numbers, reset = convergence.read(state)
  assert numbers == pytest.approx(
    {'distance': distance / 3, 'lam_gap': gap / 3, 'path_gradient': abs(total) / 3},
    rel=1e-12,
  )
  chex.assert_trees_all_equal(reset.optimizer_state, state.optimizer_state)
  chex.assert_trees_all_equal(reset[:-1], (0, 0.0, 0.0, 0.0))


@in_float64
@pytest.mark.parametrize('solver', ['one exact step', 'many steps', 'one short step'])
def test_estimate_has_no_gap_at_the_arg_min(solver: str) -> None:
  """Where the inner problem is solved (see test_transform.py), λ is the gradient
  it stands for; after a single short step it is far from it. Inner steps are counted as
  one window.
  """
  alpha, targets = 0.7, np.random.default_rng(0).normal(size=5)
  if solver == 'one exact step':
    grad, lr, inner_steps = (lambda p, b: 2.0 * (p - b)), 1 / (2.0 + alpha), 1
  else:
    grad, lr, inner_steps = (
      (lambda p, b: jnp.tanh(p - b)),
      1 / (1 + alpha),
      60 if solver == 'many steps' else 1,
    )
    lr = lr if solver == 'many steps' else 0.01
  optimizer = convergence.monitored(fptt(optax.sgd(lr), alpha=alpha))
  state = walk(optimizer, grad, 1.0, targets, inner_steps)
  gap = convergence.read(state)[0]['lam_gap']
  assert state.windows == 5
  assert gap > 0.5 if solver == 'one short step' else gap < 1e-9


def test_measuring_leaves_the_training_as_it_is() -> None:
  """Parameters, hidden state and the optimizer's own state after two batches are those
  without monitoring, to the bit.
  """
  batch, states = helpers.regression_batch(7, 4), []
  for wrap in (lambda tx: tx, convergence.monitored):
    optimizer = wrap(
      optax.chain(optax.clip_by_global_norm(1.0), fptt(optax.adam(1e-2), alpha=0.1))
    )
    trainer = helpers.quick_trainer(
      helpers.elman(), fptt_jax.losses.terminal_regression(), optimizer, num_windows=3
    )
    state = trainer.init(jax.random.key(0), batch)
    for _ in range(2):
      state, _ = trainer.step(state, batch)
    states.append(state)
  plain, watched = states
  assert watched.opt_state.windows == 6
  unwrapped = watched._replace(opt_state=watched.opt_state.optimizer_state)
  chex.assert_trees_all_equal(plain._replace(key=None), unwrapped._replace(key=None))


@in_float64
def test_mean_gradient_is_that_of_the_mean_loss() -> None:
  """Two batches of T = 7 in uneven windows of 2, 2, 3: jax.grad of the mean of six
  window losses written out, weights t/T, hidden state stopped at each window's start;
  the given parameters stay usable.
  """
  model, loss = helpers.elman(dtype=np.float64), fptt_jax.losses.terminal_regression()
  batches = [
    helpers.regression_batch(7, 3, seed=seed, dtype=np.float64) for seed in range(2)
  ]
  params = model.init(jax.random.key(1))

  def window_losses(params: Any, batch: Batch) -> jax.Array:
    hidden, values = model.initial_state(3), []
    for steps in (slice(0, 2), slice(2, 4), slice(4, 7)):
      hidden, outputs = model.apply(
        params,
        jax.lax.stop_gradient(hidden),
        jnp.asarray(batch.inputs[steps]),
        None,
        None,
      )
      values.append(steps.stop / 7 * jnp.mean((outputs[-1, :, 0] - batch.targets) ** 2))
    return jnp.stack(values)

  mean = lambda p: jnp.concatenate(
    [window_losses(p, batch) for batch in batches]
  ).mean()
  gradient = helpers.quick(jax.grad(mean))(params)
  expected = np.sqrt(sum(np.sum(np.asarray(g) ** 2) for g in jax.tree.leaves(gradient)))
  for _ in range(2):  # Nothing is left over from one call to the next.
    assert convergence.mean_gradient_norm(
      model, loss, params, batches, 3
    ) == pytest.approx(expected, rel=1e-10)


def test_study_has_a_row_an_interval(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Five batches at intervals of two: rows after 2, 4 and 5, every number there; and
  its plot.
  """
  monkeypatch.setattr(
    add_task, 'make_model', lambda config: helpers.elman(hidden=config.hidden)
  )
  config = add_task.Config(
    seq_len=6, num_windows=2, hidden=2, batch_size=3, batches=5, eval_every=2
  )
  rows = convergence.study(
    config, fptt(optax.adam(1e-2), alpha=0.1), seed=0, num_fixed=1
  )
  assert [row['step'] for row in rows] == [2, 4, 5]
  assert all(set(row) == {'step', *convergence.LABELS} for row in rows)
  assert all(np.isfinite(value) and value > 0 for row in rows for value in row.values())
  convergence.plot(tmp_path / 'convergence.png', {'alpha 0.1': rows})
  assert (tmp_path / 'convergence.png').stat().st_size > 10_000


def test_things_of_the_wrong_kind_are_refused() -> None:
  """An optimizer without fptt or with two, a state that is not monitored, a reading of
  nothing.
  """
  w = jnp.ones(2)
  for base in (optax.sgd(0.1), optax.chain(fptt(optax.sgd(0.1)), fptt(optax.sgd(0.1)))):
    with pytest.raises(ValueError, match=r'exactly one fptt\(\.\.\.\) in it, got [02]'):
      convergence.monitored(base).init(w)
  with pytest.raises(TypeError, match=r'state of monitored\(\.\.\.\), got FPTTState'):
    convergence.read(fptt(optax.sgd(0.1)).init(w))
  with pytest.raises(ValueError, match='at least one window since the last reading'):
    convergence.read(convergence.monitored(fptt(optax.sgd(0.1))).init(w))
