"""More in one compiled program: many steps one after the other, many members of a
population side by side.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fptt_jax._batch import Batch
from fptt_jax._checks import (
  arrange_like,
  as_key,
  check_array,
  check_callable,
  check_flag,
  check_integer,
  shapes,
)
from fptt_jax._compiled import Compiled
from fptt_jax._types import Hidden, Params, StepMetrics, Trainer, TrainState
from fptt_jax.parallel._devices import check_divisible, one_axis


def scan_train_steps(
  trainer: Trainer,
  read: Callable[[Any, Any], Batch] = lambda source, item: item,
  *,
  donate: bool | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]]:
  """Compiles N train steps into one program: an epoch, say, without a word to the host
  in between.

  Args:
    trainer: what :func:`fptt_jax.make_trainer` or :func:`vmap_trainer` made.
    read: (source, item) -> Batch, traced: what it does (gathering rows, scaling bytes
      to floats, drawing noise) is part of the program. Default: the items are batches.
    donate: whether the old state is donated, as :class:`fptt_jax.Trainer` says. None:
      as the trainer does.

  Returns: (state, source, items) -> (state, StepMetrics [N, ...]). `source` is a tree
    of arrays that all steps read, such as a data set that stays on the device; `items`
    is a tree of arrays with one leading axis of length N, such as the rows of each
    batch. The old state is donated. Compiled once for each N; equal to N calls of
    `trainer.step`.

    Calls return before they are done: hand over the next items while the device is at
    work, for data larger than memory a chunk of batches after the other.

  Raises:
    TypeError, ValueError: `trainer` or `read` is none (here); items that are no arrays
      of one length (when traced).

  Example:
    >>> import jax, numpy as np, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(lambda rngs: nn.Sequential(nn.GRU(1, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)))
    >>> loss = fptt_jax.losses.terminal_classification(3)
    >>> trainer = fptt_jax.make_trainer(model, loss, fptt_jax.fptt(optax.adam(1e-3)), num_windows=4)
    >>> images, labels = np.ones((40, 20), np.uint8), np.ones(40, np.int32)  # N examples of T=20 pixels
    >>> def read(source, rows):
    ...   images, labels = source
    ...   return fptt_jax.Batch(images[rows].T[..., None] / 255.0, labels[rows])
    >>> epoch = fptt_jax.scan_train_steps(trainer, read)
    >>> source, rows = jax.device_put((images, labels)), np.random.default_rng(0).permutation(40).reshape(5, 8)
    >>> state = trainer.init(jax.random.key(0), read(source, rows[0]))
    >>> state, metrics = epoch(state, source, rows)
    >>> metrics.loss.shape  # N batches, K windows
    (5, 4)
  """
  _check_trainer(trainer)
  check_callable('read', read)

  def run(state: TrainState, source: Any, items: Any) -> tuple[TrainState, StepMetrics]:
    _leading_axis('items', items)
    one = jax.tree.map(
      lambda item: jax.ShapeDtypeStruct(item.shape[1:], item.dtype), items
    )
    first = jax.eval_shape(read, source, one)
    like, _ = jax.eval_shape(trainer.step, state, first)
    state = arrange_like(
      'state',
      state._replace(key=as_key('state.key', state.key)),
      like,
      'as a step returns it',
    )
    return jax.lax.scan(
      lambda state, item: trainer.step(state, read(source, item)), state, items
    )

  return Compiled(
    run, donate=trainer.donate if donate is None else check_flag('donate', donate)
  )


def vmap_trainer(
  trainer: Trainer, *, own_batches: bool = False, mesh: jax.sharding.Mesh | None = None
) -> Trainer:
  """A trainer of R members at once, which differ in seed, in hyper-parameters, or in
  what they are shown.

  A small network leaves most of an accelerator idle: 32 of them take hardly longer than
  one. Members know nothing of each other; one that diverges stays so by itself.

  Args:
    trainer: the trainer of one member, made without a mesh.
    own_batches: whether `init` and `step` take a batch for each member, all leaves with
      a leading axis of length R, rather than one that all are shown.
    mesh: devices, along one axis, to share the members out to: R must be a multiple of
      their number.

  Returns:
    A :class:`fptt_jax.Trainer`. `init` takes R keys, [R]; every leaf of the state, of
    the metrics, and of `evaluate`'s parameters, totals and hidden state has a leading
    axis of length R. `evaluate` takes one batch for all, and so does `predict`, whose
    outputs are [R, T, B, ...] (or [R, B, T, ...]). Values of batches are not looked at
    where each member has its own: see `fptt_jax.validate_batch`.

    Members differ in a hyper-parameter that is in the optimizer's state: wrap what
    makes the optimizer in `optax.inject_hyperparams` and set it, an array [R], by
    `optax.tree.set`.

  Raises:
    TypeError, ValueError: an argument of another kind (here); keys, states, parameters
      or own batches of another number than R (when called).

  Example:
    >>> import jax, jax.numpy as jnp, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(lambda rngs: nn.Sequential(nn.GRU(1, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)))
    >>> @optax.inject_hyperparams
    ... def optimizer(learning_rate, alpha):
    ...   return fptt_jax.fptt(optax.adam(learning_rate), alpha=alpha)
    >>> one = fptt_jax.make_trainer(model, fptt_jax.losses.terminal_regression(), optimizer(1e-3, 0.1), num_windows=4)
    >>> many = fptt_jax.vmap_trainer(one)
    >>> batch = fptt_jax.Batch(jnp.ones((20, 8, 1)), jnp.ones(8))
    >>> state = many.init(jax.random.split(jax.random.key(0), 3), batch)
    >>> state = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=jnp.array([1e-2, 1e-3, 1e-4])))
    >>> state, metrics = many.step(state, batch)
    >>> metrics.loss.shape  # R members, K windows
    (3, 4)
  """
  _check_trainer(trainer)
  batch_axis = 0 if check_flag('own_batches', own_batches) else None
  axis = None
  if mesh is not None:
    mesh, axis = one_axis(mesh)
  members: Any = PartitionSpec(axis)
  batches: Any = members if own_batches else PartitionSpec()

  def shared_out(
    function: Callable[..., Any], in_specs: tuple[Any, ...]
  ) -> Callable[..., Any]:
    if mesh is None:
      return function
    return jax.shard_map(
      function, mesh=mesh, in_specs=in_specs, out_specs=members, check_vma=False
    )

  def check_members(name: str, tree: Any, number: int | None = None) -> int:
    """R, the length of the leading axis of all arrays; raises unless it is `number` (if
    given) and the devices can share it.
    """
    found = _leading_axis(name, tree)
    if found < 1 or (number is not None and found != number):
      raise ValueError(
        f'{name} must have a leading axis of R={number or "1 or more"} members, got '
        f'{found}.'
      )
    if mesh is not None:
      check_divisible('the number of members R', found, mesh)
    return found

  def init(keys: jax.Array, batch: Batch) -> TrainState:
    keys = as_key('keys', keys)
    if jnp.ndim(keys) != 1:
      raise ValueError(
        'init of a population takes one key for each member, [R]; got shape '
        f'{keys.shape}.'
      )
    number = check_members('keys', keys)
    if own_batches:
      check_members('batch', batch, number)
    state: TrainState = jax.vmap(trainer.init, in_axes=(0, batch_axis))(keys, batch)
    return (
      state if mesh is None else jax.device_put(state, NamedSharding(mesh, members))
    )

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    number = check_members('state', state)
    if own_batches:
      check_members('batch', batch, number)
    run = shared_out(
      jax.vmap(trainer.step, in_axes=(0, batch_axis)), (members, batches)
    )
    result: tuple[TrainState, StepMetrics] = run(state, batch)
    return result

  def evaluate(params: Params, batch: Batch, hidden: Hidden | None = None) -> Any:
    number = check_members('params', params)
    if jax.tree.leaves(hidden):
      check_members('hidden', hidden, number)
    return shared_out(
      jax.vmap(trainer.evaluate, in_axes=(0, None, 0)),
      (members, PartitionSpec(), members),
    )(params, batch, hidden)

  def predict(
    params: Params,
    inputs: Any,
    lengths: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    hidden: Hidden | None = None,
    *,
    batch_major: bool = False,
    return_hidden: bool = False,
  ) -> Any:
    number = check_members('params', params)
    if jax.tree.leaves(hidden):
      check_members('hidden', hidden, number)
    one = functools.partial(
      trainer.predict, batch_major=batch_major, return_hidden=return_hidden
    )
    run = jax.vmap(one, in_axes=(0, None, None, None, 0))
    shared: Any = PartitionSpec()
    return shared_out(run, (members, shared, shared, shared, members))(
      params, inputs, lengths, mask, hidden
    )

  def end_epoch(state: TrainState) -> TrainState:
    check_members('state', state)
    result: TrainState = shared_out(jax.vmap(trainer.end_epoch), (members,))(state)
    return result

  return Trainer(
    init,
    Compiled(step, donate=trainer.donate),
    Compiled(evaluate),
    Compiled(end_epoch),
    Compiled(predict, static_argnames=('batch_major', 'return_hidden')),
    trainer.donate,
  )


def take_member(tree: Any, member: int, *, axis: int = 0) -> Any:
  """Return what one member of a population has.

  Args:
    tree: A state, parameters, totals, hidden state or metrics of all R members: arrays
      with an axis of length R.
    member: The number r of the member, 0..R-1.
    axis: Which axis is of length R: 0 for what a population's functions return, 1 for
      the metrics [N, R, ...] of N steps in one program.

  Returns:
    The tree with that axis taken out, of copies: a later step of the population does
      not delete them.

  Raises:
    ValueError: `member` or `axis` is out of range, or the arrays have axes of different
      lengths.

  Example:
    >>> import jax.numpy as jnp, fptt_jax
    >>> fptt_jax.take_member({'w': jnp.array([[1.0, 2.0], [3.0, 4.0]])}, 1)
    {'w': Array([3., 4.], dtype=float32)}
  """
  axis = check_integer('axis', axis, 0, 1, '0 or 1')
  lengths = {jnp.shape(leaf)[axis : axis + 1] for leaf in jax.tree.leaves(tree)}
  if len(lengths) != 1 or () in lengths:
    raise ValueError(
      f'tree must have an axis {axis} of one length in all arrays, got shapes '
      f'{shapes(tree)}.'
    )
  [(number,)] = lengths
  member = check_integer(
    'member',
    member,
    0,
    number - 1,
    f'the number of one of the R={number} members, 0..{number - 1}',
  )
  return jax.tree.map(lambda leaf: leaf[member] if axis == 0 else leaf[:, member], tree)


def _check_trainer(trainer: Trainer) -> None:
  if not isinstance(trainer, Trainer):
    raise TypeError(
      'trainer must be a fptt_jax.Trainer, as fptt_jax.make_trainer makes one, got '
      f'{trainer!r}.'
    )


def _leading_axis(name: str, tree: Any) -> int:
  """The length of the leading axis of all arrays of a tree."""
  lengths = {check_array(name, leaf).shape[:1] for leaf in jax.tree.leaves(tree)}
  if len(lengths) != 1 or () in lengths:
    raise ValueError(
      f'{name} must be arrays with a leading axis of one length, got shapes '
      f'{shapes(tree)}.'
    )
  return int(lengths.pop()[0])
