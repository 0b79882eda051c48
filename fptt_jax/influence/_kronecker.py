"""Unbiased random approximations by sums of Kronecker products."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fptt_jax._checks import check_choice, check_size, require
from fptt_jax._types import Hidden, OwnProduct, Params
from fptt_jax.influence._arrays import TINY, by_path, join, spread, unit_cotangents
from fptt_jax.influence._base import Influence, WindowMap
from fptt_jax.influence._own import given_steps
from fptt_jax.influence._pull import (
  pull_through_steps,
  pull_to_weights,
  run_steps,
)
from fptt_jax.influence._reach import reached_paths

REDUCTIONS = ('optimal', 'signs')


class KroneckerSum(NamedTuple):
  """Influence of the matrices that share their sums z: M_b is the sum of u ⊗ A.

  Attributes:
    of_inputs: [B, r, q], u, for the q inputs of the matrices, one after the other.
    of_sums: [B, r, N, z], A.
  """

  of_inputs: jax.Array
  of_sums: jax.Array


State = dict[str, KroneckerSum]
"""The influence by the path of the bias that is added to the sums."""


def kronecker(terms: int = 4, reduction: str = 'optimal') -> Influence:
  """Make an unbiased influence of Kronecker products, a window at a time.

  A step's own influence of a matrix is exactly the product u ⊗ A of the matrix's inputs
  u and the derivative A of the state with respect to its sums z. A window of S steps
  adds S such products to the r that are carried, and the S + r are reduced to r at
  random, so that the mean is exact: Optimal Kronecker Sum, or with `reduction='signs'`
  KF-RTRL. The noise is much smaller than that of `uoro`.

  It carries B·r·(q + N·z) numbers for each matrix of z sums, such as the 4H of an LSTM,
  and needs N pull-backs through a window, B·r·N²·z multiply-adds, and an orthogonal
  decomposition of S + r vectors of N·z numbers. So this is for small networks, like
  `rtrl`; its memory is about r/q of that of `rtrl`.

  All parameters that reach the state must act on sums with a bias, in layers that
  define `own_step`: LSTM, GRU and ElmanRNN, alone or in a stack.

  Args:
    terms: r, products that are carried.
    reduction: How products are reduced. 'optimal' has the smallest variance among
      unbiased reductions of the sum. 'signs' adds up all of them with random signs,
      balanced as in KF-RTRL, and needs terms=1.

  Returns:
    The influence, which draws from the key of the trainer's state.

  Raises:
    ValueError: `terms` is not an integer >= 1, `reduction` is another name, or they
      exclude each other. In `init`: a parameter reaches the state other than through
      sums with a bias, such as that of an :class:`LRU` or of a linear encoder.

  Example:
    >>> import jax, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(
    ...   lambda rngs: nn.Sequential(
    ...     nn.GRU(1, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
    ...   )
    ... )
    >>> loss = fptt_jax.losses.terminal_regression()
    >>> trainer = fptt_jax.make_trainer(
    ...   model, loss, optax.adam(1e-3), method='tbptt', num_windows=4,
    ...   influence=fptt_jax.influence.kronecker(terms=2),
    ... )
    >>> batch = fptt_jax.Batch(jax.numpy.ones((20, 8, 1)), jax.numpy.ones(8))
    >>> state = trainer.init(jax.random.key(0), batch)
    >>> of_inputs, of_sums = state.influence['layers/0/bias']
    >>> of_inputs.shape, of_sums.shape  # B, r, then x and 1, or N and 3H.
    ((8, 2, 2), (8, 2, 16, 48))

  References:
    Mujika, Meier and Steger, "Approximating Real-Time Recurrent Learning with Random
    Kronecker Factors", NeurIPS 2018. Benzing, Gauy, Mujika, Martinsson and Steger,
    "Optimal Kronecker-Sum Approximation of Real Time Recurrent Learning", ICML 2019.
  """
  terms = check_size('terms', terms)
  check_choice('reduction', reduction, REDUCTIONS)
  fits = reduction != 'signs' or terms == 1
  require(fits, 'terms', "1 with reduction='signs'", terms)
  reduce = _reduce_optimally if reduction == 'optimal' else _reduce_by_signs

  def init(window: WindowMap, params: Params, hidden: Hidden) -> State:
    _check_products(window, params, hidden)
    shapes = jax.eval_shape(
      lambda params, hidden: _new_terms(window, params, hidden)[0], params, hidden
    )
    return {
      path: KroneckerSum(*(_first_terms(leaf, terms) for leaf in new))
      for path, new in shapes.items()
    }

  def advance(
    window: WindowMap,
    params: Params,
    hidden: Hidden,
    state: State,
    key: jax.Array | None,
  ) -> State:
    assert key is not None
    added, jacobian = _new_terms(window, params, hidden)
    moved = {}
    for number, (path, old) in enumerate(state.items()):
      carried = jnp.einsum('nbm,brmz->brnz', jacobian, old.of_sums)
      both = KroneckerSum(
        jnp.concatenate([old.of_inputs, added[path].of_inputs], 1),
        jnp.concatenate([carried, added[path].of_sums], 1),
      )
      keys = jax.random.split(jax.random.fold_in(key, number), len(carried))
      moved[path] = jax.vmap(lambda row, key: reduce(row, terms, key))(both, keys)
    return moved

  return Influence(init, _credit, advance, draws=True)


def _first_terms(shape: Any, terms: int) -> jax.Array:
  return jnp.zeros((shape.shape[0], terms, *shape.shape[2:]), shape.dtype)


def _credit(
  window: WindowMap,
  params: Params,
  hidden: Hidden,
  state: State,
  d_hidden: Hidden,
) -> Params:
  delta = join(d_hidden)
  credits: dict[str, jax.Array] = {}
  for path, product in _shapes_of_products(window, params, hidden).items():
    of_inputs, of_sums = state[path]
    of_sums = jnp.einsum('bn,brnz->brz', delta, of_sums)
    joint = jnp.einsum('brq,brz->qz', of_inputs, of_sums)
    first = 0
    for name, operand in product.operands.items():
      size = 1 if operand is None else operand.shape[-1]
      part = joint[first : first + size]
      credits[name] = part[0] if operand is None else part
      first += size
  return spread(params, credits)


def _products(
  window: WindowMap, params: Params, hidden: Hidden
) -> dict[str, OwnProduct]:
  """Return the products whose sums have a bias, by the path of the bias.

  Their arrays are those of all steps, [S, B, ...].
  """
  before = run_steps(window, params, hidden)
  found = {}
  for step in given_steps(window, params, before, own_only=False).values():
    for product in step.products:
      biases = [path for path, operand in product.operands.items() if operand is None]
      has_matrix = len(biases) < len(product.operands)
      if biases and has_matrix:
        found[biases[0]] = product
  return found


def _shapes_of_products(
  window: WindowMap, params: Params, hidden: Hidden
) -> dict[str, OwnProduct]:
  """Return the shapes of `_products`."""
  shapes: dict[str, OwnProduct] = jax.eval_shape(
    lambda params, hidden: _products(window, params, hidden), params, hidden
  )
  return shapes


def _check_products(window: WindowMap, params: Params, hidden: Hidden) -> None:
  """Raise a ValueError unless all parameters of the state are in some product."""
  products = _shapes_of_products(window, params, hidden)
  known = {path for product in products.values() for path in product.operands}
  missing = [
    path for path in reached_paths(window, params, hidden) if path not in known
  ]
  own = by_path(params)
  repeated = sorted(path for path in known if path not in own)
  accepted = "used once with influence 'kronecker'"
  require(not repeated, 'layers', accepted, repeated)
  accepted = 'of LSTM, GRU, ElmanRNN or layers with own_step, which sum with a bias'
  hint = "Use 'rtrl', 'snap1' or 'uoro'."
  require(not missing, "parameters with influence 'kronecker'", accepted, missing, hint)


def _new_terms(
  window: WindowMap, params: Params, hidden: Hidden
) -> tuple[State, jax.Array]:
  """Return the S products that a window adds, and its Jacobian [N, B, N].

  A masked step adds a product of zeros.
  """
  products = _products(window, params, hidden)
  before = run_steps(window, params, hidden)
  rows, numbers = join(hidden).shape
  jacobian, after = pull_through_steps(window, params, before, unit_cotangents(hidden))
  # The derivative with respect to the sums is that with respect to their bias. Each
  # step of each row counts as a row of its own.
  by_step = jax.tree.map(
    lambda leaf: leaf.reshape(1, -1, *leaf.shape[2:]), (before, window.x, window.mask)
  )
  before, x, mask = by_step
  steps = len(after)
  after = after.swapaxes(0, 1).reshape(1, numbers, steps * rows, numbers)
  one_step = window._replace(x=x, mask=mask, fresh=None)
  of_sums = pull_to_weights(one_step, params, tuple(products), before, after)
  added = {}
  for path, product in products.items():
    sums = of_sums[path].reshape(steps, rows, numbers, -1)
    inputs = _join_operands(product, sums)
    added[path] = KroneckerSum(inputs.swapaxes(0, 1), sums.swapaxes(0, 1))
  return added, jacobian


def _join_operands(product: OwnProduct, like: jax.Array) -> jax.Array:
  """Return what the parameters of a product are multiplied by, [S, B, q]."""
  one = jnp.ones((*like.shape[:2], 1), like.dtype)
  operands = [
    one if operand is None else operand.astype(like.dtype)
    for operand in product.operands.values()
  ]
  return jnp.concatenate(operands, -1)


def _reduce_by_signs(row: KroneckerSum, terms: int, key: jax.Array) -> KroneckerSum:
  """Add up the products [R, ...] of a row with random signs, to one."""
  del terms
  inputs, sums = row
  signs = jax.random.rademacher(key, (len(inputs),), inputs.dtype)
  of_inputs = jnp.sqrt((inputs**2).sum(1)) + TINY
  of_sums = jnp.sqrt((sums**2).sum((1, 2))) + TINY
  # Both factors of each product become equally large.
  scales = signs * jnp.sqrt(of_sums / of_inputs)
  return KroneckerSum(
    jnp.tensordot(scales, inputs, 1)[None], jnp.tensordot(1 / scales, sums, 1)[None]
  )


def _reduce_optimally(row: KroneckerSum, terms: int, key: jax.Array) -> KroneckerSum:
  """Reduce the products [R, ...] of a row to `terms`, with the least variance."""
  inputs, sums = row
  flat = sums.reshape(len(sums), -1)
  left, of_left = jnp.linalg.qr(inputs.T)
  right, of_right = jnp.linalg.qr(flat.T)
  to_left, values, to_right = jnp.linalg.svd(of_left @ of_right.T, full_matrices=False)
  mix = _random_root(values, terms, key)
  of_inputs = left @ (to_left @ mix)
  of_sums = right @ (to_right.T @ mix)
  return KroneckerSum(of_inputs.T, of_sums.T.reshape(terms, *sums.shape[1:]))


def _random_root(values: jax.Array, terms: int, key: jax.Array) -> jax.Array:
  """Return a random X [n, r] with E[X Xᵀ] = diag(values), of the least variance.

  The m largest values are kept as they are. The others, which sum up to σ, go into the
  k = r - m columns that are left: X = √(σ/k) diag(ν) Z for random signs ν and a matrix
  Z of k orthonormal columns whose rows have the squared norms k·value/σ. The variance
  is σ²/k - Σ value² for any such Z.

  Args:
    values: [n], from large to small.
    terms: r.
    key: Key of the signs.
  """
  if terms >= len(values):
    return jnp.eye(len(values), terms, dtype=values.dtype) * jnp.sqrt(values)[:, None]
  # sums[m] is the sum of all values but the m largest. The m-th value fits into the
  # columns left, k = terms - m, if k value <= sums[m]. The first such m is the number
  # of values kept as they are.
  sums = jnp.cumsum(values[::-1])[::-1]
  left = terms - jnp.arange(len(values))
  # At m = r - 1 the condition always holds.
  kept = jnp.argmax(left * values <= sums)
  columns = terms - kept
  total = sums[kept]
  is_kept = jnp.arange(len(values)) < kept
  share = values * columns / jnp.where(total > 0, total, 1)
  rows = _rows_of_projection(jnp.where(is_kept, 1, share), terms)
  signs = jax.random.rademacher(key, values.shape, values.dtype)
  scales = jnp.sqrt(jnp.where(is_kept, values, total / columns))
  return (signs * scales)[:, None] * rows


def _rows_of_projection(squares: jax.Array, columns: int) -> jax.Array:
  """Return orthonormal columns [n, r] whose rows have the given squared norms.

  Args:
    squares: [n], numbers in [0, 1] whose sum is r.
    columns: r.

  References:
    Chan and Li, "Diagonal elements and eigenvalues of a real symmetric matrix", 1983.
  """
  one = jnp.eye(columns, dtype=squares.dtype)

  def body(carry: Any, square: jax.Array) -> tuple[Any, jax.Array]:
    rest, size, number = carry
    # The rest of the rows so far is rotated with a unit vector, or with zeros.
    longer = square > size
    with_one = longer & (number < columns)
    other = jnp.where(with_one, one[jnp.minimum(number, columns - 1)], 0)
    of_other = jnp.where(with_one, 1.0, 0.0)
    gap = of_other - size
    sine = jnp.where(gap == 0, 0, (square - size) / jnp.where(gap == 0, 1, gap))
    sine = jnp.clip(sine, 0, 1)
    out = jnp.sqrt(1 - sine) * rest + jnp.sqrt(sine) * other
    rest = jnp.sqrt(1 - sine) * other - jnp.sqrt(sine) * rest
    size = jnp.maximum(size + of_other - square, 0)
    return (rest, size, number + with_one), out

  start = (jnp.zeros(columns, squares.dtype), jnp.zeros([], squares.dtype), 0)
  _, rows = jax.lax.scan(body, start, squares)
  return rows
