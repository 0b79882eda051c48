"""Linear recurrent unit."""

import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import FLOAT32_TINY, check_number, check_size, require
from fptt_jax._types import OwnProduct, OwnStep
from fptt_jax.nn._fused import elementwise_cell, run_fused, varies
from fptt_jax.nn._recurrent import Recurrent, Step


class LRUState(NamedTuple):
  """State of :class:`LRU`, as real arrays for optimizers and donation.

  Attributes:
    re: real part [B, N].
    im: imaginary part [B, N].
  """

  re: jax.Array
  im: jax.Array


def _forward(
  axis: int, prepared: Any, state: LRUState, drive_t: jax.Array
) -> tuple[LRUState, tuple[()]]:
  """Compute s' = λ s + drive; the Jacobian is λ, so there are no factors to keep."""
  re, im = state
  lambda_re, lambda_im = prepared
  drive_re, drive_im = jnp.split(drive_t, 2, axis)
  new_re = lambda_re * re - lambda_im * im + drive_re
  new_im = lambda_re * im + lambda_im * re + drive_im
  return type(state)(new_re, new_im), ()


def _backward(
  axis: int, weights: Any, factors: tuple[jax.Array, ...], d_state: LRUState
) -> tuple[LRUState, jax.Array]:
  """Return the gradients of the state before the step and of the drive."""
  re, im = d_state
  lambda_re, lambda_im = weights
  # Real arithmetic of conj(λ) d: the gradient flows through the conjugate.
  before_re = lambda_re * re + lambda_im * im
  before_im = lambda_re * im - lambda_im * re
  d_drive = jnp.concatenate([re, im], axis)
  return type(d_state)(before_re, before_im), d_drive


def _weight_gradient(previous: LRUState, dz: jax.Array) -> Any:
  """Return the gradients of λ's parts, conj(s) d in real arithmetic."""
  re, im = previous
  d_re, d_im = jnp.split(dz, 2, -1)
  d_lambda_re = re * d_re + im * d_im
  d_lambda_im = re * d_im - im * d_re
  return d_lambda_re, d_lambda_im


FUSED_CELL = elementwise_cell(_forward, _backward, _weight_gradient)
"""Weights: real and imaginary part of λ, each [N]; x and y [B, 2N] real, imaginary."""


