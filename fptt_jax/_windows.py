"""Cutting T time steps into K windows whose lengths differ by at most one step.

Every window is laid out on S = ceil(T/K) steps. The windows that are one step shorter
read one step of the window after them, masked out. The last window is always a full
one, so no slice ever passes the end and no array is padded or copied.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import check_array, check_integer, check_size


class WindowPlan(NamedTuple):
  """Where the windows of a sequence lie (plain integers and NumPy arrays, fixed at
  trace time).

  Attributes:
    size: S, steps of the longest window.
    starts: int32 [K], first step of each window.
    ends: int32 [K], one past the last step of each window.
  """

  size: int
  starts: np.ndarray
  ends: np.ndarray

  @property
  def num_windows(self) -> int:
    """K."""
    return len(self.starts)

  @property
  def even(self) -> bool:
    """Whether all windows have S steps, so that nothing needs a mask."""
    return bool((self.ends - self.starts == self.size).all())

  def shifted(self, steps: int) -> 'WindowPlan':
    """The same windows, `steps` later."""
    return self._replace(
      starts=self.starts + np.int32(steps), ends=self.ends + np.int32(steps)
    )


def make_windows(
  num_steps: int, *, num_windows: int | None = None, window_size: int | None = None
) -> WindowPlan:
  """Cuts `num_steps` into windows; by default K = round(√T), the paper's rule of thumb
  (Sec. 4.2).

  Args:
    num_steps: T >= 1.
    num_windows: K, 1 <= K <= T. K = 1 is back-propagation through time (but for the
      regularizer), K = T an update each step.
    window_size: alternatively the longest window S, 1 <= S <= T; K = ceil(T/S).

  Returns:
    The :class:`WindowPlan`, whose lengths are floor(T/K) or ceil(T/K), spread evenly.

  Raises:
    ValueError: a number outside its range, or both `num_windows` and `window_size`.
  """
  num_steps = check_size('the number of time steps', num_steps)
  if num_windows is not None and window_size is not None:
    raise ValueError(
      f'give num_windows or window_size, not both: got num_windows={num_windows} and '
      f'window_size={window_size}.'
    )
  expected = f'an integer between 1 and the sequence length T={num_steps}'
  if window_size is not None:
    num_windows = -(
      -num_steps // check_integer('window_size', window_size, 1, num_steps, expected)
    )
  elif num_windows is None:
    num_windows = round(num_steps**0.5)
  num_windows = check_integer('num_windows', num_windows, 1, num_steps, expected)
  # floor(k T / K): the last window, T - floor((K-1) T / K), is ceil(T/K) long.
  borders = np.arange(num_windows + 1, dtype=np.int64) * num_steps // num_windows
  starts, ends = borders[:-1].astype(np.int32), borders[1:].astype(np.int32)
  return WindowPlan(int((ends - starts).max()), starts, ends)


class WindowView(NamedTuple):
  """One window of a batch, as a loss sees it. Fields that are arrays may be traced.

  Attributes:
    k: int32 [], the window's number, from 0.
    num_windows: K.
    num_steps: T.
    size: S.
    ragged: whether sequences may have masked steps: they end before T, or the batch has
      a mask.
    masked: whether any step of any window may be masked; False where all windows are
      even and the batch is not ragged.
    start: int32 [], the window's first step, counted from 0.
    end: int32 [], one past the window's last step.
    lengths: int32 [B], number of valid steps of each whole sequence (T where the batch
      is not ragged).
    seen: int32 [B], number of valid steps of each sequence up to the window's end.
    active: bool [B], whether each sequence has a valid step in the window.
    last: each sequence's last valid step in the window, int32 [B], counted from its
      start, 0 without one; the number S - 1 where nothing is masked.
    mask: bool [S, B], which steps of the window are real.
    axis: name of the mesh axis over which the batch is split, B being this device's
      share; None where it is whole.
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
    """Mean of the values where they count, 0 where none does: over the whole batch, if
    the mean over the devices is taken of it.

    A device of a split batch divides by the devices' mean count, not by its own.

    Args:
      values: float [B] or [S, B].
      where: bool of the same shape; may vary from row to row only in ragged batches
        (`active`, `ended`, `mask`).

    Returns:
      [], in the dtype of the values but at least float32.
    """
    # float16 holds neither the sum of many values nor a count above 65,504.
    wide = jnp.promote_types(values.dtype, jnp.float32)
    return jnp.sum(values, where=where, dtype=wide) / self.divisor(where, wide)

  def divisor(self, where: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What `mean` divides by: how many values count, 1 where none does."""
    count = jnp.sum(where).astype(dtype)
    if self.axis is not None and self.ragged:
      count = jax.lax.pmean(count, self.axis)
    return jnp.where(count > 0, count, 1)

  def gather(self, rows: Any) -> Any:
    """A tree of arrays [B, ...] of the whole batch, given this device's share of it."""
    return (
      rows if self.axis is None else jax.lax.all_gather(rows, self.axis, tiled=True)
    )

  def total(self, sums: jax.Array) -> jax.Array:
    """Sums over the whole batch, given those over this device's share of it."""
    return sums if self.axis is None else jax.lax.psum(sums, self.axis)

  @property
  def ended(self) -> jax.Array:
    """Whether each sequence has its last valid step in the window, bool [B]."""
    return self.active & (self.seen == self.lengths)

  def slice(self, x: jax.Array) -> jax.Array:
    """The window's S steps of a time-major array [T, B, ...]; zero where `mask` is
    False.

    What lies past a sequence's end may be anything: NaN there would come back as NaN
    gradients, even masked out of the loss.

    Raises:
      ValueError: the array is not [T, B, ...].
      TypeError: it is none.
    """
    check_array('what a window is cut out of, such as targets,', x)
    if x.shape[:2] != (self.num_steps, self.mask.shape[1]):
      raise ValueError(
        'expected a time-major array [T, B, ...] = '
        f'{(self.num_steps, self.mask.shape[1])}, got shape {x.shape}.'
      )
    x = jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis=0)
    if not self.masked:
      return x
    return jnp.where(
      self.mask.reshape(*self.mask.shape, *[1] * (x.ndim - 2)),
      x,
      jnp.zeros([], x.dtype),
    )


