"""Recurrent layers the paper's tables quote beside LSTM and GRU, each from its own
paper, and the linear recurrent unit.

They keep the contract of :mod:`fptt_jax.nn.layers`: (state, x [S, B, D], mask [S, B] or
  None, key or None) -> (state, y [S, B, H]).
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import (
  FLOAT32_MAX,
  FLOAT32_TINY,
  as_number,
  check_integer,
  check_number,
  check_size,
)
from fptt_jax.nn.fused import DIAGONAL_CELL, INDRNN_CELL, fused_window
from fptt_jax.nn.layers import Recurrent, Step


class LRUState(NamedTuple):
  """State of :class:`LRU`: real and imaginary parts, each [B, N]. Both real, so that
  any optimizer, donation and dtype will do.
  """

  re: jax.Array
  im: jax.Array


class FastGRNN(Recurrent):
  r"""FastGRNN (Kusupati, Singh, Bhatia, Kumar, Jain and Varma, NeurIPS 2018): a gate
   that reuses the weights of the candidate.

  .. math::

    a = x W_x + h W_h, \quad z = \sigma(a + b_z), \quad
    h' = (\sigma(\zeta)(1 - z) + \sigma(\nu)) \tanh(a + b_h) + z h

  Parameters: `w_x` and `w_h`, each a list of one matrix, [D, H] and [H, H], or of two
  factors of a low rank r, [D, r], [r, H] and [H, r], [r, H]; `bias` [2H], first the
  gate's part; `zeta` and `nu` [], stored before their sigmoid, so that 0 < σ(ζ), σ(ν) <
  1 needs no projection. In all DH + HH + 2H + 2 numbers, with ranks r_w(D + H) + 2 r_u
  H + 2H + 2.

  The paper's further compression, sparse and quantised weights, is no part of the
  layer.

  Args:
    in_features: D.
    hidden_features: H.
    w_rank: rank r_w of W_x, at most min(D, H); None for a full matrix.
    u_rank: rank r_u of W_h, the paper's U, at most H; None for a full matrix.
    zeta: initial ζ.
    nu: initial ν. The authors' code starts at ζ = 1, ν = -4 and advises 6 and -6 where
      that does not train.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters: matrices and factors normal with deviation
      0.1, biases 1, as in the authors' code.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    w_rank: int | None = None,
    u_rank: int | None = None,
    zeta: float = 1.0,
    nu: float = -4.0,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs)
    draw = lambda *shape: jax.nn.initializers.normal(0.1)(
      rngs.params(), shape, param_dtype
    )
    self.w_x = _matrix(draw, self.in_features, self.hidden_features, 'w_rank', w_rank)
    self.w_h = _matrix(
      draw, self.hidden_features, self.hidden_features, 'u_rank', u_rank
    )
    self.bias = nnx.Param(jnp.ones(2 * self.hidden_features, param_dtype))
    scalar = lambda name, value: nnx.Param(
      jnp.asarray(
        self.number(name, value, -FLOAT32_MAX, 'a finite number'), param_dtype
      )
    )
    self.zeta, self.nu = scalar('zeta', zeta), scalar('nu', nu)

  def step(self) -> Step:
    """See the class."""
    w_x, w_h, (bias_z, bias_h) = (
      _values(self.w_x),
      _values(self.w_h),
      jnp.split(self.bias[None], 2, axis=-1),
    )
    scale, shift = jax.nn.sigmoid(self.zeta[...]), jax.nn.sigmoid(self.nu[...])

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      shared = _product(x_t, w_x) + _product(h, w_h)
      z = jax.nn.sigmoid(shared + bias_z)
      h = (scale * (1 - z) + shift) * jnp.tanh(shared + bias_h) + z * h
      return h, h

    return step


