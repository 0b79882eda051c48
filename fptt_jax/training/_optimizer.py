"""How a trainer calls an optimizer, and which optimizers it accepts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fptt_jax._checks import Words, require
from fptt_jax._summary import find_states
from fptt_jax._trees import nodes_of
from fptt_jax._types import (
  Params,
  UpdateResult,
)
from fptt_jax._usable import check_usable
from fptt_jax.training._spec import StepSpec

GradientAt = Callable[[Params], tuple[jax.Array, Params, UpdateResult]]


def make_extra_args(
  gradient: GradientAt,
  value: jax.Array,
  grads: Params,
  inner_steps: int,
  schedule: tuple[jax.Array, jax.Array, jax.Array],
) -> dict[str, Any]:
  """Return the extra arguments for the `update` of an optimizer.

  Args:
    gradient: (params) -> (value, gradient, result) of an update's objective.
    value: [], the objective at the current parameters.
    grads: Its gradient.
    inner_steps: Gradient steps per window.
    schedule: The windows of the update, see `UpdateInputs`.
  """

  def grad_fn(params: Params, step: Any = None) -> Params:
    return gradient(params)[1]

  return {
    'value': value,
    'grad': grads,
    'value_fn': _value_fn(gradient),
    'grad_fn': grad_fn,
    'inner_steps': inner_steps,
    'window': _update_number(schedule),
  }


def _update_number(schedule: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
  """Return the number of an update in its sequence, int32 [], 0..U-1.

  It is that of its window, if the update has one.
  """
  windows, _, records = schedule
  # An update through several windows is the first to see its newest one, or sees all.
  return windows[jnp.argmax(records)]


def _value_fn(gradient: GradientAt) -> Callable[..., jax.Array]:
  """Return an objective whose gradient is the mean over the devices.

  Args:
    gradient: (params) -> (value, gradient, result).
  """

  @jax.custom_vjp
  def objective(params: Params) -> jax.Array:
    value, _, _ = gradient(params)
    return value

  def forward(params: Params) -> tuple[jax.Array, Params]:
    value, grads, _ = gradient(params)
    return value, grads

  def backward(grads: Params, cotangent: jax.Array) -> tuple[Params]:
    # JAX's convention: the conjugate of optax's for complex parameters.
    return (jax.tree.map(lambda g: jnp.conj(g) * cotangent.astype(g.dtype), grads),)

  def value_fn(
    params: Params, *, grad_fn: Any = None, inner_steps: Any = None, window: Any = None
  ) -> jax.Array:
    # Optax's line searches pass on extra arguments that they do not know.
    del grad_fn, inner_steps, window
    value: jax.Array = objective(params)
    return value

  objective.defvjp(forward, backward)
  return value_fn


def _placeholder_extra_args(inner_steps: int) -> dict[str, Any]:
  """Return extra arguments of the form that an optimizer's update gets."""

  def value_fn(
    params: Params, *, grad_fn: Any = None, inner_steps: Any = None, window: Any = None
  ) -> jax.Array:
    del grad_fn, inner_steps, window
    return optax.tree.norm(params, squared=True).astype(jnp.float32)

  return {
    'value': jnp.ones([]),
    'value_fn': value_fn,
    'grad_fn': lambda params, step=None: params,
    'inner_steps': inner_steps,
    'window': jnp.zeros([], jnp.int32),
  }


def check_optimizer(spec: StepSpec) -> None:
  """Raise unless the optimizer works with the model's parameters and the method.

  Only shapes are looked at, so that a large model costs no memory.
  """
  params = jax.eval_shape(spec.model.init, jax.random.key(0))
  check_usable(spec.optimizer, params, _placeholder_extra_args(spec.inner_steps))
  opt_state = jax.eval_shape(spec.optimizer.init, params)
  _check_inner_steps(spec.inner_steps, opt_state)
  regularized = bool(find_states(opt_state))
  wanted = spec.method.regularized
  accepted = f'one {"with" if wanted else "without"} fptt(...)'
  found = Words('one with it' if regularized else 'one without it')
  hint = f"The method is {spec.method_name!r}. 'fptt' without fptt(...) is 'tbptt'."
  require(regularized == wanted, 'optimizer', accepted, found, hint)


def _check_inner_steps(inner_steps: int, opt_state: optax.OptState) -> None:
  """Raise unless `fptt` sees all inner steps of a window.

  It counts its calls to know the last one, and a skipped call would shift them.
  `MultiSteps` calls it only once per several steps.
  """
  skipping = nodes_of(opt_state, optax.ApplyIfFiniteState, optax.ConditionallyMaskState)
  averaging = nodes_of(opt_state, optax.MultiStepsState)
  skips = any(find_states(node.inner_state) for node in skipping)
  skips |= any(find_states(node.inner_opt_state) for node in averaging)
  accepted = '1 with apply_if_finite, conditionally_mask or MultiSteps around fptt'
  hint = 'Use skip_nonfinite or micro_batches of the trainer instead.'
  require(inner_steps == 1 or not skips, 'inner_steps', accepted, inner_steps, hint)
