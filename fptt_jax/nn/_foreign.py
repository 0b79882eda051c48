"""Adapters from Equinox and Haiku, which are imported only when they are used."""

from collections.abc import Callable
import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fptt_jax._checks import require, require_type
from fptt_jax._probe import check_new_model, check_state_rows, mark_checked
from fptt_jax._types import Model
from fptt_jax.nn._checks import (
  check_batch_size,
  check_dtypes,
  check_features_shape,
  inputs_like,
  same_values,
  steps_and_rows,
)
from fptt_jax.nn._recurrent import Step, scan_cell

RowStep = Callable[[Any, Any, jax.Array, dict[str, Any]], tuple[Any, jax.Array]]
"""(module, state, x_t, keyword arguments) -> (state, y_t) of one row."""


def from_equinox(build: Callable[[jax.Array], Any]) -> Model:
  """Turn an Equinox per-step module into a :class:`fptt_jax.Model`.

  Equinox modules act on one row. Here they are mapped over the rows of a batch.

  Args:
    build: makes the module from a key, such as `lambda key: eqx.nn.GRUCell(2, 16,
      key=key)`. The module is an `eqx.nn.GRUCell`, an `eqx.nn.LSTMCell`, or a module
      with `initial_state()` and `(state, x_t [D]) -> (state, y_t)`, which may hold
      several cells and a readout. If its call has an argument `key`, it gets one per
      step and row in training, and None in evaluation, where the module is in
      Equinox's inference mode.

  Returns:
    The model. Its params are the module's floating-point arrays, with None in place of
    all else. After training, `eqx.combine(params, build(key))` is the trained module.

  Raises:
    ImportError: Equinox is not installed.
    TypeError: the module does not follow the protocol, keeps running statistics, or
      holds other arrays that depend on the key.

  Example::

    import equinox as eqx
    import jax
    from fptt_jax import nn
    model = nn.from_equinox(lambda key: eqx.nn.GRUCell(2, 16, key=key))
    params = model.init(jax.random.key(0))
    x = jax.numpy.ones((28, 4, 2))
    state, y = model.apply(params, model.initial_state(4), x, None, None)
    assert y.shape == (28, 4, 16)
  """
  eqx = _import('equinox', 'from_equinox', 'equinox')
  is_function = not isinstance(build, eqx.Module)
  require_type(is_function, 'build', 'a function (key) -> module', build)
  # Shapes only: large models are not drawn to be inspected.
  abstract = eqx.filter_eval_shape(build, jax.random.key(0))
  _check_stateless(eqx, abstract)
  constants = _equinox_constants(eqx, build, abstract)
  run_row = _equinox_step(eqx, abstract)
  takes_key = 'key' in inspect.signature(type(abstract).__call__).parameters

  def init(key: jax.Array) -> Any:
    return eqx.filter(build(key), eqx.is_inexact_array)

  def initial_state(batch_size: int) -> Any:
    state = _equinox_initial_state(eqx, abstract, constants)
    batch_size = check_batch_size(batch_size)

    def repeat(leaf: jax.Array) -> jax.Array:
      return jnp.broadcast_to(leaf, (batch_size, *leaf.shape))

    return jax.tree.map(repeat, state)

  def apply(
    params: Any, state: Any, x: jax.Array, mask: jax.Array | None, key: jax.Array | None
  ) -> tuple[Any, jax.Array]:
    module = eqx.combine(params, constants)
    module = eqx.nn.inference_mode(module, value=key is None)
    step = _map_over_rows(run_row, module, takes_key)
    keys = None if key is None else jax.random.split(key, steps_and_rows(x)[0])
    return scan_cell(step, state, (x, keys), mask)

  # Pure steps of single rows cannot mix rows or hide memory, so no probe is needed.
  mark_checked(apply)
  return Model(init, initial_state, apply)


