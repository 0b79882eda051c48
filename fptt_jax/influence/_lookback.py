"""Windows that are run again, so that gradients reach back further."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fptt_jax._checks import INT32_MAX, check_integer
from fptt_jax._trees import where_rows
from fptt_jax._types import Hidden, Params
from fptt_jax.influence._arrays import join, split
from fptt_jax.influence._base import Influence, WindowMap


class PastWindows(NamedTuple):
  """The last windows, newest first: w - 1 of them, on the second axis.

  Attributes:
    hidden: [B, w - 1, ...], hidden states before each window.
    x: [B, w - 1, S, ...], inputs.
    valid: bool [B, w - 1, S], which steps are valid. None are in windows that have not
      been.
    fresh: bool [B, w - 1], rows that started from the learned initial state.
  """

  hidden: Hidden
  x: Any
  valid: jax.Array
  fresh: jax.Array


def lookback(windows: int = 2) -> Influence:
  """Make an influence that runs the last windows again (truncated BPTT with overlap).

  A loss then reaches back through its own window and the `windows` - 1 windows before
  it. They are run again with the present weights, and the gradient is passed through
  them; what lies before is left out. There is no matrix and no noise, and it works with
  every layer and stack. Its error falls with the memory of the network.

  A window costs about `windows` times as much, and the inputs and hidden states of the
  last windows are kept.

  Args:
    windows: w, how many windows a gradient reaches back, its own included: at least 2.

  Returns:
    The influence.

  Raises:
    ValueError: `windows` is not an integer >= 2.

  Example:
    >>> import jax, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(
    ...   lambda rngs: nn.Sequential(
    ...     nn.LSTM(1, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
    ...   )
    ... )
    >>> loss = fptt_jax.losses.terminal_regression()
    >>> trainer = fptt_jax.make_trainer(
    ...   model, loss, optax.adam(1e-3), method='tbptt', num_windows=4,
    ...   influence=fptt_jax.influence.lookback(3),
    ... )
    >>> batch = fptt_jax.Batch(jax.numpy.ones((20, 8, 1)), jax.numpy.ones(8))
    >>> state = trainer.init(jax.random.key(0), batch)
    >>> state.influence.x.shape  # B, two windows of S steps, D.
    (8, 2, 5, 1)

  References:
    Williams and Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of
    Recurrent Network Trajectories", Neural Computation 1990: BPTT(h; h').
  """
  accepted = 'an integer >= 2, the windows that a gradient runs through'
  windows = check_integer('windows', windows, 2, INT32_MAX, accepted)

  def init(window: WindowMap, params: Params, hidden: Hidden) -> PastWindows:
    now = _present(window, hidden)
    return jax.tree.map(
      lambda leaf: jnp.zeros((len(leaf), windows - 1, *leaf.shape[1:]), leaf.dtype), now
    )

  return Influence(init, _credit, _advance)


def _present(window: WindowMap, hidden: Hidden) -> PastWindows:
  """Return the present window in the form of one past window, [B, ...]."""
  x = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), window.x)
  steps_and_rows = jax.tree.leaves(window.x)[0].shape[:2]
  mask = jnp.ones(steps_and_rows, bool) if window.mask is None else window.mask
  fresh = jnp.zeros(steps_and_rows[1], bool) if window.fresh is None else window.fresh
  return PastWindows(hidden, x, mask.T, fresh)


def _advance(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: PastWindows,
  key: jax.Array | None,
) -> PastWindows:
  moved: PastWindows = jax.tree.map(
    lambda old, new: jnp.concatenate([new[:, None], old[:, :-1]], 1),
    state,
    _present(window, hidden),
  )
  if window.mask is None:
    return moved
  # A window without a valid step of a row takes no other window's place.
  kept: PastWindows = where_rows(window.mask.any(0), moved, state)
  return kept


def _credit(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: PastWindows,
  d_hidden: Hidden,
) -> Params:
  """Pull the gradient of the hidden state back through the windows, newest first."""

  def body(carry: tuple[jax.Array, Params], past: PastWindows) -> tuple[Any, None]:
    delta, total = carry
    x = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), past.x)
    earlier = window._replace(x=x, mask=past.valid.T)
    if window.fresh is not None:
      earlier = earlier._replace(fresh=past.fresh)

    def end(params: Params, rows: jax.Array) -> jax.Array:
      return join(earlier.end(params, split(rows, past.hidden)))

    _, pull = jax.vjp(end, params, join(past.hidden))
    grads, delta = pull(delta)
    return (delta, jax.tree.map(jnp.add, total, grads)), None

  newest_first = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), state)
  carry = (join(d_hidden), jax.tree.map(jnp.zeros_like, params))
  (_, credit), _ = jax.lax.scan(body, carry, newest_first)
  return credit
