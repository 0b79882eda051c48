"""Division of T time steps into K windows whose lengths differ by at most one step.

Every window is laid out on S = ceil(T/K) steps. A window that is one step shorter reads
one step of the next window, masked out. The last window always has S steps, so that no
slice passes the end and no array is padded or copied.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import check_integer, check_size, require
from fptt_jax._trees import zero_unless


class WindowPlan(NamedTuple):
  """Positions of a sequence's windows: integers and NumPy arrays, fixed when traced.

  Attributes:
    size: S, number of steps of the longest window.
    starts: int32 [K], first step of each window.
    ends: int32 [K], one past the last step of each window.
  """

  size: int
  starts: np.ndarray
  ends: np.ndarray

  @property
  def num_windows(self) -> int:
    """K, the number of windows."""
    return len(self.starts)

  @property
  def even(self) -> bool:
    """True if all windows have S steps, so that no mask is needed."""
    return bool((self.ends - self.starts == self.size).all())

  def shifted(self, steps: int) -> 'WindowPlan':
    """Return the same windows, `steps` later."""
    offset = np.int32(steps)
    return self._replace(starts=self.starts + offset, ends=self.ends + offset)


def make_windows(
  num_steps: int, *, num_windows: int | None = None, window_size: int | None = None
) -> WindowPlan:
  """Divide `num_steps` steps into windows.

  By default K = round(√T), the paper's rule of thumb (Sec. 4.2).

  Args:
    num_steps: T >= 1, length of the sequence.
    num_windows: K, 1 <= K <= T. K = 1 is back-propagation through time, apart from the
      regularizer. K = T is one update per step.
    window_size: S, 1 <= S <= T, length of the longest window. Then K = ceil(T/S). Give
      `num_windows` or `window_size`, not both.

  Returns:
    The :class:`WindowPlan`. Window lengths are floor(T/K) or ceil(T/K), evenly spread.

  Raises:
    ValueError: If a number is out of range, or if both numbers are given.

  Example:
    >>> import fptt_jax
    >>> fptt_jax.make_windows(10, num_windows=3).ends
    array([ 3,  6, 10], dtype=int32)
  """
  num_steps = check_size('the number of time steps', num_steps)
  fits = num_windows is None or window_size is None
  require(fits, 'num_windows', f'None with window_size={window_size}', num_windows)
  expected = f'an integer between 1 and the sequence length T={num_steps}'
  if window_size is not None:
    window_size = check_integer('window_size', window_size, 1, num_steps, expected)
    num_windows = -(-num_steps // window_size)
  elif num_windows is None:
    num_windows = round(num_steps**0.5)
  num_windows = check_integer('num_windows', num_windows, 1, num_steps, expected)
  # Window k starts at floor(k T / K). The last one then has ceil(T/K) steps. In int32,
  # k T would overflow for long sequences.
  borders = np.arange(num_windows + 1, dtype=np.int64) * num_steps // num_windows
  starts = borders[:-1].astype(np.int32)
  ends = borders[1:].astype(np.int32)
  return WindowPlan(int((ends - starts).max()), starts, ends)


class WindowView(NamedTuple):
  """One window of a batch, as a loss sees it. Array fields may be traced.

  A step is valid if it lies before its sequence's end and the batch's mask, if any, is
  True there. A batch is ragged if it has lengths or a mask.

  Attributes:
    k: int32 [], the window's index, from 0.
    num_windows: K.
    num_steps: T.
    size: S.
    ragged: Whether the batch is ragged.
    masked: Whether any step of any window may be masked. False if all windows have S
      steps and the batch is not ragged.
    start: int32 [], the window's first step, from 0.
    end: int32 [], one past the window's last step.
    lengths: int32 [B], number of valid steps of each whole sequence; T if not ragged.
    seen: int32 [B], number of valid steps of each sequence up to the window's end.
    active: bool [B], whether each sequence has a valid step in the window.
    last: int32 [B], each sequence's last valid step in the window, counted from its
      start; 0 if it has none. The number S - 1 if nothing is masked.
    mask: bool [S, B], which steps of the window are valid.
    axis: Name of the mesh axis over which the batch is split, so that B is this
      device's share; None if the batch is not split.
  """

  k: jax.Array
  num_windows: int
  num_steps: int
  size: int
  ragged: bool
  masked: bool
  start: jax.Array
  end: jax.Array
  lengths: jax.Array
  seen: jax.Array
  active: jax.Array
  last: jax.Array | int
  mask: jax.Array
  axis: str | None = None

  def mean(self, values: jax.Array, where: jax.Array) -> jax.Array:
    """Return the masked mean, or 0 if the mask is empty.

    Its mean over the mesh axis equals the mean over the global batch, because each
    device divides by the devices' mean count, not by its own.

    Args:
      values: float [B] or [S, B].
      where: bool of the same shape. Devices' counts may differ in ragged batches only.

    Returns:
      [], in the dtype of the values but at least float32.

    Raises:
      ValueError: If the shapes differ.
    """
    # A mask of another shape would be broadcast.
    fits = jnp.shape(where) == jnp.shape(values)
    accepted = f'of the shape of values, {jnp.shape(values)}'
    require(fits, 'where', accepted, jnp.shape(where))
    # float16 holds neither the sum of many values nor a count above 65,504.
    wide = jnp.promote_types(values.dtype, jnp.float32)
    return jnp.sum(values, where=where, dtype=wide) / self.divisor(where, wide)

  def divisor(self, where: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the divisor of `mean`: the number of True values, or 1 if there is
    none.
    """
    count = jnp.sum(where).astype(dtype)
    # Without raggedness all devices count the same, and the collective is saved.
    if self.axis is not None and self.ragged:
      count = jax.lax.pmean(count, self.axis)
    return jnp.where(count > 0, count, 1)

  def gather(self, rows: Any) -> Any:
    """Return a tree of arrays [B, ...] of the global batch, given this device's
    share.
    """
    if self.axis is None:
      return rows
    return jax.lax.all_gather(rows, self.axis, tiled=True)

  def total(self, sums: jax.Array) -> jax.Array:
    """Return sums over the global batch, given those over this device's share."""
    if self.axis is None:
      return sums
    return jax.lax.psum(sums, self.axis)

  @property
  def ended(self) -> jax.Array:
    """True for each sequence whose last valid step is in the window, bool [B]."""
    return self.active & (self.seen == self.lengths)

  def slice(self, x: jax.Array, name: str = 'x') -> jax.Array:
    """Return the window's steps of a time-major array, with 0 at masked steps.

    Args:
      x: [T, B, ...].
      name: The array's name in the error.

    Returns:
      [S, B, ...].

    Raises:
      ValueError: If the array is not [T, B, ...].
    """
    expected = (self.num_steps, self.mask.shape[1])
    fits = x.shape[:2] == expected
    require(fits, name, f'time-major, [T, B, ...] = {expected}', x.shape)
    x = jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis=0)
    # Padding may hold anything. A NaN would come back as a NaN gradient, even if the
    # loss masks it out.
    return _zero_where_masked(x, self)


