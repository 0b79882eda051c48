"""Problems that tell whether a method carries credit across windows.

Each function draws sequences with NumPy, time-major. The sequences of a problem are
either episodes, which are independent, or parts of one stream that never ends.
"""

from collections.abc import Callable
import csv
import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.core.flags import UserError
import fptt_jax

LAGS = (6, 10)
"""Lags t1 and t2 of the stream of coin flips, in steps."""

RECALL_FEATURES = 32
"""Numbers that are shown at the first step of a recall."""

SUNSPOTS = ('statsmodels', 'datasets/sunspots/sunspots.csv')
"""Package and path of the yearly numbers of sunspots. The package is not imported."""

LAST_TRAINING_YEAR = 1920
"""Years of sunspots up to this one are trained on, and later ones tested on."""

BURN_IN = 200
"""Steps of a dynamical system that are dropped, in which it reaches its attractor."""

LEAD = 50
"""Steps of a series that a network reads before its forecasts are scored."""

Moments = tuple[float | tuple[float, ...], float | tuple[float, ...]]
"""Mean and standard deviation, of one number or of several."""

MOMENTS: dict[str, Moments] = {
  'henon': (0.2570, 0.7209),
  'mackey_glass': (0.9253, 0.2354),
  'lorenz': ((0.0, 0.0, 23.55), (7.925, 9.012, 8.623)),
}
"""Moments of each system in 20,000 steps of 64 series."""

Draw = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]
"""(random numbers, T, B) -> inputs [n, B, D] and targets. If n < T, zeros follow."""


class Problem(NamedTuple):
  """A problem and what its numbers mean.

  Attributes:
    about: one line for --help and the report.
    draw: draws T steps of B sequences.
    features: D.
    outputs: outputs of the network per step.
    make_loss: () -> the loss.
    is_stream: whether sequences go on where the one before ended. Otherwise each is an
      episode with one target at its end.
    score: the loss in words.
    levels: the losses of known predictors, by what they know.
    draw_test: draws the test data, for problems whose test data differ from what they
      train on.
    lead: steps before the test data that are read and not scored. A stream that goes on
      has no first step, and its network never learns how to begin.
  """

  about: str
  draw: Draw
  features: int
  outputs: int
  make_loss: Callable[[], fptt_jax.Loss]
  is_stream: bool
  score: str
  levels: dict[str, float]
  draw_test: Draw | None = None
  lead: int = 0


