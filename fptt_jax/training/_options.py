"""Validation of a trainer's options, once, before anything is traced."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from fptt_jax._checks import (
  FLOAT32_MAX,
  as_number,
  check_flag,
  check_size,
  check_type,
  require,
)
from fptt_jax._types import Hidden, Model, Params
from fptt_jax.influence import INFLUENCES, Influence
from fptt_jax.losses import Loss
from fptt_jax.losses._base import without_replaced_parts
from fptt_jax.training._micro_batches import split_model
from fptt_jax.training._schedules import METHODS, Method
from fptt_jax.training._spec import StepSpec

FLAGS = ('carry_hidden', 'skip_nonfinite', 'return_outputs', 'checkpoint_windows')
"""Options that are True or False."""


def resolve_spec(
  model: Model,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  method: str | Method,
  options: dict[str, Any],
) -> StepSpec:
  """Validate the options of a trainer.

  Args:
    model: Model to train.
    loss: Loss of a window.
    optimizer: Optax transformation.
    method: Name in `METHODS`, or a `Method`.
    options: The fields of :class:`StepSpec` that are plain options, as given.

  Returns:
    The options, resolved.

  Raises:
    ValueError: An option is out of range, or options contradict each other.
    TypeError: `model`, `loss` or `optimizer` is of another type.
  """
  # Types come first: the other checks read attributes of these objects.
  check_types(model, loss, optimizer)
  name, method = _find_method(method)
  for flag in FLAGS:
    options[flag] = check_flag(flag, options[flag])
  for size in ('inner_steps', 'micro_batches'):
    options[size] = check_size(size, options[size])
  for size in ('num_windows', 'window_size', 'truncation_steps', 'readout_chunk'):
    if options[size] is not None:
      options[size] = check_size(size, options[size])
  _check_method_options(name, method, options)
  model, loss = model.without_stale_parts(), without_replaced_parts(loss)
  _check_readout(model, loss, options)
  options['influence'] = _find_influence(options['influence'], name, method)
  options['loss_weights'] = _finite_weights(options['loss_weights'])
  if isinstance(optimizer, optax.MultiSteps):
    # It is not a transformation, and its own conversion drops extra arguments.
    optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
  return StepSpec(
    model=model,
    training_model=split_model(model, options['micro_batches']),
    loss=loss,
    optimizer=optax.with_extra_args_support(optimizer),
    method=method,
    method_name=name,
    hidden_map=None if options['influence'] is None else _hidden_map(model),
    **options,
  )


def _find_method(method: str | Method) -> tuple[str, Method]:
  """Return the name and the settings of a method."""
  if isinstance(method, Method):
    if isinstance(method.num_windows, str) and method.num_windows != 'T':
      raise ValueError(
        "num_windows of a Method must be a number, 'T' or None, got "
        f'{method.num_windows!r}.'
      )
    return 'custom', method
  if isinstance(method, str) and method in METHODS:
    return method, METHODS[method]
  raise ValueError(f'method must be one of {[*METHODS]} or a Method, got {method!r}.')


def _find_influence(
  influence: str | Influence, name: str, method: Method
) -> Influence | None:
  """Return the influence, None for 'none'.

  Raises:
    ValueError: There is no such influence, or the method has no use for one.
  """
  if isinstance(influence, str) and influence == 'none':
    return None
  found = influence if isinstance(influence, Influence) else None
  if isinstance(influence, str):
    found = INFLUENCES.get(influence)
  if found is None:
    names = ['none', *INFLUENCES]
    raise ValueError(
      f'influence must be one of {names} or an Influence, got {influence!r}.'
    )
  # Other methods do not cut their gradient at the windows' borders.
  cuts = not method.whole_gradient and not method.truncated
  accepted = f"'none' with method {name!r}"
  hint = "Methods with an influence are 'fptt', 'tbptt' and 'ogd'."
  fits = cuts and method.update_each_window
  require(fits, 'influence', accepted, influence, hint)
  return found


def _hidden_map(model: Model) -> Callable[..., Hidden]:
  """Make the map from hidden state to hidden state, without noise."""
  # Hand-written backward passes have no forward mode, which some influences need.
  apply = model.apply if model.plain is None else model.plain

  def run(params: Params, hidden: Hidden, x: Any, mask: jax.Array | None) -> Hidden:
    new_hidden, _ = apply(params, hidden, x, mask, None)
    return new_hidden

  return run


def _check_method_options(name: str, method: Method, options: dict[str, Any]) -> None:
  """Raise a ValueError unless the windows' options fit each other and the method."""
  sizes = ('num_windows', 'window_size')
  given = {size: options[size] for size in sizes if options[size] is not None}
  # A method that fixes K, or is truncated, takes neither.
  most = 1 if method.num_windows is None and not method.truncated else 0
  if len(given) > most:
    takes = 'at most one of' if most else 'neither of'
    raise ValueError(f'method {name!r} takes {takes} {sizes}, got {given}.')
  several_windows = method.whole_gradient and method.num_windows != 1
  fits = several_windows or not options['checkpoint_windows']
  accepted = "'bptt_aux' or 'ftrl' with checkpoint_windows=True"
  require(fits, 'method', accepted, name)
  steps = options['truncation_steps']
  fits = method.truncated == (steps is not None)
  accepted = "an integer with method 'tbptt_final' and None with others"
  require(fits, 'truncation_steps', accepted, steps, f'The method is {name!r}.')


def _check_readout(model: Model, loss: Loss, options: dict[str, Any]) -> None:
  """Raise a ValueError unless `readout_chunk` fits model, loss and other options."""
  chunk = options['readout_chunk']
  excluded = {
    'a model with split=None': model.split is None,
    'a loss with per_step=None': loss.per_step is None,
    'return_outputs=True': options['return_outputs'],
  }
  hint = ''
  if model.split is None and model.original is not None and model.original.split:
    hint = 'A replaced apply drops the split of the old one.'
  for case, is_given in excluded.items():
    fits = chunk is None or not is_given
    require(fits, 'readout_chunk', f'None with {case}', chunk, hint)


def _finite_weights(loss_weights: Any) -> np.ndarray | None:
  """Return the weights of the windows' losses as float64 [K]."""
  if loss_weights is None:
    return None
  is_array = isinstance(loss_weights, np.ndarray | jax.Array) and loss_weights.ndim == 1
  is_text = isinstance(loss_weights, str | bytes | bytearray)
  is_list = isinstance(loss_weights, Sequence) and not is_text
  given = loss_weights if is_array or is_list else ()
  weights = np.array([as_number(weight) for weight in given])
  finite = weights.size > 0 and bool((np.abs(weights) <= FLOAT32_MAX).all())
  require(finite, 'loss_weights', 'K finite numbers', loss_weights)
  return weights


def check_types(
  model: Model, loss: Loss, optimizer: optax.GradientTransformation
) -> None:
  """Raise a TypeError for the usual mistakes: a module, a function, a class."""
  check_type('model', model, Model, ', as fptt_jax.nn.from_nnx makes one')
  check_type('loss', loss, Loss, ', as fptt_jax.losses makes one (from_function)')
  if not isinstance(optimizer, optax.MultiSteps):
    check_type('optimizer', optimizer, optax.GradientTransformation)
