"""Non-monotonically triggered averaged SGD, NT-ASGD.

This is Algorithm 1 of Merity, Keskar and Socher (ICLR 2018). Training goes on
unchanged. Once the averaging is switched on, the optimizer's state also holds the mean
of the weights after each update, and that mean is evaluated:

    optimizer = averaged(fptt_jax.fptt(optax.sgd(20.0), alpha=0.2))
    ...                                        # between epochs:
    if triggered(valid_losses):
      opt_state = start_averaging(opt_state)
    valid = nats(trainer, averaged_params(opt_state, params), text.valid)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AveragedState(NamedTuple):
  """State of :func:`averaged`.

  Attributes:
    averaging: bool [], true once :func:`start_averaging` has switched the mean on.
    averaged_count: int32 [], number of updates in the mean.
    mean_params: mean of the parameters after these updates, in float32 or a wider
      type; zeros before the first update.
    base_optimizer_state: state of the wrapped optimizer.
  """

  averaging: jax.Array
  averaged_count: jax.Array
  mean_params: optax.Params
  base_optimizer_state: optax.OptState


def averaged(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Wrap an optimizer so that its state also holds the mean of the parameters.

  The updates stay those of `optimizer`. The mean is that of torch's ASGD with t0 = 0
  and lambd = 0, started at the switch. One detail differs: torch drops the first
  iterate from its second average.

  Make this the outermost transformation: around `fptt`, last in a chain, inside
  `MultiSteps`. The mean does not see changes that a later transformation makes to the
  updates. With `inner_steps` > 1 each inner step counts as an update.

  Args:
    optimizer: any transformation; it receives all extra arguments.

  Returns:
    The transformation, whose state is an :class:`AveragedState`.
  """
  base = optax.with_extra_args_support(optimizer)

  def init_fn(params: optax.Params) -> AveragedState:
    # A bfloat16 mean stops moving once its increments fall below its resolution.
    mean = jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
    )
    return AveragedState(
      jnp.zeros([], bool), jnp.zeros([], jnp.int32), mean, base.init(params)
    )

  def update_fn(
    grads: optax.Updates,
    state: AveragedState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, AveragedState]:
    # optax makes the parameters optional, but the mean is over updated weights.
    if params is None:
      raise ValueError(
        'averaged needs the current parameters: call update(grads, state, params), got '
        'params=None.'
      )
    updates, base_state = base.update(
      grads, state.base_optimizer_state, params, **extra_args
    )
    params_next = optax.apply_updates(params, updates)
    # The switch is an array and not a Python bool: the compiled step serves both
    # before and after it, and members of a vmapped population switch separately.
    count = jnp.where(
      state.averaging, optax.safe_increment(state.averaged_count), state.averaged_count
    )

    def leaf(mean: jax.Array, w: jax.Array) -> jax.Array:
      # The count is 0 before the switch; `where` computes the unused branch, too.
      moved = mean + (w.astype(mean.dtype) - mean) / jnp.maximum(count, 1).astype(
        mean.dtype
      )
      return jnp.where(state.averaging, moved, mean)

    return updates, AveragedState(
      state.averaging,
      count,
      jax.tree.map(leaf, state.mean_params, params_next),
      base_state,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def start_averaging(opt_state: optax.OptState) -> optax.OptState:
  """Switch the averaging on from the next update.

  A state whose averaging is already on does not change.

  Args:
    opt_state: state with one :class:`AveragedState` at any depth (chains,
      `inject_hyperparams`, `MultiSteps`).

  Returns:
    The new state, with the same structure and types.

  Raises:
    ValueError: `opt_state` has no :class:`AveragedState`.
  """
  # The KeyError of optax.tree.set would not name the missing wrapper.
  _check_held(opt_state)
  return optax.tree.set(opt_state, averaging=jnp.ones([], bool))


def averaged_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
  """Return the mean of the parameters, cast to the types of the parameters.

  Before the first averaged update the current parameters are returned.

  Args:
    opt_state: state with one :class:`AveragedState`, as in :func:`start_averaging`.
    params: the current parameters.

  Raises:
    ValueError: `opt_state` has no :class:`AveragedState`.
  """
  _check_held(opt_state)
  mean = optax.tree.get(opt_state, 'mean_params')
  count = optax.tree.get(opt_state, 'averaged_count')
  return jax.tree.map(
    lambda m, p: jnp.where(count > 0, m.astype(p.dtype), p), mean, params
  )


class RunningMeanState(NamedTuple):
  """State of :func:`running_mean`.

  Attributes:
    mean_count: int32 [], number of updates so far.
    running_mean: running mean of the parameters, in at least float32.
    base_optimizer_state: state of the wrapped optimizer.
  """

  mean_count: jax.Array
  running_mean: optax.Params
  base_optimizer_state: optax.OptState


def running_mean(
  optimizer: optax.GradientTransformation, horizon: int
) -> optax.GradientTransformationExtraArgs:
  """Wrap an optimizer so that its state also holds a running mean of the parameters.

  After update t the mean moves by (W - mean) / min(t, horizon): it is the mean of all
  parameters at first, and an exponential one later. The updates stay as they are. Make
  this the outermost transformation, as :func:`averaged`.

  Args:
    optimizer: any transformation; it receives all extra arguments.
    horizon: number of updates that the mean is over.
  """
  base = optax.with_extra_args_support(optimizer)

  def init_fn(params: optax.Params) -> RunningMeanState:
    mean = jax.tree.map(
      lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32), copy=True), params
    )
    return RunningMeanState(jnp.zeros([], jnp.int32), mean, base.init(params))

  def update_fn(
    grads: optax.Updates,
    state: RunningMeanState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, RunningMeanState]:
    updates, base_state = base.update(
      grads, state.base_optimizer_state, params, **extra_args
    )
    count = optax.safe_increment(state.mean_count)
    share = 1 / jnp.minimum(count, horizon)
    mean = jax.tree.map(
      lambda m, w: m + (w.astype(m.dtype) - m) * share.astype(m.dtype),
      state.running_mean,
      optax.apply_updates(params, updates),
    )
    return updates, RunningMeanState(count, mean, base_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def running_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
  """Return the running mean of the parameters, in the parameters' dtypes.

  Args:
    opt_state: state with one :class:`RunningMeanState`, or several stacked.
    params: the current parameters.
  """
  mean = optax.tree.get(opt_state, 'running_mean')
  return jax.tree.map(lambda m, p: m.astype(p.dtype), mean, params)


def schedule_free_params(
  opt_state: optax.OptState, params: optax.Params, b1: jax.typing.ArrayLike
) -> optax.Params:
  """Return the averages x of `optax.contrib.schedule_free`, from y and z.

  optax has a function for one run; this one also takes the stacked state of several.

  Args:
    opt_state: state with one ScheduleFreeState, or several stacked.
    params: the current parameters y = (1 - b1) z + b1 x.
    b1: weight of x in y; one per run if they are stacked.
  """
  z, weights = optax.tree.get(opt_state, 'z'), jnp.asarray(b1)

  def average(y: jax.Array, z: jax.Array) -> jax.Array:
    weight = weights.reshape(weights.shape + (1,) * (y.ndim - weights.ndim))
    return (y - (1 - weight) * z) / weight

  return jax.tree.map(average, params, z)


def triggered(valid_losses: list[float], non_monotone_interval: int = 5) -> bool:
  """Return whether the validation loss has stalled.

  It has stalled if the last loss is worse than the best of those more than
  `non_monotone_interval` epochs before it.

  Args:
    valid_losses: losses of all epochs, from the first to the current.
    non_monotone_interval: n >= 1 of Algorithm 1. The result can be true from epoch
      n + 2 on.

  Raises:
    ValueError: the interval is below 1.
  """
  if non_monotone_interval < 1:
    raise ValueError(
      f'non_monotone_interval must be at least 1, got {non_monotone_interval}.'
    )
  # The authors' release compares before it appends the current loss, hence the -1.
  earlier = valid_losses[: -non_monotone_interval - 1]
  return bool(earlier) and valid_losses[-1] > min(earlier)


def _check_held(opt_state: optax.OptState) -> None:
  """Raise ValueError if a state has no :class:`AveragedState` at any depth."""
  if optax.tree.get(opt_state, 'averaged_count') is None:
    raise ValueError(
      'expected the state of an optimizer wrapped in averaged(), got a '
      f'{type(opt_state).__name__} without one.'
    )
