"""Checks of a model that need a run: independent rows, no look-ahead, no hidden memory.

A train step cuts sequences into windows and carries only the hidden state from one to
the next. A layer that mixes the rows of a batch, reads later steps or restarts in each
window would train without an error but compute something else. :func:`check_model`
therefore runs a model once on a few small windows.
"""

from collections.abc import Callable
import functools
from typing import Any
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import require_type
from fptt_jax._concrete import concrete

Tree = Any

ROWS = 3
"""Rows of the probe; they differ in number from its steps."""
STEPS = 4
"""Steps of the probe: two halves of two steps."""
MAX_PARAMETERS = 50_000_000
"""Larger models are not probed, since that may take seconds."""

TOLERANCE = 2000.0
"""Largest difference, in units of rounding, that counts as rounding.

It is 2e-4 of the scale in float32, and at most 1/8 for 16-bit dtypes.
"""


class HiddenMemoryError(TypeError):
  """A model keeps memory outside the hidden state. Raised while it is traced."""


_checked: weakref.WeakKeyDictionary[Callable[..., Any], set[Any]] = (
  weakref.WeakKeyDictionary()
)
"""Shapes that each model's `apply` was probed with, so that it is probed once."""
_ALL = 'all'

ADVICE = (
  'Use layers that act on each step of each row alone (nnx.Linear, nnx.LayerNorm, '
  'functions of one step), or a cell '
  'that carries its memory in the hidden state, (carry, x) -> (carry, y).'
)


def mark_checked(function: Callable[..., Any]) -> None:
  """Record that a model needs no probe, because all of its layers are known."""
  _checked.setdefault(function, set()).add(_ALL)


def is_checked(function: Callable[..., Any]) -> bool:
  """Return whether :func:`mark_checked` was called for this `apply`."""
  return _ALL in _known(function)


def check_state_rows(
  name: str,
  initial_state: Callable[[int], Tree],
  sizes: tuple[int, ...] = (ROWS, ROWS + 1),
) -> None:
  """Check that every leaf of the hidden state has a leading axis of rows.

  Masks, meshes and ragged batches treat the hidden state row by row, so a counter or a
  key for the whole batch cannot be part of it.

  Args:
    name: Name of the function, for the error.
    initial_state: (batch_size) -> hidden state.
    sizes: Batch sizes to try.

  Raises:
    TypeError: A leaf has no such axis.
  """
  for size in sizes:
    state = jax.eval_shape(functools.partial(initial_state, size))
    for path, leaf in jax.tree.leaves_with_path(state):
      place = f'the hidden state of {name} at {jax.tree_util.keystr(path)!r}'
      hint = 'Give a counter one entry per row, as in jnp.zeros(batch_size, jnp.int32).'
      require_type(leaf.shape[:1] == (size,), place, 'of shape [B, ...]', leaf, hint)


def check_model(model: Any, params: Tree, inputs: Tree, name: str = 'model') -> None:
  """Run a model on small windows, and reject one that windows would change.

  The probe is compiled once per `model.apply` and shape of inputs. It is skipped inside
  traced functions, for very large models, and if the model cannot run so few steps.

  Args:
    model: A :class:`fptt_jax.Model`.
    params: Its parameters, concrete arrays.
    inputs: Tree of arrays or `jax.ShapeDtypeStruct` [T, B, ...]. Only shapes and dtypes
      are used.
    name: Name of the model in errors.

  Raises:
    TypeError: Rows depend on each other, a step depends on later ones, or two halves of
      a window, with the state carried, differ from the whole window.
  """
  shapes = tuple(
    (leaf.shape[2:], jnp.dtype(leaf.dtype)) for leaf in jax.tree.leaves(inputs)
  )
  if not _can_probe(model, params) or shapes in _known(model.apply):
    return
  differences = _measure(model, params, inputs)
  if differences is not None:
    _raise_if_different(differences, name)
  # Not before: a model that is refused once must be refused again.
  _known(model.apply).add(shapes)


def check_new_model(model: Any, inputs: Tree, name: str) -> None:
  """Probe a model when it is made, with parameters drawn for the purpose.

  Args:
    model: A :class:`fptt_jax.Model`.
    inputs: As for :func:`check_model`.
    name: Name of the model in errors.

  Raises:
    TypeError: As for :func:`check_model`.
  """
  key = jax.random.key(0)
  abstract = jax.tree.leaves(jax.eval_shape(model.init, key))
  if sum(leaf.size for leaf in abstract) > MAX_PARAMETERS:
    return  # Drawing so many takes long.
  with jax.ensure_compile_time_eval():
    params = jax.jit(model.init)(key)
  check_model(model, params, inputs, name)