def draw_lags(
  rng: np.random.Generator, num_steps: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draw coin flips whose labels depend on two earlier flips.

  A label is 1 with probability 1/2 + x[t - t1]/2 - x[t - t2]/4, for fair flips x.

  Returns:
    Flips float32 [T, B, 1] and labels int32 [T, B].

  References:
    Pitis, "Recurrent Neural Networks in Tensorflow I", 2016; Marschall, Cho and Savin,
    JMLR 2020.
  """
  first, second = LAGS
  # Labels of the first steps depend on flips that the network has not seen.
  flips = rng.integers(0, 2, (second + num_steps, batch_size)).astype(np.float32)
  chance = (
    0.5
    + 0.5 * flips[second - first : second - first + num_steps]
    - 0.25 * flips[:num_steps]
  )
  labels = rng.random(chance.shape) < chance
  return flips[second:, :, None], labels.astype(np.int32)


def lag_levels() -> dict[str, float]:
  """Return the cross-entropy of predictors that know none, one or both of the flips."""
  chances = {(a, b): 0.5 + 0.5 * a - 0.25 * b for a in (0, 1) for b in (0, 1)}
  given_first = [(chances[a, 0] + chances[a, 1]) / 2 for a in (0, 1)]
  return {
    'neither lag': _entropy([sum(chances.values()) / 4]),
    'first lag': _entropy(given_first),
    'both lags': _entropy(list(chances.values())),
  }


def _entropy(chances: list[float]) -> float:
  """Return the mean entropy of coins, in nats."""
  terms = [
    -sum(p * math.log(p) for p in (chance, 1 - chance) if p > 0) for chance in chances
  ]
  return sum(terms) / len(terms)


def draw_recall(
  rng: np.random.Generator, num_steps: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draw numbers that are shown at the first step, one of which is asked for.

  All later inputs are 0. A network with far fewer units than numbers must learn at the
  first step which of them to keep. The error at the last step has to reach the weights'
  effect at the first one for that.

  Returns:
    Inputs float32 [1, B, 32] of mean 0 and variance 1, without the steps of zeros, and
    targets float32 [B], uniform in [0, 1]: the first number before it was normalized.
  """
  del num_steps
  values = rng.random((batch_size, RECALL_FEATURES), np.float32)
  return (values[None] - 0.5) * math.sqrt(12), values[:, 0]


def draw_henon(
  rng: np.random.Generator, num_steps: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draw series of the Hénon map, x' = 1 - 1.4 x² + 0.3 x_before, to predict x'."""
  before = rng.uniform(-0.1, 0.1, batch_size)
  x = rng.uniform(-0.1, 0.1, batch_size)
  series = []
  for _ in range(BURN_IN + num_steps + 1):
    before, x = x, 1 - 1.4 * x * x + 0.3 * before
    series.append(x[:, None])
  return _one_step_ahead(series, MOMENTS['henon'])


def draw_mackey_glass(
  rng: np.random.Generator, num_steps: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draw Mackey-Glass series with a delay of 17, at one Euler step per unit of time.

  The equation is dx/dt = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x.
  """
  delay = 17
  series = list(rng.uniform(0.8, 1.3, (delay + 1, batch_size, 1)))
  for _ in range(BURN_IN + num_steps + 1):
    x = series[-1]
    late = series[-1 - delay]
    series.append(x + 0.2 * late / (1 + late**10) - 0.1 * x)
  return _one_step_ahead(series[delay + 1 :], MOMENTS['mackey_glass'])


def draw_lorenz(
  rng: np.random.Generator, num_steps: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draw trajectories of the Lorenz system, of which all three numbers are seen.

  The steps are 0.02 long, by the classical Runge-Kutta method.
  """

  def slope(state: np.ndarray) -> np.ndarray:
    x, y, z = state.T
    return np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], -1)

  step = 0.02
  state = rng.normal(size=(batch_size, 3)) + np.array([0.0, 0.0, 25.0])
  series = []
  for _ in range(BURN_IN + num_steps + 1):
    k1 = slope(state)
    k2 = slope(state + step / 2 * k1)
    k3 = slope(state + step / 2 * k2)
    k4 = slope(state + step * k3)
    state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    series.append(state)
  return _one_step_ahead(series, MOMENTS['lorenz'])


def draw_sunspots(
  rng: np.random.Generator, num_steps: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draw years of sunspots up to 1920, again and again, each row from another year."""
  years, inputs, targets = _read_sunspots()
  count = int((years <= LAST_TRAINING_YEAR).sum())
  starts = rng.integers(0, count, batch_size)
  places = (starts + np.arange(num_steps)[:, None]) % count
  return inputs[places, None], targets[places, None]


def draw_later_sunspots(
  rng: np.random.Generator, num_steps: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return the years of sunspots after 1920, one row, and `LEAD` years before them."""
  del rng, num_steps, batch_size
  years, inputs, targets = _read_sunspots()
  later = years > LAST_TRAINING_YEAR - LEAD
  return inputs[later, None, None], targets[later, None, None]


def _read_sunspots() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return years, the sunspots of each, and of the next year, all [n].

  Over the training years they have mean 0 and variance 1.

  Raises:
    UserError: the package with the file is not installed.
  """
  package, place = SUNSPOTS
  spec = importlib.util.find_spec(package)
  if spec is None or spec.origin is None:
    raise UserError(
      f'--task=sunspots reads a file of {package}: pip install {package}.'
    )
  with (Path(spec.origin).parent / place).open(newline='') as file:
    _, *lines = csv.reader(file)
  years, counts = np.array(lines, np.float32).T
  known = counts[years <= LAST_TRAINING_YEAR]
  counts = (counts - known.mean()) / known.std()
  return years[:-1], counts[:-1], counts[1:]


def _one_step_ahead(
  series: list[np.ndarray], moments: Moments
) -> tuple[np.ndarray, np.ndarray]:
  """Return a series of T + 1 arrays [B, D] as inputs and as the next values.

  Each of the D numbers is normalized by its mean and deviation in the long run, so that
  a mean squared error is the share of the variance that is not predicted. A draw's own
  moments would move with the draw, and a map learned on one would not fit another.

  Args:
    series: the steps, the burn-in first.
    moments: mean and standard deviation.

  Returns:
    Inputs and targets, both float32 [T, B, D].
  """
  mean, deviation = map(np.array, moments)
  values = ((np.stack(series[BURN_IN:]) - mean) / deviation).astype(np.float32)
  return values[:-1], values[1:]


def _series(
  about: str,
  draw: Draw,
  features: int,
  draw_test: Draw | None = None,
  error_of_mean: float = 1.0,
) -> Problem:
  """Return the problem of predicting a series one step ahead.

  Args:
    about: what is predicted.
    draw: draws the stream.
    features: D.
    draw_test: draws the test data, where it is another function.
    error_of_mean: test error of the mean of the training data.
  """
  return Problem(
    about,
    draw,
    features,
    features,
    fptt_jax.losses.sequence_regression,
    is_stream=True,
    score='normalized mean squared error',
    levels={'mean of the training data': error_of_mean},
    draw_test=draw_test,
    lead=LEAD,
  )


PROBLEMS = {
  'lags': Problem(
    f'labels that depend on the flips {LAGS[0]} and {LAGS[1]} steps before',
    draw_lags,
    features=1,
    outputs=2,
    make_loss=lambda: fptt_jax.losses.sequence_classification(2),
    is_stream=True,
    score='cross-entropy, nats',
    levels=lag_levels(),
  ),
  'recall': Problem(
    f'one of the {RECALL_FEATURES} numbers of the first step, asked for at the last',
    draw_recall,
    features=RECALL_FEATURES,
    outputs=1,
    make_loss=fptt_jax.losses.terminal_regression,
    is_stream=False,
    score='mean squared error',
    levels={'chance': 1 / 12},
  ),
  'henon': _series('the next value of the Hénon map', draw_henon, 1),
  'mackey_glass': _series(
    'the next value of Mackey-Glass series', draw_mackey_glass, 1
  ),
  'lorenz': _series('the next state of the Lorenz system', draw_lorenz, 3),
  'sunspots': _series(
    "the next year's sunspots",
    draw_sunspots,
    1,
    draw_test=draw_later_sunspots,
    # The Sun has been more active since.
    error_of_mean=2.53,
  ),
}
"""Problems by the value of --task."""
