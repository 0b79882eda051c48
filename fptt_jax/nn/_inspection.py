"""What can be told of an NNX module without running it: its constants, its known
layers, the inputs it takes.
"""

from collections.abc import Iterator
import functools
import inspect
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax.nn._from_cell import FromCell
from fptt_jax.nn._initial_state import LearnedInitialState
from fptt_jax.nn._readouts import MixtureOfSoftmaxes, TiedReadout
from fptt_jax.nn._reconstruction import Reconstruction
from fptt_jax.nn._recurrent import Recurrent
from fptt_jax.nn._regularization import (
  ActivationPenalty,
  EmbeddingDropout,
  LockedDropout,
  TemporalActivationPenalty,
  WeightDrop,
)
from fptt_jax.nn._sequential import Sequential
from fptt_jax.nn.cells.antisymmetric import AntisymmetricRNN
from fptt_jax.nn.cells.elman import ElmanRNN
from fptt_jax.nn.cells.fastgrnn import FastGRNN
from fptt_jax.nn.cells.gru import GRU
from fptt_jax.nn.cells.incremental import IncrementalRNN
from fptt_jax.nn.cells.indrnn import IndRNN
from fptt_jax.nn.cells.lru import LRU
from fptt_jax.nn.cells.lstm import LSTM

KNOWN_LAYERS = frozenset(
  {
    *(GRU, LSTM, ElmanRNN, AntisymmetricRNN, FastGRNN, IncrementalRNN, IndRNN, LRU),
    *(ActivationPenalty, EmbeddingDropout, LockedDropout, TemporalActivationPenalty),
    *(MixtureOfSoftmaxes, TiedReadout),
    *(nnx.Dropout, nnx.Embed, nnx.Linear),
  }
)
"""Layers that keep rows apart, do not look ahead and carry all their memory; subclasses
may do anything.
"""
KNOWN_CELLS = frozenset(
  {nnx.GRUCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.SimpleCell}
)
KNOWN_FUNCTIONS = (
  *(
    jax.nn.relu,
    jax.nn.elu,
    jax.nn.gelu,
    jax.nn.silu,
    jax.nn.softplus,
    jax.nn.sigmoid,
    jax.nn.leaky_relu,
  ),
  *(
    jax.nn.selu,
    jax.nn.celu,
    jax.nn.relu6,
    jax.nn.log_sigmoid,
    jax.nn.soft_sign,
    jax.nn.hard_tanh,
    jax.nn.glu,
  ),
  *(
    jax.nn.softmax,
    jax.nn.log_softmax,
    jax.nn.tanh,
    jnp.tanh,
    jnp.sin,
    jnp.cos,
    jnp.square,
    jnp.abs,
  ),
)


def is_known(layer: Any) -> bool:
  """Returns whether a layer needs no probe, because it and all layers in it are
  known.
  """
  if type(layer) is Sequential:
    return all(is_known(inner) for inner in layer.layers)
  if type(layer) in (LearnedInitialState, WeightDrop, Reconstruction):
    return is_known(layer.layer)
  if type(layer) is FromCell:
    functions = [
      value for name, value in vars(layer.cell).items() if name.endswith('_fn')
    ]
    return type(layer.cell) in KNOWN_CELLS and all(
      is_known(function) for function in functions
    )
  return type(layer) in KNOWN_LAYERS or any(
    layer is function for function in KNOWN_FUNCTIONS
  )


def unknown_layers(layer: Any) -> list[str]:
  """Returns the names of the layers of a stack, or of the module itself, that are not
  known.
  """
  layers = list(layer.layers) if type(layer) is Sequential else [layer]
  names = []
  for number, inner in enumerate(layers):
    if not is_known(inner):
      inner = inner.cell if isinstance(inner, FromCell) else inner
      name = (
        type(inner).__name__
        if isinstance(inner, nnx.Module)
        else getattr(inner, '__name__', repr(inner))
      )
      names.append(f'layers[{number}] {name}' if type(layer) is Sequential else name)
  return names


def example_inputs(module: Any) -> jax.ShapeDtypeStruct | None:
  """Returns inputs [1, 1, ...] that the module takes, by its first layer that tells;
  None if none does.
  """
  for layer in module.layers if isinstance(module, Sequential) else [module]:
    while isinstance(layer, LearnedInitialState | WeightDrop | Reconstruction):
      layer = layer.layer
    embed = layer.embed if isinstance(layer, EmbeddingDropout) else layer
    if isinstance(embed, nnx.Embed):
      return jax.ShapeDtypeStruct((1, 1), jnp.int32)
    features = None
    if isinstance(layer, Recurrent | FromCell | nnx.Linear):
      features = layer.in_features
    elif isinstance(layer, nnx.LayerNorm | nnx.RMSNorm):
      features = layer.num_features
    if features is not None:
      return jax.ShapeDtypeStruct((1, 1, features), jnp.float32)
  return None


def referred_arrays(module: nnx.Module) -> Iterator[tuple[str, Any]]:
  """Yields all that a module refers to outside of its variables, each with the
  attribute's place.

  That is arrays among its attributes and, within functions and plain objects among
  them, arrays, modules and variables, which NNX neither finds nor replaces.
  """
  for path, node in nnx.iter_graph(module):
    for name, value in vars(node).items() if isinstance(node, nnx.Module) else ():
      if str(name).startswith('_pytree'):  # The names within a list may be numbers.
        continue
      place = '.'.join(map(str, (*path, name)))
      for found in _referred(value, False, set()):
        yield place, found


def _referred(value: Any, within: bool, seen: set[int]) -> Iterator[Any]:
  """Yields the arrays in a value, and the modules in functions and objects: `within`
  tells whether it is in one.
  """
  if isinstance(value, nnx.Module | nnx.Variable):
    if within:
      yield value
    return
  if isinstance(value, type) or id(value) in seen:
    return
  seen.add(id(value))
  if isinstance(value, jax.Array | np.ndarray):
    yield value
    return
  is_container = isinstance(value, tuple | list | set | frozenset | dict)
  for part in _parts(value):
    yield from _referred(part, within or not is_container, seen)


def _parts(value: Any) -> list[Any]:
  """Returns what a function, container or object of the user's refers to."""
  if isinstance(value, tuple | list | set | frozenset):
    return list(value)
  if isinstance(value, dict):
    return list(value.values())
  if isinstance(value, functools.partial):
    return [value.func, *value.args, *value.keywords.values()]
  if inspect.ismethod(value):
    return [value.__self__, value.__func__]
  if _belongs_to_a_library(value):
    return [value.__wrapped__] if hasattr(value, '__wrapped__') else []
  if inspect.isfunction(value):
    cells = [_contents(cell) for cell in value.__closure__ or ()]
    return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
  return list(vars(value).values()) if hasattr(value, '__dict__') else []


def _belongs_to_a_library(value: Any) -> bool:
  module = getattr(value, '__module__', None) or type(value).__module__
  return str(module).partition('.')[0] in (
    'jax',
    'jaxlib',
    'flax',
    'numpy',
    'builtins',
    'optax',
  )


def _contents(cell: Any) -> Any:
  try:
    return cell.cell_contents
  except ValueError:  # Not yet assigned.
    return None
