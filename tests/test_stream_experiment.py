"""The forecasts of real streams are scored fairly, and the learner beats a season."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.core import files
from experiments.core.flags import UserError
from experiments.records import store
from experiments.records.collect import Origin, collect_folder
from experiments.stream import __main__ as script
from experiments.stream import series, systems
from experiments.stream.series import make_problem
from experiments.stream.systems import Forecast
from fptt_jax import nn


def test_inputs_are_of_the_past() -> None:
  """Another future changes neither inputs nor baselines of the steps before it."""
  values = np.random.default_rng(0).normal(size=60)
  other = values.copy()
  other[40:] += 5.0
  one, two = make_problem(values, season=4), make_problem(other, season=4)
  # The first step is that of value 5, so step 34 is the last that sees value 39.
  np.testing.assert_array_equal(one.inputs[:35], two.inputs[:35])
  for name, forecast in one.baselines.items():
    np.testing.assert_array_equal(forecast[:35], two.baselines[name][:35])
  np.testing.assert_array_equal(one.truth[:34], two.truth[:34])
  assert np.any(one.truth[34] != two.truth[34])


def test_problem_by_hand() -> None:
  """Changes, seasons and baselines of a short series with a gap."""
  values = np.array([1.0, 3.0, 2.0, 6.0, 3.0, np.nan, 4.0, 9.0, 5.0, 6.0, 6.0, 8.0])
  problem = make_problem(values, season=2)
  # Steps see the values 3 to 10, and the first six set the scales.
  scale = np.std([4, -3, 5, -4])
  assert problem.scale == pytest.approx(scale)
  np.testing.assert_allclose(problem.truth[:3], [3, np.nan, 4])
  np.testing.assert_allclose(problem.inputs[0, :2], [4 / scale, -1 / scale], rtol=1e-6)
  assert np.isnan(problem.inputs[2:4, 0]).all()
  np.testing.assert_allclose(problem.targets[:2], [-3 / scale, np.nan], rtol=1e-6)
  np.testing.assert_allclose(problem.baselines['last value'][:4], [6, 3, 3, 4])
  np.testing.assert_allclose(problem.baselines['value a season ago'][:2], [2, 6])
  np.testing.assert_allclose(problem.baselines['change a season ago'][0], 6 + 2 - 3)
  assert not np.any(problem.tuning & problem.test)
  assert not np.any((problem.tuning | problem.test)[: 3 * 2])


def test_settings_are_chosen_before_the_test() -> None:
  """The setting with the least error in the first part is reported on the other."""
  problem = make_problem(np.random.default_rng(0).normal(size=100), season=7)
  first = np.where(problem.tuning, problem.truth, 100.0)
  last = np.where(problem.test, problem.truth, 100.0)
  line = script.score(problem, [Forecast(0.1, 0, first), Forecast(0.2, 0, last)])
  assert line['setting'] == 0.1
  assert line['error'] == pytest.approx(
    np.abs(100 - problem.truth)[problem.test].mean()
  )


def test_a_stream_starts_anew_after_silence() -> None:
  """Each episode does, and a sensor only where it was silent for long."""
  known = np.ones(40, bool)
  known[3:5] = known[10:23] = False
  np.testing.assert_array_equal(np.flatnonzero(series.starts_anew(known)), [23])


def test_episodes_by_hand() -> None:
  """Labels, restarts and baselines of episodes of one to three steps."""
  lengths, labels = (2, 1, 3) * 4, np.array([0, 1, 2] * 4)
  episodes = [np.full((n, 1), 1.0 * k) for n, k in zip(lengths, labels, strict=True)]
  episodes[0][0] = 1.0
  problem = series.label_episodes(episodes, labels)
  assert problem.resets is not None
  assert np.flatnonzero(problem.resets)[:5].tolist() == [0, 2, 3, 6, 8]
  ends = np.flatnonzero(np.isfinite(problem.targets))
  assert ends[:4].tolist() == [1, 2, 5, 7]
  assert problem.truth[ends].tolist() == labels.tolist()
  assert problem.baselines['last value'][ends].tolist() == [0, *labels[:-1]]
  # The mean of class 0 is 0.5 at first, and all labels have been seen after three.
  assert problem.baselines['nearest mean'][ends].tolist() == [0, 0, 1, *labels[3:]]
  assert problem.error(problem.truth, problem.test) == 0
  assert problem.classes == 3


def test_characters_by_hand() -> None:
  """What usually followed is counted from the past alone."""
  problem = series.follow_characters(np.array([0, 1, 0, 2, 0, 2, 0, 1]), size=3)
  np.testing.assert_array_equal(problem.inputs.argmax(1), [0, 1, 0, 2, 0, 2, 0])
  assert problem.baselines['usual after 1'].tolist() == [0, 0, 1, 0, 1, 0, 2]
  # After 0 0, 0 1, 1 0, 0 2, 2 0, 0 2, 2 0.
  assert problem.baselines['usual after 2'].tolist() == [0, 0, 0, 0, 0, 0, 2]


@pytest.mark.parametrize(('best', 'tried'), [(3e-3, 3), (0.03, 5), (1e-5, 7)])
def test_rates_are_tried_until_the_best_is_inside(best: float, tried: int) -> None:
  """The chosen one runs with all seeds, and those beside it have been tried."""
  problem = make_problem(np.random.default_rng(0).normal(size=50), season=2)
  rates = set()

  def run(rate: float, seed: int) -> Forecast:
    rates.add(rate)
    return Forecast(rate, seed, problem.truth + abs(np.log(rate / best)))

  forecasts = systems.choose_rate(run, problem, seeds=4)
  assert [forecast.seed for forecast in forecasts] == [0, 1, 2, 3]
  assert {forecast.setting for forecast in forecasts} == {best}
  assert len(rates) == tried


def test_least_squares_finds_a_linear_rule() -> None:
  """A series that its last two changes determine is forecast without error."""
  values = np.empty(200)
  values[:3] = 0.0, 1.0, 0.5
  for t in range(3, 200):
    values[t] = values[t - 1] + 0.9 * (values[t - 1] - values[t - 2])
    values[t] -= 0.9 * (values[t - 2] - values[t - 3])
  problem = make_problem(values, season=2)
  runs = systems.run_linear(problem)
  errors = [problem.error(run.values, problem.test) for run in runs]
  assert min(errors) < 0.01 * problem.error(
    problem.baselines['last value'], problem.test
  )


@pytest.fixture
def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
  """The script with one short stream and one network."""
  values = np.sin(np.arange(120.0))
  source = series.Source('numpy', lambda folder: make_problem(values, season=6))
  monkeypatch.setitem(series.SOURCES, 'brent', source)
  monkeypatch.setattr(systems, 'SYSTEMS', (systems.System(nn.ElmanRNN, 4),))
  monkeypatch.setattr(systems, 'RATES', (systems.FIRST_RATE,))


@pytest.mark.usefixtures('one_stream')
def test_the_table_is_collected(tmp_path: Path, capsys: Any) -> None:
  """The command writes a report that joins the results, a row per system."""
  runs = tmp_path / 'runs'
  config = script.Config(
    streams=('brent',), systems=('baselines', 'learner'), seeds=2, workdir=str(runs)
  )
  script.main(config)
  # Each line is told as it is made, and again in the table.
  assert capsys.readouterr().out.count('ElmanRNN, S=4, none') == 2
  lines = files.read_json(runs / 'stream.json')['lines']
  assert [line['seeds'] for line in lines] == [1, 1, 1, 1, 2]
  assert lines[-1]['interval'] > 0
  assert collect_folder(runs, 'stream', Origin(), tmp_path) == len(lines)
  rows = store.load('stream', tmp_path).rows
  assert {row.settings['system'] for row in rows} >= {'last value'}


@pytest.mark.usefixtures('one_stream')
def test_networks_are_chosen_by_their_names(tmp_path: Path) -> None:
  """In capitals as they are; the command ends at once if no name fits."""
  config = script.Config(
    streams=('brent',),
    systems=('learner',),
    networks=('Elman*',),
    workdir=str(tmp_path),
  )
  script.main(dataclasses.replace(config, seeds=1))
  [line] = files.read_json(tmp_path / 'stream.json')['lines']
  assert line['system'] == 'ElmanRNN, S=4, none'
  with pytest.raises(UserError, match='leave nothing to compare'):
    script.main(dataclasses.replace(config, seeds=1, networks=('elman*',)))


@pytest.mark.usefixtures('one_stream')
def test_a_stopped_comparison_goes_on(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
  """Lines of an earlier command in the folder stay, and are not measured again; those
  of another number of seeds are refused.
  """
  config = script.Config(
    streams=('brent',), systems=('baselines',), seeds=1, workdir=str(tmp_path)
  )
  script.main(config)
  before = files.read_json(tmp_path / 'stream.json')['lines']
  capsys.readouterr()
  monkeypatch.setattr(systems, 'run_linear', None)
  script.main(dataclasses.replace(config, systems=('baselines', 'learner')))
  printed = capsys.readouterr().out
  assert [line for line in printed.splitlines() if ': error' in line] == [
    line for line in printed.splitlines() if line.startswith('brent, ElmanRNN')
  ]
  after = files.read_json(tmp_path / 'stream.json')['lines']
  assert after[:-1] == before
  assert after[-1]['system'] == 'ElmanRNN, S=4, none'
  with pytest.raises(UserError, match=r'--seeds must be 1, .* got 2\.'):
    script.main(dataclasses.replace(config, seeds=2))
  files.write_json(tmp_path / 'stream.json', {'lines': before})
  with pytest.raises(UserError, match=r'does not say how many seeds .* --workdir'):
    script.main(config)


def test_the_learner_beats_last_and_seasonal_value_on_temperatures(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """On the hourly temperatures of San Francisco, after half of their year."""
  source = series.SOURCES['sf-temps']
  folder = source.folder('')
  if folder is None:
    pytest.skip('vega_datasets is not installed.')
  problem = source.read(folder)
  monkeypatch.setattr(systems, 'RATES', (1e-3,))
  monkeypatch.setattr(systems, 'FIRST_RATE', 1e-3)
  [forecast] = systems.run_learner(systems.System(nn.GRU, 1), problem, seeds=1)
  error = problem.error(forecast.values, problem.test)
  for name in ('last value', 'value a season ago'):
    assert error < 0.9 * problem.error(problem.baselines[name], problem.test)
