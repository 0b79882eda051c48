"""Rows of a batch in parts, so that a window needs less memory.

Only the model runs part by part; the loss sees the outputs of the whole batch. So any
function of the batch in a loss, such as a mean over valid steps or a table of
predictions, is exact, and the parts' gradients add up to the batch's. The cost is a
second forward pass: the backward pass recomputes a part's intermediate values.
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
  """Make a model's function run equal parts of the rows, one after the other.

  Args:
    function: `apply`, `apply_last` or `split.features` of a model: (params, state, x
      [S, B, ...], mask [S, B] or None, key or None, ...) -> (state, outputs [S, B,
      ...]).
    parts: Number of parts, which must divide B.

  Returns:
    A function of the same arguments and results. Each part draws from a different key.
  """

  def run(params: Any, state: Any, x: Any, *rest: Any) -> Any:
    mask, key, *last = rest
    rows = jax.tree.leaves(x)[0].shape[1]
    size = rows // parts

    def one_part(_: None, part: tuple[jax.Array, Any]) -> tuple[None, Any]:
      number, part_state = part
      columns = _part_of((x, mask), number, size, axis=1)
      part_key = None if key is None else jax.random.fold_in(key, number)
      last_steps = _part_of(last, number, size, axis=0)
      return None, function(params, part_state, *columns, part_key, *last_steps)

    # Within a scan, XLA cannot merge the recomputation with the forward pass, so that
    # no guard against it is needed.
    body = jax.checkpoint(one_part, prevent_cse=False)
    states = jax.tree.map(
      lambda leaf: leaf.reshape(parts, size, *leaf.shape[1:]), state
    )
    _, (states, outputs) = jax.lax.scan(body, None, (jnp.arange(parts), states))
    state = jax.tree.map(lambda leaf: leaf.reshape(rows, *leaf.shape[2:]), states)
    return state, jax.tree.map(_join_parts, outputs)

  return run


def _part_of(tree: Any, number: jax.Array, size: int, axis: int) -> Any:
  """Return one part's rows of each array; plain numbers belong to all rows."""

  def cut(leaf: Any) -> Any:
    if jnp.ndim(leaf) == 0:
      return leaf
    return jax.lax.dynamic_slice_in_dim(leaf, number * size, size, axis)

  return jax.tree.map(cut, tree)


def _join_parts(outputs: jax.Array) -> jax.Array:
  """Join [parts, S, B / parts, ...] to [S, B, ...]."""
  outputs = jnp.moveaxis(outputs, 0, 1)
  return outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:])
