"""FPTT's recursion: by hand, against NumPy, its identities, and its use with optax."""

from collections.abc import Callable
import functools
from typing import Any

import chex
from helpers import default_float64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from fptt_jax import (
  FPTTState,
  fptt,
  fptt_algorithm2,
  fptt_eval_params,
  fptt_restart,
)

# Rates at which each also gets to the bottom of Rosenbrock's valley in 15,000 updates.
BASES = {
  'sgd': optax.sgd(1e-3),
  'momentum': optax.sgd(2e-4, momentum=0.9),
  'adam': optax.adam(1e-2),
  'adamw': optax.adamw(1e-2),
  'rmsprop': optax.rmsprop(1e-3),
  'lion': optax.lion(1e-3),
  'clipped_adam': optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
}
every_base = pytest.mark.parametrize('base', BASES.values(), ids=BASES)
every_float = pytest.mark.parametrize(
  'dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16']
)

ESTIMATES = ('running', 'recomputed', 'lagged')
numbers = st.fixed_dictionaries(
  dict(
    alpha=st.floats(0.1, 2.0),
    beta=st.floats(0.05, 1.0),
    kappa=st.floats(0.0, 2.0),
    linear_scale=st.floats(0.0, 1.0),
  )
)
seeds = st.integers(0, 2**16)


def examples(number: int) -> Callable:
  """Return reproducible Hypothesis settings.

  Fixtures here set up the whole test (float64), not one example.
  """
  return settings(
    deadline=None,
    max_examples=number,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
  )


def follow(
  tx: optax.GradientTransformation,
  params: Any,
  grad_fn: Callable,
  xs: Any,
  **extra_args: Any,
) -> tuple[Any, Any]:
  """Return (params, state) before the first and after each update, stacked.

  `grad_fn(params, x)` is the gradient of window x.
  """
  tx = optax.with_extra_args_support(tx)

  def update(carry: Any, x: Any) -> tuple[Any, Any]:
    params, state = carry
    updates, state = tx.update(
      grad_fn(params, x), state, params, grad_fn=lambda p: grad_fn(p, x), **extra_args
    )
    carry = optax.apply_updates(params, updates), state
    return carry, carry

  start = params, tx.init(params)
  _, rest = jax.lax.scan(update, start, xs)
  return jax.tree.map(
    lambda first, later: jnp.concatenate([first[None], later]), start, rest
  )


def walk(*args: Any, **extra_args: Any) -> tuple[Any, Any]:
  """Run `follow` without compiling: ten times as fast for a few small updates."""
  with jax.disable_jit():
    return follow(*args, **extra_args)


def as_given(params: Any, x: Any) -> Any:
  """Return x as the gradient, whatever the parameters."""
  del params
  return x


def tanh_gradient(w: Any, target: Any) -> Any:
  """Return the gradient of log cosh(w - target): bounded, curvature in (0, 1]."""
  return jnp.tanh(w - target)


def one_update(
  tx: optax.GradientTransformation, params: Any, state: Any, grads: Any, **extra: Any
) -> tuple[Any, Any]:
  updates, state = tx.update(grads, state, params, **extra)
  return optax.apply_updates(params, updates), state


def random_tree(
  seed: int = 0, *lead: int, dtype: Any = np.float32
) -> dict[str, jax.Array]:
  """Return a matrix and a bias, with leading axes `lead` for a stack of them."""
  rng = np.random.default_rng(seed)
  return {
    'w': jnp.asarray(rng.normal(size=(*lead, 2, 3)), dtype),
    'b': jnp.asarray(rng.normal(size=(*lead, 3)), dtype),
  }


def last(trajectory: Any) -> Any:
  return jax.tree.map(lambda x: x[-1], trajectory)


def fptt_states(state: Any) -> list[FPTTState]:
  nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, FPTTState))
  return [node for node in nodes if isinstance(node, FPTTState)]


# The recursion, by hand and against NumPy.


def test_sgd_by_hand():
  """The defaults on one weight, with lr = α = β = 1/2 and gradients 1, 1, -2.

  Every number is a binary fraction, so the comparison is exact.
  """
  # t=0: g' = 1
  #      W = 1 - 1/2
  #      λ = -1/2 (1/2 - 1)
  #      W̄ = 1/2 1 + 1/2 1/2 - 1/4
  # t=1: g' = 1 - .25 + .5 (.5 - .5)
  #      W = .5 - .375
  #      λ = .25 - .5 (.125 - .5)
  #      W̄ = .25 + .0625 - .4375
  # t=2: g' = -2 - .4375 + .5 (.125 + .125)
  #      W = .125 + 2.3125 / 2
  #      λ = .4375 - .5 (1.28125 + .125)
  #      W̄ = -.0625 + .640625 + .265625
  params, state = walk(
    fptt(optax.sgd(0.5), alpha=0.5),
    jnp.array(1.0),
    as_given,
    jnp.array([1.0, 1.0, -2.0]),
  )
  chex.assert_trees_all_equal(params, jnp.array([1.0, 0.5, 0.125, 1.28125]))
  chex.assert_trees_all_equal(state.lam, jnp.array([0.0, 0.25, 0.4375, -0.265625]))
  chex.assert_trees_all_equal(state.w_bar, jnp.array([1.0, 0.5, -0.125, 0.84375]))
  chex.assert_trees_all_equal(state.step_count, jnp.arange(4))


def test_momentum_by_hand():
  """No default values: lr = momentum = 1/2, α = 1, β = c = 1/4, κ = 2."""
  # t=0: g' = 4, m = 4
  #      W = 2 - 2
  #      λ = -(0 - 2)
  #      W̄ = .75 2 + 0 - .25 2
  # t=1: g' = 2 - .25 2 + 2 (0 - 1) = -.5, m = .5 4 - .5 = 1.5
  #      W = 0 - .75
  #      λ = 2 - (-.75 - 1)
  #      W̄ = .75 - .1875 - .9375
  # t=2: g' = 0 - .9375 + 2 (-.75 + .375), m = .75 - 1.6875
  #      W = -.75 + .46875
  #      λ = 3.75 - (-.28125 + .375)
  #      W̄ = -.28125 - .0703125 - .9140625
  tx = fptt(
    optax.sgd(0.5, momentum=0.5),
    alpha=1.0,
    beta=0.25,
    kappa=2.0,
    linear_scale=0.25,
  )
  params, state = walk(tx, jnp.array(2.0), as_given, jnp.array([4.0, 2.0, 0.0]))
  chex.assert_trees_all_equal(params, jnp.array([2.0, 0.0, -0.75, -0.28125]))
  chex.assert_trees_all_equal(state.lam, jnp.array([0.0, 2.0, 3.75, 3.65625]))
  chex.assert_trees_all_equal(state.w_bar, jnp.array([2.0, 1.0, -0.375, -1.265625]))


def test_adam_by_hand(x64):
  """Adam with lr 1/10, both decays 1/2 and ε = 0, on gradients 1, 3, -1.

  Both of its moments are of the regularized gradient.
  """
  # t=0: g' = 1, m/.5 = v/.5 = 1
  #      W = -.1
  #      λ = .05
  #      W̄ = -.05 - .05
  # t=1: g' = 3 - .05 + .5 (-.1 + .1)
  #      m = .25 + 1.475, m/.75 = 2.3
  #      v = .25 + 4.35125, v/.75 = 6.135
  #      W = -.1 - .1 2.3 / 2.4768932153 = -.1 - .0928582624
  #      λ = .05 + .5 .0928582624 = .0964291312
  #      W̄ = -.05 - .0964291312 - .0964291312
  # t=2: g' = -1 - .0964291312 + .5 (W - W̄ = .05) = -1.0714291312
  #      m = .8625 - .5357145656, m/.875 = .3734690679
  #      v = 2.300625 + .5739801916, v/.875 = 3.2852630761
  #      W = -.1928582624 - .1 .3734690679 / 1.8125294690 = -.1928582624 - .0206048549
  #      λ = .0964291312 - .5 (W - W̄ = .0293951451)
  #      W̄ = .5 (-.2428582624 - .2134631173) - .0817315586
  tx = fptt(optax.adam(0.1, b1=0.5, b2=0.5, eps=0.0), alpha=0.5)
  params, state = walk(tx, jnp.array(0.0), as_given, jnp.array([1.0, 3.0, -1.0]))
  close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=2e-10)
  close(params, jnp.array([0.0, -0.1, -0.1928582624, -0.2134631173]))
  close(state.lam, jnp.array([0.0, 0.05, 0.0964291312, 0.0817315586]))
  close(state.w_bar, jnp.array([0.0, -0.1, -0.2428582624, -0.3098922485]))


