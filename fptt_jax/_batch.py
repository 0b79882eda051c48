"""Batches of sequences and the checks of their shapes and values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import (
  Words,
  check_array,
  check_floats_or_tokens,
  check_shape,
  check_type,
  require,
  require_type,
)
from fptt_jax._trees import shapes
from fptt_jax.losses import Loss
from fptt_jax.losses._base import check_finite


class Batch(NamedTuple):
  """A batch of sequences, time-major.

  A masked step leaves hidden state, loss and gradient alone: within a window, and in
  all of an evaluation, the numbers are those of the sequence without it. A sequence
  ends at its last valid step. A sequence without any valid step contributes nothing.

  Attributes:
    inputs: [T, B, ...], float features or integer tokens; or a tree of such arrays,
      such as tokens and features. The model gets the tree with each array cut to the
      window.
    targets: Targets as the loss takes them: [B] or [B, O] for terminal tasks, [T, B] or
      [T, B, O] for sequence-to-sequence tasks.
    lengths: int [B], valid steps of each sequence, 1..T. None means T for all. Inputs
      past them are ignored. A bool array [T, B] here is taken as the mask.
    mask: bool [T, B], valid steps, for padding in front or for gaps. None means all
      steps before the end of each sequence. With both, a step must be valid by both.
      Inputs and targets at other steps are ignored.
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
    """Make a batch from batch-major arrays, by swapping their first two axes.

    Args:
      inputs: [B, T, ...], or a tree of such arrays.
      targets: [B] or [B, O], which stay as they are, or [B, T, ...]; or a tree of such
        arrays.
      lengths: int [B] or None.
      mask: bool [B, T] or None.
      targets_have_time: Whether targets are [B, T, ...]. Required if an array of them
        has T as its second axis.

    Returns:
      The time-major :class:`Batch`. NumPy arrays are not copied.

    Raises:
      ValueError: Shapes do not fit, or `targets_have_time` is left out although an
        array [B, O] could have O = T.
      TypeError: `inputs` or `targets` are not arrays.

    Example:
      >>> import numpy as np, fptt_jax
      >>> batch = fptt_jax.Batch.from_batch_major(np.ones((8, 20, 1)), np.ones(8))
      >>> batch.inputs.shape
      (20, 8, 1)
    """
    lengths, mask = _lengths_and_mask(lengths, mask)
    batch_size, num_steps = check_inputs(inputs, 'batch-major [B, T, ...]')
    inputs = _swap_axes(inputs)
    if _have_time(targets, (batch_size, num_steps), targets_have_time):
      targets = _swap_axes(targets)
    if mask is not None:
      mask = check_shape('mask', mask, '[B, T]', (batch_size, num_steps))
      mask = _swap_axes(mask)
    return cls(inputs, targets, lengths, mask)