def from_haiku(
  build: Callable[[], Any],
  features_shape: tuple[int, ...] | dict[str, Any],
  dtype: jax.typing.DTypeLike | dict[str, Any] = jnp.float32,
) -> Model:
  """Turn a Haiku recurrent core into a :class:`fptt_jax.Model`.

  Args:
    build: makes the core inside Haiku's transformation, such as `lambda:
      hk.DeepRNN([hk.LSTM(16), hk.Linear(10)])`. The core is any `hk.RNNCore`: `(x_t
      [B, D], state) -> (y_t, state)` with `initial_state(batch_size)`.
    features_shape: shape of one step of one sequence: (D,), or () for tokens; a dict of
      shapes for inputs that are a dict.
    dtype: dtype of the inputs, or a dict of dtypes.

  Returns:
    The model. Its params are those of `hk.transform` of the same core. In training the
    core has random keys; in evaluation `hk.maybe_next_rng_key()` is None.

  Raises:
    ImportError: Haiku is not installed.
    TypeError: the core does not follow the protocol, keeps Haiku state, or its initial
      state has parameters.
    ValueError: `features_shape` is not a shape, `dtype` is neither floating point nor
      integer, or their keys differ.

  Example::

    import haiku as hk
    import jax
    from fptt_jax import nn
    model = nn.from_haiku(lambda: hk.DeepRNN([hk.LSTM(16), hk.Linear(10)]), (2,))
    params = model.init(jax.random.key(0))
    x = jax.numpy.ones((28, 4, 2))
    state, y = model.apply(params, model.initial_state(4), x, None, None)
    assert y.shape == (28, 4, 10)
  """
  hk = _import('haiku', 'from_haiku', 'dm-haiku')
  features_shape = check_features_shape(features_shape)
  dtype = check_dtypes(dtype, features_shape)

  def make_core() -> Any:
    core = build()
    is_core = isinstance(core, hk.RNNCore)
    require_type(is_core, 'the result of build', 'a hk.RNNCore', core)
    return core

  start = hk.transform_with_state(lambda size: make_core().initial_state(size))
  run = hk.transform_with_state(lambda x, state: make_core()(x, state))

  def initial_state(batch_size: int) -> Any:
    # Without parameters: _check_haiku_core has shown that the core needs none.
    state, _ = start.apply({}, {}, None, check_batch_size(batch_size))
    return state

  def init(key: jax.Array) -> Any:
    x = optax.tree.zeros_like(inputs_like(features_shape, dtype, 1))
    params, _ = run.init(key, x, initial_state(1))
    return params

  def apply(
    params: Any, state: Any, x: jax.Array, mask: jax.Array | None, key: jax.Array | None
  ) -> tuple[Any, jax.Array]:
    def step(
      state: Any, inputs: tuple[jax.Array, jax.Array | None]
    ) -> tuple[Any, jax.Array]:
      x_t, key_t = inputs
      (y_t, state), _ = run.apply(params, {}, key_t, x_t, state)
      return state, y_t

    keys = None if key is None else jax.random.split(key, steps_and_rows(x)[0])
    return scan_cell(step, state, (x, keys), mask)

  x_t = inputs_like(features_shape, dtype, 1)
  _check_haiku_core(start, run, initial_state, x_t)
  model = Model(init, initial_state, apply)
  check_new_model(model, inputs_like(features_shape, dtype, 1, 1), 'the core')
  return model


def _check_haiku_core(
  start: Any, run: Any, initial_state: Callable[[int], Any], x_t: jax.ShapeDtypeStruct
) -> None:
  """Raise a TypeError if a core has a trained initial state or Haiku state."""
  key = jax.random.key(0)
  params, _ = jax.eval_shape(lambda key: start.init(key, 1), key)
  name = 'parameters of the initial state'
  require(not jax.tree.leaves(params), name, 'none', sorted(params), '', TypeError)
  check_state_rows('from_haiku', initial_state)
  # A train step carries parameters and the hidden state only.
  kept = _haiku_state(run, initial_state, x_t)
  hint = 'Use hk.LayerNorm in place of running statistics.'
  require(not kept, "the core's Haiku state", 'empty', kept, hint, TypeError)


def _haiku_state(
  run: Any, initial_state: Callable[[int], Any], x_t: jax.ShapeDtypeStruct
) -> list[str]:
  """Return the names of the modules of a core that keep Haiku state."""

  def init(key: jax.Array, x: jax.Array) -> Any:
    return run.init(key, x, initial_state(1))

  _, kept = jax.eval_shape(init, jax.random.key(0), x_t)
  return sorted(kept) if jax.tree.leaves(kept) else []


def _check_stateless(eqx: Any, module: Any) -> None:
  """Raise a TypeError if an Equinox module keeps state outside its carry."""

  def is_index(leaf: Any) -> bool:
    return isinstance(leaf, eqx.nn.StateIndex)

  leaves = jax.tree.leaves(module, is_leaf=is_index)
  stateless = not any(map(is_index, leaves))
  hint = 'Use eqx.nn.LayerNorm in place of running statistics.'
  require_type(stateless, 'the module', 'without Equinox state', module, hint)