def write_window(
  sequence: jax.Array,
  outputs: jax.Array,
  window: WindowView,
  record: jax.Array | None = None,
) -> jax.Array:
  """Write a window's outputs into those of the whole sequence, with 0 at masked steps.

  Windows must be written in order: one that is a step shorter also writes 0 into the
  step after it, which the next window overwrites.

  Args:
    sequence: [T, B, ...], the outputs so far.
    outputs: [S, B, ...], the window's outputs.
    window: The window.
    record: bool [], whether to write; None means True.

  Returns:
    [T, B, ...].
  """
  outputs = _zero_where_masked(outputs, window)
  if record is not None:
    before = jax.lax.dynamic_slice_in_dim(sequence, window.start, window.size, axis=0)
    outputs = jnp.where(record, outputs, before)
  return jax.lax.dynamic_update_slice_in_dim(sequence, outputs, window.start, axis=0)


def _zero_where_masked(x: jax.Array, window: WindowView) -> jax.Array:
  """Return x [S, B, ...] with 0 at the window's masked steps."""
  if not window.masked:
    return x
  cleared: jax.Array = zero_unless(window.mask, x)
  return cleared


def is_time_major(target: Any, num_steps: int, batch_size: int, by_row: bool) -> bool:
  """Return whether a target is [T, B, ...] rather than [B, ...].

  Args:
    target: One array of the targets.
    num_steps: T.
    batch_size: B.
    by_row: Whether the loss has one target per sequence. It decides if T = B, where the
      shape cannot tell.
  """
  has_shape = jnp.shape(target)[:2] == (num_steps, batch_size)
  return has_shape and not (by_row and num_steps == batch_size)


def lengths_in_range(lengths: jax.Array, num_steps: int) -> jax.Array:
  """Return bool [], whether all lengths, int [B], lie in 1..T."""
  return jnp.all((lengths >= 1) & (lengths <= num_steps))