class IncrementalRNN(Recurrent):
  r"""Incremental ElmanRNN, iRNN (Kag, Zhang and Saligrama, ICLR 2020): Euler steps
   towards the equilibrium of an ODE at each input.

  .. math::

    g_0 = h, \quad g_i = g_{i-1} + \eta_i (\phi((g_{i-1} + h) W_h + x W_x + b) -
    (g_{i-1} + h)), \quad h' = g_n, \quad \phi = \mathrm{relu}

  At the equilibrium φ(...) = g + h, so that h' + h depends on x and on itself only and
  ∂h'/∂h = -I exactly: no gradient vanishes or explodes. A few steps of small η keep h'
  near h, a skip connection.

  The equilibrium does not depend on g_0, but a few steps towards it do. g_0 = h, relu,
  the factor 1 before (g + h), the uniform weights and the range of η are taken from
  public implementations of the paper. One η an inner step is trained, shared by all
  time steps, so that windows of any length run the same cell.

  Parameters: `w_x` [D, H], `w_h` a list of one matrix [H, H] or of the factors [H, r],
  [r, H] of a low rank, `bias` [H], `eta` [n]: H(D + H + 1) + n numbers, with a rank H(D
  + 2r + 1) + n. The 4K quoted for pixel MNIST is less than a full matrix has at H =
  128; a rank of 15 gives 4,099 with n = 3.

  Args:
    in_features: D.
    hidden_features: H.
    inner_steps: n Euler steps at each input, 1 to 100: they are written out.
    eta: initial η > 0 of every step; small (0.001 to 0.01), it is trained.
    u_rank: rank r of W_h, the paper's U, at most H; None for a full matrix.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters: weights and bias uniform in ±1/√H.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    inner_steps: int = 3,
    eta: float = 0.01,
    u_rank: int | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs)
    inner_steps = check_integer(
      'inner_steps', inner_steps, 1, 100, 'an integer from 1 to 100'
    )
    eta = self.number('eta', eta, FLOAT32_TINY, 'a number > 0')
    bound = self.hidden_features**-0.5
    draw = lambda *shape: jax.random.uniform(
      rngs.params(), shape, param_dtype, -bound, bound
    )
    self.w_x = nnx.Param(draw(self.in_features, self.hidden_features))
    self.w_h = _matrix(
      draw, self.hidden_features, self.hidden_features, 'u_rank', u_rank
    )
    self.bias = nnx.Param(draw(self.hidden_features))
    self.eta = nnx.Param(jnp.full(inner_steps, eta, param_dtype))

  def step(self) -> Step:
    """See the class."""
    w_x, w_h, bias, etas = (
      self.w_x[...],
      _values(self.w_h),
      self.bias[None],
      self.eta[...],
    )

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      drive, g = x_t @ w_x + bias, h
      for i in range(len(etas)):
        g = g + etas[i] * (jax.nn.relu(_product(g + h, w_h) + drive) - (g + h))
      return g, g

    return step


class IndRNN(Recurrent):
  r"""Independently recurrent network (Li, Li, Cook, Zhu and Gao, CVPR 2018): each unit
   remembers itself alone.

  .. math:: h' = \mathrm{relu}(x W_x + u h + b)

  Units mix only from layer to layer: stack several, `Sequential(IndRNN(D, H), IndRNN(H,
  H), ...)`. Over t steps a unit's gradient scales by u^t: |u| <= γ^(1/T) keeps it below
  γ over a sequence of T steps. The paper takes γ = 2 (the authors' code also 5), starts
  u uniform in [0, γ^(1/T)], the last layer's in [γ^(-1/T), γ^(1/T)] where only the last
  output counts, and clips u after each update.

  Here the limit is part of the function and needs no special trainer: the layer runs
  with u clipped to ±`max_weight`, and u's gradient is the one at the clipped value
  (straight through). With `jnp.clip` alone it would be 0 outside the limits: a u that
  an update threw out would never come back. The stored u may lie outside; what counts
  is its clipped value.

  Parameters: `w_x` [D, H], `u` [H], `bias` [H]: H(D + 2) numbers.

  Args:
    in_features: D.
    hidden_features: H.
    max_weight: limit of |u| in use, > 0; `2 ** (1 / num_steps)` is the paper's. None:
      no limit.
    initial_range: (low, high), u starts uniform between them; within ±`max_weight`.
    fused: see :class:`fptt_jax.nn.layers.Recurrent`.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters: `w_x` uniform in ±√(6/(65 D)), as in the
      authors' code (He's with slope 8), bias 0. It is small because the state of a unit
      with u near 1 is a sum over the sequence.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    max_weight: float | None = None,
    initial_range: tuple[float, float] = (0.0, 1.0),
    fused: bool | str = True,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs, fused)
    self.max_weight = (
      None
      if max_weight is None
      else self.number('max_weight', max_weight, FLOAT32_TINY, 'a number > 0 or None')
    )
    # Half of what the dtype holds, so that it holds the range's width.
    limit = (
      float(jnp.finfo(param_dtype).max) / 2
      if self.max_weight is None
      else self.max_weight
    )
    ends = (
      [as_number(end) for end in initial_range]
      if isinstance(initial_range, tuple | list)
      else []
    )
    low, high = ends if len(ends) == 2 else (None, None)
    if low is None or high is None or not -limit <= low <= high <= limit:
      within = (
        '' if self.max_weight is None else f' within ±max_weight={self.max_weight}'
      )
      raise ValueError(
        f'initial_range must be (low, high) with low <= high{within}, got '
        f'{initial_range!r}.'
      )
    bound = math.sqrt(6 / (65 * self.in_features))
    shape = (self.in_features, self.hidden_features)
    self.w_x = nnx.Param(
      jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)
    )
    self.u = nnx.Param(
      jax.random.uniform(rngs.params(), shape[1:], param_dtype, low, high)
    )
    self.bias = nnx.Param(jnp.zeros(shape[1], param_dtype))

  def step(self) -> Step:
    """See the class."""
    w_x, u, bias = self.w_x[...], self._clipped()[None], self.bias[None]

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
    """Runs a window; fused, only the recurrence itself is run step by step."""
    if not self.fused:
      return super().__call__(state, x, mask, key)
    x = self.checked(state, x, mask)
    # As rows [S B, D]: of [S, B, D], XLA copies the gradient, transposed, for that of
    # the weights.
    drive = (x.reshape(-1, self.in_features) @ self.w_x[...]).reshape(*x.shape[:2], -1)
    return fused_window(
      INDRNN_CELL, (self._clipped(), self.bias[...]), state, drive, mask
    )

  def _clipped(self) -> jax.Array:
    """The u [H] that is used."""
    u = self.u[...]
    if self.max_weight is None:
      return u
    # In this order the value is the clipped one exactly, u + (clip(u) - u) would round.
    return jnp.clip(jax.lax.stop_gradient(u), -self.max_weight, self.max_weight) + (
      u - jax.lax.stop_gradient(u)
    )


