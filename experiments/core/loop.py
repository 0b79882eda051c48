"""Training by epochs on a fixed data set: learning-rate rules, the best epoch by
validation, one look at the test split.
"""

from collections.abc import Callable, Collection, Iterator
import dataclasses
import functools
import operator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.core import averaging, cells, checkpoints, devices, optimizers, recipe
from experiments.core.flags import check, option
from experiments.core.population import Population
from experiments.core.schedule import Member, chunks, finish_run, remaining
import fptt_jax


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


class Task(NamedTuple):
  """What a script gives to :func:`train`.

  Attributes:
    trainer: the train step of one run.
    source: what all batches are read from, NumPy arrays.
    read: (source, item) -> batch, traced.
    split: whether the second axis of the source is that of the rows of a batch: then
      each device has its own.
    fetch: (items [N, B]) -> arrays [N, B, ...] that `read` takes in their place, out of
      data that stay on the host; or None.
    meshes: devices to split the work over.
    portions: (epoch, from 1, and seed) -> the epoch's portions in order; the same for
      the same two, whatever ran before. Those of other seeds have the same shapes.
    num_batches: batches of an epoch, for the progress bar (a guess where epochs
      differ).
    validate: (params) -> validation score.
    test: (params) -> what is reported of the test split.
    score: name of the score, such as 'ppl'.
    train_score: (totals over the epoch) -> the score in training.
    higher_is_better: whether the best epoch is the one of the highest validation score.
  """

  trainer: fptt_jax.Trainer
  source: Any
  read: Callable[[Any, Any], fptt_jax.Batch]
  split: bool
  fetch: Callable[[Any], Any] | None
  meshes: devices.Meshes
  portions: Callable[[int, int], Iterator[Portion]]
  num_batches: int
  validate: Callable[[Any], float]
  test: Callable[[Any], dict[str, float]]
  score: str
  train_score: Callable[[dict[str, float]], float]
  higher_is_better: bool


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


