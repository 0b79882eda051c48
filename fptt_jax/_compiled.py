"""Compiled functions that explain donation and take arrays of any byte order."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np


class Compiled:
  """A jitted function, which is called and lowered as one of `jax.jit`.

  Attributes:
    donates: Whether a call takes over the memory of its first argument's arrays.
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
      function: A pure function of trees of arrays.
      donate: Whether the results may use the memory of the first argument.
      static_argnames: Names of arguments that are not arrays.
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
    # Arguments are inspected only after JAX has refused them, so that a call that
    # works costs nothing more.
    except (RuntimeError, TypeError, ValueError) as error:
      explain_deleted(self.__name__, (*args, *kwargs.values()), error)
      native = _in_native_order((args, kwargs))
      if native is None:
        raise
    args, kwargs = native
    return self._function(*args, **kwargs)

  def __getattr__(self, name: str) -> Any:
    """Return an attribute of the jitted function, such as `lower`."""
    # A copy of this object has no function yet while it is being made.
    if name == '_function':
      raise AttributeError(name)
    return getattr(self._function, name)


def explain_deleted(called: str, trees: Any, error: Exception | None = None) -> None:
  """Raise an error that explains donation if an array was deleted or donated twice.

  Args:
    called: Name of the function that the trees were given to.
    trees: The arguments of that function.
    error: The error that the call raised, or None before a call.

  Raises:
    RuntimeError: An array no longer exists, or `error` is about an array that is
      donated twice.
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
        f'donated to an earlier step. {advice}'
      ) from None
  if error is None or 'donate the same buffer' not in str(error):
    return
  seen: dict[int, Any] = {}
  for path, leaf in leaves:
    if id(leaf) in seen:
      raise RuntimeError(
        f'{called} was given one array in two places, {_place(seen[id(leaf)])} and '
        f'{_place(path)}, and cannot donate it twice. Give it a copy in one of them, '
        'or make the trainer with donate=False.'
      ) from None
    seen[id(leaf)] = path


def _place(path: tuple[Any, ...]) -> str:
  """Return the place of a leaf in its argument, such as `.params['w']`."""
  return jax.tree_util.keystr(path[1:]) or 'the argument itself'


def _in_native_order(tree: Any) -> Any:
  """Return the tree with NumPy arrays in the machine's byte order, or None if they are
  so already.
  """
  swapped = False

  def leaf(x: Any) -> Any:
    nonlocal swapped
    if not isinstance(x, np.ndarray | np.generic) or x.dtype.isnative:
      return x
    swapped = True
    return x.astype(x.dtype.newbyteorder('='))

  tree = jax.tree.map(leaf, tree)
  return tree if swapped else None
