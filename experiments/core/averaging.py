"""Non-monotonically triggered averaged SGD (Merity, Keskar and Socher, ICLR 2018,
Algorithm 1).

The optimizer goes on as it does; once switched on, the mean of the weights after each
update is kept beside it and evaluated at:

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
    averaging: bool [], whether the mean is being kept; :func:`start_averaging` sets it.
    averaged_count: int32 [], updates in the mean.
    mean_params: mean of the parameters after these updates, at least float32; of no
      meaning before the first.
    base_optimizer_state: state of the wrapped optimizer.
  """

  averaging: jax.Array
  averaged_count: jax.Array
  mean_params: optax.Params
  base_optimizer_state: optax.OptState


def averaged(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Keeps the mean of the parameters beside `optimizer`, whose updates it does not
  touch.

  This is torch's ASGD at t0 = 0 and lambd = 0 started at the switch, but for one quirk:
  there the second average forgets the first iterate. Put it outermost: around `fptt`,
  last in a chain, inside `MultiSteps`; what changes the updates after it is not
  averaged. With `inner_steps` > 1 each inner step counts.

  Args:
    optimizer: any transformation; gets all extra arguments.
  """
  base = optax.with_extra_args_support(optimizer)

  def init_fn(params: optax.Params) -> AveragedState:
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
    if params is None:
      raise ValueError(
        'averaged needs the current parameters: call update(grads, state, params), got '
        'params=None.'
      )
    updates, base_state = base.update(
      grads, state.base_optimizer_state, params, **extra_args
    )
    params_next = optax.apply_updates(params, updates)
    count = jnp.where(
      state.averaging, optax.safe_increment(state.averaged_count), state.averaged_count
    )

    def leaf(mean: jax.Array, w: jax.Array) -> jax.Array:
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
  """Switches the averaging on, from the next update; where it is on already nothing
  changes.

  Args:
    opt_state: holds one :class:`AveragedState`, however deep (chains,
      `inject_hyperparams`, `MultiSteps`).

  Raises:
    ValueError: it holds none.
  """
  _check_held(opt_state)
  return optax.tree.set(opt_state, averaging=jnp.ones([], bool))


def averaged_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
  """The mean of the parameters, in their dtypes; `params` themselves while nothing has
  been averaged.

  Args:
    opt_state: as for :func:`start_averaging`.
    params: the current parameters.

  Raises:
    ValueError: `opt_state` holds no :class:`AveragedState`.
  """
  _check_held(opt_state)
  mean, count = (
    optax.tree.get(opt_state, 'mean_params'),
    optax.tree.get(opt_state, 'averaged_count'),
  )
  return jax.tree.map(
    lambda m, p: jnp.where(count > 0, m.astype(p.dtype), p), mean, params
  )


def triggered(valid_losses: list[float], non_monotone_interval: int = 5) -> bool:
  """Whether the last validation loss is worse than the best of those more than
  `non_monotone_interval` epochs before it.

  Args:
    valid_losses: one an epoch, all from the first to the current.
    non_monotone_interval: n >= 1 of Algorithm 1, in the reading of the authors'
      release; it can hold from epoch n + 2 on.

  Raises:
    ValueError: an interval below 1.
  """
  if non_monotone_interval < 1:
    raise ValueError(
      f'non_monotone_interval must be at least 1, got {non_monotone_interval}.'
    )
  earlier = valid_losses[: -non_monotone_interval - 1]
  return bool(earlier) and valid_losses[-1] > min(earlier)


def _check_held(opt_state: optax.OptState) -> None:
  if optax.tree.get(opt_state, 'averaged_count') is None:
    raise ValueError(
      'expected the state of an optimizer wrapped in averaged(), got a '
      f'{type(opt_state).__name__} without one.'
    )
