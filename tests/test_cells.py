"""FastGRNN, iRNN, IndRNN and LRU satisfy their equations, their papers' claims and the
contract of layers.
"""

from collections.abc import Callable
import functools
from typing import Any

import chex
from flax import nnx
from helpers import quick, quick_trainer, regression_batch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import nn
from fptt_jax.nn import LRU, FastGRNN, IncrementalRNN, IndRNN, LRUState

T, B, D, H, N = 5, 3, 2, 4, 6
KEY = jax.random.key(0)
CELLS: dict[str, Callable[..., nnx.Module]] = {
  'FastGRNN': lambda **kw: FastGRNN(D, H, **kw),
  'FastGRNN low rank': lambda **kw: FastGRNN(D, H, w_rank=1, u_rank=2, **kw),
  'IncrementalRNN': lambda **kw: IncrementalRNN(D, H, eta=0.2, **kw),
  'IncrementalRNN low rank': lambda **kw: IncrementalRNN(
    D, H, u_rank=2, inner_steps=1, eta=0.5, **kw
  ),
  'IndRNN': lambda **kw: IndRNN(D, H, **kw),
  'IndRNN limited': lambda **kw: IndRNN(
    D, H, max_weight=0.4, initial_range=(-0.4, 0.4), **kw
  ),
  'LRU': lambda **kw: LRU(D, H, state_features=N, r_min=0.5, **kw),
  'LRU square': lambda **kw: LRU(D, D, state_features=N, **kw),
}
EACH_CELL = pytest.mark.parametrize('name', list(CELLS))
ONE_OF_EACH = pytest.mark.parametrize(
  'name', ['FastGRNN low rank', 'IncrementalRNN', 'IndRNN limited', 'LRU']
)
CLOSE = dict(rtol=1e-5, atol=1e-6)


def model_of(name: str, **kwargs: Any) -> fptt_jax.Model:
  return nn.from_nnx(lambda rngs: CELLS[name](rngs=rngs, **kwargs))


def init_of(build: Callable[[nnx.Rngs], nnx.Module]) -> Any:
  return quick(nn.from_nnx(build).init)(KEY)


@functools.cache
def run_of(name: str) -> tuple[Any, Callable[..., Any]]:
  """Return a cell's initial state and its compiled window (state, x, mask) -> (state,
  y).
  """
  model = model_of(name)
  params = scattered(quick(model.init)(KEY))
  return model.initial_state(B), quick(
    lambda state, x, mask: model.apply(params, state, x, mask, None)
  )


def random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape)


def scattered(params: Any) -> Any:
  """Perturb parameters so that none has a special value such as 0 or 1."""
  leaves, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(
    structure,
    [p + 0.1 * random(*p.shape, seed=i).astype(p.dtype) for i, p in enumerate(leaves)],
  )


def state_like(state: Any) -> Any:
  return jax.tree.map(
    lambda s: jnp.asarray(np.abs(random(*s.shape, seed=7)), s.dtype), state
  )


# The equations, in NumPy.


def sigmoid(x: Any) -> Any:
  return 1 / (1 + np.exp(-x))


def product(factors: dict[int, Any]) -> np.ndarray:
  return functools.reduce(
    np.matmul, [np.asarray(factors[i]) for i in range(len(factors))]
  )


def fast_grnn(p: Any, h: np.ndarray, x: np.ndarray) -> np.ndarray:
  shared = product(p['w_x']).T @ x + product(p['w_h']).T @ h
  z, candidate = sigmoid(shared + p['bias'][:H]), np.tanh(shared + p['bias'][H:])
  return (sigmoid(p['zeta']) * (1 - z) + sigmoid(p['nu'])) * candidate + z * h


def incremental(p: Any, h: np.ndarray, x: np.ndarray) -> np.ndarray:
  g = h
  for eta in np.asarray(p['eta']):
    total = g + h
    g = g + eta * (
      np.maximum(product(p['w_h']).T @ total + p['w_x'].T @ x + p['bias'], 0) - total
    )
  return g


