"""Unbiased random approximations of rank one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fptt_jax._checks import check_choice, check_size, require
from fptt_jax._dtypes import at_least_float32
from fptt_jax._trees import with_axes
from fptt_jax._types import Hidden, Params
from fptt_jax.influence._arrays import TINY, Weights, join, select, split, spread
from fptt_jax.influence._base import Influence, WindowMap
from fptt_jax.influence._own import own_norms
from fptt_jax.influence._pull import (
  numbered_first,
  pull_through_steps,
  pull_to_start,
  pull_to_weights,
  run_steps,
)
from fptt_jax.influence._reach import reached_paths
from fptt_jax.influence._units import find_units

ROWS = ('each', 'together')
BALANCES = ('row', 'unit')


class RankOne(NamedTuple):
  """Factors of the influence: M_b is the mean over the pairs of s_b ⊗ w_b.

  Attributes:
    of_state: [B, r, N], s for each of the r pairs.
    of_weights: {path: [B, r, ...]}, w; [1, r, ...] if all rows share it.
  """

  of_state: jax.Array
  of_weights: Weights


def uoro(pairs: int = 1, rows: str = 'each', balance: str = 'row') -> Influence:
  """Make an unbiased influence of rank one: UORO, a window at a time, or NoBackTrack.

  The influence is M' = J M + I. Here M is a product s ⊗ w, and a random reduction to
  rank one is made once per window: with signs ν, s' = ρ₀ J s + ρ₁ ν and w' = w / ρ₀ +
  (νᵀ I) / ρ₁. Its mean is exact for any model and stack. Its noise grows with the
  number of windows that the network remembers, and falls with the steps of a window. A
  window costs one forward derivative and one pull-back for each pair.

  Args:
    pairs: r, independent pairs (s, w), whose mean is taken. The noise is √r times
      smaller.
    rows: 'each' keeps a pair for each row of a batch, B·r·(N + P) numbers. 'together'
      keeps one w for all rows, r·(B·N + P) numbers, with about √B times the noise: for
      large tables. It excludes a mesh.
    balance: What has a scale ρ₁ of its own. 'row' has one for each row of the batch
      (UORO). 'unit' has one for each number of the row's state (NoBackTrack): the root
      of the norm of what the window's parameters add to that number through its own
      unit. In windows of one step that is the whole of it, and in longer ones what
      :func:`snap1` would carry; the mean is exact in any case. It takes B·m·P numbers
      for a moment, and needs a model with units, and rows='each'.

  Returns:
    The influence, which draws from the key of the trainer's state.

  Raises:
    ValueError: `pairs` is not an integer >= 1, `rows` or `balance` is another name, or
      they exclude each other. In `init`: no parameter belongs to one unit, with
      balance='unit'.

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
    ...   influence=fptt_jax.influence.uoro(pairs=2),
    ... )
    >>> batch = fptt_jax.Batch(jax.numpy.ones((20, 8, 1)), jax.numpy.ones(8))
    >>> state = trainer.init(jax.random.key(0), batch)
    >>> state.influence.of_state.shape  # B, r, and the numbers of h and c.
    (8, 2, 32)

  References:
    Tallec and Ollivier, "Unbiased Online Recurrent Optimization", ICLR 2018. Ollivier,
    Tallec and Charpiat, "Training recurrent networks online without backtracking",
    2015 (NoBackTrack).
  """
  pairs = check_size('pairs', pairs)
  check_choice('rows', rows, ROWS)
  check_choice('balance', balance, BALANCES)
  together = rows == 'together'
  # Each row has scales of its own.
  fits = not together or balance == 'row'
  require(fits, 'balance', "'row' with rows='together'", balance)
  scales = _unit_scales if balance == 'unit' else None

  def init(window: WindowMap, params: Params, hidden: Hidden) -> RankOne:
    if scales is not None:
      found = find_units(window, params, hidden).layers
      accepted = "'row' for a model whose parameters each reach several units"
      require(found, 'balance', accepted, balance)
    weights = select(params, reached_paths(window, params, hidden))
    batch_size, numbers = join(hidden).shape
    leading = (1 if together else batch_size, pairs)
    of_weights = {
      path: jnp.zeros((*leading, *leaf.shape), at_least_float32(leaf.dtype))
      for path, leaf in weights.items()
    }
    of_state = jnp.zeros((batch_size, pairs, numbers), join(hidden).dtype)
    return RankOne(of_state, of_weights)

  def advance(
    window: WindowMap,
    params: Params,
    hidden: Hidden,
    state: RankOne,
    key: jax.Array | None,
  ) -> RankOne:
    assert key is not None
    return _advance(window, params, hidden, state, key, together, scales)

  return Influence(init, _credit, advance, draws=True)


def _credit(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: RankOne,
  d_hidden: Hidden,
) -> Params:
  # The share of each row and pair, [B, r].
  shares = jnp.einsum('bn,brn->br', join(d_hidden), state.of_state)
  shares /= shares.shape[1]

  def credit(factor: jax.Array) -> jax.Array:
    own = shares if len(factor) == len(shares) else shares.sum(0, keepdims=True)
    return jnp.tensordot(own.astype(factor.dtype), factor, 2)

  return spread(params, {path: credit(w) for path, w in state.of_weights.items()})


def _advance(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: RankOne,
  key: jax.Array,
  together: bool,
  scales: Callable[[WindowMap, Params, Hidden], jax.Array] | None,
) -> RankOne:
  """Add one window's own influence, and reduce the sum to rank one.

  Args:
    window: The window.
    params: Parameters of the model.
    hidden: [B, ...], hidden state after the window before.
    state: Factors before the window.
    key: Key of the signs.
    together: Whether all rows share one w.
    scales: (window, params, hidden) -> positive numbers [B, N], one for each number of
      the state; None for one for each row.
  """
  of_weights = state.of_weights
  if window.fresh is not None and not together:
    fresh = window.fresh
    of_weights = jax.tree.map(
      lambda w: jnp.where(with_axes(fresh, w), 0, w), of_weights
    )
  signs = jax.random.rademacher(key, state.of_state.shape, state.of_state.dtype)
  moved = _push(window, params, hidden, state.of_state)
  pushed = signs
  if scales is not None:
    of_numbers = scales(window, params, hidden)[:, None]
    pushed = signs * of_numbers
    signs = signs / of_numbers
  direct = _pull_signs(window, params, tuple(of_weights), hidden, signs, together)

  axes = (0, 2) if together else (2,)
  by_pair = (1, -1) if together else signs.shape[:2]

  def of_rows(x: jax.Array) -> jax.Array:
    return jnp.sqrt((x**2).sum(axes)).reshape(by_pair) + TINY

  def of_tree(tree: Weights) -> jax.Array:
    squares = [
      (jnp.abs(leaf) ** 2).reshape(*leaf.shape[:2], -1).sum(2)
      for leaf in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares[1:], squares[0])) + TINY

  # Any positive numbers that do not depend on the signs' sign are unbiased; these make
  # both factors of each product equally large, which makes the variance small.
  old = jnp.sqrt(of_tree(of_weights) / of_rows(moved))
  new = jnp.sqrt(of_tree(direct) / of_rows(pushed))
  if scales is not None:
    # The scales have balanced the factors already.
    new = jnp.ones_like(new)
  return RankOne(
    with_axes(old, moved) * moved + with_axes(new, pushed) * pushed,
    {
      path: (w / with_axes(old, w) + direct[path] / with_axes(new, w)).astype(w.dtype)
      for path, w in of_weights.items()
    },
  )


def _unit_scales(window: WindowMap, params: Params, hidden: Hidden) -> jax.Array:
  """Return the root of the norm of what a window adds to each number, [B, N]."""
  units = find_units(window, params, hidden)
  norms = own_norms(units, window, params, hidden)
  # Numbers of the state without parameters of their own get the row's mean.
  mean = norms.mean(1, keepdims=True)
  return jnp.sqrt(jnp.where(norms > 0, norms, mean) + TINY)


def _push(
  window: WindowMap, params: Params, hidden: Hidden, tangents: jax.Array
) -> jax.Array:
  """Push tangents [B, r, N] of the hidden state through a window."""

  def one_pair(tangent: jax.Array) -> jax.Array:
    end = lambda rows: join(window.end(params, split(rows, hidden)))
    _, moved = jax.jvp(end, (join(hidden),), (tangent,))
    return moved

  return jax.vmap(one_pair, in_axes=1, out_axes=1)(tangents)


def _pull_signs(
  window: WindowMap,
  params: Params,
  paths: tuple[str, ...],
  hidden: Hidden,
  signs: jax.Array,
  together: bool,
) -> Weights:
  """Pull signs [B, r, N] of the state after a window back to the parameters.

  Returns:
    {path: [B, r, ...]} or, summed over the rows, {path: [1, r, ...]}.
  """
  before = run_steps(window, params, hidden)
  cotangents = signs.swapaxes(0, 1)
  first, after = pull_through_steps(window, params, before, cotangents)
  if not together:
    gradients = pull_to_weights(window, params, paths, before, after)
    gradients, _ = pull_to_start(window, params, gradients, first)
    return numbered_first(gradients)
  # The steps of all rows, as the steps of one row.
  column = jax.tree.map(
    lambda leaf: leaf.reshape(-1, 1, *leaf.shape[2:]), (before, window.x, window.mask)
  )
  before, x, mask = column
  steps, pairs, batch_size, numbers = after.shape
  after = after.swapaxes(1, 2).reshape(steps * batch_size, pairs, 1, numbers)
  one_row = window._replace(x=x, mask=mask)
  gradients = pull_to_weights(one_row, params, paths, before, after)
  nothing: Any = {path: jnp.zeros([], g.dtype) for path, g in gradients.items()}
  through_start, _ = pull_to_start(window, params, nothing, first)
  summed = jax.tree.map(
    lambda g, start: g + start.sum(0, keepdims=True) if start.ndim else g,
    gradients,
    through_start,
  )
  return numbered_first(summed)
