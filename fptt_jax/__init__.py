"""Training recurrent networks forward through time (FPTT, Kag & Saligrama, ICML 2021) in JAX.

One legend everywhere: T steps, K windows, S steps a window, B batch, D features, H hidden, C classes, V vocabulary; arrays are
time-major. `fptt_jax.nn` holds models and the adapters for Flax; nothing else here imports Flax.

The public modules are `fptt_jax`, `fptt_jax.losses` and `fptt_jax.nn`. `fptt_jax.nn` is imported when it is first used.
"""

import importlib
import types
import typing

from fptt_jax import losses
from fptt_jax.devices import cpu_setup
from fptt_jax.health import check_finite, find_nonfinite, lambda_diverges
from fptt_jax.losses import Loss, means
from fptt_jax.methods import METHODS, Method
from fptt_jax.programs import population, scan_steps, take_member
from fptt_jax.stability import spectral_radius
from fptt_jax.states import state_from_arrays, state_to_arrays
from fptt_jax.training import Batch, Model, Penalised, Split, StepMetrics, Trainer, TrainState, check_batch, global_batch, trainer
from fptt_jax.transformation import ALGORITHM_2, RELEASE, FPTTState, fptt, fptt_eval_params, fptt_restart
from fptt_jax.windows import Window, Windows, cut

if typing.TYPE_CHECKING:
  from fptt_jax import nn as nn

__version__ = '0.2.0.dev0'

__all__ = (
  'ALGORITHM_2',
  'METHODS',
  'RELEASE',
  'Batch',
  'FPTTState',
  'Loss',
  'Method',
  'Model',
  'Penalised',
  'Split',
  'StepMetrics',
  'TrainState',
  'Trainer',
  'Window',
  'Windows',
  'check_batch',
  'check_finite',
  'cpu_setup',
  'cut',
  'find_nonfinite',
  'fptt',
  'fptt_eval_params',
  'fptt_restart',
  'global_batch',
  'lambda_diverges',
  'losses',
  'means',
  'population',
  'scan_steps',
  'spectral_radius',
  'state_from_arrays',
  'state_to_arrays',
  'take_member',
  'trainer',
)


def __getattr__(name: str) -> types.ModuleType:
  """Imports `fptt_jax.nn`, and Flax with it, when it is first asked for."""
  if name == 'nn':
    return importlib.import_module('fptt_jax.nn')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  """Lists the public names alone."""
  return sorted((*__all__, '__version__', 'nn'))