def independent(
  p: Any, h: np.ndarray, x: np.ndarray, limit: float = np.inf
) -> np.ndarray:
  return np.maximum(p['w_x'].T @ x + np.clip(p['u'], -limit, limit) * h + p['bias'], 0)


@pytest.mark.parametrize(
  ('name', 'equation'),
  [
    ('FastGRNN', fast_grnn),
    ('FastGRNN low rank', fast_grnn),
    ('IncrementalRNN', incremental),
    ('IncrementalRNN low rank', incremental),
    ('IndRNN', independent),
    ('IndRNN limited', functools.partial(independent, limit=0.4)),
  ],
)
@pytest.mark.usefixtures('x64')
def test_steps_by_their_equations(name, equation):
  """A window equals the paper's equation, applied step by step to column vectors."""
  model = model_of(name, param_dtype=jnp.float64)
  params, x = scattered(quick(model.init)(KEY)), random(T, B, D)
  start = state_like(model.initial_state(B))
  state, y = quick(lambda p, s, x: model.apply(p, s, x, None, None))(params, start, x)
  params = jax.tree.map(np.asarray, params)
  for b in range(B):
    h = np.asarray(start[b])
    for t in range(T):
      h = equation(params, h, x[t, b])
      np.testing.assert_allclose(y[t, b], h, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(state[b], y[-1, b])


@pytest.mark.parametrize('name', ['LRU', 'LRU square'])
@pytest.mark.usefixtures('x64')
def test_lru_is_a_convolution(name):
  """y_t = Re(C s_t) + D x_t with s_t = λ^(t+1) s + Σ_r λ^(t-r) γ B x_r, in complex
  NumPy. D is elementwise if there are as many inputs as outputs, else a matrix.
  """
  model = model_of(name, param_dtype=jnp.float64)
  params, x = scattered(quick(model.init)(KEY)), random(T, B, D)
  start = state_like(model.initial_state(B))
  state, y = quick(lambda p, s, x: model.apply(p, s, x, None, None))(params, start, x)
  p = jax.tree.map(np.asarray, params)
  lam = np.exp(-np.exp(p['nu_log']) + 1j * np.exp(p['theta_log']))
  b, c = p['b_re'] + 1j * p['b_im'], p['c_re'] + 1j * p['c_im']
  skip = np.diag(p['d']) if p['d'].ndim == 1 else p['d']
  for t in range(T):
    s = lam ** (t + 1) * (np.asarray(start.re) + 1j * np.asarray(start.im))
    for r in range(t + 1):
      s = s + lam ** (t - r) * np.exp(p['gamma_log']) * (x[r] @ b)
    np.testing.assert_allclose(y[t], (s @ c).real + x[t] @ skip, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(state.re + 1j * state.im, s, rtol=1e-12, atol=1e-12)
  assert np.shape(params['d']) == ((D,) if name == 'LRU square' else (D, H))


# What the papers claim.


@pytest.mark.usefixtures('x64')
def test_incremental_rnn_at_equilibrium_has_gradient_minus_identity():
  """With many inner steps h' solves relu((h' + h) U + x W + b) = h' + h and ∂h'/∂h =
  -I. With one step both are far off.
  """
  jacobians = []
  for inner_steps in (1, 30):
    model = nn.from_nnx(
      lambda rngs, n=inner_steps: IncrementalRNN(
        D, H, inner_steps=n, eta=0.9, param_dtype=float, rngs=rngs
      )
    )
    params = quick(model.init)(KEY)

    def step(h, m=model, p=params):
      return m.apply(p, h[None], jnp.asarray(random(1, 1, D)), None, None)[0][0]

    h = jnp.asarray(random(H, seed=1))
    value, jacobian = quick(lambda h, f=step: (f(h), jax.jacobian(f)(h)))(h)
    jacobians.append(np.asarray(jacobian))
  total = value + h
  drive = random(1, 1, D)[0, 0] @ params['w_x'] + params['bias']
  np.testing.assert_allclose(
    np.maximum(total @ params['w_h'][0] + drive, 0), total, atol=1e-10
  )
  assert np.any(np.asarray(total) > 0)
  np.testing.assert_allclose(jacobians[1], -np.eye(H), atol=1e-10)
  assert np.abs(jacobians[0] + np.eye(H)).max() > 0.1


@pytest.mark.usefixtures('x64')
def test_indrnn_limit_bounds_the_growth_over_a_sequence():
  """With u = 3 limited to 2^(1/T), a state of 1 is 2 after T steps. The gradient in the
  stored u is T 2^((T-1)/T), the one at the limit, and not 0.
  """
  limit = 2 ** (1 / T)
  model = nn.from_nnx(
    lambda rngs: IndRNN(1, 1, max_weight=limit, param_dtype=jnp.float64, rngs=rngs)
  )
  params = quick(model.init)(KEY)

  def final(u):
    return model.apply(
      params | {'u': u}, jnp.ones((1, 1)), jnp.zeros((T, 1, 1)), None, None
    )[0][0, 0]

  for u, end in ((3.0, 2.0), (limit, 2.0), (0.5, 0.5**T)):
    value, grad = quick(jax.value_and_grad(final))(jnp.full(1, u))
    np.testing.assert_allclose(value, end, rtol=1e-12)
    np.testing.assert_allclose(grad, T * min(u, limit) ** (T - 1), rtol=1e-12)


@pytest.mark.parametrize('name', ['IndRNN', 'LRU square'])
def test_units_are_independent(name):
  """A change of one unit's state changes that unit only."""
  start, run = run_of(name)
  first = np.broadcast_to(np.arange(T)[:, None] < 1, (T, B))
  start = state_like(start)
  other = jax.tree.map(lambda s: s.at[:, 1].add(5.0), start)
  (one, _), (two, _) = (
    run(s, random(T, B, D).astype(np.float32), first) for s in (start, other)
  )
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_array_equal(np.delete(a, 1, axis=1), np.delete(b, 1, axis=1))
    assert np.all(a[:, 1] != b[:, 1])


@pytest.mark.parametrize('ring', [(0.0, 0.5), (0.95, 0.99)])
def test_lru_keeps_the_variance_of_white_noise(ring):
  """The mean of |s|² after many steps is 1, on a ring near 0 and on one near 1."""
  model = nn.from_nnx(
    lambda rngs: LRU(8, 8, state_features=64, r_min=ring[0], r_max=ring[1], rngs=rngs)
  )
  x = random(400, 64, 8).astype(np.float32)
  state, _ = quick(
    lambda key, x: model.apply(model.init(key), model.initial_state(64), x, None, None)
  )(KEY, x)
  np.testing.assert_allclose(
    np.mean(np.square(state.re) + np.square(state.im)), 1, rtol=0.15
  )


def test_a_stack_of_indrnns_learns():
  """Three layers and a readout under FPTT reduce the error of a sum to a quarter within
  150 steps.
  """
  limit = 2 ** (1 / 6)

  def layers(rngs):
    return [IndRNN(d, 8, max_weight=limit, rngs=rngs) for d in (D, 8, 8)]

  model = nn.from_nnx(
    lambda rngs: nn.Sequential(*layers(rngs), nnx.Linear(8, 1, rngs=rngs))
  )
  trainer = quick_trainer(
    model,
    fptt_jax.losses.terminal_regression(),
    fptt_jax.fptt(optax.adam(0.03), alpha=0.1),
    num_windows=2,
  )
  x = random(6, 32, D).astype(np.float32)
  batch = fptt_jax.Batch(x, x[..., 0].sum(0))
  state = trainer.init(KEY, batch)
  losses = []
  for _ in range(150):
    state, metrics = trainer.step(state, batch)
    losses.append(float(metrics.loss[-1]))
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0] / 4


# The contract of a layer.


@EACH_CELL
def test_masks_and_windows(name):
  """Masked steps leave the state bit for bit, two joined windows equal one, and later
  inputs change no earlier output.
  """
  start, run = run_of(name)
  x, lengths = random(T, B, D).astype(np.float32), [5, 2, 3]
  whole_state, whole = run(start, x, None)
  state, y = run(start, x, np.arange(T)[:, None] < lengths)
  for row, length in enumerate(lengths):
    alone, y_alone = run(start, x[:length], None)
    chex.assert_trees_all_close(
      jax.tree.map(lambda s: s[row], state),
      jax.tree.map(lambda s: s[row], alone),
      **CLOSE,
    )
    np.testing.assert_allclose(y[:length, row], y_alone[:, row], **CLOSE)
    after, rest = run(alone, x[length:], None) if length < T else (alone, whole[:0])
    chex.assert_trees_all_close(after, whole_state, **CLOSE)
    np.testing.assert_allclose(np.concatenate([y_alone, rest]), whole, **CLOSE)
  chex.assert_trees_all_equal(run(state, x, np.zeros((T, B), bool))[0], state)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(state))
  _, changed = run(start, np.concatenate([x[:3], x[3:] + 1]), None)
  np.testing.assert_array_equal(changed[:3], whole[:3])
  assert np.any(changed[3] != whole[3])


