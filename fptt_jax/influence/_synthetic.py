"""Synthetic gradients: a learned guess of what the future adds to a gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fptt_jax._checks import check_size, check_type
from fptt_jax._types import Hidden, Params
from fptt_jax.influence._arrays import join, split
from fptt_jax.influence._base import Influence, WindowMap

LR = 1e-3
"""Learning rate of the default optimizer of G."""


class LearnedCredit(NamedTuple):
  """The map from a hidden state to its credit, which all rows share.

  Attributes:
    weights: Weights of the map, [1, ...].
    opt_state: State of its optimizer, [1, ...].
  """

  weights: dict[str, jax.Array]
  opt_state: optax.OptState


def synthetic(
  optimizer: optax.GradientTransformation | None = None,
  hidden_features: int | None = None,
) -> Influence:
  """Make an influence that learns to guess the credit of the future.

  The other influences remember what the weights did to the hidden state. This one looks
  ahead: a small map G guesses, from the hidden state h after a window, the gradient
  that later windows would send back to h, and G(h) is passed back through the window.
  The target of G at the window's start is what arrives there, the window's own gradient
  and G(h) passed back through the window, so that G learns from its own later guesses.

  G is 0 at first, so that the gradient is that of the window alone. The gradient is
  biased until G has learned. It stays biased where the map cannot represent the credit
  as a function of h, as when h does not determine the target, or where the weights
  change faster than G learns. If the true credit is linear in h and G has learned it,
  the bias is 0. Rows share G, so that its memory does not depend on the batch: N² + N
  numbers, and those of its optimizer.

  A window takes two to three times as long. G is kept where hidden states start
  anew, and nothing is guessed after the end of a sequence.

  Args:
    optimizer: Optimizer of G; Adam with a rate of 0.001 by default. Its loss is the
      mean over the rows of half the squared error, for a batch's mean loss times B.
    hidden_features: Units of a hidden layer with tanh; None for a linear map.

  Returns:
    The influence. It excludes a mesh.

  Raises:
    ValueError: `hidden_features` is not an integer >= 1.
    TypeError: `optimizer` is not an optax.GradientTransformation.

  Example:
    >>> import jax, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(
    ...   lambda rngs: nn.Sequential(
    ...     nn.GRU(1, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
    ...   )
    ... )
    >>> loss = fptt_jax.losses.sequence_regression()
    >>> trainer = fptt_jax.make_trainer(
    ...   model, loss, optax.adam(1e-3), method='tbptt', num_windows=4,
    ...   influence=fptt_jax.influence.synthetic(optax.adam(1e-2)),
    ... )
    >>> batch = fptt_jax.Batch(jax.numpy.ones((20, 8, 1)), jax.numpy.ones((20, 8, 1)))
    >>> state = trainer.init(jax.random.key(0), batch)
    >>> state.influence.weights['out'].shape  # Shared by all rows, N to N.
    (1, 16, 16)

  References:
    Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients", ICML
    2017.
  """
  if hidden_features is not None:
    hidden_features = check_size('hidden_features', hidden_features)
  if optimizer is None:
    optimizer = optax.adam(LR)
  check_type('optimizer', optimizer, optax.GradientTransformation)

  def init(window: WindowMap, params: Params, hidden: Hidden) -> LearnedCredit:
    weights = _first_weights(join(hidden), hidden_features)
    # A leading axis, as all states of influences have.
    return _stack(LearnedCredit(weights, optimizer.init(weights)))

  def observe(
    window: WindowMap,
    params: Params,
    hidden: Hidden,
    state: LearnedCredit,
    d_hidden: Hidden,
  ) -> LearnedCredit:
    weights, opt_state = jax.tree.map(lambda leaf: leaf[0], state)
    _, arrived = _pass_back(window, params, hidden, weights)
    rows = join(hidden)
    target = join(_like(d_hidden, hidden)) * len(rows) + arrived
    scored = _scored(window, rows)
    gradient = jax.grad(_error)(weights, rows, target, scored)
    changes, opt_state = optimizer.update(gradient, opt_state, weights)
    moved = _stack(LearnedCredit(optax.apply_updates(weights, changes), opt_state))
    # Without a row to learn from, momentum would move G all the same.
    learned: LearnedCredit = optax.tree.where(scored.any(), moved, state)
    return learned

  def first(state: LearnedCredit) -> LearnedCredit:
    weights = _first_weights(state.weights['bias'], hidden_features)
    return _stack(LearnedCredit(weights, optimizer.init(weights)))

  return Influence(init, _credit, _advance, observe=observe, keeps=True, first=first)


def _first_weights(
  rows: jax.Array, hidden_features: int | None
) -> dict[str, jax.Array]:
  """Return weights of a map that is 0."""
  numbers = rows.shape[1]
  between = numbers if hidden_features is None else hidden_features
  weights = {
    'out': jnp.zeros((between, numbers), rows.dtype),
    'bias': jnp.zeros(numbers, rows.dtype),
  }
  if hidden_features is not None:
    shape = (numbers, between)
    drawn = jax.random.normal(jax.random.key(0), shape, rows.dtype)
    weights['into'] = drawn / numbers**0.5
  return weights


def _guess(weights: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
  """Return G of hidden states [B, N]."""
  if 'into' in weights:
    rows = jnp.tanh(rows @ weights['into'])
  return rows @ weights['out'] + weights['bias'][None]


def _error(
  weights: dict[str, jax.Array],
  rows: jax.Array,
  target: jax.Array,
  scored: jax.Array,
) -> jax.Array:
  squared = ((_guess(weights, rows) - target) ** 2).sum(1) / 2
  return jnp.where(scored, squared, 0).mean()


def _scored(window: WindowMap, rows: jax.Array) -> jax.Array:
  """Return which rows [B] G learns from: those that go on from a window to this one."""
  scored = jnp.ones(len(rows), bool)
  if window.mask is not None:
    scored &= window.mask.any(0)
  for first in (window.fresh, window.starts):
    if first is not None:
      scored &= ~first
  return scored


def _pass_back(
  window: WindowMap, params: Params, hidden: Hidden, weights: dict[str, jax.Array]
) -> tuple[Params, jax.Array]:
  """Pass the guess after a window back through it.

  Returns:
    Gradients of the parameters, summed over the rows, and of the state before [B, N].
  """

  def end(params: Params, rows: jax.Array) -> jax.Array:
    return join(window.end(params, split(rows, hidden)))

  after, pull = jax.vjp(end, params, join(hidden))
  guessed = _guess(weights, after)
  if window.ends is not None:
    guessed = jnp.where(window.ends[:, None], 0, guessed)
  of_params, before = pull(guessed)
  return of_params, before


def _credit(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: LearnedCredit,
  d_hidden: Hidden,
) -> Params:
  weights = jax.tree.map(lambda leaf: leaf[0], state.weights)
  credit, _ = _pass_back(window, params, hidden, weights)
  batch_size = len(join(hidden))
  return jax.tree.map(lambda leaf: leaf / batch_size, credit)


def _advance(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: LearnedCredit,
  key: jax.Array | None,
) -> LearnedCredit:
  return state


def _stack(state: LearnedCredit) -> LearnedCredit:
  stacked: LearnedCredit = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
  return stacked


def _like(d_hidden: Hidden, hidden: Hidden) -> Hidden:
  """Return a gradient with zeros in place of those of integers, which have none."""

  def put(gradient: Any, leaf: jax.Array) -> jax.Array:
    if gradient.dtype == jax.dtypes.float0:
      return jnp.zeros_like(leaf)
    return gradient

  return jax.tree.map(put, d_hidden, hidden)
