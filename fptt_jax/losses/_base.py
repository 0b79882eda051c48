"""The interface of a loss, and what all losses share."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import (
  INT32_MAX,
  as_floats,
  check_integer,
  check_shape,
  require,
  require_type,
)
from fptt_jax._dtypes import widen
from fptt_jax._windows import WindowView

LossState = Any
MetricSums = dict[str, jax.Array]
"""Sum of metrics by name, and 'count', the number of terms: means are sum / count."""


class Memory(NamedTuple):
  """A loss's `apply` in two parts, so that a window writes only a part of the state.

  A large loss state is then updated in place, also where an update is skipped.

  Attributes:
    apply: The `Loss.apply` that these are the parts of. A loss whose `apply` was
      replaced is run as a whole.
    observe: (outputs, targets, window, loss_state) -> (scalar objective, note). The
      note is a tree of arrays with all that `write` needs. It must be equal on all
      devices.
    write: (loss_state, note, keep) -> new loss state, or the old one where `keep`, True
      or bool [], is False.
  """

  apply: Callable[[jax.Array, Any, WindowView, LossState], tuple[jax.Array, LossState]]
  observe: Callable[[jax.Array, Any, WindowView, LossState], tuple[jax.Array, Any]]
  write: Callable[[LossState, Any, jax.Array | bool], LossState]


@dataclasses.dataclass(frozen=True, eq=False)
class PerStep:
  """A loss's `per_step`, and what it factors.

  Attributes:
    function: See `Loss.per_step`.
    apply: The `Loss.apply` that is the mean of its 'loss'.
    measure: The `Loss.measure` that sums its metrics.
  """

  function: Callable[[jax.Array, Any], dict[str, jax.Array]]
  apply: Callable[..., Any]
  measure: Callable[..., Any]

  def __call__(self, outputs: jax.Array, targets: Any) -> dict[str, jax.Array]:
    """Return the metrics of each step."""
    return self.function(outputs, targets)


class Loss(NamedTuple):
  """A loss as pure functions. :func:`from_function` makes one from a single function.

  Attributes:
    init: (num_windows) -> loss state.
    apply: (outputs, targets, window, loss_state) -> (scalar objective of this window,
      new loss state). It must be 0 if no sequence is active in the window; the new
      state counts there, too.
    measure: (outputs, targets, window) -> :data:`MetricSums`, which evaluation sums
      over windows, batches and devices.
    end_epoch: (loss_state) -> loss state of the next epoch.
    check: (targets, valid bool [T, B]) -> None. Raises an error if concrete targets are
      invalid at a valid step.
    last_only: Whether `apply` and `measure` use only the output at each sequence's last
      valid step in the window, `window.last`. They must then accept outputs [1, B, ...]
      of that step as well.
    per_step: (outputs [s, B, ...], targets [s, B, ...] of the same steps) -> {'loss':
      float [s, B], other metrics}, for any s steps. Give it if `apply` is the mean of
      'loss' over the window's valid steps, `measure` sums all entries over them, and
      there is no state. Outputs may then be computed a few steps at a time. Else None.
      It is ignored if `apply` or `measure` of a loss of this module was replaced.
    terminal: Whether there is one target per sequence. If T = B, targets of shape
      [B, B, ...] are then read as [B, ...] and not as [T, B, ...].
    memory: `apply` in two parts; None if the state is small.
    valid: (targets, mask bool [T, B]) -> bool [], traced: whether all targets are in
      range at the valid steps. If it is False, the train step skips the batch's updates
      and reports them in `StepMetrics.invalid`. None skips this check.
  """

  init: Callable[[int], LossState]
  apply: Callable[[jax.Array, Any, WindowView, LossState], tuple[jax.Array, LossState]]
  measure: Callable[[jax.Array, Any, WindowView], MetricSums]
  end_epoch: Callable[[LossState], LossState] = lambda loss_state: loss_state
  check: Callable[[Any, np.ndarray], None] = lambda targets, valid: None
  last_only: bool = False
  per_step: Callable[[jax.Array, Any], dict[str, jax.Array]] | None = None
  terminal: bool = False
  memory: Memory | None = None
  valid: Callable[[Any, jax.Array], jax.Array] | None = None


def without_replaced_parts(loss: Loss) -> Loss:
  """Return the loss without parts of functions that it no longer has.

  Otherwise the parts would run in place of the `apply` or `measure` that a user has put
  there.
  """
  memory, per_step = loss.memory, loss.per_step
  if memory is not None and memory.apply != loss.apply:
    loss = loss._replace(memory=None)
  if isinstance(per_step, PerStep):
    made_for = (per_step.apply, per_step.measure)
    if made_for != (loss.apply, loss.measure):
      loss = loss._replace(per_step=None)
  return loss


def compute_metrics(totals: MetricSums) -> dict[str, Any]:
  """Divide metric sums by their count, on the host.

  Args:
    totals: Concrete sums by name, with 'count': numbers, or arrays [R] of R members
      trained side by side.

  Returns:
    The means by name, without 'count': floats, or float64 arrays [R]. NaN where the
    count is 0.

  Raises:
    ValueError: If there is no 'count', or the shapes differ.
    TypeError: If `totals` is not a dict, or a sum is not a concrete real number or
      array.

  Example:
    >>> import fptt_jax
    >>> fptt_jax.compute_metrics({'count': 4, 'loss': 2.0})
    {'loss': 0.5}
  """
  accepted = 'a dict of sums, the first of the two results of Trainer.evaluate'
  require_type(isinstance(totals, Mapping), 'totals', accepted, totals)
  sums = {name: as_floats(name, total) for name, total in totals.items()}
  shapes = {name: total.shape for name, total in sums.items()}
  fits = 'count' in sums and len(set(shapes.values())) == 1
  require(fits, 'totals', "of one shape, with a 'count'", shapes)
  count = sums.pop('count')
  divisor = np.where(count > 0, count, np.nan)
  means: dict[str, Any] = {name: total / divisor for name, total in sums.items()}
  if count.ndim == 0:
    means = {name: float(mean) for name, mean in means.items()}
  return means


def no_state(num_windows: int) -> LossState:
  """Return the state of a loss that remembers nothing."""
  del num_windows
  return ()


def totals_where(where: jax.Array, values: dict[str, jax.Array]) -> MetricSums:
  """Return the sums of the values where `where` is True, and their count."""
  sums = {
    name: jnp.sum(value, where=where, dtype=jnp.float32)
    for name, value in values.items()
  }
  return {'count': jnp.sum(where, dtype=jnp.int32), **sums}


def squared_error(predicted: jax.Array, expected: jax.Array) -> jax.Array:
  """Return (predicted - expected)² elementwise, in at least float32."""
  # float16 cannot hold the square of a difference above 256.
  return jnp.square(widen(predicted) - widen(expected))


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Return bool [...], whether the largest of the logits [..., C] is the label's."""
  return logits.argmax(-1).astype(labels.dtype) == labels