def train(
  config: EpochRecipe,
  task: Task,
  chosen: list[Member],
  folder: Path,
  extra: dict[str, Any],
  evaluated: Callable[[], None],
) -> None:
  """Trains runs of one method side by side, a checkpoint per epoch or more, and keeps
  what came of each, `extra` beside it.

  `evaluated` is called after each evaluation of a run.

  The weights that are tested are those of the epoch with the best validation score. A
  run that diverges, or whose learning rate has fallen below the least, ends; the others
  go on.
  """
  group = Population(
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
  keys = [jax.random.key(member.seed) for member in chosen]
  items = [
    jax.tree.map(lambda leaf: leaf[0], next(task.portions(1, member.seed)).items)
    for member in chosen
  ]
  batches, (state, best_params), saved = group.start(
    keys, items, lambda state: jax.tree.map(jnp.copy, state.params)
  )
  known = lambda record: {
    name: record[name] for name in Record._fields if name in record
  }
  records = [Record(**{'sums': {}, **known(record)}) for record in saved]
  ended = group.placeholders

  def finish(numbers: set[int]) -> None:
    if not numbers - ended:
      return
    best = group.unstack(best_params)
    # What comes now may take long, and be stopped; and the others' checkpoints tell
    # that this run was beside them.
    group.wait()
    for number in numbers - ended:
      lost = {'lost': group.diverged_at[number]} if number in group.diverged_at else {}
      summary = (
        extra
        | _summary(config, task, group.runs[number], records[number], best[number])
        | lost
      )
      finish_run(
        folder,
        chosen[number],
        summary,
        best[number] if records[number].best_epoch else None,
      )
    ended.update(numbers)

  def save(state: fptt_jax.TrainState, diverged: Collection[int] = ()) -> None:
    left = {
      number: record._asdict()
      for number, record in enumerate(records)
      if number not in {*ended, *diverged}
    }
    group.save(records[0].batches, (state, best_params), left)

  seeds = ','.join(dict.fromkeys(str(member.seed) for member in chosen))
  with tqdm(
    total=config.epochs * task.num_batches, initial=batches, unit='batch', disable=None
  ) as bar:
    bar.set_description(f'{chosen[0].method} seed {seeds}')
    for epoch in range(records[0].epoch + 1, config.epochs + 1):
      finish(
        {
          number
          for number, member in enumerate(chosen)
          if member.config.lr * records[number].lr_factor < config.min_lr
        }
      )
      if len(ended) == len(chosen):
        break
      going = [number for number in range(len(chosen)) if number not in ended]
      state = _train_epoch(config, task, group, state, epoch, records, going, save, bar)
      state, params = _end_epoch(config, group, state)
      improved, diverged = _evaluate(
        config, task, group, params, epoch, records, ended, bar
      )
      best_params = group.each(optax.tree.where)(
        group.pack(improved, bool), params, best_params
      )
      if config.average_after:
        scores = lambda number: group.runs[number].column(f'valid_{task.score}')
        on = [
          n not in ended | diverged
          and averaging.triggered(scores(n), config.average_after)
          for n in range(len(chosen))
        ]
        state = state._replace(
          opt_state=group.each(_averaging_if)(group.pack(on, bool), state.opt_state)
        )
      save(state, diverged)
      finish(diverged)
    finish(set(range(len(chosen))))
  group.close()


def _evaluate(
  config: EpochRecipe,
  task: Task,
  group: Population,
  params: Any,
  epoch: int,
  records: list[Record],
  ended: set[int],
  bar: tqdm,
) -> tuple[list[bool], set[int]]:
  """Validates the runs that go on after an epoch, logs and shows it, puts it into the
  records: (which of all were better than ever, who has diverged)."""
  improved, diverged = [False] * len(records), set[int]()
  for number, member_params in enumerate(group.unstack(params)):
    record = records[number]
    records[number] = record._replace(epoch=epoch, done=0, sums={})
    if number in ended:
      continue
    scores = {
      f'train_{task.score}': task.train_score(record.sums),
      'grad_norm': record.sums['grad_norm'] / max(1, record.sums['made']),
      **({'skipped': record.skipped} if config.on_nonfinite == 'skip' else {}),
      f'valid_{task.score}': task.validate(member_params),
    }
    lr = group.members[number].config.lr * record.lr_factor
    row = group.log(
      number, epoch, record.batches, updates=record.updates, lr=lr, **scores
    )
    bar.write(
      _line(group.members[number], task.score, row, group.diverged_at.get(number))
    )
    if None in row.values() or number in group.diverged_at:
      diverged.add(number)
    else:
      records[number], improved[number] = _judged(config, task, records[number], row)
  return improved, diverged


def _judged(
  config: EpochRecipe, task: Task, record: Record, row: dict[str, Any]
) -> tuple[Record, bool]:
  """(what to remember after the epoch, whether it was the best so far)."""
  valid = row[f'valid_{task.score}']
  improved = record.best is None or (
    valid > record.best if task.higher_is_better else valid < record.best
  )
  record = record._replace(best=valid, best_epoch=record.epoch) if improved else record
  factor = record.lr_factor / (1.0 if improved else config.plateau_factor)
  return record._replace(
    lr_factor=factor
    / (config.milestone_factor if record.epoch in config.milestones else 1.0)
  ), improved


def _line(member: Member, score: str, row: dict[str, Any], lost: str | None) -> str:
  """What is shown of a run's epoch."""
  start = f'{member.label}  epoch {row["step"]:>3}  '
  if lost is not None or None in row.values():
    return start + f'diverged: {lost or f"train or validation {score} is not finite"}'
  skipped = f'skipped {row["skipped"]}  ' if row.get('skipped') else ''
  return (
    f'{start}lr {row["lr"]:<8.4g} train {score} {row[f"train_{score}"]:8.4g}  valid '
    f'{score} {row[f"valid_{score}"]:8.4g}  '
    f'{skipped}{row["seconds"]:.0f} s'
  )


def _summary(
  config: EpochRecipe,
  task: Task,
  run: checkpoints.Run,
  record: Record,
  best_params: Any,
) -> dict[str, Any]:
  """What a run came to."""
  nothing = {f'test_{task.score}': None}
  return {
    'epochs': run.rows[-1]['step'],
    'best_epoch': record.best_epoch,
    f'valid_{task.score}': record.best,
    **(
      task.test(best_params) if config.evaluate_test and record.best_epoch else nothing
    ),
    'parameters': cells.count(best_params),
    'seconds': run.rows[-1]['seconds'],
  }


def _averaging_if(on: jax.Array, opt_state: optax.OptState) -> optax.OptState:
  return optax.tree.where(on, averaging.start_averaging(opt_state), opt_state)


def averaging_wrapper(
  config: EpochRecipe,
) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
  """What goes around the optimizer, for `average_after` to work."""
  return averaging.averaged if config.average_after else lambda optimizer: optimizer


def _train_epoch(
  config: EpochRecipe,
  task: Task,
  group: Population,
  state: fptt_jax.TrainState,
  epoch: int,
  records: list[Record],
  going: list[int],
  save: Callable[[fptt_jax.TrainState], None],
  bar: tqdm,
) -> fptt_jax.TrainState:
  """What is left of one pass over the training split; what it measures goes into the
  records.
  """
  factor, seen, done = None, [], records[0].done

  def flush_metrics() -> None:
    """Takes what was seen into the records."""
    for metrics, updates in seen:
      group.observe(metrics, records[0].batches, updates)
      metrics = jax.tree.map(np.asarray, metrics)
      for number, record in enumerate(records):
        own = jax.tree.map(lambda leaf, number=number: leaf[:, number], metrics)
        records[number] = record.seen(own, updates, config.inner_steps)
    seen.clear()

  def chunked() -> Iterator[tuple[Portion, ...]]:
    """What is left of the epoch: portions of a chunk's size, one for each run."""
    start = 0
    for portions in zip(
      *(task.portions(epoch, member.seed) for member in group.members), strict=True
    ):
      yield from zip(
        *(portion.cut(config.steps_per_call, done - start) for portion in portions),
        strict=True,
      )
      start += len(portions[0].updates)

  for parts in chunked():
    if seen and group.due():
      flush_metrics()
      save(state)
    if parts[0].lr_factor != factor:
      factor = parts[0].lr_factor
      rates = [
        member.config.lr * record.lr_factor
        for member, record in zip(group.members, records, strict=True)
      ]
      learning_rate = group.pack([rate * factor for rate in rates], jnp.float32)
      state = state._replace(
        opt_state=optax.tree.set(state.opt_state, learning_rate=learning_rate)
      )
    state, metrics = group.steps(state, [part.items for part in parts])
    flush_metrics()  # One chunk ahead, no more: the bar tells the truth.
    seen.append((metrics, parts[0].updates))
    bar.update(len(parts[0].updates))
    if group.all_diverged(going):
      break
  flush_metrics()
  return group.end_epoch(state)


def _end_epoch(
  config: EpochRecipe, group: Population, state: fptt_jax.TrainState
) -> tuple[fptt_jax.TrainState, Any]:
  """The state to go on from, and the parameters to evaluate."""
  method = group.members[0].method
  if config.restart_each_epoch and fptt_jax.METHODS[method].regularized:
    params, opt_state = group.each(fptt_jax.fptt_restart)(state.opt_state, state.params)
    state = state._replace(params=params, opt_state=opt_state)
  params = optimizers.evaluation_params(config, method, state)
  return state, group.each(averaging.averaged_params)(
    state.opt_state, params
  ) if config.average_after else params
