"""Models from Equinox and Haiku. Neither library is needed, unless its function here is
called.
"""

from collections.abc import Callable
import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import check_callable, check_dtype, check_size
from fptt_jax._probe import check_new_model, check_state_rows, mark_checked
from fptt_jax._types import Model
from fptt_jax.nn._checks import check_batch_size
from fptt_jax.nn._recurrent import scan_cell


def from_equinox(build: Callable[[jax.Array], Any]) -> Model:
  """Turns an Equinox per-step module into a :class:`fptt_jax.Model`.

  Equinox modules act on one row; here they are mapped over the rows of a batch.

  Args:
    build: makes the module from a key: `lambda key: eqx.nn.GRUCell(2, 16, key=key)`.
      The module is `eqx.nn.GRUCell`, `eqx.nn.LSTMCell`, or one of your own with
      `initial_state()` and `(state, x_t [D]) -> (state, y_t)`, which may hold several
      cells and a readout. If its call has an argument `key`, it is given one per step
      and row in training and None in evaluation, where the module is in Equinox's
      inference mode.

  Returns: The model. Its params are the module with its floating-point arrays; all else
    in it is None. After training, `eqx.combine(params, build(key))` is the module with
    trained parameters.

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
    state, y = model.apply(params, model.initial_state(4), jax.numpy.ones((28, 4, 2)), None, None)
    assert y.shape == (28, 4, 16)
  """
  eqx = _import('equinox', 'from_equinox', 'equinox')
  check_callable('build', build)
  if isinstance(build, eqx.Module):
    raise TypeError(
      'build must be a function (key) -> module, so that init can draw new '
      f'parameters; got {type(build).__name__}.'
    )
  abstract = eqx.filter_eval_shape(build, jax.random.key(0))
  if any(
    isinstance(leaf, eqx.nn.StateIndex)
    for leaf in jax.tree.leaves(
      abstract, is_leaf=lambda x: isinstance(x, eqx.nn.StateIndex)
    )
  ):
    raise TypeError(
      f'{type(abstract).__name__} keeps state, such as running statistics: use '
      'eqx.nn.LayerNorm in its place.'
    )
  constants = _equinox_constants(eqx, build, abstract)
  step_of_row = _equinox_step(eqx, abstract)
  takes_key = _takes_key(abstract)

  def init(key: jax.Array) -> Any:
    return eqx.filter(build(key), eqx.is_inexact_array)

  def initial_state(batch_size: int) -> Any:
    state = _equinox_initial_state(eqx, abstract, constants)
    batch_size = check_batch_size(batch_size)
    return jax.tree.map(
      lambda leaf: jnp.broadcast_to(leaf, (batch_size, *leaf.shape)), state
    )

  def apply(
    params: Any, state: Any, x: jax.Array, mask: jax.Array | None, key: jax.Array | None
  ) -> tuple[Any, jax.Array]:
    module = eqx.combine(params, constants)
    module = eqx.nn.inference_mode(module, value=key is None)

    def step(
      state: Any, inputs: tuple[jax.Array, jax.Array | None]
    ) -> tuple[Any, jax.Array]:
      x_t, key_t = inputs
      if key_t is None or not takes_key:
        return jax.vmap(lambda state, x: step_of_row(module, state, x, {}))(state, x_t)
      keys = jax.random.split(key_t, x_t.shape[0])
      return jax.vmap(
        lambda state, x, key: step_of_row(module, state, x, {'key': key})
      )(state, x_t, keys)

    return scan_cell(
      step, state, (x, None if key is None else jax.random.split(key, x.shape[0])), mask
    )

  mark_checked(
    apply
  )  # Steps of single rows, by pure functions, cannot mix or hide anything.
  return Model(init, initial_state, apply)


def _equinox_constants(
  eqx: Any, build: Callable[[jax.Array], Any], abstract: Any
) -> Any:
  """Returns the module without its parameters: functions, numbers, and arrays that are
  no floating point.
  """
  is_other = lambda leaf: (
    isinstance(leaf, jax.ShapeDtypeStruct)
    and not jnp.issubdtype(leaf.dtype, jnp.inexact)
  )
  if not any(is_other(leaf) for leaf in jax.tree.leaves(abstract)):
    return eqx.filter(
      abstract, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct), inverse=True
    )
  with jax.ensure_compile_time_eval():
    first, second = (
      eqx.filter(build(jax.random.key(seed)), eqx.is_inexact_array, inverse=True)
      for seed in range(2)
    )
  others = jax.tree.leaves(eqx.filter(second, eqx.is_array))
  for (path, leaf), other in zip(
    jax.tree.leaves_with_path(eqx.filter(first, eqx.is_array)), others, strict=True
  ):
    if not np.array_equal(leaf, other):
      raise TypeError(
        f'the array {leaf.dtype}{list(leaf.shape)} at {jax.tree_util.keystr(path)} '
        'depends on the key, but is no parameter, '
        'because it is not of floating point: draw it from a key of its own.'
      )
  return first


