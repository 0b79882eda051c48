"""Methods of the tournament on a stream."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.core.flags import UserError
from experiments.core.schedule import Member
from experiments.paper import entries, items, tuning
from experiments.stream import contest, series, systems
from experiments.stream.series import Problem, Source
from fptt_jax import nn


@pytest.fixture(autouse=True)
def short_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Problem:
  """The stream of the item is a noisy wave of 43 steps here, from this package."""
  rng = np.random.default_rng(0)
  values = np.sin(np.arange(50) / 3) + 0.1 * rng.normal(size=50)
  problem = series.make_problem(values, season=5)
  source = Source('experiments', lambda folder: problem)
  monkeypatch.setitem(series.SOURCES, 'sf-temps', source)
  return problem


def forecast(problem: Problem, **settings: Any) -> np.ndarray:
  """The forecasts of one run at rate 0.01."""
  config = contest.Config(lr=0.01, **settings)
  member = Member(config, config.method[0], 0, {})
  return contest.make_forecaster(problem, member)(member)


def test_windows_forecast_as_in_the_comparison_of_systems(
  short_stream: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Also in the steps after the last whole window, which that script runs apart."""
  monkeypatch.setattr(systems, 'RATES', (0.01,))
  monkeypatch.setattr(systems, 'FIRST_RATE', 0.01)
  for size, influence in ((4, 'none'), (1, 'snap1')):
    system = systems.System(nn.GRU, size, influence)
    [expected] = systems.run_learner(system, short_stream, 1)
    found = forecast(short_stream, window_size=size, influence=influence)
    np.testing.assert_allclose(found, expected.values, rtol=1e-4, atol=1e-5)


def test_a_mean_over_one_update_forecasts_as_the_weights(short_stream: Problem) -> None:
  settings: dict[str, Any] = dict(window_size=4, averaging='running')
  found = forecast(short_stream, window_size=4)
  last = forecast(short_stream, average_horizon=1, **settings)
  np.testing.assert_allclose(last, found, rtol=1e-4, atol=1e-5)
  mean = forecast(short_stream, average_horizon=9, **settings)
  assert np.abs(mean - found).max() > 1e-3


def test_forecasts_come_before_their_values(short_stream: Problem) -> None:
  """Another label changes what comes after its window alone, as do other inputs."""
  x, y = short_stream.inputs.copy(), short_stream.targets.copy()
  y[17] += 1.0
  x[20:] += 1.0
  other = Problem(**{**vars(short_stream), 'inputs': x, 'targets': y})
  for averaging in ('none', 'running', 'schedule_free'):
    settings: dict[str, Any] = dict(window_size=4, averaging=averaging)
    one, two = forecast(short_stream, **settings), forecast(other, **settings)
    np.testing.assert_array_equal(one[:20], two[:20])
    assert np.all(one[20:] != two[20:])


def test_rates_are_chosen_by_the_first_part(
  short_stream: Problem, tmp_path: Path
) -> None:
  """A line is tuned and run; runs that have ended are read back."""
  [line] = [
    entry
    for entry in items.tournament_of('cpu')
    if entry.label == 'sf-temps-S8.fptt-kappa2-snap1'
  ]
  trials = tuning.try_rates(line, None, tmp_path)
  assert {trial['lr'] for trial in trials} >= set(line.rates)
  config = contest.Config(seeds=(0, 1), window_size=8, lr=0.02)
  for _ in range(2):
    summaries = entries.run_entry(line, config, tmp_path / line.label)
  members = [Member(config, 'tbptt', seed, {}) for seed in config.seeds]
  forecast_run = contest.make_forecaster(short_stream, members[0])
  for member, summary in zip(members, summaries, strict=True):
    for name, steps in (
      ('first_mae', short_stream.tuning),
      ('test_mae', short_stream.test),
    ):
      error = np.abs(forecast_run(member) - short_stream.truth)[steps].mean()
      assert summary[name] == pytest.approx(error)
  names = [summary['run'] for summary in summaries]
  assert names == ['tbptt-seed0', 'tbptt-seed1']


def test_a_rate_is_not_judged_by_what_comes_later() -> None:
  """A run that diverges in the reported part still has its error of the first part."""
  [line] = [
    one for one in items.tournament_of('cpu') if one.label == 'sf-temps-S8.tbptt'
  ]
  lost = {'first_mae': 0.1, 'test_mae': None, 'lost': 'a forecast is not finite'}
  assert tuning.score_of(line, lost) == 0.1
  assert tuning.score_of(line, lost | {'first_mae': None}) is None


def test_what_a_stream_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
  with pytest.raises(ValueError, match="--method must be 'fptt' or 'tbptt'"):
    contest.Config(method=('bptt',))
  monkeypatch.setitem(
    series.SOURCES, 'sf-temps', Source('no_such_package', lambda folder: None)
  )
  with pytest.raises(UserError, match='pip install no_such_package'):
    contest.run(contest.Config(), 'unused')