class LRU(Recurrent):
  r"""Linear recurrent unit (Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu and De,
   ICML 2023): a diagonal linear recurrence.

  .. math::

    \lambda = \exp(-e^{\nu} + i e^{\theta}), \quad s' = \lambda s + e^{\gamma} (x B),
    \quad y = \mathrm{Re}(s' C) + x D

  |λ| < 1 whatever the parameters. It is linear: alone it is worth little. The paper puts a GELU and a gated linear unit after each,
  inside a residual block with normalization, and a linear encoder before the first; in
  a :class:`Sequential`, without the residual, see the example.

  Parameters, all real: `nu_log`, `theta_log`, `gamma_log` [N]; `b_re`, `b_im` [D, N];
  `c_re`, `c_im` [N, H]; `d`, if D = H as in the paper [H], unit by unit, else a matrix
  [D, H]. In all N(2D + 2H + 3) + H, or + DH, numbers. The state is an
  :class:`LRUState`. In bfloat16 |λ| cannot come nearer to 1 than 0.996: leave this
  layer's `param_dtype` at float32.

  Args:
    in_features: D.
    hidden_features: H, features of the output.
    state_features: N, size of the complex state. Default H.
    r_min: least |λ| at the start; and
    r_max: its greatest: λ is uniform on the ring 0 <= r_min < r_max <= 1. Long memories
      need a ring near 1.
    max_phase: the phase of λ starts uniform in (0, max_phase), at most 2π; a thin slice
      for long sequences.
    fused: see :class:`fptt_jax.nn.layers.Recurrent`.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters: B's parts normal with variance 1/(2D), C's
      with 1/N, `d` with 1 (the matrix with 1/D), γ = log √(1 - |λ|²), with which white
      noise of variance 1 gives E|s|² = 1 whatever λ is.

  Example:
    >>> import jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(lambda rngs: nn.Sequential(
    ...   nnx.Linear(1, 16, rngs=rngs),
    ...   nn.LRU(16, 16, r_min=0.9, r_max=0.999, max_phase=0.3, rngs=rngs), jax.nn.gelu, nnx.Linear(16, 32, rngs=rngs), jax.nn.glu,
    ...   nn.LRU(16, 16, r_min=0.9, r_max=0.999, max_phase=0.3, rngs=rngs), jax.nn.gelu, nnx.Linear(16, 32, rngs=rngs), jax.nn.glu,
    ...   nnx.Linear(16, 10, rngs=rngs)))
    >>> state, logits = model.apply(model.init(jax.random.key(0)), model.initial_state(4), jax.numpy.ones((28, 4, 1)), None, None)
    >>> logits.shape
    (28, 4, 10)
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
    fused: bool | str = True,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs, fused)
    inputs, hidden = self.in_features, self.hidden_features
    size = self.state_features = (
      hidden if state_features is None else check_size('state_features', state_features)
    )
    r_min, r_max = (
      check_number(name, r, 0, 1, 'in [0, 1]')
      for name, r in (('r_min', r_min), ('r_max', r_max))
    )
    if r_min >= r_max:
      raise ValueError(f'expected 0 <= r_min < r_max <= 1, got {r_min=}, {r_max=}.')
    max_phase = check_number(
      'max_phase', max_phase, FLOAT32_TINY, 2 * math.pi, 'in (0, 2π]'
    )
    ring = _ring(rngs, size, r_min, r_max, max_phase)
    self.nu_log, self.theta_log, self.gamma_log = (
      nnx.Param(log.astype(param_dtype)) for log in ring
    )
    normal = lambda scale, *shape: nnx.Param(
      jax.nn.initializers.normal(scale)(rngs.params(), shape, param_dtype)
    )
    self.b_re, self.b_im = (
      normal((2 * inputs) ** -0.5, inputs, size) for _ in range(2)
    )
    self.c_re, self.c_im = (normal(size**-0.5, size, hidden) for _ in range(2))
    self.d = (
      normal(1.0, hidden) if inputs == hidden else normal(inputs**-0.5, inputs, hidden)
    )

  def initial_state(self, batch_size: int) -> LRUState:
    """Zeros."""
    return LRUState(*(self.zeros(batch_size, self.state_features) for _ in range(2)))

  def step(self) -> Step:
    """See the class."""
    lambda_re, lambda_im, b, c = self._prepared()
    d = self.d[...]

    def step(state: LRUState, x_t: jax.Array) -> tuple[LRUState, jax.Array]:
      drive_re, drive_im = jnp.split(x_t @ b, 2, axis=-1)
      re = lambda_re * state.re - lambda_im * state.im + drive_re
      im = lambda_re * state.im + lambda_im * state.re + drive_im
      y = jnp.concatenate([re, im], -1) @ c
      return LRUState(re, im), y + (x_t * d[None] if d.ndim == 1 else x_t @ d)

    return step

  def __call__(
    self,
    state: LRUState,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[LRUState, jax.Array]:
    """Runs a window; fused, only the recurrence itself is run step by step."""
    if not self.fused:
      return super().__call__(state, x, mask, key)
    x = self.checked(state, x, mask)
    lambda_re, lambda_im, b, c = self._prepared()
    state, (re, im) = fused_window(
      DIAGONAL_CELL, (lambda_re[0], lambda_im[0]), state, x @ b, mask
    )
    d = self.d[...]
    return state, jnp.concatenate([re, im], -1) @ c + (
      x * d[None, None] if d.ndim == 1 else x @ d
    )

  def _prepared(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """λ's parts [1, N], the inputs' matrix [D, 2N] and the outputs' [2N, H]."""
    modulus, phase = jnp.exp(-jnp.exp(self.nu_log[None])), jnp.exp(self.theta_log[None])
    b = jnp.concatenate([self.b_re[...], self.b_im[...]], -1) * jnp.tile(
      jnp.exp(self.gamma_log[None]), 2
    )
    c = jnp.concatenate([self.c_re[...], -self.c_im[...]], 0)
    return modulus * jnp.cos(phase), modulus * jnp.sin(phase), b, c


