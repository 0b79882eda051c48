"""Check that a model has a window map that an influence can differentiate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._concrete import concrete
from fptt_jax._types import Hidden, Model, Params
from fptt_jax.influence._arrays import join, row_size
from fptt_jax.influence._reach import draw_like

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
  dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(hidden)})
  if row_size(hidden) == 0 or any('complex' in dtype for dtype in dtypes):
    raise ValueError(
      f'influence needs a hidden state of real numbers, got a state of {dtypes}. Keep '
      'real and imaginary parts apart.'
    )
  x = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((size, ROWS, *leaf.shape[2:]), leaf.dtype), inputs
  )
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, hidden, x)
  )
  difference = _noise(model, *draw_like(shapes, 0))
  if difference > TOLERANCE:
    raise ValueError(
      'influence needs a hidden state without noise: put dropout after the last '
      "recurrent layer, or use influence='none'."
    )


def _noise(model: Model, params: Params, hidden: Hidden, x: Any) -> float:
  """Return the relative difference between training and evaluation in the state."""

  @concrete
  def run(params: Params, hidden: Hidden, x: Any) -> tuple[jax.Array, jax.Array]:
    keys = (jax.random.key(0), None)
    trained, evaluated = (
      join(model.apply(params, hidden, x, None, key)[0]) for key in keys
    )
    return jnp.abs(trained - evaluated).max(), jnp.abs(evaluated).max()

  difference, scale = (float(number) for number in run(params, hidden, x))
  return difference / max(scale, float(np.finfo(np.float32).tiny))
