"""Training by epochs on a fixed data set: learning-rate rules, the best epoch by
validation, one look at the test split.
"""

from collections.abc import Callable, Collection, Iterator
import dataclasses
import functools
import operator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.core import averaging, cells, devices, optimizers, recipe
from experiments.core.flags import check, option
from experiments.core.population import Population
from experiments.core.schedule import Member, chunks, finish_run, remaining
import fptt_jax


class Rules(NamedTuple):
  """Changes of the learning rate and the weights between epochs; none by default.

  Attributes:
    min_lr: a run ends when its learning rate has fallen below this.
    plateau_factor: divides the learning rate after an epoch without a better score.
    milestones: epochs after which the learning rate is divided.
    milestone_factor: divides the learning rate after a milestone.
    average_after: patience, in epochs, of the averaging of weights; 0 never averages.
    restart_each_epoch: whether FPTT's recursion restarts with each epoch.
  """

  min_lr: float = 0.0
  plateau_factor: float = 1.0
  milestones: tuple[int, ...] = ()
  milestone_factor: float = 1.0
  average_after: int = 0
  restart_each_epoch: bool = False


@dataclasses.dataclass(frozen=True)
class EpochRecipe(recipe.Recipe):
  """How the epochs of a run go."""

  epochs: int = option(
    25, 'passes over the training split', within='[1, inf)', group='training'
  )
  evaluate_test: bool = option(
    True,
    'look at the test split in the end; --evaluate_test=false while settings are '
    'still being chosen',
    group='training',
  )
  plateau_factor: float = option(
    1.0,
    'divides the learning rate after an epoch without a better validation score; 1 '
    'does not',
    within='[1, inf)',
    group='optimizer',
  )
  milestones: tuple[int, ...] = option(
    (),
    'epochs after which the learning rate is divided by milestone_factor',
    within='[1, inf)',
    group='optimizer',
  )
  milestone_factor: float = option(
    10.0, 'see milestones', within='[1, inf)', group='optimizer'
  )
  decay: bool = option(
    False,
    'decay the learning rate to 0 over all epochs along a half cosine, update by '
    'update',
    group='optimizer',
  )
  min_lr: float = option(
    0.0,
    'stop when the learning rate has fallen below this',
    within='[0, inf)',
    group='optimizer',
  )
  average_after: int = option(
    0,
    'n of non-monotonically triggered averaging of the weights (NT-ASGD); 0 does not '
    'average',
    within='[0, inf)',
    group='optimizer',
  )
  restart_each_epoch: bool = option(
    False,
    'restart the recursion at each epoch: W := its summary, lambda := 0 (fptt only)',
    group='optimizer',
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    check(
      self.lr is None or self.min_lr <= self.lr,
      'min_lr',
      self.min_lr,
      f'at most the learning rate, {self.lr}',
    )


def epoch_rules(config: EpochRecipe) -> Rules:
  """Returns the rules that the flags ask for."""
  return Rules(*(getattr(config, name) for name in Rules._fields))


def decay_schedule(
  config: EpochRecipe, updates_per_epoch: int
) -> optax.Schedule | None:
  """Returns (updates so far) -> factor of the learning rate for `config.decay`, None
  without it.
  """
  return (
    optax.cosine_decay_schedule(1.0, config.epochs * updates_per_epoch)
    if config.decay
    else None
  )


class Portion(NamedTuple):
  """N batches that are alike in shape.

  Attributes:
    items: what the batches are read by, a tree of arrays with a leading axis of length
      N.
    updates: int [N], windows (or the sequence, 1) that are really updated on, fewer
      than K where all sequences end early.
    lr_factor: multiplies the learning rate for these batches.
  """

  items: Any
  updates: np.ndarray
  lr_factor: float = 1.0

  def cut(self, size: int, done: int) -> Iterator['Portion']:
    """Portions of at most `size` batches, 0 for all, but for the first `done`
    batches.
    """
    for part in remaining(chunks(len(self.updates), size), done):
      yield Portion(
        jax.tree.map(lambda leaf, part=part: leaf[part], self.items),
        self.updates[part],
        self.lr_factor,
      )


class Record(NamedTuple):
  """What a run remembers beside its carry; kept as JSON with each checkpoint.

  Attributes:
    sums: what was measured over the batches of an epoch that has not ended.
    done: number of these batches.
    lr_factor: what the rules for epochs have made of the learning rate.
    best: best validation score.
    best_epoch: the epoch of it.
    updates: optimizer updates so far.
    skipped: those that were due and not made, their numbers not being finite.
    epoch: epochs so far, whole ones.
    batches: batches so far.
  """

  sums: dict[str, float]
  done: int = 0
  lr_factor: float = 1.0
  best: float | None = None
  best_epoch: int = 0
  updates: int = 0
  skipped: int = 0
  epoch: int = 0
  batches: int = 0

  @classmethod
  def restore(cls, saved: dict[str, Any]) -> 'Record':
    """Makes a record from the JSON of a checkpoint; {} gives that of a new run."""
    known = {name: saved[name] for name in cls._fields if name in saved}
    return cls(**{'sums': {}, **known})

  def seen(
    self, metrics: fptt_jax.StepMetrics, updates: np.ndarray, inner_steps: int
  ) -> 'Record':
    """After N more batches: their metrics, [N] and [N, U], and how many windows of each
    have sequences in them, [N].
    """
    due = np.arange(metrics.grad_norm.shape[1])[None, :] < updates[:, None]
    skipped = due & metrics.skipped
    made = due & ~skipped
    totals = {name: total.astype(np.float64) for name, total in metrics.totals.items()}
    norms = np.where(made, metrics.grad_norm, 0).astype(np.float64)
    measured = {**totals, 'grad_norm': norms.sum(1), 'made': made.sum(1)}
    # One by one: the same sum wherever the batches were cut into chunks.
    sums = {
      name: functools.reduce(operator.add, values.tolist(), self.sums.get(name, 0))
      for name, values in measured.items()
    }
    number = len(updates)
    return self._replace(
      updates=self.updates + int(made.sum()) * inner_steps,
      skipped=self.skipped + int(skipped.sum()) * inner_steps,
      batches=self.batches + number,
      done=self.done + number,
      sums=sums,
    )


class Reporter(Protocol):
  """Measurement of runs at the end of each epoch, and what is told of them.

  An epoch is the interval between two evaluations; the adding problem has epochs of
  `eval_every` batches.

  Attributes:
    metric: name of the validation score that decides which epoch is best; None if the
      last weights are the result.
    higher_is_better: whether a higher validation score is better.
  """

  metric: str | None
  higher_is_better: bool

  def step(self, record: 'Record') -> int:
    """Returns the number that a line of metrics is counted by."""

  def measure(
    self, member: Member, params: Any, record: 'Record', last: Any
  ) -> dict[str, Any]:
    """Returns the metrics of one run.

    Args:
      member: the run.
      params: the parameters to evaluate.
      record: sums over the epoch.
      last: `StepMetrics` of the epoch's last batch, with a leading axis of updates.
    """

  def line(self, member: Member, row: dict[str, Any], reason: str | None) -> str:
    """Returns the line to print for a row of metrics; `reason` is given if diverged."""

  def summarize(
    self, member: Member, rows: list[dict[str, Any]], record: 'Record', params: Any
  ) -> dict[str, Any]:
    """Returns the summary of a run that has ended; `params` are its result."""


@dataclasses.dataclass(frozen=True)
class EpochReporter:
  """Reporter of tasks with a validation and a test split.

  Attributes:
    config: settings of the runs.
    score: name of the score, such as 'ppl'.
    validate: (params) -> validation score.
    test: (params) -> metrics of the test split.
    train_score: (sums over the epoch) -> training score.
    higher_is_better: whether a higher score is better.
    extra: entries that every summary begins with.
  """

  config: EpochRecipe
  score: str
  validate: Callable[[Any], float]
  test: Callable[[Any], dict[str, float]]
  train_score: Callable[[dict[str, float]], float]
  higher_is_better: bool
  extra: dict[str, Any]

  @property
  def metric(self) -> str:
    """Name of the validation score in the metrics."""
    return f'valid_{self.score}'

  def step(self, record: 'Record') -> int:
    """Returns the number of epochs."""
    return record.epoch

  def measure(
    self, member: Member, params: Any, record: 'Record', last: Any
  ) -> dict[str, Any]:
    """Returns means over the epoch and the validation score."""
    row = {
      'updates': record.updates,
      'lr': member.config.lr * record.lr_factor,
      f'train_{self.score}': self.train_score(record.sums),
      'grad_norm': record.sums['grad_norm'] / max(1, record.sums['made']),
    }
    if self.config.on_nonfinite == 'skip':
      row['skipped'] = record.skipped
    row[self.metric] = self.validate(params)
    return row

  def line(self, member: Member, row: dict[str, Any], reason: str | None) -> str:
    """Returns the learning rate and the scores of an epoch."""
    start = f'{member.label}  epoch {row["step"]:>3}  '
    score = self.score
    if reason is not None:
      return f'{start}diverged: {reason}'
    if None in row.values():
      return f'{start}diverged: train or validation {score} is not finite'
    skipped = f'skipped {row["skipped"]}  ' if row.get('skipped') else ''
    return (
      f'{start}lr {row["lr"]:<8.4g} train {score} {row[f"train_{score}"]:8.4g}  '
      f'valid {score} {row[self.metric]:8.4g}  {skipped}{row["seconds"]:.0f} s'
    )

  def summarize(
    self, member: Member, rows: list[dict[str, Any]], record: 'Record', params: Any
  ) -> dict[str, Any]:
    """Returns the best validation score and, at its weights, the test score."""
    scores: dict[str, Any] = {f'test_{self.score}': None}
    if self.config.evaluate_test and record.best_epoch:
      scores = self.test(params)
    return {
      **self.extra,
      'epochs': rows[-1]['step'],
      'best_epoch': record.best_epoch,
      self.metric: record.best,
      **scores,
      'parameters': cells.count(params),
      'seconds': rows[-1]['seconds'],
    }


class Task(NamedTuple):
  """Data and measurements that a script gives to :func:`train`.

  Attributes:
    trainer: the train step of one run.
    source: arrays that all batches are read from.
    read: (source, item) -> batch, traced.
    split: whether the second axis of the source is the batch's, so that each device
      holds its own rows.
    fetch: (items [N, B]) -> arrays [N, B, ...] that `read` takes instead of the items,
      from data that stay on the host; or None.
    meshes: devices to split the work over.
    portions: (epoch, from 1, and seed) -> the epoch's portions in order. The result
      depends on the two alone, and its shapes do not depend on the seed.
    num_epochs: epochs of a run.
    num_batches: batches of all epochs, for the progress bar (a guess where epochs
      differ).
    rules: changes of the learning rate and the weights between epochs.
    reporter: measurements at the end of each epoch.
    make_key: (seed) -> PRNG key of the initial weights.
  """

  trainer: fptt_jax.Trainer
  source: Any
  read: Callable[[Any, Any], fptt_jax.Batch]
  split: bool
  fetch: Callable[[Any], Any] | None
  meshes: devices.Meshes
  portions: Callable[[int, int], Iterator[Portion]]
  num_epochs: int
  num_batches: int
  rules: Rules
  reporter: Reporter
  make_key: Callable[[int], jax.Array] = jax.random.key


def train(
  task: Task, chosen: list[Member], folder: Path, evaluated: Callable[[], None]
) -> None:
  """Trains runs of one method side by side and writes the result of each.

  There is a checkpoint per epoch or more. A run that diverges, or whose learning rate
  has fallen below the minimum, ends; the others go on.

  Args:
    task: data and measurements.
    chosen: the runs.
    folder: the folder of their folders.
    evaluated: called after each evaluation of a run.
  """
  _Loop(task, chosen, folder, evaluated).run()


class _Loop:
  """Training of several runs, epoch by epoch."""

  def __init__(
    self,
    task: Task,
    chosen: list[Member],
    folder: Path,
    evaluated: Callable[[], None],
  ):
    self._task = task
    self._members = chosen
    self._config = chosen[0].config
    self._folder = folder
    self._group = Population(
      task.trainer,
      task.read,
      task.source,
      chosen,
      folder,
      task.meshes,
      task.split,
      task.fetch,
      evaluated,
    )
    keys = [task.make_key(member.seed) for member in chosen]
    items = [
      jax.tree.map(lambda leaf: leaf[0], next(task.portions(1, member.seed)).items)
      for member in chosen
    ]
    keeps_best = task.reporter.metric is not None
    self._first_batch, (self._state, self._best), saved = self._group.start(
      keys,
      items,
      lambda state: jax.tree.map(jnp.copy, state.params) if keeps_best else (),
    )
    self._records = [Record.restore(record) for record in saved]
    self._ended = self._group.placeholders
    # Metrics of the last batch that was looked at, [R, U].
    self._last: Any = None

  def run(self) -> None:
    """Trains until every run has ended."""
    task = self._task
    first = self._records[0].epoch + 1
    seeds = ','.join(dict.fromkeys(str(member.seed) for member in self._members))
    with tqdm(
      total=task.num_batches, initial=self._first_batch, unit='batch', disable=None
    ) as bar:
      bar.set_description(f'{self._members[0].method} seed {seeds}')
      for epoch in range(first, task.num_epochs + 1):
        self._finish(self._below_least_rate())
        if len(self._ended) == len(self._members):
          break
        self._train_epoch(epoch, bar)
        self._state, params = _end_epoch(task.rules, self._group, self._state)
        diverged = self._evaluate(epoch, params, bar)
        self._start_averaging(diverged)
        self._save(diverged)
        self._finish(diverged)
      self._finish(set(range(len(self._members))))
    self._group.close()

  def _below_least_rate(self) -> set[int]:
    """Returns the runs whose learning rate has fallen below the minimum."""
    return {
      number
      for number, member in enumerate(self._members)
      if member.config.lr * self._records[number].lr_factor < self._task.rules.min_lr
    }

  def _finish(self, numbers: set[int]) -> None:
    """Writes the results of runs, but not of those that have ended before."""
    left = numbers - self._ended
    if not left:
      return
    keeps_best = self._task.reporter.metric is not None
    results = self._group.unstack(self._best if keeps_best else self._final_params())
    # Evaluation on the test split may take long and be stopped: the other runs'
    # checkpoints have to tell by then that this run was trained with them.
    self._group.wait()
    for number in left:
      record = self._records[number]
      reason = self._group.diverged_at.get(number)
      rows = self._group.runs[number].rows
      summary = self._task.reporter.summarize(
        self._members[number], rows, record, results[number]
      )
      if reason is not None:
        summary['lost'] = reason
      has_params = record.best_epoch > 0 if keeps_best else reason is None
      params = results[number] if has_params else None
      finish_run(self._folder, self._members[number], summary, params)
    self._ended.update(left)

  def _final_params(self) -> Any:
    """Returns the parameters that runs without a validation split end with."""
    method = self._members[0].method
    return optimizers.evaluation_params(self._config, method, self._state)

  def _save(self, diverged: Collection[int] = ()) -> None:
    """Saves the runs that go on."""
    without = {*self._ended, *diverged}
    left = {
      number: record._asdict()
      for number, record in enumerate(self._records)
      if number not in without
    }
    self._group.save(self._records[0].batches, (self._state, self._best), left)

  def _start_averaging(self, diverged: set[int]) -> None:
    """Starts to average the weights of runs whose validation score has stalled."""
    after = self._task.rules.average_after
    if not after:
      return
    metric = self._task.reporter.metric
    stopped = self._ended | diverged
    starts = [
      number not in stopped
      and averaging.triggered(self._group.runs[number].column(metric or ''), after)
      for number in range(len(self._members))
    ]
    packed = self._group.pack(starts, bool)
    opt_state = self._group.each(_averaging_if)(packed, self._state.opt_state)
    self._state = self._state._replace(opt_state=opt_state)

  def _evaluate(self, epoch: int, params: Any, bar: tqdm) -> set[int]:
    """Evaluates the runs that go on after an epoch, and logs and prints the results.

    Args:
      epoch: the epoch that has ended.
      params: the parameters to evaluate, stacked.
      bar: the progress bar, which prints above itself.

    Returns:
      The runs that have diverged.
    """
    reporter = self._task.reporter
    improved = [False] * len(self._records)
    diverged = set[int]()
    for number, member_params in enumerate(self._group.unstack(params)):
      record = self._records[number]._replace(epoch=epoch)
      self._records[number] = record._replace(done=0, sums={})
      if number in self._ended:
        continue
      member = self._members[number]
      last = jax.tree.map(operator.itemgetter(number), self._last)
      metrics = reporter.measure(member, member_params, record, last)
      row = self._group.log(number, reporter.step(record), record.batches, **metrics)
      reason = self._group.diverged_at.get(number)
      bar.write(reporter.line(member, row, reason))
      if None in row.values() or reason is not None:
        diverged.add(number)
      elif reporter.metric is not None:
        judged, improved[number] = _apply_rules(
          self._task, self._records[number], row[reporter.metric]
        )
        self._records[number] = judged
    if reporter.metric is not None:
      choose = self._group.each(optax.tree.where)
      self._best = choose(self._group.pack(improved, bool), params, self._best)
    return diverged

  def _portions(self, epoch: int) -> Iterator[tuple[Portion, ...]]:
    """Yields what is left of an epoch: portions of one call, one for each run."""
    done = self._records[0].done
    start = 0
    size = self._config.steps_per_call
    for portions in zip(
      *(self._task.portions(epoch, member.seed) for member in self._members),
      strict=True,
    ):
      parts = [portion.cut(size, done - start) for portion in portions]
      yield from zip(*parts, strict=True)
      start += len(portions[0].updates)

  def _flush_metrics(
    self, pending: list[tuple[fptt_jax.StepMetrics, np.ndarray]]
  ) -> None:
    """Adds the metrics of calls to the records, which waits for the calls."""
    for metrics, updates in pending:
      self._group.observe(metrics, self._records[0].batches, updates)
      metrics = jax.tree.map(np.asarray, metrics)
      for number, record in enumerate(self._records):
        own = jax.tree.map(lambda leaf, number=number: leaf[:, number], metrics)
        self._records[number] = record.seen(own, updates, self._config.inner_steps)
      self._last = jax.tree.map(operator.itemgetter(-1), metrics)
    pending.clear()

  def _set_rates(self, factor: float) -> None:
    """Sets the learning rate of each run, times a factor of the batches to come."""
    rates = [
      member.config.lr * record.lr_factor * factor
      for member, record in zip(self._members, self._records, strict=True)
    ]
    opt_state = optax.tree.set(
      self._state.opt_state, learning_rate=self._group.pack(rates, jnp.float32)
    )
    self._state = self._state._replace(opt_state=opt_state)

  def _train_epoch(self, epoch: int, bar: tqdm) -> None:
    """Trains on what is left of one epoch."""
    going = [n for n in range(len(self._members)) if n not in self._ended]
    factor = None
    pending: list[tuple[fptt_jax.StepMetrics, np.ndarray]] = []
    for parts in self._portions(epoch):
      if pending and self._group.due():
        self._flush_metrics(pending)
        self._save()
      if parts[0].lr_factor != factor:
        factor = parts[0].lr_factor
        self._set_rates(factor)
      self._state, metrics = self._group.steps(
        self._state, [part.items for part in parts]
      )
      # Metrics of the call before: the device always has one call to work on, and the
      # progress bar is at most one call ahead.
      self._flush_metrics(pending)
      pending.append((metrics, parts[0].updates))
      bar.update(len(parts[0].updates))
      if self._group.all_diverged(going):
        break
    self._flush_metrics(pending)
    self._state = self._group.end_epoch(self._state)


def _apply_rules(task: Task, record: Record, score: float) -> tuple[Record, bool]:
  """Updates the best score and the learning rate after an epoch.

  Args:
    task: the task.
    record: the run's record after the epoch.
    score: its validation score.

  Returns:
    The new record, and whether the epoch was the best so far.
  """
  rules = task.rules
  improved = record.best is None
  if record.best is not None and task.reporter.higher_is_better:
    improved = score > record.best
  elif record.best is not None:
    improved = score < record.best
  factor = record.lr_factor
  if improved:
    record = record._replace(best=score, best_epoch=record.epoch)
  else:
    factor /= rules.plateau_factor
  if record.epoch in rules.milestones:
    factor /= rules.milestone_factor
  return record._replace(lr_factor=factor), improved


def _averaging_if(on: jax.Array, opt_state: optax.OptState) -> optax.OptState:
  """Starts averaging where `on` is true."""
  return optax.tree.where(on, averaging.start_averaging(opt_state), opt_state)


def averaging_wrapper(
  config: EpochRecipe,
) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
  """Returns the wrapper of the optimizer that `average_after` needs."""
  return averaging.averaged if config.average_after else lambda optimizer: optimizer


def _end_epoch(
  rules: Rules, group: Population, state: fptt_jax.TrainState
) -> tuple[fptt_jax.TrainState, Any]:
  """Returns the state to go on from, and the parameters to evaluate."""
  method = group.members[0].method
  if rules.restart_each_epoch and fptt_jax.METHODS[method].regularized:
    params, opt_state = group.each(fptt_jax.fptt_restart)(state.opt_state, state.params)
    state = state._replace(params=params, opt_state=opt_state)
  params = optimizers.evaluation_params(group.members[0].config, method, state)
  if rules.average_after:
    params = group.each(averaging.averaged_params)(state.opt_state, params)
  return state, params
