"""Search for learning rates and momenta of the adding problem on a declared grid.

Each method has its own search. It starts at `START` and moves to the first neighbor
that is better. The neighbors are the other momentum, the next two higher rates and the
next lower rate. The search ends when all neighbors have been tried and none is better,
so the chosen rate lies inside the rates that were tried. Two higher rates are tried,
because a better rate has been seen above one that is a little worse. Where nothing has
learned, the search goes on.
"""

from collections.abc import Callable, Iterator
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""The grid's learning rates."""


MOMENTA = (0.0, 0.9)
"""The grid's values of Adam's b1."""


SEED = 1000
"""Seed of the draws on which tuning trains and evaluates; no reported run uses it."""


FILE = Path(__file__).with_name('add_task_rates.json')
"""Table that `experiments.add_task` reads, a copy of a file that its --tune wrote."""


SETTINGS = (
  *('seq_len', 'hidden', 'batch_size', 'batches', 'num_windows', 'decay', 'clip'),
  *('alpha', 'beta', 'kappa', 'forget_bias', 'inner_steps', 'weight_decay'),
  *('influence', 'coupling', 'averaging', 'linear_scale', 'gradient_estimate'),
  *('momentum_windows', 'bootstrap', 'alpha_warmup', 'clip_regularizer'),
  *('truncation_steps', 'optimizer', 'products', 'evaluate_at', 'average_horizon'),
  *('on_nonfinite', 'eval_every', 'test_size'),
)
"""Settings of the adding problem on which the best rate depends."""


class Rates(NamedTuple):
  """One point of the grid.

  Attributes:
    lr: learning rate.
    momentum: decay of the first moment.
  """

  lr: float
  momentum: float


START = Rates(3e-3, 0.9)
"""First point of the search."""


def neighbors(point: Rates) -> Iterator[Rates]:
  """Yield the neighbors of a point of the grid, in the order of the search."""
  for momentum in MOMENTA:
    if momentum != point.momentum:
      yield Rates(point.lr, momentum)
  place = RATES.index(point.lr)
  for other in (place + 1, place + 2, place - 1):
    if 0 <= other < len(RATES):
      yield Rates(RATES[other], point.momentum)


def search(
  score: Callable[[Rates], float | None], chance: float = math.inf
) -> tuple[Rates, dict[Rates, float | None]]:
  """Search the grid for a point that is better than its neighbors.

  The search goes on upward while no point is better than chance, and downward while all
  runs diverge.

  Args:
    score: (point) -> score, lower is better; None if the run diverged.
    chance: the score without any learning.

  Returns:
    (the point, the scores of all points that were tried).
  """
  best = START
  tried = {best: score(best)}
  candidates = neighbors(best)
  while True:
    # A point has a score already if it is a neighbor of an earlier best one.
    point = next(candidates, None) or _beyond(best, tried, chance)
    if point is None:
      return best, tried
    if point not in tried:
      tried[point] = score(point)
    if is_better(tried[point], tried[best]):
      best = point
      candidates = neighbors(best)


def _beyond(
  best: Rates, tried: dict[Rates, float | None], chance: float
) -> Rates | None:
  """Return the next point where nothing has learned so far.

  Args:
    best: the best point.
    tried: scores of all points that were tried.
    chance: the score without any learning.

  Returns:
    The next higher rate if the best point is at chance, the next lower one if it
    diverged; None if it has learned, or at the end of the grid.
  """
  if has_learned(tried[best], chance):
    return None
  places = [RATES.index(point.lr) for point in tried if point.momentum == best.momentum]
  place = min(places) - 1 if tried[best] is None else max(places) + 1
  return Rates(RATES[place], best.momentum) if 0 <= place < len(RATES) else None


def has_learned(score: float | None, chance: float) -> bool:
  """Return whether a score is clearly better than chance.

  Args:
    score: the score; None if the run diverged.
    chance: the score without any learning, around which draws scatter.
  """
  return score is not None and score < 0.9 * chance


def is_better(score: float | None, other: float | None) -> bool:
  """Return whether a score is lower than another; diverged runs are the worst."""
  return score is not None and (other is None or score < other)


def is_inside(point: Rates, tried: dict[Rates, float | None]) -> bool:
  """Return whether lower and higher rates were tried at the point's momentum."""
  # If not, a better rate may lie beyond the grid, and the report says so.
  beside = [other.lr for other in tried if other.momentum == point.momentum]
  return min(beside) < point.lr < max(beside)


def entry(
  best: Rates, tried: dict[Rates, float | None], chance: float
) -> dict[str, Any]:
  """Return the table's entry for one method.

  Args:
    best: the chosen point.
    tried: scores of all points that were tried.
    chance: the score without any learning.
  """
  points = sorted(tried, key=lambda point: (point.momentum, point.lr))
  return {
    **best._asdict(),
    'inside': is_inside(best, tried),
    'learned': has_learned(tried[best], chance),
    'tried': [{**point._asdict(), 'score': tried[point]} for point in points],
  }


class Table(NamedTuple):
  """Table of chosen rates and momenta.

  Attributes:
    settings: settings of the adding problem during the search.
    methods: the chosen point of each method.
    unsettled: methods whose chosen rate is the lowest or highest that was tried.
    unlearned: methods that were no better than chance, or diverged, at all rates.
  """

  settings: dict[str, Any]
  methods: dict[str, Rates]
  unsettled: tuple[str, ...]
  unlearned: tuple[str, ...]


def table(config: Any, methods: dict[str, Any]) -> dict[str, Any]:
  """Return the content of the table's file.

  Args:
    config: settings of the search.
    methods: an :func:`entry` per method.
  """
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


def saved_entries(config: Any, path: Path) -> dict[str, Any]:
  """Return the entries by method that an earlier search of these settings wrote.

  Args:
    config: settings of the search.
    path: the table's file; without it, or with one of other settings, there are none.
  """
  if not path.exists():
    return {}
  content = json.loads(path.read_text())
  is_same = content['settings'] == table(config, {})['settings']
  found: dict[str, Any] = content['methods'] if is_same else {}
  return found


def read_table(path: Path = FILE) -> Table:
  """Read the table of chosen rates from a file."""
  content = json.loads(path.read_text())
  methods = content['methods'].items()
  points = {name: Rates(row['lr'], row['momentum']) for name, row in methods}
  unsettled = tuple(name for name, row in methods if not row['inside'])
  unlearned = tuple(name for name, row in methods if not row['learned'])
  return Table(content['settings'], points, unsettled, unlearned)
