"""Learning rates and momenta of the adding problem: a declared grid, searched per
method.

The search starts at `START` and moves to the first neighbor that is better: the other
momentum, the next two higher rates, the next lower rate. It ends when every neighbor
has been tried and none is better, so the chosen rate lies inside the rates that were
tried. Two higher rates, because a better rate has been seen above one that is a little
worse.
"""

from collections.abc import Callable, Iterator
import json
from pathlib import Path
from typing import Any, NamedTuple

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""The grid's learning rates."""


MOMENTA = (0.0, 0.9)
"""The grid's values of Adam's b1."""


SEED = 1000
"""Tuning trains and evaluates on draws of this seed, which no reported run uses."""


FILE = Path(__file__).with_name('add_task_rates.json')
"""The table that `experiments.add_task` reads, a copy of what its --tune wrote."""


SETTINGS = (
  *('seq_len', 'hidden', 'batch_size', 'batches', 'num_windows', 'decay', 'clip'),
  *('alpha', 'beta', 'kappa', 'forget_bias', 'inner_steps', 'weight_decay'),
)
"""Settings of the adding problem that the best rate is known to depend on."""


class Rates(NamedTuple):
  """One point of the grid.

  Attributes:
    lr: learning rate.
    momentum: decay of the first moment.
  """

  lr: float
  momentum: float


START = Rates(3e-3, 0.9)
"""The first point that is tried."""


def neighbors(point: Rates) -> Iterator[Rates]:
  """Yields the points beside one of the grid, in the order they are tried in."""
  for momentum in MOMENTA:
    if momentum != point.momentum:
      yield Rates(point.lr, momentum)
  place = RATES.index(point.lr)
  for other in (place + 1, place + 2, place - 1):
    if 0 <= other < len(RATES):
      yield Rates(RATES[other], point.momentum)


def search(
  score: Callable[[Rates], float | None],
) -> tuple[Rates, dict[Rates, float | None]]:
  """Searches the grid for a point that is better than its neighbors.

  Args:
    score: returns what a point came to, lower being better; None if it diverged.

  Returns:
    The point, and the scores of all points that were tried.
  """
  tried = {START: score(START)}
  best, is_settled = START, False
  while not is_settled:
    is_settled = True
    for point in neighbors(best):
      if point not in tried:
        tried[point] = score(point)
      if is_better(tried[point], tried[best]):
        best, is_settled = point, False
        break
  return best, tried


def is_better(score: float | None, other: float | None) -> bool:
  """Returns whether a score is lower than another one; a diverged run has the worst."""
  return score is not None and (other is None or score < other)


def is_inside(point: Rates, tried: dict[Rates, float | None]) -> bool:
  """Returns whether lower and higher rates were tried at the point's momentum."""
  beside = [other.lr for other in tried if other.momentum == point.momentum]
  return min(beside) < point.lr < max(beside)


def entry(best: Rates, tried: dict[Rates, float | None]) -> dict[str, Any]:
  """Returns what the table says of one method."""
  points = sorted(tried, key=lambda point: (point.momentum, point.lr))
  return {
    **best._asdict(),
    'inside': is_inside(best, tried),
    'tried': [{**point._asdict(), 'score': tried[point]} for point in points],
  }


class Table(NamedTuple):
  """What was chosen.

  Attributes:
    settings: the adding problem's settings that the search was made at.
    methods: the chosen point by method.
    unsettled: methods whose chosen rate is the lowest or highest that was tried.
  """

  settings: dict[str, Any]
  methods: dict[str, Rates]
  unsettled: tuple[str, ...]


def table(config: Any, methods: dict[str, Any]) -> dict[str, Any]:
  """Returns the file's content: how the rates were chosen, and an entry per method."""
  return {
    'command': 'python -m experiments.add_task --tune',
    'chosen_by': 'mean MSE over the last quarter of the evaluations, on draws of '
    'their own',
    'search': 'from the start to the first better neighbor, until none is better',
    'start': START._asdict(),
    'grid': {'lr': RATES, 'momentum': MOMENTA},
    'seed': SEED,
    'settings': {name: getattr(config, name) for name in SETTINGS},
    'methods': methods,
  }


def read_table(path: Path = FILE) -> Table:
  """Returns what a file's table says was chosen."""
  content = json.loads(path.read_text())
  methods = content['methods'].items()
  points = {name: Rates(row['lr'], row['momentum']) for name, row in methods}
  unsettled = tuple(name for name, row in methods if not row['inside'])
  return Table(content['settings'], points, unsettled)