def take_steps(x: jax.Array, step: jax.Array | int) -> jax.Array:
  """Return one step of each sequence.

  Args:
    x: [S, B, ...].
    step: An int, or int [B].

  Returns:
    [1, B, ...].
  """
  if isinstance(step, int):
    return x[step : step + 1]
  index = step.reshape((1, -1) + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=0)


class ValidSteps(NamedTuple):
  """The valid steps of a batch, counted up to the end of each window.

  Attributes:
    lengths: int32 [B], number of valid steps of each sequence.
    mask: bool [T, B], which steps are valid; None if these are the first `lengths`.
    seen: int32 [K, B], number of valid steps up to the end of each window; None if
      `mask` is.
    ragged: Whether any step may be masked.
  """

  lengths: jax.Array
  mask: jax.Array | None
  seen: jax.Array | None
  ragged: bool

  def occupied(self) -> jax.Array | None:
    """Return bool [K], whether any sequence has a valid step in each window.

    Returns None without a mask. `lengths` alone give the answer then.
    """
    if self.seen is None:
      return None
    return (self.seen > _shifted(self.seen)).any(1)

  def before(self) -> jax.Array | None:
    """Return int [K, B], the valid steps before each window; None without a mask."""
    return None if self.seen is None else _shifted(self.seen)


def _shifted(seen: jax.Array) -> jax.Array:
  """Return counts [K, B] up to each window's end as those before each window."""
  return jnp.concatenate([jnp.zeros_like(seen[:1]), seen[:-1]])


def valid_steps(
  windows: WindowPlan,
  batch_size: int,
  lengths: jax.typing.ArrayLike | None = None,
  mask: jax.typing.ArrayLike | None = None,
) -> ValidSteps:
  """Count the valid steps of a batch, once for all windows.

  Args:
    windows: The windows of the sequence.
    batch_size: B.
    lengths: int [B], number of steps before each sequence's end; None means T.
    mask: bool [T, B], which steps are valid; None means all before the end.

  Returns:
    The counts.
  """
  num_steps = int(windows.ends[-1])
  ragged = lengths is not None or mask is not None
  if lengths is None:
    lengths = jnp.full(batch_size, num_steps, jnp.int32)
  lengths = jnp.asarray(lengths, jnp.int32)
  if mask is None:
    return ValidSteps(lengths, None, None, ragged)
  steps = jnp.arange(num_steps, dtype=jnp.int32)
  mask = jnp.asarray(mask) & (steps[:, None] < lengths[None, :])
  # Steps are first summed by window: a cumulative sum over all T steps would be an
  # integer array [T, B].
  sizes = windows.ends - windows.starts
  window_of_step = np.repeat(np.arange(windows.num_windows), sizes)
  counts = jnp.zeros((windows.num_windows, batch_size), jnp.int32)
  counts = counts.at[window_of_step].add(mask)
  return ValidSteps(counts.sum(0), mask, jnp.cumsum(counts, axis=0), ragged)


def window_at(
  windows: WindowPlan, k: jax.Array, valid: ValidSteps, axis: str | None = None
) -> WindowView:
  """Return the view of window `k` on a batch.

  Args:
    windows: The windows of the sequence.
    k: int32 [], the window's index.
    valid: The batch's valid steps.
    axis: Name of the mesh axis over which the batch is split, if any.

  Returns:
    The view.
  """
  start = jnp.asarray(windows.starts)[k]
  end = jnp.asarray(windows.ends)[k]
  steps = start + jnp.arange(windows.size, dtype=jnp.int32)
  in_window = (steps < end)[:, None]
  if valid.mask is None or valid.seen is None:
    # Valid steps come first, so that counts follow from the lengths.
    mask = in_window & (steps[:, None] < valid.lengths[None, :])
    seen = jnp.minimum(valid.lengths, end)
    active = valid.lengths > start
    last = jnp.clip(seen - start - 1, 0, windows.size - 1)
  else:
    mask = in_window & jax.lax.dynamic_slice_in_dim(
      valid.mask, start, windows.size, axis=0
    )
    seen = valid.seen[k]
    active = mask.any(0)
    last = jnp.max(jnp.where(mask, (steps - start)[:, None], 0), axis=0)
  masked = valid.ragged or not windows.even
  return WindowView(
    k=k,
    num_windows=windows.num_windows,
    num_steps=int(windows.ends[-1]),
    size=windows.size,
    ragged=valid.ragged,
    masked=masked,
    start=start,
    end=end,
    lengths=valid.lengths,
    seen=seen,
    active=active,
    last=last if masked else windows.size - 1,
    mask=mask,
    axis=axis,
  )
