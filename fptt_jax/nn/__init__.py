"""Recurrent layers in Flax NNX, and adapters from other libraries to `fptt_jax.Model`.

A layer maps (state, x [S, B, D], mask [S, B] or None, key or None) to (state,
y [S, B, H]). :class:`Sequential` combines layers, :func:`from_nnx` makes the pure
functions that a trainer takes.
"""

from fptt_jax.nn._foreign import from_equinox, from_haiku
from fptt_jax.nn._from_cell import FromCell
from fptt_jax.nn._from_linen import from_linen
from fptt_jax.nn._from_nnx import from_nnx, to_nnx
from fptt_jax.nn._initial_state import LearnedInitialState
from fptt_jax.nn._mixed_precision import with_float32_params
from fptt_jax.nn._readouts import MixtureOfSoftmaxes, TiedReadout
from fptt_jax.nn._reconstruction import Reconstruction
from fptt_jax.nn._regularization import (
  ActivationPenalty,
  EmbeddingDropout,
  LockedDropout,
  TemporalActivationPenalty,
  WeightDrop,
)
from fptt_jax.nn._sequential import Sequential
from fptt_jax.nn._torch_weights import from_torch
from fptt_jax.nn.cells.antisymmetric import AntisymmetricRNN
from fptt_jax.nn.cells.elman import ElmanRNN
from fptt_jax.nn.cells.fastgrnn import FastGRNN
from fptt_jax.nn.cells.gru import GRU
from fptt_jax.nn.cells.incremental import IncrementalRNN
from fptt_jax.nn.cells.indrnn import IndRNN
from fptt_jax.nn.cells.lru import LRU, LRUState
from fptt_jax.nn.cells.lstm import LSTM, LSTMState

__all__ = (
  'ActivationPenalty',
  'AntisymmetricRNN',
  'ElmanRNN',
  'EmbeddingDropout',
  'FastGRNN',
  'FromCell',
  'GRU',
  'IncrementalRNN',
  'IndRNN',
  'LRU',
  'LRUState',
  'LSTM',
  'LSTMState',
  'LearnedInitialState',
  'LockedDropout',
  'MixtureOfSoftmaxes',
  'Reconstruction',
  'Sequential',
  'TemporalActivationPenalty',
  'TiedReadout',
  'WeightDrop',
  'from_equinox',
  'from_haiku',
  'from_linen',
  'from_nnx',
  'from_torch',
  'to_nnx',
  'with_float32_params',
)


def __dir__() -> list[str]:
  """List the public names alone."""
  return sorted(__all__)
