"""Facts about an NNX module that need no run: its constants, layers and inputs."""

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
    ActivationPenalty,
    AntisymmetricRNN,
    ElmanRNN,
    EmbeddingDropout,
    FastGRNN,
    GRU,
    IncrementalRNN,
    IndRNN,
    LRU,
    LSTM,
    LockedDropout,
    MixtureOfSoftmaxes,
    TemporalActivationPenalty,
    TiedReadout,
    nnx.Dropout,
    nnx.Embed,
    nnx.Linear,
  }
)
"""Layers that keep rows apart, do not look ahead and keep all memory in their state.

Subclasses of them may do otherwise and are not known.
"""
KNOWN_WRAPPERS = (LearnedInitialState, Reconstruction, WeightDrop)
"""Layers that are known if the layer they wrap is."""
KNOWN_CELLS = frozenset(
  {nnx.GRUCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.SimpleCell}
)
KNOWN_FUNCTIONS = (
  jax.nn.celu,
  jax.nn.elu,
  jax.nn.gelu,
  jax.nn.glu,
  jax.nn.hard_tanh,
  jax.nn.leaky_relu,
  jax.nn.log_sigmoid,
  jax.nn.log_softmax,
  jax.nn.relu,
  jax.nn.relu6,
  jax.nn.selu,
  jax.nn.sigmoid,
  jax.nn.silu,
  jax.nn.soft_sign,
  jax.nn.softmax,
  jax.nn.softplus,
  jax.nn.tanh,
  jnp.abs,
  jnp.cos,
  jnp.sin,
  jnp.square,
  jnp.tanh,
)
LIBRARIES = ('builtins', 'flax', 'jax', 'jaxlib', 'numpy', 'optax')
"""Packages whose functions and objects refer to nothing of the user's."""


def is_known(layer: Any) -> bool:
  """Return whether a layer needs no probe: it and all layers in it are known."""
  # By exact type throughout: a subclass may override anything.
  if type(layer) is Sequential:
    return all(is_known(inner) for inner in layer.layers)
  if type(layer) in KNOWN_WRAPPERS:
    return is_known(layer.layer)
  if type(layer) is FromCell:
    attributes = vars(layer.cell).items()
    functions = [value for name, value in attributes if name.endswith('_fn')]
    return type(layer.cell) in KNOWN_CELLS and all(map(is_known, functions))
  if type(layer) in KNOWN_LAYERS:
    return True
  # By identity: functions of other kinds may not be hashable or comparable.
  return any(layer is function for function in KNOWN_FUNCTIONS)


def unknown_layers(layer: Any) -> list[str]:
  """Return the names of a stack's layers, or of the module itself, if not known."""
  is_stack = type(layer) is Sequential
  names = []
  for index, inner in enumerate(layer.layers if is_stack else [layer]):
    if is_known(inner):
      continue
    name = _layer_name(inner.cell if isinstance(inner, FromCell) else inner)
    names.append(f'layers[{index}] {name}' if is_stack else name)
  return names


def example_inputs(module: Any) -> jax.ShapeDtypeStruct | None:
  """Return inputs [1, 1, ...] that the module takes, None if they are unknown.

  The first layer with a known number of features determines them.
  """
  for layer in module.layers if isinstance(module, Sequential) else [module]:
    while isinstance(layer, KNOWN_WRAPPERS):
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
  """Yield what a module refers to outside its variables, with its path.

  These are arrays among its attributes and, inside functions and plain objects among
  its attributes, arrays, modules and variables. NNX neither finds nor replaces them.
  """
  for path, node in nnx.iter_graph(module):
    attributes = vars(node) if isinstance(node, nnx.Module) else {}
    for name, value in attributes.items():
      # The names of a list's attributes may be numbers.
      if str(name).startswith('_pytree'):
        continue
      place = '.'.join(map(str, (*path, name)))
      for found in _referred(value, False, set()):
        yield place, found


def _layer_name(layer: Any) -> str:
  if isinstance(layer, nnx.Module):
    return type(layer).__name__
  return str(getattr(layer, '__name__', repr(layer)))


def _referred(value: Any, within: bool, seen: set[int]) -> Iterator[Any]:
  """Yield arrays in a value, and modules inside functions and objects.

  Args:
    value: any object.
    within: whether it is inside a function or object, and not in containers alone.
    seen: identities of the objects already visited; extended here.
  """
  if isinstance(value, nnx.Module | nnx.Variable):
    if within:
      yield value
    return
  if isinstance(value, type) or id(value) in seen:
    return
  # Objects may refer to each other in circles.
  seen.add(id(value))
  # Old releases of Flax keep abstract arrays of `eval_shape` as plain attributes.
  if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
    yield value
    return
  is_container = isinstance(value, tuple | list | set | frozenset | dict)
  for part in _parts(value):
    yield from _referred(part, within or not is_container, seen)


def _parts(value: Any) -> list[Any]:
  """Return what a function, container or object of the user refers to."""
  if isinstance(value, tuple | list | set | frozenset):
    return list(value)
  if isinstance(value, dict):
    return list(value.values())
  if isinstance(value, functools.partial):
    return [value.func, *value.args, *value.keywords.values()]
  if inspect.ismethod(value):
    return [value.__self__, value.__func__]
  # Libraries' functions close over caches and registries, but not over user arrays. A
  # decorated user function is found by its __wrapped__.
  if _belongs_to_a_library(value):
    return [value.__wrapped__] if hasattr(value, '__wrapped__') else []
  if inspect.isfunction(value):
    cells = [_contents(cell) for cell in value.__closure__ or ()]
    defaults = value.__defaults__ or ()
    keyword_defaults = value.__kwdefaults__ or {}
    return [*cells, *defaults, *keyword_defaults.values()]
  # A plain object of the user: its attributes may hold anything.
  return list(vars(value).values()) if hasattr(value, '__dict__') else []


def _belongs_to_a_library(value: Any) -> bool:
  module = getattr(value, '__module__', None) or type(value).__module__
  return str(module).partition('.')[0] in LIBRARIES


def _contents(cell: Any) -> Any:
  """Return the value of a closure's cell, None if it is not yet assigned."""
  try:
    return cell.cell_contents
  except ValueError:
    return None