class LRU(Recurrent):
  r"""Linear recurrent unit: a diagonal, complex, linear recurrence.

  .. math::

    \lambda = \exp(-e^{\nu} + i e^{\theta}), \quad s' = \lambda s + e^{\gamma} (x B),
    \quad y = \mathrm{Re}(s' C) + x D

  The modulus of λ is below 1 for all parameters. One layer alone is linear and learns
  little. The paper puts a GELU and a gated linear unit after each, inside a residual
  block with normalization, and a linear encoder before the first. The example shows
  this in a :class:`fptt_jax.nn.Sequential`, without the residual.

  Parameters, all real: `nu_log`, `theta_log`, `gamma_log` [N]; `b_re`, `b_im` [D, N];
  `c_re`, `c_im` [N, H]; `d` [H] (elementwise) if D = H as in the paper, else a matrix
  [D, H]. These are N(2D + 2H + 3) + H, or + DH, numbers. The state is an
  :class:`LRUState`. In bfloat16 the modulus is at most 0.996: leave this layer's
  `param_dtype` at float32.

  Args:
    in_features: D.
    hidden_features: H, features of the output.
    state_features: N, size of the complex state. Default H.
    r_min: smallest initial modulus of λ.
    r_max: largest initial modulus. λ is uniform on the ring 0 <= r_min < r_max <= 1.
      Long memories need a ring near 1.
    max_phase: the initial phase of λ is uniform in (0, max_phase), at most 2π. Long
      sequences need a small one.
    implementation: 'auto' and 'custom_vjp' run windows with a hand-written backward
      pass, which is fast and differentiable once, in reverse mode. 'scan' is the plain
      scan over steps, which `jax.jvp` and second derivatives need.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters. B's parts are normal with variance 1/(2D),
      C's with 1/N, `d` with 1 (a matrix with 1/D). γ = log √(1 - r²) of the modulus r,
      with which white noise of variance 1 gives a state of variance 1.

  Raises:
    ValueError: an argument is outside its range.

  Example:
    >>> import jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> ring = dict(r_min=0.9, r_max=0.999, max_phase=0.3)
    >>> def block(rngs):
    ...   lru = nn.LRU(16, 16, **ring, rngs=rngs)
    ...   return lru, jax.nn.gelu, nnx.Linear(16, 32, rngs=rngs), jax.nn.glu
    >>> def build(rngs):
    ...   encoder = nnx.Linear(1, 16, rngs=rngs)
    ...   blocks = [*block(rngs), *block(rngs)]
    ...   return nn.Sequential(encoder, *blocks, nnx.Linear(16, 10, rngs=rngs))
    >>> model = nn.from_nnx(build)
    >>> params = model.init(jax.random.key(0))
    >>> x = jax.numpy.ones((28, 4, 1))
    >>> state, logits = model.apply(params, model.initial_state(4), x, None, None)
    >>> logits.shape
    (28, 4, 10)

  References:
    Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu and De, "Resurrecting Recurrent
    Neural Networks for Long Sequences", ICML 2023.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    state_features: int | None = None,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
    implementation: str = 'auto',
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs, implementation)
    inputs = self.in_features
    hidden = self.hidden_features
    size = hidden
    if state_features is not None:
      size = check_size('state_features', state_features)
    self.state_features = size
    r_min = check_number('r_min', r_min, 0, 1, 'in [0, 1]')
    r_max = check_number('r_max', r_max, 0, 1, 'in [0, 1]')
    require(r_min < r_max, 'r_min', f'less than {r_max=}', r_min)
    circle = 2 * math.pi
    max_phase = check_number('max_phase', max_phase, FLOAT32_TINY, circle, 'in (0, 2π]')
    nu_log, theta_log, gamma_log = _draw_ring(rngs, size, r_min, r_max, max_phase)
    self.nu_log = nnx.Param(nu_log.astype(param_dtype))
    self.theta_log = nnx.Param(theta_log.astype(param_dtype))
    self.gamma_log = nnx.Param(gamma_log.astype(param_dtype))

    def normal(scale: float, *shape: int) -> nnx.Param[Any]:
      draw = jax.nn.initializers.normal(scale)
      return nnx.Param(draw(rngs.params(), shape, param_dtype))

    self.b_re = normal((2 * inputs) ** -0.5, inputs, size)
    self.b_im = normal((2 * inputs) ** -0.5, inputs, size)
    self.c_re = normal(size**-0.5, size, hidden)
    self.c_im = normal(size**-0.5, size, hidden)
    if inputs == hidden:
      self.d = normal(1.0, hidden)
    else:
      self.d = normal(inputs**-0.5, inputs, hidden)

  def initial_state(self, batch_size: int) -> LRUState:
    """Return the state before the first step: zeros."""
    re = self._zeros(batch_size, self.state_features)
    im = self._zeros(batch_size, self.state_features)
    return LRUState(re, im)

  def step(self) -> Step:
    """Return one time step as a function of (state, x_t)."""
    lambda_re, lambda_im, b, c = self._matrices()
    d = self.d[...]

    def step(state: LRUState, x_t: jax.Array) -> tuple[LRUState, jax.Array]:
      drive_re, drive_im = jnp.split(x_t @ b, 2, axis=-1)
      re = lambda_re * state.re - lambda_im * state.im + drive_re
      im = lambda_re * state.im + lambda_im * state.re + drive_im
      parts = jnp.concatenate([re, im], -1)
      y = parts @ c + _skip(d, x_t)
      return LRUState(re, im), y

    return step

  def __call__(
    self,
    state: LRUState,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[LRUState, jax.Array]:
    """Run a window; only the recurrence itself runs step by step.

    Arguments and result are those of the other recurrent layers.
    """
    if self._runs_step() or varies((self._matrices(), state, x, mask)):
      return super().__call__(state, x, mask, key)
    state, x = self._check_call(state, x, mask)
    lambda_re, lambda_im, b, c = self._matrices()
    # Input and output products run over all steps at once, outside the recurrence.
    weights = (lambda_re[0], lambda_im[0])
    state, (re, im) = run_fused(FUSED_CELL, weights, state, x @ b, mask)
    parts = jnp.concatenate([re, im], -1)
    y = parts @ c + _skip(self.d[...], x)
    return state, y

  def own_step(self, state: LRUState, x_t: jax.Array, own_only: bool) -> OwnStep:
    """Return the derivatives within each unit; see :class:`Recurrent`."""
    lambda_re, lambda_im, b, _ = self._matrices()
    re, im = state
    kept_re = lambda_re * re - lambda_im * im
    kept_im = lambda_re * im + lambda_im * re
    decay = jnp.exp(self.nu_log[None])
    turn = jnp.exp(self.theta_log[None])
    scale = jnp.broadcast_to(jnp.exp(self.gamma_log[None]), re.shape)
    drive_re, drive_im = jnp.split(x_t @ b, 2, axis=-1)
    lambda_re = jnp.broadcast_to(lambda_re, re.shape)
    lambda_im = jnp.broadcast_to(lambda_im, re.shape)
    products = (
      OwnProduct(((scale,), (None,)), {'b_re': x_t}),
      OwnProduct(((None,), (scale,)), {'b_im': x_t}),
      OwnProduct(((drive_re,), (drive_im,)), {'gamma_log': None}),
      # λ = exp(-decay + i turn), with decay = exp(ν) and turn = exp(θ).
      OwnProduct(((-decay * kept_re,), (-decay * kept_im,)), {'nu_log': None}),
      OwnProduct(((-turn * kept_im,), (turn * kept_re,)), {'theta_log': None}),
    )
    return OwnStep(((lambda_re, -lambda_im), (lambda_im, lambda_re)), products)

  def _matrices(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return λ's parts [1, N], the input matrix [D, 2N], the output's [2N, H]."""
    rate = jnp.exp(self.nu_log[None])
    modulus = jnp.exp(-rate)
    phase = jnp.exp(self.theta_log[None])
    gamma = jnp.exp(self.gamma_log[None])
    # The same factor for the real and the imaginary part.
    scale = jnp.tile(gamma, 2)
    b = jnp.concatenate([self.b_re[...], self.b_im[...]], -1)
    b = b * scale
    # Re((re + i im)(c_re + i c_im)) = re c_re - im c_im, as one product.
    c = jnp.concatenate([self.c_re[...], -self.c_im[...]], 0)
    lambda_re = modulus * jnp.cos(phase)
    lambda_im = modulus * jnp.sin(phase)
    return lambda_re, lambda_im, b, c


