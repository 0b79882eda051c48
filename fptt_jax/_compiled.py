"""Compiled functions that say what became of a donated array, and take arrays of any
byte order.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np


class Compiled:
  """A jitted function: called and lowered as `jax.jit`'s are.

  Attributes:
    donates: whether the arrays of the first argument are given up to the function.
  """

  def __init__(
    self,
    function: Callable[..., Any],
    *,
    donate: bool = False,
    static_argnames: tuple[str, ...] = (),
  ) -> None:
    """Jit the function.

    Args:
      function: a pure function of trees of arrays.
      donate: whether it may use the memory of its first argument for its results.
      static_argnames: arguments that are no arrays.
    """
    functools.update_wrapper(self, function)
    self.donates = donate
    donated = 0 if donate else ()
    self._function = jax.jit(
      function, donate_argnums=donated, static_argnames=static_argnames
    )

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Call the jitted function."""
    try:
      return self._function(*args, **kwargs)
    # What is wrong is looked for only after JAX has refused: a call costs nothing more.
    except (RuntimeError, TypeError, ValueError) as error:
      explain_deleted(self.__name__, (*args, *kwargs.values()), error)
      native = _in_native_order((args, kwargs))
      if native is None:
        raise
    args, kwargs = native
    return self._function(*args, **kwargs)

  def __getattr__(self, name: str) -> Any:
    """Return an attribute of the jitted function, such as `lower`."""
    if name == '_function':  # While a copy is being made, there is none yet.
      raise AttributeError(name)
    return getattr(self._function, name)


def explain_deleted(called: str, trees: Any, error: Exception | None = None) -> None:
  """Raise if an array of the trees was deleted, or is donated twice.

  Args:
    called: the function that the trees were given to.
    trees: its arguments.
    error: what was raised for it.

  Raises:
    RuntimeError: an array was deleted, which donation does, or (if `error` is of that)
      is there twice.
  """
  advice = (
    'Keep a copy, jax.tree.map(jnp.copy, state), before the step, or make the '
    'trainer with donate=False.'
  )
  leaves = [
    (path, leaf)
    for path, leaf in jax.tree.leaves_with_path(trees)
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
  ]
  for path, leaf in leaves:
    if leaf.is_deleted():
      raise RuntimeError(
        f'{called} was given an array that no longer exists, {_place(path)}: it was '
        'donated to '
        f'an earlier step, which has used its memory for the new state. {advice}'
      ) from None
  if error is None or 'donate the same buffer' not in str(error):
    return
  seen: dict[int, Any] = {}
  for path, leaf in leaves:
    if id(leaf) in seen:
      raise RuntimeError(
        f'{called} was given one array in two places, {_place(seen[id(leaf)])} and '
        f'{_place(path)}, and cannot have it donated twice: give it a copy, '
        'jnp.copy(array), in '
        'one of them, or make the trainer with donate=False.'
      ) from None
    seen[id(leaf)] = path


def _place(path: tuple[Any, ...]) -> str:
  """Return where in its argument a leaf is, such as `.params['w']`; the argument itself
  for none.
  """
  return jax.tree_util.keystr(path[1:]) or 'the argument itself'


def _in_native_order(tree: Any) -> Any:
  """Return the tree with NumPy arrays in the machine's byte order; None if all are."""
  swapped = False

  def leaf(x: Any) -> Any:
    nonlocal swapped
    if not isinstance(x, np.ndarray | np.generic) or x.dtype.isnative:
      return x
    swapped = True
    return x.astype(x.dtype.newbyteorder('='))

  tree = jax.tree.map(leaf, tree)
  return tree if swapped else None
