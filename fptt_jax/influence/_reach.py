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
from fptt_jax.influence._arrays import by_path, join
from fptt_jax.influence._base import WindowMap

Found = TypeVar('Found')

DRAWS = 4
"""Points at which derivatives are looked at: a rectifier may be off at one."""
MAX_DRAWS = 32
"""Most points. Those after the first `DRAWS` are for entries off at all of these."""
STEPS = 3
"""Most steps of a window that are run: more show nothing new."""

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


@once_per_model
def reached_paths(window: WindowMap, params: Params, hidden: Hidden) -> tuple[str, ...]:
  """Return the paths of the parameters that the hidden state depends on.

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

  @concrete
  def gradient(params: Params, hidden: Hidden, x: Any, seed: jax.Array) -> Params:
    def end(params: Params) -> jax.Array:
      ends = join(window.run(params, hidden, x, None))
      if window.start is None:
        return ends
      # Starting from there alone might hide what acts on the state of the step before.
      return jnp.concatenate([ends, join(window.start(params))])

    out, pull = jax.vjp(end, params)
    [grads] = pull(jax.random.normal(jax.random.key(seed), out.shape, out.dtype))
    return grads

  reached: set[str] = set()
  for seed in range(DRAWS):
    point = draw_like((params, hidden, x), seed)
    for path, leaf in by_path(gradient(*point, np.uint32(seed))).items():
      # A NaN counts as a dependence, too.
      if (np.asarray(leaf) != 0).any():
        reached.add(path)
  return tuple(path for path in by_path(params) if path in reached)


def draw_like(tree: Any, seed: int) -> Any:
  """Return random concrete arrays of the shapes and dtypes of a tree.

  Args:
    tree: Tree of abstract arrays. Real ones become normal numbers, integers 0 or 1.
    seed: Seed of the draw.
  """
  rng = np.random.default_rng(seed)

  def draw(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      return np.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      # Keys are no NumPy arrays, so they must be kept out of a surrounding trace.
      with jax.ensure_compile_time_eval():
        return jax.random.split(jax.random.key(seed), leaf.shape)
    return np.asarray(rng.integers(0, 2, leaf.shape), leaf.dtype)

  return jax.tree.map(draw, tree)
