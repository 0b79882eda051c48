"""Batches of sequences and the checks of their shapes and values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import check_array, check_flag
from fptt_jax._trees import shapes
from fptt_jax.losses import Loss


class Batch(NamedTuple):
  """A batch of sequences, time-major.

  Attributes:
    inputs: [T, B, ...], float features or int tokens; or a tree of such arrays (tokens
      and features together, say), which the model is given as a tree, each array cut to
      the window.
    targets: whatever the loss takes: [B] or [B, O] for terminal tasks, [T, B] or [T, B,
      O] for sequence-to-sequence ones.
    lengths: int [B], valid steps of each sequence, 1..T; None where all have T. What
      inputs hold past them is ignored. An array bool [T, B] in this place is taken as
      the mask.
    mask: bool [T, B], which steps are valid: for padding in front, or holes. None where
      all before the sequence's end are; with both, a step is valid that is valid by
      both. What inputs and targets hold at other steps is ignored.

  A masked step leaves hidden state, loss and gradient alone: within a window, and in
  evaluation throughout, the numbers are those of the sequence without it. A sequence
  ends at its last valid step. One without any valid step contributes nothing.
  """

  inputs: Any
  targets: Any
  lengths: jax.typing.ArrayLike | None = None
  mask: jax.typing.ArrayLike | None = None

  @classmethod
  def from_batch_major(
    cls,
    inputs: Any,
    targets: Any,
    lengths: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    *,
    targets_have_time: bool | None = None,
  ) -> 'Batch':
    """Makes a batch of arrays whose first axis is the batch's, by exchanging the first
    two axes.

    Args:
      inputs: [B, T, ...], or a tree of such arrays.
      targets: [B] or [B, O], which are left as they are, or [B, T, ...]; or a tree of
        such arrays.
      lengths: int [B] or None.
      mask: bool [B, T] or None.
      targets_have_time: whether targets are [B, T, ...]. It may be left out only where
        shapes leave no doubt: where no array of them has T as its second axis.

    Returns:
      The time-major :class:`Batch`. NumPy arrays are not copied.

    Raises:
      ValueError: shapes that do not fit, or `targets_have_time` left out where an array
        [B, O] could have O = T.
      TypeError: inputs or targets are no arrays.

    Example:
      >>> import numpy as np, fptt_jax
      >>> batch = fptt_jax.Batch.from_batch_major(np.ones((8, 20, 1)), np.ones(8))
      >>> batch.inputs.shape
      (20, 8, 1)
    """
    lengths, mask = _lengths_and_mask(lengths, mask)
    swap = lambda x: x.swapaxes(0, 1)
    leaf: Any
    for path, leaf in jax.tree.leaves_with_path(inputs):
      name = f'inputs{jax.tree_util.keystr(path)}'
      if check_array(name, leaf).ndim < 2:
        raise ValueError(
          f'{name} must be batch-major [B, T, ...], got shape {leaf.shape}.'
        )
    swapped = jax.tree.map(swap, inputs)
    num_steps, batch_size = check_inputs(swapped)
    leaves = [check_array('targets', leaf) for leaf in jax.tree.leaves(targets)]
    timed = [leaf.shape[:2] == (batch_size, num_steps) for leaf in leaves]
    if targets_have_time is None:
      if any(timed):
        raise ValueError(
          'targets_have_time must be True or False for targets of shape '
          f'{shapes(targets)}, whose second axis may be the T='
          f'{num_steps} steps or as many outputs: got None.'
        )
    elif check_flag('targets_have_time', targets_have_time):
      if not all(timed):
        raise ValueError(
          'targets with targets_have_time=True must be [B, T, ...], got shape '
          f'{shapes(targets)}.'
        )
      targets = jax.tree.map(swap, targets)
    if mask is not None:
      rows: Any = check_array('mask', mask)
      if rows.shape != (batch_size, num_steps):
        raise ValueError(
          f'mask must have shape [B, T] = {(batch_size, num_steps)}, got {rows.shape}.'
        )
      mask = swap(rows)
    return cls(swapped, targets, lengths, mask)


def validate_batch(batch: Batch, loss: Loss) -> None:
  """Looks at a batch's values, which compiled code cannot: call it on a data set once,
  on the host.

  Args:
    batch: concrete arrays.
    loss: the loss whose targets the batch holds.

  Raises:
    ValueError: NaN or infinite inputs at valid steps, lengths outside 1..T, labels
      outside 0..C-1, wrong shapes.
    TypeError: labels or lengths that are not integers, targets that are not floating
      point, arrays that are traced or abstract.
  """
  batch = with_mask(batch)
  num_steps, batch_size = check_shapes(batch)
  check_type('loss', loss, Loss)
  if any(
    isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct)
    for leaf in jax.tree.leaves(batch)
  ):
    raise TypeError(
      f'validate_batch looks at values and needs concrete arrays, got {batch!r}.'
    )
  valid = np.ones((num_steps, batch_size), bool)
  if batch.lengths is not None:
    lengths = np.asarray(batch.lengths)
    if lengths.min() < 1 or lengths.max() > num_steps:
      raise ValueError(
        f'lengths must lie in 1..T={num_steps}, got values from {lengths.min()} to '
        f'{lengths.max()}.'
      )
    valid = np.arange(num_steps)[:, None] < lengths
  if batch.mask is not None:
    valid = valid & np.asarray(batch.mask)
  for path, leaf in jax.tree.leaves_with_path(batch.inputs):
    inputs = np.asarray(leaf)
    if (
      jnp.issubdtype(inputs.dtype, jnp.floating)
      and not np.isfinite(inputs[valid]).all()
    ):
      bad = np.argwhere(
        ~np.isfinite(inputs.reshape(num_steps, batch_size, -1)).all(-1) & valid
      )
      name, place = f'inputs{jax.tree_util.keystr(path)}', tuple(bad[0].tolist())
      raise ValueError(
        f'{name} must be finite, got NaN or infinity in {len(bad)} places, the first '
        f'at (step, row) {place}.'
      )
  loss.check(batch.targets, valid)


def check_shapes(batch: Batch) -> tuple[int, int]:
  """(T, B) of a batch, after checking what shapes and dtypes alone can tell."""
  if not isinstance(batch, Batch):
    raise TypeError(
      'batch must be a fptt_jax.Batch(inputs, targets, lengths=None), got '
      f'{type(batch).__name__}.'
    )
  num_steps, batch_size = check_inputs(batch.inputs)
  if batch.lengths is not None:
    lengths = check_array('lengths', batch.lengths)
    if lengths.shape != (batch_size,):
      raise ValueError(
        f'lengths must have shape [B] = ({batch_size},), or be a mask bool [T, B]; got '
        f'{lengths.dtype}{list(lengths.shape)}.'
      )
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
      raise TypeError(f'lengths must be integers, got {lengths.dtype}.')
  if batch.mask is not None:
    mask = check_array('mask', batch.mask)
    if mask.shape != (num_steps, batch_size) or mask.dtype != bool:
      raise ValueError(
        f'mask must be bool [T, B] = bool{[num_steps, batch_size]}, got '
        f'{mask.dtype}{list(mask.shape)}.'
      )
  for leaf in jax.tree.leaves(batch.targets):
    if getattr(check_array('targets', leaf).dtype, 'kind', '') in tuple(
      'OSUMm'
    ):  # A dtype of keys has none.
      raise TypeError(f'targets must be numbers, got dtype {leaf.dtype}.')
    if batch_size not in leaf.shape[:2]:
      raise ValueError(
        f'targets must be [B, ...] or [T, B, ...] with B={batch_size}, T={num_steps}; '
        f'got shape {leaf.shape}.'
      )
  return num_steps, batch_size


def check_inputs(inputs: Any) -> tuple[int, int]:
  """(T, B) of a tree of inputs [T, B, ...], after checking that all its arrays agree in
  them.
  """
  first: tuple[int, ...] | None = None
  for path, leaf in jax.tree.leaves_with_path(inputs):
    name = f'inputs{jax.tree_util.keystr(path)}'
    shape = check_array(name, leaf).shape
    if len(shape) < 2:
      raise ValueError(f'{name} must be time-major [T, B, ...], got shape {shape}.')
    if shape[0] < 1 or shape[1] < 1:
      raise ValueError(
        f'{name} need at least one step and one sequence, got an empty batch [T, B, '
        f'...] = {shape}.'
      )
    if not (
      jnp.issubdtype(leaf.dtype, jnp.floating)
      or jnp.issubdtype(leaf.dtype, jnp.integer)
    ):
      raise TypeError(
        f'{name} must be floating point (features) or integers (tokens), got '
        f'{leaf.dtype}.'
      )
    first = first or shape[:2]
    if shape[:2] != first:
      raise ValueError(
        f'{name} must have the same [T, B] = {first} as the other inputs, got shape '
        f'{shape}.'
      )
  if first is None:
    raise ValueError(
      f'inputs must be an array [T, B, ...] or a tree of them, got {inputs!r}.'
    )
  return first[0], first[1]


def _lengths_and_mask(lengths: Any, mask: Any) -> tuple[Any, Any]:
  """Both in their places, if a mask was given in the place of the lengths."""
  if mask is None and getattr(lengths, 'ndim', 0) == 2 and lengths.dtype == bool:
    return None, lengths
  return lengths, mask


def with_mask(batch: Batch) -> Batch:
  """The batch with a mask that was given in the place of the lengths where it
  belongs.
  """
  if not isinstance(batch, Batch):
    return batch
  lengths, mask = _lengths_and_mask(batch.lengths, batch.mask)
  return batch._replace(lengths=lengths, mask=mask)


def targets_by_row(loss: Loss) -> bool:
  """Returns whether a loss is certain that its targets are [B, ...]."""
  return loss.last_only or loss.terminal


def is_addressable(x: Any) -> bool:
  """Whether it is an array whose values can be looked at here: neither traced nor in
  part another process's.
  """
  return isinstance(x, np.ndarray) or (
    isinstance(x, jax.Array)
    and not isinstance(x, jax.core.Tracer)
    and x.is_fully_addressable
  )


def check_type(name: str, value: Any, expected: type) -> None:
  if not isinstance(value, expected):
    raise TypeError(
      f'{name} must be a fptt_jax.{expected.__name__}, got {type(value).__name__}.'
    )
