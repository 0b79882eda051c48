"""Checks on a model that only a run can tell: rows apart, no look ahead, and no memory but the hidden state.

A train step cuts sequences into windows and carries nothing but the hidden state from one to the next. A layer that
mixes the rows of a batch, reads later steps or restarts in each window would train without an error, towards
something else. :func:`check_model` therefore runs a model once on a few small windows.
"""

from collections.abc import Callable
import functools
from typing import Any
import weakref

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any

ROWS = 3
"""Sequences of the probe: the size differs from those of features and steps."""
STEPS = 4
"""Steps of the probe: two halves of two steps."""
MOST_PARAMETERS = 50_000_000
"""A model with more parameters is not probed: the probe may take seconds there."""

TOLERANCE = 2000.0
"""Differences above so many roundings are not rounding: 2e-4 of the scale in float32. At most 1/8 for short dtypes."""

_checked: weakref.WeakKeyDictionary[Callable[..., Any], set[Any]] = weakref.WeakKeyDictionary()
"""What each model's `apply` was probed with, so that it is probed once."""
_ALL = 'all'

ADVICE = (
  'Use layers that act on each step of each row alone (nnx.Linear, nnx.LayerNorm, functions of one step), or a cell '
  'that carries its memory in the hidden state, (carry, x) -> (carry, y).'
)


def mark_checked(function: Callable[..., Any]) -> None:
  """Records that a model with this `apply` needs no probe, because all of its layers are known."""
  _checked.setdefault(function, set()).add(_ALL)


def is_checked(function: Callable[..., Any]) -> bool:
  """Returns whether :func:`mark_checked` was called for this `apply`."""
  return _ALL in _checked.get(function, ())


def check_state_rows(name: str, initial_state: Callable[[int], Tree]) -> None:
  """Checks that every leaf of the hidden state has a leading axis of rows.

  Masks, meshes and ragged batches treat the hidden state row by row, so a counter or a key for the whole batch cannot
  be part of it.

  Args:
    name: what the hidden state belongs to, for the error.
    initial_state: (batch_size) -> hidden state.

  Raises:
    TypeError: a leaf has no such axis.
  """
  sizes = (ROWS, ROWS + 1)
  states = [jax.eval_shape(lambda size=size: initial_state(size)) for size in sizes]
  for path, leaf in jax.tree.leaves_with_path(states[0]):
    if leaf.shape[:1] != sizes[:1]:
      _refuse_leaf(name, path, leaf)
  for path, leaf in jax.tree.leaves_with_path(states[1]):
    if leaf.shape[:1] != sizes[1:]:
      _refuse_leaf(name, path, leaf)


def _refuse_leaf(name: str, path: Any, leaf: Any) -> None:
  where = jax.tree_util.keystr(path) or 'the state itself'
  raise TypeError(
    f'{name}: every array of the hidden state must have shape [B, ...], one entry per row, got {leaf.dtype}'
    f'{list(leaf.shape)} at {where}. Give a counter or a scalar one entry per row, such as '
    'jnp.zeros(batch_size, jnp.int32), and update all entries alike.'
  )


def check_model(model: Any, params: Tree, inputs: Tree, name: str = 'model') -> None:
  """Runs a model on small windows in evaluation mode and refuses what windows would change.

  The probe is compiled once per `model.apply` and shape of inputs. It is skipped where values cannot be looked at
  (inside a traced function), for very large models, and where the model cannot run a window of so few steps.

  Args:
    model: a :class:`fptt_jax.Model`.
    params: its parameters, concrete arrays.
    inputs: a tree of arrays or `jax.ShapeDtypeStruct` [T, B, ...], of which shapes and dtypes are used.
    name: what the model is called in errors.

  Raises:
    TypeError: rows depend on each other, a step depends on later ones, or two halves of a window, the state carried
      between them, give something else than the whole.
  """
  shapes = tuple((leaf.shape[2:], jnp.dtype(leaf.dtype)) for leaf in jax.tree.leaves(inputs))
  if not _can_probe(model, params) or shapes in _known(model.apply):
    return
  with jax.ensure_compile_time_eval():
    differences = _measure(model, params, inputs)
  _known(model.apply).add(shapes)
  if differences is not None:
    _judge(differences, name)


def _known(function: Callable[..., Any]) -> set[Any]:
  try:
    return _checked.setdefault(function, set())
  except TypeError:  # A callable that cannot be referred to weakly is probed each time.
    return set()