def numpy_recursion(
  w, targets, lr, momentum, alpha, beta, kappa, linear_scale, estimate, n
):
  """Run the recursion with heavy-ball SGD on log cosh(w - target) in NumPy.

  Hyperparameters are arrays with one number per window.
  """
  w_bar = w.copy()
  lam = np.zeros_like(w)
  m = np.zeros_like(w)
  rows = [(w, w_bar, lam)]
  for k, target in enumerate(targets):
    for _ in range(n):
      g = np.tanh(w - target)
      quadratic = kappa[k] * alpha[k] * (w - w_bar)
      m = momentum * m + (g - linear_scale[k] * lam + quadratic)
      w = w - lr * m
    estimates = {
      'running': lam - alpha[k] * (w - w_bar),
      'recomputed': np.tanh(w - target),
      'lagged': g,
    }
    lam = estimates[estimate]
    w_bar = (1 - beta[k]) * w_bar + beta[k] * w - beta[k] / alpha[k] * lam
    rows.append((w, w_bar, lam))
  return [np.stack(column) for column in zip(*rows, strict=True)]


@functools.partial(jax.jit, static_argnums=(5, 6))
def jax_recursion(w, targets, lr, momentum, hyperparameters, estimate, n):
  """Run the same recursion with `fptt`.

  A hyperparameter that is an array becomes a schedule over windows.
  """
  hyperparameters = {
    name: value if value.ndim == 0 else value.__getitem__
    for name, value in hyperparameters.items()
  }
  tx = fptt(optax.sgd(lr, momentum), gradient_estimate=estimate, **hyperparameters)
  xs = jnp.repeat(targets, n, axis=0)
  params, state = follow(tx, w, tanh_gradient, xs, inner_steps=n)
  return jax.tree.map(lambda x: x[::n], [params, state.w_bar, state.lam])


@examples(40)
@given(
  seed=seeds,
  lr=st.floats(0.01, 0.5),
  momentum=st.floats(0.0, 0.9),
  hyperparameters=numbers,
  estimate=st.sampled_from(ESTIMATES),
  inner_steps=st.sampled_from([1, 3]),
  scheduled=st.booleans(),
)
def test_equals_numpy(
  x64, seed, lr, momentum, hyperparameters, estimate, inner_steps, scheduled
):
  """W, W̄ and λ equal a NumPy loop for numbers and schedules in all variants."""
  rng = np.random.default_rng(seed)
  w, targets = rng.normal(size=3), rng.normal(size=(5, 3))
  fade = (
    rng.uniform(0.2, 1.0, 5) if scheduled else np.ones(5)
  )  # The faded ranges are legal too.
  per_window = {name: value * fade for name, value in hyperparameters.items()}
  traced = jax.tree.map(jnp.asarray, per_window if scheduled else hyperparameters)
  expected = numpy_recursion(
    w,
    targets,
    lr,
    momentum,
    **per_window,
    estimate=estimate,
    n=inner_steps,
  )
  actual = jax_recursion(w, targets, lr, momentum, traced, estimate, inner_steps)
  chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


# What the running form really is.


@jax.jit
def recorded_adam(params, gradients, hyperparameters):
  """Return W, W̄, λ and the regularized gradients that Adam received.

  The trace with decay 0 keeps its last input.
  """
  tx = fptt(optax.chain(optax.trace(decay=0.0), optax.adam(0.1)), **hyperparameters)
  params, state = follow(tx, params, as_given, gradients)
  return params, state.w_bar, state.lam, state.base_optimizer_state[0].trace[1:]


def recorded_run(seed: int, **hyperparameters: float) -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(seed)
  gradients = jnp.asarray(rng.normal(size=(12, 4)))
  run = recorded_adam(
    jnp.asarray(rng.normal(size=4)),
    gradients,
    jax.tree.map(jnp.asarray, hyperparameters),
  )
  return *run, gradients


tight = functools.partial(chex.assert_trees_all_close, rtol=1e-11, atol=1e-11)


@examples(25)
@given(seed=seeds, hyperparameters=numbers)
def test_summary_without_the_new_estimate(x64, seed, hyperparameters):
  """W̄_{t+1} = (1 - 2β) W̄_t + 2β W_{t+1} - (β/α) λ_t for any base optimizer.

  This inserts the recursion of λ into the one of W̄.
  """
  alpha, beta = hyperparameters['alpha'], hyperparameters['beta']
  w, w_bar, lam, _, _ = recorded_run(seed, **hyperparameters)
  tight(
    w_bar[1:], (1 - 2 * beta) * w_bar[:-1] + 2 * beta * w[1:] - beta / alpha * lam[:-1]
  )


@examples(25)
@given(seed=seeds, hyperparameters=numbers)
def test_the_running_average_has_no_memory_at_one_half(x64, seed, hyperparameters):
  """At β = 1/2, W̄_{t+1} = W_{t+1} - λ_t / (2α), without the old W̄."""
  w, w_bar, lam, _, _ = recorded_run(seed, **{**hyperparameters, 'beta': 0.5})
  tight(w_bar[1:], w[1:] - lam[:-1] / (2 * hyperparameters['alpha']))


@examples(25)
@given(seed=seeds, alpha=st.floats(0.1, 2.0), kappa=st.floats(0.0, 2.0))
def test_regularizer_is_a_filter_of_past_estimates(x64, seed, alpha, kappa):
  """At β = 1/2 the regularizer's gradient is -λ_t + (κ/2) λ_{t-1}."""
  _, _, lam, regularized, gradients = recorded_run(
    seed, alpha=alpha, beta=0.5, kappa=kappa, linear_scale=1.0
  )
  tight(regularized[0], gradients[0])
  tight(regularized[1:] - gradients[1:], -lam[1:-1] + kappa / 2 * lam[:-2])


@examples(25)
@given(seed=seeds, alpha=st.floats(0.1, 2.0), kappa=st.floats(0.0, 2.0))
def test_estimate_is_a_filter_of_past_updates(x64, seed, alpha, kappa):
  """At β = 1/2, λ_{t+1} = λ_t - λ_{t-1} / 2 - α (W_{t+1} - W_t), without gradients."""
  w, _, lam, _, _ = recorded_run(
    seed, alpha=alpha, beta=0.5, kappa=kappa, linear_scale=1.0
  )
  tight(lam[2:], lam[1:-1] - lam[:-2] / 2 - alpha * (w[2:] - w[1:-1]))


@examples(25)
@given(seed=seeds, alpha=st.floats(0.1, 2.0))
def test_kappa_two_is_pure_damping(x64, seed, alpha):
  """At κ = 2 and β = 1/2, g' = g - (λ_t - λ_{t-1}): a constant λ has no effect."""
  _, _, lam, regularized, gradients = recorded_run(
    seed, alpha=alpha, beta=0.5, kappa=2.0, linear_scale=1.0
  )
  tight(regularized[1:], gradients[1:] - (lam[1:-1] - lam[:-2]))


def test_poles_of_the_estimate():
  """While W does not move, λ has the poles (1±i)/2.

  Their fourth power is -1/4, so λ is divided by -4 every four windows.
  """
  tx = fptt(optax.set_to_zero(), alpha=0.5)
  params, lam_0 = jnp.zeros(3), jnp.array([1.0, -3.0, 0.5])
  state = tx.init(params)._replace(lam=lam_0)
  lams = []
  for _ in range(12):
    lams.append(state.lam)
    params, state = one_update(tx, params, state, jnp.ones(3))
  chex.assert_trees_all_equal(params, jnp.zeros(3))
  lams = np.stack(lams)
  chex.assert_trees_all_equal(lams[4:], -lams[:-4] / 4)
  # From λ_{-1} = λ_0 (W̄_0 = W_0 and λ_1 = λ_0): 1, 1, 1/2, 0 is the real part of (1 -
  # i) ((1+i)/2)^t.
  poles = ((1 - 1j) * ((1 + 1j) / 2) ** np.arange(12)).real
  np.testing.assert_allclose(lams, poles[:, None] * np.asarray(lam_0), atol=1e-7)


