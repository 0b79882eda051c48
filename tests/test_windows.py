"""Windows cover the sequence, and their masks count its valid steps."""

import chex
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fptt_jax
from fptt_jax._windows import valid_steps, window_at

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)


def at(
  windows: fptt_jax.WindowPlan, k: int | jax.Array, lengths: jax.Array | None
) -> fptt_jax.WindowView:
  """The k-th window of a batch with these lengths; None for two sequences of all T
  steps.
  """
  batch_size = 2 if lengths is None else len(lengths)
  return window_at(windows, jnp.int32(k), valid_steps(windows, batch_size, lengths))


@st.composite
def steps_and_windows(draw) -> tuple[int, int]:
  num_steps = draw(st.integers(1, 2000))
  return num_steps, draw(st.integers(1, num_steps))


def check_tiling(windows: fptt_jax.WindowPlan, num_steps: int) -> None:
  """The windows' steps, one window after the other, are 0, 1, ..., T-1: each step once,
  in order.
  """
  steps = np.concatenate(
    [
      np.arange(start, end)
      for start, end in zip(windows.starts, windows.ends, strict=True)
    ]
  )
  np.testing.assert_array_equal(steps, np.arange(num_steps))
  lengths = windows.ends - windows.starts
  assert lengths.min() >= 1
  assert lengths.max() - lengths.min() <= 1
  # The layout is S wide: S is the longest window, the last window fills it, and no
  # slice of S steps passes the end.
  assert windows.size == lengths.max() == lengths[-1]
  assert (windows.starts + windows.size <= num_steps).all()
  assert windows.even == (lengths.min() == lengths.max())


@PROPERTY
@given(steps_and_windows())
def test_windows_tile_any_sequence(numbers):
  """For any T and 1 <= K <= T there are K windows that cover 0..T once in order, of
  lengths at most one step apart.
  """
  num_steps, num_windows = numbers
  windows = fptt_jax.make_windows(num_steps, num_windows=num_windows)
  assert windows.num_windows == num_windows == len(windows.ends)
  check_tiling(windows, num_steps)


def test_windows_tile_all_short_sequences():
  """The same for every single (T, K) up to T = 40: a floor or ceiling that is wrong
  once in a while would show.
  """
  for num_steps in range(1, 41):
    for num_windows in range(1, num_steps + 1):
      check_tiling(fptt_jax.make_windows(num_steps, num_windows=num_windows), num_steps)


@PROPERTY
@given(steps_and_windows())
def test_window_size_is_an_upper_bound_reached_with_the_fewest_windows(numbers):
  """window_size=S gives windows of at most S steps, and as few of them as cover T: one
  window less would need longer ones.
  """
  num_steps, window_size = numbers
  windows = fptt_jax.make_windows(num_steps, window_size=window_size)
  check_tiling(windows, num_steps)
  assert windows.size <= window_size
  assert (windows.num_windows - 1) * window_size < num_steps
  if num_steps % window_size == 0:
    assert windows.even
    assert windows.size == window_size


@pytest.mark.parametrize(
  ('num_steps', 'expected'),
  [(1, 1), (2, 1), (3, 2), (16, 4), (20, 4), (21, 5), (784, 28), (1000, 32)],
)
def test_default_is_the_papers_rule(num_steps, expected):
  """Section 4.2: K ≈ √T, rounded to the nearest integer."""
  windows = fptt_jax.make_windows(num_steps)
  assert windows.num_windows == expected
  check_tiling(windows, num_steps)


def test_windows_by_hand():
  """T = 10 in K = 4: lengths 2, 3, 2, 3, laid out on S = 3 steps; constants fit an
  int32 index on the device.
  """
  windows = fptt_jax.make_windows(10, num_windows=4)
  assert windows.size == 3
  assert not windows.even
  np.testing.assert_array_equal(windows.starts, [0, 2, 5, 7])
  np.testing.assert_array_equal(windows.ends, [2, 5, 7, 10])
  assert windows.starts.dtype == windows.ends.dtype == np.int32


def test_shifted_windows_move_whole():
  """`shifted` moves borders and keeps lengths."""
  windows = fptt_jax.make_windows(7, num_windows=3)
  moved = windows.shifted(5)
  assert moved.size == windows.size
  np.testing.assert_array_equal(moved.starts, windows.starts + 5)
  np.testing.assert_array_equal(moved.ends, windows.ends + 5)
  assert moved.starts.dtype == moved.ends.dtype == np.int32


