"""Training recurrent networks forward through time (FPTT, Kag & Saligrama, ICML 2021)
in JAX.

One legend everywhere: T steps, K windows, S steps per window, B batch, D features, H
hidden, C classes, V vocabulary; arrays are time-major. `fptt_jax.nn` holds models and
the adapters for Flax; nothing else here imports Flax.

The public modules are `fptt_jax`, `fptt_jax.influence`, `fptt_jax.losses`,
`fptt_jax.nn` and `fptt_jax.river`, which needs river. `fptt_jax.nn` is imported when it
is first used, and so are trainers, influences, the functions for streams and exported
steps.
"""

import importlib
import typing

from fptt_jax import losses
from fptt_jax._batch import Batch, validate_batch
from fptt_jax._monitor import find_nonfinite, lambda_diverges, raise_if_nonfinite
from fptt_jax._stability import spectral_radius
from fptt_jax._states import state_from_arrays, state_to_arrays
from fptt_jax._summary import fptt_eval_params, fptt_restart
from fptt_jax._transform import (
  FPTTState,
  fptt,
  fptt_algorithm2,
)
from fptt_jax._types import (
  FeaturesAndReadout,
  Model,
  OutputsWithPenalty,
  StepMetrics,
  Trainer,
  TrainState,
)
from fptt_jax._window_momentum import adam_by_window, sgd_by_window
from fptt_jax._windows import WindowPlan, WindowView, make_windows
from fptt_jax.losses import Loss, compute_metrics
from fptt_jax.parallel._batches import make_global_batch
from fptt_jax.parallel._devices import use_cpu_devices

if typing.TYPE_CHECKING:
  from fptt_jax import influence as influence
  from fptt_jax import nn as nn
  from fptt_jax._exporting import (
    ExportedStep,
    LoadedStep,
    export_step,
    load_exported_step,
  )
  from fptt_jax.streaming._learner import make_learner
  from fptt_jax.streaming._types import Learner, StreamMetrics, StreamState
  from fptt_jax.training._members import take_member, vmap_trainer
  from fptt_jax.training._scan import scan_train_steps
  from fptt_jax.training._schedules import METHODS, Method
  from fptt_jax.training._trainer import make_trainer

__version__ = '0.2.0.dev0'

__all__ = (
  'METHODS',
  'Batch',
  'ExportedStep',
  'FPTTState',
  'LoadedStep',
  'Loss',
  'Method',
  'Model',
  'OutputsWithPenalty',
  'FeaturesAndReadout',
  'StepMetrics',
  'TrainState',
  'Trainer',
  'WindowView',
  'WindowPlan',
  'validate_batch',
  'raise_if_nonfinite',
  'use_cpu_devices',
  'make_windows',
  'find_nonfinite',
  'adam_by_window',
  'sgd_by_window',
  'fptt',
  'fptt_algorithm2',
  'fptt_eval_params',
  'fptt_restart',
  'make_global_batch',
  'influence',
  'lambda_diverges',
  'losses',
  'compute_metrics',
  'vmap_trainer',
  'scan_train_steps',
  'spectral_radius',
  'state_from_arrays',
  'state_to_arrays',
  'take_member',
  'make_trainer',
  'Learner',
  'StreamMetrics',
  'StreamState',
  'make_learner',
  'export_step',
  'load_exported_step',
)


# They take most of this library's time to import, and a program that uses `fptt` in a
# loop of its own needs none of them.
_LATE = {
  'METHODS': 'fptt_jax.training._schedules',
  'Method': 'fptt_jax.training._schedules',
  'make_trainer': 'fptt_jax.training._trainer',
  'scan_train_steps': 'fptt_jax.training._scan',
  'take_member': 'fptt_jax.training._members',
  'vmap_trainer': 'fptt_jax.training._members',
  'ExportedStep': 'fptt_jax._exporting',
  'LoadedStep': 'fptt_jax._exporting',
  'export_step': 'fptt_jax._exporting',
  'load_exported_step': 'fptt_jax._exporting',
  'Learner': 'fptt_jax.streaming._types',
  'StreamMetrics': 'fptt_jax.streaming._types',
  'StreamState': 'fptt_jax.streaming._types',
  'make_learner': 'fptt_jax.streaming._learner',
}
"""Modules of the names that are imported when they are first asked for."""


def __getattr__(name: str) -> typing.Any:
  """Import a late module or name when it is first used; `nn` imports Flax."""
  if name in ('influence', 'nn'):
    return importlib.import_module(f'fptt_jax.{name}')
  if name in _LATE:
    value = getattr(importlib.import_module(_LATE[name]), name)
    globals()[name] = value
    return value
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  """List the public names alone."""
  return sorted((*__all__, '__version__', 'nn'))
