"""Real-time recurrent learning with the whole influence matrix."""

import jax
import jax.numpy as jnp

from fptt_jax._checks import INT32_MAX, Words, check_integer, require
from fptt_jax._dtypes import at_least_float32
from fptt_jax._types import Hidden, Params
from fptt_jax.influence._arrays import (
  Weights,
  join,
  select,
  spread,
  unit_cotangents,
)
from fptt_jax.influence._base import Influence, WindowMap
from fptt_jax.influence._own import advance_own, credit_own, empty_own
from fptt_jax.influence._pull import pull_back
from fptt_jax.influence._reach import reached_paths
from fptt_jax.influence._units import find_units

MAX_BYTES = 2**29


def rtrl(max_bytes: int = MAX_BYTES) -> Influence:
  """Make the exact influence: real-time recurrent learning, a window at a time.

  It carries the derivative of each of the N numbers of a row's state with respect to
  each of the P parameters that reach the state: B·N·P numbers. A window costs N
  pull-backs and B·N²·P multiply-adds. So this is for small networks.

  A model whose only recurrent layer keeps its units apart, such as an :class:`LRU` or
  an :class:`IndRNN`, needs only one number per parameter and array of the state:
  B·m·P numbers, and one to two times the time of the window itself. Whether a model is
  of this kind is found by running one step. A layer before the recurrent one, such as a
  linear encoder, reaches all units, so that such a model is not of this kind.

  With weights that do not move, the gradients of a sequence's windows add up to that of
  back-propagation through time. With weights that move, each gradient is the derivative
  of the run as it was with respect to one shift of all weights used so far.

  Args:
    max_bytes: Largest size of the whole matrix, for all rows of a batch. It does not
      matter where units are apart.

  Returns:
    The influence.

  Raises:
    ValueError: `max_bytes` is not an integer >= 1. In `init`: the state would be
      larger.

  Example:
    >>> import jax, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(
    ...   lambda rngs: nn.Sequential(
    ...     nn.GRU(1, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
    ...   )
    ... )
    >>> loss = fptt_jax.losses.terminal_regression()
    >>> trainer = fptt_jax.make_trainer(
    ...   model, loss, optax.adam(1e-3), method='tbptt', num_windows=4,
    ...   influence=fptt_jax.influence.rtrl(max_bytes=2**20),
    ... )
    >>> batch = fptt_jax.Batch(jax.numpy.ones((20, 8, 1)), jax.numpy.ones(8))
    >>> state = trainer.init(jax.random.key(0), batch)
    >>> state.influence['layers/0/w_h'].shape  # B, N, and the parameter's own.
    (8, 4, 4, 12)

  References:
    Williams and Zipser, "A Learning Algorithm for Continually Running Fully Recurrent
    Neural Networks", Neural Computation 1989.
  """
  accepted = 'an integer >= 1, a number of bytes'
  max_bytes = check_integer('max_bytes', max_bytes, 1, INT32_MAX**2, accepted)

  def init(window: WindowMap, params: Params, hidden: Hidden) -> Weights:
    units = find_units(window, params, hidden)
    if units.whole:
      return empty_own(units, params, len(join(hidden)))
    name, hint = "influence 'rtrl'", "Use 'snap1', or rtrl(max_bytes=...)."
    return empty_matrix(window, params, hidden, max_bytes, name, hint)

  return Influence(init, _credit, _advance)


def _credit(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: Weights,
  d_hidden: Hidden,
) -> Params:
  units = find_units(window, params, hidden)
  if units.whole:
    return credit_own(units, window, params, state, d_hidden)
  return credit_matrix(params, state, d_hidden)


def _advance(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: Weights,
  key: jax.Array | None,
) -> Weights:
  units = find_units(window, params, hidden)
  if units.whole:
    return advance_own(units, window, params, hidden, state)
  return advance_matrix(window, params, hidden, state)


def empty_matrix(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  max_bytes: int,
  name: str,
  hint: str,
) -> Weights:
  """Return the whole matrix before the first step, {path: zeros [B, N, ...]}.

  Args:
    window: A window of the model.
    params: Parameters of the model.
    hidden: [B, ...], its hidden state.
    max_bytes: Largest size.
    name: What needs the matrix, for the error.
    hint: What to use instead.

  Raises:
    ValueError: The matrix would be larger.
  """
  weights = select(params, reached_paths(window, params, hidden))
  sizes = join(hidden).shape
  _check_bytes(weights, sizes, max_bytes, name, hint)
  return {
    path: jnp.zeros((*sizes, *leaf.shape), at_least_float32(leaf.dtype))
    for path, leaf in weights.items()
  }


def _check_bytes(
  weights: Weights, sizes: tuple[int, ...], max_bytes: int, name: str, hint: str
) -> None:
  rows, numbers = sizes
  total = sum(
    leaf.size * at_least_float32(leaf.dtype).itemsize for leaf in weights.values()
  )
  total *= rows * numbers
  count = sum(leaf.size for leaf in weights.values())
  hint = (
    f'These are B={rows} rows times N={numbers} numbers of a state times P={count:,} '
    f'parameters that reach it. {hint}'
  )
  accepted = f'at most max_bytes={max_bytes:,} bytes'
  require(total <= max_bytes, name, accepted, Words(f'{total:,}'), hint)


def credit_matrix(params: Params, matrix: Weights, d_hidden: Hidden) -> Params:
  """Return Σ_b δ_b M_b, a tree like all parameters."""
  delta = join(d_hidden)
  credits = {path: jnp.tensordot(delta, part, 2) for path, part in matrix.items()}
  return spread(params, credits)


def advance_matrix(
  window: WindowMap, params: Params, hidden: Hidden, matrix: Weights
) -> Weights:
  """Return M' = J M + I, where I and J are the derivatives of the window map."""
  cotangents = unit_cotangents(hidden)
  direct, jacobian = pull_back(window, params, tuple(matrix), hidden, cotangents)

  def moved(old: jax.Array, added: jax.Array) -> jax.Array:
    carried = jnp.einsum('nbm,bm...->bn...', jacobian, old)
    return carried.astype(old.dtype) + added.astype(old.dtype)

  return {path: moved(old, direct[path]) for path, old in matrix.items()}
