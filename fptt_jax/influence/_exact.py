"""Real-time recurrent learning with the whole influence matrix."""

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import INT32_MAX, check_integer
from fptt_jax._dtypes import at_least_float32
from fptt_jax._types import Hidden, Params
from fptt_jax.influence._arrays import Weights, join, row_size, select, spread
from fptt_jax.influence._base import Influence, WindowMap
from fptt_jax.influence._pull import pull_back
from fptt_jax.influence._reach import reached_paths

MAX_BYTES = 2**29


def rtrl(max_bytes: int = MAX_BYTES) -> Influence:
  """Make the exact influence: real-time recurrent learning, a window at a time.

  It carries the derivative of each of the N numbers of a row's state with respect to
  each of the P parameters that reach the state: B·N·P numbers. A window costs N
  pull-backs and B·N²·P multiply-adds. So this is for small networks.

  With weights that do not move, the gradients of a sequence's windows add up to that of
  back-propagation through time. With weights that move, each gradient is the derivative
  of the run as it was with respect to one shift of all weights used so far.

  Args:
    max_bytes: Largest size of the state, for all rows of a batch.

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
    paths = reached_paths(window, params, hidden)
    batch_size = jax.tree.leaves(hidden)[0].shape[0]
    sizes = (batch_size, row_size(hidden))
    weights = select(params, paths)
    _check_bytes(weights, sizes, max_bytes)
    return {
      path: jnp.zeros((*sizes, *leaf.shape), at_least_float32(leaf.dtype))
      for path, leaf in weights.items()
    }

  return Influence(init, _credit, _advance)


def _check_bytes(weights: Weights, sizes: tuple[int, int], max_bytes: int) -> None:
  """Raise a ValueError if the influence of the weights would be too large."""
  rows, numbers = sizes
  total = sum(
    leaf.size * at_least_float32(leaf.dtype).itemsize for leaf in weights.values()
  )
  total *= rows * numbers
  if total <= max_bytes:
    return
  count = sum(leaf.size for leaf in weights.values())
  raise ValueError(
    f"influence 'rtrl' must take at most max_bytes={max_bytes:,} bytes, got {total:,}: "
    f'B={rows} rows times N={numbers} numbers of a state times P={count:,} parameters '
    'that reach it. Use a smaller network or batch, or fptt_jax.influence.rtrl'
    '(max_bytes=...).'
  )


def _credit(
  window: WindowMap, params: Params, state: Weights, d_hidden: Hidden
) -> Params:
  delta = join(d_hidden)
  credits = {path: jnp.tensordot(delta, matrix, 2) for path, matrix in state.items()}
  return spread(params, credits)


def _advance(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: Weights,
  key: jax.Array | None,
) -> Weights:
  """Return M' = J M + I, where I and J are the derivatives of the window map."""
  rows, numbers = join(hidden).shape
  unit_vectors = jnp.asarray(np.eye(numbers), join(hidden).dtype)
  cotangents = jnp.broadcast_to(unit_vectors[:, None], (numbers, rows, numbers))
  direct, jacobian = pull_back(window, params, tuple(state), hidden, cotangents)

  def moved(matrix: jax.Array, added: jax.Array) -> jax.Array:
    carried = jnp.einsum('nbm,bm...->bn...', jacobian, matrix)
    return carried.astype(matrix.dtype) + added.astype(matrix.dtype)

  return {path: moved(matrix, direct[path]) for path, matrix in state.items()}
