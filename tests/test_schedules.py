"""Each method's updates: which windows, with which weights, in which order."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

import fptt_jax
from fptt_jax.training import _schedules

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
ANY_METHOD = pytest.mark.parametrize('name', list(fptt_jax.METHODS))


def test_methods_differ_in_what_the_paper_says():
  """Update each window or once; gradient of the window or of all before it; which ones
  fix K. The regularizer is FPTT's alone.
  """
  table = {
    name: (
      m.regularized,
      m.update_each_window,
      m.whole_gradient,
      m.num_windows,
      m.truncated,
    )
    for name, m in fptt_jax.METHODS.items()
  }
  assert table == {
    'fptt': (True, True, False, None, False),
    'tbptt': (False, True, False, None, False),
    'ogd': (False, True, False, 'T', False),
    'bptt': (False, False, True, 1, False),
    'tbptt_final': (False, False, True, 1, True),
    'bptt_aux': (False, False, True, None, False),
    'ftrl': (False, True, True, None, False),
  }
  assert all(m.summary for m in fptt_jax.METHODS.values())


@pytest.mark.parametrize('name', ['fptt', 'tbptt', 'ogd'])
def test_plan_of_an_update_a_window(name):
  """U = K updates of one window each, full weight, going on from the hidden state of
  the update before.
  """
  plan = _schedules.plan_updates(fptt_jax.METHODS[name], 3)
  np.testing.assert_array_equal(plan.windows, [[0], [1], [2]])
  np.testing.assert_array_equal(plan.coefficients, [[1], [1], [1]])
  np.testing.assert_array_equal(plan.records, [[True], [True], [True]])
  assert not plan.restarts


def test_plan_of_bptt_aux():
  """One update over all windows, on the sum of their losses."""
  plan = _schedules.plan_updates(fptt_jax.METHODS['bptt_aux'], 3)
  np.testing.assert_array_equal(plan.windows, [[0, 1, 2]])
  np.testing.assert_array_equal(plan.coefficients, [[1, 1, 1]])
  np.testing.assert_array_equal(plan.records, [[True, True, True]])
  assert plan.restarts


@pytest.mark.parametrize('name', ['bptt', 'tbptt_final'])
def test_plan_of_one_update_on_one_window(name):
  """One update, one window."""
  plan = _schedules.plan_updates(fptt_jax.METHODS[name], 1)
  np.testing.assert_array_equal(plan.windows, [[0]])
  np.testing.assert_array_equal(plan.coefficients, [[1]])
  np.testing.assert_array_equal(plan.records, [[True]])


def test_plan_of_ftrl():
  """The u-th update runs from the start with the mean of the first u+1 losses and
  records the newest window alone.
  """
  plan = _schedules.plan_updates(fptt_jax.METHODS['ftrl'], 3)
  np.testing.assert_array_equal(plan.windows, [[0, 1, 2]] * 3)
  np.testing.assert_allclose(
    plan.coefficients, [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-7
  )
  np.testing.assert_array_equal(
    plan.records, [[True, False, False], [False, True, False], [False, False, True]]
  )
  assert plan.restarts


@PROPERTY
@given(st.integers(1, 60))
def test_ftrl_coefficients_are_means(num_windows):
  """Row u weighs windows 0..u equally, sums to 1, and gives later windows nothing."""
  coefficients = _schedules.plan_updates(
    fptt_jax.METHODS['ftrl'], num_windows
  ).coefficients
  np.testing.assert_allclose(coefficients.sum(1), 1, rtol=1e-6)
  for u, row in enumerate(coefficients):
    assert (row[: u + 1] == row[0]).all()
    assert not row[u + 1 :].any()


@ANY_METHOD
@PROPERTY
@given(num_windows=st.integers(1, 30))
def test_each_window_is_recorded_exactly_once_and_when_it_counts(name, num_windows):
  """Metrics and loss state would count twice, or miss, a window that is not recorded
  once. Windows run in order in every update, so that each starts from the hidden
  state of the one before; a recorded window has a weight in its update's objective.
  """
  plan = _schedules.plan_updates(fptt_jax.METHODS[name], num_windows)
  assert plan.windows.shape == plan.coefficients.shape == plan.records.shape
  np.testing.assert_array_equal(
    np.sort(plan.windows[plan.records]), np.arange(num_windows)
  )
  assert (np.diff(plan.windows, axis=1) == 1).all()
  assert (plan.coefficients[plan.records] > 0).all()
  assert (plan.windows.dtype, plan.coefficients.dtype, plan.records.dtype) == (
    np.int32,
    np.float64,
    np.bool_,
  )
  starts_over = (plan.windows[:, 0] == 0).all()
  assert (
    starts_over
    if plan.restarts
    else (plan.windows[:, 0] == np.arange(num_windows)).all()
  )
