"""Independently recurrent network."""

import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import FLOAT32_TINY, check_number
from fptt_jax._types import OwnProduct, OwnStep
from fptt_jax.nn._fused import elementwise_cell, run_fused, varies
from fptt_jax.nn._recurrent import Recurrent, Step


def _forward(
  axis: int, prepared: Any, h: jax.Array, drive_t: jax.Array
) -> tuple[jax.Array, tuple[jax.Array]]:
  """Compute one step; the only factor of the Jacobian is relu's derivative."""
  u, bias = prepared
  z = drive_t + u * h + bias
  is_active = z > 0
  return jax.nn.relu(z), (is_active,)


def _backward(
  axis: int, weights: Any, factors: tuple[jax.Array, ...], dh: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return the gradients of the state before the step and of the drive."""
  (is_active,) = factors
  u, _ = weights
  dz = dh * is_active
  return dz * u, dz


def _weight_gradient(previous: jax.Array, dz: jax.Array) -> Any:
  """Return the gradients of u and of the bias."""
  return previous * dz, dz


FUSED_CELL = elementwise_cell(_forward, _backward, _weight_gradient)
"""Weights (u [H], bias [H]); x is the inputs' product with w_x [B, H]."""


class IndRNN(Recurrent):
  r"""Independently recurrent network: each unit's state depends on that unit only.

  .. math:: h' = \mathrm{relu}(x W_x + u h + b)

  Units mix from layer to layer only: stack several, `Sequential(IndRNN(D, H), IndRNN(H,
  H), ...)`. Over t steps a unit's gradient scales by u^t: abs(u) <= γ^(1/T) keeps it
  below γ over a sequence of T steps. The paper uses γ = 2 (the authors' code also 5),
  starts u uniform in [0, γ^(1/T)], the last layer's in [γ^(-1/T), γ^(1/T)] where only
  the last output counts, and clips u after each update.

  Here the clipping is part of the layer: it computes with u clipped to ±`max_weight`,
  and the gradient of u is the gradient at the clipped value (straight through). With
  `jnp.clip` alone the gradient would be 0 outside the limits, and a u that an update
  moved out would never return. The stored u may lie outside the limits.

  Parameters: `w_x` [D, H], `u` [H], `bias` [H]: H(D + 2) numbers.

  Args:
    in_features: D.
    hidden_features: H.
    max_weight: upper limit of abs(u), > 0; the paper's is `2 ** (1 / num_steps)`. None
      for no limit.
    initial_range: (low, high) of the uniform initial u, within ±`max_weight`.
    implementation: 'auto' and 'custom_vjp' run windows with a hand-written backward
      pass, which is fast and differentiable once, in reverse mode. 'scan' is the plain
      scan over steps, which `jax.jvp` and second derivatives need.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters. `w_x` is uniform in ±√(6/(65 D)), as in the
      authors' code (He's with slope 8), and the bias is 0. The weights are small
      because the state of a unit with u near 1 is a sum over the sequence.

  Raises:
    ValueError: an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> layer = nn.IndRNN(3, 16, max_weight=1.0, rngs=nnx.Rngs(0))
    >>> state, y = layer(layer.initial_state(4), jnp.ones((28, 4, 3)))
    >>> y.shape
    (28, 4, 16)

  References:
    Li, Li, Cook, Zhu and Gao, "Independently Recurrent Neural Network (IndRNN):
    Building a Longer and Deeper RNN", CVPR 2018.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    max_weight: float | None = None,
    initial_range: tuple[float, float] = (0.0, 1.0),
    implementation: str = 'auto',
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs, implementation)
    self.max_weight = None
    if max_weight is not None:
      accepted = 'a number > 0 or None'
      limit = self._check_number('max_weight', max_weight, FLOAT32_TINY, accepted)
      self.max_weight = limit
    low, high = self._check_range(initial_range)
    bound = math.sqrt(6 / (65 * self.in_features))
    shape = (self.in_features, self.hidden_features)
    w_x = jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)
    u = jax.random.uniform(rngs.params(), shape[1:], param_dtype, low, high)
    self.w_x = nnx.Param(w_x)
    self.u = nnx.Param(u)
    self.bias = nnx.Param(jnp.zeros(shape[1], param_dtype))

  def step(self) -> Step:
    """Return one time step as a function of (h, x_t)."""
    w_x = self.w_x[...]
    u = self._clipped_u()[None]
    bias = self.bias[None]

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      h = jax.nn.relu(x_t @ w_x + u * h + bias)
      return h, h

    return step

  def __call__(
    self,
    state: jax.Array,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Run a window; one product gives the drive of all its steps.

    Arguments and result are those of the other recurrent layers.
    """
    if self._runs_step() or varies((self._clipped_u(), state, x, mask)):
      return super().__call__(state, x, mask, key)
    state, x = self._check_call(state, x, mask)
    # As rows [S B, D]: for x [S, B, D], XLA copies and transposes the gradient to
    # compute the weights' gradient.
    drive = x.reshape(-1, self.in_features) @ self.w_x[...]
    drive = drive.reshape(*x.shape[:2], -1)
    weights = (self._clipped_u(), self.bias[...])
    return run_fused(FUSED_CELL, weights, state, drive, mask)

  def own_step(self, state: jax.Array, x_t: jax.Array, own_only: bool) -> OwnStep:
    """Return the derivatives within each unit; see :class:`Recurrent`."""
    u = self._clipped_u()[None]
    z = x_t @ self.w_x[...] + u * state + self.bias[None]
    gain = (z > 0).astype(z.dtype)
    products = (
      OwnProduct(((gain,),), {'w_x': x_t, 'bias': None}),
      OwnProduct(((gain * state,),), {'u': None}),
    )
    return OwnStep(((gain * u,),), products)

  def _check_range(self, initial_range: Any) -> tuple[float, float]:
    """Return (low, high); a ValueError names a range outside ±max_weight."""
    limit = self.max_weight
    if limit is None:
      # Half of the largest number, so that high - low is finite.
      limit = float(jnp.finfo(self.param_dtype).max) / 2
    start, end = initial_range
    expected = f'(low, high) with low <= high within ±{limit:g}'
    low = check_number('initial_range', start, -limit, limit, expected)
    return low, check_number('initial_range', end, low, limit, expected)

  def _clipped_u(self) -> jax.Array:
    """Return the u [H] that steps use."""
    u = self.u[...]
    if self.max_weight is None:
      return u
    constant = jax.lax.stop_gradient(u)
    clipped = jnp.clip(constant, -self.max_weight, self.max_weight)
    # In this order the value is exactly the clipped one; u + (clipped - u) would round.
    return clipped + (u - constant)
