"""Training loop over epochs, with learning-rate rules and model selection.

The best epoch is chosen by the validation score. The test split is evaluated once, at
the weights of that epoch.
"""

from collections.abc import Callable, Collection, Iterator
import dataclasses
import functools
import math
import operator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.core import averaging, cells, devices, optimizers, recipe, workdir
from experiments.core.flags import UserError, check, option, redeclare
from experiments.core.population import Population
from experiments.core.schedule import Member, chunks, finish_run, remaining
import fptt_jax


class Rules(NamedTuple):
  """Changes of the learning rate and the weights between epochs.

  The defaults change nothing.

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
  """Settings of a run that trains by epochs."""

  # All tasks that train by epochs have one rate for all methods.
  lr: float = redeclare(recipe.Recipe, 'lr', 1e-3)
  epochs: int = option(
    25, 'passes over the training split', within='[1, inf)', group='training'
  )
  evaluate_test: bool = option(
    True,
    'evaluate the test split at the end; use --evaluate_test=false while you still '
    'choose settings',
    group='training',
  )
  plateau_factor: float = option(
    1.0,
    'factor that divides the learning rate after an epoch without a better validation '
    'score; 1 keeps the rate',
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
    10.0,
    'factor that divides the learning rate at each milestone',
    within='[1, inf)',
    group='optimizer',
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
    # Such a run would end before its first epoch and have no result.
    check(
      self.min_lr <= self.lr,
      'min_lr',
      self.min_lr,
      f'at most the learning rate, {self.lr}',
    )
    check(
      not self.average_after or self.averaging == 'none',
      'averaging',
      self.averaging,
      "'none' with --average_after, which averages the weights itself",
    )


def epoch_rules(config: EpochRecipe) -> Rules:
  """Return the rules that the flags ask for."""
  # The flags have the names of the fields, so a new rule needs no line here.
  return Rules(*(getattr(config, name) for name in Rules._fields))


class Portion(NamedTuple):
  """Sequence of N batches that have the same shapes.

  Attributes:
    items: arrays with a leading axis of length N from which the task reads its batches,
      such as indices; any tree.
    updates: int [N], number of updates of each batch. It is below the number of windows
      K if all sequences of a batch end early.
    lr_factor: factor of the learning rate for these batches.
  """

  items: Any
  updates: np.ndarray
  lr_factor: float = 1.0

  def cut(self, size: int, done: int) -> Iterator['Portion']:
    """Yield parts of the portion, without its first batches.

    Args:
      size: largest number of batches per part; 0 sets no limit.
      done: number of batches to leave out, those trained on before a restart.
    """
    # The cuts do not depend on `done`: a resumed run adds no program to compile but
    # that of a part that was left half done.
    for part in remaining(chunks(len(self.updates), size), done):
      yield Portion(
        jax.tree.map(lambda leaf, part=part: leaf[part], self.items),
        self.updates[part],
        self.lr_factor,
      )


class Record(NamedTuple):
  """Progress of a run, saved as JSON with each checkpoint.

  Attributes:
    sums: sums of the metrics over the batches of the current epoch.
    done: number of these batches.
    lr_factor: factor of the learning rate from the rules between epochs.
    best: best validation score; None before the first.
    best_epoch: epoch of the best score; 0 before the first.
    updates: number of optimizer updates so far.
    skipped: number of updates skipped because their numbers were not finite.
    epoch: number of complete epochs.
    batches: number of batches so far.
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
    """Return the record in a checkpoint's JSON; {} stands for a new run."""
    # The JSON also has the entries that every checkpoint has, such as hashes.
    known = {name: saved[name] for name in cls._fields if name in saved}
    return cls(**{'sums': {}, **known})

  def seen(
    self, metrics: fptt_jax.StepMetrics, updates: np.ndarray, inner_steps: int
  ) -> 'Record':
    """Return the record after N more batches.

    Args:
      metrics: metrics of the batches, with leading axes [N] or [N, U].
      updates: int [N], number of windows of each batch that contain any sequence.
      inner_steps: number of optimizer updates per window.
    """
    # Windows after the end of all sequences make no update.
    due = np.arange(metrics.grad_norm.shape[1])[None, :] < updates[:, None]
    skipped = due & metrics.skipped
    made = due & ~skipped
    # float64, since sums over the batches of an epoch lose digits in float32.
    totals = {name: total.astype(np.float64) for name, total in metrics.totals.items()}
    norms = np.where(made, metrics.grad_norm, 0).astype(np.float64)
    measured = {**totals, 'grad_norm': norms.sum(1), 'made': made.sum(1)}
    # Added one by one: NumPy's pairwise sum would depend on how the batches were cut
    # into calls, and a resumed run would print other digits.
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


