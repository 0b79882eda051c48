"""Training by epochs on a fixed data set: learning-rate rules, the best epoch by validation, one look at the test split."""

from collections.abc import Callable, Iterator
import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import averaging, recipe, runs
from experiments.options import check, option
import fptt_jax


@dataclasses.dataclass(frozen=True)
class EpochRecipe(recipe.Recipe):
  """How the epochs of a run go."""

  epochs: int = option(25, 'passes over the training split')
  plateau_factor: float = option(1.0, 'divides the learning rate after an epoch without a better validation score; 1 does not')
  milestones: tuple[int, ...] = option((), 'epochs after which the learning rate is divided by milestone_factor')
  milestone_factor: float = option(10.0, 'see milestones')
  min_lr: float = option(0.0, 'stop when the learning rate has fallen below this')
  average_after: int = option(0, 'n of non-monotonically triggered averaging of the weights (NT-ASGD); 0 does not average')
  restart: bool = option(False, 'restart the recursion at each epoch: W := its summary, lambda := 0 (fptt only)')

  def __post_init__(self) -> None:
    super().__post_init__()
    check(self.epochs >= 1, 'epochs', self.epochs, 'at least 1')
    for name in ('plateau_factor', 'milestone_factor'):
      check(1 <= getattr(self, name) < math.inf, name, getattr(self, name), 'a finite number >= 1')
    check(min(self.milestones, default=1) >= 1, 'milestones', self.milestones, 'epochs >= 1')
    check(0 <= self.min_lr < math.inf, 'min_lr', self.min_lr, 'a finite number >= 0')
    check(self.average_after >= 0, 'average_after', self.average_after, 'an integer >= 0')


class Portion(NamedTuple):
  """What one train step takes.

  Attributes:
    batch: the sequences.
    updates: windows (or the sequence, 1) that are really updated on, fewer than K where all sequences end early.
    lr_factor: multiplies the learning rate for this batch.
  """

  batch: fptt_jax.Batch
  updates: int
  lr_factor: float = 1.0


class Task(NamedTuple):
  """What a script gives to :func:`train`.

  Attributes:
    trainer: the train step.
    portions: (epoch, from 1) -> the epoch's portions in order; the same for the same epoch, whatever ran before.
    num_portions: portions of an epoch, for the progress bar (a guess where epochs differ).
    validate: (params) -> validation score.
    test: (params) -> what is reported of the test split.
    score: name of the score, such as 'ppl'.
    train_score: (totals over the epoch) -> the score in training.
    higher_is_better: whether the best epoch is the one of the highest validation score.
  """

  trainer: fptt_jax.Trainer
  portions: Callable[[int], Iterator[Portion]]
  num_portions: int
  validate: Callable[[Any], float]
  test: Callable[[Any], dict[str, float]]
  score: str
  train_score: Callable[[dict[str, float]], float]
  higher_is_better: bool


class Record(NamedTuple):
  """What a run remembers between epochs beside its carry; kept as JSON with each checkpoint."""

  lr: float
  best: float | None = None
  best_epoch: int = 0
  updates: int = 0