def _known(function: Callable[..., Any]) -> set[Any]:
  try:
    return _checked.setdefault(function, set())
  except TypeError:  # A callable that cannot be referred to weakly is probed each time.
    return set()


def _can_probe(model: Any, params: Tree) -> bool:
  leaves = jax.tree.leaves(params)
  concrete = not any(
    isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in leaves
  )
  if not concrete or _ALL in _known(model.apply):
    return False
  for leaf in leaves:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return False
  return sum(np.size(leaf) for leaf in leaves) <= MAX_PARAMETERS


def _measure(model: Any, params: Tree, inputs: Tree) -> dict[str, Any] | None:
  """Return the differences between runs; None if the model cannot run."""
  x = jax.tree.map(lambda leaf: _draw(leaf, 0), inputs)
  other = jax.tree.map(lambda leaf: _draw(leaf, 1), inputs)
  try:
    # A new function each time: the compiled probe, and the model with it, is not kept.
    probe = functools.partial(_probe, model.initial_state, model.apply)
    differences = concrete(probe)(params, x, other)
  except HiddenMemoryError:
    raise
  except Exception:
    # The window may be too short, or the inputs may not fit. The step raises a clearer
    # error then.
    return None
  return {key: float(value) for key, value in differences.items()}


def _draw(leaf: Any, seed: int) -> np.ndarray:
  """Return inputs [STEPS, ROWS, ...]: normal numbers, or tokens 0 and 1.

  The tokens of seeds 0 and 1 differ everywhere.
  """
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
  """Return the largest differences, in roundings of the scale; NaN if not finite."""
  start = initial_state(ROWS)

  def run(state: Tree, x: Tree) -> tuple[Tree, jax.Array]:
    state, outputs = apply(params, state, x, None, None)
    return state, getattr(outputs, 'outputs', outputs)

  def first_row_changed(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([b[:, :1], a[:, 1:]], 1)

  def last_row_changed(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([a[:, :-1], b[:, -1:]], 1)

  def last_step_changed(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([a[:-1], b[-1:]], 0)

  changes = (first_row_changed, last_row_changed, last_step_changed)
  variants = [x, *(jax.tree.map(change, x, other) for change in changes)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variants)
  states, (y, y_first, y_last, y_step) = jax.lax.map(
    lambda variant: run(start, variant), stacked
  )
  state, state_first, state_last = (
    jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(3)
  )
  halves = jax.tree.map(lambda leaf: leaf.reshape(2, STEPS // 2, *leaf.shape[1:]), x)
  end, in_halves = jax.lax.scan(run, start, halves)
  in_halves = in_halves.reshape(STEPS, *in_halves.shape[2:])

  def rows(y: jax.Array, state: Tree, chosen: slice) -> Tree:
    return y[:, chosen], jax.tree.map(lambda leaf: leaf[chosen], state)

  others, before = slice(1, None), slice(None, -1)
  return {
    'rows': jnp.maximum(
      _difference(rows(y, state, others), rows(y_first, state_first, others)),
      _difference(rows(y, state, before), rows(y_last, state_last, before)),
    ),
    'steps': _difference(y[:-1], y_step[:-1]),
    'halves': _difference((y, state), (in_halves, end)),
  }


def _difference(a: Tree, b: Tree) -> jax.Array:
  """Return the largest difference of two trees, in roundings of each array's scale."""
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


def _raise_if_different(differences: dict[str, float], name: str) -> None:
  if differences['rows'] > TOLERANCE:
    what = (
      'mixes the rows of a batch: another row changes the outputs or the state of '
      'the others'
    )
  elif differences['steps'] > TOLERANCE:
    what = 'looks ahead: another last step changes the outputs of earlier steps'
  elif differences['halves'] > TOLERANCE:
    what = (
      'keeps memory outside the hidden state, or restarts in each window: a window of '
      'four steps gives a different result from its two halves run in turn with the '
      'state carried over'
    )
  else:
    return
  raise TypeError(f'{name} {what}. {ADVICE}')