def _equinox_constants(
  eqx: Any, build: Callable[[jax.Array], Any], abstract: Any
) -> Any:
  """Return the module without its parameters.

  These are functions, numbers and arrays that are not floating point.

  Raises:
    TypeError: such an array depends on the key.
  """
  arrays = [leaf for leaf in jax.tree.leaves(abstract) if _is_abstract(leaf)]
  if all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in arrays):
    return eqx.filter(abstract, _is_abstract, inverse=True)
  # Constants are part of the model, so they are computed now, even if this function is
  # traced. Two keys show whether an array depends on the key.
  with jax.ensure_compile_time_eval():
    modules = [build(jax.random.key(seed)) for seed in range(2)]
    first, second = (
      eqx.filter(module, eqx.is_inexact_array, inverse=True) for module in modules
    )
  leaves = jax.tree.leaves_with_path(eqx.filter(first, eqx.is_array))
  others = jax.tree.leaves(eqx.filter(second, eqx.is_array))
  for (path, leaf), other in zip(leaves, others, strict=True):
    # It would not be trained, because it is not floating point.
    place = f'the array at {jax.tree_util.keystr(path)}'
    accepted = 'floating point, or drawn from a fixed key'
    require_type(same_values(leaf, other), place, accepted, leaf)
  return first


def _is_abstract(leaf: Any) -> bool:
  """Return whether a leaf stands for an array."""
  return isinstance(leaf, jax.ShapeDtypeStruct)


def _equinox_step(eqx: Any, module: Any) -> RowStep:
  """Return the step of one row.

  Raises:
    TypeError: the module does not follow the protocol.
  """
  if isinstance(module, eqx.nn.GRUCell | eqx.nn.LSTMCell):
    return _run_equinox_cell
  # A module without initial_state would need a state of unknown structure.
  is_module = isinstance(module, eqx.Module) and callable(module)
  fits = is_module and callable(getattr(module, 'initial_state', None))
  accepted = 'a GRUCell, an LSTMCell or a module with initial_state() and __call__'
  require_type(fits, 'the result of build', accepted, module)
  return _run_equinox_module


def _run_equinox_cell(
  module: Any, state: Any, x: jax.Array, keywords: dict[str, Any]
) -> tuple[Any, jax.Array]:
  """Run a cell, which takes (x, state) and returns the state alone."""
  state = module(x, state, **keywords)
  y = state[0] if isinstance(state, tuple) else state
  return state, y


def _run_equinox_module(
  module: Any, state: Any, x: jax.Array, keywords: dict[str, Any]
) -> tuple[Any, jax.Array]:
  """Run a module that follows the protocol of :func:`from_equinox`."""
  result: tuple[Any, jax.Array] = module(state, x, **keywords)
  return result


def _map_over_rows(run_row: RowStep, module: Any, takes_key: bool) -> Step:
  """Make a step (state, (x_t [B, ...], key or None)) of a batch."""

  def run_with_key(state: Any, x: jax.Array, key: jax.Array) -> Any:
    return run_row(module, state, x, {'key': key})

  def run_without_key(state: Any, x: jax.Array) -> Any:
    return run_row(module, state, x, {'key': None} if takes_key else {})

  def step(
    state: Any, inputs: tuple[jax.Array, jax.Array | None]
  ) -> tuple[Any, jax.Array]:
    x_t, key_t = inputs
    if key_t is None or not takes_key:
      return jax.vmap(run_without_key)(state, x_t)
    keys = jax.random.split(key_t, jax.tree.leaves(x_t)[0].shape[0])
    return jax.vmap(run_with_key)(state, x_t, keys)

  return step


def _equinox_initial_state(eqx: Any, abstract: Any, constants: Any) -> Any:
  """Return the state of one row before the first step."""
  if isinstance(abstract, eqx.nn.GRUCell | eqx.nn.LSTMCell):
    zeros = jnp.zeros(abstract.hidden_size, abstract.weight_hh.dtype)
    return (zeros, zeros) if isinstance(abstract, eqx.nn.LSTMCell) else zeros
  # Parameters are zeros here: a state that depends on them would not be trained.
  params = eqx.filter(abstract, _is_abstract)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
  module = eqx.combine(constants, zeros)
  return jax.tree.map(jnp.asarray, module.initial_state())


def _import(module: str, function: str, package: str) -> Any:
  """Import an optional package.

  Args:
    module: name of the module.
    function: the function that needs it, for the message.
    package: name under which it is installed.

  Raises:
    ImportError: it is not installed.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    message = f'{function} needs {package}: pip install {package}.'
    raise ImportError(message) from error
