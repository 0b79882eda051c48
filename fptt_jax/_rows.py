"""Sums over the rows of a batch whose rows are split over devices, for layers."""

from collections.abc import Iterator
import contextlib
import contextvars
from typing import Any

import jax

_ROWS_AXIS = contextvars.ContextVar[str | None]('rows_axis', default=None)
"""Mesh axis over which the rows of the running model are split, or None."""


@contextlib.contextmanager
def rows_split_over(axis: str | None) -> Iterator[None]:
  """Tell the layers of a model that they see one device's share of the rows."""
  token = _ROWS_AXIS.set(axis)
  try:
    yield
  finally:
    _ROWS_AXIS.reset(token)


def sum_over_rows(tree: Any) -> Any:
  """Return sums over the rows of the whole batch, given those that a layer sees."""
  axis = _ROWS_AXIS.get()
  return tree if axis is None else jax.lax.psum(tree, axis)
