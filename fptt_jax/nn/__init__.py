"""Recurrent models in Flax NNX, and the adapters that turn NNX and Linen modules into
the pure functions a train step takes.
"""

from fptt_jax.nn.adapters import from_linen, from_nnx, to_nnx, with_float32_params
from fptt_jax.nn.cells import LRU, FastGRNN, IncrementalRNN, IndRNN, LRUState
from fptt_jax.nn.foreign import from_equinox, from_haiku
from fptt_jax.nn.layers import (
  GRU,
  LSTM,
  AntisymmetricRNN,
  ElmanRNN,
  FromCell,
  LearnedInitialState,
  LSTMState,
  Sequential,
)
from fptt_jax.nn.readouts import MixtureOfSoftmaxes, TiedReadout
from fptt_jax.nn.reconstruction import Reconstruction
from fptt_jax.nn.regularization import (
  ActivationPenalty,
  EmbeddingDropout,
  LockedDropout,
  TemporalActivationPenalty,
  WeightDrop,
)
from fptt_jax.nn.torch_weights import from_torch

__all__ = (
  'ActivationPenalty',
  'AntisymmetricRNN',
  'EmbeddingDropout',
  'FastGRNN',
  'GRU',
  'IncrementalRNN',
  'IndRNN',
  'LRU',
  'LRUState',
  'LSTM',
  'LSTMState',
  'LearnedInitialState',
  'FromCell',
  'LockedDropout',
  'MixtureOfSoftmaxes',
  'ElmanRNN',
  'Reconstruction',
  'Sequential',
  'TemporalActivationPenalty',
  'TiedReadout',
  'WeightDrop',
  'with_float32_params',
  'from_equinox',
  'from_haiku',
  'from_linen',
  'from_nnx',
  'from_torch',
  'to_nnx',
)


def __dir__() -> list[str]:
  """Lists the public names alone."""
  return sorted(__all__)
