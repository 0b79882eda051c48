"""From NNX modules to the pure functions of `fptt_jax.Model`.

No other file of the library knows the lifecycle of NNX modules.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self
import warnings

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import require, require_type
from fptt_jax._probe import (
  HiddenMemoryError,
  check_new_model,
  check_state_rows,
  mark_checked,
)
from fptt_jax._trees import check_like
from fptt_jax._types import FeaturesAndReadout, Model, OwnKernels, OwnStep
from fptt_jax.nn._checks import CARRY_STATE, same_values
from fptt_jax.nn._from_cell import as_recurrent
from fptt_jax.nn._inspection import (
  example_inputs,
  is_known,
  referred_arrays,
  unknown_layers,
)
from fptt_jax.nn._native_own import find_credit
from fptt_jax.nn._recurrent import Recurrent
from fptt_jax.nn._sequential import Sequential, advance_own, own_steps

STREAMS = 0x52_4E_47
"""Number folded into a window's key for the random streams of modules.

The layers of a `Sequential` fold in their index, so that no stream shares their keys.
"""


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
  """Turn an NNX module into a :class:`fptt_jax.Model`.

  Args:
    build: makes the module from `nnx.Rngs`, such as `lambda rngs: nn.LSTM(1, 128,
      rngs=rngs)`. The module runs windows, as those of `fptt_jax.nn` do, or is a
      per-step cell such as `nnx.GRUCell`. A cell must not own random streams, and needs
      an attribute `in_features` if its carry depends on the number of inputs.

  Returns:
    The model. Its params are a nested dict of the module's `nnx.Param` values. `init`
    may be traced (jit, vmap over seeds). If the module's initial state depends on its
    parameters, the model has a `learned_initial_state`.

  Raises:
    TypeError: `build` is a module and not a function; the module is not recurrent; or
      it keeps state that is neither a parameter nor a random stream, such as batch
      statistics or caches. A train step carries parameters only.

  Example:
    >>> import jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> def build(rngs):
    ...   return nn.Sequential(nn.LSTM(1, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs))
    >>> model = nn.from_nnx(build)
    >>> params = model.init(jax.random.key(0))
    >>> x = jax.numpy.ones((28, 4, 1))
    >>> state, logits = model.apply(params, model.initial_state(4), x, None, None)
    >>> logits.shape
    (28, 4, 10)
  """
  is_function = callable(build) and not isinstance(build, nnx.Module)
  require_type(is_function, 'build', 'a function (rngs) -> module', build)

  def make(key: jax.Array) -> Any:
    return as_recurrent(build(nnx.Rngs(key)))

  def init(key: jax.Array) -> Any:
    return nnx.to_pure_dict(nnx.state(make(key), nnx.Param))

  parts = _split_module(make)
  abstract = parts.merge()
  known = is_known(abstract)
  initial_state, learned_initial_state = _initial_state_functions(parts)
  apply = _make_apply(parts, known)
  model = Model(
    init,
    initial_state,
    apply,
    learned_initial_state=learned_initial_state,
    plain=_make_apply(_with_plain_scans(parts), known),
    own_steps=_make_own_steps(parts),
    own_kernels=_make_own_kernels(parts),
  )
  _check_model(model, abstract, known)
  if isinstance(abstract, Sequential):
    # A Sequential accepts `last`, so one function serves as apply and apply_last.
    model = model._replace(apply_last=apply)
    # Without a readout there is nothing to run in chunks.
    if abstract.readout_start < len(abstract.layers):
      model = model._replace(split=_split_readout(parts))
  return model._replace(original=model)


def to_nnx(build: Callable[[nnx.Rngs], nnx.Module], params: Any) -> nnx.Module:
  """Put trained parameters into a module.

  Args:
    build: the function that :func:`from_nnx` was given.
    params: parameters of its model, such as `state.params` or the result of
      :func:`fptt_jax.fptt_eval_params`.

  Returns:
    The module that `build` makes, with these parameters.

  Raises:
    ValueError: the parameters have other names or shapes than the module's.

  Example:
    >>> import jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> build = lambda rngs: nnx.GRUCell(2, 3, rngs=rngs)
    >>> params = nn.from_nnx(build).init(jax.random.key(0))
    >>> cell = nn.to_nnx(build, params)
    >>> carry, y = cell(jax.numpy.zeros((1, 3)), jax.numpy.ones((1, 2)))
  """
  module = build(nnx.Rngs(0))
  # The wrapper shares the module's variables, so updating it updates the module.
  recurrent = as_recurrent(module)
  state = nnx.state(recurrent, nnx.Param)
  like = nnx.to_pure_dict(state)
  params = check_like('params', params, like, 'as build makes them')
  nnx.replace_by_pure_dict(state, params)
  nnx.update(recurrent, state)
  return module


class _Parts(NamedTuple):
  """An NNX module as values that functions of JAX can take.

  Attributes:
    graph: its structure.
    params: its parameters, abstract.
    streams: its random streams, abstract.
    constants: its other arrays.
  """

  graph: Any
  params: Any
  streams: Any
  constants: Any

  @classmethod
  def split(cls, module: nnx.Module) -> Self:
    """Split a module."""
    parts: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
    return cls(*parts)

  def merge(self) -> Any:
    """Make the module with abstract parameters."""
    return nnx.merge(self.graph, self.params, self.streams, self.constants)

  def abstract_params(self) -> Any:
    """Return the parameters as a nested dict of shapes and dtypes."""
    return nnx.to_pure_dict(self.params)

  def make(self, params: Any, key: jax.Array | None) -> Any:
    """Make the module with parameters; without a key it is in evaluation mode."""
    # replace_by_pure_dict writes into its argument, so it gets a copy.
    weights = jax.tree.map(lambda leaf: leaf, self.params)
    nnx.replace_by_pure_dict(weights, params)
    streams = _seed_streams(self.streams, key)
    module: Any = nnx.merge(self.graph, weights, streams, self.constants)
    if key is None:
      module.eval()
    else:
      module.train()
    return module


def _make_apply(parts: _Parts, known: bool) -> Callable[..., tuple[Any, jax.Array]]:
  """Make `Model.apply`, which also takes `last` for a :class:`Sequential`."""

  def apply(
    params: Any,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None,
    key: jax.Array | None,
    *last: jax.Array | int,
  ) -> tuple[Any, jax.Array]:
    module = parts.make(params, key)
    if known:
      result: tuple[Any, jax.Array] = module(state, x, mask, key, *last)
      return result
    # Modules are merged anew for each window, so whatever a call writes is lost.
    before = _arrays(module)
    result = module(state, x, mask, key, *last)
    _check_unchanged(before, _arrays(module))
    return result

  return apply


def _with_plain_scans(parts: _Parts) -> _Parts:
  """Return the module with all layers as plain scans, whatever they run as."""
  module = parts.merge()
  for _, node in nnx.iter_graph(module):
    if isinstance(node, Recurrent):
      node.implementation = 'scan'
  return _Parts.split(module)


def _make_own_steps(parts: _Parts) -> Callable[..., dict[int, OwnStep]]:
  """Make `Model.own_steps`."""

  def run(params: Any, state: Any, x: Any, own_only: bool) -> dict[int, OwnStep]:
    return own_steps(parts.make(params, None), state, x, own_only)

  return run


def _make_own_kernels(parts: _Parts) -> OwnKernels:
  """Make `Model.own_kernels`."""

  def advance(params: Any, *args: Any) -> dict[str, jax.Array]:
    return advance_own(parts.make(params, None), *args)

  return OwnKernels(advance, find_credit)


def _initial_state_functions(
  parts: _Parts,
) -> tuple[Callable[[int], Any], Callable[[Any, int], Any] | None]:
  """Make `Model.initial_state` and `Model.learned_initial_state`."""

  def learned_initial_state(params: Any, batch_size: int) -> Any:
    return parts.make(params, None).initial_state(batch_size)

  def initial_state(batch_size: int) -> Any:
    return parts.merge().initial_state(batch_size)

  def zero_state(batch_size: int) -> Any:
    shapes = jax.eval_shape(
      lambda params: learned_initial_state(params, batch_size), parts.abstract_params()
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def state_of_one_row(params: Any) -> Any:
    return learned_initial_state(params, 1)

  # `initial_state` then only gives shapes and dtypes; see Model.learned_initial_state.
  if _reads_params(state_of_one_row, parts.abstract_params()):
    return zero_state, learned_initial_state
  return initial_state, None


def _split_readout(parts: _Parts) -> FeaturesAndReadout:
  """Make `Model.split` of a :class:`Sequential`."""

  def features(
    params: Any, state: Any, x: jax.Array, mask: jax.Array | None, key: jax.Array | None
  ) -> Any:
    return parts.make(params, key).features(state, x, mask, key)

  def readout(params: Any, features: Any, key: jax.Array | None) -> Any:
    return parts.make(params, key).readout(features, key)

  return FeaturesAndReadout(features, readout)


def _reads_params(function: Callable[[Any], Any], params: Any) -> bool:
  """Return whether a function reads its parameters, or returns some of them."""
  # The jaxpr shows dependence without running anything.
  jaxpr = jax.make_jaxpr(function)(params).jaxpr
  read = [variable for equation in jaxpr.eqns for variable in equation.invars]
  read.extend(jaxpr.outvars)
  identities = {id(variable) for variable in read}
  return any(id(variable) in identities for variable in jaxpr.invars)


def _split_module(make: Callable[[jax.Array], Any]) -> _Parts:
  """Split the module that `make` builds.

  Only its constants are computed, and only if there are some.

  Raises:
    TypeError: the module keeps other variables, refers to modules outside its graph,
      or draws constants from its random streams.
  """
  key = jax.random.key(0)
  abstract = nnx.eval_shape(make, key)
  parts = _Parts.split(abstract)
  kept = ', '.join(_kept_variables(parts.constants))
  accepted = 'nnx.Param and random streams only'
  require(not kept, 'state of the module', accepted, kept, CARRY_STATE, TypeError)
  referred = list(referred_arrays(abstract))
  for place, found in referred:
    # Parameters would not be trained there.
    is_array = not isinstance(found, nnx.Module | nnx.Variable)
    hint = 'Make the function an nnx.Module that has it as an attribute.'
    require_type(is_array, f'what {place} refers to', 'an array', found, hint)
  if not referred and not jax.tree.leaves(parts.constants):
    return parts
  # Constants are part of the model, so they are computed now, even under a trace.
  with jax.ensure_compile_time_eval():
    module = make(key)
    drawn = _drawn_constants(module, make(jax.random.key(1)))
    concrete = _Parts.split(module)
  hint = 'Make it an nnx.Param, or draw it from a fixed key.'
  accepted = 'without arrays drawn from rngs outside its parameters'
  require(not drawn, 'the module', accepted, drawn, hint, TypeError)
  return parts._replace(graph=concrete.graph, constants=concrete.constants)


def _drawn_constants(module: nnx.Module, other: nnx.Module) -> list[str]:
  """Return where arrays outside the parameters depend on the key.

  Args:
    module: made with one key.
    other: made with another key.
  """
  values = dict(enumerate(referred_arrays(module)))
  # An array that the other module lacks shows a structure that depends on the key.
  return [
    place
    for index, (place, found) in enumerate(referred_arrays(other))
    if index not in values or not same_values(values[index][1], found)
  ]


def _kept_variables(state: Any) -> list[str]:
  """Return the kinds and places of state that a train step does not carry."""
  return [
    f'{type(leaf).__name__} at {".".join(map(str, path))}'
    for path, leaf in nnx.to_flat_state(state)
    if isinstance(leaf, nnx.Variable)
  ]


def _arrays(module: nnx.Module) -> dict[Any, list[Any]]:
  """Return a module's arrays by path, without random streams and sown values."""
  parts: Any = nnx.split(module, (nnx.RngState, nnx.Intermediate), ...)
  return {path: jax.tree.leaves(leaf) for path, leaf in nnx.to_flat_state(parts[2])}


