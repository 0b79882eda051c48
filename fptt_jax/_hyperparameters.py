"""The hyperparameters of FPTT: numbers or schedules over windows."""

from collections.abc import Callable
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import FLOAT32_MAX, FLOAT32_TINY, check_number

Hyperparameter = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]


RANGES = {
  'alpha': (FLOAT32_TINY, FLOAT32_MAX, 'a finite number > 0'),
  'beta': (FLOAT32_TINY, 1.0, 'a number in (0, 1]'),
  'kappa': (0.0, FLOAT32_MAX, 'a finite number >= 0'),
  'linear_scale': (0.0, 1.0, 'a number in [0, 1]'),
}
"""Smallest and largest value of each hyperparameter, and the range in words."""


class Hyperparameters(NamedTuple):
  """The hyperparameters of :func:`fptt`, or their values at one window."""

  alpha: Any
  beta: Any
  kappa: Any
  linear_scale: Any


def check_hyperparameters(hyperparameters: Hyperparameters) -> Hyperparameters:
  """Validate the hyperparameters; concrete numbers become floats."""
  checked = {}
  for name, value in hyperparameters._asdict().items():
    checked[name] = _check_hyperparameter(name, value)
  return Hyperparameters(**checked)


def _check_hyperparameter(name: str, value: Hyperparameter) -> Hyperparameter:
  """Return a hyperparameter, as a float if it is concrete; raise if out of range."""
  low, high, expected = RANGES[name]
  # `fptt` may be called while a step is traced.
  with jax.ensure_compile_time_eval():
    first = value(jnp.zeros([], jnp.int32)) if callable(value) else value
  if isinstance(first, jax.core.Tracer):
    return value  # It has no value yet. `_value_at` checks it in each window.
  which = f'{name} at window 0' if callable(value) else name
  number = check_number(which, first, low, high, f'{expected} or a schedule')
  if callable(value):
    _check_schedule(name, value)
  if name == 'beta':
    _warn_if_extrapolating(number)
  return value if callable(value) else number


def _warn_if_extrapolating(beta: float) -> None:
  """Warn if W̄ weighs its old value negatively."""
  if beta > 0.5:
    warnings.warn(
      f'fptt with beta={beta:g} > 0.5 extrapolates: W̄ weighs its old value by '
      f'1 - 2 beta = {1 - 2 * beta:g}, and momentum makes it unstable early (see '
      'fptt_jax.spectral_radius).',
      stacklevel=5,  # The caller of `fptt`.
    )


def _check_schedule(
  name: str, schedule: Callable[[jax.Array], jax.typing.ArrayLike]
) -> None:
  """Raise unless a schedule stays in its range at the windows that are tried."""
  low, high, expected = RANGES[name]
  windows, values = _values_tried(schedule)
  bad = ~((values >= low) & (values <= high))
  if bad.any():
    where = f'{name} at window {windows[bad][0]}'
    raise ValueError(f'{where} must be {expected}, got {values[bad][0]:g}.')


def _values_tried(
  schedule: Callable[[jax.Array], jax.typing.ArrayLike],
) -> tuple[np.ndarray, np.ndarray]:
  """Return windows and a schedule's values there; none if it cannot be mapped."""
  # All of the first 65,536 windows, and 512 more up to the millionth.
  late = np.geomspace(2**16, 10**6, 512)
  windows = np.unique(np.concatenate([np.arange(2**16), late]).astype(np.int32))
  try:
    with jax.ensure_compile_time_eval():
      values = np.asarray(jax.vmap(schedule)(jnp.asarray(windows)), np.float64)
  except jax.errors.JAXTypeError:
    # The schedule takes concrete numbers only, such as a table of unknown length, or
    # has a traced factor.
    return np.zeros(0, np.int32), np.zeros(0)
  return windows, values


def values_at(hyperparameters: Hyperparameters, window: jax.Array) -> Hyperparameters:
  """Return the hyperparameters' values at a window."""
  return Hyperparameters(
    *(
      _value_at(name, value, window)
      for name, value in hyperparameters._asdict().items()
    )
  )


def _value_at(
  name: str, value: Hyperparameter, window: jax.Array
) -> jax.typing.ArrayLike:
  """Return a hyperparameter's value at a window, or NaN if it is out of range."""
  if isinstance(value, float):
    return value  # It was checked when `fptt` was called.
  low, high, _ = RANGES[name]
  now = jnp.asarray(value(window) if callable(value) else value)
  # A traced value cannot raise an error. NaN shows in the next loss.
  return jnp.where((now >= low) & (now <= high), now, jnp.nan)