@ONE_OF_EACH
@pytest.mark.usefixtures('x64')
def test_gradients_are_finite_differences(name):
  """Gradients in parameters, inputs and state equal finite differences along a random
  direction, with a masked step.
  """
  model = model_of(name, param_dtype=jnp.float64)
  params, x = scattered(quick(model.init)(KEY)), random(3, 2, D)
  if (
    name == 'IndRNN limited'
    # Outside the limit the gradient is straight through, no derivative: tested by
    # itself.
  ):
    params['u'] = jnp.clip(params['u'], -0.3, 0.3)
  mask = np.array([[True, True], [True, False], [True, True]])
  weights = random(
    3,
    2,
    jax.eval_shape(model.apply, params, model.initial_state(2), x, mask, None)[1].shape[
      -1
    ],
    seed=3,
  )

  def value(params, state, x):
    state, y = model.apply(params, state, x, mask, None)
    return (y * weights).sum() + sum(
      jnp.square(s).sum() for s in jax.tree.leaves(state)
    )

  at = (params, state_like(model.initial_state(2)), jnp.asarray(x))
  value, grads = (
    quick(value),
    jax.tree.leaves(quick(jax.grad(value, argnums=(0, 1, 2)))(*at)),
  )
  leaves, structure = jax.tree.flatten(at)
  for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
    direction = random(*leaf.shape, seed=i)
    up, down = (
      value(*structure.unflatten([*leaves[:i], leaf + h * direction, *leaves[i + 1 :]]))
      for h in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(
      (up - down) / 2e-6, np.sum(grad * direction), rtol=1e-5, atol=1e-8
    )
    assert np.any(grad)


@ONE_OF_EACH
def test_initialization_is_pure_and_may_be_mapped(name):
  """Compiled and mapped over seeds, init gives the same as for each seed.
  Seeds differ.
  """
  model, keys = model_of(name), jax.random.split(KEY, 2)
  many, one = quick(lambda keys: (jax.vmap(model.init)(keys), model.init(keys[1])))(
    keys
  )
  chex.assert_trees_all_close(jax.tree.map(lambda p: p[1], many), one, **CLOSE)
  assert any(np.any(leaf[0] != leaf[1]) for leaf in jax.tree.leaves(many))


@EACH_CELL
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures('strict_dtypes')
def test_cells_keep_their_dtype(name, dtype):
  """Parameters, state and outputs have param_dtype for float32 inputs, too."""
  model = model_of(name, param_dtype=dtype)

  def run(key, x):
    return (
      model.init(key),
      *model.apply(model.init(key), model.initial_state(B), x, None, None),
    )

  params, state, y = jax.eval_shape(
    run, KEY, jax.ShapeDtypeStruct((T, B, D), jnp.float32)
  )
  assert {leaf.dtype for leaf in jax.tree.leaves((params, state, y))} == {
    jnp.dtype(dtype)
  }
  assert jax.tree.map(lambda s: (s.shape, s.dtype), state) == jax.tree.map(
    lambda s: (s.shape, s.dtype), model.initial_state(B)
  )


@pytest.mark.parametrize('method', ['fptt', 'bptt'])
@ONE_OF_EACH
def test_cells_train(name, method):
  """After one step on a ragged batch all numbers are finite, every parameter has moved,
  and the state has kept its type.
  """
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(CELLS[name](rngs=rngs), nnx.Linear(H, 1, rngs=rngs))
  )
  base, options = optax.adam(1e-2), {'num_windows': 2} if method == 'fptt' else {}
  optimizer = fptt_jax.fptt(base, alpha=0.1) if method == 'fptt' else base
  trainer = quick_trainer(
    model, fptt_jax.losses.terminal_regression(), optimizer, method=method, **options
  )
  batch = regression_batch(T, B)._replace(lengths=np.array([5, 4, 2], np.int32))
  state = trainer.init(KEY, batch)
  after, metrics = trainer.step(state, batch)
  chex.assert_tree_all_finite((after.params, after.hidden, metrics))
  chex.assert_trees_all_equal_shapes_and_dtypes(after.hidden, state.hidden)
  for old, new in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True
  ):
    assert np.any(old != new)


