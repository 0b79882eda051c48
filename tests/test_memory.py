"""Problems that tell whether credit crosses windows."""

import numpy as np
import pytest

from experiments.data import memory


@pytest.mark.parametrize('name', memory.PROBLEMS)
def test_shapes_and_repeatable_draws(name: str) -> None:
  if name == 'sunspots':
    pytest.importorskip('statsmodels', reason='sunspots are a file of statsmodels')
  problem = memory.PROBLEMS[name]
  inputs, targets = problem.draw(np.random.default_rng(0), 30, 4)
  again, _ = problem.draw(np.random.default_rng(0), 30, 4)
  other, _ = problem.draw(np.random.default_rng(1), 30, 4)
  assert inputs.shape == (30 if problem.is_stream else 1, 4, problem.features)
  assert inputs.dtype == np.float32
  assert targets.shape[:1] == ((30,) if problem.is_stream else (4,))
  np.testing.assert_array_equal(inputs, again)
  assert (inputs != other).any()
  assert np.isfinite(inputs).all()


def test_levels_of_the_lags_are_those_of_the_literature() -> None:
  levels = list(memory.lag_levels().values())
  np.testing.assert_allclose(levels, [0.662, 0.519, 0.454], atol=1e-3)


def test_labels_follow_the_two_flips() -> None:
  """Each of the four pairs of flips has the share of ones that its formula says."""
  flips, labels = memory.draw_lags(np.random.default_rng(0), 4000, 16)
  first, second = memory.LAGS
  x = flips[..., 0]
  a, b, y = x[second - first : -first], x[:-second], labels[second:]
  for pair in ((0, 0), (0, 1), (1, 0), (1, 1)):
    chosen = y[(a == pair[0]) & (b == pair[1])]
    expected = 0.5 + 0.5 * pair[0] - 0.25 * pair[1]
    assert abs(chosen.mean() - expected) < 0.02


def test_recall_shows_the_numbers_once() -> None:
  inputs, targets = memory.draw_recall(np.random.default_rng(0), 12, 500)
  shown = inputs[0, :, 0] / np.sqrt(12) + 0.5
  np.testing.assert_allclose(shown, targets, atol=1e-6)
  assert len(inputs) == 1
  assert abs(targets.var() - memory.PROBLEMS['recall'].levels['chance']) < 0.01


def test_targets_of_chaotic_series_obey_their_equations() -> None:
  """The normalized Hénon map is quadratic in x and linear in the value before, and one
  map fits all draws.
  """
  maps = []
  for seed in (0, 1):
    x, y = memory.draw_henon(np.random.default_rng(seed), 300, 2)
    now, before, after = x[1:, 0, 0], x[:-1, 0, 0], y[1:, 0, 0]
    columns = np.stack([np.ones_like(now), now, now * now, before], 1)
    found, [residual], rank, _ = np.linalg.lstsq(
      columns.astype(np.float64), after.astype(np.float64)
    )
    assert rank == 4
    assert residual < 1e-8
    maps.append(found)
  np.testing.assert_allclose(*maps, rtol=1e-4)
  for draw in (memory.draw_henon, memory.draw_mackey_glass, memory.draw_lorenz):
    inputs, targets = draw(np.random.default_rng(0), 4000, 16)
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    np.testing.assert_allclose(inputs.mean((0, 1)), 0, atol=0.05)
    np.testing.assert_allclose(inputs.std((0, 1)), 1, rtol=0.05)


def test_later_sunspots_are_in_the_units_of_the_earlier() -> None:
  """The level in plots is the error of the mean of the training years."""
  pytest.importorskip('statsmodels', reason='sunspots are a file of statsmodels')
  rng = np.random.default_rng(0)
  inputs, _ = memory.draw_sunspots(rng, 1000, 50)
  np.testing.assert_allclose([inputs.mean(), inputs.std()], [0, 1], atol=0.01)
  _, later = memory.draw_later_sunspots(rng, 1, 1)
  [level] = memory.PROBLEMS['sunspots'].levels.values()
  scored = later[memory.LEAD :]
  assert len(scored) == 87
  assert np.mean(scored**2) == pytest.approx(level, abs=0.01)
