"""Sparse approximations of the influence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import Words, check_size, require
from fptt_jax._concrete import concrete
from fptt_jax._types import Hidden, OwnStep, Params
from fptt_jax.influence._arrays import Weights, join, unit_cotangents
from fptt_jax.influence._base import Influence, WindowMap
from fptt_jax.influence._exact import (
  MAX_BYTES,
  advance_matrix,
  credit_matrix,
  empty_matrix,
)
from fptt_jax.influence._own import (
  advance_own,
  credit_own,
  empty_own,
  given_steps,
)
from fptt_jax.influence._pull import pull_back, run_steps
from fptt_jax.influence._reach import (
  DRAWS,
  MAX_DRAWS,
  once_per_model,
  points_of,
  reached_paths,
)
from fptt_jax.influence._units import Units, find_units

Pattern = dict[str, np.ndarray]
"""{path: bool [N, ...]}, which numbers of the state a parameter may reach."""


def snap1(own_only: bool = False) -> Influence:
  """Make the influence of each parameter on its own unit (SnAp-1).

  In one step almost every parameter acts on a single unit of its layer. Only
  the effect on that unit's arrays of state is carried, and what it passes on to other
  units between steps is left out: B·m·P numbers for layers of m arrays of state. Inside
  a window the gradient is whole, across layers, too.

  What is exact, and what is not:

  * One layer whose units are apart (:class:`LRU`, :class:`IndRNN`): exact, as
    `rtrl`.
  * One layer of any other kind: biased.
  * Several layers: also leaves out the effect of a lower layer on the state that an
    upper layer carries.
  * Parameters that reach several units in one step have no influence, and the
    gradient of the window alone: embeddings and linear layers before the first
    recurrent layer, the scalars of a :class:`FastGRNN`, the reset gate of a GRU that
    resets before its matrix.

  `StepMetrics.credit_norm` tells how much credit arrives. A window takes two to four
  times as long where layers define `own_step`, as LSTM, GRU, ElmanRNN, LRU and
  IndRNN do; other layers need H forward steps for each step. On CPUs a native kernel
  advances the influence of LSTM, GRU and ElmanRNN in float32, where their windows run
  in one, too.

  Args:
    own_only: Whether a unit's effect on itself through the diagonals of recurrent
      matrices is left out as well. What remains is the leak of a memory, as in RFLO and
      e-prop, or the trace of OSTL. Needs layers that define `own_step`.

  Returns:
    The influence.

  Raises:
    ValueError: In `init`: no parameter belongs to one unit, or `own_only` is set and a
      layer neither defines `own_step` nor keeps its units apart.

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
    ...   influence='snap1',
    ... )
    >>> batch = fptt_jax.Batch(jax.numpy.ones((20, 8, 1)), jax.numpy.ones(8))
    >>> state = trainer.init(jax.random.key(0), batch)
    >>> state.influence['layers/0/w_h'].shape  # B, the parameter's own, and m inside.
    (8, 16, 2, 64)

  References:
    Menick, Elsen, Evci, Osindero, Simonyan and Graves, "Practical Real Time Recurrent
    Learning with a Sparse Approximation", ICLR 2021. Murray, "Local online learning in
    recurrent networks with random feedback", eLife 2019 (RFLO).
  """

  def init(window: WindowMap, params: Params, hidden: Hidden) -> Weights:
    units = find_units(window, params, hidden)
    _check_units(units, window, params, hidden, own_only)
    batch_size = jax.tree.leaves(hidden)[0].shape[0]
    return empty_own(units, params, batch_size)

  def credit(
    window: WindowMap,
    params: Params,
    hidden: Hidden,
    state: Weights,
    d_hidden: Hidden,
  ) -> Params:
    units = find_units(window, params, hidden)
    return credit_own(units, window, params, state, d_hidden)

  def advance(
    window: WindowMap,
    params: Params,
    hidden: Hidden,
    state: Weights,
    key: jax.Array | None,
  ) -> Weights:
    units = find_units(window, params, hidden)
    return advance_own(units, window, params, hidden, state, own_only)

  return Influence(init, credit, advance)


def _check_units(
  units: Units, window: WindowMap, params: Params, hidden: Hidden, own_only: bool
) -> None:
  """Raise a ValueError for a model without units, or without given transitions."""
  name = "model with influence 'snap1'"
  accepted = 'one in which some parameters reach a single unit of the state per step'
  got = Words('a model without such parameters')
  require(units.layers, name, accepted, got, "Use 'rtrl' or 'none'.")
  if not own_only:
    return

  def given(params: Params, hidden: Hidden) -> dict[int, OwnStep]:
    before = run_steps(window, params, hidden)
    return given_steps(window, params, before, own_only)

  known = jax.eval_shape(given, params, hidden)
  missing = [
    layer.arrays
    for layer in units.layers
    if not layer.apart and layer.arrays[0] not in known
  ]
  accepted = 'of LSTM, GRU, ElmanRNN or layers with own_step or units apart'
  require(not missing, 'state arrays with own_only=True', accepted, missing[:1])


def snap(n: int) -> Influence:
  """Make the influence of each parameter on the units it reaches in n steps (SnAp-n).

  This masks the whole matrix of :func:`rtrl` after each step, so that it saves no
  memory and takes more time. With a dense recurrent matrix n = 2 is exact already; the
  method pays for sparse ones, which the library has not. It is there to study and to
  test what larger patterns gain. Which numbers of the state a parameter reaches is
  found by differentiating one step at several random points.

  Args:
    n: Steps, at least 1.

  Returns:
    The influence, with the limit of bytes of `rtrl`.

  Raises:
    ValueError: `n` is not an integer >= 1. In `init`: the state would be too large.

  Example:
    >>> from fptt_jax import influence
    >>> snap2 = influence.snap(2)

  References:
    Menick et al., ICLR 2021, see :func:`snap1`.
  """
  n = check_size('n', n)

  # The pattern is found when the state is made.
  @once_per_model
  def pattern_of(window: WindowMap, params: Params, hidden: Hidden) -> Pattern:
    return _find_pattern(window, params, hidden, n)

  def init(window: WindowMap, params: Params, hidden: Hidden) -> Weights:
    name = f'influence snap({n})'
    matrix = empty_matrix(window, params, hidden, MAX_BYTES, name, "Use 'snap1'.")
    pattern_of(window, params, hidden)
    return matrix

  def credit(
    window: WindowMap,
    params: Params,
    hidden: Hidden,
    state: Weights,
    d_hidden: Hidden,
  ) -> Params:
    return credit_matrix(params, state, d_hidden)

  def advance(
    window: WindowMap,
    params: Params,
    hidden: Hidden,
    state: Weights,
    key: jax.Array | None,
  ) -> Weights:
    pattern = pattern_of(window, params, hidden)
    return _advance_masked(window, params, hidden, state, pattern)

  return Influence(init, credit, advance)


def _advance_masked(
  window: WindowMap, params: Params, hidden: Hidden, state: Weights, pattern: Pattern
) -> Weights:
  """Advance the whole matrix step by step, with 0 outside the pattern."""
  start = window.begin(params, hidden)

  def body(carry: tuple[Hidden, Weights], step: Any) -> tuple[Any, None]:
    hidden, matrix = carry
    number, x, mask = step
    one = jax.tree.map(lambda leaf: leaf[None], (x, mask))
    fresh = None if window.fresh is None else window.fresh & (number == 0)
    part = window._replace(x=one[0], mask=one[1], fresh=fresh)
    matrix = advance_matrix(part, params, hidden, matrix)
    matrix = {
      path: jnp.where(pattern[path][None], leaf, 0) for path, leaf in matrix.items()
    }
    return (window.run(params, hidden, *one), matrix), None

  numbers = jnp.arange(jax.tree.leaves(window.x)[0].shape[0])
  steps = (numbers, window.x, window.mask)
  (_, matrix), _ = jax.lax.scan(body, (start, state), steps)
  return matrix


def _find_pattern(window: WindowMap, params: Params, hidden: Hidden, n: int) -> Pattern:
  """Return which numbers of the state each parameter reaches in n steps.

  Returns:
    {path: bool [N, ...]}.
  """
  paths = reached_paths(window, params, hidden)
  size = join(hidden).shape[1]
  rows = len(join(hidden))
  x = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), window.x
  )

  @concrete
  def derivatives(params: Params, hidden: Hidden, x: Any, fresh: jax.Array) -> Any:
    one = window._replace(x=x, mask=None, fresh=fresh)
    return pull_back(one, params, paths, hidden, unit_cotangents(hidden))

  points = points_of(window, params, hidden, x)
  reached: Pattern = {}
  moved = np.zeros((size, size), bool)
  # Rows differ in their state and inputs, so that each is a point of its own.
  for seed in range(max(DRAWS, -(-MAX_DRAWS // rows))):
    point = points.draw(seed)
    for fresh in (False,) if window.start is None else (False, True):
      direct, jacobian = derivatives(*point, np.full(rows, fresh))
      moved |= np.any(_is_effect(jacobian), axis=1)
      for path, leaf in direct.items():
        found = np.any(_is_effect(leaf), axis=0)
        reached[path] = reached.get(path, np.zeros_like(found)) | found
  reached = {path: _fill(found) for path, found in reached.items()}
  for _ in range(n - 1):
    reached = {
      path: found | (np.tensordot(moved.astype(int), found.astype(int), 1) > 0)
      for path, found in reached.items()
    }
  return reached


def _is_effect(derivative: jax.Array) -> np.ndarray:
  """Return where a derivative is finite and not 0.

  It is not finite at inputs that the model does not take, such as a token beyond its
  table, and then does not tell what a parameter reaches.
  """
  array = np.asarray(derivative)
  return np.isfinite(array) & (array != 0)


def _fill(reached: np.ndarray) -> np.ndarray:
  """Give entries that no point has reached the pattern of the entries beside them.

  This is done along each axis of the parameter along which the known patterns do not
  change. Such an axis is that of the tokens of a table, of which only a few are drawn.

  Args:
    reached: bool [N, ...], which numbers of the state each entry reaches.
  """
  for axis in range(1, reached.ndim):
    is_known = reached.any(0, keepdims=True)
    line = reached.any(axis, keepdims=True)
    if (~is_known | (reached == line)).all():
      reached = np.broadcast_to(line, reached.shape)
  return reached
