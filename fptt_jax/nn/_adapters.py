"""From Flax modules to the pure functions of :class:`fptt_jax.Model`: NNX and Linen
come in here and nowhere else.
"""

from collections.abc import Callable
from typing import Any
import warnings

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import check_dtype, check_like, check_size
from fptt_jax._probe import (
  HiddenMemoryError,
  check_new_model,
  check_state_rows,
  is_checked,
  mark_checked,
)
from fptt_jax._types import FeaturesAndReadout, Model
from fptt_jax.nn._checks import check_batch_size
from fptt_jax.nn._from_cell import as_recurrent
from fptt_jax.nn._inspection import (
  example_inputs,
  is_known,
  referred_arrays,
  unknown_layers,
)
from fptt_jax.nn._recurrent import scan_cell
from fptt_jax.nn._sequential import Sequential


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
  """Turns an NNX module into a :class:`fptt_jax.Model`.

  Args:
    build: makes the module from `nnx.Rngs`: `lambda rngs: nn.LSTM(1, 128, rngs=rngs)`.
      The module runs windows, as those of `fptt_jax.nn` do, or is a per-step cell such
      as `nnx.GRUCell`, which must tell its `in_features` and own no random streams.

  Returns: The model; its params are a nested dict of the module's `nnx.Param` values.
    `init` may be traced (jit, vmap over seeds). If the module's initial state depends
    on its parameters, the model has a `learned_initial_state`.

  Raises:
    TypeError: `build` is a module rather than a function, the module has no recurrent
      interface, or keeps state that is neither a parameter nor a random stream (batch
      statistics, caches): the carry of a train step holds parameters only.

  Example:
    >>> import jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(lambda rngs: nn.Sequential(nn.LSTM(1, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)))
    >>> params = model.init(jax.random.key(0))
    >>> state, logits = model.apply(params, model.initial_state(4), jax.numpy.ones((28, 4, 1)), None, None)
    >>> logits.shape
    (28, 4, 10)
  """
  if isinstance(build, nnx.Module) or not callable(build):
    raise TypeError(
      'from_nnx takes a function (rngs) -> module, so that init can draw new '
      f'parameters; got {type(build).__name__}.'
    )
  make = lambda key: as_recurrent(build(nnx.Rngs(key)))
  graph, abstract_params, streams, constants = _take_apart(make)

  def init(key: jax.Array) -> Any:
    return nnx.to_pure_dict(nnx.state(make(key), nnx.Param))

  def start(params: Any, batch_size: int) -> Any:
    return module(params, None).initial_state(batch_size)

  def initial_state(batch_size: int) -> Any:
    if not learned:
      return nnx.merge(graph, abstract_params, streams, constants).initial_state(
        batch_size
      )
    shapes = jax.eval_shape(
      lambda params: start(params, batch_size), nnx.to_pure_dict(abstract_params)
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def module(params: Any, key: jax.Array | None) -> Any:
    """The module with these parameters, in evaluation without a key."""
    weights = jax.tree.map(
      lambda leaf: leaf, abstract_params
    )  # A copy: the next line writes into it.
    nnx.replace_by_pure_dict(weights, params)
    merged: Any = nnx.merge(graph, weights, _seeded(streams, key), constants)
    if key is None:
      merged.eval()
    else:
      merged.train()
    return merged

  def apply(
    params: Any,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None,
    key: jax.Array | None,
    *last: jax.Array | int,
  ) -> tuple[Any, jax.Array]:
    merged = module(params, key)
    if known:
      result: tuple[Any, jax.Array] = merged(state, x, mask, key, *last)
      return result
    before = _arrays(merged)
    result = merged(state, x, mask, key, *last)
    _refuse_changes(before, _arrays(merged))
    return result

  abstract = nnx.merge(graph, abstract_params, streams, constants)
  known = is_known(abstract)
  learned = _reads_params(
    lambda params: start(params, 1), nnx.to_pure_dict(abstract_params)
  )
  model = Model(
    init, initial_state, apply, learned_initial_state=start if learned else None
  )
  _check(model, abstract, known)
  if not isinstance(abstract, Sequential):
    return model
  model = model._replace(apply_last=apply)
  if abstract.readout_start == len(abstract.layers):
    return model
  features = lambda params, state, x, mask, key: module(params, key).features(
    state, x, mask, key
  )
  readout = lambda params, features, key: module(params, key).readout(features, key)
  return model._replace(split=FeaturesAndReadout(features, readout))


def from_linen(
  module: linen.Module,
  features_shape: tuple[int, ...],
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Model:
  """Turns a Linen per-step module into a :class:`fptt_jax.Model`.

  Args:
    module: follows the protocol of flax's cells: `module(carry, x_t) -> (carry, y_t)`
      and `initialize_carry(key, input_shape)`. A module of your own with embedding,
      several cells and a readout inside does as well.
    features_shape: shape of one step of one sequence: (D,), or () for tokens.
    dtype: the inputs' dtype.

  Returns: The model; its params are the module's 'params' collection. In training the
    stream 'dropout' is seeded anew each step; in evaluation there is none,
    `self.has_rng('dropout')` tells a module which it is.

  Raises:
    TypeError: the module does not follow the protocol, or has collections beside
      'params'.
    ValueError: a shape that is none, a dtype that is neither floating point nor
      integer.

  Example:
    >>> from flax import linen
    >>> from fptt_jax import nn
    >>> model = nn.from_linen(linen.OptimizedLSTMCell(16), (1,))
  """
  if not isinstance(module, linen.Module) or not hasattr(module, 'initialize_carry'):
    kind = (
      f'the class {module.__name__}'
      if isinstance(module, type)
      else type(module).__name__
    )
    raise TypeError(
      'from_linen expected a per-step cell with initialize_carry(key, input_shape), '
      f'got {kind}.'
    )
  if not isinstance(features_shape, tuple | list):
    raise ValueError(
      'features_shape must be the shape of one step, such as (D,), got '
      f'{features_shape!r}.'
    )
  features_shape = tuple(check_size('features_shape', size) for size in features_shape)
  dtype = check_dtype('dtype', dtype, tokens=True)

  def initial_state(batch_size: int) -> Any:
    return module.initialize_carry(
      jax.random.key(0), (check_batch_size(batch_size), *features_shape)
    )

  def init(key: jax.Array) -> Any:
    variables = module.init(
      key, initial_state(1), jnp.zeros((1, *features_shape), dtype)
    )
    return variables.get('params', {})

  def apply(
    params: Any, state: Any, x: jax.Array, mask: jax.Array | None, key: jax.Array | None
  ) -> tuple[Any, jax.Array]:
    def step(
      state: Any, inputs: tuple[jax.Array, jax.Array | None]
    ) -> tuple[Any, jax.Array]:
      x_t, key_t = inputs
      result: Any = module.apply(
        {'params': params},
        state,
        x_t,
        rngs=None if key_t is None else {'dropout': key_t},
      )
      return result

    return scan_cell(
      step, state, (x, None if key is None else jax.random.split(key, x.shape[0])), mask
    )

  check_state_rows(type(module).__name__, initial_state)
  _refuse_collections(
    module, initial_state, jax.ShapeDtypeStruct((1, *features_shape), dtype)
  )
  model = Model(init, initial_state, apply)
  check_new_model(
    model, jax.ShapeDtypeStruct((1, 1, *features_shape), dtype), type(module).__name__
  )
  return model


def _refuse_collections(
  module: linen.Module, initial_state: Callable[[int], Any], x: jax.ShapeDtypeStruct
) -> None:
  """Raises a TypeError if a Linen module has collections beside its parameters."""
  run = lambda key, x: module.init(key, initial_state(1), x)
  collections = jax.eval_shape(run, jax.random.key(0), x)
  others = sorted(set(collections) - {'params'})
  if not others:
    return
  advice = 'Carry such state in the hidden state.'
  if 'batch_stats' in others:
    advice = 'In place of batch normalization use LayerNorm, which keeps no running statistics.'
  raise TypeError(
    "from_linen takes modules whose only collection is 'params', got one that has "
    f'{others}. {advice}'
  )


def to_nnx(build: Callable[[nnx.Rngs], nnx.Module], params: Any) -> nnx.Module:
  """Puts trained parameters into a module of the kind that :func:`from_nnx` was given.

  Args:
    build: the function that `from_nnx` was given.
    params: parameters of its model, such as `state.params` or the result of
      :func:`fptt_jax.fptt_eval_params`.

  Returns:
    What `build` makes, a layer or a cell of your own say, with these parameters.

  Raises:
    ValueError: the parameters are not those of such a module.

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
  windowed = as_recurrent(
    module
  )  # It holds the same variables, so that the module is updated with it.
  state = nnx.state(windowed, nnx.Param)
  check_like('params', params, nnx.to_pure_dict(state), 'as build makes them')
  nnx.replace_by_pure_dict(state, params)
  nnx.update(windowed, state)
  return module


def with_float32_params(model: Model) -> Model:
  """Keeps the parameters of a model that computes in fewer bits in float32, for mixed
  precision.

  Each window's function casts them to the dtypes that the model draws them in: products
  are of bfloat16, say, while gradients, W, W̄, λ and the optimizer's moments are
  float32, so that updates are not lost which bfloat16 would round away.

  Args:
    model: a model with parameters of fewer bits: of layers with
      `param_dtype=jnp.bfloat16` (flax's with `dtype`, too). Parameters of other dtypes
      stay what they are.

  Raises:
    TypeError: `model` is no :class:`fptt_jax.Model`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> half = dict(param_dtype=jnp.bfloat16)
    >>> build = lambda rngs: nn.Sequential(nn.LSTM(1, 16, **half, rngs=rngs), nnx.Linear(16, 10, dtype=jnp.bfloat16, **half, rngs=rngs))
    >>> model = nn.with_float32_params(nn.from_nnx(build))
    >>> params = model.init(jax.random.key(0))
    >>> params['layers'][1]['kernel'].dtype
    dtype('float32')
    >>> model.apply(params, model.initial_state(4), jnp.ones((28, 4, 1)), None, None)[1].dtype
    dtype(bfloat16)
  """
  if not isinstance(model, Model):
    raise TypeError(
      'with_float32_params expected a fptt_jax.Model, as from_nnx makes it, got '
      f'{type(model).__name__}.'
    )
  drawn = jax.eval_shape(model.init, jax.random.key(0))
  low = lambda leaf: (
    jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
  )
  keep = lambda leaf: leaf.astype(jnp.float32) if low(leaf) else leaf

  def cast(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, *args: function(
      jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, drawn), *args
    )

  apply = cast(model.apply)
  if is_checked(model.apply):
    mark_checked(apply)
  return Model(
    init=lambda key: jax.tree.map(keep, model.init(key)),
    initial_state=model.initial_state,
    apply=apply,
    apply_last=model.apply_last and cast(model.apply_last),
    split=model.split
    and FeaturesAndReadout(cast(model.split.features), cast(model.split.readout)),
    learned_initial_state=model.learned_initial_state
    and cast(model.learned_initial_state),
  )


def _reads_params(function: Callable[[Any], Any], params: Any) -> bool:
  """Returns whether a function reads its parameters, or returns some of them."""
  jaxpr = jax.make_jaxpr(function)(params).jaxpr
  read = [variable for equation in jaxpr.eqns for variable in equation.invars] + list(
    jaxpr.outvars
  )
  names = {id(variable) for variable in read}
  return any(id(variable) in names for variable in jaxpr.invars)


def _take_apart(make: Callable[[jax.Array], Any]) -> tuple[Any, Any, Any, Any]:
  """Returns a module's graph, its abstract parameters, its random streams and its
  constants.

  Nothing is computed but the constants, and only if there are some.
  """
  key = jax.random.key(0)
  abstract = nnx.eval_shape(make, key)
  parts: Any = nnx.split(abstract, nnx.Param, nnx.RngState, ...)
  graph, params, streams, constants = parts
  _refuse_variables(constants)
  referred = list(referred_arrays(abstract))
  for place, found in referred:
    if isinstance(found, nnx.Module | nnx.Variable):
      raise TypeError(
        f'the function or object at {place} refers to the {type(found).__name__} it '
        'was made with, whose parameters would '
        'not be trained there: make it an nnx.Module that has it as an attribute.'
      )
  if not referred and not jax.tree.leaves(constants):
    return graph, params, streams, constants
  with jax.ensure_compile_time_eval():
    module, other = make(key), make(jax.random.key(1))
    values = dict(enumerate(referred_arrays(module)))
    for number, (place, found) in enumerate(referred_arrays(other)):
      if number not in values or not np.array_equal(values[number][1], found):
        raise TypeError(
          f'the array at {place} is drawn from rngs, but is no nnx.Param: init could '
          'not draw it anew. Make it an nnx.Param, '
          'or draw it from a key of its own, such as jax.random.key(0).'
        )
    parts = nnx.split(module, nnx.Param, nnx.RngState, ...)
  return parts[0], params, streams, parts[3]


def _refuse_variables(state: Any) -> None:
  """Raises a TypeError if a module keeps state that a train step does not carry."""
  kept = {
    '.'.join(map(str, path)): leaf
    for path, leaf in nnx.to_flat_state(state)
    if isinstance(leaf, nnx.Variable)
  }
  if not kept:
    return
  places = ', '.join(
    f'{type(variable).__name__} at {place}' for place, variable in kept.items()
  )
  advice = 'Carry it in the hidden state, or make a constant a plain array.'
  if any(isinstance(variable, nnx.BatchStat) for variable in kept.values()):
    advice = 'In place of batch normalization use nnx.LayerNorm, which keeps no running statistics.'
  raise TypeError(
    'from_nnx takes modules whose only state is nnx.Param (and random streams), got '
    f'{places}. {advice}'
  )


def _arrays(module: nnx.Module) -> dict[Any, list[Any]]:
  """Returns the arrays of a module by their path, without random streams and what `sow`
  keeps for inspection.
  """
  parts: Any = nnx.split(module, (nnx.RngState, nnx.Intermediate), ...)
  return {path: jax.tree.leaves(leaf) for path, leaf in nnx.to_flat_state(parts[2])}


def _refuse_changes(before: dict[Any, list[Any]], after: dict[Any, list[Any]]) -> None:
  """Raises if a module's call replaced or added one of its arrays: the next window
  would not see it.
  """
  for path, arrays in after.items():
    if list(map(id, before.get(path, ()))) != list(map(id, arrays)):
      place = '.'.join(map(str, path))
      raise HiddenMemoryError(
        f'the module writes to {place} when it is called: carry such memory in the '
        'hidden state instead.'
      )


def _check(model: Model, module: Any, known: bool) -> None:
  """Checks a model once when it is made: rows in its state, state at all, and by a
  probe what unknown layers do.
  """
  name = type(module).__name__
  check_state_rows(name, model.initial_state)
  if not jax.tree.leaves(jax.eval_shape(lambda: model.initial_state(1))):
    warnings.warn(
      f'{name} carries no hidden state: nothing is remembered from step to step. Put a '
      'recurrent layer or a per-step cell '
      'into it, such as nn.LSTM or nnx.GRUCell.',
      UserWarning,
      stacklevel=3,
    )
  if known:
    mark_checked(model.apply)
    return
  inputs = example_inputs(module)
  if inputs is not None:  # Else the trainer probes it when it sees a batch.
    check_new_model(model, inputs, f'{name} with {", ".join(unknown_layers(module))}')


def _seeded(streams: Any, key: jax.Array | None) -> Any:
  """The random streams a module keeps, started anew from the window's key, each with a
  key of its own.
  """
  key = jax.random.key(0) if key is None else key
  leaves, structure = jax.tree.flatten(streams)
  is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
  fresh = [
    jax.random.fold_in(key, number)
    if is_key[number]
    else jnp.zeros(leaf.shape, leaf.dtype)
    for number, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(structure, fresh)
