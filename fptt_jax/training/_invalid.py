"""Batches with labels or lengths out of range, which must not move the weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fptt_jax._batch import Batch, check_shapes, targets_by_row
from fptt_jax._trees import zero_unless
from fptt_jax._windows import (
  is_time_major,
  lengths_in_range,
  make_windows,
  valid_steps,
)
from fptt_jax.losses import Loss
from fptt_jax.parallel._collectives import (
  all_over_devices,
)


def clear_idle_targets(loss: Loss, batch: Batch) -> Batch:
  """Put 0 in place of the targets of sequences without any valid step.

  NaN there would come back as a NaN gradient, although it counts for nothing.

  Args:
    loss: Loss. One with a target per step clears masked steps itself.
    batch: The whole batch. The shape of a part of its rows does not always tell targets
      [T, B, ...] from targets [B, ...].
  """
  if batch.mask is None:
    return batch
  num_steps, batch_size = check_shapes(batch)
  valid = valid_steps(make_windows(num_steps), batch_size, batch.lengths, batch.mask)
  rows = valid.lengths > 0
  by_row = targets_by_row(loss)

  def clear(target: jax.Array) -> jax.Array:
    is_late = is_time_major(target, num_steps, batch_size, by_row)
    if is_late and not by_row:
      return target
    cleared: jax.Array = zero_unless(rows[None] if is_late else rows, target)
    return cleared

  targets = jax.tree.map(lambda leaf: clear(jnp.asarray(leaf)), batch.targets)
  return batch._replace(targets=targets)


def batch_in_range(loss: Loss, batch: Batch, axis: str | None) -> jax.Array | None:
  """Return bool [], whether all targets and lengths are in range.

  Args:
    loss: Loss, whose `valid` looks at the targets.
    batch: One device's rows of the batch, or all.
    axis: Name of the mesh axis to take all devices' answers over; None for these rows.

  Returns:
    None where neither targets nor lengths can be out of range.
  """
  num_steps, batch_size = jax.tree.leaves(batch.inputs)[0].shape[:2]
  mask = jnp.ones((num_steps, batch_size), bool)
  if batch.mask is not None:
    mask = jnp.asarray(batch.mask)
  valid = []
  if batch.lengths is not None:
    lengths = jnp.asarray(batch.lengths, jnp.int32)
    valid.append(lengths_in_range(lengths, num_steps))
    mask &= jnp.arange(num_steps)[:, None] < lengths[None, :]
  if loss.valid is not None:
    valid.append(loss.valid(batch.targets, mask))
  if not valid:
    return None
  return all_over_devices(jnp.stack(valid).all(), axis)


def run_if(
  valid: jax.Array | None, run: Callable[[Any], Any], carried: Any
) -> tuple[Any, Any]:
  """Run the scan if the batch is valid; otherwise return the carry as it is.

  Args:
    valid: bool [], or None to run in any case.
    run: (carried) -> (carried, what was seen).
    carried: What the scan starts from.

  Returns:
    The result of `run`. Of an invalid batch, losses and norms are NaN and totals 0.
  """
  if valid is None:
    return run(carried)
  # Imported here, since jax.extend takes a fifth of this library's time to import.
  from jax.extend.core import jaxpr_as_fun

  # Traced once, for both branches.
  jaxpr, shape = jax.make_jaxpr(run, return_shape=True)(carried)
  structure: Any = jax.tree.structure(shape)

  def train(carried: Any) -> Any:
    leaves = jaxpr_as_fun(jaxpr)(*jax.tree.leaves(carried))
    return structure.unflatten(leaves)

  def leave_out(carried: Any) -> Any:
    _, seen = shape
    nothing = seen._replace(
      value=jnp.full(seen.value.shape, jnp.nan, seen.value.dtype),
      grad_norm=jnp.full(seen.grad_norm.shape, jnp.nan, seen.grad_norm.dtype),
      totals=optax.tree.zeros_like(seen.totals),
      skipped=optax.tree.zeros_like(seen.skipped),
      credit_norm=optax.tree.full_like(seen.credit_norm, jnp.nan),
    )
    return carried, nothing

  return jax.lax.cond(valid, train, leave_out, carried)


def invalid_updates(shape: tuple[int, ...], in_range: jax.Array | None) -> jax.Array:
  """Return bool [U], of the given shape; all True for an invalid batch."""
  if in_range is None:
    return jnp.zeros(shape, bool)
  return jnp.broadcast_to(~in_range, shape)
