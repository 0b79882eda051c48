"""Check that a model has a window map that an influence can differentiate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import Words, describe, require
from fptt_jax._concrete import concrete
from fptt_jax._types import Hidden, Model, Params
from fptt_jax.influence._arrays import join, row_size
from fptt_jax.influence._reach import Points, compiled_init

ROWS = 2
"""Rows of the run that looks for noise."""
TOLERANCE = 1e-3
"""Largest difference, relative to the largest number, that counts as rounding."""


def check_map(model: Model, params: Params, inputs: Any, size: int) -> None:
  """Refuse a model whose hidden state is not of real numbers, or depends on a key.

  Args:
    model: The model.
    params: Its parameters; only shapes are used.
    inputs: Tree of arrays [T, B, ...]; only shapes are used.
    size: S, steps of a window.

  Raises:
    ValueError: The hidden state has complex numbers or no real ones, or noise, such as
      dropout, reaches it.
  """
  hidden = jax.eval_shape(lambda: model.initial_state(ROWS))
  dtypes = sorted({describe(leaf) for leaf in jax.tree.leaves(hidden)})
  is_real = row_size(hidden) > 0 and not any('complex' in dtype for dtype in dtypes)
  hint = 'Keep real and imaginary parts apart.'
  require(is_real, 'hidden state with influence', 'of real numbers', dtypes, hint)
  noise = _noise(model, params, hidden, inputs, size)
  hint = "Put dropout after the last recurrent layer, or use influence='none'."
  accepted = 'the same with and without a random key'
  got = Words(f'a relative difference of {noise:.2g}')
  require(noise <= TOLERANCE, 'hidden state with influence', accepted, got, hint)


def _noise(
  model: Model, params: Params, hidden: Hidden, inputs: Any, size: int
) -> float:
  """Return the relative difference between training and evaluation in the state.

  It is 0 where the state is not finite. The parameters are near those that the model
  starts from, and hidden state and inputs are drawn.
  """
  x = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((size, ROWS, *leaf.shape[2:]), leaf.dtype), inputs
  )

  @concrete
  def run(params: Params, hidden: Hidden, x: Any) -> tuple[jax.Array, jax.Array]:
    keys = (jax.random.key(0), None)
    trained, evaluated = (
      join(model.apply(params, hidden, x, None, key)[0]) for key in keys
    )
    is_known = jnp.isfinite(trained) & jnp.isfinite(evaluated)
    difference = jnp.where(is_known, trained - evaluated, 0)
    return jnp.abs(difference).max(), jnp.where(is_known, jnp.abs(evaluated), 0).max()

  # Every second point is near the parameters that the model starts from.
  point = Points((params, hidden, x), compiled_init(model.init)).draw(1)
  difference, scale = (float(number) for number in run(*point))
  return difference / max(scale, float(np.finfo(np.float32).tiny))
