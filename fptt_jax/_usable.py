"""Whether an optimizer with `fptt` in it works in a trainer."""

from collections.abc import Callable, Mapping
import inspect
from typing import Any

import jax
import optax


def accepted(
  update: Callable[..., Any], extra_args: Mapping[str, Any]
) -> dict[str, Any]:
  """Return those of the extra arguments that an optimizer's `update` takes."""
  parameters = inspect.signature(update).parameters.values()
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
    return dict(extra_args)
  names = {parameter.name for parameter in parameters}
  return {name: value for name, value in extra_args.items() if name in names}


_RECORDS: list[list[Any]] = []
"""List to which `fptt` adds the number of inner steps that it is given, while
:func:`check_usable` traces an update. They are empty otherwise.
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

  record: list[Any] = []

  def update(params: optax.Params) -> optax.Updates:
    state = optimizer.init(params)
    given = accepted(optimizer.update, {**extra_args, 'grad': params})
    return optimizer.update(params, state, params, **given)[0]

  _RECORDS.append(record)
  try:
    traced = jax.make_jaxpr(update)(params)
  except TypeError as error:
    raise TypeError(
      'optimizer must need no extra arguments other than '
      f'{sorted(extra_args)}, which a trainer passes; calling it failed: {error}'
    ) from error
  finally:
    _RECORDS.pop()
  inner_steps = extra_args.get('inner_steps', 1)
  if any(given != inner_steps for given in record):
    raise ValueError(
      f'optimizer must pass the extra argument inner_steps={inner_steps} on to '
      f'fptt(...), got {record[0]} there. Give the wrapper around it an '
      '`update` that takes **extra_args and passes them on.'
    )
  if lost_marks(traced.jaxpr):
    raise ValueError(
      'optimizer must not change the updates after fptt(...), since W̄ and λ would '
      'follow weights that are never applied. Put the other transformation inside, '
      'fptt(optax.chain(base, other)), or in front, optax.chain(other, fptt(base)).'
    )


def record_call(updates: optax.Updates, inner_steps: Any) -> optax.Updates:
  """Return the updates, marked if :func:`check_usable` traces this call."""
  if not _RECORDS:
    return updates
  from fptt_jax._update_flow import mark

  _RECORDS[-1].append(inner_steps)
  return jax.tree.map(mark, updates)