def _can_probe(model: Any, params: Tree) -> bool:
  leaves = jax.tree.leaves(params)
  concrete = not any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in leaves)
  at_hand = all(not isinstance(leaf, jax.Array) or leaf.is_fully_addressable for leaf in leaves) if concrete else False
  return at_hand and _ALL not in _known(model.apply) and sum(np.size(leaf) for leaf in leaves) <= MOST_PARAMETERS


def _measure(model: Any, params: Tree, inputs: Tree) -> dict[str, Any] | None:
  """Returns the differences that the checks are about, relative to their scale, or None where the model cannot run."""
  x = jax.tree.map(lambda leaf: _draw(leaf, 0), inputs)
  other = jax.tree.map(lambda leaf: _draw(leaf, 1), inputs)
  try:
    # A new function each time: the compiled probe, and the model with it, is not kept.
    probe = functools.partial(_probe, model.initial_state, model.apply)
    differences = jax.jit(probe)(params, x, other)
  except Exception:
    # The window may be too short for the model, or the inputs not what it wants: the step says so in its own words.
    return None
  return {key: float(value) for key, value in differences.items()}


def _draw(leaf: Any, seed: int) -> np.ndarray:
  """Returns inputs [STEPS, ROWS, ...]: normal numbers, or tokens 0 and 1, the two seeds' tokens being different."""
  shape = (STEPS, ROWS, *leaf.shape[2:])
  if jnp.issubdtype(leaf.dtype, jnp.floating):
    return np.random.default_rng(seed).normal(size=shape).astype(leaf.dtype)
  bits = np.random.default_rng(0).integers(0, 2, shape)
  return (bits if seed == 0 else 1 - bits).astype(leaf.dtype)


def _probe(
  initial_state: Callable[[int], Tree],
  apply: Callable[..., Any],
  params: Tree,
  x: Tree,
  other: Tree,
) -> dict[str, jax.Array]:
  """Returns the largest differences, relative to the outputs' scale; NaN where the outputs are not finite."""
  start = initial_state(ROWS)

  def run(state: Tree, x: Tree) -> tuple[Tree, jax.Array]:
    state, outputs = apply(params, state, x, None, None)
    return state, getattr(outputs, 'outputs', outputs)

  def first_row_changed(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([b[:, :1], a[:, 1:]], 1)

  def last_step_changed(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([a[:-1], b[-1:]], 0)

  variants = [x, jax.tree.map(first_row_changed, x, other), jax.tree.map(last_step_changed, x, other)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variants)
  states, outputs = jax.lax.map(lambda variant: run(start, variant), stacked)  # Traced once for all three.
  half = STEPS // 2
  halves = jax.tree.map(lambda leaf: leaf.reshape(2, half, *leaf.shape[1:]), x)
  end, in_halves = jax.lax.scan(run, start, halves)
  in_halves = in_halves.reshape(STEPS, *in_halves.shape[2:])
  y, y_row, y_step = outputs
  state, state_row = (jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(2))
  rows_of = lambda tree: jax.tree.map(lambda leaf: leaf[1:], tree)
  return {
    'rows': _difference((y[:, 1:], rows_of(state)), (y_row[:, 1:], rows_of(state_row))),
    'steps': _difference(y[:-1], y_step[:-1]),
    'halves': _difference((y, state), (in_halves, end)),
  }


def _difference(a: Tree, b: Tree) -> jax.Array:
  """Returns the largest difference of two trees' numbers, each relative to its array's scale and rounding."""
  worst = jnp.zeros([])
  for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
      continue
    rounding = 2.0**-23
    if jnp.issubdtype(left.dtype, jnp.inexact):
      # Of 16 bits, 2,000 roundings would be more than the numbers themselves.
      rounding = min(float(jnp.finfo(left.dtype).eps), 0.125 / TOLERANCE)
    if not jnp.issubdtype(left.dtype, jnp.complexfloating):
      left, right = (side.astype(jnp.float32) for side in (left, right))
    scale = jnp.maximum(jnp.abs(left).max(initial=0.0), 1e-3)
    difference = jnp.abs(left - right).max(initial=0.0) / (scale * rounding)
    worst = jnp.maximum(worst, difference.astype(worst.dtype))
  return worst


def _judge(differences: dict[str, float], name: str) -> None:
  if differences['rows'] > TOLERANCE:
    what = 'mixes the rows of a batch: another first row changes the outputs or the state of other rows'
  elif differences['steps'] > TOLERANCE:
    what = 'looks ahead: another last step changes the outputs of earlier steps'
  elif differences['halves'] > TOLERANCE:
    what = (
      'keeps memory outside the hidden state, or restarts in each window: a window of four steps gives something else '
      'than its two halves with the state carried'
    )
  else:
    return
  raise TypeError(f'{name} {what}. {ADVICE}')
