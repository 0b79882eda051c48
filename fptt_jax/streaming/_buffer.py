"""The ring of steps that wait for their labels or for the rest of their window."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fptt_jax.streaming._types import PendingSteps


class NewStep(NamedTuple):
  """One step of a stream.

  Attributes:
    inputs: [B, ...].
    valid: bool [B], whether there is an input.
    reset: bool [B], whether a row starts anew before the step.
  """

  inputs: Any
  valid: jax.Array
  reset: jax.Array


class Label(NamedTuple):
  """The labels of one step.

  Attributes:
    targets: [B, ...].
    labeled: bool [B], whether there is one.
  """

  targets: Any
  labeled: jax.Array


class PendingWindow(NamedTuple):
  """The oldest pending steps, as many as a window has.

  Attributes:
    inputs: [S, B, ...].
    outputs: [S, B, ...], or None where nothing was predicted before.
    targets: [S, B, ...].
    labeled: bool [S, B], False past the window's end.
    valid: bool [S, B], False past the window's end.
    reset: bool [B], rows that start anew before the window.
    length: int32 [], number of steps, 1..S. It is below S where a row starts anew
      inside, because a window cannot start a row anew at a later step.
  """

  inputs: Any
  outputs: jax.Array | None
  targets: Any
  labeled: jax.Array
  valid: jax.Array
  reset: jax.Array
  length: jax.Array


def empty(inputs: Any, outputs: Any, targets: Any, size: int) -> PendingSteps:
  """Make a ring without steps.

  Args:
    inputs: Shapes [n, B, ...] and dtypes of inputs, for any n.
    outputs: The same of outputs.
    targets: The same of labels.
    size: R.
  """

  def zeros(leaf: Any) -> jax.Array:
    return jnp.zeros((size, *leaf.shape[1:]), leaf.dtype)

  rows = (size, outputs.shape[1])
  return PendingSteps(
    inputs=jax.tree.map(zeros, inputs),
    outputs=zeros(outputs),
    targets=jax.tree.map(zeros, targets),
    labeled=jnp.zeros(rows, bool),
    valid=jnp.zeros(rows, bool),
    reset=jnp.zeros(rows, bool),
    first=jnp.zeros([], jnp.int32),
    length=jnp.zeros([], jnp.int32),
    answered=jnp.zeros([], jnp.int32),
    owed=jnp.zeros([], jnp.int32),
  )


def append(pending: PendingSteps, step: NewStep, outputs: jax.Array) -> PendingSteps:
  """Add a step, with its predictions [B, ...]."""
  place = _place(pending, pending.length)

  def put(ring: jax.Array, row: jax.Array) -> jax.Array:
    return ring.at[place].set(row)

  return pending._replace(
    inputs=jax.tree.map(put, pending.inputs, step.inputs),
    outputs=put(pending.outputs, outputs),
    labeled=pending.labeled.at[place].set(False),
    valid=put(pending.valid, step.valid),
    reset=put(pending.reset, step.reset),
    length=pending.length + 1,
  )


def expire(pending: PendingSteps, delay: int) -> PendingSteps:
  """Wait no longer for the label of a step that is older than `delay` steps."""
  expired = jnp.maximum(pending.length - pending.answered - (delay + 1), 0)
  # Only one step can have expired since the last one was added.
  owed = jnp.where(expired > 0, optax.safe_increment(pending.owed), pending.owed)
  return pending._replace(answered=pending.answered + expired, owed=owed)


def answer(
  pending: PendingSteps, label: Label
) -> tuple[PendingSteps, jax.Array, jax.Array]:
  """Give labels to the oldest step that waits for them.

  Returns:
    The steps, the number of labels that came late, and that of labels for which no step
    waits.
  """
  late = pending.owed > 0
  waiting = pending.length > pending.answered
  taken = ~late & waiting
  place = _place(pending, pending.answered)

  def put(ring: jax.Array, row: jax.Array) -> jax.Array:
    return ring.at[place].set(jnp.where(taken, row, ring[place]))

  number = label.labeled.sum(dtype=jnp.int32)
  answered = pending._replace(
    targets=jax.tree.map(put, pending.targets, label.targets),
    labeled=put(pending.labeled, label.labeled),
    answered=pending.answered + taken,
    owed=pending.owed - late,
  )
  return answered, number * late, number * (~late & ~waiting)


def next_window(
  pending: PendingSteps, window_size: int, closing: jax.Array
) -> tuple[jax.Array, PendingWindow]:
  """Return whether the oldest window is ready to be trained on, and the window.

  Args:
    pending: The steps.
    window_size: S.
    closing: bool [], whether a row starts anew at the step that comes next.
  """
  steps = jnp.arange(window_size, dtype=jnp.int32)
  places = _place(pending, steps)
  starts = pending.reset[places].any(1) & (steps < pending.length)
  starts |= (steps == pending.length) & closing
  starts &= steps > 0
  length = jnp.min(jnp.where(starts, steps, window_size))
  within = (steps < length)[:, None]
  take = lambda ring: ring[places]
  window = PendingWindow(
    inputs=jax.tree.map(take, pending.inputs),
    outputs=take(pending.outputs),
    targets=jax.tree.map(take, pending.targets),
    labeled=take(pending.labeled) & within,
    valid=take(pending.valid) & within,
    reset=pending.reset[pending.first],
    length=length,
  )
  return pending.answered >= length, window


def drop(pending: PendingSteps, number: jax.Array) -> PendingSteps:
  """Drop the oldest steps."""
  return pending._replace(
    first=_place(pending, number),
    length=pending.length - number,
    answered=pending.answered - number,
  )


def _place(pending: PendingSteps, steps: jax.Array) -> jax.Array:
  """Return the places of steps, counted from the oldest one."""
  return (pending.first + steps) % len(pending.labeled)
