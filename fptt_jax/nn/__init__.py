"""Recurrent models in Flax NNX, and the adapters that turn NNX and Linen modules into the pure functions a train step takes."""

from fptt_jax.nn.adapters import from_linen, from_nnx
from fptt_jax.nn.cells import LRU, FastGRNN, IncrementalRNN, IndRNN, LRUState
from fptt_jax.nn.layers import GRU, LSTM, RNN, AntisymmetricRNN, Lift, LSTMState, Stack
from fptt_jax.nn.torch_weights import from_torch

__all__ = (
  'GRU',
  'LRU',
  'LSTM',
  'RNN',
  'AntisymmetricRNN',
  'FastGRNN',
  'IncrementalRNN',
  'IndRNN',
  'LRUState',
  'LSTMState',
  'Lift',
  'Stack',
  'from_linen',
  'from_nnx',
  'from_torch',
)