class Ended(NamedTuple):
  """A run that has ended.

  Attributes:
    member: the run.
    folder: its folder.
    rows: all its rows of metrics.
    record: its progress.
    params: the parameters of its result.
    lost: why it diverged; None if it did not.
  """

  member: Member
  folder: Path
  rows: list[dict[str, Any]]
  record: Record
  params: Any
  lost: str | None


class Reporter(Protocol):
  """Interface for the measurements and the printed lines of a task.

  An epoch is the interval between two evaluations. On the adding problem an epoch is
  `eval_every` batches.

  """

  @property
  def metric(self) -> str | None:
    """Name of the validation score that decides which epoch is best.

    None if the last weights are the result.
    """

  @property
  def higher_is_better(self) -> bool:
    """True if a higher validation score is better."""

  def step(self, record: 'Record') -> int:
    """Return the step of a line of metrics, in epochs or batches."""

  def measure(
    self, member: Member, params: Any, record: 'Record', last: Any
  ) -> dict[str, Any]:
    """Return the metrics of one run at the end of an epoch.

    Args:
      member: the run.
      params: the parameters to evaluate.
      record: sums over the epoch.
      last: `StepMetrics` of the epoch's last batch, with a leading axis of updates.
    """

  def line(self, member: Member, row: dict[str, Any], reason: str | None) -> str:
    """Return the line to print for a row of metrics.

    Args:
      member: the run.
      row: the row.
      reason: description of the divergence; None if the run has not diverged.
    """

  def summarize(self, ended: 'Ended') -> dict[str, Any]:
    """Return the summary of a run; why it diverged, if it did, is an entry."""


def divergence(row: dict[str, Any], reason: str | None, scores: str) -> str:
  """Say that a run has diverged; return an empty text if it has not.

  Args:
    row: its row of metrics.
    reason: description of the divergence; None if none was found in training.
    scores: names of the scores in the row, in words.
  """
  if reason is not None:
    return f'diverged: {reason}'
  # Numbers that are not finite are None in a row.
  return f'diverged: {scores} is not finite' if None in row.values() else ''


@dataclasses.dataclass(frozen=True)
class EpochReporter:
  """Reporter for tasks with a validation and a test split.

  Attributes:
    config: settings of the runs.
    score: name of the score, such as 'ppl'.
    validate: (params) -> validation score.
    test: (a run that has ended) -> metrics of the test split.
    train_score: (sums over the epoch) -> training score.
    higher_is_better: whether a higher score is better.
    schedule: factor of the learning rate by the number of updates, with --decay.
    extra: entries that every summary begins with.
  """

  config: EpochRecipe
  score: str
  validate: Callable[[Any], float]
  test: Callable[[Ended], dict[str, float]]
  train_score: Callable[[dict[str, float]], float]
  higher_is_better: bool
  schedule: optax.Schedule | None
  extra: dict[str, Any]

  @property
  def metric(self) -> str:
    """Name of the validation score in the metrics."""
    return f'valid_{self.score}'

  def step(self, record: 'Record') -> int:
    """Return the number of epochs."""
    return record.epoch

  def measure(
    self, member: Member, params: Any, record: 'Record', last: Any
  ) -> dict[str, Any]:
    """Return means over the epoch and the validation score."""
    sums = record.sums
    # All updates of an epoch may have been skipped.
    is_known = sums['count'] > 0
    row = {
      'updates': record.updates,
      'lr': member.config.lr * record.lr_factor * self._decay(record.updates),
      f'train_{self.score}': self.train_score(sums) if is_known else math.nan,
      'grad_norm': sums['grad_norm'] / max(1, sums['made']),
    }
    if self.config.on_nonfinite == 'skip':
      row['skipped'] = record.skipped
    row[self.metric] = self.validate(params)
    return row

  def _decay(self, updates: int) -> float:
    """Return the factor of the learning rate after a number of updates."""
    return 1.0 if self.schedule is None else float(self.schedule(updates))

  def line(self, member: Member, row: dict[str, Any], reason: str | None) -> str:
    """Return a line with the learning rate and the scores of an epoch."""
    start = f'{member.label}  epoch {row["step"]:>3}  '
    score = self.score
    if found := divergence(row, reason, f'train or validation {score}'):
      return start + found
    skipped = f'skipped {row["skipped"]}  ' if row.get('skipped') else ''
    return (
      f'{start}lr {row["lr"]:<8.4g} train {score} {row[f"train_{score}"]:8.4g}  '
      f'valid {score} {row[self.metric]:8.4g}  {skipped}{row["seconds"]:.0f} s'
    )

  def summarize(self, ended: 'Ended') -> dict[str, Any]:
    """Return the best validation score and the test score at its weights.

    A run that diverged has those before it did.
    """
    scores: dict[str, Any] = {f'test_{self.score}': None}
    # A run that diverged in its first epoch has no best weights.
    if self.config.evaluate_test and ended.record.best_epoch:
      scores = self.test(ended)
    return {
      **self.extra,
      'epochs': ended.rows[-1]['step'],
      'best_epoch': ended.record.best_epoch,
      self.metric: ended.record.best,
      **scores,
      'parameters': cells.count(ended.params),
      'seconds': ended.rows[-1]['seconds'],
      **({} if ended.lost is None else {'lost': ended.lost}),
    }