@every_base
def test_first_update_equals_the_base_optimizers(base):
  """The first update equals the base optimizer's bit for bit, since λ = W - W̄ = 0."""
  params, grads = random_tree(0), random_tree(1)
  tx = fptt(base, alpha=1.3, beta=0.3, kappa=2.0, linear_scale=0.4)
  actual, state = tx.update(grads, tx.init(params), params)
  expected, base_state = base.update(grads, base.init(params), params)
  chex.assert_trees_all_equal(
    (actual, state.base_optimizer_state), (expected, base_state)
  )


@every_base
def test_no_regularizer_is_the_base_optimizer(base):
  """With κ = c = 0, W equals the base optimizer's bit for bit while λ is nonzero."""
  tx, params = fptt(base, kappa=0.0, linear_scale=0.0), random_tree(0)
  w, state, w_base, base_state = params, tx.init(params), params, base.init(params)
  for t in range(3):
    w, state = one_update(tx, w, state, random_tree(t))
    w_base, base_state = one_update(base, w_base, base_state, random_tree(t))
  chex.assert_trees_all_equal((w, state.base_optimizer_state), (w_base, base_state))
  assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(state.lam))


@jax.jit
def gradient_seen_by_the_base(hyperparameters, g, w, w_bar, lam):
  tx = fptt(optax.trace(decay=0.0), **hyperparameters)
  state = tx.init(w)._replace(w_bar=w_bar, lam=lam)
  return tx.update(g, state, w)[1].base_optimizer_state.trace


@examples(25)
@given(seed=seeds, hyperparameters=numbers)
def test_regularized_gradient_is_the_gradient_of_the_objective(
  x64, seed, hyperparameters
):
  """Autodiff of the documented objective, and of Eq. 4's ℓ + α/2 |W - W̄ - c/α λ|²."""
  alpha = hyperparameters['alpha']
  kappa = hyperparameters['kappa']
  c = hyperparameters['linear_scale']
  w, w_bar, lam, target = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 3)))

  def loss(w):
    return jnp.sum(jnp.log(jnp.cosh(w - target)))

  def documented(w):
    quadratic = kappa * alpha / 2 * jnp.sum((w - w_bar) ** 2)
    return loss(w) - c * jnp.vdot(lam, w) + quadratic

  def as_printed(w):
    return loss(w) + alpha / 2 * jnp.sum((w - w_bar - c / alpha * lam) ** 2)

  grads = jax.grad(loss)(w)
  actual = gradient_seen_by_the_base(hyperparameters, grads, w, w_bar, lam)
  tight(actual, jax.grad(documented)(w))
  printed = {**hyperparameters, 'kappa': 1.0}
  actual = gradient_seen_by_the_base(printed, grads, w, w_bar, lam)
  tight(actual, jax.grad(as_printed)(w))


# At the arg-min of the inner problem.


@jax.jit
def exact_inner_solutions(w, targets, curvature, alpha, linear_scale):
  base = optax.sgd(1 / (curvature + alpha))
  tx = fptt(base, alpha=alpha, linear_scale=linear_scale)
  w, state = follow(tx, w, lambda p, target: curvature * (p - target), targets)
  return w, state.lam


@examples(30)
@given(
  seed=seeds,
  alpha=st.floats(0.2, 2.0),
  curvature=st.floats(0.2, 3.0),
  linear_scale=st.floats(0.0, 1.0),
)
def test_estimate_at_the_arg_min(x64, seed, alpha, curvature, linear_scale):
  """With κ = 1 and an exact inner solution, λ' = ∇ℓ(W') + (1 - c) λ.

  On a quadratic loss of curvature h one gradient step of length 1/(h + α) solves the
  inner problem exactly.
  """
  rng = np.random.default_rng(seed)
  targets = rng.normal(size=(6, 3))
  w, lam = exact_inner_solutions(
    rng.normal(size=3), targets, curvature, alpha, linear_scale
  )
  tight(lam[1:], curvature * (w[1:] - targets) + (1 - linear_scale) * lam[:-1])


@pytest.mark.parametrize('solver', ['one exact step', 'many steps'])
def test_running_equals_recomputed_at_the_arg_min(x64, solver):
  """If the inner problem is solved with κ = c = 1, λ is ∇ℓ_t(W_{t+1}).

  The trajectories agree, and Eq. 5 holds as printed.
  """
  alpha, rng = 0.7, np.random.default_rng(0)
  w, targets = jnp.asarray(rng.normal(size=4)), jnp.asarray(rng.normal(size=(5, 4)))
  if solver == 'one exact step':
    grad_fn, inner_steps, lr = (lambda p, b: 2.0 * (p - b)), 1, 1 / (2.0 + alpha)
  # Curvature of log cosh + α/2 |.|² lies in [α, 1 + α]: steps of 1/(1+α) shrink the
  # distance by 1/(1+α) or better.
  else:
    grad_fn, inner_steps, lr = tanh_gradient, 60, 1 / (1 + alpha)
  xs = jnp.repeat(targets, inner_steps, axis=0)
  runs = {}
  for estimate in ('running', 'recomputed'):
    tx = fptt(optax.sgd(lr), alpha=alpha, gradient_estimate=estimate)
    params, state = follow(tx, w, grad_fn, xs, inner_steps=inner_steps)
    runs[estimate] = jax.tree.map(
      lambda x: x[::inner_steps], (params, state.w_bar, state.lam)
    )
  chex.assert_trees_all_close(runs['running'], runs['recomputed'], rtol=0, atol=1e-10)
  w, w_bar, lam = runs['running']
  chex.assert_trees_all_close(lam[1:], grad_fn(w[1:], targets), rtol=0, atol=1e-10)
  chex.assert_trees_all_close(
    w_bar[1:],
    (w_bar[:-1] + w[1:]) / 2 - grad_fn(w[1:], targets) / (2 * alpha),
    rtol=0,
    atol=1e-10,
  )


def test_running_differs_from_recomputed_after_one_step():
  """After one gradient step the two estimates are different algorithms."""
  w, targets = random_tree(0)['b'], random_tree(1, 4)['b']
  finals = {
    estimate: last(
      walk(
        fptt(optax.sgd(0.1), gradient_estimate=estimate), w, lambda p, b: p - b, targets
      )[1].lam
    )
    for estimate in ('running', 'recomputed', 'lagged')
  }
  for one, other in (
    ('running', 'recomputed'),
    ('running', 'lagged'),
    ('recomputed', 'lagged'),
  ):
    assert np.min(np.abs(finals[one] - finals[other])) > 1e-3


# The recomputed gradient.


@every_float
def test_recomputed_gradient_is_taken_once_at_the_new_weights(dtype):
  """`grad_fn` gets the rounded result of `apply_updates`, once per update."""
  seen = []

  def grad_fn(params):
    seen.append(params)
    return jax.tree.map(lambda p: 3 * p, params)

  tx = fptt(optax.sgd(1e-3), gradient_estimate='recomputed')
  params, state = random_tree(0, dtype=dtype), tx.init(random_tree(0, dtype=dtype))
  for count in (1, 2):
    params, state = one_update(
      tx, params, state, random_tree(count, dtype=dtype), grad_fn=grad_fn
    )
    assert len(seen) == count
    chex.assert_trees_all_equal(seen[-1], params)
    chex.assert_trees_all_equal(
      state.lam, jax.tree.map(lambda p: (3 * p).astype(jnp.float32), params)
    )


def test_recomputed_gradient_is_taken_once_a_window():
  """Six updates in windows of three inner steps call `grad_fn` twice."""
  calls = []

  def grad_fn(params):
    jax.debug.callback(lambda p: calls.append(p), params)
    return params

  tx = fptt(optax.sgd(0.1), gradient_estimate='recomputed')

  @jax.jit
  def step(params, state):
    extra_args = dict(grad_fn=grad_fn, inner_steps=3)
    return one_update(tx, params, state, jnp.ones(2), **extra_args)

  params, state = jnp.ones(2), tx.init(jnp.ones(2))
  at_the_end = []
  for _ in range(6):
    params, state = step(params, state)
    at_the_end.append(params)
  jax.effects_barrier()
  chex.assert_trees_all_equal(
    calls, [np.asarray(at_the_end[2]), np.asarray(at_the_end[5])]
  )


