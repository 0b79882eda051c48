"""Real streams that installed packages bring along, and a text, as problems.

No package is imported: the files that it brought are read.
"""

from collections.abc import Callable, Iterator
import csv
import dataclasses
import datetime
import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np

from experiments import data

WARM_UP_SEASONS = 3
"""Seasons at the start that set the scales and are not scored."""


TUNING_SHARE = 0.3
"""Share of the scored steps, the first ones, that settings are chosen by."""


GLUCOSE_STEPS = 12_000
"""Steps of five minutes of the glucose stream, six weeks."""


RESTART = 12
"""Missing steps, an hour, after which the glucose stream starts anew."""


CHARACTERS = 30_000
"""Characters of the text stream."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """A stream in which the next value or the label of a step is to be predicted.

  Attributes:
    inputs: float32 [n, D], NaN where the sensor was silent.
    targets: float32 [n], what a network is to predict: the next change over `scale`, or
      the number of a class. NaN where it is not known.
    values: [n], the newest known value at each step; zeros where classes are predicted.
    truth: [n], the next value or the class, NaN where it is not known.
    baselines: forecasts [n] by name; the first one is that of the last value or class.
    scale: size of the changes in the warm-up.
    tuning: bool [n], the steps that settings are chosen by.
    test: bool [n], the steps that are reported.
    classes: number of classes, or 0 where values are predicted.
    resets: bool [n], whether the stream starts anew before a step; None for never.
  """

  inputs: np.ndarray
  targets: np.ndarray
  values: np.ndarray
  truth: np.ndarray
  baselines: dict[str, np.ndarray]
  scale: float
  tuning: np.ndarray
  test: np.ndarray
  classes: int = 0
  resets: np.ndarray | None = None

  def error(self, forecast: np.ndarray, steps: np.ndarray) -> float:
    """Return the mean absolute error of a forecast [n] over some steps, bool [n].

    Of classes it is the share of wrong ones.
    """
    if self.classes:
      return float((forecast != self.truth)[steps].mean())
    return float(np.abs(forecast - self.truth)[steps].mean())


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a stream comes from.

  Attributes:
    package: the package that holds the files; '' for the text.
    read: (folder of the package, or of the text) -> the problem.
  """

  package: str
  read: Callable[[Path], Problem]

  def folder(self, data_dir: str) -> Path | None:
    """Return the folder of the files, or None if there is none."""
    if not self.package:
      return Path(data_dir) if data_dir else None
    found = importlib.util.find_spec(self.package)
    if found is None:
      return None
    return Path(next(iter(found.submodule_search_locations or ())))


def read_column(path: str, column: int, season: int, folder: Path) -> Problem:
  """Read a column of a CSV file as a problem.

  Args:
    path: path of the file in the folder.
    column: number of the column with the values.
    season: steps of a season.
    folder: the folder.
  """
  with (folder / path).open() as file:
    _, *rows = csv.reader(file)
  texts = [row[column] for row in rows]
  return make_problem(np.array([float(text or 'nan') for text in texts]), season)


def read_glucose(folder: Path) -> Problem:
  """Read the glucose of a patient, which starts anew after each hour of silence."""
  with gzip.open(folder / '_data/CGM.csv.gz', 'rt') as file:
    _, *rows = csv.reader(file)
  times = [datetime.datetime.fromisoformat(row[1]) for row in rows]
  minutes = np.array([(time - times[0]).total_seconds() / 60 for time in times])
  places = np.rint(minutes / 5).astype(int)
  levels = np.array([float(row[2] or 'nan') for row in rows])
  kept = places < GLUCOSE_STEPS
  values = np.full(GLUCOSE_STEPS, np.nan)
  values[places[kept]] = levels[kept]
  day = 24 * 12
  problem = make_problem(values, day)
  # A step of the problem sees the value `day + 1` places later.
  resets = starts_anew(np.isfinite(values))[day + 1 : -1]
  return dataclasses.replace(problem, resets=resets)


def starts_anew(known: np.ndarray) -> np.ndarray:
  """Return bool [T], whether a value follows a long silence, given bool [T]."""
  steps = np.arange(len(known))
  last = np.maximum.accumulate(np.where(known, steps, 0))
  before = np.concatenate([[0], last[:-1]])
  return known & (steps - before > RESTART)


def read_vowels(folder: Path) -> Problem:
  """Read utterances whose speaker is to be named at their end.

  Each utterance is a part of the stream that starts anew, of 7 to 29 steps.
  """
  path = folder / 'datasets/data/JapaneseVowels'
  utterances: list[np.ndarray] = []
  speakers: list[int] = []
  for name in ('JapaneseVowels_TRAIN.ts', 'JapaneseVowels_TEST.ts'):
    _, text = (path / name).read_text().split('@data\n')
    for line in text.split():
      *channels, speaker = line.split(':')
      rows = [np.array(channel.split(','), float) for channel in channels]
      utterances.append(np.stack(rows, 1))
      speakers.append(int(speaker) - 1)
  # The files are sorted by speaker.
  order = np.random.default_rng(0).permutation(len(speakers))
  return label_episodes([utterances[i] for i in order], np.array(speakers)[order])


