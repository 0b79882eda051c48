"""Parameters in float32 for a model that computes in fewer bits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fptt_jax._checks import check_type
from fptt_jax._probe import (
  is_checked,
  mark_checked,
)
from fptt_jax._types import FeaturesAndReadout, Model


def with_float32_params(model: Model) -> Model:
  """Keep the parameters of a low-precision model in float32 (mixed precision).

  Each window casts them to the dtypes in which the model draws them. Products are then
  of bfloat16, for example, while gradients, W, W̄, λ and the optimizer's moments are
  float32: updates that bfloat16 would round away are kept.

  Args:
    model: a model with parameters of fewer than 32 bits, such as layers with
      `param_dtype=jnp.bfloat16` (for flax's layers, also `dtype`). Parameters of other
      dtypes do not change.

  Raises:
    TypeError: `model` is not a :class:`fptt_jax.Model`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> half = dict(param_dtype=jnp.bfloat16)
    >>> def build(rngs):
    ...   readout = nnx.Linear(16, 10, dtype=jnp.bfloat16, **half, rngs=rngs)
    ...   return nn.Sequential(nn.LSTM(1, 16, **half, rngs=rngs), readout)
    >>> model = nn.with_float32_params(nn.from_nnx(build))
    >>> params = model.init(jax.random.key(0))
    >>> params['layers'][1]['kernel'].dtype
    dtype('float32')
    >>> x = jnp.ones((28, 4, 1))
    >>> model.apply(params, model.initial_state(4), x, None, None)[1].dtype
    dtype(bfloat16)
  """
  check_type('model', model, Model, ', as from_nnx makes one')
  model = model.without_stale_parts()
  drawn = jax.eval_shape(model.init, jax.random.key(0))

  def init(key: jax.Array) -> Any:
    return jax.tree.map(_widen_low_precision, model.init(key))

  def cast(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(params: Any, *args: Any) -> Any:
      cast_params = jax.tree.map(lambda w, like: w.astype(like.dtype), params, drawn)
      return function(cast_params, *args)

    return run

  apply = cast(model.apply)
  if is_checked(model.apply):
    mark_checked(apply)
  split = model.split
  if split is not None:
    split = FeaturesAndReadout(cast(split.features), cast(split.readout))
  learned = model.learned_initial_state
  own = model.own_steps
  cast_model = Model(
    init=init,
    initial_state=model.initial_state,
    apply=apply,
    apply_last=None if model.apply_last is None else cast(model.apply_last),
    split=split,
    learned_initial_state=None if learned is None else cast(learned),
    plain=None if model.plain is None else cast(model.plain),
    own_steps=None if own is None else cast(own),
  )
  return cast_model._replace(original=cast_model)


def _widen_low_precision(leaf: jax.Array) -> jax.Array:
  is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
  if is_float and jnp.finfo(leaf.dtype).bits < 32:
    return leaf.astype(jnp.float32)
  return leaf