def test_recomputed_gradient_needs_grad_fn():
  """Without `grad_fn` an error names the argument."""
  tx = fptt(optax.sgd(0.1), gradient_estimate='recomputed')
  with pytest.raises(
    ValueError,
    match=r'^grad_fn .* got None',
  ):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.masked(tx, {'w': True, 'b': False}),
    lambda tx: optax.partition(
      {'train': tx, 'freeze': optax.set_to_zero()}, {'w': 'train', 'b': 'freeze'}
    ),
  ],
  ids=['masked', 'partition'],
)
def test_recomputed_gradient_refuses_masked_parameters(wrap):
  """Inside a mask an error is raised; its advice to put the mask inside works."""
  params, grads = random_tree(0), random_tree(1)
  tx = wrap(fptt(optax.sgd(0.1), gradient_estimate='recomputed'))
  with pytest.raises(
    ValueError,
    match=r"^gradient_estimate='recomputed' .*fptt\(optax.masked\(base",
  ):
    tx.update(grads, tx.init(params), params, grad_fn=lambda p: p)
  inside = fptt(wrap(optax.sgd(0.1)), gradient_estimate='recomputed')
  new_params, state = one_update(
    inside, params, inside.init(params), grads, grad_fn=lambda p: p
  )
  chex.assert_trees_all_equal(state.lam, new_params)


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    lambda tx: optax.MultiSteps(tx, 1),
    lambda tx: optax.apply_if_finite(tx, 3),
    lambda tx: optax.inject_hyperparams(
      lambda alpha: fptt(optax.sgd(0.1), alpha=alpha, gradient_estimate='recomputed')
    )(alpha=0.5),
  ],
  ids=['chain', 'multi_steps', 'apply_if_finite', 'inject_hyperparams'],
)
def test_recomputed_gradient_through_wrappers(wrap):
  """`grad_fn` passes through optax's wrappers, two of which use `lax.cond`."""
  tx = wrap(fptt(optax.sgd(0.1), gradient_estimate='recomputed'))
  step = jax.jit(
    lambda params, state: one_update(
      tx, params, state, params, grad_fn=lambda p: jax.tree.map(lambda x: 3 * x, p)
    )
  )
  params, state = step(random_tree(0), tx.init(random_tree(0)))
  (inner,) = fptt_states(state)
  chex.assert_trees_all_close(
    inner.lam, jax.tree.map(lambda x: 3 * x, params), rtol=1e-6
  )


# Inner steps.


@pytest.mark.parametrize('estimate', ['running', 'recomputed', 'lagged'])
def test_summary_and_estimate_move_at_window_ends_only(estimate):
  """With three inner steps λ and W̄ move on every third call, W on every call."""
  tx = fptt(optax.sgd(0.1), gradient_estimate=estimate)
  start, targets = random_tree(0)['b'], random_tree(1, 9)['b']
  w, state = walk(tx, start, lambda p, target: p - target, targets, inner_steps=3)
  moves = lambda x: np.all(x[1:] != x[:-1], axis=-1)
  rests = lambda x: np.all(x[1:] == x[:-1], axis=-1)
  ends = np.arange(1, 10) % 3 == 0
  assert moves(w).all()
  for moved in (state.w_bar, state.lam):
    np.testing.assert_array_equal(moves(moved), ends)
    np.testing.assert_array_equal(rests(moved), ~ends)
  np.testing.assert_array_equal(state.step_count, np.arange(10))


def test_schedules_count_windows():
  """Call n of `update` evaluates the schedules at window ⌊n / inner_steps⌋."""
  asked = {name: [] for name in ('alpha', 'beta', 'kappa', 'linear_scale')}

  def schedule(name, value):
    def at(window):
      asked[name].append(int(window))
      return value

    return at

  values = dict(alpha=0.5, beta=0.4, kappa=1.0, linear_scale=0.9)
  tx = fptt(
    optax.sgd(0.1),
    **{name: schedule(name, value) for name, value in values.items()},
  )
  assert list(asked.values()) == 4 * [[0]]  # The value at window 0 is checked.
  params, state = jnp.ones(2), tx.init(jnp.ones(2))
  for _ in range(6):
    params, state = one_update(tx, params, state, params, inner_steps=2)
  assert [windows[1:] for windows in asked.values()] == 4 * [[0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize('estimate', ['running', 'recomputed'])
def test_inner_steps_may_be_traced(estimate):
  """A traced `inner_steps` gives the same trajectory as the number."""
  tx = fptt(optax.sgd(0.1), gradient_estimate=estimate, alpha=0.3)
  start, targets = random_tree(0)['b'], random_tree(1, 7)['b']

  def run(inner_steps):
    return follow(
      tx, start, lambda p, target: p - target, targets, inner_steps=inner_steps
    )

  chex.assert_trees_all_close(jax.jit(run)(3), run(3), rtol=1e-6)


@pytest.mark.parametrize('value', [0, -1, 1.5, float('nan'), 2**31, 'many'])
def test_inner_steps_out_of_range(value):
  """`update` rejects a number of inner steps that is not an integer >= 1."""
  tx = fptt(optax.sgd(0.1))
  state = tx.init(jnp.ones(2))
  with pytest.raises(ValueError, match=f'^inner_steps .* got {value!r}'):
    tx.update(jnp.ones(2), state, jnp.ones(2), inner_steps=value)


# The battery that optax puts its own optimizers through.


@every_base
def test_unknown_extra_arguments_and_one_trace(base):
  """`update` accepts unknown extra arguments, and is traced once."""
  tx, traces = fptt(base), []

  @jax.jit
  def step(params, state):
    traces.append(None)
    return one_update(tx, params, state, params, extra_argument_nobody_expects=1)

  params, state = random_tree(0), tx.init(random_tree(0))
  for _ in range(3):
    params, state = step(params, state)
  assert len(traces) == 1


def test_extra_arguments_reach_the_base_optimizer():
  """A base optimizer gets those extra arguments that its `update` takes."""
  scale_by_value = lambda updates, state, params=None, *, value, **extra: (
    jax.tree.map(lambda u: value * u, updates),
    state,
  )
  asks = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), scale_by_value
  )
  params = random_tree(0)
  for base, factor in ((asks, -3.0), (optax.scale(-0.5), -0.5)):
    tx = fptt(base)
    updates, _ = tx.update(params, tx.init(params), params, value=-3.0, grad_fn=None)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda p: factor * p, params))


MINIMA = {
  'parabola': np.array([1.0, -1.0, 1.0]),
  'rosenbrock': np.array([1.0, 1.0]),
  'matrix_parabola': np.array([[3.0, -2.0], [1.0, 4.0]]),
  'mixed_tensors': (np.array([1.0, -1.0, 2.0]), np.array([[1.0, 0.0], [-1.0, 1.0]])),
}


def four_problems(params: Any) -> jax.Array:
  """Return the sum of optax's four test problems.

  They are independent except for clipping, so one run covers all of them.
  """
  params, minima = dict(params), dict(MINIMA)
  x, y = params.pop('rosenbrock')
  minima.pop('rosenbrock')
  squares = jax.tree.map(lambda p, m: jnp.sum((p - m) ** 2), params, minima)
  return (1 - x) ** 2 + 100 * (y - x**2) ** 2 + optax.tree.sum(squares)


@every_base
def test_converges(base):
  """On a constant loss, W and W̄ converge to the base optimizer's minimum."""
  start = jax.tree.map(lambda m: jnp.zeros(m.shape), MINIMA) | {
    'parabola': jnp.array([-1.0, 10.0, 1.0])
  }
  tx = fptt(base)

  @jax.jit
  def descend(params):
    step = lambda carry, _: (
      one_update(tx, *carry, jax.grad(four_problems)(carry[0])),
      None,
    )
    return jax.lax.scan(step, (params, tx.init(params)), length=15_000)[0]

  params, state = descend(start)
  for weights in (params, fptt_eval_params(state, params)):
    chex.assert_trees_all_close(
      weights, jax.tree.map(jnp.float32, MINIMA), rtol=3e-2, atol=3e-2
    )


OPTIONS = dict(alpha=0.3, beta=0.4, kappa=1.5, linear_scale=0.8)


@functools.cache
def plain_run(name: str) -> tuple[Any, Any]:
  return walk(fptt(BASES[name], **OPTIONS), random_tree(0), as_given, random_tree(1, 3))


@pytest.mark.parametrize('name', BASES)
def test_wrapped_in_inject_hyperparams(name):
  """Hyperparameters in the state give the same updates as plain numbers."""
  injected = optax.inject_hyperparams(functools.partial(fptt, BASES[name]))(**OPTIONS)
  params, state = walk(injected, random_tree(0), as_given, random_tree(1, 3))
  chex.assert_trees_all_close(
    (params, state.inner_state), plain_run(name), rtol=1e-5, atol=1e-6
  )


