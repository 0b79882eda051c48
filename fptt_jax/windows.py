"""Cutting T time steps into K windows whose lengths differ by at most one step.

Every window is laid out on S = ceil(T/K) steps. The windows that are one step shorter read one step of the window after them,
masked out. The last window is always a full one, so no slice ever passes the end and no array is padded or copied.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax.checks import check_array, check_integer, check_size


class Windows(NamedTuple):
  """Where the windows of a sequence lie (plain integers and NumPy arrays, fixed at trace time).

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

  def shifted(self, steps: int) -> 'Windows':
    """The same windows, `steps` later."""
    return self._replace(starts=self.starts + np.int32(steps), ends=self.ends + np.int32(steps))


def cut(num_steps: int, *, num_windows: int | None = None, window_size: int | None = None) -> Windows:
  """Cuts `num_steps` into windows; by default K = round(√T), the paper's rule of thumb (Sec. 4.2).

  Args:
    num_steps: T >= 1.
    num_windows: K, 1 <= K <= T. K = 1 is back-propagation through time (but for the regulariser), K = T an
      update each step.
    window_size: alternatively the longest window S, 1 <= S <= T; K = ceil(T/S).

  Returns:
    The :class:`Windows`, whose lengths are floor(T/K) or ceil(T/K), spread evenly.

  Raises:
    ValueError: a number outside its range, or both `num_windows` and `window_size`.
  """
  num_steps = check_size('the number of time steps', num_steps)
  if num_windows is not None and window_size is not None:
    raise ValueError(f'give num_windows or window_size, not both: got num_windows={num_windows} and window_size={window_size}.')
  expected = f'an integer between 1 and the sequence length T={num_steps}'
  if window_size is not None:
    num_windows = -(-num_steps // check_integer('window_size', window_size, 1, num_steps, expected))
  elif num_windows is None:
    num_windows = round(num_steps**0.5)
  num_windows = check_integer('num_windows', num_windows, 1, num_steps, expected)
  # floor(k T / K): the last window, T - floor((K-1) T / K), is ceil(T/K) long.
  borders = np.arange(num_windows + 1, dtype=np.int64) * num_steps // num_windows
  starts, ends = borders[:-1].astype(np.int32), borders[1:].astype(np.int32)
  return Windows(int((ends - starts).max()), starts, ends)


class Window(NamedTuple):
  """One window of a batch, as a loss sees it. Fields that are arrays may be traced.

  Attributes:
    k: int32 [], the window's number, from 0.
    num_windows: K.
    num_steps: T.
    size: S.
    ragged: whether sequences may end before T.
    masked: whether any step of any window may be masked; False where all windows are even and the batch is not ragged.
    start: int32 [], the window's first step, counted from 0.
    end: int32 [], one past the window's last step.
    lengths: int32 [B], valid steps of each whole sequence (T where the batch is not ragged).
    mask: bool [S, B], which steps of the window are real.
    axis: name of the mesh axis over which the batch is split, B being this device's share; None where it is whole.
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
  mask: jax.Array
  axis: str | None = None

  def mean(self, values: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of the values where they count, 0 where none does: over the whole batch, if the mean over the devices is taken of it.

    A device of a split batch divides by the devices' mean count, not by its own.

    Args:
      values: float [B] or [S, B].
      where: bool of the same shape; may vary from row to row only where sequences end (`active`, `mask`).
    """
    return jnp.sum(values, where=where) / self.divisor(where, values.dtype)

  def divisor(self, where: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What `mean` divides by: how many values count, 1 where none does."""
    count = jnp.sum(where).astype(dtype)
    if self.axis is not None and self.ragged:
      count = jax.lax.pmean(count, self.axis)
    return jnp.where(count > 0, count, 1)

  def gather(self, rows: Any) -> Any:
    """A tree of arrays [B, ...] of the whole batch, given this device's share of it."""
    return rows if self.axis is None else jax.lax.all_gather(rows, self.axis, tiled=True)

  def total(self, sums: jax.Array) -> jax.Array:
    """Sums over the whole batch, given those over this device's share of it."""
    return sums if self.axis is None else jax.lax.psum(sums, self.axis)

  @property
  def last(self) -> jax.Array | int:
    """Each sequence's last valid step in the window, int32 [B]; the number S - 1 where nothing is masked."""
    if not self.masked:
      return self.size - 1
    return jnp.clip(jnp.minimum(self.lengths, self.end) - self.start - 1, 0, self.size - 1)

  def slice(self, x: jax.Array) -> jax.Array:
    """The window's S steps of a time-major array [T, B, ...]; zero where `mask` is False.

    What lies past a sequence's end may be anything: NaN there would come back as NaN gradients, even masked out of the loss.

    Raises:
      ValueError: the array is not [T, B, ...].
      TypeError: it is none.
    """
    check_array('what a window is cut out of, such as targets,', x)
    if x.shape[:2] != (self.num_steps, self.mask.shape[1]):
      raise ValueError(f'expected a time-major array [T, B, ...] = {(self.num_steps, self.mask.shape[1])}, got shape {x.shape}.')
    x = jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis=0)
    if not self.masked:
      return x
    return jnp.where(self.mask.reshape(*self.mask.shape, *[1] * (x.ndim - 2)), x, jnp.zeros([], x.dtype))


def take_steps(x: jax.Array, step: jax.Array | int) -> jax.Array:
  """One step of each sequence: x [S, B, ...] -> [1, B, ...], at `step`, an int or int [B]."""
  if isinstance(step, int):
    return x[step : step + 1]
  return jnp.take_along_axis(x, step.reshape(1, -1, *[1] * (x.ndim - 2)), axis=0)


def window_at(windows: Windows, k: jax.Array, lengths: jax.Array, ragged: bool = True, axis: str | None = None) -> Window:
  """The `k`-th window of a batch with the given sequence `lengths` (int32 [B]); not `ragged` means that they are all T."""
  start, end = jnp.asarray(windows.starts)[k], jnp.asarray(windows.ends)[k]
  steps = start + jnp.arange(windows.size, dtype=jnp.int32)
  mask = (steps < end)[:, None] & (steps[:, None] < lengths[None, :])
  masked = ragged or not windows.even
  num_steps = int(windows.ends[-1])
  return Window(k, windows.num_windows, num_steps, windows.size, ragged, masked, start, end, lengths, mask, axis)
