"""The type of an influence, and the link of its credit to a window's gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fptt_jax._trees import where_rows
from fptt_jax._types import Hidden, OwnKernels, OwnStep, Params

State = Any
"""State of an influence: a tree of arrays [B, ...]."""


class WindowMap(NamedTuple):
  """The map of one window from parameters and hidden state to the next hidden state.

  Attributes:
    run: (params, hidden [R, ...], x [n, R, ...], mask [n, R] or None) -> hidden
      [R, ...] after n steps of any R rows, without noise. It is differentiable in every
      way, and the same function for all windows of a trainer.
    x: [S, B, ...], the window's inputs, 0 at masked steps.
    mask: bool [S, B], which steps are valid; None if all are.
    fresh: bool [B], rows that start from the learned initial state; None for none.
    start: (params) -> hidden state [B, ...] of those rows; None if it is constant.
    own_steps: `Model.own_steps`, or None.
    own_kernels: `Model.own_kernels`, or None.
    credit: The credit at the window's start, a tree like the parameters, if it has been
      computed. An influence that waits for it can be overwritten.
    ends: bool [B], rows whose sequence has no valid step after the window; None if
      sequences go on in the next batch.
    first_params: (key) -> parameters that the model starts from, `Model.init`. What
      parameters reach is looked at near such ones, too; None for random numbers alone.
    starts: bool [B], rows whose sequence has no valid step before the window; None if
      sequences go on from the batch before.
  """

  run: Callable[[Params, Hidden, Any, jax.Array | None], Hidden]
  x: Any
  mask: jax.Array | None
  fresh: jax.Array | None = None
  start: Callable[[Params], Hidden] | None = None
  own_steps: Callable[..., dict[int, OwnStep]] | None = None
  ends: jax.Array | None = None
  own_kernels: OwnKernels | None = None
  credit: Params | None = None
  first_params: Callable[[jax.Array], Params] | None = None
  starts: jax.Array | None = None

  def begin(self, params: Params, hidden: Hidden) -> Hidden:
    """Return the hidden state that the window starts from.

    Args:
      params: Parameters of the model.
      hidden: [B, ...], hidden state after the window before.

    Returns:
      [B, ...]: `hidden`, with the learned initial state in the rows that are fresh.
    """
    if self.start is None or self.fresh is None:
      return hidden
    return where_rows(self.fresh, self.start(params), hidden)

  def end(self, params: Params, hidden: Hidden) -> Hidden:
    """Return the hidden state [B, ...] after the window; arguments as of `begin`."""
    return self.run(params, self.begin(params, hidden), self.x, self.mask)


class Influence(NamedTuple):
  """A way to carry the effect of the parameters on the hidden state across windows.

  The gradient of a window's objective L that truncated windows leave out is
  Σ_b δ_b M_b, where δ = ∂L/∂h for the hidden state h before the window and M is the
  derivative of h with respect to all weights used so far, shifted together. An
  influence is a representation of M.

  Attributes:
    init: (window, params, hidden) -> state. A tree of arrays [B, ...]. All zeros stand
      for "no influence"; an influence with `keeps` may start from other numbers.
      Without a mesh, rows may share arrays [1, ...]. Only shapes of the arguments are
      used.
    credit: (window, params, hidden, state, d_hidden) -> tree like `params`: Σ_b δ_b M_b
      for the gradient δ = `d_hidden` of the hidden state before the window. It is
      linear in `d_hidden`.
    advance: (window, params, hidden, state, key) -> state after the window, which
      started from `hidden` and ran with `params`. The key is None unless it draws.
    draws: Whether `advance` needs a key.
    observe: (window, params, hidden, state, d_hidden) -> state, which `advance` is then
      given. For influences that learn from δ; None for the others.
    keeps: Whether the state is learned, and stays when hidden states start anew. Its
      arrays are [1, ...] then.
    first: (state) -> the state before the first step, for influences with `keeps`; only
      shapes are used. None stands for zeros.

  References:
    Williams and Zipser, "Gradient-based learning algorithms for recurrent networks and
    their computational complexity", 1995: the hybrid of RTRL and windows.
  """

  init: Callable[[WindowMap, Params, Hidden], State]
  credit: Callable[[WindowMap, Params, Hidden, State, Hidden], Params]
  advance: Callable[[WindowMap, Params, Hidden, State, jax.Array | None], State]
  draws: bool = False
  observe: Callable[[WindowMap, Params, Hidden, State, Hidden], State] | None = None
  keeps: bool = False
  first: Callable[[State], State] | None = None

  def restart(self, state: State) -> State:
    """Return the state before the first step, in place of one that has run away."""
    if self.first is not None:
      return self.first(state)
    return optax.tree.zeros_like(state)

  def reset(self, state: State) -> State:
    """Return the state of rows whose hidden states start anew.

    Args:
      state: A state of this influence.

    Returns:
      Zeros, unless the influence keeps what it has learned.
    """
    return state if self.keeps else jax.tree.map(jnp.zeros_like, state)


def attach(
  influence: Influence,
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: State,
) -> Hidden:
  """Make the hidden state before a window depend on the parameters.

  The value is `hidden` itself, bit for bit. A gradient that arrives at it is turned
  into the credit of the parameters, so that `jax.grad` of a window's loss gains what
  the truncation at the window's start leaves out. It has no forward-mode derivative.

  Args:
    influence: How the effect of the parameters is represented.
    window: The window that starts from `hidden`.
    params: Parameters of the model.
    hidden: [B, ...], hidden state before the window.
    state: State of the influence before the window.

  Returns:
    [B, ...], the hidden state.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from fptt_jax import influence
    >>> def run(params, h, x, mask):  # h' = w h + x
    ...   return jax.lax.scan(lambda h, x_t: (params['w'] * h + x_t, ()), h, x)[0]
    >>> params = {'w': jnp.full((1, 1), 0.5)}
    >>> rtrl = influence.rtrl()
    >>> h = jnp.zeros((1, 1))
    >>> window = influence.WindowMap(run, jnp.ones((2, 1, 1)), None)
    >>> state = rtrl.init(window, params, h)
    >>> state = rtrl.advance(window, params, h, state, None)
    >>> h = run(params, h, window.x, None)
    >>> def loss(params):
    ...   start = influence.attach(rtrl, window, params, h, state)
    ...   return run(params, start, window.x, None).sum()
    >>> jax.grad(loss)(params)['w']  # d/dw (1 + w + w² + w³)
    Array([[2.75]], dtype=float32)
  """

  @jax.custom_vjp
  def attached(params: Params, hidden: Hidden) -> Hidden:
    return hidden

  def forward(params: Params, hidden: Hidden) -> tuple[Hidden, tuple[Params, Hidden]]:
    return hidden, (params, hidden)

  def backward(kept: tuple[Params, Hidden], d_hidden: Hidden) -> tuple[Params, Hidden]:
    params, hidden = kept
    return influence.credit(window, params, hidden, state, d_hidden), d_hidden

  attached.defvjp(forward, backward)
  return attached(params, hidden)
