"""Weights of `torch.nn.LSTM`, `GRU` and `RNN` as parameters of the layers here. Torch itself is not needed."""

from collections.abc import Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GATES = {1: 'RNN', 3: 'GRU', 4: 'LSTM'}


def from_torch(state_dict: Mapping[str, Any]) -> list[dict[str, jax.Array]]:
  """Converts a torch recurrent module's weights; outputs then match torch's to rounding.

  Args:
    state_dict: `module.state_dict()` of a unidirectional `torch.nn.LSTM`, `torch.nn.GRU` or `torch.nn.RNN` (tanh) without
      projections, or a mapping of the same names to NumPy arrays.

  Returns:
    For each of torch's layers, the params of one :class:`LSTM`, :class:`GRU` or :class:`RNN`. In a stack's params they take the
    place of the layer's own: `params['layers'][0] = from_torch(state_dict)[0]`.

  Raises:
    ValueError: names or shapes that are not such a module's.
  """
  weights = {name: np.asarray(getattr(value, 'detach', lambda v=value: v)()) for name, value in state_dict.items()}
  unknown = [name for name in weights if not re.fullmatch(r'(weight|bias)_(ih|hh)_l\d+', name)]
  if unknown or 'weight_ih_l0' not in weights:
    raise ValueError(
      'from_torch expected the state_dict of a unidirectional torch.nn.LSTM, GRU or RNN without projections '
      f'(weight_ih_l0, weight_hh_l0, bias_ih_l0, ...), got {sorted(weights)}.'
    )
  num_layers = sum(name.startswith('weight_ih') for name in weights)
  return [_layer(weights, number) for number in range(num_layers)]


def _layer(weights: Mapping[str, np.ndarray], number: int) -> dict[str, jax.Array]:
  suffix = f'l{number}'
  if f'weight_ih_{suffix}' not in weights or f'weight_hh_{suffix}' not in weights:
    raise ValueError(f'from_torch found no weight_ih_{suffix} and weight_hh_{suffix} among {sorted(weights)}.')
  w_x, w_h = weights[f'weight_ih_{suffix}'].T, weights[f'weight_hh_{suffix}'].T
  hidden_features, width = w_h.shape
  if width % hidden_features or width // hidden_features not in _GATES or w_x.shape[1] != width:
    raise ValueError(f'from_torch cannot tell an LSTM, GRU or RNN from weights of shapes {w_x.T.shape} and {w_h.T.shape}.')
  zeros = np.zeros(width, w_x.dtype)
  bias, recurrent_bias = (weights.get(f'bias_{part}_{suffix}', zeros) for part in ('ih', 'hh'))
  params = {'w_x': w_x, 'w_h': w_h}
  if _GATES[width // hidden_features] == 'GRU':
    params |= {'bias': bias, 'recurrent_bias': recurrent_bias}
  else:
    params |= {'bias': bias + recurrent_bias}
  return {name: jnp.asarray(value) for name, value in params.items()}
