"""A batch's rows a few at a time within each window, so that a window needs less
memory.

The model alone is run part by part; the loss sees the outputs of the whole batch. So
whatever a loss does with a batch (means over valid steps, tables of predictions) is
right without any weights, and the gradients of the parts add up to that
of the whole batch. The price is a second forward pass: a part's intermediate values are
  computed again when its gradient is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fptt_jax._types import Model


def split_model(model: Model, parts: int) -> Model:
  """Return a model that runs the rows of a window in equal parts.

  Args:
    model: The model.
    parts: Number of parts; 1 returns the model as it is.
  """
  if parts == 1:
    return model
  apply_last = model.apply_last
  if apply_last is not None:
    apply_last = in_micro_batches(apply_last, parts)
  split = model.split
  if split is not None:
    split = split._replace(features=in_micro_batches(split.features, parts))
  apply = in_micro_batches(model.apply, parts)
  return model._replace(apply=apply, apply_last=apply_last, split=split)


def in_micro_batches(function: Callable[..., Any], parts: int) -> Callable[..., Any]:
  """Makes a model's `apply`, `apply_last` or `split.features` run over equal parts of
  the rows, one after the other.

  Args:
    function: (params, state, x [S, B, ...], mask [S, B] or None, key or None, ...) ->
      (state, outputs [S, B, ...]).
    parts: how many parts; B must be a multiple.

  Returns:
    A function of the same arguments and results. Each part draws from a key of its own.
  """

  def run(
    params: Any,
    state: Any,
    x: Any,
    mask: jax.Array | None,
    key: jax.Array | None,
    *last: Any,
  ) -> Any:
    rows = jax.tree.leaves(x)[0].shape[1]
    size = rows // parts

    def one_part(_: None, part: tuple[jax.Array, Any]) -> tuple[None, Any]:
      number, part_state = part
      columns, positions = (
        jax.tree.map(lambda leaf: _rows_of(leaf, number, size, axis), tree)
        for tree, axis in (((x, mask), 1), (last, 0))
      )
      part_key = None if key is None else jax.random.fold_in(key, number)
      return None, function(params, part_state, *columns, part_key, *positions)

    states = jax.tree.map(
      lambda leaf: leaf.reshape(parts, size, *leaf.shape[1:]), state
    )
    # Within a scan nothing could be merged with what is computed again, so that needs
    # no guard.
    one_part = jax.checkpoint(one_part, prevent_cse=False)
    _, (states, outputs) = jax.lax.scan(one_part, None, (jnp.arange(parts), states))
    state = jax.tree.map(lambda leaf: leaf.reshape(rows, *leaf.shape[2:]), states)
    return state, jax.tree.map(_joined, outputs)

  return run


def _rows_of(leaf: Any, number: jax.Array, size: int, axis: int) -> Any:
  """The rows of one part; a plain number is that of all rows."""
  if jnp.ndim(leaf) == 0:
    return leaf
  return jax.lax.dynamic_slice_in_dim(leaf, number * size, size, axis)


def _joined(outputs: jax.Array) -> jax.Array:
  """[parts, S, B / parts, ...] -> [S, B, ...]."""
  outputs = jnp.moveaxis(outputs, 0, 1)
  return outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:])