@every_float
@every_base
def test_preserves_dtype(base, dtype):
  """Updates have the gradients' dtype, whatever the dtype of W̄ and λ."""
  tx, params = fptt(base), random_tree(0, dtype=dtype)
  updates, _ = jax.eval_shape(
    tx.update, params, jax.eval_shape(tx.init, params), params
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize(
  'base',
  [optax.adamw(0.1), optax.adam(0.1, mu_dtype=jnp.float32)],
  ids=['adamw', 'mu_dtype'],
)
def test_updates_have_the_gradients_dtype(base):
  """Float32 updates of a base optimizer are cast back to bfloat16 gradients."""
  params, grads = random_tree(0), random_tree(1, dtype=jnp.bfloat16)
  assert (
    jax.tree.leaves(base.update(grads, base.init(params), params)[0])[0].dtype
    == jnp.float32
  )
  tx = fptt(base)
  chex.assert_trees_all_equal_dtypes(
    tx.update(grads, tx.init(params), params)[0], grads
  )


@pytest.mark.parametrize('name', BASES)
def test_gradient_accumulation(name):
  """`MultiSteps(fptt(base), 2)` is FPTT on averaged gradients."""
  pairs = jax.tree.map(
    lambda g, d: jnp.reshape(jnp.stack([g + d, g - d], 1), (6, *g.shape[1:])),
    random_tree(1, 3),
    random_tree(2, 3),
  )
  w, state = walk(
    optax.MultiSteps(fptt(BASES[name], **OPTIONS), 2), random_tree(0), as_given, pairs
  )
  rows = lambda which: jax.tree.map(lambda x: x[which], (w, state.inner_opt_state))
  chex.assert_trees_all_close(
    rows(slice(0, None, 2)), plain_run(name), rtol=1e-5, atol=1e-6
  )
  chex.assert_trees_all_equal(rows(slice(1, None, 2)), rows(slice(0, -1, 2)))


@every_base
@pytest.mark.parametrize(
  'dtype',
  [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64],
  ids=lambda d: jnp.dtype(d).name,
)
def test_state_is_stable(base, dtype):
  """The state has no weak types, and `update` keeps its shapes and dtypes."""
  with default_float64(dtype == jnp.float64):
    tx, params = fptt(base), random_tree(0, dtype=dtype)
    state = tx.init(params)
    assert all(
      isinstance(leaf, jax.Array) and not leaf.weak_type
      for leaf in jax.tree.leaves(state)
    )
    skip_or_update = lambda do, g, s, p: jax.lax.cond(
      do, tx.update, lambda g, s, p: (g, s), g, s, p
    )
    _, after = jax.eval_shape(skip_or_update, True, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(after))


def test_weakly_typed_parameters():
  """W̄ and λ of weakly typed parameters are not weakly typed."""
  tx, params = fptt(optax.sgd(0.1)), jnp.array(1.0)
  assert params.weak_type
  state = tx.init(params)
  for s in (state, one_update(tx, params, state, params)[1]):
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(s))


@every_base
def test_schedules_are_accepted_like_numbers(base):
  """A constant schedule equals the number, for all four hyperparameters."""
  schedules = {name: optax.constant_schedule(value) for name, value in OPTIONS.items()}
  params, grads = random_tree(0), random_tree(1)
  trajectories = []
  for tx in (fptt(base, **OPTIONS), fptt(base, **schedules)):
    trajectories.append(
      one_update(tx, *one_update(tx, params, tx.init(params), grads), grads)
    )
  chex.assert_trees_all_equal(*trajectories)


@every_base
def test_tree_map_params(base):
  """`optax.tree.map_params` finds W̄, λ and the base optimizer's moments."""
  tx, params = fptt(base), random_tree(0)
  _, state = one_update(tx, params, tx.init(params), params)
  doubled = optax.tree.map_params(tx, lambda v: 2 * v, state)
  expected = jax.tree.map(
    lambda v: 2 * v if jnp.issubdtype(v.dtype, jnp.floating) else v, state
  )
  chex.assert_trees_all_equal(doubled, expected)


# Composition.


def test_clip_before_and_clip_inside():
  """Clipping in front of `fptt` acts on g alone, clipping inside on g - λ."""
  # Both: W_1 = -1/2, λ_1 = 1/4, W̄_1 = -1/2 (as in test_sgd_by_hand), so that W_1 -
  # W̄_1 = 0. Then -1/2 - .375 or -1/2 - .5.
  before = optax.chain(optax.clip(1.0), fptt(optax.sgd(0.5), alpha=0.5))
  inside = fptt(optax.chain(optax.clip(1.0), optax.sgd(0.5)), alpha=0.5)
  for tx, expected in ((before, -0.875), (inside, -1.0)):
    params, _ = walk(tx, jnp.array(0.0), as_given, jnp.array([4.0, 4.0]))
    chex.assert_trees_all_equal(params, jnp.array([0.0, -0.5, expected]))


def test_inside_a_chain():
  """A transformation in front of `fptt` acts on the loss gradient only."""
  params, grads = random_tree(0), random_tree(1, 3)
  chained = walk(
    optax.chain(optax.scale(-2.0), fptt(optax.adam(0.1))), params, as_given, grads
  )
  alone = walk(
    fptt(optax.adam(0.1)), params, as_given, jax.tree.map(lambda g: -2 * g, grads)
  )
  chex.assert_trees_all_equal((chained[0], chained[1][1]), alone)


NESTED = {'encoder': {'w': (2, 3), 'b': (3,)}, 'head': {'w': (3, 1)}}


def nested_tree(seed: int, *lead: int) -> Any:
  rng = np.random.default_rng(seed)
  is_shape = lambda s: isinstance(s, tuple)
  return jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=(*lead, *s)), jnp.float32),
    NESTED,
    is_leaf=is_shape,
  )


@pytest.mark.parametrize(
  'mask',
  [
    {'encoder': {'w': True, 'b': True}, 'head': {'w': False}},
    {'encoder': True, 'head': False},
  ],
  ids=['tree', 'prefix'],
)
def test_masked(mask):
  """Leaves inside a mask follow FPTT; the others get their raw gradient."""
  params, grads = nested_tree(0), nested_tree(1, 4)
  w, state = walk(optax.masked(fptt(optax.adam(0.1)), mask), params, as_given, grads)
  w_alone, state_alone = walk(
    fptt(optax.adam(0.1)), params['encoder'], as_given, grads['encoder']
  )
  chex.assert_trees_all_close(w['encoder'], w_alone, rtol=1e-6)
  chex.assert_trees_all_close(
    state.inner_state.lam['encoder'], state_alone.lam, rtol=1e-5, atol=1e-7
  )
  chex.assert_trees_all_close(
    last(w)['head']['w'], params['head']['w'] + grads['head']['w'].sum(0), rtol=1e-5
  )


def test_partition_freezes():
  """`partition` with `set_to_zero` keeps frozen leaves bit for bit."""
  params, grads = nested_tree(0), nested_tree(1, 4)
  tx = optax.partition(
    {'train': fptt(optax.adam(0.1)), 'freeze': optax.set_to_zero()},
    {'encoder': 'freeze', 'head': 'train'},
  )
  w, _ = walk(tx, params, as_given, grads)
  for leaf, start in zip(
    jax.tree.leaves(w['encoder']), jax.tree.leaves(params['encoder']), strict=True
  ):
    np.testing.assert_array_equal(leaf, np.broadcast_to(start, leaf.shape))
  chex.assert_trees_all_close(
    w['head'],
    walk(fptt(optax.adam(0.1)), params['head'], as_given, grads['head'])[0],
    rtol=1e-6,
  )


def test_partition_of_two():
  """Two FPTTs with different α on two parts of the tree are independent."""
  parts = {
    'encoder': fptt(optax.sgd(0.1), alpha=0.2),
    'head': fptt(optax.adam(0.1), alpha=1.0),
  }
  params, grads = nested_tree(0), nested_tree(1, 4)
  w, _ = walk(
    optax.partition(parts, {name: name for name in parts}), params, as_given, grads
  )
  for name, tx in parts.items():
    chex.assert_trees_all_close(
      w[name], walk(tx, params[name], as_given, grads[name])[0], rtol=1e-6
    )


