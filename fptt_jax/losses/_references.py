"""Reference distributions Q, toward which the Div term draws the predictions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fptt_jax._windows import WindowView
from fptt_jax.losses._base import (
  LossState,
)


class Examples(NamedTuple):
  """The sequences of a batch in one window, as a :class:`Reference` sees them.

  Attributes:
    labels: int [B].
    ids: int [B], the sequences' indices in the training set; None if they are not
      given.
    window: The window. `window.active` says which sequences have a step in it.
    num_classes: C.
  """

  labels: jax.Array
  ids: jax.Array | None
  window: WindowView
  num_classes: int


class Predictions(NamedTuple):
  """Probabilities computed from the outputs of a window's last steps.

  Attributes:
    q: float [B, C], the estimates that were looked up.
    p: float [B, C], the predicted probabilities.
    objective: float [], known only after `q` was.
  """

  q: jax.Array
  p: jax.Array
  objective: jax.Array


class Reference(NamedTuple):
  """An earlier estimate Q of the predictions, for the Div term of the terminal loss.

  An estimate is looked up in the state before a window's objective is computed. A note
  of the window's predictions is then written into the state, unless the update is
  skipped. The state is a tree of arrays, equal on all devices.

  Attributes:
    init: (num_windows, num_classes) -> state.
    lookup: (state, examples) -> Q, float [B, C].
    observe: (state, examples, predictions) -> note, a tree of arrays. With a batch
      split over devices, examples and predictions are this device's share, and the note
      must be equal on all devices: see `WindowView.total` and `WindowView.gather`.
    update: (state, note, keep) -> new state, or the old one where `keep`, True or
      bool [], is False.
    end_epoch: (state) -> state of the next epoch.
  """

  init: Callable[[int, int], LossState]
  lookup: Callable[[LossState, Examples], jax.Array]
  observe: Callable[[LossState, Examples, Predictions], Any]
  update: Callable[[LossState, Any, jax.Array | bool], LossState]
  end_epoch: Callable[[LossState], LossState] = lambda state: state


def make_reference(
  name: str, ema_decay: float, num_examples: int | None
) -> Reference | None:
  """Return the reference of a name in `DIVERGENCES`."""
  if name == 'class_ema':
    return _class_ema(ema_decay)
  if name == 'last_epoch':
    return _last_epoch()
  if name == 'uniform':
    return _uniform()
  if num_examples is not None:
    return _per_example(num_examples)
  return None


def _class_ema(decay: float) -> Reference:
  """Return the moving average of the predictions per class and window.

  Its state is {'q': float [K, C, C]}, indexed by window, label and predicted class.
  """

  def init(num_windows: int, num_classes: int) -> LossState:
    return {'q': _uniform_table(num_windows, num_classes, num_classes)}

  def observe(state: LossState, examples: Examples, predictions: Predictions) -> Any:
    rows = state['q'][examples.window.k]
    sums, counts = _sums_by_class(predictions.p, examples, rows.dtype)
    moved = decay * rows + (1 - decay) * sums / jnp.maximum(counts, 1)[:, None]
    seen = counts[:, None] > 0
    # Without this order XLA copies the whole table in each window, since it does not
    # see that the rows are read before they are written.
    return examples.window.k, jnp.where(
      seen & _true_after(predictions.objective), moved, rows
    )

  def update(state: LossState, note: Any, keep: jax.Array | bool) -> LossState:
    k, rows = note
    table = state['q']
    return {'q': table.at[k].set(_where(keep, rows, table[k]))}

  return Reference(init, _lookup_class, observe, update)


def _last_epoch() -> Reference:
  """Return the mean prediction of the last epoch per class and window.

  Its state is {'q': float [K, C, C], 'sum': like 'q', 'count': float [K, C]}, where the
  sum and the count are those of the current epoch.
  """

  def init(num_windows: int, num_classes: int) -> LossState:
    table = _uniform_table(num_windows, num_classes, num_classes)
    count = jnp.zeros((num_windows, num_classes))
    return {'q': table, 'sum': jnp.zeros_like(table), 'count': count}

  def observe(state: LossState, examples: Examples, predictions: Predictions) -> Any:
    dtype = state['q'].dtype
    return examples.window.k, *_sums_by_class(predictions.p, examples, dtype)

  def update(state: LossState, note: Any, keep: jax.Array | bool) -> LossState:
    k, sums, counts = note
    sums = _where(keep, sums, jnp.zeros_like(sums))
    counts = _where(keep, counts, jnp.zeros_like(counts))
    return {
      'q': state['q'],
      'sum': state['sum'].at[k].add(sums),
      'count': state['count'].at[k].add(counts),
    }

  def end_epoch(state: LossState) -> LossState:
    count = state['count'][..., None]
    # A class that did not occur keeps its old estimate.
    q = jnp.where(count > 0, state['sum'] / jnp.maximum(count, 1), state['q'])
    return {
      'q': q,
      'sum': jnp.zeros_like(state['sum']),
      'count': jnp.zeros_like(state['count']),
    }

  return Reference(init, _lookup_class, observe, update, end_epoch)


def _per_example(num_examples: int) -> Reference:
  """Return each example's prediction at the same window in its last visit.

  Its state is {'q': float [N, K, C]}.
  """

  def init(num_windows: int, num_classes: int) -> LossState:
    return {'q': _uniform_table(num_examples, num_windows, num_classes)}

  def lookup(state: LossState, examples: Examples) -> jax.Array:
    return state['q'][examples.ids, examples.window.k]

  def observe(state: LossState, examples: Examples, predictions: Predictions) -> Any:
    del state
    window = examples.window
    # A sequence without a step in the window keeps its old estimate. Its number may be
    # that of another sequence, too: beyond the table, its row is dropped.
    assert examples.ids is not None
    ids = jnp.where(window.active, examples.ids, num_examples)
    # The select of a value that is dropped puts the read of the table before the write.
    q = predictions.q
    seen = jnp.where(window.active[:, None], predictions.p.astype(q.dtype), q)
    return window.k, *window.gather((ids, seen))

  def update(state: LossState, note: Any, keep: jax.Array | bool) -> LossState:
    k, ids, rows = note
    table = state['q']
    rows = _where(keep, rows, table[ids, k])
    return {'q': table.at[ids, k].set(rows, mode='drop')}

  return Reference(init, lookup, observe, update)


def _uniform() -> Reference:
  """Return the uniform distribution. It has no state."""

  def lookup(state: LossState, examples: Examples) -> jax.Array:
    del state
    shape = (*examples.labels.shape, examples.num_classes)
    return jnp.full(shape, 1 / examples.num_classes, float)

  return Reference(
    init=lambda num_windows, num_classes: {},
    lookup=lookup,
    observe=lambda state, examples, predictions: (),
    update=lambda state, note, keep: state,
  )


def _uniform_table(*shape: int) -> jax.Array:
  """Return float [..., C] filled with 1/C."""
  return jnp.full(shape, 1 / shape[-1], float)


def _lookup_class(state: LossState, examples: Examples) -> jax.Array:
  """Return the rows of the examples' classes in a table [K, C, C]."""
  table: jax.Array = state['q']
  return table[examples.window.k, examples.labels]


def _sums_by_class(
  p: jax.Array, examples: Examples, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
  """Return the sums [C, C] of predictions by label and the counts [C] of labels.

  Both are over the active sequences of the global batch.
  """
  window = examples.window
  labels = examples.labels
  members = jax.nn.one_hot(labels, examples.num_classes, dtype=dtype)
  members = members * window.active[:, None].astype(dtype)
  ones = jnp.ones((*labels.shape, 1), dtype)
  # The counts are an extra column, so that one collective sums both.
  columns = jnp.concatenate([p.astype(dtype), ones], -1)
  both = window.total(members.T @ columns)
  return both[:, :-1], both[:, -1]


def _where(keep: jax.Array | bool, new: jax.Array, old: jax.Array) -> jax.Array:
  """Return `new` where `keep`, else `old`; a constant True needs no select."""
  if keep is True:
    return new
  return jnp.where(keep, new, old)


def _true_after(number: jax.Array) -> jax.Array:
  """Return True, computed from a number so that it is not known before that is.

  It orders the read of a large table for the number before a write. An optimization
  barrier does not: on CPU, XLA drops barriers before it assigns buffers.
  """
  return (number <= 0) | (number >= 0) | jnp.isnan(number)
