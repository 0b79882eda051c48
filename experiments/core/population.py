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
"""Number of last batches in which a diverging lambda is looked for."""


class Population:
  """Runs of one method and the program that trains them.

  Lists have an entry per run. Arrays of several runs are stacked along their first
  axis. A single run is not stacked; its program is the trainer's own.

  Attributes:
    members: the runs; placeholders come last.
    runs: files of the runs that are not placeholders.
    source: arrays that all batches are read from, on one device, on each device or
      split over them.
    end_epoch: the trainer's `end_epoch` for stacked states.
    diverged_at: by number of the run, a description of where its loss or gradient was
      first not finite.
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
    """Open the files of the runs and build their program.

    Args:
      trainer: the train step of one run.
      read: (source, item) -> batch; traced by JAX.
      source: arrays that all batches are read from.
      members: the runs.
      folder: the parent of the runs' folders.
      meshes: devices to split the work over.
      split: whether the second axis of the source is the batch axis, so that each
        device holds the rows of its share only.
      fetch: (items) -> arrays that `read` takes in place of the items; None if `source`
        has all data.
      evaluated: callback after each evaluation of a run.

    Raises:
      UserError: a folder cannot be written.
    """
    own = [member for member in members if not member.placeholder]
    # The trainer's optimizer was made for the first run, which gave its warning.
    for member in own[1:]:
      optimizers.warn_if_unstable(member.config, member.method)
    config = members[0].config
    self.members = members
    self.diverged_at: dict[int, str] = {}
    self._norms: list[list[tuple[float, float]]] = [[] for _ in own]
    self._warned: set[int] = set()
    self.runs = [
      checkpoints.Run(folder / member.name, config.max_to_keep) for member in own
    ]
    self._evaluated = evaluated
    self._loggers: list[TensorBoard] = []
    self._saved = time.monotonic()
    self._interval = 60 * config.checkpoint_minutes
    self._alone = len(members) == 1
    self._trainer = trainer
    self._read = read
    self._fetch = fetch
    self._meshes = meshes
    many = trainer
    read_many = read
    # The program of a single run is the trainer's own, so it gives the same numbers.
    if not self._alone:
      many = fptt_jax.vmap_trainer(trainer, own_batches=True, mesh=meshes.members)
      read_many = jax.vmap(read, in_axes=(None, 0))
    self._steps = fptt_jax.scan_train_steps(many, read_many)
    self.end_epoch = many.end_epoch
    self.source = self._placed(source, split)

  @property
  def placeholders(self) -> set[int]:
    """Numbers of the members that are placeholders."""
    return set(range(len(self.runs), len(self.members)))

  def _placed(self, source: Any, split: bool) -> Any:
    """Put the source on the devices.

    Args:
      source: arrays.
      split: whether to split the second axis if the devices share a batch.
    """
    mesh = self._meshes.batch or self._meshes.members
    if mesh is None:
      return jax.device_put(source)
    is_split = split and self._meshes.batch is not None
    spec = PartitionSpec(None, 'devices') if is_split else PartitionSpec()
    place = NamedSharding(mesh, spec)

    def put(leaf: Any) -> jax.Array:
      # device_put cannot place an array on the devices of other processes.
      return jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index])

    return jax.tree.map(put, source)

  def start(
    self,
    keys: list[jax.Array],
    items: list[Any],
    beside: Callable[[fptt_jax.TrainState], Any] = lambda state: (),
  ) -> tuple[int, tuple[fptt_jax.TrainState, Any], list[dict[str, Any]]]:
    """Restore the last checkpoints that all runs have, or start the runs.

    Args:
      keys: PRNG key of each run.
      items: an item of each run, for the shapes of a batch.
      beside: (initial state) -> further arrays that are saved with the state.

    Returns:
      (step, (stacked state, stacked further arrays), a record per run). The states have
      the hyperparameters of the runs' configurations.

    Raises:
      BrokenCheckpoint: a checkpoint is damaged.
      UserError: a checkpoint does not fit.
    """
    saved = processes.on_first_process(
      lambda: [checkpoints.saved_steps(run.folder) for run in self.runs]
    )
    step = min(steps[-1] if steps else 0 for steps in saved)
    carries = []
    records = []
    # There are no runs for the placeholders at the end of the members.
    for member, run, key, item in zip(
      self.members, self.runs, keys, items, strict=False
    ):
      state = self._first_state(key, item)
      (state, other), record = run.restore(step, (state, beside(state)))
      state = self._with_hyperparameters(state, member)
      carries.append((state, other))
      records.append(record)
    if self.members[0].config.logger == 'tensorboard' and processes.is_first():
      self._loggers = [TensorBoard(run.folder, step) for run in self.runs]
    for _ in self.placeholders:
      carries.append(carries[0])
      records.append(records[0])
    if devices.over_all_devices(self.members[0].config):
      _print_memory(carries[0][0])
    return step, self.stack(carries), records

  def _first_state(self, key: jax.Array, item: Any) -> fptt_jax.TrainState:
    """Return the initial state of one run."""

    def batch(source: Any) -> fptt_jax.Batch:
      return self._read(source, item if self._fetch is None else self._fetch(item))

    # A process that holds only its share of the data has no complete batch to validate.
    if jax.process_count() > 1:
      return self._trainer.init(key, jax.eval_shape(batch, self.source))
    return self._trainer.init(key, batch(self.source))

  def _with_hyperparameters(
    self, state: fptt_jax.TrainState, member: Member
  ) -> fptt_jax.TrainState:
    """Return a state with the hyperparameters of a run's configuration."""
    # The trainer has those of the first run, and a checkpoint may have those of before
    # an --allow_config_change.
    named = optimizers.hyperparameters(member.config, member.method)
    values = {name: jnp.asarray(value, jnp.float32) for name, value in named.items()}
    settings = processes.replicated(values)
    return state._replace(opt_state=optax.tree.set(state.opt_state, **settings))

  def steps(
    self, state: fptt_jax.TrainState, items: list[Any]
  ) -> tuple[fptt_jax.TrainState, fptt_jax.StepMetrics]:
    """Train each run on N batches, in one call of the program.

    Args:
      state: the stacked state.
      items: for each run the items of its batches, with a leading axis of length N.

    Returns:
      (the next state, metrics with leading axes [N, R]).
    """
    if self._fetch is not None:
      items = [self._fetched(self._fetch, item) for item in items]
    if self._alone:
      state, metrics = self._steps(state, self.source, items[0])
      return state, jax.tree.map(lambda leaf: leaf[:, None], metrics)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *items)
    return self._steps(state, self.source, together)

  def _fetched(self, fetch: Callable[[Any], Any], item: Any) -> Any:
    """Return the arrays of items whose data stay on the host."""
    mesh = self._meshes.batch
    # Several processes always split the batch, and each reads its own rows.
    if mesh is not None and jax.process_count() > 1:
      return processes.fetch_rows(fetch, item, mesh)
    return fetch(item)

  def observe(
    self, metrics: fptt_jax.StepMetrics, batches: int, windows: np.ndarray | None = None
  ) -> None:
    """Look for divergence in the metrics of N batches, and log their means.

    Runs whose loss or gradient is not finite are added to `diverged_at`. A run whose
    lambda diverges gets a warning, once.

    Args:
      metrics: metrics of the batches, with leading axes [N, R].
      batches: number of batches before these.
      windows: int [N], number of windows of each batch that contain any sequence; None
        if all do.
    """
    metrics = jax.tree.map(np.asarray, metrics)
    for number, member in enumerate(self.members):
      if number in self.diverged_at or number in self.placeholders:
        continue
      own = jax.tree.map(lambda leaf, number=number: leaf[:, number], metrics)
      radius = optimizers.flat_loss_radius(member.config, member.method)
      found = fptt_jax.find_nonfinite(
        own, first_update=batches * own.loss.shape[1], radius=radius
      )
      if found is not None:
        self.diverged_at[number] = found
        continue
      self._log_means(number, own, batches, windows)
      self._watch_lambda(number, own, batches, radius)

  def _watch_lambda(
    self,
    number: int,
    metrics: fptt_jax.StepMetrics,
    batches: int,
    radius: float | None,
  ) -> None:
    """Warn once if the lambda of a run diverges.

    Args:
      number: the run.
      metrics: metrics of N batches of the run.
      batches: number of batches before these.
      radius: spectral radius of the recursion, if it is known.
    """
    norms = self._norms[number]
    lambda_norms = metrics.lambda_norm.tolist()
    norms.extend(zip(lambda_norms, metrics.grad_norm.max(1).tolist(), strict=True))
    del norms[:-NORM_HISTORY]
    if number in self._warned:
      return
    lambdas, gradients = np.array(norms).T
    if fptt_jax.lambda_diverges(lambdas, gradients[:, None]):
      self._warned.add(number)
      known = ''
      if radius is not None:
        known = f", the recursion's spectral radius {radius:.3g}"
      text = (
        f'lambda runs away: its norm is {lambdas[-1]:.3g} after batch '
        f'{batches + len(metrics.loss):,}{known}; lower lr * alpha'
      )
      print_warning(f'{self.members[number].label}: {text}')

  def _log_means(
    self,
    number: int,
    metrics: fptt_jax.StepMetrics,
    batches: int,
    windows: np.ndarray | None,
  ) -> None:
    """Log the mean loss of N batches, and means over their updates that were made.

    Args:
      number: the run.
      metrics: metrics of the batches of the run.
      batches: number of batches before these.
      windows: int [N], number of windows of each batch that contain any sequence; None
        if all do.
    """
    made = ~metrics.skipped
    if windows is not None:
      made &= np.arange(made.shape[1]) < windows[:, None]
    if not self._loggers or not made.any():
      return
    scalars = {'train/grad_norm': float(metrics.grad_norm[made].mean(dtype=np.float64))}
    # Of the loss itself: windows weight their objectives. A skipped update may have
    # left a batch without a finite loss.
    finite = np.isfinite(metrics.totals['loss'])
    if finite.any():
      sums = {name: sums[finite].sum() for name, sums in metrics.totals.items()}
      scalars['train/loss'] = fptt_jax.compute_metrics(sums)['loss']
    if fptt_jax.METHODS[self.members[number].method].regularized:
      scalars['train/lambda_norm'] = float(metrics.lambda_norm[-1])
    self._loggers[number].log(batches + len(made), scalars)

  def log(self, number: int, step: int, batches: int, **metrics: Any) -> dict[str, Any]:
    """Write an evaluation of one run to its metrics and to the logger.

    Args:
      number: the run.
      step: number of the line, in batches or epochs.
      batches: number of batches so far.
      **metrics: the metrics.

    Returns:
      The line of metrics.jsonl.

    Raises:
      UserError: the file cannot be written.
    """
    row = self.runs[number].log(step, **metrics)
    if self._loggers:
      # Numbers that are not finite are None in a row.
      finite = {name: value for name, value in row.items() if value is not None}
      scalars = {f'evaluation/{name}': value for name, value in finite.items()}
      self._loggers[number].log(batches, scalars)
    self._evaluated()
    return row

  def all_diverged(self, going: Iterable[int]) -> bool:
    """Return whether all of these runs, given by number, have diverged."""
    return all(number in self.diverged_at for number in going)

  def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of one run's arrays as a function of stacked arrays."""
    return function if self._alone else jax.vmap(function)

  def pack(self, values: list[Any], dtype: Any) -> jax.Array:
    """Return one number per run as an array [R], or [] for a single run."""
    return processes.replicated(
      jnp.asarray(values[0] if self._alone else values, dtype)
    )

  def stack(self, trees: list[Any]) -> Any:
    """Return the trees of all members as one, stacked and placed on the devices."""
    if self._alone:
      return trees[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    mesh = self._meshes.members
    if mesh is None:
      return stacked
    return jax.device_put(stacked, NamedSharding(mesh, PartitionSpec('devices')))

  def unstack(self, tree: Any) -> list[Any]:
    """Return the tree of each member; the inverse of :meth:`stack`."""
    if self._alone:
      return [tree]
    # Members are saved and evaluated one by one, on one device.
    tree = jax.device_put(tree, jax.local_devices()[0])
    return [
      jax.tree.map(lambda leaf, number=number: leaf[number], tree)
      for number in range(len(self.members))
    ]

  def save(self, step: int, carry: Any, records: dict[int, dict[str, Any]]) -> None:
    """Save runs in the background.

    A run that has diverged keeps its earlier checkpoint.

    Args:
      step: number of batches so far.
      carry: the stacked state and the further arrays that are saved with it.
      records: records of the runs to save, by number.

    Raises:
      Stopped: a signal asked for the end; everything is saved.
      UserError: a checkpoint cannot be written.
    """
    # Killed during two saves, runs could be more than one interval apart.
    self.wait()
    # A resumed run does not log the batches before its checkpoint again.
    for logger in self._loggers:
      logger.flush()
    for number, member_carry in enumerate(self.unstack(carry)):
      if number in records and number not in self.diverged_at:
        self.runs[number].save(
          step, member_carry, places=len(self.members), **records[number]
        )
    self._saved = time.monotonic()
    asked = processes.stopped_by()
    if asked:
      self.close()
      raise signals.Stopped(f'stopped by {asked}, saved after batch {step:,}')

  def wait(self) -> None:
    """Wait until the last checkpoints are on the disk."""
    for run in self.runs:
      run.wait()

  def due(self) -> bool:
    """Return whether to save now, because of a signal or the clock."""
    is_late = time.monotonic() - self._saved > self._interval
    # The clocks of the processes differ, but all have to save at the same step.
    return processes.any_process(is_late or signals.requested() is not None)

  def close(self) -> None:
    """Wait for the last checkpoints and end the saving."""
    for logger in self._loggers:
      logger.close()
    for run in self.runs:
      run.close()


def _print_memory(state: fptt_jax.TrainState) -> None:
  """Print the size of weights and optimizer state, in total and per device."""
  leaves = jax.tree.leaves((state.params, state.opt_state))
  total = sum(leaf.nbytes for leaf in leaves) / 1e6
  per_device = 0.0
  for leaf in leaves:
    shard = leaf.sharding.shard_shape(leaf.shape)
    per_device += math.prod(shard) * leaf.dtype.itemsize / 1e6
  print(
    f'weights and optimizer state: {total:.3g} MB, {per_device:.3g} MB on each of '
    f'{jax.device_count()} devices'
  )
