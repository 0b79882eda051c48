"""Tables of the tournament: each method against `tbptt` and `bptt`, task by task."""

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np

from experiments.core.comparison import Comparison, compare, holm
from experiments.paper import tournament
from experiments.paper.items import Score
from experiments.records.store import Row

RIVALS = ('tbptt', 'bptt')
"""Methods that all others are compared with."""


SOLVED = 1e-6
"""Loss below which a problem counts as solved, and differences as rounding."""


def by_task(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
  """Group rows by task and method, in the order of the declaration.

  Args:
    rows: rows of the final runs, one per seed. Unfinished ones are left out.
  """
  found: dict[str, dict[str, list[Row]]] = {}
  for arena in tournament.ARENAS:
    for contestant in tournament.contestants(arena):
      label = f'{arena.name}.{contestant.name}'
      chosen = sorted(
        (row for row in rows if row.line == label and row.status != 'unfinished'),
        key=lambda row: row.seed or 0,
      )
      if chosen:
        found.setdefault(arena.name, {})[contestant.name] = chosen
  return found


def is_complete(task: str, methods: Iterable[str]) -> bool:
  """Return whether all declared methods of a task are among some methods.

  Args:
    task: the task.
    methods: the methods that have ended.
  """
  arena = next(arena for arena in tournament.ARENAS if arena.name == task)
  declared = {contestant.name for contestant in tournament.contestants(arena)}
  return declared <= set(methods)


def losses(rows: Sequence[Row], score: Score) -> dict[int, float | None]:
  """Return the loss that is compared by seed, see `experiments.paper.tournament`.

  Args:
    rows: rows of one line.
    score: their score.

  Returns:
    Logarithms of losses, perplexities or shares of errors; None for diverged runs.
  """
  found: dict[int, float | None] = {}
  for row in rows:
    value = row.score(score.test)
    if value is not None and score.higher_is_better:
      value = 100 - value
    loss = None if value is None else math.log(max(value, SOLVED))
    found[row.seed or 0] = loss
  return found


def comparisons(
  methods: dict[str, list[Row]], score: Score, rival: str
) -> dict[str, tuple[Comparison, float | None]]:
  """Compare the methods of a task with one of them.

  Args:
    methods: rows by method.
    score: the score of the task.
    rival: the method that the others are compared with.

  Returns:
    By method, the comparison and its p-value after Holm's correction; {} if the rival
    has no rows.
  """
  if rival not in methods:
    return {}
  theirs = losses(methods[rival], score)
  found = {}
  for name, rows in methods.items():
    own = losses(rows, score)
    seeds = sorted(own.keys() & theirs.keys())
    if name != rival and seeds:
      found[name] = compare([own[s] for s in seeds], [theirs[s] for s in seeds])
  adjusted = holm([one.p_value for one in found.values()])
  return {
    name: (one, p) for (name, one), p in zip(found.items(), adjusted, strict=True)
  }


class Standing(NamedTuple):
  """A method of a task against `tbptt`.

  Attributes:
    ratio: geometric mean, over the seeds, of its loss over that of `tbptt`; None if a
      run of either diverged.
    low: lower end of the 95 % confidence interval of `ratio`.
    high: upper end.
    outcome: 'better', 'worse', or '' if p, after Holm's correction, is 0.05 or more.
  """

  ratio: float | None
  low: float | None
  high: float | None
  outcome: str


def standings(methods: dict[str, list[Row]], score: Score) -> dict[str, Standing]:
  """Return how each method of a task stands to `tbptt`.

  Args:
    methods: rows by method.
    score: the score of the task.
  """
  found = {}
  for name, (one, p_value) in comparisons(methods, score, 'tbptt').items():
    is_sure = p_value is not None and p_value < 0.05
    outcome = ('better' if one.is_better else 'worse') if is_sure else ''
    mean, half = one.difference, one.half_width
    if mean is None:
      found[name] = Standing(None, None, None, outcome)
    elif half is None:
      found[name] = Standing(math.exp(mean), None, None, outcome)
    else:
      ends = math.exp(mean - half), math.exp(mean + half)
      found[name] = Standing(math.exp(mean), *ends, outcome)
  return found


def at_equal_seconds(
  methods: dict[str, list[Row]], score: Score, costs: Mapping[str, float]
) -> dict[str, float]:
  """Return each method's score when the fastest method of the task would have ended.

  It is the mean over the seeds of the last measurement before, in the runs as they
  were, whose rates may not have fallen to 0 by then. Methods without a cost, with a run
  that diverged, or with one that was not measured in time are left out.

  Args:
    methods: rows by method.
    score: the score of the task.
    costs: time of a batch by method, in any unit. The seconds of the runs do not count,
      since other programs may have shared the machine.
  """
  whole = {
    name: rows
    for name, rows in methods.items()
    if name in costs and all(row.status == 'done' and row.curves for row in rows)
  }
  fastest = min((costs[name] for name in whole), default=0.0)
  found = {}
  for name, rows in whole.items():
    # A tenth more, since costs differ a little from one measurement to the next.
    share = 1.1 * fastest / costs[name]
    values = []
    for row in rows:
      steps = row.curves['step']
      pairs = zip(steps, row.curves.get(score.curve, ()), strict=True)
      known = [value for step, value in pairs if step <= share * steps[-1]]
      if known and known[-1] is not None:
        values.append(known[-1])
    if len(values) == len(rows):
      found[name] = float(np.mean(values))
  return found


def verdict(
  name: str, found: Sequence[dict[str, tuple[Comparison, float | None]]]
) -> str:
  """Return whether a method beats both rivals, in a word.

  Args:
    name: the method.
    found: its comparisons with the rivals.
  """
  known = [one[name] for one in found if name in one]
  if len(known) < len(RIVALS):
    return ''
  beats = all(one.is_better and p is not None and p < 0.05 for one, p in known)
  return 'beats both' if beats else ''
