"""Optimizers with momentum from batch to batch, for each window by itself.

The K updates of a batch share its examples, so that their gradients have noise in
common, which momentum from window to window may not average out. Here window k has a
first moment of its own, which moves once per batch. In our comparisons these optimizers
were never significantly better than Adam and SGD, and significantly worse on two tasks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fptt_jax._checks import check_integer, check_size, require
from fptt_jax._dtypes import at_least_float32
from fptt_jax._trees import nodes_of


class WindowMomentsState(NamedTuple):
  """State of the transformations in this module.

  Attributes:
    update_counts: int32 [K], number of updates at each window so far.
    first_moments: Tree like the parameters with a leading axis of K windows, in at
      least float32.
    second_moment: Tree like the parameters, of all windows; () without one.
  """

  update_counts: jax.Array
  first_moments: optax.Updates
  second_moment: optax.Updates


def adam_by_window(
  learning_rate: optax.ScalarOrSchedule,
  num_windows: int,
  *,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
  r"""Return Adam with a first moment for each window of a sequence.

  At window k, with gradient g, :math:`s_k` updates of this window and t of all so far,

  .. math::

    \begin{align*}
      m_k' & = b_1 m_k + (1 - b_1)\,g, \qquad v' = b_2 v + (1 - b_2)\,g^2, \\
      u & = -\eta\,\frac{m_k' / (1 - b_1^{s_k})}
        {\sqrt{v' / (1 - b_2^t)} + \epsilon}.
    \end{align*}

  With one window it is Adam. It needs K - 1 more copies of the parameters than Adam.

  The window's index is the extra argument `window` of `update`, an integer or
  int32 [], 0..K-1. A trainer passes it, also through `fptt`, chains and
  `optax.inject_hyperparams`. In a loop of your own call
  `update(grads, state, params, window=k)`. Inside `optax.MultiSteps` it is the window
  of the last call, since that wrapper averages over calls.

  Args:
    learning_rate: η, a number, an array [] or a schedule over updates.
    num_windows: K, the number of windows of a sequence or more. Methods with one update
      per sequence have one.
    b1: Decay of the first moments, per batch.
    b2: Decay of the second moment, per update.
    eps: ε.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: `num_windows` is out of range; or, in `update`, `window` is missing or,
      unless traced, out of range. A trainer with more windows raises an error.

  Example:
    >>> import fptt_jax
    >>> optimizer = fptt_jax.adam_by_window(3e-3, num_windows=10)
  """

  def update(
    grads: optax.Updates, state: WindowMomentsState, window: jax.Array
  ) -> tuple[optax.Updates, WindowMomentsState]:
    counts = state.update_counts.at[window].add(1)
    first = optax.tree.update_moment(grads, _at(state, window), b1, 1)
    second = optax.tree.update_moment_per_elem_norm(grads, state.second_moment, b2, 2)
    numerator = optax.tree.bias_correction(first, b1, counts[window])
    squared = optax.tree.bias_correction(second, b2, counts.sum())
    updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), numerator, squared)
    moments = _written(state, window, first)
    return updates, WindowMomentsState(counts, moments, second)

  scaling = _by_window(num_windows, update, has_second_moment=True)
  return optax.chain(scaling, optax.scale_by_learning_rate(learning_rate))


def sgd_by_window(
  learning_rate: optax.ScalarOrSchedule,
  num_windows: int,
  *,
  momentum: jax.typing.ArrayLike = 0.9,
  nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Return SGD with heavy-ball momentum for each window of a sequence.

  At window k, with gradient g, m_k becomes μ m_k + g, and the update is -η m_k or, with
  `nesterov`, -η (g + μ m_k). It needs K copies of the parameters. All else is as for
  :func:`adam_by_window`.

  Args:
    learning_rate: η, a number, an array [] or a schedule over updates.
    num_windows: K, the number of windows of a sequence or more.
    momentum: μ, decay of the momentum per batch.
    nesterov: Whether to look ahead as Nesterov's momentum does.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: As for :func:`adam_by_window`.

  Example:
    >>> import fptt_jax
    >>> optimizer = fptt_jax.sgd_by_window(0.1, num_windows=10, momentum=0.9)
  """

  def update(
    grads: optax.Updates, state: WindowMomentsState, window: jax.Array
  ) -> tuple[optax.Updates, WindowMomentsState]:

    def trace(gradient: jax.Array, moment: jax.Array) -> jax.Array:
      return gradient + momentum * moment

    first = jax.tree.map(trace, grads, _at(state, window))
    updates = jax.tree.map(trace, grads, first) if nesterov else first
    counts = state.update_counts.at[window].add(1)
    return updates, WindowMomentsState(counts, _written(state, window, first), ())

  scaling = _by_window(num_windows, update, has_second_moment=False)
  return optax.chain(scaling, optax.scale_by_learning_rate(learning_rate))


def check_window_count(opt_state: optax.OptState, num_updates: int) -> None:
  """Raise a ValueError if a state has fewer windows than a sequence has updates."""
  for node in nodes_of(opt_state, WindowMomentsState):
    found = len(node.update_counts)
    accepted = f"at least the trainer's {num_updates} updates per sequence"
    require(found >= num_updates, 'num_windows of the optimizer', accepted, found)


def _by_window(
  num_windows: int, update: Any, has_second_moment: bool
) -> optax.GradientTransformationExtraArgs:
  """Return a transformation with a first moment for each window.

  Args:
    num_windows: K.
    update: (grads, state, window) -> (updates, state).
    has_second_moment: Whether the state has a second moment.
  """
  num_windows = check_size('num_windows', num_windows)

  def init_fn(params: optax.Params) -> WindowMomentsState:

    def zeros(*axes: int) -> optax.Updates:
      return jax.tree.map(
        lambda p: jnp.zeros((*axes, *jnp.shape(p)), _moment_dtype(p)), params
      )

    second = zeros() if has_second_moment else ()
    counts = jnp.zeros(num_windows, jnp.int32)
    return WindowMomentsState(counts, zeros(num_windows), second)

  def update_fn(
    grads: optax.Updates,
    state: WindowMomentsState,
    params: optax.Params | None = None,
    *,
    window: jax.typing.ArrayLike | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, WindowMomentsState]:
    del params, extra_args
    accepted = f"the gradient's window, 0..{num_windows - 1}, as a trainer passes it"
    if not isinstance(window, jax.core.Tracer):
      window = check_integer('window', window, 0, num_windows - 1, accepted)
    wide = jax.tree.map(lambda g: jnp.asarray(g, _moment_dtype(g)), grads)
    updates, state = update(wide, state, jnp.asarray(window, jnp.int32))
    updates = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), updates, grads)
    return updates, state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moment_dtype(param: Any) -> jnp.dtype:
  return at_least_float32(jnp.result_type(param))


def _at(state: WindowMomentsState, window: jax.Array) -> optax.Updates:
  """Return the first moment of one window."""
  return jax.tree.map(lambda moments: moments[window], state.first_moments)


def _written(
  state: WindowMomentsState, window: jax.Array, moment: optax.Updates
) -> optax.Updates:
  """Return all first moments with a new one for one window."""

  def write(moments: jax.Array, new: jax.Array) -> jax.Array:
    return moments.at[window].set(new.astype(moments.dtype))

  return jax.tree.map(write, state.first_moments, moment)