@PROPERTY
@given(st.sampled_from([(7, 3), (10, 4), (12, 12)]), st.data())
def test_masks_of_all_windows_sum_to_the_lengths(shape, data):
  """Whatever the lengths, each valid step is unmasked in exactly one window, in the row
  of its own step.
  """
  num_steps, num_windows = shape
  lengths = np.array(
    data.draw(st.lists(st.integers(1, num_steps), min_size=3, max_size=3)), np.int32
  )
  windows = fptt_jax.make_windows(num_steps, num_windows=num_windows)
  seen = np.zeros((num_steps, 3), int)
  for k in range(num_windows):
    window = at(windows, k, jnp.asarray(lengths))
    chex.assert_shape(window.mask, (windows.size, 3))
    chex.assert_type(window.mask, bool)
    assert (int(window.start), int(window.end)) == (windows.starts[k], windows.ends[k])
    assert (window.num_windows, window.num_steps, window.size, int(window.k)) == (
      num_windows,
      num_steps,
      windows.size,
      k,
    )
    rows = np.arange(windows.starts[k], windows.starts[k] + windows.size)
    seen[rows] += np.asarray(window.mask)
  np.testing.assert_array_equal(seen, np.arange(num_steps)[:, None] < lengths)
  np.testing.assert_array_equal(seen.sum(0), lengths)


def test_window_is_the_same_under_a_traced_index():
  """k may be traced (a scan's counter): the window equals the one of the plain
  number.
  """
  windows, lengths = (
    fptt_jax.make_windows(10, num_windows=4),
    jnp.array([10, 3], jnp.int32),
  )
  masks = jax.jit(jax.vmap(lambda k: at(windows, k, lengths).mask))(jnp.arange(4))
  for k in range(4):
    np.testing.assert_array_equal(masks[k], at(windows, k, lengths).mask)


def test_slice_cuts_the_windows_steps():
  """`slice` takes S steps of any time-major array, features and all, 0 where masked;
  what was there, NaN too, is gone. Where nothing can be masked the steps come as they
  are.
  """
  x = 1 + np.arange(10 * 2 * 3, dtype=np.float32).reshape(10, 2, 3)
  x[4:, 1] = np.nan
  lengths = jnp.array([10, 4], jnp.int32)
  uneven = fptt_jax.make_windows(10, num_windows=4)
  expected = x[2:5].copy()
  expected[2, 1] = 0
  np.testing.assert_array_equal(at(uneven, 1, lengths).slice(jnp.asarray(x)), expected)
  short = at(uneven, 0, None).slice(jnp.asarray(x[:, 0:2, 0]))
  np.testing.assert_array_equal(short, [x[0, :, 0], x[1, :, 0], [0, 0]])
  even = at(fptt_jax.make_windows(10, num_windows=5), 1, None)
  assert not even.masked
  np.testing.assert_array_equal(even.slice(jnp.asarray(x)), x[2:4])


@pytest.mark.parametrize('shape', [(9, 2), (11, 2), (2, 10), (10, 3), (10,)])
def test_slice_rejects_arrays_of_another_length(shape):
  """A shorter array's slice would be clamped, so silently shifted."""
  window = at(fptt_jax.make_windows(10, num_windows=4), 1, jnp.full(2, 10, jnp.int32))
  with pytest.raises(ValueError, match=r'^x .*\(10, 2\), got '):
    window.slice(jnp.zeros(shape))


@pytest.mark.parametrize(
  ('num_steps', 'options', 'name', 'value'),
  [
    (5, {'num_windows': 6}, 'num_windows .*T=5', '6'),
    (5, {'num_windows': 0}, 'num_windows', '0'),
    (5, {'num_windows': -1}, 'num_windows', '-1'),
    (5, {'window_size': 0}, 'window_size', '0'),
    (5, {'window_size': 6}, 'window_size .*T=5', '6'),
    (10, {'num_windows': 2.5}, 'num_windows', r'2\.5'),
    (0, {}, 'the number of time steps', '0'),
    (
      5,
      {'num_windows': 2, 'window_size': 3},
      'num_windows .*window_size=3',
      '2',
    ),
  ],
)
def test_numbers_out_of_range(num_steps, options, name, value):
  """An error names the argument and shows the value."""
  with pytest.raises(ValueError, match=f'^{name}.*got {value}'):
    fptt_jax.make_windows(num_steps, **options)