def _draw_ring(
  rngs: nnx.Rngs, size: int, r_min: float, r_max: float, max_phase: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draw λ uniform on a ring of the complex plane.

  Returns:
    `nu_log`, `theta_log` and `gamma_log`, each [N].
  """
  # Neither |λ| = 1 nor |λ| = 0 may be drawn: a logarithm would be infinite.
  smallest = 2.0**-24

  def draw() -> jax.Array:
    return jax.random.uniform(rngs.params(), (size,), jnp.float32, smallest, 1.0)

  area = draw()
  turn = draw()
  # 1 - |λ|² is drawn in place of |λ|²: near the unit circle 1 - |λ|² would round to 0.
  smallest_gap = 1 - r_max**2
  ring_area = r_max**2 - r_min**2
  gap = smallest_gap + area * ring_area
  gap = jnp.minimum(gap, 1 - smallest)
  log_modulus = 0.5 * jnp.log1p(-gap)
  nu_log = jnp.log(-log_modulus)
  theta_log = jnp.log(max_phase * turn)
  gamma_log = 0.5 * jnp.log(gap)
  return nu_log, theta_log, gamma_log


def _skip(d: jax.Array, x: jax.Array) -> jax.Array:
  """Return the term x D of the output."""
  if d.ndim > 1:
    return x @ d
  # Axes for steps and rows, since implicit rank promotion is an error in the tests.
  leading = [1] * (x.ndim - 1)
  return x * d.reshape(*leading, -1)