def _check_unchanged(before: dict[Any, list[Any]], after: dict[Any, list[Any]]) -> None:
  """Raise if a module's call replaced or added an array, which no window would see.

  Raises:
    HiddenMemoryError: names the first such array.
  """
  # By identity: equal values would still be a write. Traced arrays cannot be compared.
  for path, arrays in after.items():
    if list(map(id, before.get(path, ()))) != list(map(id, arrays)):
      place = '.'.join(map(str, path))
      raise HiddenMemoryError(
        f'the module writes to {place} when it is called: carry such memory in the '
        'hidden state instead.'
      )


def _check_model(model: Model, module: Any, known: bool) -> None:
  """Check a new model: rows in its state and, by a probe, unknown layers.

  Args:
    model: the model.
    module: its module, abstract.
    known: whether all layers are known to be safe, so that no probe is needed.
  """
  name = type(module).__name__
  check_state_rows(name, model.initial_state)
  _warn_if_stateless(model, name)
  if known:
    mark_checked(model.apply)
    return
  inputs = example_inputs(module)
  # Without example inputs, the trainer probes the model on its first batch.
  if inputs is not None:
    layers = ', '.join(unknown_layers(module))
    check_new_model(model, inputs, f'{name} with {layers}')


def _warn_if_stateless(model: Model, name: str) -> None:
  """Warn if a model has no hidden state."""
  if not jax.tree.leaves(jax.eval_shape(lambda: model.initial_state(1))):
    warnings.warn(
      f'{name} carries no hidden state and remembers nothing from step to step. Add a '
      'recurrent layer or a per-step cell, such as nn.LSTM or nnx.GRUCell.',
      UserWarning,
      stacklevel=4,
    )


def _seed_streams(streams: Any, key: jax.Array | None) -> Any:
  """Restart a module's random streams from the window's key, each with its own key."""
  key = jax.random.key(0) if key is None else key
  key = jax.random.fold_in(key, STREAMS)
  leaves, structure = jax.tree.flatten(streams)
  fresh = []
  # A stream holds a key and a counter of its draws, which starts at 0.
  for index, leaf in enumerate(leaves):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      stream = jax.random.fold_in(key, index)
      # A stack of layers made by `nnx.vmap` has a stream of several keys.
      fresh.append(jax.random.split(stream, leaf.shape) if leaf.shape else stream)
    else:
      fresh.append(jnp.zeros(leaf.shape, leaf.dtype))
  return jax.tree.unflatten(structure, fresh)
