"""Whether an optimizer with `fptt` in it works in a trainer."""

from collections.abc import Callable, Mapping
import contextvars
import inspect
from typing import Any

import jax
import optax

from fptt_jax._checks import require


def accepted_args(
  update: Callable[..., Any], extra_args: Mapping[str, Any]
) -> dict[str, Any]:
  """Return those of the extra arguments that an optimizer's `update` takes."""
  parameters = inspect.signature(update).parameters.values()
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
    return dict(extra_args)
  names = {parameter.name for parameter in parameters}
  return {name: value for name, value in extra_args.items() if name in names}


_RECORD = contextvars.ContextVar[list[Any] | None]('record', default=None)
"""List to which `fptt` adds the number of inner steps that it is given, while
:func:`check_usable` traces an update in this thread. It is None otherwise.
"""


def check_usable(
  optimizer: optax.GradientTransformationExtraArgs,
  params: optax.Params,
  extra_args: Mapping[str, Any],
) -> None:
  """Raise an error if a trainer would use an optimizer with `fptt` wrongly.

  If updates are changed after `fptt`, W̄ and λ follow weights that were never applied.
  If a wrapper drops `inner_steps`, they move on every call. The check traces one update
  without computing it, and follows the arrays that `fptt` returned through the trace.

  Args:
    optimizer: Any optimizer. One without `fptt` passes if it can be called.
    params: The parameters, or their shapes.
    extra_args: The extra arguments for its `update`, with 'inner_steps' among them.

  Raises:
    ValueError: If updates are changed after `fptt`, or `inner_steps` does not reach it.
    TypeError: If `update` requires other extra arguments.
  """
  # Imported here, since jax.extend takes a fifth of this library's time to import.
  from fptt_jax._update_flow import lost_marks

  traced, record = _trace_update(optimizer, params, extra_args)
  steps = extra_args.get('inner_steps', 1)
  others = [given for given in record if given != steps]
  wanted = f'the {steps} that the trainer passes to the optimizer'
  hint = 'The wrapper around fptt needs an `update` that passes **extra_args on.'
  require(not others, 'inner_steps of fptt', wanted, others[:1], hint)
  if lost_marks(traced.jaxpr):
    raise ValueError(
      'optimizer must not change the updates after fptt(...), since W̄ and λ would '
      'follow weights that are never applied. Put the other transformation inside, '
      'fptt(optax.chain(base, other)), or in front, optax.chain(other, fptt(base)).'
    )


def _trace_update(
  optimizer: optax.GradientTransformationExtraArgs,
  params: optax.Params,
  extra_args: Mapping[str, Any],
) -> tuple[Any, list[Any]]:
  """Trace one update without computing it.

  Returns:
    The jaxpr of the updates, and the numbers of inner steps that reached `fptt`.

  Raises:
    TypeError: If `update` requires other extra arguments.
  """
  record: list[Any] = []

  def update(params: optax.Params) -> optax.Updates:
    state = optimizer.init(params)
    given = accepted_args(optimizer.update, {**extra_args, 'grad': params})
    return optimizer.update(params, state, params, **given)[0]

  token = _RECORD.set(record)
  try:
    return jax.make_jaxpr(update)(params), record
  except TypeError as error:
    raise TypeError(
      'optimizer must need no extra arguments other than '
      f'{sorted(extra_args)}, which a trainer passes; calling it failed: {error}'
    ) from error
  finally:
    _RECORD.reset(token)


def record_call(updates: optax.Updates, inner_steps: Any) -> optax.Updates:
  """Return the updates, marked if :func:`check_usable` traces this call."""
  record = _RECORD.get()
  if record is None:
    return updates
  from fptt_jax._update_flow import mark

  record.append(inner_steps)
  return jax.tree.map(mark, updates)
