"""Weights of `torch.nn.LSTM`, `GRU` and `ElmanRNN` as parameters of the layers here.
Torch itself is not needed.
"""

from collections.abc import Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import FLOATS, check_array, shapes

_NAME = re.compile(r'(weight|bias)_(ih|hh)_l\d{1,3}', re.ASCII)
_GATES = {1: 'ElmanRNN', 3: 'GRU', 4: 'LSTM'}


def from_torch(state_dict: Mapping[str, Any]) -> list[dict[str, jax.Array]]:
  """Converts a torch recurrent module's weights; outputs then match torch's to
  rounding.

  Args:
    state_dict: `module.state_dict()` of a unidirectional `torch.nn.LSTM`,
      `torch.nn.GRU` or `torch.nn.RNN` (tanh) without projections, or a mapping of the
      same names to NumPy arrays.

  Returns: For each of torch's layers, the params of one :class:`LSTM`, :class:`GRU` or
    :class:`ElmanRNN`. In a stack's params they take the place of the layer's own:
    `params['layers'][0] = from_torch(state_dict)[0]`.

  Raises:
    ValueError: names or shapes that are not such a module's.
    TypeError: `state_dict` is no mapping, or of other things than arrays of
      floating-point numbers.
  """
  if not isinstance(state_dict, Mapping):
    raise TypeError(
      "from_torch expected a module's state_dict, a mapping of names to arrays, got "
      f'{type(state_dict).__name__}.'
    )
  names = sorted(map(str, state_dict))
  numbers = sorted(
    {int(name.rpartition('_l')[2]) for name in names if _NAME.fullmatch(name)}
  )
  if (
    not numbers
    or numbers != list(range(len(numbers)))
    or not all(map(_NAME.fullmatch, names))
  ):
    raise ValueError(
      'from_torch expected the state_dict of a unidirectional torch.nn.LSTM, GRU or '
      'RNN without projections '
      f'(weight_ih_l0, weight_hh_l0, bias_ih_l0, ...), got {names}.'
    )
  weights = {name: _array(name, value) for name, value in state_dict.items()}
  layers = [_layer(weights, number) for number in numbers]
  for layer in layers[1:]:
    if not layer['w_x'].shape == layer['w_h'].shape == layers[0]['w_h'].shape:
      raise ValueError(
        'from_torch expected layers of one kind and size, each above the other, got '
        f'{shapes(layers)}.'
      )
  return layers


def _array(name: str, value: Any) -> np.ndarray:
  array = check_array(
    name, np.asarray(value.detach()) if hasattr(value, 'detach') else value
  )
  if (
    isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct)
    or array.dtype not in FLOATS
  ):
    raise TypeError(
      f'{name} must be an array of floating-point numbers of 16 to 64 bits, got '
      f'{array!r}.'
    )
  return np.asarray(array)


def _layer(weights: Mapping[str, np.ndarray], number: int) -> dict[str, jax.Array]:
  suffix = f'l{number}'
  if f'weight_ih_{suffix}' not in weights or f'weight_hh_{suffix}' not in weights:
    raise ValueError(
      f'from_torch expected weight_ih_{suffix} and weight_hh_{suffix}, got '
      f'{sorted(weights)}.'
    )
  w_x, w_h = weights[f'weight_ih_{suffix}'].T, weights[f'weight_hh_{suffix}'].T
  hidden_features, width = w_h.shape if w_h.ndim == 2 else (0, 0)
  gates = _GATES.get(width // max(hidden_features, 1))
  if (
    gates is None
    or width % hidden_features
    or w_x.ndim != 2
    or w_x.shape[1] != width
    or not w_x.shape[0]
  ):
    raise ValueError(
      'from_torch cannot tell an LSTM, GRU or ElmanRNN, got weights of shapes '
      f'{w_x.T.shape} and {w_h.T.shape}.'
    )
  biases = [
    weights.get(f'bias_{part}_{suffix}', np.zeros(width, w_x.dtype))
    for part in ('ih', 'hh')
  ]
  if any(bias.shape != (width,) for bias in biases):
    raise ValueError(
      f'from_torch expected biases of shape ({width},), got '
      f'{[bias.shape for bias in biases]}.'
    )
  params = {'w_x': w_x, 'w_h': w_h}
  if gates == 'GRU':
    params |= {'bias': biases[0], 'recurrent_bias': biases[1]}
  else:
    params |= {'bias': biases[0] + biases[1]}
  return {name: jnp.asarray(value) for name, value in params.items()}
