"""The spectral radius against quoted numbers and against runs of `fptt` itself."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fptt_jax import fptt, spectral_radius

# lr·α at which flat-loss FPTT starts to diverge.
LIMITS = [
  (dict(), 1.67),
  (dict(kappa=2.0), 1.25),
  (dict(momentum=0.9), 3.17),
  (dict(kappa=2.0, momentum=0.9), 2.38),
  (dict(kappa=2.0, momentum=0.9, beta=0.7), 0.18),
  (dict(linear_scale=0.5), 2.5),
  (dict(kappa=2.0, linear_scale=0.5), 1.0),
  (dict(momentum=0.9, linear_scale=0.5), 4.75),
  (dict(kappa=2.0, momentum=0.9, linear_scale=0.5), 0.10),
]


def is_stable(radius: float) -> bool:
  """A neutral oscillation at the limit itself may come out as 1 ± rounding."""
  return radius < 1 + 1e-9


@pytest.mark.parametrize(('options', 'limit'), LIMITS, ids=lambda x: str(x))
def test_limits_on_a_flat_loss(options, limit):
  """Bisection for the lr·α where the radius passes 1 finds the documented limit, and
  everything on a grid below it is stable.
  """
  low, high = 0.0, 10.0
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (
      (middle, high)
      if is_stable(spectral_radius(middle, 1.0, **options))
      else (low, middle)
    )
  assert low == pytest.approx(limit, abs=0.005)
  assert all(
    spectral_radius(x, 1.0, **options) < 1 for x in np.linspace(0.01, 0.99, 50) * low
  )


@pytest.mark.parametrize(
  ('limit', 'options'),
  [
    (5 / 3, dict()),
    (5 / 4, dict(kappa=2.0)),
    (19 / 6, dict(momentum=0.9)),
    (19 / 8, dict(kappa=2.0, momentum=0.9)),
    (5 / 2, dict(linear_scale=0.5)),
    (1.0, dict(kappa=2.0, linear_scale=0.5)),
    (19 / 4, dict(momentum=0.9, linear_scale=0.5)),
    (1 / 10, dict(kappa=2.0, momentum=0.9, linear_scale=0.5)),
  ],
)
def test_limits_are_fractions(limit, options):
  """At β = 1/2 the limits are exact fractions: there the radius is 1 to rounding."""
  assert spectral_radius(limit, 1.0, **options) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
  ('expected', 'alpha', 'options'),
  [
    (1.82, 1.0, dict()),
    (0.980, 1.0, dict(momentum=0.9)),
    (1.44, 1.0, dict(momentum=0.9, curvature=0.5)),
    (0.89, 0.5, dict(momentum=0.9, curvature=0.5)),
  ],
)
def test_quoted_radii(expected, alpha, options):
  """The radii quoted for the PTB-300 setting (lr 2, κ 2): α = 1 diverges through
  curvature, not on a flat loss.
  """
  assert spectral_radius(2.0, alpha, kappa=2.0, **options) == pytest.approx(
    expected, abs=0.005
  )


def test_poles_on_a_flat_loss():
  """As lr·α → 0 with κ = 1 the regularizer no longer moves W and λ keeps its own poles
  (1 ± i)/2, of modulus √½.
  """
  assert spectral_radius(1e-9, 1.0) == pytest.approx(np.sqrt(0.5), abs=1e-6)


@settings(deadline=None, max_examples=30, derandomize=True, database=None)
@given(
  lr=st.floats(0.01, 3.0),
  alpha=st.floats(0.05, 2.0),
  scale=st.floats(0.1, 10.0),
  curvature=st.sampled_from([-0.2, 0.0, 0.3, 2.0]),
  momentum=st.sampled_from([0.0, 0.9]),
)
def test_only_the_products_with_lr_count(lr, alpha, scale, curvature, momentum):
  """The radius depends on lr·α and lr·h only: measuring the loss in other units changes
  nothing.
  """
  options = dict(kappa=1.5, beta=0.4, linear_scale=0.8, momentum=momentum)
  scaled = spectral_radius(
    lr * scale, alpha / scale, curvature=curvature / scale, **options
  )
  # 1e-6: an eigenvalue close to a double one moves by the square root of the rounding.
  assert scaled == pytest.approx(
    spectral_radius(lr, alpha, curvature=curvature, **options), abs=1e-6, rel=1e-6
  )


@pytest.mark.parametrize('curvature', [0.5, 1.0, 3.0])
def test_without_the_regularizer_it_is_gradient_descent(curvature):
  """κ = c = 0: W is plain gradient descent, with its factor |1 - lr h| once λ's own
  poles are the smaller ones.
  """
  assert spectral_radius(
    0.9, 1e-3, kappa=0.0, linear_scale=0.0, curvature=curvature
  ) == pytest.approx(max(abs(1 - 0.9 * curvature), np.sqrt(0.5)), abs=1e-9)


def update_map(lr, momentum, curvature, **hyperparameters):
  """(W, W̄, λ, m) -> the same after one update of the real transformation on the loss
  h/2 W².
  """
  tx = fptt(optax.sgd(lr, momentum), **hyperparameters)

  def step(vector):
    w, w_bar, lam, trace = vector
    state = optax.tree.set(tx.init(w)._replace(w_bar=w_bar, lam=lam), trace=trace)
    updates, state = tx.update(curvature * w, state, w)
    w_next = optax.apply_updates(w, updates)
    return jnp.stack([w_next, state.w_bar, state.lam, optax.tree.get(state, 'trace')])

  return step


@jax.jit
def jacobian(**hyperparameters):
  return jax.jacobian(update_map(**hyperparameters))(jnp.arange(1.0, 5.0))


@settings(
  deadline=None,
  max_examples=50,
  derandomize=True,
  database=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  hyperparameters=st.fixed_dictionaries(
    dict(
      lr=st.floats(0.01, 3.0),
      momentum=st.floats(0.0, 0.95),
      curvature=st.one_of(
        st.just(0.0), st.floats(-1.0, 3.0).filter(lambda h: abs(h) > 1e-3)
      ),
      alpha=st.floats(0.05, 2.0),
      kappa=st.floats(0.0, 2.0),
      beta=st.floats(0.05, 1.0),
      linear_scale=st.floats(0.0, 1.0),
    )
  ),
)
def test_radius_is_the_jacobians(x64, hyperparameters):
  """The radius is that of the Jacobian of `fptt(optax.sgd(...))` itself, without the
  translation mode when the loss is flat.
  """
  transition = np.asarray(jacobian(**hyperparameters))
  eigenvalues = np.linalg.eigvals(transition)
  if hyperparameters['curvature'] == 0:
    neutral = np.argmin(np.abs(eigenvalues - 1))
    # Moving W and W̄ together is kept exactly; an eigenvector of 1, whatever else is
    # near 1.
    np.testing.assert_allclose(
      transition @ np.array([1.0, 1.0, 0.0, 0.0]), [1.0, 1.0, 0.0, 0.0], atol=1e-12
    )
    eigenvalues = np.delete(eigenvalues, neutral)
  assert spectral_radius(**hyperparameters) == pytest.approx(
    np.abs(eigenvalues).max(), abs=1e-6, rel=1e-6
  )


@jax.jit
def log_estimates(**hyperparameters):
  step = update_map(**hyperparameters)
  record = lambda vector, _: (step(vector), jnp.log(jnp.abs(vector[2])))
  return jax.lax.scan(record, jnp.array([1.0, 0.7, 0.3, 0.0]), length=600)[1]


@pytest.mark.parametrize(
  'options',
  [
    dict(lr=2.0, alpha=1.0, kappa=2.0),  # flat, 1.82
    dict(
      lr=2.0, alpha=0.1, kappa=2.0, beta=0.7, momentum=0.9
    ),  # flat, slightly unstable
    dict(
      lr=2.0, alpha=1.0, kappa=2.0, momentum=0.9, curvature=0.5
    ),  # the failing PTB-300 setting
    dict(lr=2.0, alpha=0.5, kappa=2.0, momentum=0.9, curvature=0.5),  # the working one
    dict(lr=0.1, alpha=0.5, curvature=1.0, linear_scale=0.35),
    dict(lr=0.1, alpha=0.5, curvature=-0.5),  # a maximum
  ],
  ids=str,
)
def test_radius_is_the_growth_of_a_run(x64, options):
  """600 updates in float64: λ grows by radius^n. A least-squares line through log|λ|
  averages the rotation of complex pairs.
  """
  defaults = dict(momentum=0.0, curvature=0.0, kappa=1.0, beta=0.5, linear_scale=1.0)
  logs = log_estimates(**{**defaults, **options})
  slope = np.polyfit(np.arange(300), logs[300:], 1)[0]
  assert np.exp(slope) == pytest.approx(spectral_radius(**options), rel=2e-3)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('lr', 0.0),
    ('lr', float('nan')),
    ('lr', 'fast'),
    ('alpha', -1.0),
    ('alpha', float('inf')),
    ('kappa', -0.5),
    ('beta', 0.0),
    ('beta', 1.5),
    ('linear_scale', 1.1),
    ('linear_scale', -0.1),
    ('momentum', 1.0),
    ('momentum', -0.1),
    ('curvature', float('nan')),
  ],
)
def test_arguments_out_of_range(name, value):
  """An error names the argument and shows the value."""
  with pytest.raises(ValueError, match=f'^{name} must be .* got {value!r}'):
    spectral_radius(**{'lr': 0.1, 'alpha': 0.5, name: value})