def widen_indices(indices: jax.Array) -> jax.Array:
  """Return indices in at least 32 bits."""
  # Fewer bits may not hold the number of classes, to which indices are compared.
  if jnp.iinfo(indices.dtype).bits >= 32:
    return indices
  return jnp.asarray(indices, jnp.int32)


def in_range(indices: jax.Array, limit: int) -> jax.Array:
  """Return bool, elementwise, whether indices lie in 0..limit-1."""
  indices = widen_indices(indices)
  return (indices >= 0) & (indices < limit)


def check_classes(num_classes: Any) -> int:
  """Return the number of classes; raise ValueError unless it is an integer >= 2."""
  return check_integer('num_classes', num_classes, 2, INT32_MAX, 'an integer >= 2')


def require_kind(name: str, values: jax.Array, kind: type) -> None:
  """Raise TypeError unless an array's dtype is of a kind, such as `jnp.integer`."""
  fits = jnp.issubdtype(values.dtype, kind)
  accepted, hint = 'integers', ''
  if kind is not jnp.integer:
    accepted = 'floating-point numbers'
    if jnp.issubdtype(values.dtype, jnp.integer):
      hint = 'Integers are class indices, which need a classification loss.'
  require_type(fits, name, accepted, values, hint)


def require_features(outputs: jax.Array, features: int) -> None:
  """Raise ValueError unless outputs are [S, B, features]."""
  fits = outputs.ndim == 3 and outputs.shape[-1] == features
  require(fits, 'outputs', f'of shape [S, B, {features}]', outputs.shape)


def check_indices(name: str, values: Any, valid: np.ndarray, limit: int) -> None:
  """Validate concrete class indices.

  Args:
    name: The argument's name.
    values: Concrete integers of the shape of `valid`.
    valid: bool, where the values must be in range.
    limit: The number of classes.

  Raises:
    TypeError: If the values are not integers.
    ValueError: If their shape differs, or one is not in 0..limit-1.
  """
  require_kind(name, values, jnp.integer)
  axes = '[T, B]' if valid.ndim == 2 else '[B]'
  values = np.asarray(check_shape(name, values, axes, valid.shape))
  bad = values[valid & ~((values >= 0) & (values < limit))]
  # Other libraries ignore labels such as -1 or -100.
  ignored = 'Negative labels are not ignored; give lengths or a mask.'
  hint = ignored if bad.min(initial=0) < 0 else ''
  require(not bad.size, name, f'in 0..{limit - 1}', bad[:3].tolist(), hint)


def check_finite(name: str, values: Any, valid: np.ndarray) -> None:
  """Validate concrete numbers.

  Args:
    name: The argument's name.
    values: Concrete floating-point numbers that begin with the axes of `valid`.
    valid: bool, where the values must be finite.

  Raises:
    TypeError: If the values are not floating point.
    ValueError: If their leading axes differ, or one is not finite.
  """
  require_kind(name, values, jnp.floating)
  values = np.asarray(values)
  fits = values.shape[: valid.ndim] == valid.shape
  require(fits, name, f'of leading dimensions {valid.shape}', values.shape)
  features = tuple(range(valid.ndim, values.ndim))
  finite = np.isfinite(values).all(axis=features)
  bad = np.argwhere(~finite & valid)
  if bad.size:
    got = f'NaN or infinity in {len(bad)} places, the first at {tuple(bad[0].tolist())}'
    raise ValueError(f'{name} must be finite, got {got}.')
