"""Real streams that installed packages bring along, as problems of one-step forecasts.

No package is imported: their CSV files are read.
"""

import csv
import dataclasses
import importlib.util
from pathlib import Path

import numpy as np

WARM_UP_SEASONS = 3
"""Seasons at the start that set the scales and are not scored."""


TUNING_SHARE = 0.3
"""Share of the scored steps, the first ones, that settings are chosen by."""


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a stream comes from.

  Attributes:
    package: the package that holds the file.
    path: path of the CSV file in the package.
    column: number of the column with the values.
    season: steps of a season.
  """

  package: str
  path: str
  column: int
  season: int


SOURCES = {
  'sf-temps': Source('vega_datasets', '_data/sf-temps.csv', 0, 24),
  'water-flow': Source('river', 'datasets/water-flow.csv', 1, 24),
  'brent': Source('river', 'drift/datasets/brent_crude_oil.csv', 1, 5),
  'co2': Source('statsmodels', 'datasets/co2/co2.csv', 1, 52),
}
"""Streams by name: hourly temperatures, hourly flow of water, daily prices of oil, and
weekly carbon dioxide with gaps.
"""


@dataclasses.dataclass(frozen=True)
class Problem:
  """A stream whose next change is to be predicted.

  Attributes:
    inputs: float32 [n, D], NaN where the sensor was silent: the last change, the change
      that followed a season ago, and the difference to a season ago.
    targets: float32 [n], the next change over `scale`, NaN where it is not known.
    values: [n], the newest known value at each step.
    truth: [n], the next value, NaN where it is not known.
    baselines: forecasts [n] by name.
    scale: size of the changes in the warm-up.
    tuning: bool [n], the steps that settings are chosen by.
    test: bool [n], the steps that are reported.
  """

  inputs: np.ndarray
  targets: np.ndarray
  values: np.ndarray
  truth: np.ndarray
  baselines: dict[str, np.ndarray]
  scale: float
  tuning: np.ndarray
  test: np.ndarray

  def error(self, forecast: np.ndarray, steps: np.ndarray) -> float:
    """Return the mean absolute error of a forecast [n] over some steps, bool [n]."""
    return float(np.abs(forecast - self.truth)[steps].mean())


def is_available(name: str) -> bool:
  """Return whether the package that holds a stream is installed."""
  return importlib.util.find_spec(SOURCES[name].package) is not None


def read(name: str) -> Problem:
  """Read a stream and make a problem of it.

  Args:
    name: a name in `SOURCES` whose package is installed.
  """
  source = SOURCES[name]
  found = importlib.util.find_spec(source.package)
  assert found is not None
  folder = next(iter(found.submodule_search_locations or ()))
  with (Path(folder) / source.path).open() as file:
    _, *rows = csv.reader(file)
  texts = [row[source.column] for row in rows]
  return make_problem(np.array([float(text or 'nan') for text in texts]), source.season)


def make_problem(values: np.ndarray, season: int) -> Problem:
  """Make a problem of values [T], NaN where one is missing."""
  known = fill_forward(values)
  now = np.arange(season + 1, len(values) - 1)
  change = values[now] - values[now - 1]
  seasonal = values[now + 1 - season] - values[now - season]
  since = values[now] - values[now - season]
  truth = values[now + 1]
  warm = WARM_UP_SEASONS * season
  scale = float(np.nanstd(change[:warm]))
  columns = [change / scale, seasonal / scale, since / np.nanstd(since[:warm])]
  scored = np.isfinite(truth) & (np.arange(len(now)) >= warm)
  first = np.searchsorted(np.cumsum(scored), TUNING_SHARE * scored.sum())
  before = np.arange(len(now)) < first
  return Problem(
    inputs=np.stack(columns, -1).astype(np.float32),
    targets=((truth - values[now]) / scale).astype(np.float32),
    values=known[now],
    truth=truth,
    baselines={
      'last value': known[now],
      'value a season ago': known[now + 1 - season],
      'change a season ago': known[now] + known[now + 1 - season] - known[now - season],
    },
    scale=scale,
    tuning=scored & before,
    test=scored & ~before,
  )


def fill_forward(values: np.ndarray) -> np.ndarray:
  """Return values [T] with the last known one in place of NaN."""
  places = np.where(np.isfinite(values), np.arange(len(values)), 0)
  return values[np.maximum.accumulate(places)]
