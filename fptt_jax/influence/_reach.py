"""Which parameters reach the hidden state, found by running the model."""

from collections.abc import Callable
import functools
from typing import Any, TypeVar
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._concrete import concrete
from fptt_jax._types import Hidden, Params
from fptt_jax.influence._arrays import by_path, join, replace
from fptt_jax.influence._base import WindowMap

Found = TypeVar('Found')

DRAWS = 4
"""Points at which derivatives are looked at: a rectifier may be off at one."""
MAX_DRAWS = 32
"""Most points. Those after the first `DRAWS` are for entries off at all of these."""
STEPS = 3
"""Most steps of a window that are run: more show nothing new."""
NEAR = 0.02
"""Share of the noise in parameters near those that a model starts from."""

Probe = Callable[[WindowMap, Params, Hidden], Found]


def once_per_model(probe: Probe[Found]) -> Probe[Found]:
  """Return a probe of a model that keeps its answers, by model and shapes."""
  found: weakref.WeakKeyDictionary[Any, dict[str, Found]] = weakref.WeakKeyDictionary()

  @functools.wraps(probe)
  def recall(window: WindowMap, params: Params, hidden: Hidden) -> Found:
    known = found.setdefault(window.run, {})
    key = _shapes_key(window, params)
    if key not in known:
      known[key] = probe(window, params, hidden)
    return known[key]

  return recall


def _shapes_key(window: WindowMap, params: Params) -> str:
  """Return a text that is the same for all windows of a model, of any size."""

  def per_step(leaf: Any) -> tuple[Any, ...]:
    return (leaf.shape[2:], str(leaf.dtype))

  weights = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), params)
  return str((window.start is None, weights, jax.tree.map(per_step, window.x)))


class Points:
  """Points at which a model is probed: parameters, hidden state and inputs.

  Structure that does not show at one kind of point shows at another. Half of the points
  have normal numbers as parameters, and the other half has numbers near those that the
  model starts from, which lie in the domain of its functions. Half of them have the
  integers 0 and 1 as inputs, and the other half has larger ones, such as tokens.
  """

  def __init__(self, shapes: Any, first: Callable[[int], Params] | None) -> None:
    """Keep what the points are drawn from.

    Args:
      shapes: (params, hidden, x), trees of abstract arrays.
      first: (seed) -> concrete parameters that the model starts from; None for none.
    """
    self._shapes = shapes
    self._first = first
    sizes = [max(leaf.shape, default=1) for leaf in jax.tree.leaves(shapes[0])]
    # A table has one of its axes as long as there are tokens.
    self._largest = max(2, *sizes) if sizes else 2

  def draw(self, seed: int) -> Any:
    """Return concrete (params, hidden, x)."""
    high = 2 if seed % 4 < 2 else self._largest
    params, hidden, x = draw_like(self._shapes, seed, high)
    if self._first is not None and seed % 2 == 1:
      params = jax.tree.map(_near, self._first(seed), params)
    return params, hidden, x


def _near(first: jax.Array, noise: np.ndarray) -> np.ndarray:
  """Return parameters near the first ones; integers and keys are those of the noise."""
  if not jnp.issubdtype(first.dtype, jnp.inexact):
    return noise
  # The noise moves weights that start at 0. By NumPy, outside of any trace.
  return (np.asarray(first) + NEAR * noise).astype(noise.dtype)


def points_of(window: WindowMap, params: Params, hidden: Hidden, x: Any) -> Points:
  """Return the points of a model.

  Args:
    window: A window of the model; its functions are used.
    params: Parameters; only shapes are used.
    hidden: Hidden state; only shapes are used.
    x: Inputs; only shapes are used.
  """
  return Points((params, hidden, x), _first_params(window, params, hidden))


@once_per_model
def _first_params(
  window: WindowMap, params: Params, hidden: Hidden
) -> Callable[[int], Params] | None:
  """Return a function (seed) -> concrete parameters that the model starts from."""
  return None if window.first_params is None else compiled_init(window.first_params)