def _swap_axes(tree: Any) -> Any:
  """Exchange the first two axes of each array."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)


def _have_time(targets: Any, rows_and_steps: tuple[int, int], given: Any) -> bool:
  """Return whether batch-major targets have a time axis.

  Args:
    targets: Tree of arrays.
    rows_and_steps: (B, T).
    given: What the caller says: True, False or None.

  Raises:
    ValueError: `given` is None although shapes leave a doubt, or contradicts them.
  """
  leaves = [check_array('targets', leaf) for leaf in jax.tree.leaves(targets)]
  timed = [leaf.shape[:2] == rows_and_steps for leaf in leaves]
  # The second axis may be the T steps or as many outputs.
  accepted = f'True or False for targets of shape {shapes(targets)}'
  require(given is not None or not any(timed), 'targets_have_time', accepted, given)
  require(not given or all(timed), 'targets', '[B, T, ...]', shapes(targets))
  return bool(given)


def validate_batch(batch: Batch, loss: Loss) -> None:
  """Check the values of a batch, which compiled code cannot.

  Call it once per data set, on the host.

  Args:
    batch: Concrete arrays.
    loss: Loss whose targets the batch holds.

  Raises:
    ValueError: Inputs at valid steps are not finite, lengths are outside 1..T, labels
      are outside 0..C-1, or shapes do not fit.
    TypeError: Labels or lengths are not integers, targets are not floating-point, or
      arrays are traced or abstract.

  Example:
    >>> import numpy as np, fptt_jax
    >>> loss = fptt_jax.losses.terminal_classification(3)
    >>> inputs = np.zeros((5, 2, 1), np.float32)
    >>> fptt_jax.validate_batch(fptt_jax.Batch(inputs, np.array([0, 2])), loss)
    >>> fptt_jax.validate_batch(fptt_jax.Batch(inputs, np.array([0, 3])), loss)
    Traceback (most recent call last):
      ...
    ValueError: labels must be in 0..2, got [3].
  """
  batch = with_mask(batch)
  num_steps, batch_size = check_shapes(batch)
  check_type('loss', loss, Loss)
  concrete = all(map(is_addressable, jax.tree.leaves(batch)))
  require(concrete, 'batch', 'of concrete arrays', shapes(batch), error=TypeError)
  # Numbers at invalid steps are never read, so that padding may be anything.
  valid = np.ones((num_steps, batch_size), bool)
  if batch.lengths is not None:
    lengths = np.asarray(batch.lengths)
    low, high = int(lengths.min()), int(lengths.max())
    fits = low >= 1 and high <= num_steps
    require(fits, 'lengths', f'in 1..T={num_steps}', Words(f'{low} to {high}'))
    valid = np.arange(num_steps)[:, None] < lengths
  if batch.mask is not None:
    valid = valid & np.asarray(batch.mask)
  for path, leaf in jax.tree.leaves_with_path(batch.inputs):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      check_finite(f'inputs{jax.tree_util.keystr(path)}', leaf, valid)
  loss.check(batch.targets, valid)


def check_shapes(batch: Batch) -> tuple[int, int]:
  """Check the shapes and dtypes of a batch.

  Returns:
    (T, B).

  Raises:
    ValueError: Shapes do not fit each other.
    TypeError: `batch` is not a `Batch`, or a dtype is not accepted.
  """
  check_type('batch', batch, Batch)
  num_steps, batch_size = check_inputs(batch.inputs)
  if batch.lengths is not None:
    lengths = check_shape('lengths (or a mask)', batch.lengths, '[B]', (batch_size,))
    is_integer = jnp.issubdtype(lengths.dtype, jnp.integer)
    require_type(is_integer, 'lengths', 'integers', lengths)
  if batch.mask is not None:
    check_shape('mask', batch.mask, '[T, B]', (num_steps, batch_size), bool)
  for leaf in jax.tree.leaves(batch.targets):
    dtype = check_array('targets', leaf).dtype
    # The dtype of PRNG keys has no kind.
    is_numeric = getattr(dtype, 'kind', '') not in tuple('OSUMm')
    require_type(is_numeric, 'targets', 'numbers', leaf)
    # The loss checks the rest, since it knows which of the two it takes.
    accepted = f'[B, ...] or [T, B, ...] with B={batch_size}, T={num_steps}'
    require(batch_size in leaf.shape[:2], 'targets', accepted, leaf.shape)
  return num_steps, batch_size


def check_inputs(inputs: Any, order: str = 'time-major [T, B, ...]') -> tuple[int, int]:
  """Check that the arrays of a tree of inputs agree in their first two axes.

  Args:
    inputs: Tree of arrays.
    order: What these axes are, in words.

  Returns:
    The lengths of the two axes, (T, B).

  Raises:
    ValueError: Shapes do not fit each other, or there is no array.
    TypeError: A dtype is neither floating-point nor integer.
  """
  first: tuple[int, ...] | None = None
  for path, leaf in jax.tree.leaves_with_path(inputs):
    name = f'inputs{jax.tree_util.keystr(path)}'
    shape = check_array(name, leaf).shape
    fits = len(shape) >= 2 and 0 not in shape[:2]
    require(fits, name, f'{order} and not empty', shape)
    check_floats_or_tokens(name, leaf)
    first = first or shape[:2]
    require(shape[:2] == first, name, f'{order} = {first}', shape)
  if first is None:
    raise ValueError(f'inputs must be one or more arrays [T, B, ...], got {inputs!r}.')
  return first[0], first[1]


def with_mask(batch: Batch) -> Batch:
  """Return the batch with a mask that was passed as `lengths` moved to `mask`."""
  if not isinstance(batch, Batch):
    return batch  # It is rejected where its shapes are checked.
  lengths, mask = _lengths_and_mask(batch.lengths, batch.mask)
  return batch._replace(lengths=lengths, mask=mask)


def _lengths_and_mask(lengths: Any, mask: Any) -> tuple[Any, Any]:
  """Return lengths and mask, given perhaps a mask as lengths."""
  # Callers pass the mask in the place of lengths, which is the third argument.
  if mask is None and getattr(lengths, 'ndim', 0) == 2 and lengths.dtype == bool:
    return None, lengths
  return lengths, mask


def targets_by_row(loss: Loss) -> bool:
  """Return whether a loss has one target per sequence."""
  return loss.last_only or loss.terminal


def is_addressable(x: Any) -> bool:
  """Return whether the values of an array can be read in this process."""
  if isinstance(x, np.ndarray):
    return True
  is_concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
  return is_concrete and x.is_fully_addressable
