"""Many members of a population side by side in one program."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from fptt_jax._batch import Batch
from fptt_jax._checks import (
  as_key,
  check_flag,
  check_integer,
  check_shape,
  check_type,
  require,
)
from fptt_jax._compiled import Compiled
from fptt_jax._trees import leading_axis
from fptt_jax._types import Hidden, Params, StepMetrics, Trainer, TrainState
from fptt_jax.losses import MetricSums
from fptt_jax.parallel._devices import check_divisible, one_axis


def vmap_trainer(
  trainer: Trainer, *, own_batches: bool = False, mesh: jax.sharding.Mesh | None = None
) -> Trainer:
  """Return a trainer of R members at once.

  Members may differ in seed, in hyperparameters and in data. They are independent: the
  divergence of one does not affect the others. A small network leaves most of an
  accelerator idle, which more members can use.

  Args:
    trainer: Trainer of one member, made without a mesh.
    own_batches: Whether `init` and `step` take one batch per member, with a leading
      axis of length R, rather than one batch for all.
    mesh: Mesh with one axis, over whose devices the members are split. R must be a
      multiple of their number.

  Returns:
    A :class:`fptt_jax.Trainer`. `init` takes R keys, [R]. All leaves of the state, of
    the metrics, and of `evaluate`'s parameters, totals and hidden state have a leading
    axis of length R. `evaluate` and `predict` take one batch for all members; the
    outputs of `predict` are [R, T, B, ...] or [R, B, T, ...]. With `own_batches`,
    values of batches are not checked: see :func:`fptt_jax.validate_batch`.

    To give members different hyperparameters, wrap the function that makes the
    optimizer in `optax.inject_hyperparams`, and set them to arrays [R] in the
    optimizer's state by `optax.tree.set`.

  Raises:
    TypeError: `trainer` or `mesh` is of another type.
    ValueError: When called: keys, states, parameters or batches are not of R members,
      or the devices cannot share R members evenly.

  Example:
    >>> import jax, jax.numpy as jnp, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(
    ...   lambda rngs: nn.Sequential(
    ...     nn.GRU(1, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
    ...   )
    ... )
    >>> @optax.inject_hyperparams
    ... def optimizer(learning_rate, alpha):
    ...   return fptt_jax.fptt(optax.adam(learning_rate), alpha=alpha)
    >>> loss = fptt_jax.losses.terminal_regression()
    >>> one = fptt_jax.make_trainer(model, loss, optimizer(1e-3, 0.1), num_windows=4)
    >>> many = fptt_jax.vmap_trainer(one)
    >>> batch = fptt_jax.Batch(jnp.ones((20, 8, 1)), jnp.ones(8))
    >>> state = many.init(jax.random.split(jax.random.key(0), 3), batch)
    >>> rates = jnp.array([1e-2, 1e-3, 1e-4])
    >>> opt_state = optax.tree.set(state.opt_state, learning_rate=rates)
    >>> state, metrics = many.step(state._replace(opt_state=opt_state), batch)
    >>> metrics.loss.shape  # R members, K windows.
    (3, 4)
  """
  check_type('trainer', trainer, Trainer)
  if mesh is not None:
    mesh, _ = one_axis(mesh)
  members = _Members(trainer, check_flag('own_batches', own_batches), mesh)
  return Trainer(
    init=members.init,
    step=Compiled(members.step, donate=trainer.donate),
    evaluate=Compiled(members.evaluate),
    end_epoch=Compiled(members.end_epoch),
    predict=Compiled(members.predict, static_argnames=('batch_major', 'return_hidden')),
    donate=trainer.donate,
  )


class _Members:
  """The functions of R members, before they are compiled."""

  def __init__(
    self, trainer: Trainer, own_batches: bool, mesh: jax.sharding.Mesh | None
  ) -> None:
    """Keep the options, see :func:`vmap_trainer`."""
    self.trainer = trainer
    self.own_batches = own_batches
    self.mesh = mesh
    # None broadcasts one batch to all members without copies of it.
    self.batch_axis = 0 if own_batches else None
    # How members, and what all of them share, lie on the mesh.
    self.split: Any = PartitionSpec(None if mesh is None else mesh.axis_names[0])
    self.shared: Any = PartitionSpec()

  def init(self, keys: jax.Array, batch: Batch) -> TrainState:
    """Make the members' first states."""
    keys = as_key('keys', keys)
    check_shape('keys', keys, '[R]', (keys.size,))
    self._check_batch(batch, self._count('keys', keys))
    init = jax.vmap(self.trainer.init, in_axes=(0, self.batch_axis))
    state: TrainState = init(keys, batch)
    if self.mesh is None:
      return state
    return jax.device_put(state, NamedSharding(self.mesh, self.split))

  def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    """Train each member on its batch."""
    self._check_batch(batch, self._count('state', state))
    step = jax.vmap(self.trainer.step, in_axes=(0, self.batch_axis))
    batch_spec = self.split if self.own_batches else self.shared
    result: tuple[TrainState, StepMetrics]
    result = self._on_devices(step, self.split, batch_spec)(state, batch)
    return result

  def evaluate(
    self, params: Params, batch: Batch, hidden: Hidden | None = None
  ) -> tuple[MetricSums, Hidden]:
    """Evaluate each member on one batch."""
    self._check_hidden(hidden, self._count('params', params))
    evaluate = jax.vmap(self.trainer.evaluate, in_axes=(0, None, 0))
    result: tuple[MetricSums, Hidden]
    result = self._on_devices(evaluate, self.split, self.shared, self.split)(
      params, batch, hidden
    )
    return result

  def predict(
    self,
    params: Params,
    inputs: Any,
    lengths: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    hidden: Hidden | None = None,
    *,
    batch_major: bool = False,
    return_hidden: bool = False,
  ) -> Any:
    """Compute each member's outputs on one batch."""
    self._check_hidden(hidden, self._count('params', params))
    predict = functools.partial(
      self.trainer.predict, batch_major=batch_major, return_hidden=return_hidden
    )
    predict = jax.vmap(predict, in_axes=(0, None, None, None, 0))
    specs = (self.split, self.shared, self.shared, self.shared, self.split)
    return self._on_devices(predict, *specs)(params, inputs, lengths, mask, hidden)

  def end_epoch(self, state: TrainState) -> TrainState:
    """Do the loss's end-of-epoch work of each member."""
    self._count('state', state)
    end_epoch = self._on_devices(jax.vmap(self.trainer.end_epoch), self.split)
    result: TrainState = end_epoch(state)
    return result

  def _on_devices(
    self, function: Callable[..., Any], *in_specs: Any
  ) -> Callable[..., Any]:
    """Run a function of members on each device, for its share of them."""
    if self.mesh is None:
      return function
    # Members do not depend on each other, so that no device needs another's result.
    return jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=self.split,
      check_vma=False,
    )

  def _check_batch(self, batch: Batch, number: int) -> None:
    if self.own_batches:
      self._count('batch', batch, number)

  def _check_hidden(self, hidden: Hidden, number: int) -> None:
    if jax.tree.leaves(hidden):
      self._count('hidden', hidden, number)

  def _count(self, name: str, tree: Any, number: int | None = None) -> int:
    """Return R, the length of the leading axis of all arrays.

    Args:
      name: Name of the argument, for the error.
      tree: Tree of arrays.
      number: R, where it is known already.

    Raises:
      ValueError: The length is another, or the devices cannot share R members evenly.
    """
    found = leading_axis(name, tree)
    require(number in (None, found), name, f'of R={number} members', found)
    if self.mesh is not None:
      check_divisible('the number of members R', found, self.mesh.size)
    return found


def take_member(tree: Any, member: int, *, axis: int = 0) -> Any:
  """Return the part of a tree that belongs to one member of a population.

  Args:
    tree: State, parameters, totals, hidden state or metrics of all R members: arrays
      with an axis of length R.
    member: Number r of the member, 0..R-1.
    axis: The axis of length R: 0 for what a population's functions return, 1 for the
      metrics [N, R, ...] of N steps in one program.

  Returns:
    The tree without that axis. Its arrays are copies, which later steps of the
    population do not delete.

  Raises:
    ValueError: `member` or `axis` is out of range, or the arrays have axes of different
      lengths.

  Example:
    >>> import jax.numpy as jnp, fptt_jax
    >>> fptt_jax.take_member({'w': jnp.array([[1.0, 2.0], [3.0, 4.0]])}, 1)
    {'w': Array([3., 4.], dtype=float32)}
  """
  axis = check_integer('axis', axis, 0, 1, '0 or 1')
  number = leading_axis('tree', tree, axis)
  accepted = f'the number of one of the R={number} members, 0..{number - 1}'
  member = check_integer('member', member, 0, number - 1, accepted)
  return jax.tree.map(lambda leaf: leaf[member] if axis == 0 else leaf[:, member], tree)