def _ring(
  rngs: nnx.Rngs, size: int, r_min: float, r_max: float, max_phase: float
) -> tuple[jax.Array, ...]:
  """`nu_log`, `theta_log`, `gamma_log` [N] of λ uniform on a ring of the complex
  plane.
  """
  # Neither 0 nor 1 - |λ|² = 1 may come out: a logarithm would be infinite, with it
  # parameters and their gradients.
  least = 2.0**-24
  area, turn = (
    jax.random.uniform(rngs.params(), (size,), jnp.float32, least, 1.0)
    for _ in range(2)
  )
  # 1 - |λ|² is drawn, not |λ|²: near the unit circle their difference would round to 0.
  gap = jnp.minimum((1 - r_max**2) + area * (r_max**2 - r_min**2), 1 - least)
  return jnp.log(-0.5 * jnp.log1p(-gap)), jnp.log(max_phase * turn), 0.5 * jnp.log(gap)


def _matrix(
  draw: Callable[..., jax.Array], rows: int, columns: int, name: str, rank: int | None
) -> nnx.List[Any]:
  """A matrix [rows, columns], or its two factors, as parameters."""
  if rank is None:
    return nnx.List([nnx.Param(draw(rows, columns))])
  most = min(rows, columns)
  rank = check_integer(name, rank, 1, most, f'an integer from 1 to {most} or None')
  return nnx.List([nnx.Param(draw(rows, rank)), nnx.Param(draw(rank, columns))])


def _values(factors: Sequence[Any]) -> list[jax.Array]:
  return [factor[...] for factor in factors]


def _product(x: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
  """Of x and the factors, from the left: the small dimension of a low rank first."""
  return functools.reduce(jnp.matmul, factors, x)