# Sizes and initial values.


@pytest.mark.parametrize(
  ('build', 'count'),
  [
    (lambda rngs: FastGRNN(3, 128, rngs=rngs), 3 * 128 + 128**2 + 2 * 128 + 2),
    (
      lambda rngs: FastGRNN(32, 128, w_rank=4, u_rank=8, rngs=rngs),
      4 * (32 + 128) + 2 * 8 * 128 + 2 * 128 + 2,
    ),
    (
      lambda rngs: IncrementalRNN(1, 128, inner_steps=5, rngs=rngs),
      128 * (1 + 128 + 1) + 5,
    ),
    (lambda rngs: IncrementalRNN(1, 128, u_rank=15, rngs=rngs), 4_099),
    (lambda rngs: IndRNN(3, 128, rngs=rngs), 128 * 5),
    (lambda rngs: LRU(128, 128, rngs=rngs), 128 * (4 * 128 + 3) + 128),
    (
      lambda rngs: LRU(3, 128, state_features=64, rngs=rngs),
      64 * (2 * 3 + 2 * 128 + 3) + 3 * 128,
    ),
  ],
  ids=[
    'FastGRNN',
    'FastGRNN low rank',
    'IncrementalRNN',
    'IncrementalRNN low rank',
    'IndRNN',
    'LRU square',
    'LRU',
  ],
)
def test_parameter_counts(build, count):
  """The counts are those of the docstrings' formulas."""
  params = jax.eval_shape(nn.from_nnx(build).init, KEY)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def assert_uniform(values: Any, low: float, high: float) -> None:
  """Assert bounds, mean and deviation of a uniform distribution."""
  values, width = np.asarray(values), high - low
  assert low <= values.min() < low + 0.05 * width
  assert high - 0.05 * width < values.max() <= high
  np.testing.assert_allclose(values.mean(), (low + high) / 2, atol=0.05 * width)
  np.testing.assert_allclose(values.std(), width / 12**0.5, rtol=0.1)


