"""Linear stability of FPTT's recursion."""

import math

import numpy as np

from fptt_jax._checks import FLOAT32_MAX, FLOAT32_TINY, check_choice, check_number
from fptt_jax._hyperparameters import RANGES
from fptt_jax._transform import COUPLINGS


def spectral_radius(
  lr: float,
  alpha: float,
  *,
  kappa: float = 1.0,
  beta: float = 0.5,
  linear_scale: float = 1.0,
  momentum: float = 0.0,
  curvature: float = 0.0,
  coupling: str = 'gradient',
) -> float:
  r"""Return the spectral radius of FPTT's linearized recursion with SGD.

  Below 1 the recursion is stable. Above 1 the weights and λ diverge. On a loss of
  constant curvature h, one update maps (W, W̄, λ, m) linearly:

  .. math::

    \begin{align*}
      m' & = \mu m + h W - c\lambda + \kappa\alpha(W-\bar W), & W' & = W - \eta m', \\
      \lambda' & = \lambda - \alpha(W'-\bar W), & \bar W' & = (1-\beta)\bar W + \beta W'
      - \tfrac\beta\alpha\lambda'.
    \end{align*}

  With `coupling='update'` the first line is

  .. math::

    m' = \mu m + h W, \qquad W' = W - \eta m' + c\lambda - \kappa\alpha(W-\bar W).

  At h = 0 it has no η, so that any base optimizer whose own recursion is stable there
  has the radius of this one.

  At h = 0 a common shift of W and W̄ changes nothing, which is an eigenvalue of exactly
  1. The map of (W - W̄, λ, m) is analyzed there instead. The analysis covers neither
  adaptive optimizers (Adam divides by its own scale) nor any curvature but h.

  Args:
    lr: η > 0, learning rate of the SGD step.
    alpha: α > 0, as for :func:`fptt_jax.fptt` with the running estimate of λ.
    kappa: κ >= 0, scale of the quadratic term.
    beta: β in (0, 1], mixing rate of W̄.
    linear_scale: c in [0, 1], scale of the linear term.
    momentum: μ in [0, 1), heavy-ball momentum as in `optax.sgd(lr, momentum)`.
    curvature: h, an eigenvalue of the Hessian of the window's loss. It is negative at a
      maximum.
    coupling: As for :func:`fptt_jax.fptt`.

  Returns:
    The spectral radius, a float.

  Raises:
    ValueError: If an argument is out of range.

  Example:
    >>> from fptt_jax import spectral_radius
    >>> round(spectral_radius(2.0, 1.0, kappa=2.0), 2)
    1.82
    >>> round(spectral_radius(2.0, 1.0, kappa=2.0, momentum=0.9, curvature=0.5), 2)
    1.44
  """
  alpha = check_number('alpha', alpha, *RANGES['alpha'])
  beta = check_number('beta', beta, *RANGES['beta'])
  kappa = check_number('kappa', kappa, *RANGES['kappa'])
  linear_scale = check_number('linear_scale', linear_scale, *RANGES['linear_scale'])
  check_choice('coupling', coupling, COUPLINGS)
  lr = check_number('lr', lr, FLOAT32_TINY, FLOAT32_MAX, 'a finite number > 0')
  below_one = math.nextafter(1.0, 0.0)
  momentum = check_number('momentum', momentum, 0.0, below_one, 'a number in [0, 1)')
  finite = (-FLOAT32_MAX, FLOAT32_MAX, 'a finite number')
  curvature = check_number('curvature', curvature, *finite)

  # Each variable is a row of coefficients of the old (W, W̄, λ, m).
  w, w_bar, lam, m = np.eye(4)
  tie = linear_scale * lam - kappa * alpha * (w - w_bar)
  if coupling == 'gradient':
    m_next = momentum * m + curvature * w - tie
    w_next = w - lr * m_next
  else:
    m_next = momentum * m + curvature * w
    w_next = w - lr * m_next + tie
  lam_next = lam - alpha * (w_next - w_bar)
  w_bar_next = (1 - beta) * w_bar + beta * w_next - beta / alpha * lam_next
  if curvature == 0:
    # These rows depend on W - W̄ only: the W̄ column is minus the W column and is
    # dropped.
    transition = np.stack([w_next - w_bar_next, lam_next, m_next])[:, [0, 2, 3]]
  else:
    transition = np.stack([w_next, w_bar_next, lam_next, m_next])
  return float(np.abs(np.linalg.eigvals(transition)).max())
