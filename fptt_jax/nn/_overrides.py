"""Which of a layer's functions a subclass has replaced."""

from typing import Any


def nearest(layer: Any, name: str) -> int:
  """Return how far up the classes of a layer an attribute is defined.

  Returns:
    0 for the layer's own class, 1 for the next in the order of resolution, and so on;
    their number if none defines it.
  """
  classes = type(layer).__mro__
  found = (place for place, kind in enumerate(classes) if name in vars(kind))
  return next(found, len(classes))