def test_fast_grnn_initialization():
  """Matrices and factors are normal with deviation 0.1, biases 1, ζ and ν as given."""
  full = init_of(lambda rngs: FastGRNN(64, 64, rngs=rngs))
  low = init_of(
    lambda rngs: FastGRNN(64, 64, w_rank=32, u_rank=16, zeta=6.0, nu=-6.0, rngs=rngs)
  )
  for leaf in jax.tree.leaves(
    [params[name] for params in (full, low) for name in ('w_x', 'w_h')]
  ):
    np.testing.assert_allclose(np.std(leaf), 0.1, rtol=0.07)
  np.testing.assert_array_equal(full['bias'], 1)
  assert [float(params[name]) for params in (full, low) for name in ('zeta', 'nu')] == [
    1,
    -4,
    6,
    -6,
  ]
  assert [np.shape(low['w_x'][i]) for i in range(2)] == [(64, 32), (32, 64)]
  assert [np.shape(low['w_h'][i]) for i in range(2)] == [(64, 16), (16, 64)]


def test_incremental_rnn_initialization():
  """All weights are uniform in ±1/√H, and there is one η per inner step."""
  params = init_of(
    lambda rngs: IncrementalRNN(64, 64, inner_steps=4, eta=0.125, rngs=rngs)
  )
  assert_uniform(params['w_x'], -1 / 8, 1 / 8)
  assert_uniform(params['w_h'][0], -1 / 8, 1 / 8)
  assert np.abs(params['bias']).max() <= 1 / 8
  np.testing.assert_array_equal(params['eta'], [0.125] * 4)