def test_alpha_changed_in_the_state():
  """A new α in the state of `inject_hyperparams` is used by the next update."""
  params, grads = random_tree(0), random_tree(1, 3)
  injected = optax.inject_hyperparams(fptt)(optax.sgd(0.1), alpha=0.25)
  params, state = last(walk(injected, params, as_given, grads))
  state.hyperparams['alpha'] = jnp.asarray(1.5)
  changed, changed_state = one_update(injected, params, state, last(grads))
  expected = one_update(
    fptt(optax.sgd(0.1), alpha=1.5), params, state.inner_state, last(grads)
  )
  chex.assert_trees_all_close((changed, changed_state.inner_state), expected, rtol=1e-6)


def test_apply_if_finite():
  """A NaN gradient changes neither W, W̄, λ nor the step count."""
  params, grads = random_tree(0), random_tree(1, 4)
  broken = jax.tree.map(lambda g: g.at[1].set(jnp.nan), grads)
  w, state = follow(
    optax.apply_if_finite(fptt(optax.adam(0.1)), 3), params, as_given, broken
  )
  rows = jax.tree.map(lambda x: jnp.delete(x, 2, axis=0), (w, state.inner_state))
  clean = jax.tree.map(lambda g: jnp.delete(g, 1, axis=0), grads)
  chex.assert_trees_all_close(
    rows, follow(fptt(optax.adam(0.1)), params, as_given, clean), rtol=1e-6
  )
  chex.assert_trees_all_equal(
    *(jax.tree.map(lambda x: x[i], (w, state.inner_state)) for i in (1, 2))
  )


def test_decoupled_weight_decay_counts_as_movement():
  """AdamW's decay moves W, and therefore λ, with zero gradients."""
  tx = fptt(optax.adamw(0.5, weight_decay=0.5), alpha=0.5)
  params, state = one_update(
    tx, jnp.array([4.0, -8.0]), tx.init(jnp.array([4.0, -8.0])), jnp.zeros(2)
  )
  chex.assert_trees_all_equal(params, jnp.array([3.0, -6.0]))
  chex.assert_trees_all_equal(state.lam, jnp.array([0.5, -1.0]))


def test_bfloat16_parameters_keep_a_float32_state():
  """An update that bfloat16 rounds away moves neither W nor λ."""
  tx = fptt(optax.sgd(1.0), alpha=1.0)
  params = jnp.array([1.0, 1.0], jnp.bfloat16)
  # Neighbors of 1 in bfloat16 are 1 - 1/256 and 1 + 1/128: 1 - 0.001 rounds to 1, and
  # 1 - 0.005 to 1 - 1/256.
  params, state = one_update(
    tx, params, tx.init(params), jnp.array([0.001, 0.005], jnp.bfloat16)
  )
  chex.assert_trees_all_equal(params, jnp.array([1.0, 1 - 1 / 256], jnp.bfloat16))
  chex.assert_trees_all_equal(state.lam, jnp.array([0.0, 1 / 256], jnp.float32))
  chex.assert_trees_all_equal(state.w_bar, params.astype(jnp.float32))
  assert (state.w_bar.dtype, state.lam.dtype) == (jnp.float32, jnp.float32)


@pytest.mark.parametrize(
  'state_dtype',
  [jnp.bfloat16, jnp.float32, jnp.float64],
  ids=lambda d: jnp.dtype(d).name,
)
@pytest.mark.parametrize('estimate', ['running', 'recomputed', 'lagged'])
def test_state_dtype(x64, state_dtype, estimate):
  """W̄ and λ have the requested dtype, whatever the dtype of the parameters."""
  args = random_tree(0)['b'], lambda p, target: p - target, random_tree(1, 5)['b']
  w, state = walk(
    fptt(optax.sgd(0.1), gradient_estimate=estimate, state_dtype=state_dtype), *args
  )
  assert (w.dtype, state.w_bar.dtype, state.lam.dtype) == (
    jnp.float32,
    state_dtype,
    state_dtype,
  )
  expected, _ = walk(fptt(optax.sgd(0.1), gradient_estimate=estimate), *args)
  chex.assert_trees_all_close(
    w, expected, atol=10 * float(jnp.finfo(state_dtype).eps) + 1e-6, rtol=0
  )


def test_none_leaves():
  """None among the parameters, such as an absent bias, stays None."""
  params, grads = random_tree(0), random_tree(1, 3)
  w, state = walk(
    fptt(optax.adam(0.1)),
    {**params, 'absent': None},
    as_given,
    {**grads, 'absent': None},
  )
  assert w['absent'] is state.w_bar['absent'] is state.lam['absent'] is None
  expected, _ = walk(fptt(optax.adam(0.1)), params, as_given, grads)
  chex.assert_trees_all_equal({name: w[name] for name in expected}, expected)
  restarted, _ = fptt_restart(last(state), last(w))
  assert restarted['absent'] is None


def trees_of_a_run(
  tx: optax.GradientTransformation, params: Any, **extra_args: Any
) -> list[Any]:
  """Return W̄, λ and W at the start, after an update, read out and restarted."""
  state = tx.init(params)
  new_params, new_state = one_update(
    tx, params, state, params, grad_fn=lambda p: p, **extra_args
  )
  restarted, restarted_state = fptt_restart(new_state, new_params)
  states = [
    tree for s in (state, new_state, restarted_state) for tree in (s.w_bar, s.lam)
  ]
  return [*states, new_params, restarted, fptt_eval_params(new_state, new_params)]


@pytest.mark.parametrize('inner_steps', [1, 2])
@pytest.mark.parametrize('estimate', ['running', 'recomputed', 'lagged'])
def test_shardings_are_kept(estimate, inner_steps):
  """On a mesh of 4 x 2 devices W̄ and λ are sharded like the parameters."""
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Explicit,) * 2)
  specs = {'w': PartitionSpec('x', 'y'), 'b': PartitionSpec('y')}
  params = {
    name: jax.ShapeDtypeStruct(
      shape, jnp.bfloat16, sharding=NamedSharding(mesh, specs[name])
    )
    for name, shape in (('w', (8, 6)), ('b', (6,)))
  }
  tx = fptt(optax.adam(0.1), gradient_estimate=estimate)
  run = functools.partial(trees_of_a_run, tx, inner_steps=inner_steps)
  with jax.set_mesh(mesh):
    trees = jax.eval_shape(run, params)
  for tree in trees:
    assert {name: leaf.sharding.spec for name, leaf in tree.items()} == specs


def test_shardings_of_arrays_are_kept():
  """Outside `jit`, arrays on a mesh of one device keep their named sharding."""
  # Releases differ in the kind of axes that a mesh has by default.
  mesh = jax.make_mesh((1,), ('x',), axis_types=(AxisType.Explicit,))
  sharding = NamedSharding(mesh, PartitionSpec('x'))
  for tree in trees_of_a_run(
    fptt(optax.sgd(0.1)), jax.device_put(random_tree(0), sharding)
  ):
    for leaf in jax.tree.leaves(tree):
      assert isinstance(leaf.sharding, NamedSharding), leaf.sharding
      assert leaf.sharding.mesh == sharding.mesh
      assert leaf.sharding.spec[0] == 'x'


@every_float
def test_abstract_init(dtype):
  """The state of abstract parameters has the shapes and dtypes of the real one."""
  tx, params = fptt(optax.adam(0.1)), random_tree(0, dtype=dtype)
  abstract = jax.eval_shape(tx.init, jax.eval_shape(lambda: params))
  chex.assert_trees_all_equal_shapes_and_dtypes(abstract, tx.init(params))


def test_donation():
  """A jitted step may donate parameters and state: no buffer is shared or unused."""
  tx = fptt(optax.adam(0.1))
  step = jax.jit(functools.partial(one_update, tx), donate_argnums=(0, 1))
  params = random_tree(0)
  state, grads = tx.init(params), random_tree(1)
  for _ in range(2):
    old = params, state
    params, state = step(params, state, grads)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
  chex.assert_tree_all_finite((params, state))