def label_episodes(episodes: list[np.ndarray], labels: np.ndarray) -> Problem:
  """Make a problem of episodes [n, D] whose label is wanted at their last step."""
  steps = np.concatenate(episodes)
  lengths = np.array([len(episode) for episode in episodes])
  ends = np.cumsum(lengths) - 1
  warm = len(episodes) // 10
  of_warm = steps[: ends[warm - 1] + 1]
  truth = np.full(len(steps), np.nan)
  truth[ends] = labels
  resets = np.zeros(len(steps), bool)
  resets[ends - lengths + 1] = True
  means = np.stack([episode.mean(0) for episode in episodes])
  forecasts = {
    'last value': np.concatenate([[0], labels[:-1]]),
    'nearest mean': np.array(list(nearest_means(means, labels))),
  }
  baselines = {name: np.zeros(len(steps)) for name in forecasts}
  for name, forecast in forecasts.items():
    baselines[name][ends] = forecast
  scored = np.isfinite(truth) & (np.arange(len(steps)) > ends[warm - 1])
  tuning, test = split_scored(scored)
  return Problem(
    inputs=((steps - of_warm.mean(0)) / of_warm.std(0)).astype(np.float32),
    targets=truth.astype(np.float32),
    values=np.zeros(len(steps)),
    truth=truth,
    baselines=baselines,
    scale=1.0,
    tuning=tuning,
    test=test,
    classes=int(labels.max()) + 1,
    resets=resets,
  )


def nearest_means(points: np.ndarray, labels: np.ndarray) -> Iterator[int]:
  """Yield, for each point, the label whose points before it have the nearest mean."""
  sums = np.zeros((labels.max() + 1, points.shape[1]))
  counts = np.zeros(len(sums))
  for point, label in zip(points, labels, strict=True):
    seen = np.flatnonzero(counts)
    if len(seen):
      distances = np.square(sums[seen] / counts[seen, None] - point).sum(1)
      yield int(seen[distances.argmin()])
    else:
      yield 0
    sums[label] += point
    counts[label] += 1


def read_characters(folder: Path) -> Problem:
  """Read the first characters of Penn Treebank, the next of which is wanted."""
  text = data.load_text('ptb_chars', folder)
  return follow_characters(text.train[: CHARACTERS + 1], len(text.vocabulary))


def follow_characters(ids: np.ndarray, size: int) -> Problem:
  """Make a problem of characters, int [n + 1] below `size`, from one to the next."""
  now, following = ids[:-1], ids[1:]
  scored = np.arange(len(now)) >= len(now) // 10
  tuning, test = split_scored(scored)
  pairs = np.concatenate([[0], now[:-1]]) * size + now
  return Problem(
    inputs=np.eye(size, dtype=np.float32)[now],
    targets=following.astype(np.float32),
    values=np.zeros(len(now)),
    truth=following,
    baselines={
      'last value': now,
      'usual after 1': usual_after(now, following, size),
      'usual after 2': usual_after(pairs, following, size),
    },
    scale=1.0,
    tuning=tuning,
    test=test,
    classes=size,
  )


def usual_after(contexts: np.ndarray, following: np.ndarray, size: int) -> np.ndarray:
  """Return what followed each context most often before, [n]; 0 if nothing did."""
  counts: dict[int, np.ndarray] = {}
  forecast = np.zeros(len(contexts), int)
  for step, (context, label) in enumerate(
    zip(contexts.tolist(), following.tolist(), strict=True)
  ):
    seen = counts.setdefault(context, np.zeros(size, int))
    forecast[step] = seen.argmax()
    seen[label] += 1
  return forecast


SOURCES = {
  'sf-temps': Source(
    'vega_datasets', functools.partial(read_column, '_data/sf-temps.csv', 0, 24)
  ),
  'water-flow': Source(
    'river', functools.partial(read_column, 'datasets/water-flow.csv', 1, 24)
  ),
  'brent': Source(
    'river',
    functools.partial(read_column, 'drift/datasets/brent_crude_oil.csv', 1, 5),
  ),
  'co2': Source(
    'statsmodels', functools.partial(read_column, 'datasets/co2/co2.csv', 1, 52)
  ),
  'glucose': Source('bokeh_sampledata', read_glucose),
  'vowels': Source('aeon', read_vowels),
  'ptb-characters': Source('', read_characters),
}
"""Streams by name: hourly temperatures, hourly flow of water, daily prices of oil,
weekly carbon dioxide with gaps, glucose each five minutes with restarts, utterances of
unequal length whose speaker is wanted, and the characters of a text.
"""


def make_problem(values: np.ndarray, season: int) -> Problem:
  """Make a problem of values [T], NaN where one is missing.

  Its inputs are the last change, the change that followed a season ago, and the
  difference to a season ago.
  """
  known = fill_forward(values)
  now = np.arange(season + 1, len(values) - 1)
  change = values[now] - values[now - 1]
  seasonal = values[now + 1 - season] - values[now - season]
  since = values[now] - values[now - season]
  truth = values[now + 1]
  warm = WARM_UP_SEASONS * season
  scale = float(np.nanstd(change[:warm]))
  columns = [change / scale, seasonal / scale, since / np.nanstd(since[:warm])]
  tuning, test = split_scored(np.isfinite(truth) & (np.arange(len(now)) >= warm))
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
    tuning=tuning,
    test=test,
  )


def split_scored(scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return the steps that settings are chosen by and those reported, bool [n] each."""
  first = np.searchsorted(np.cumsum(scored), TUNING_SHARE * scored.sum())
  before = np.arange(len(scored)) < first
  return scored & before, scored & ~before


def fill_forward(values: np.ndarray) -> np.ndarray:
  """Return values [T] with the last known one in place of NaN."""
  places = np.where(np.isfinite(values), np.arange(len(values)), 0)
  return values[np.maximum.accumulate(places)]
