"""How fast FPTT's own recursion grows or decays, apart from the data."""

import math

import numpy as np

from fptt_jax._checks import FLOAT32_MAX, FLOAT32_TINY, check_choice, check_number
from fptt_jax._transform import CORRECTIONS, RANGES


def spectral_radius(
  lr: float,
  alpha: float,
  *,
  kappa: float = 1.0,
  beta: float = 0.5,
  rho: float = 0.0,
  correction: str = 'eq6',
  momentum: float = 0.0,
  curvature: float = 0.0,
) -> float:
  r"""Spectral radius of FPTT's linearized recursion with SGD: below 1 it is stable,
   above 1 weights and λ diverge.

  On a loss of constant curvature h, one update maps (W, W̄, λ, m) linearly:

  .. math::

    \begin{align*}
      m' & = \mu m + h W - c(1-\rho)\lambda + \kappa\alpha(W-\bar W), & W' & = W - \eta
      m', \\ \lambda' & = \lambda - \alpha(W'-\bar W), & \bar W' & = (1-\beta)\bar W +
      \beta W' - \tfrac\beta\alpha\lambda'.
    \end{align*}

  At h = 0 moving W and W̄ together changes nothing (an eigenvalue of exactly 1), so
  there the map of (W - W̄, λ, m) is taken. It says nothing of adaptive optimizers (Adam
  divides by its own scale) and nothing of curvature it is not given.

  Args:
    lr: η > 0, learning rate of the SGD step.
    alpha: α, as for :func:`fptt_jax.fptt`, like the next four a number; the running
      estimate of λ is meant.
    kappa: κ.
    beta: β.
    rho: ρ.
    correction: 'eq6' or 'eq4'.
    momentum: heavy-ball μ in [0, 1), as `optax.sgd(lr, momentum)`.
    curvature: h, a second derivative of the window loss (an eigenvalue of its Hessian;
      negative at a maximum).

  Returns:
    The spectral radius, a float.

  Raises:
    ValueError: an argument is outside its range.

  Example:
    >>> from fptt_jax import spectral_radius
    >>> round(spectral_radius(2.0, 1.0, kappa=2.0), 2)
    1.82
    >>> round(spectral_radius(2.0, 1.0, kappa=2.0, momentum=0.9, curvature=0.5), 2)
    1.44
  """
  check_choice('correction', correction, sorted(CORRECTIONS))
  given = dict(alpha=alpha, beta=beta, kappa=kappa, rho=rho)
  alpha, beta, kappa, rho = (
    check_number(name, value, *RANGES[name]) for name, value in given.items()
  )
  lr = check_number('lr', lr, FLOAT32_TINY, FLOAT32_MAX, 'a finite number > 0')
  momentum = check_number(
    'momentum', momentum, 0.0, math.nextafter(1.0, 0.0), 'a number in [0, 1)'
  )
  curvature = check_number(
    'curvature', curvature, -FLOAT32_MAX, FLOAT32_MAX, 'a finite number'
  )

  c = CORRECTIONS[correction] * (1 - rho)
  w, w_bar, lam, m = np.eye(4)
  m_next = momentum * m + curvature * w - c * lam + kappa * alpha * (w - w_bar)
  w_next = w - lr * m_next
  lam_next = lam - alpha * (w_next - w_bar)
  w_bar_next = (1 - beta) * w_bar + beta * w_next - beta / alpha * lam_next
  if curvature == 0:
    # Rows in (W, W̄, λ, m) that depend on W - W̄ only: drop the W̄ column, which is
    # minus the W column.
    transition = np.stack([w_next - w_bar_next, lam_next, m_next])[:, [0, 2, 3]]
  else:
    transition = np.stack([w_next, w_bar_next, lam_next, m_next])
  return float(np.abs(np.linalg.eigvals(transition)).max())