@pytest.mark.parametrize(
  ('dtype', 'state_dtype'),
  [
    (jnp.float32, None),
    (jnp.bfloat16, jnp.float32),
    (jnp.bfloat16, None),
    (jnp.bfloat16, jnp.bfloat16),
  ],
  ids=['float32', 'bfloat16-float32', 'bfloat16', 'bfloat16-bfloat16'],
)
@pytest.mark.parametrize('inner_steps', [1, 2])
@pytest.mark.parametrize('estimate', ['running', 'recomputed', 'lagged'])
def test_strict_promotion(strict_dtypes, estimate, inner_steps, dtype, state_dtype):
  """`update` needs no implicit dtype promotion."""
  params = random_tree(0, dtype=dtype)
  options = dict(gradient_estimate=estimate, state_dtype=state_dtype)
  extra_args = dict(grad_fn=lambda q: q, inner_steps=inner_steps)
  for alpha in (0.5, optax.linear_schedule(0.1, 1.0, 10)):
    tx = fptt(optax.sgd(0.1, momentum=0.9), alpha=alpha, **options)
    update = functools.partial(tx.update, **extra_args)
    updates, _ = jax.eval_shape(update, params, tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)


@pytest.mark.parametrize('inner_steps', [1, 2])
def test_recomputed_gradient_may_be_of_another_dtype(inner_steps):
  """λ keeps its dtype if `grad_fn` returns float32 for bfloat16 gradients."""
  params = {'w': jnp.ones(3, jnp.bfloat16)}
  tx = fptt(optax.sgd(0.1), gradient_estimate='recomputed')
  state = tx.init(params)
  grad_fn = lambda p: {'w': jnp.full(3, 0.3)}
  for _ in range(inner_steps):
    _, state = tx.update(
      params, state, params, grad_fn=grad_fn, inner_steps=inner_steps
    )
  chex.assert_trees_all_equal(state.lam, {'w': jnp.full(3, 0.3, jnp.float32)})


def test_recomputed_gradient_of_another_structure():
  """A `grad_fn` that returns (loss, gradients) raises an error."""
  params = {'w': jnp.ones(3)}
  tx = fptt(optax.sgd(0.1), gradient_estimate='recomputed')
  with pytest.raises(
    ValueError,
    match=r"grad_fn .*'w'.* got ",
  ):
    tx.update(params, tx.init(params), params, grad_fn=lambda p: (0.0, p))


def test_bad_state_dtype_and_schedule():
  """An integer state, and a schedule that starts at α = 0."""
  with pytest.raises(ValueError, match=r'^state_dtype .*float.* got .*int32'):
    fptt(BASE, state_dtype=jnp.int32)
  with pytest.raises(ValueError, match=r'^alpha at window 0 .*> 0.* got '):
    fptt(BASE, alpha=optax.linear_schedule(0.0, 0.5, 10))


def test_a_schedule_is_checked_where_a_step_is_traced():
  """A constant one, and one that takes concrete numbers only, which is not checked."""
  table = [0.1, 0.2, 0.3]
  for alpha in (optax.constant_schedule(0.1), lambda k: table[k]):
    optimizer = lambda rate, alpha=alpha: fptt(optax.sgd(rate), alpha=alpha)
    jax.jit(optimizer(0.1).init)({'w': jnp.ones(1)})
    jax.jit(lambda p, make=optimizer: make(0.1).init(p))({'w': jnp.ones(1)})
  tx = optax.inject_hyperparams(
    lambda rate: fptt(optax.sgd(rate), alpha=optax.constant_schedule(0.1))
  )(0.5)
  params = {'w': jnp.ones(1)}
  state = tx.init(params)
  updates, _ = jax.jit(tx.update)(params, state, params)
  np.testing.assert_allclose(updates['w'], -0.5)
  with pytest.raises(ValueError, match=r'^alpha at window 0 '):
    jax.jit(lambda p: fptt(BASE, alpha=optax.constant_schedule(-1.0)).init(p))(params)


def test_parameters_may_be_python_numbers():
  """Python numbers are accepted as by optax's optimizers."""
  tx = fptt(optax.sgd(0.5))
  state = tx.init({'w': 1.0})
  assert state.w_bar['w'].dtype == jnp.asarray(1.0).dtype
  assert fptt_eval_params(state, {'w': 1.0}) == {'w': 1.0}


def test_vmap_over_alpha():
  """Each lane of a `vmap` over α equals the run with that α."""
  run = lambda alpha: follow(
    fptt(optax.adam(0.1), alpha=alpha), random_tree(0), as_given, random_tree(1, 4)
  )[0]
  lanes, alone = jax.jit(jax.vmap(run)), jax.jit(run)
  alphas = np.array([0.1, 0.5, 1.0], np.float32)
  for lane, alpha in enumerate(alphas):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[lane], lanes(alphas)), alone(alpha), rtol=1e-5, atol=1e-6
    )


# Reading out and restarting.


