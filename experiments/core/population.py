"""Several runs of one method, trained side by side by one program."""

from collections.abc import Callable, Iterable
import math
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

from experiments.core import checkpoints, devices, optimizers, processes, signals
from experiments.core.loggers import TensorBoard
from experiments.core.schedule import Member, print_warning
import fptt_jax

NORM_HISTORY = 1000
"""Batches in which a lambda that runs away is looked for."""


class Population:
  """Runs of one method and the program that trains them. What is a list here has an
  entry for each.

  A run by itself is not stacked: its program is the plain one.

  Attributes:
    members: the runs, those that stand in for others last.
    runs: the folders of those that do not.
    source: what all batches are read from, on the device or on each of them, or split
      over them.
    end_epoch: as the trainer's, of what is stacked.
    lost: of the runs, by number, whose loss or gradient is no longer finite: where that
      began.
  """

  def __init__(
    self,
    trainer: fptt_jax.Trainer,
    read: Callable[[Any, Any], fptt_jax.Batch],
    source: Any,
    members: list[Member],
    folder: Path,
    meshes: devices.Meshes,
    split: bool = False,
    fetch: Callable[[Any], Any] | None = None,
    evaluated: Callable[[], None] = lambda: None,
  ):
    """Takes, beside what :class:`experiments.core.loop.Task` has:

    Args:
      members: the runs.
      folder: where their folders are.
      evaluated: is called after each evaluation of a run.
    """
    own = [member for member in members if not member.placeholder]
    for member in own[
      1:
    ]:  # Of the first the trainer's optimizer is made, and warned about.
      optimizers.warn_if_unstable(member.config, member.method)
    self.members, self.diverged_at = members, dict[int, str]()
    self._norms: list[list[tuple[float, float]]] = [[] for _ in own]
    self._warned: set[int] = set()
    self.runs = [
      checkpoints.Run(folder / member.name, members[0].config.max_to_keep)
      for member in own
    ]
    self._evaluated = evaluated
    self._loggers: list[TensorBoard] = []  # One per run, or none.
    self._saved, self._interval = (
      time.monotonic(),
      60 * members[0].config.checkpoint_minutes,
    )
    self._alone = len(members) == 1
    self._trainer, self._read, self._fetch, self._meshes = trainer, read, fetch, meshes
    many = (
      trainer
      if self._alone
      else fptt_jax.vmap_trainer(trainer, own_batches=True, mesh=meshes.members)
    )
    self._steps = fptt_jax.scan_train_steps(
      many, read if self._alone else jax.vmap(read, in_axes=(None, 0))
    )
    self.end_epoch = many.end_epoch
    self.source = self._placed(source, split)

  @property
  def placeholders(self) -> set[int]:
    """Numbers of the members that are no runs."""
    return set(range(len(self.runs), len(self.members)))

  def _placed(self, source: Any, split: bool) -> Any:
    mesh = self._meshes.batch or self._meshes.members
    if mesh is None:
      return jax.device_put(source)
    place = NamedSharding(
      mesh,
      PartitionSpec(None, 'devices')
      if split and self._meshes.batch
      else PartitionSpec(),
    )
    return jax.tree.map(
      lambda leaf: jax.make_array_from_callback(
        leaf.shape, place, lambda index: leaf[index]
      ),
      source,
    )

  def start(
    self,
    keys: list[jax.Array],
    items: list[Any],
    beside: Callable[[fptt_jax.TrainState], Any] = lambda state: (),
  ) -> tuple[int, tuple[fptt_jax.TrainState, Any], list[dict[str, Any]]]:
    """(step, (state, what is saved beside it), records) that all go on from, with the
    hyper-parameters of each configuration.

    Args:
      keys: each run's PRNG key.
      items: an item of each run, for the shapes.
      beside: (first state) -> what else is saved.
    """
    saved = processes.on_first_process(
      lambda: [checkpoints.saved_steps(run.folder) for run in self.runs]
    )
    step = min(steps[-1] if steps else 0 for steps in saved)
    carries, records = [], []
    for member, run, key, item in zip(
      self.members, self.runs, keys, items, strict=False
    ):
      batch = lambda source, item=item: self._read(
        source, item if self._fetch is None else self._fetch(item)
      )
      shapes = jax.process_count() > 1
      state = self._trainer.init(
        key, jax.eval_shape(batch, self.source) if shapes else batch(self.source)
      )
      (state, other), record = run.restore(step, (state, beside(state)))
      named = optimizers.hyperparameters(member.config, member.method)
      settings = processes.replicated(
        {name: jnp.asarray(value, jnp.float32) for name, value in named.items()}
      )
      carries.append(
        (state._replace(opt_state=optax.tree.set(state.opt_state, **settings)), other)
      )
      records.append(record)
    if self.members[0].config.logger == 'tensorboard' and processes.is_first():
      self._loggers = [TensorBoard(run.folder, step) for run in self.runs]
    for _ in self.placeholders:
      carries.append(carries[0])
      records.append(records[0])
    if devices.over_all_devices(self.members[0].config):
      leaves = jax.tree.leaves((state.params, state.opt_state))
      here = (
        sum(
          math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
          for leaf in leaves
        )
        / 1e6
      )
      whole = sum(leaf.nbytes for leaf in leaves) / 1e6
      print(
        f'weights and optimizer state: {whole:.3g} MB, {here:.3g} MB on each of '
        f'{jax.device_count()} devices'
      )
    return step, self.stack(carries), records

  def steps(
    self, state: fptt_jax.TrainState, items: list[Any]
  ) -> tuple[fptt_jax.TrainState, fptt_jax.StepMetrics]:
    """N steps of each run, one program: items with a leading axis of length N; metrics
    have leading axes [N, R].
    """
    if self._fetch is not None:
      several = jax.process_count() > 1
      items = [
        processes.fetch_rows(self._fetch, item, self._meshes.batch)
        if several
        else self._fetch(item)
        for item in items
      ]
    together = (
      items[0]
      if self._alone
      else jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *items)
    )
    state, metrics = self._steps(state, self.source, together)
    return state, jax.tree.map(
      lambda leaf: leaf[:, None], metrics
    ) if self._alone else metrics

  def observe(
    self, metrics: fptt_jax.StepMetrics, batches: int, windows: np.ndarray | None = None
  ) -> None:
    """Notes which runs are lost after these N batches, gives the loggers what was
    measured, and warns of a lambda that runs away.

    Args:
      metrics: what the batches' steps saw, with leading axes [N, R].
      batches: batches that have gone before.
      windows: int [N], updates of each batch that have sequences in them; None for all.
    """
    metrics = jax.tree.map(np.asarray, metrics)
    for number, member in enumerate(self.members):
      if number in self.diverged_at or number in self.placeholders:
        continue
      own, radius = (
        jax.tree.map(lambda leaf, number=number: leaf[:, number], metrics),
        optimizers.flat_loss_radius(member.config, member.method),
      )
      found = fptt_jax.find_nonfinite(
        own, first_update=batches * own.loss.shape[1], radius=radius
      )
      if found is not None:
        self.diverged_at[number] = found
        continue
      self._log_means(number, own, batches, windows)
      norms = self._norms[number]
      norms.extend(
        zip(own.lambda_norm.tolist(), own.grad_norm.max(1).tolist(), strict=True)
      )
      del norms[:-NORM_HISTORY]
      lambdas, gradients = np.array(norms).T
      if number not in self._warned and fptt_jax.lambda_diverges(
        lambdas, gradients[:, None]
      ):
        self._warned.add(number)
        known = (
          '' if radius is None else f", the recursion's spectral radius {radius:.3g}"
        )
        text = (
          f'lambda runs away: its norm is {lambdas[-1]:.3g} after batch '
          f'{batches + len(own.loss):,}{known}; lower lr * alpha'
        )
        print_warning(f'{member.label}: {text}')

  def _log_means(
    self,
    number: int,
    metrics: fptt_jax.StepMetrics,
    batches: int,
    windows: np.ndarray | None,
  ) -> None:
    """Gives a run's logger the means over the updates of N batches that were made."""
    made = ~metrics.skipped
    if windows is not None:
      made &= np.arange(made.shape[1]) < windows[:, None]
    if not self._loggers or not made.any():
      return
    scalars = {
      'train/loss': metrics.loss[made].mean(dtype=np.float64),
      'train/grad_norm': metrics.grad_norm[made].mean(dtype=np.float64),
    }
    if fptt_jax.METHODS[self.members[number].method].regularized:
      scalars['train/lambda_norm'] = metrics.lambda_norm[-1]
    self._loggers[number].log(batches + len(made), scalars)

  def log(self, number: int, step: int, batches: int, **metrics: Any) -> dict[str, Any]:
    """Writes down an evaluation of one run.

    Args:
      number: which run.
      step: what the metrics' lines count: batches or epochs.
      batches: batches so far.
      **metrics: what was measured.

    Returns:
      The line of metrics.jsonl.
    """
    row = self.runs[number].log(step, **metrics)
    if self._loggers:
      finite = {name: value for name, value in row.items() if value is not None}
      scalars = {f'evaluation/{name}': value for name, value in finite.items()}
      self._loggers[number].log(batches, scalars)
    self._evaluated()
    return row

  def all_diverged(self, going: Iterable[int]) -> bool:
    """Whether none of these runs, by number, is worth going on with."""
    return all(number in self.diverged_at for number in going)

  def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one run's arrays as one of what is stacked."""
    return function if self._alone else jax.vmap(function)

  def pack(self, values: list[Any], dtype: Any) -> jax.Array:
    """One number for each run as an array [R], or a scalar of a run by itself."""
    return processes.replicated(
      jnp.asarray(values[0] if self._alone else values, dtype)
    )

  def stack(self, trees: list[Any]) -> Any:
    """What the program takes of what each run has."""
    if self._alone:
      return trees[0]
    stacked, mesh = (
      jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees),
      self._meshes.members,
    )
    return (
      stacked
      if mesh is None
      else jax.device_put(stacked, NamedSharding(mesh, PartitionSpec('devices')))
    )

  def unstack(self, tree: Any) -> list[Any]:
    """What each run has of what the program gives."""
    if self._alone:
      return [tree]
    tree = jax.device_put(tree, jax.local_devices()[0])
    return [
      jax.tree.map(lambda leaf, number=number: leaf[number], tree)
      for number in range(len(self.members))
    ]

  def save(self, step: int, carry: Any, records: dict[int, dict[str, Any]]) -> None:
    """Saves the runs that have a record, by number, in the background: none before all
    have been saved the last time.

    A run that is lost keeps the checkpoint from before.

    Raises:
      Stopped: a signal asked for it; all is saved.
    """
    self.wait()
    for logger in self._loggers:
      logger.flush()  # What a checkpoint follows is on the disk before it.
    for number, member_carry in enumerate(self.unstack(carry)):
      if number in records and number not in self.diverged_at:
        self.runs[number].save(
          step, member_carry, places=len(self.members), **records[number]
        )
    self._saved = time.monotonic()
    if asked := processes.stopped_by():
      self.close()
      raise signals.Stopped(f'stopped by {asked}, saved after batch {step:,}')

  def wait(self) -> None:
    """Waits for the last checkpoints."""
    for run in self.runs:
      run.wait()

  def due(self) -> bool:
    """Whether to save before the interval has ended: a signal or the clock asks for
    it.
    """
    return processes.any_process(
      signals.requested() is not None or time.monotonic() - self._saved > self._interval
    )

  def close(self) -> None:
    """Waits for the last checkpoints; nothing more is saved."""
    for logger in self._loggers:
      logger.close()
    for run in self.runs:
      run.close()