class Task(NamedTuple):
  """Data, train step and measurements of a script, for :func:`train`.

  Attributes:
    trainer: the train step of one run.
    source: arrays that all batches are read from.
    read: (source, item) -> batch; traced by JAX.
    split: whether the second axis of the source is the batch axis, so that each device
      holds the rows of its share only.
    fetch: (items [N, B]) -> arrays [N, B, ...] that `read` takes in place of the items.
      It reads data that stay on the host; None if `source` has all data.
    meshes: devices to split the work over.
    portions: (epoch, counted from 1, and seed) -> portions of the epoch in order. The
      result depends on nothing else. Its shapes do not depend on the seed.
    num_epochs: number of epochs of a run.
    num_batches: number of batches of all epochs, for the progress bar; an estimate if
      epochs differ in length.
    rules: changes of the learning rate and the weights between epochs.
    reporter: measurements at the end of each epoch.
    make_key: (seed) -> PRNG key of the initial weights.
    continues: whether the data go on where an epoch ends, which is a pause for
      measurements then. Otherwise the hidden state starts anew after it.
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
  continues: bool = False


def train(
  task: Task, chosen: list[Member], folder: Path, evaluated: Callable[[], None]
) -> None:
  """Train runs of one method in one program and write the result of each.

  Checkpoints are saved at the end of each epoch and, in long epochs, by the clock. A
  run ends early if it diverges or if its learning rate falls below the minimum. The
  other runs continue.

  Args:
    task: data and measurements.
    chosen: the runs.
    folder: the folder of their folders.
    evaluated: callback after each evaluation of a run.

  Raises:
    Stopped: a signal asked for the end; the runs are saved.
    BrokenCheckpoint: a checkpoint could not be restored.
    UserError: a checkpoint does not fit, or a file cannot be written.
  """
  _Loop(task, chosen, folder, evaluated).run()


class _Loop:
  """State of the training of several runs in one program."""

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
    # Of the items only the shapes matter; those of the first epoch are as good as any.
    keys = [task.make_key(member.seed) for member in chosen]
    items = [
      jax.tree.map(lambda leaf: leaf[0], next(task.portions(1, member.seed)).items)
      for member in chosen
    ]
    keeps_best = task.reporter.metric is not None
    self._first_batch, (self._state, self._best), saved = self._group.start(
      keys,
      items,
      # A copy, since steps may donate the buffers of the parameters.
      lambda state: jax.tree.map(jnp.copy, state.params) if keeps_best else (),
    )
    self._records = [Record.restore(record) for record in saved]
    # Hashes of the configurations under which the checkpoints were saved.
    self._saved_under = [record.get('config_sha256') for record in saved]
    self._ended = self._group.placeholders
    # Metrics of the last batch whose numbers have arrived, [R, U].
    self._last: Any = None

  def run(self) -> None:
    """Train until every run has ended."""
    task = self._task
    first = self._records[0].epoch + 1
    self._check_settings(first > task.num_epochs)
    seeds = ','.join(dict.fromkeys(str(member.seed) for member in self._members))
    with tqdm(
      total=task.num_batches, initial=self._first_batch, unit='batch', disable=None
    ) as bar:
      bar.set_description(f'{self._members[0].method} seed {seeds}')
      for epoch in range(first, task.num_epochs + 1):
        # Before the epoch, since a restored run may already be below the minimum.
        self._finish(self._below_least_rate())
        if len(self._ended) == len(self._members):
          break
        self._train_epoch(epoch, bar)
        self._state, params = _end_epoch(task.rules, self._group, self._state)
        diverged = self._evaluate(epoch, params, bar)
        self._start_averaging(diverged)
        # Saved first: see the wait in `_finish`.
        self._save(diverged)
        self._finish(diverged)
      self._finish(set(range(len(self._members))))
    self._group.close()

  def _check_settings(self, is_over: bool) -> None:
    """Check that the settings of runs that go on allow it.

    Args:
      is_over: whether all epochs are over.

    Raises:
      UserError: epochs have another length than before, or a run with no batch left
        would be reported under settings that it was not trained with.
    """
    ended = set(range(len(self._members))) if is_over else self._below_least_rate()
    for number in sorted(set(range(len(self._members))) - self._ended):
      changes = workdir.changes_since(self._folder, self._saved_under[number])
      lengths = [text for name, text in changes if name == 'eval_every']
      # A length that was put back is the one that the run began with.
      now = getattr(self._config, 'eval_every', None)
      if lengths and not lengths[0].startswith(f'eval_every: was {now!r},'):
        raise UserError(
          f'--eval_every must stay as it is for the run in '
          f'{self._folder / self._members[number].name}, which has begun '
          f'({lengths[0]}). Choose another --workdir.'
        )
      if number not in ended:
        continue
      changed = [text for name, text in changes if name not in workdir.TEST_FLAGS]
      if changed:
        folder = self._folder / self._members[number].name
        raise UserError(
          f'{folder} is finished, but settings have changed since; '
          f'{"; ".join(changed)}. Delete this folder to train the run anew, or choose '
          'another --workdir.'
        )

  def _below_least_rate(self) -> set[int]:
    """Return the runs whose learning rate has fallen below the minimum."""
    return {
      number
      for number, member in enumerate(self._members)
      if member.config.lr * self._records[number].lr_factor < self._task.rules.min_lr
    }

  def _finish(self, numbers: set[int]) -> None:
    """Write the results of runs that have not ended before."""
    left = numbers - self._ended
    if not left:
      return
    keeps_best = self._task.reporter.metric is not None
    results = self._group.unstack(self._best if keeps_best else self._final_params())
    # The process may be stopped during a long evaluation on the test split. By then
    # the checkpoints of the other runs must record how many runs shared the program:
    # resumed in a smaller one, they would round differently.
    self._group.wait()
    for number in left:
      record = self._records[number]
      reason = self._group.diverged_at.get(number)
      rows = self._group.runs[number].rows
      member = self._members[number]
      folder = self._folder / member.name
      summary = self._task.reporter.summarize(
        Ended(member, folder, rows, record, results[number], reason)
      )
      has_params = record.best_epoch > 0 if keeps_best else reason is None
      params = results[number] if has_params else None
      finish_run(self._folder, member, summary, params)
    self._ended.update(left)

  def _final_params(self) -> Any:
    """Return the final parameters of runs without a validation split."""
    method = self._members[0].method
    return optimizers.evaluation_params(self._config, method, self._state)

  def _save(self, diverged: Collection[int] = ()) -> None:
    """Save the runs that continue."""
    without = {*self._ended, *diverged}
    left = {
      number: record._asdict()
      for number, record in enumerate(self._records)
      if number not in without
    }
    self._group.save(self._records[0].batches, (self._state, self._best), left)

  def _start_averaging(self, diverged: set[int]) -> None:
    """Start to average the weights of runs whose score has stalled."""
    after = self._task.rules.average_after
    if not after:
      return
    reporter = self._task.reporter
    sign = -1 if reporter.higher_is_better else 1
    stopped = self._ended | diverged
    starts = []
    for number in range(len(self._members)):
      going = number not in stopped
      scores = self._group.runs[number].column(reporter.metric or '') if going else []
      starts.append(averaging.triggered([sign * score for score in scores], after))
    packed = self._group.pack(starts, bool)
    opt_state = self._group.each(_averaging_if)(packed, self._state.opt_state)
    self._state = self._state._replace(opt_state=opt_state)

  def _evaluate(self, epoch: int, params: Any, bar: tqdm) -> set[int]:
    """Evaluate the running members after an epoch; log and print the results.

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
      # The reporter still needs the sums, so the copy without them is stored apart.
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
        # A score may be the first number that is not finite.
        lost = [name for name, value in row.items() if value is None]
        self._group.diverged_at.setdefault(
          number, f'{", ".join(lost)} not finite after batch {record.batches:,}'
        )
      elif reporter.metric is not None:
        judged, improved[number] = _apply_rules(
          self._task, self._records[number], row[reporter.metric]
        )
        self._records[number] = judged
    if reporter.metric is not None:
      # Selected on the device: copies to the host would wait and move all weights.
      choose = self._group.each(optax.tree.where)
      self._best = choose(self._group.pack(improved, bool), params, self._best)
    return diverged

  def _portions(self, epoch: int) -> Iterator[tuple[Portion, ...]]:
    """Yield the rest of an epoch: for each call a portion of every run."""
    done = self._records[0].done
    start = 0
    size = self._config.steps_per_call
    # Strict, since one program runs all members: none may have batches to spare.
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
    """Wait for the metrics of calls and add them to the records."""
    for metrics, updates in pending:
      self._group.observe(metrics, self._records[0].batches, updates)
      metrics = jax.tree.map(np.asarray, metrics)
      for number, record in enumerate(self._records):
        own = jax.tree.map(lambda leaf, number=number: leaf[:, number], metrics)
        self._records[number] = record.seen(own, updates, self._config.inner_steps)
      self._last = jax.tree.map(operator.itemgetter(-1), metrics)
    pending.clear()

  def _set_rates(self, factor: float) -> None:
    """Set the learning rate of each run, times a factor of the next batches."""
    # The rate is an array in the optimizer's state, so a new one compiles nothing.
    rates = [
      member.config.lr * record.lr_factor * factor
      for member, record in zip(self._members, self._records, strict=True)
    ]
    opt_state = optax.tree.set(
      self._state.opt_state, learning_rate=self._group.pack(rates, jnp.float32)
    )
    self._state = self._state._replace(opt_state=opt_state)

  def _train_epoch(self, epoch: int, bar: tqdm) -> None:
    """Train on the rest of one epoch."""
    going = [n for n in range(len(self._members)) if n not in self._ended]
    factor = None
    pending: list[tuple[fptt_jax.StepMetrics, np.ndarray]] = []
    for parts in self._portions(epoch):
      # Flushed before a save: the records must count every batch in the state.
      if pending and self._group.due():
        self._flush_metrics(pending)
        self._save()
      if parts[0].lr_factor != factor:
        factor = parts[0].lr_factor
        self._set_rates(factor)
      self._state, metrics = self._group.steps(
        self._state, [part.items for part in parts]
      )
      # This waits for the previous call only: the device always has a call to work on,
      # and the progress bar is at most one call ahead.
      self._flush_metrics(pending)
      pending.append((metrics, parts[0].updates))
      bar.update(len(parts[0].updates))
      if self._group.all_diverged(going):
        break
    self._flush_metrics(pending)
    if not self._task.continues:
      self._state = self._group.end_epoch(self._state)