def _equinox_step(
  eqx: Any, module: Any
) -> Callable[[Any, Any, jax.Array, dict[str, Any]], tuple[Any, jax.Array]]:
  """Returns (module, state, x_t, keywords) -> (state, y_t) for one row."""
  if isinstance(module, eqx.nn.GRUCell | eqx.nn.LSTMCell):

    def run_cell(
      module: Any, state: Any, x: jax.Array, keywords: dict[str, Any]
    ) -> tuple[Any, jax.Array]:
      state = module(x, state, **keywords)
      return state, state[0] if isinstance(state, tuple) else state

    return run_cell
  if (
    not isinstance(module, eqx.Module)
    or not callable(module)
    or not callable(getattr(module, 'initial_state', None))
  ):
    raise TypeError(
      'from_equinox expected eqx.nn.GRUCell, eqx.nn.LSTMCell or a module with '
      'initial_state() and '
      f'(state, x_t) -> (state, y_t), got {type(module).__name__}.'
    )
  return lambda module, state, x, keywords: module(state, x, **keywords)


def _takes_key(module: Any) -> bool:
  """Returns whether the module's call has an argument `key`."""
  return 'key' in inspect.signature(type(module).__call__).parameters


def _equinox_initial_state(eqx: Any, abstract: Any, constants: Any) -> Any:
  """Returns the state of one row before the first step."""
  if isinstance(abstract, eqx.nn.GRUCell | eqx.nn.LSTMCell):
    zeros = jnp.zeros(abstract.hidden_size, abstract.weight_hh.dtype)
    return (zeros, zeros) if isinstance(abstract, eqx.nn.LSTMCell) else zeros
  # Parameters are zeros here: a state that depends on them would not be trained.
  is_struct = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), eqx.filter(abstract, is_struct)
  )
  return jax.tree.map(jnp.asarray, eqx.combine(constants, zeros).initial_state())


def from_haiku(
  build: Callable[[], Any],
  features_shape: tuple[int, ...],
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Model:
  """Turns a Haiku recurrent core into a :class:`fptt_jax.Model`.

  Args:
    build: makes the core, inside of Haiku's transformation: `lambda:
      hk.DeepRNN([hk.LSTM(16), hk.Linear(10)])`. It is any `hk.RNNCore`, `(x_t [B, D],
      state) -> (y_t, state)` with `initial_state(batch_size)`.
    features_shape: shape of one step of one sequence: (D,), or () for tokens.
    dtype: the inputs' dtype.

  Returns: The model. Its params are Haiku's, so that they fit `hk.transform` of the
    same core. In training the core has random keys, in evaluation
    `hk.maybe_next_rng_key()` is None.

  Raises:
    ImportError: Haiku is not installed.
    TypeError: the core does not follow the protocol, keeps state of Haiku's own, or its
      initial state has parameters.
    ValueError: a shape that is none, a dtype that is neither floating point nor
      integer.

  Example::

    import haiku as hk
    import jax
    from fptt_jax import nn
    model = nn.from_haiku(lambda: hk.DeepRNN([hk.LSTM(16), hk.Linear(10)]), (2,))
    params = model.init(jax.random.key(0))
    state, y = model.apply(params, model.initial_state(4), jax.numpy.ones((28, 4, 2)), None, None)
    assert y.shape == (28, 4, 10)
  """
  hk = _import('haiku', 'from_haiku', 'dm-haiku')
  check_callable('build', build)
  if not isinstance(features_shape, tuple | list):
    raise ValueError(
      'features_shape must be the shape of one step, such as (D,), got '
      f'{features_shape!r}.'
    )
  features_shape = tuple(check_size('features_shape', size) for size in features_shape)
  dtype = check_dtype('dtype', dtype, tokens=True)

  def core() -> Any:
    made = build()
    if not isinstance(made, hk.RNNCore):
      raise TypeError(f'build must make a hk.RNNCore, got {type(made).__name__}.')
    return made

  start = hk.transform_with_state(lambda batch_size: core().initial_state(batch_size))
  run = hk.transform_with_state(lambda x, state: core()(x, state))

  def initial_state(batch_size: int) -> Any:
    state, _ = start.apply({}, {}, None, check_batch_size(batch_size))
    return state

  def init(key: jax.Array) -> Any:
    params, _ = run.init(key, jnp.zeros((1, *features_shape), dtype), initial_state(1))
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

    return scan_cell(
      step, state, (x, None if key is None else jax.random.split(key, x.shape[0])), mask
    )

  key = jax.random.key(0)
  own_params, _ = jax.eval_shape(lambda key: start.init(key, 1), key)
  if jax.tree.leaves(own_params):
    raise TypeError(
      f"the core's initial state has parameters, {sorted(own_params)}: they would not "
      'be trained.'
    )
  check_state_rows('from_haiku', initial_state)
  x = jax.ShapeDtypeStruct((1, *features_shape), dtype)
  _, kept = jax.eval_shape(lambda key, x: run.init(key, x, initial_state(1)), key, x)
  if jax.tree.leaves(kept):
    raise TypeError(
      f'the core keeps state in {sorted(kept)}, such as running statistics: use '
      'hk.LayerNorm in its place.'
    )
  model = Model(init, initial_state, apply)
  check_new_model(
    model, jax.ShapeDtypeStruct((1, 1, *features_shape), dtype), 'the core'
  )
  return model


def _import(module: str, function: str, package: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(
      f'{function} needs {package}, which is not installed: pip install {package}.'
    ) from error