def write_window(
  sequence: jax.Array,
  outputs: jax.Array,
  window: WindowView,
  record: jax.Array | None = None,
) -> jax.Array:
  """Puts a window's outputs where they belong in those of the whole sequence; zeros at
  masked steps.

  WindowPlan must come in order: a window that is one step shorter also writes a zero
  into the step after it, over which the next window writes.

  Args:
    sequence: [T, B, ...].
    outputs: [S, B, ...].
    window: the window they are of.
    record: bool [], whether to write at all; None means yes.
  """
  if window.masked:
    mask = window.mask.reshape(*window.mask.shape, *[1] * (outputs.ndim - 2))
    outputs = jnp.where(mask, outputs, jnp.zeros([], outputs.dtype))
  if record is not None:
    before = jax.lax.dynamic_slice_in_dim(sequence, window.start, window.size, axis=0)
    outputs = jnp.where(record, outputs, before)
  return jax.lax.dynamic_update_slice_in_dim(sequence, outputs, window.start, axis=0)


def lengths_in_range(lengths: jax.Array, num_steps: int) -> jax.Array:
  """Return bool [], whether all lengths, int [B], lie in 1..T."""
  return jnp.all((lengths >= 1) & (lengths <= num_steps))


def take_steps(x: jax.Array, step: jax.Array | int) -> jax.Array:
  """One step of each sequence: x [S, B, ...] -> [1, B, ...], at `step`, an int or int
  [B].
  """
  if isinstance(step, int):
    return x[step : step + 1]
  return jnp.take_along_axis(x, step.reshape(1, -1, *[1] * (x.ndim - 2)), axis=0)


class ValidSteps(NamedTuple):
  """Which steps of a batch are valid, and how many of them each window has.

  Attributes:
    lengths: int32 [B], number of valid steps of each sequence.
    mask: bool [T, B], which steps are valid; None where these are the first `lengths`.
    seen: int32 [K, B], number of valid steps up to the end of each window; None where
      `mask` is.
    ragged: whether any step may be masked.
  """

  lengths: jax.Array
  mask: jax.Array | None
  seen: jax.Array | None
  ragged: bool

  def occupied(self) -> jax.Array | None:
    """Whether any sequence has a valid step in each window, bool [K]; None without a
    mask, where `lengths` tell.
    """
    if self.seen is None:
      return None
    before = jnp.concatenate([jnp.zeros_like(self.seen[:1]), self.seen[:-1]])
    return (self.seen > before).any(1)


def valid_steps(
  windows: WindowPlan,
  batch_size: int,
  lengths: jax.typing.ArrayLike | None = None,
  mask: jax.typing.ArrayLike | None = None,
) -> ValidSteps:
  """Counts the valid steps of a batch once, so that a window need not look at all of
  the mask.

  Args:
    windows: the windows of the sequence.
    batch_size: B.
    lengths: int [B], number of steps before each sequence's end; None means T.
    mask: bool [T, B], which steps are valid; None means all before the end.
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
  # Scattered into windows first: a running sum over all T steps would be an array [T,
  # B] of integers.
  window_of_step = np.repeat(
    np.arange(windows.num_windows), windows.ends - windows.starts
  )
  counts = (
    jnp.zeros((windows.num_windows, batch_size), jnp.int32).at[window_of_step].add(mask)
  )
  return ValidSteps(counts.sum(0), mask, jnp.cumsum(counts, axis=0), ragged)


def window_at(
  windows: WindowPlan, k: jax.Array, valid: ValidSteps, axis: str | None = None
) -> WindowView:
  """Returns the `k`-th window of a batch with the given valid steps."""
  start, end = jnp.asarray(windows.starts)[k], jnp.asarray(windows.ends)[k]
  steps = start + jnp.arange(windows.size, dtype=jnp.int32)
  masked = valid.ragged or not windows.even
  if valid.mask is None or valid.seen is None:
    mask = (steps < end)[:, None] & (steps[:, None] < valid.lengths[None, :])
    seen, active = jnp.minimum(valid.lengths, end), valid.lengths > start
    last = jnp.clip(seen - start - 1, 0, windows.size - 1)
  else:
    mask = (steps < end)[:, None] & jax.lax.dynamic_slice_in_dim(
      valid.mask, start, windows.size, axis=0
    )
    seen, active = valid.seen[k], mask.any(0)
    last = jnp.max(jnp.where(mask, (steps - start)[:, None], 0), axis=0)
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
