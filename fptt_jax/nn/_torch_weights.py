"""Weights of torch's recurrent modules as parameters; torch itself is not needed."""

from collections.abc import Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import (
  FLOATS,
  check_array,
  check_type,
  require,
  require_type,
)
from fptt_jax._trees import shapes

_NAME = re.compile(r'(weight|bias)_(ih|hh)_l\d{1,3}', re.ASCII)
_LAYERS_BY_GATES = {1: 'ElmanRNN', 3: 'GRU', 4: 'LSTM'}


def from_torch(state_dict: Mapping[str, Any]) -> list[dict[str, jax.Array]]:
  """Convert the weights of a torch recurrent module.

  The outputs then equal torch's up to rounding.

  Args:
    state_dict: `module.state_dict()` of a unidirectional `torch.nn.LSTM`,
      `torch.nn.GRU` or `torch.nn.RNN` (tanh) without projections, or a mapping of the
      same names to NumPy arrays.

  Returns:
    For each of torch's layers, the params of one :class:`fptt_jax.nn.LSTM`,
    :class:`fptt_jax.nn.GRU` or :class:`fptt_jax.nn.ElmanRNN`. In the params of a
    :class:`fptt_jax.nn.Sequential` they replace the layer's own: `params['layers'][0] =
    from_torch(state_dict)[0]`.

  Raises:
    ValueError: names or shapes do not belong to such a module.
    TypeError: `state_dict` is not a mapping, or its values are not floating-point
      arrays.

  Example:
    >>> import numpy as np
    >>> from fptt_jax import nn
    >>> weights = {'weight_ih_l0': np.ones((8, 3)), 'weight_hh_l0': np.ones((8, 2))}
    >>> sorted(nn.from_torch(weights)[0])
    ['bias', 'w_h', 'w_x']
  """
  check_type('state_dict', state_dict, Mapping)
  names = sorted(map(str, state_dict))
  are_known = all(map(_NAME.fullmatch, names))
  # Any other name belongs to a projection, a reverse direction or another module.
  numbers = sorted({int(name.rpartition('_l')[2]) for name in names if are_known})
  is_known = numbers and numbers == list(range(len(numbers)))
  accepted = 'of a unidirectional torch.nn.LSTM, GRU or RNN without projections'
  require(is_known, 'state_dict', accepted, names)
  weights = {name: _as_array(name, value) for name, value in state_dict.items()}
  layers = [_convert_layer(weights, number) for number in numbers]
  for layer in layers[1:]:
    same = layer['w_x'].shape == layer['w_h'].shape == layers[0]['w_h'].shape
    require(same, 'state_dict', 'of layers of one kind and size', shapes(layers))
  return layers


def _as_array(name: str, value: Any) -> np.ndarray:
  """Return a tensor or array as a NumPy array of floats."""
  # A torch tensor; torch itself is not imported.
  if hasattr(value, 'detach'):
    value = np.asarray(value.detach())
  array = check_array(name, value)
  is_abstract = isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct)
  is_float = not is_abstract and array.dtype in FLOATS
  accepted = 'a concrete array of floating-point numbers'
  require_type(is_float, name, accepted, array)
  return np.asarray(array)


def _convert_layer(
  weights: Mapping[str, np.ndarray], number: int
) -> dict[str, jax.Array]:
  """Convert one of torch's layers."""
  names = [f'weight_ih_l{number}', f'weight_hh_l{number}']
  complete = all(name in weights for name in names)
  require(complete, 'state_dict', f'a mapping with {names}', sorted(weights))
  # Torch multiplies columns, the layers here multiply rows.
  w_x, w_h = (weights[name].T for name in names)
  layer = _layer_kind(w_x, w_h)
  if layer is None:
    found = (w_x.T.shape, w_h.T.shape)
    raise ValueError(f'{names} must be of an LSTM, GRU or RNN, got shapes {found}.')
  width = w_h.shape[1]
  biases = [
    weights.get(f'bias_{part}_l{number}', np.zeros(width, w_x.dtype))
    for part in ('ih', 'hh')
  ]
  fits = all(bias.shape == (width,) for bias in biases)
  require(fits, 'biases', f'[{width}]', [bias.shape for bias in biases])
  # Torch's GRU applies its reset gate after the recurrent bias, so only the GRU keeps
  # both biases; elsewhere only their sum matters.
  params = {'w_x': w_x, 'w_h': w_h}
  if layer == 'GRU':
    params |= {'bias': biases[0], 'recurrent_bias': biases[1]}
  else:
    params |= {'bias': biases[0] + biases[1]}
  return {name: jnp.asarray(value) for name, value in params.items()}


def _layer_kind(w_x: np.ndarray, w_h: np.ndarray) -> str | None:
  """Return the layer with weights of these shapes, None if there is none."""
  if w_x.ndim != 2 or w_h.ndim != 2 or 0 in w_x.shape or 0 in w_h.shape:
    return None
  hidden_features, width = w_h.shape
  if w_x.shape[1] != width or width % hidden_features:
    return None
  return _LAYERS_BY_GATES.get(width // hidden_features)