def _apply_rules(task: Task, record: Record, score: float) -> tuple[Record, bool]:
  """Update the best score and the learning rate after an epoch.

  Args:
    task: the task.
    record: the run's record after the epoch.
    score: its validation score.

  Returns:
    The new record, and whether the epoch was the best so far.
  """
  rules = task.rules
  # The first score is the best so far, whichever direction is better.
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
  """Start averaging where `on` is true."""
  # Under vmap each run has its value of `on`, so Python cannot branch on it.
  return optax.tree.where(on, averaging.start_averaging(opt_state), opt_state)


def averaging_wrapper(
  config: EpochRecipe,
) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
  """Return the wrapper of the optimizer that `average_after` needs."""
  # Not wrapped otherwise: the mean is one more copy of all weights.
  return averaging.averaged if config.average_after else lambda optimizer: optimizer


def _end_epoch(
  rules: Rules, group: Population, state: fptt_jax.TrainState
) -> tuple[fptt_jax.TrainState, Any]:
  """Return the state for the next epoch and the parameters to evaluate."""
  method = group.members[0].method
  if rules.restart_each_epoch and fptt_jax.METHODS[method].regularized:
    params, opt_state = group.each(fptt_jax.fptt_restart)(state.opt_state, state.params)
    state = state._replace(params=params, opt_state=opt_state)
  # The mean of the weights, where there is one, replaces the choice of --evaluate_at.
  params = optimizers.evaluation_params(group.members[0].config, method, state)
  if rules.average_after:
    params = group.each(averaging.averaged_params)(state.opt_state, params)
  return state, params