def test_indrnn_initialization():
  """u is uniform in the given range, input weights are He's with slope 8, the bias is
  0.
  """
  params = init_of(
    lambda rngs: IndRNN(64, 512, max_weight=1.01, initial_range=(0.5, 1.01), rngs=rngs)
  )
  assert_uniform(params['u'], 0.5, 1.01)
  assert_uniform(params['w_x'], -((6 / 65) ** 0.5) / 8, (6 / 65) ** 0.5 / 8)
  assert not np.any(params['bias'])
  assert_uniform(init_of(lambda rngs: IndRNN(1, 512, rngs=rngs))['u'], 0, 1)


def test_lru_initialization():
  """λ is uniform in area on the ring and in phase, γ² = 1 - |λ|², and B, C and D are
  normal.
  """
  p = init_of(
    lambda rngs: LRU(
      16, 8, state_features=1024, r_min=0.5, r_max=0.9, max_phase=0.3, rngs=rngs
    )
  )
  modulus = np.exp(-np.exp(np.asarray(p['nu_log'], np.float64)))
  assert 0.5 - 1e-6 <= modulus.min() <= modulus.max() <= 0.9 + 1e-6
  assert_uniform(modulus**2, 0.25 - 1e-6, 0.81 + 1e-6)
  assert_uniform(np.exp(p['theta_log']), 0, 0.3)
  np.testing.assert_allclose(np.exp(2 * p['gamma_log']), 1 - modulus**2, rtol=1e-5)
  for name, deviation in (
    ('b_re', 32**-0.5),
    ('b_im', 32**-0.5),
    ('c_re', 1 / 32),
    ('c_im', 1 / 32),
  ):
    np.testing.assert_allclose(np.std(p[name]), deviation, rtol=0.05)
  np.testing.assert_allclose(np.std(p['d']), 1 / 4, rtol=0.2)
  np.testing.assert_allclose(
    np.std(init_of(lambda rngs: LRU(512, 512, state_features=1, rngs=rngs))['d']),
    1,
    rtol=0.1,
  )


def test_lru_near_the_unit_circle_is_finite():
  """With |λ| within 1e-7 of 1, where 1 - |λ|² is 0 in float32, parameters, outputs and
  gradients are finite.
  """
  model = nn.from_nnx(
    lambda rngs: LRU(D, D, state_features=64, r_min=1 - 1e-7, r_max=1, rngs=rngs)
  )
  params = quick(model.init)(KEY)

  def loss(p):
    return model.apply(p, model.initial_state(B), jnp.ones((T, B, D)), None, None)[
      1
    ].sum()

  chex.assert_tree_all_finite((params, quick(jax.value_and_grad(loss))(params)))
  assert np.exp(params['gamma_log']).max() < 1e-3


