"""Many train steps in one compiled program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fptt_jax._batch import Batch
from fptt_jax._checks import (
  as_key,
  check_flag,
  check_type,
)
from fptt_jax._compiled import Compiled
from fptt_jax._trees import arrange_like, leading_axis
from fptt_jax._types import StepMetrics, Trainer, TrainState


def scan_train_steps(
  trainer: Trainer,
  make_batch: Callable[[Any, Any], Batch] = lambda source, item: item,
  *,
  donate: bool | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]]:
  """Compile N train steps into one program, such as an epoch without host round trips.

  Args:
    trainer: Trainer from :func:`fptt_jax.make_trainer` or :func:`vmap_trainer`.
    make_batch: (source, item) -> Batch. It is traced, so that gathering rows, scaling
      bytes to floats or drawing noise is part of the program. By default, items are
      batches.
    donate: Whether the old state is donated. None: as in the trainer.

  Returns:
    (state, source, items) -> (state, StepMetrics [N, ...]), which equals N calls of
    `trainer.step`. It is compiled once per N.

    `source` is a tree of arrays that all steps read, such as a data set on the device.
    `items` is a tree of arrays with a leading axis of length N, such as the row numbers
    of each batch.

    Calls return before they are done. Data larger than memory can be passed in chunks
    of batches: prepare the next items while the device computes.

  Raises:
    TypeError: `trainer` is not a :class:`fptt_jax.Trainer`, or `donate` not a bool.
    ValueError: When traced: items are not arrays with a leading axis of one length.

  Example:
    >>> import jax, numpy as np, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(
    ...   lambda rngs: nn.Sequential(
    ...     nn.GRU(1, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
    ...   )
    ... )
    >>> loss = fptt_jax.losses.terminal_classification(3)
    >>> optimizer = fptt_jax.fptt(optax.adam(1e-3))
    >>> trainer = fptt_jax.make_trainer(model, loss, optimizer, num_windows=4)
    >>> images = np.ones((40, 20), np.uint8)  # 40 examples of T=20 pixels.
    >>> labels = np.ones(40, np.int32)
    >>> def make_batch(source, rows):
    ...   images, labels = source
    ...   return fptt_jax.Batch(images[rows].T[..., None] / 255.0, labels[rows])
    >>> epoch = fptt_jax.scan_train_steps(trainer, make_batch)
    >>> source = jax.device_put((images, labels))
    >>> rows = np.random.default_rng(0).permutation(40).reshape(5, 8)
    >>> state = trainer.init(jax.random.key(0), make_batch(source, rows[0]))
    >>> state, metrics = epoch(state, source, rows)
    >>> metrics.loss.shape  # N batches, K windows.
    (5, 4)
  """
  check_type('trainer', trainer, Trainer)
  donate = trainer.donate if donate is None else check_flag('donate', donate)

  def run(state: TrainState, source: Any, items: Any) -> tuple[TrainState, StepMetrics]:
    leading_axis('items', items)
    item = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), items
    )
    first = jax.eval_shape(make_batch, source, item)
    # The scan needs its carry in the structure that a step returns.
    like, _ = jax.eval_shape(trainer.step, state, first)
    state = state._replace(key=as_key('state.key', state.key))
    state = arrange_like('state', state, like, 'as a step returns it')
    # Batches may have another size than the state's, which is not carried on then.
    state = state._replace(
      hidden=_as_large(state.hidden, like.hidden),
      influence=_as_large(state.influence, like.influence),
    )

    def body(state: TrainState, item: Any) -> tuple[TrainState, StepMetrics]:
      return trainer.step(state, make_batch(source, item))

    return jax.lax.scan(body, state, items)

  return Compiled(run, donate=donate)


def _as_large(state: Any, like: Any) -> Any:
  """Return a tree of arrays with zeros in place of those of other shapes."""

  def fit(leaf: Any, expected: Any) -> Any:
    if jnp.shape(leaf) == expected.shape:
      return leaf
    return jnp.zeros(expected.shape, expected.dtype)

  return jax.tree.map(fit, state, like)
