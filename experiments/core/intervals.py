"""Measurements of runs whose batches are drawn anew, every so many batches."""

from collections.abc import Callable, Iterator
import dataclasses
import math
import statistics
from typing import Any, NamedTuple

import numpy as np
import optax

from experiments.core import devices, loop, recipe
from experiments.core.schedule import Member
import fptt_jax


def decay_schedule(config: Any, method: str) -> optax.Schedule | None:
  """Return the schedule of the learning rate's factor, see `recipe.decay_schedule`.

  Args:
    config: settings of the runs, with `decay`, `batches` and `seq_len`.
    method: training method.
  """
  _, updates = recipe.updates_per_sequence(config, method, config.seq_len)
  return recipe.decay_schedule(config.decay, config.batches * updates)


def choose_meshes(config: Any, method: str, members: int) -> devices.Meshes:
  """Return the devices for several runs of one recurrent layer.

  Args:
    config: settings of the runs, with `seq_len`, `batch_size` and `hidden`.
    method: training method.
    members: number of runs.

  Raises:
    UserError: the devices do not fit the batch or the runs.
  """
  steps = recipe.window_steps(config, method, config.seq_len)
  return devices.choose_meshes(config, config.batch_size, config.hidden, steps, members)


def make_task(
  config: Any,
  method: str,
  trainer: fptt_jax.Trainer,
  meshes: devices.Meshes,
  read: Callable[[Any], fptt_jax.Batch],
  draw: Callable[[int, int, int], Any],
  reporter: loop.Reporter,
  **others: Any,
) -> loop.Task:
  """Return the task of runs whose batches are drawn anew.

  An epoch of the training loop has `eval_every` batches.

  Args:
    config: settings of the runs, with `seq_len`, `batches` and `eval_every`.
    method: training method.
    trainer: the trainer of one run.
    meshes: devices to split the work over.
    read: (item) -> batch; traced by JAX.
    draw: (seed, start, end) -> items of the batches from `start`, counted from 0, to
      `end`, which is not included.
    reporter: measurements at the end of each interval.
    **others: further fields of the task.
  """
  _, updates = recipe.updates_per_sequence(config, method, config.seq_len)

  def portions(epoch: int, seed: int) -> Iterator[loop.Portion]:
    start = (epoch - 1) * config.eval_every
    end = min(start + config.eval_every, config.batches)
    steps = np.full(end - start, updates // config.inner_steps)
    yield loop.Portion(draw(seed, start, end), steps)

  return loop.Task(
    trainer,
    source=(),
    read=lambda _, item: read(item),
    split=False,
    fetch=None,
    meshes=meshes,
    portions=portions,
    num_epochs=math.ceil(config.batches / config.eval_every),
    num_batches=config.batches,
    rules=loop.Rules(),
    reporter=reporter,
    **others,
  )


class HeldOut(NamedTuple):
  """Test data of a run.

  Attributes:
    batch: what is scored.
    lead: steps that come before and are not scored, which set the hidden state; None
      scores from the model's initial state.
  """

  batch: fptt_jax.Batch
  lead: fptt_jax.Batch | None = None


@dataclasses.dataclass(frozen=True)
class IntervalReporter:
  """Measurements on a test batch at the end of each interval.

  Attributes:
    trainer: the trainer of one run, which evaluates.
    tests: test data by seed.
    extra: entries that every summary ends with.
    num_windows: K.
    score: name of the test loss in the lines of metrics; it begins with 'test_'.
    label: the test loss in words.
    metric: None, since the last weights are the result.
    higher_is_better: not used without a validation score.
  """

  trainer: fptt_jax.Trainer
  tests: dict[int, HeldOut]
  extra: dict[str, Any]
  num_windows: int
  score: str
  label: str
  metric: str | None = None
  higher_is_better: bool = False

  def step(self, record: loop.Record) -> int:
    """Return the number of batches."""
    return record.batches

  def measure(
    self, member: Member, params: Any, record: loop.Record, last: Any
  ) -> dict[str, Any]:
    """Return the loss of the last batch, means over its updates, and the test loss.

    Where an update was skipped, the mean objective of the others takes the place of the
    loss, which is not finite.
    """
    made = ~last.skipped
    count = max(1, made.sum())
    train_loss = fptt_jax.compute_metrics(last.totals)['loss']
    if not made.all():
      train_loss = float(np.where(made, last.loss, 0).sum() / count)
    row = {
      'updates': record.updates,
      'train_loss': train_loss,
      'grad_norm': float(np.where(made, last.grad_norm, 0).sum() / count),
    }
    if member.config.on_nonfinite == 'skip':
      row['skipped'] = record.skipped
    test = self.tests[member.seed]
    hidden = None
    if test.lead is not None:
      _, hidden = self.trainer.evaluate(params, test.lead)
    sums, _ = self.trainer.evaluate(params, test.batch, hidden)
    row[self.score] = fptt_jax.compute_metrics(sums)['loss']
    return row

  def line(self, member: Member, row: dict[str, Any], reason: str | None) -> str:
    """Return a line with the losses of an evaluation."""
    start = f'{member.label}  batch {row["step"]:>6}  '
    if divergence := loop.divergence(row, reason, f'the {self.label}'):
      return start + divergence
    skipped = f'skipped {row["skipped"]}  ' if row.get('skipped') else ''
    return (
      f'{start}updates {row["updates"]:>8}  train loss {row["train_loss"]:.4f}  '
      f'{self.label} {row[self.score]:.4f}  {skipped}{row["seconds"]:.0f} s'
    )

  def summarize(self, ended: loop.Ended) -> dict[str, Any]:
    """Return the losses of a run that has ended, and the entries of `extra`."""
    config = ended.member.config
    settings = {'lr': config.lr, 'momentum': config.momentum}
    losses = summarize(self.num_windows, ended.rows, self.score, ended.lost)
    return settings | losses | self.extra


def summarize(
  num_windows: int, rows: list[dict[str, Any]], score: str, lost: str | None = None
) -> dict[str, Any]:
  """Return the summary of a run.

  Args:
    num_windows: K.
    rows: its lines of metrics; at least one.
    score: name of the test loss in them, which begins with 'test_'.
    lost: why the run diverged; None if it did not.

  Returns:
    The counts of the last line, its test loss, and the mean of the test losses over the
    last quarter of the batches. If the run diverged, both losses are None, even where
    the weights before are finite, and the reason is an entry.
  """
  # One point of a noisy curve would make the order of the methods a matter of luck.
  late = [row[score] for row in rows if row['step'] > 0.75 * rows[-1]['step']]
  is_known = lost is None and None not in late
  last_quarter = statistics.fmean(late) if is_known else None
  return {
    'K': num_windows,
    'batches': rows[-1]['step'],
    'updates': rows[-1]['updates'],
    score: rows[-1][score] if lost is None else None,
    score.replace('test_', 'last_quarter_'): last_quarter,
    'seconds': rows[-1]['seconds'],
    **({} if lost is None else {'lost': lost}),
  }