@pytest.mark.parametrize('greatest', [False, True])
@pytest.mark.parametrize('ring', [(0.0, 1.0), (0.0, 0.5), (0.9, 1.0)])
def test_lru_survives_the_extreme_draws(monkeypatch, ring, greatest):
  """The smallest and the largest uniform draw give finite logarithms and
  exponentials.
  """

  def extreme(key, shape, dtype, low, high):
    return jnp.full(
      shape, np.nextafter(np.float32(high), 0) if greatest else low, dtype
    )

  monkeypatch.setattr(jax.random, 'uniform', extreme)
  params = nn.from_nnx(
    lambda rngs: LRU(D, D, r_min=ring[0], r_max=ring[1], rngs=rngs)
  ).init(KEY)
  logs = [params[name] for name in ('nu_log', 'theta_log', 'gamma_log')]
  chex.assert_tree_all_finite((logs, [jnp.exp(log) for log in logs]))


# Errors.


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (
      lambda rngs: FastGRNN(D, H, w_rank=3, rngs=rngs),
      r'w_rank .*3',
    ),
    (
      lambda rngs: FastGRNN(D, H, u_rank=0, rngs=rngs),
      r'u_rank .*0',
    ),
    (
      lambda rngs: FastGRNN(D, H, nu=float('nan'), rngs=rngs),
      r'nu .*nan',
    ),
    (
      lambda rngs: FastGRNN(0, H, rngs=rngs),
      r'in_features .*0',
    ),
    (
      lambda rngs: IncrementalRNN(D, H, inner_steps=0, rngs=rngs),
      r'inner_steps .*0',
    ),
    (
      lambda rngs: IncrementalRNN(D, H, eta=0.0, rngs=rngs),
      r'eta .*0\.0',
    ),
    (
      lambda rngs: IncrementalRNN(D, H, u_rank=1.5, rngs=rngs),
      r'u_rank .*1\.5',
    ),
    (
      lambda rngs: IndRNN(D, H, max_weight=-1.0, rngs=rngs),
      r'max_weight .*-1\.0',
    ),
    (
      lambda rngs: IndRNN(D, H, initial_range=(1.0, 0.0), rngs=rngs),
      r'initial_range .*got 0\.0',
    ),
    (
      lambda rngs: IndRNN(D, H, max_weight=0.5, rngs=rngs),
      r'initial_range .*±0\.5, got 1\.0',
    ),
    (
      lambda rngs: LRU(D, H, r_min=0.9, r_max=0.9, rngs=rngs),
      r'r_min .*r_max=0\.9, got 0\.9',
    ),
    (
      lambda rngs: LRU(D, H, r_max=1.1, rngs=rngs),
      r'r_max .*1\.1',
    ),
    (
      lambda rngs: LRU(D, H, max_phase=0.0, rngs=rngs),
      r'max_phase .*0\.0',
    ),
    (
      lambda rngs: LRU(D, H, state_features=0, rngs=rngs),
      r'state_features .*0',
    ),
  ],
)
def test_impossible_cells_raise(build, message):
  """The error names the argument and the value when the cell is built."""
  with pytest.raises(ValueError, match=message):
    nn.from_nnx(build)


def test_inputs_of_other_features_raise():
  """The error names the cell and the shape received."""
  model = model_of('LRU')
  with pytest.raises(ValueError, match=r'inputs of LRU .*\(5, 3, 3\)'):
    jax.eval_shape(
      lambda x: model.apply(
        model.init(KEY), LRUState(*model.initial_state(B)), x, None, None
      ),
      jnp.zeros((T, B, 3)),
    )