def compiled_init(init: Callable[[jax.Array], Params]) -> Callable[[int], Params]:
  """Return (seed) -> concrete parameters, for `Model.init`."""
  run = concrete(lambda seed: init(jax.random.key(seed)))
  return lambda seed: run(np.uint32(seed))


@once_per_model
def reached_paths(window: WindowMap, params: Params, hidden: Hidden) -> tuple[str, ...]:
  """Return the paths of the parameters that the hidden state depends on.

  A parameter counts if its derivative is not 0 at one of several points, or if NaN in
  its place makes a number of the state NaN. NaN also shows dependences whose derivative
  is 0 there, such as on a number that is clipped.

  Args:
    window: A window. Its shapes are used, and its functions.
    params: Parameters of the model; only shapes are used.
    hidden: Hidden state [B, ...]; only shapes are used.
  """
  steps = min(STEPS, jax.tree.leaves(window.x)[0].shape[0])
  # Each row is a point of its own.
  rows = MAX_DRAWS // DRAWS
  x = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((steps, rows, *leaf.shape[2:]), leaf.dtype),
    window.x,
  )
  hidden = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), hidden
  )
  points = points_of(window, params, hidden, x)

  def end(params: Params, hidden: Hidden, x: Any) -> jax.Array:
    ends = join(window.run(params, hidden, x, None))
    if window.start is None:
      return ends
    # Starting from there alone might hide what acts on the state of the step before.
    return jnp.concatenate([ends, join(window.start(params))])

  @concrete
  def gradient(params: Params, hidden: Hidden, x: Any, seed: jax.Array) -> Params:
    out, pull = jax.vjp(lambda params: end(params, hidden, x), params)
    [grads] = pull(jax.random.normal(jax.random.key(seed), out.shape, out.dtype))
    return grads

  @concrete
  def spoils(params: Params, hidden: Hidden, x: Any, chosen: Params) -> jax.Array:
    def spoil(leaf: jax.Array, on: jax.Array) -> jax.Array:
      is_inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
      return jnp.where(on, jnp.nan, leaf).astype(leaf.dtype) if is_inexact else leaf

    spoiled = jax.tree.map(spoil, params, chosen)
    before = jnp.isnan(end(params, hidden, x))
    return (jnp.isnan(end(spoiled, hidden, x)) & ~before).any()

  nothing = jax.tree.map(lambda leaf: np.zeros((), bool), params)
  on: Any = np.ones((), bool)
  reached: set[str] = set()
  # Parameters whose derivative was not finite at any point count, too.
  unclear = set(by_path(params))
  for seed in range(DRAWS):
    point = points.draw(seed)
    for path, leaf in by_path(gradient(*point, np.uint32(seed))).items():
      found = np.asarray(leaf)
      if np.isfinite(found).all():
        unclear.discard(path)
      if (np.isfinite(found) & (found != 0)).any():
        reached.add(path)
    for path in set(by_path(params)) - reached:
      if spoils(*point, replace(nothing, {path: on})):
        reached.add(path)
  return tuple(path for path in by_path(params) if path in reached | unclear)


def draw_like(tree: Any, seed: int, high: int = 2) -> Any:
  """Return random concrete arrays of the shapes and dtypes of a tree.

  Args:
    tree: Tree of abstract arrays. Real and complex ones become normal numbers.
    seed: Seed of the draw.
    high: Integers are below this.
  """
  rng = np.random.default_rng(seed)

  def draw(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
      numbers = rng.normal(size=leaf.shape) + 1j * rng.normal(size=leaf.shape)
      return np.asarray(0.5 * numbers, leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      return np.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      # Keys are no NumPy arrays, so they must be kept out of a surrounding trace.
      with jax.ensure_compile_time_eval():
        return jax.random.split(jax.random.key(seed), leaf.shape)
    return np.asarray(rng.integers(0, high, leaf.shape), leaf.dtype)

  return jax.tree.map(draw, tree)