def partitioned(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  return optax.partition({'one': tx, 'two': tx}, {'w': 'one', 'b': 'two'})


BASE = optax.adam(0.1)
# Wrapper · gradient calls an update · leaves that FPTT moves.
WRAPPERS = {
  'bare': (lambda tx: tx, 1, 'wb'),
  'chain': (lambda tx: optax.chain(optax.clip_by_global_norm(1e6), tx), 1, 'wb'),
  'masked': (lambda tx: optax.masked(tx, {'w': True, 'b': False}), 1, 'w'),
  'multi_steps': (lambda tx: optax.MultiSteps(tx, 2), 2, 'wb'),
  'inject_hyperparams': (
    lambda tx: optax.inject_hyperparams(fptt)(BASE, alpha=0.3),
    1,
    'wb',
  ),
  'apply_if_finite': (lambda tx: optax.apply_if_finite(tx, 3), 1, 'wb'),
  'partition': (partitioned, 1, 'wb'),
  'all_of_it': (
    lambda tx: optax.MultiSteps(
      optax.apply_if_finite(optax.chain(optax.identity(), partitioned(tx)), 3), 2
    ),
    2,
    'wb',
  ),
}


def wrapped(name: str) -> optax.GradientTransformationExtraArgs:
  return optax.with_extra_args_support(WRAPPERS[name][0](fptt(BASE, alpha=0.3)))


@functools.cache
def wrapped_run(name: str) -> tuple[Any, Any]:
  """Return (state, params) of the wrapped FPTT after three updates."""
  grads = jax.tree.map(
    lambda g: jnp.repeat(g, WRAPPERS[name][1], axis=0), random_tree(1, 3)
  )
  params, state = last(walk(wrapped(name), random_tree(0), as_given, grads))
  return state, params


@pytest.mark.parametrize('name', WRAPPERS)
def test_eval_params_through_wrappers(name):
  """W̄ is found at any depth; leaves outside every FPTT are the parameters."""
  state, params = wrapped_run(name)
  alone, _ = wrapped_run('bare')
  w_bar, covered = fptt_eval_params(state, params), WRAPPERS[name][2]
  for leaf in params:
    chex.assert_trees_all_close(
      w_bar[leaf], alone.w_bar[leaf] if leaf in covered else params[leaf], rtol=1e-5
    )
    assert np.all((w_bar[leaf] != params[leaf]) == (leaf in covered))


@pytest.mark.parametrize('name', WRAPPERS)
def test_restart_through_wrappers(name):
  """A restart sets W := W̄ and λ := 0; the next update is the base optimizer's."""
  state, params = wrapped_run(name)
  new_params, new_state = fptt_restart(state, params)
  chex.assert_trees_all_equal(new_params, fptt_eval_params(state, params))
  for before, after in zip(fptt_states(state), fptt_states(new_state), strict=True):
    chex.assert_trees_all_equal(after.lam, optax.tree.zeros_like(before.lam))
    chex.assert_trees_all_equal(after.base_optimizer_state, before.base_optimizer_state)
    assert after.step_count == before.step_count == 3
  assert jax.tree.structure(new_state) == jax.tree.structure(state)

  update, grads = jax.jit(wrapped(name).update), random_tree(5)
  for _ in range(WRAPPERS[name][1]):
    updates, new_state = update(grads, new_state, new_params)
  base_updates, _ = BASE.update(
    grads, wrapped_run('bare')[0].base_optimizer_state, new_params
  )
  for leaf in WRAPPERS[name][2]:
    chex.assert_trees_all_close(updates[leaf], base_updates[leaf], rtol=1e-4, atol=1e-6)


@every_float
def test_restart_rounds_the_summary_too(dtype):
  """After a restart W - W̄ is exactly 0, even for bfloat16 W."""
  tx = fptt(optax.sgd(0.1))
  params, state = last(
    walk(tx, random_tree(0, dtype=dtype), as_given, random_tree(1, 3, dtype=dtype))
  )
  params, state = fptt_restart(state, params)
  updates, new_state = tx.update(optax.tree.zeros_like(params), state, params)
  chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
  chex.assert_trees_all_equal(
    (new_state.w_bar, new_state.lam), (state.w_bar, optax.tree.zeros_like(state.lam))
  )
  chex.assert_trees_all_equal_dtypes(params, updates)


def test_eval_params_have_the_parameters_dtype():
  """The float32 W̄ of bfloat16 parameters is rounded to bfloat16."""
  params = random_tree(0, dtype=jnp.bfloat16)
  params, state = last(
    walk(fptt(optax.sgd(0.1)), params, as_given, random_tree(1, 3, dtype=jnp.bfloat16))
  )
  w_bar = fptt_eval_params(state, params)
  chex.assert_trees_all_equal(
    w_bar, jax.tree.map(lambda w: w.astype(jnp.bfloat16), state.w_bar)
  )
  chex.assert_trees_all_equal_dtypes(w_bar, params)


@pytest.mark.parametrize('jitted', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize('name', ['bare', 'masked'])
def test_results_share_no_buffer(name, jitted):
  """W̄ survives the donation of its state, and a restarted pair can be donated."""
  state, params = jax.tree.map(jnp.copy, wrapped_run(name))
  read, restart = (
    jax.jit(f) if jitted else f for f in (fptt_eval_params, fptt_restart)
  )
  step = jax.jit(functools.partial(one_update, wrapped(name)), donate_argnums=(0, 1))
  w_bar = read(state, params)
  expected = jax.tree.map(np.array, w_bar)
  step(*restart(state, params), random_tree(2))
  assert not any(
    leaf.is_deleted()
    for leaf in jax.tree.leaves((params, [s.w_bar for s in fptt_states(state)]))
  )
  step(params, jax.tree.map(jnp.copy, wrapped_run(name)[0]), random_tree(2))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  chex.assert_trees_all_equal(w_bar, expected)


@pytest.mark.parametrize('read', [fptt_eval_params, fptt_restart])
def test_state_without_fptt(read):
  """An optimizer state without FPTT raises an error that shows its type."""
  params = random_tree(0)
  with pytest.raises(
    ValueError,
    match=r'^opt_state must be .*, got tuple',
  ):
    read(optax.adam(0.1).init(params), params)


@pytest.mark.parametrize('read', [fptt_eval_params, fptt_restart])
def test_state_of_other_parameters(read):
  """Parameters of another structure or shape raise an error that shows both."""
  state = fptt(BASE).init({'w': jnp.ones(2)})
  for other, shown in (
    ({'v': jnp.ones(2)}, r"'v': \(2,\)"),
    ({'w': jnp.ones(3)}, r"'w': \(3,\)"),
    ({'w': {'u': jnp.ones(2)}}, "'u'"),
  ):
    with pytest.raises(
      ValueError,
      match=rf"^params .*'w': \(2,\).*, got .*{shown}",
    ):
      read(state, other)


# Presets.


def test_algorithm_2_as_printed(x64):
  """`fptt_algorithm2` is the paper's box, line by line, with plain SGD.

  The box's gradient includes the regularizer's.
  """
  eta, alpha, rng = 0.3, 0.7, np.random.default_rng(0)
  start, targets = rng.normal(size=4), rng.normal(size=(8, 4))
  grad = lambda w, target: np.tanh(w - target)

  # W̄_1 = W_1, and there is no loss before the first window.
  w = start
  w_bar = start
  grad_previous = np.zeros(4)
  rows = []
  for target in targets:
    # ℓ(W) = ℓ_t(W) + α/2 |W - W̄_t - 1/(2α) ∇ℓ_{t-1}(W_t)|²
    w = w - eta * (grad(w, target) + alpha * (w - w_bar - grad_previous / (2 * alpha)))
    w_bar = (w_bar + w) / 2 - grad(w, target) / (2 * alpha)
    grad_previous = grad(w, target)
    rows.append((w, w_bar, grad_previous))

  tx = fptt_algorithm2(optax.sgd(eta), alpha)
  params, state = walk(tx, jnp.asarray(start), tanh_gradient, jnp.asarray(targets))
  tight(
    (params[1:], state.w_bar[1:], state.lam[1:]),
    tuple(np.stack(column) for column in zip(*rows, strict=True)),
  )


# Bad input.

OUT_OF_RANGE = {
  'alpha': (
    'a finite number > 0 or a schedule',
    [0.0, -0.5, float('nan'), float('inf'), 'large', '0.5', None, np.ones(2)],
  ),
  'beta': (r'a number in \(0, 1\] or a schedule', [0.0, -0.1, 1.5, float('nan')]),
  'kappa': (
    'a finite number >= 0 or a schedule',
    [-1.0, float('inf'), float('nan'), 'two'],
  ),
  'linear_scale': (r'a number in \[0, 1\] or a schedule', [-0.1, 1.1, float('nan')]),
  'gradient_estimate': (
    r"one of \['running', 'recomputed', 'lagged'\]",
    ['exact', None],
  ),
}


@pytest.mark.parametrize(
  ('name', 'expected', 'value'),
  [
    (name, expected, value)
    for name, (expected, values) in OUT_OF_RANGE.items()
    for value in values
  ],
  ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_options(name, expected, value):
  """A value out of range raises an error when `fptt` is called."""
  with pytest.raises(ValueError, match=f'^{name} must be {expected}, got ') as error:
    fptt(optax.sgd(0.1), **{name: value})
  assert repr(value) in str(error.value)


def test_values_on_the_edge_are_accepted():
  """The closed ends of the ranges are accepted, and NumPy and JAX scalars."""
  tx = fptt(optax.sgd(0.1), alpha=np.float64(1e-8), kappa=0, linear_scale=1)
  state = tx.init(jnp.ones(2))
  tx.update(jnp.ones(2), state, jnp.ones(2), inner_steps=np.int64(2))
  fptt(optax.sgd(0.1), alpha=jnp.asarray(0.5), beta=jnp.asarray(0.5), linear_scale=0)
  with pytest.warns(UserWarning, match='beta=1 '):
    fptt(optax.sgd(0.1), beta=1)


def test_traced_values_are_not_checked():
  """Traced numbers, and schedules of traced numbers, raise no error or warning."""
  wild = dict(alpha=-1.0, beta=1.5, kappa=-1.0, linear_scale=2.0)
  build = lambda wild: fptt(optax.sgd(0.1), **wild).init(jnp.ones(2)).step_count
  assert jax.jit(build)(wild) == 0
  assert (
    jax.jit(
      lambda wild: build(
        {name: optax.constant_schedule(value) for name, value in wild.items()}
      )
    )(wild)
    == 0
  )


def test_large_beta_warns_where_it_was_written():
  """β > 1/2 causes a warning that points at the caller's line; 1/2 does not."""
  with pytest.warns(
    UserWarning, match=r'beta=0\.7 > 0\.5 .* 1 - 2 beta = -0\.4'
  ) as record:
    fptt(optax.sgd(0.1), beta=0.7)
  assert [warning.filename for warning in record] == [__file__]
  fptt(optax.sgd(0.1), beta=0.5)


@pytest.mark.parametrize('base', [optax.adam, 'adam', None])
def test_the_base_is_an_optimizer(base):
  """A forgotten call and a name raise an error that shows what is meant."""
  for make in (fptt, fptt_algorithm2):
    with pytest.raises(TypeError, match=r'^base must be .*optax\.adam\(1e-3\), got'):
      make(base)


def test_update_needs_params():
  """`update` without params raises an error, since W - W̄ needs them."""
  tx = fptt(optax.sgd(0.1))
  with pytest.raises(ValueError, match=r'^params .* got None'):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize('dtype', ['int32', 'bool'])
def test_integer_parameters(dtype):
  """Integers among the parameters raise an error with their dtype and shape."""
  with pytest.raises(
    TypeError,
    match=rf'^params .* got {dtype}\[3\]',
  ):
    fptt(optax.sgd(0.1)).init({'w': jnp.ones(2), 'n': jnp.zeros(3, dtype)})


@pytest.mark.parametrize(
  'base',
  [
    optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    optax.apply_if_finite(optax.sgd(0.1), 3),
    optax.conditionally_mask(optax.sgd(0.1), lambda step: step > 1),
  ],
  ids=['multi_steps', 'apply_if_finite', 'conditionally_mask'],
)
def test_bases_that_skip_steps_are_refused(base):
  """λ and W̄ would move on calls without a step."""
  with pytest.raises(ValueError, match='base must be an optimizer that steps on each'):
    fptt(base).init({'w': jnp.ones(2)})