def train(config: EpochRecipe, task: Task, method: str, seed: int, folder: Path) -> dict[str, Any]:
  """Trains by one method from one seed, a checkpoint an epoch, and returns what came of it.

  The weights that are tested are those of the epoch with the best validation score.
  """
  run = runs.Run(folder / f'{method}-seed{seed}')
  state = task.trainer.init(jax.random.key(seed), next(iter(task.portions(1))).batch)
  first, (state, best_params), saved = run.restore((state, jax.tree.map(jnp.copy, state.params)))
  record = Record(**{name: saved.get(name, default) for name, default in Record(config.lr)._asdict().items()})
  with tqdm(total=config.epochs * task.num_portions, initial=first * task.num_portions, unit='batch', disable=None) as bar:
    bar.set_description(f'{method} seed {seed}')
    for epoch in range(first + 1, config.epochs + 1):
      if record.lr < config.min_lr:
        break
      state, row, updates = _train_epoch(task, state, epoch, record.lr, bar)
      state, params = _end_epoch(config, method, state)
      valid = task.validate(params)
      record = record._replace(updates=record.updates + updates * config.inner_steps)
      row = run.log(epoch, updates=record.updates, lr=record.lr, **row, **{f'valid_{task.score}': valid})
      if None in row.values():
        bar.write(f'{method:>11} seed {seed}  epoch {epoch:>3}  diverged: train or validation {task.score} is not finite')
        break
      improved = record.best is None or (valid > record.best if task.higher_is_better else valid < record.best)
      if improved:
        best_params = jax.tree.map(jnp.copy, params)
      record = record._replace(best=valid, best_epoch=epoch) if improved else record
      record = record._replace(lr=_next_lr(config, record.lr, epoch, improved))
      if config.average_after and averaging.triggered(run.column(f'valid_{task.score}'), config.average_after):
        state = state._replace(opt_state=averaging.start_averaging(state.opt_state))
      run.save(epoch, (state, best_params), **record._asdict())
      bar.write(
        f'{method:>11} seed {seed}  epoch {epoch:>3}  lr {row["lr"]:<8.4g} train {task.score} {row[f"train_{task.score}"]:8.4g}  '
        f'valid {task.score} {valid:8.4g}  {row["seconds"]:.0f} s'
      )
  run.close()
  return {
    'epochs': run.rows[-1]['step'],
    'best_epoch': record.best_epoch,
    f'valid_{task.score}': record.best,
    **(task.test(best_params) if record.best_epoch else {f'test_{task.score}': None}),
    'parameters': count(best_params),
    'seconds': run.rows[-1]['seconds'],
  }


def averaging_wrapper(config: EpochRecipe) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
  """What goes around the optimiser, for `average_after` to work."""
  return averaging.averaged if config.average_after else lambda optimizer: optimizer


def count(params: Any) -> int:
  """Numbers in a tree of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _train_epoch(
  task: Task, state: fptt_jax.TrainState, epoch: int, lr: float, bar: tqdm
) -> tuple[fptt_jax.TrainState, dict[str, float], int]:
  """One pass over the training split: (state, training score and mean gradient norm, updates made)."""
  totals, norms, updates, factor = [], [], [], None
  for portion in task.portions(epoch):
    if portion.lr_factor != factor:
      factor = portion.lr_factor
      state = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=jnp.asarray(lr * factor, jnp.float32)))
    state, metrics = task.trainer.step(state, portion.batch)
    totals.append(metrics.totals)
    norms.append(metrics.grad_norm)
    updates.append(portion.updates)
    jax.block_until_ready(norms[-2:-1])  # One batch ahead, no more: the bar tells the truth.
    bar.update()
  sums = {name: sum(total[name].item() for total in totals) for name in totals[0]}
  made = np.concatenate([norm[:number] for norm, number in zip(norms, updates, strict=True)])
  row = {f'train_{task.score}': task.train_score(sums), 'grad_norm': float(np.mean(made))}
  return task.trainer.end_epoch(state), row, sum(updates)


def _end_epoch(config: EpochRecipe, method: str, state: fptt_jax.TrainState) -> tuple[fptt_jax.TrainState, Any]:
  """The state to go on from, and the parameters to evaluate."""
  if config.restart and fptt_jax.METHODS[method].regularised:
    params, opt_state = fptt_jax.fptt_restart(state.opt_state, state.params)
    state = state._replace(params=params, opt_state=opt_state)
  params = recipe.evaluation_params(config, method, state)
  return state, averaging.averaged_params(state.opt_state, params) if config.average_after else params


def _next_lr(config: EpochRecipe, lr: float, epoch: int, improved: bool) -> float:
  if not improved:
    lr /= config.plateau_factor
  return lr / config.milestone_factor if epoch in config.milestones else lr
