"""Matrices as parameters, full or as the product of two factors of a low rank."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import nnx
import jax

from fptt_jax._checks import check_integer


def make_matrix(
  draw: Callable[[tuple[int, ...]], jax.Array],
  rows: int,
  columns: int,
  name: str,
  rank: int | None,
) -> nnx.List[Any]:
  """Draw a matrix, or its two factors, as parameters.

  Args:
    draw: draws an array of a shape.
    rows: number of rows.
    columns: number of columns.
    name: the name of `rank` in error messages.
    rank: r, for factors [rows, r] and [r, columns]; None for one matrix.

  Raises:
    ValueError: the rank is not an integer from 1 to min(rows, columns).
  """
  if rank is None:
    full = nnx.Param(draw((rows, columns)))
    return nnx.List([full])
  # A larger rank would have more parameters than the full matrix and no more freedom.
  largest = min(rows, columns)
  accepted = f'an integer from 1 to {largest} or None'
  rank = check_integer(name, rank, 1, largest, accepted)
  left = nnx.Param(draw((rows, rank)))
  right = nnx.Param(draw((rank, columns)))
  return nnx.List([left, right])


def matrix_values(factors: Sequence[Any]) -> list[jax.Array]:
  """Return the arrays of a matrix's factors."""
  return [factor[...] for factor in factors]


def multiply(x: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
  """Multiply x by the factors from the left, so that the low rank comes first."""
  return functools.reduce(jax.numpy.matmul, factors, x)
