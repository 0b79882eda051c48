"""The public functions of a stream learner: they validate and compile."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fptt_jax._batch import Batch, check_inputs
from fptt_jax._checks import (
  FLOAT32_TINY,
  INT32_MAX,
  check_array,
  check_callable,
  check_flag,
  check_integer,
  check_number,
  check_shape,
  check_size,
  check_type,
  require,
)
from fptt_jax._compiled import Compiled
from fptt_jax._summary import find_states
from fptt_jax._trees import check_like, leading_axis, shapes
from fptt_jax._types import Model, TrainState
from fptt_jax.influence import INFLUENCES, Influence
from fptt_jax.losses import Loss
from fptt_jax.streaming._buffer import Label, NewStep, empty
from fptt_jax.streaming._loss import partly_labeled
from fptt_jax.streaming._stream import (
  can_run_windows,
  run_labels,
  run_steps,
  run_windows,
)
from fptt_jax.streaming._types import Counts, Learner, StreamMetrics, StreamState
from fptt_jax.streaming._window import (
  DriftHook,
  StreamSpec,
  faded_means,
  finite_rows,
)
from fptt_jax.training._options import check_types
from fptt_jax.training._trainer import make_trainer


def make_learner(
  model: Model,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  window_size: int = 1,
  influence: str | Influence = 'snap1',
  delay: int = 0,
  inner_steps: int = 1,
  skip_nonfinite: bool = True,
  fading: Sequence[float] = (0.9, 0.99),
  on_drift: DriftHook | None = None,
  donate: bool = True,
) -> Learner:
  """Make the functions that learn from one never-ending stream.

  Each step is predicted before its label is seen. Every S steps make a window, on which
  the weights are trained once, from the hidden state before it, as
  :func:`fptt_jax.make_trainer` does with `carry_hidden=True`. The rows of the batch are
  streams of their own that share the weights.

  Args:
    model: Pure functions of the model.
    loss: Loss with one target per step, such as
      :func:`fptt_jax.losses.sequence_regression`. Make one of your own with
      `from_function(..., terminal=False)`.
    optimizer: Any optax transformation. With `fptt` inside, the method is 'fptt',
      otherwise 'tbptt'.
    window_size: Steps S of a window.
    influence: How a window's gradient gains what lies before the window, as in
      :func:`fptt_jax.make_trainer`. 'none' is faster and takes any model, but teaches
      no memory beyond a window.
    delay: How many steps late a label may come: that of step t is accepted until step
      t + delay + 1 is predicted. A step without a label by then counts as unlabeled.
      Labels that come later are dropped and counted. The memory grows by so many steps.
    inner_steps: Gradient steps per window, each from the hidden state before it.
    skip_nonfinite: Whether to guard against NaN and infinity. A row's step whose input
      is not finite counts as one without an input, a label that is not finite as none.
      A window whose objective, gradient norm, new λ or new weights are not finite moves
      neither weights nor hidden state; rows whose hidden state was above 1e6 start anew
      after it.
    fading: Two factors in (0, 1], the fast one and the slow one. In each window with a
      label, the sums of the metrics and their count are multiplied by the factor, and
      the window's are added. Their ratio is a mean over about 1 / (1 - factor) windows.
    on_drift: A pure function (train_state, fast, slow) -> train_state, called after
      each window that was learned. fast and slow are the faded means of the loss's
      metrics by name, of type float32 []. It may raise the learning rate, for example,
      where the fast mean of the loss is far above the slow one. None does nothing.
    donate: Whether the functions reuse the old state's memory for the new state.

  Returns:
    A :class:`Learner`. Steps with `labeled` False move the hidden state and leave the
    loss's mean; a window without any label moves no weights. Steps with `valid` False
    leave the hidden state as it is. Where `reset` is True, the row starts anew before
    the step, from the model's initial state; the window before it is closed early.

  Raises:
    ValueError: An option is out of range, or the loss has one target per sequence. When
      called: shapes of a step differ from those that `init` was given; the state is
      then as it was.
    TypeError: `model`, `loss`, `optimizer` or `on_drift` is of another type.

  Example:
    >>> import jax, jax.numpy as jnp, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(
    ...   lambda rngs: nn.Sequential(
    ...     nn.GRU(2, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
    ...   )
    ... )
    >>> loss = fptt_jax.losses.sequence_regression()
    >>> learner = fptt_jax.make_learner(model, loss, optax.adam(1e-2), window_size=4)
    >>> x, y = jnp.ones((20, 1, 2)), jnp.ones((20, 1, 1))  # 20 steps of one stream.
    >>> state = learner.init(jax.random.key(0), x)
    >>> state, outputs, metrics = learner.step(state, x, y)
    >>> int(metrics.windows), outputs.shape
    (5, (20, 1, 1))
    >>> state, forecast = learner.predict(state, x[:1])
    >>> state, metrics = learner.learn(state, y[:1])  # Later, when the label is known.
  """
  check_types(model, loss, optimizer)
  _check_loss(loss)
  window_size = check_size('window_size', window_size)
  if on_drift is not None:
    check_callable('on_drift', on_drift)
  wrapped = partly_labeled(loss)
  train_window = functools.partial(
    make_trainer,
    model,
    wrapped,
    optimizer,
    method=_method_of(model, optimizer),
    num_windows=1,
    carry_hidden=True,
    influence=influence,
    skip_nonfinite=skip_nonfinite,
    return_outputs=True,
    donate=False,
  )
  trainer = train_window(inner_steps=inner_steps)
  spec = StreamSpec(
    model=model,
    user_loss=loss,
    loss=wrapped,
    trainer=trainer,
    unlabeled=trainer if inner_steps == 1 else train_window(inner_steps=1),
    window_size=window_size,
    delay=check_integer('delay', delay, 0, INT32_MAX // 2, 'an integer >= 0'),
    skip_nonfinite=skip_nonfinite,
    fading=_check_fading(fading),
    on_drift=on_drift,
    inner_steps=int(inner_steps),
    keeps_influence=_keeps_influence(influence),
  )
  return _compile(_Functions(spec), check_flag('donate', donate))


def _keeps_influence(influence: str | Influence) -> bool:
  """Return whether an influence is learned, and stays when rows start anew."""
  found = INFLUENCES.get(influence) if isinstance(influence, str) else influence
  return found is not None and found.keeps


def _compile(functions: '_Functions', donate: bool) -> Learner:
  """Return the compiled functions of a learner."""
  # `init` runs once and checks values, which compiled code cannot.
  return Learner(
    init=functions.init,
    step=Compiled(functions.step, donate=donate),
    predict=Compiled(functions.predict, donate=donate),
    learn=Compiled(functions.learn, donate=donate),
    donate=donate,
  )


class _Functions:
  """The functions of one learner, before they are compiled."""

  def __init__(self, spec: StreamSpec) -> None:
    """Keep the options, see :func:`make_learner`."""
    self.spec = spec

  def init(self, key: jax.Array, x: Any, y: Any = None) -> StreamState:
    """Make the first state, see :class:`Learner`."""
    spec = self.spec
    _, batch_size = check_inputs(x)
    inputs = _zero_window(x, spec.window_size)
    train = spec.trainer.init(key, Batch(inputs, ()))
    if y is None:
      y = _infer_targets(spec, train, inputs)
    else:
      _check_rows('y', y, batch_size)
      y = _zero_window(y, spec.window_size)
    metrics = _trace_window(spec, train, inputs, y)
    # One place more than what may wait: a step is added before the oldest is dropped.
    places = spec.window_size + spec.delay + 1
    faded = {name: jnp.zeros([], jnp.float32) for name in metrics.totals}
    zero = jnp.zeros([], jnp.int32)
    totals = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), metrics.totals)
    state = StreamState(
      train=train,
      live=train.hidden,
      pending=empty(inputs, metrics.outputs, y, places),
      fast=faded,
      slow=faded,
      counts=Counts(totals, zero, zero, zero, zero),
    )
    # Donated arrays must not be in two places.
    return jax.tree.map(jnp.copy, state)

  def step(
    self,
    state: StreamState,
    x: Any,
    y: Any,
    labeled: jax.typing.ArrayLike | None = None,
    valid: jax.typing.ArrayLike | None = None,
    reset: jax.typing.ArrayLike | None = None,
  ) -> tuple[StreamState, jax.Array, StreamMetrics]:
    """Predict and learn, see :class:`Learner`."""
    spec = self.spec
    steps = _as_steps(state, x, valid, reset)
    labels = _as_labels(spec, state, y, labeled)
    num_steps, num_labels = len(steps.valid), len(labels.labeled)
    same = num_steps == num_labels
    require(same, 'y', f'of the n={num_steps} steps of x', num_labels)
    every = functools.partial(run_steps, spec, may_reset=reset is not None)
    if num_steps % spec.window_size:
      state, outputs = every(state, steps, labels)
    else:
      windows = functools.partial(run_windows, spec, all_valid=valid is None)
      able = can_run_windows(spec, state, steps, labels)
      state, outputs = jax.lax.cond(able, windows, every, state, steps, labels)
    state, metrics = _report(state)
    return state, outputs, metrics

  def predict(
    self,
    state: StreamState,
    x: Any,
    valid: jax.typing.ArrayLike | None = None,
    reset: jax.typing.ArrayLike | None = None,
  ) -> tuple[StreamState, jax.Array]:
    """Predict steps whose labels come later, see :class:`Learner`."""
    steps = _as_steps(state, x, valid, reset)
    return run_steps(self.spec, state, steps, None, may_reset=reset is not None)

  def learn(
    self, state: StreamState, y: Any, labeled: jax.typing.ArrayLike | None = None
  ) -> tuple[StreamState, StreamMetrics]:
    """Learn from labels of steps predicted before, see :class:`Learner`."""
    labels = _as_labels(self.spec, state, y, labeled)
    return _report(run_labels(self.spec, state, labels))


def _report(state: StreamState) -> tuple[StreamState, StreamMetrics]:
  """Return the metrics since the last report, and the state that counts anew."""
  metrics = StreamMetrics(
    *state.counts, fast=faded_means(state.fast), slow=faded_means(state.slow)
  )
  counts = jax.tree.map(jnp.zeros_like, state.counts)
  return state._replace(counts=counts), metrics


def _as_steps(state: StreamState, x: Any, valid: Any, reset: Any) -> NewStep:
  """Return n steps as the inner functions take them; raise unless they fit."""
  check_type('state', state, StreamState)
  num_steps = _check_like('x', x, state.pending.inputs, exactly=True)
  rows = (num_steps, state.pending.valid.shape[1])
  return NewStep(
    inputs=jax.tree.map(jnp.asarray, x),
    valid=_as_mask('valid', valid, rows, True),
    reset=_as_mask('reset', reset, rows, False),
  )


def _as_labels(spec: StreamSpec, state: StreamState, y: Any, labeled: Any) -> Label:
  """Return n labels as the inner functions take them; raise unless they fit."""
  check_type('state', state, StreamState)
  like = state.pending.targets
  num_steps = _check_like('y', y, like, exactly=False)
  rows = (num_steps, state.pending.valid.shape[1])
  y = jax.tree.map(lambda leaf, ring: jnp.asarray(leaf, ring.dtype), y, like)
  labeled = _as_mask('labeled', labeled, rows, True)
  if spec.skip_nonfinite:
    labeled &= finite_rows(y, 2)
  return Label(y, labeled)


def _check_like(name: str, tree: Any, ring: Any, *, exactly: bool) -> int:
  """Raise unless a tree is of steps like those in a ring; return the number of steps.

  The check runs when a call is traced, and a call of other shapes is traced anew. It
  comes before anything is donated.
  """
  num_steps = leading_axis(name, tree)
  like = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((num_steps, *leaf.shape[1:]), leaf.dtype), ring
  )
  check_like(name, tree, like, 'as init was given it, [n, B, ...]', exactly)
  return num_steps


def _as_mask(name: str, mask: Any, rows: tuple[int, int], missing: bool) -> jax.Array:
  """Return a mask bool [n, B], filled with `missing` if it is None."""
  if mask is None:
    return jnp.full(rows, missing)
  return jnp.asarray(check_shape(name, mask, '[n, B]', rows, bool))


def _zero_window(tree: Any, size: int) -> Any:
  """Return zeros [S, B, ...] like a tree of arrays [n, B, ...]."""

  def zeros(leaf: Any) -> jax.Array:
    # NumPy's 64 bits become JAX's default width, as in a compiled call.
    dtype = jnp.result_type(leaf.dtype)
    return jnp.zeros((size, *leaf.shape[1:]), dtype)

  return jax.tree.map(zeros, tree)


def _check_rows(name: str, tree: Any, batch_size: int) -> None:
  """Raise a ValueError unless a tree is of arrays [n, B, ...]."""
  for leaf in jax.tree.leaves(tree):
    fits = check_array(name, leaf).shape[1:2] == (batch_size,)
    accepted = f'arrays [n, B, ...] with B={batch_size} like x'
    require(fits, name, accepted, shapes(tree))


def _trace_window(spec: StreamSpec, train: TrainState, inputs: Any, y: Any) -> Any:
  """Return shapes and dtypes of the metrics of a window, without running it."""
  rows = jax.tree.leaves(inputs)[0].shape[:2]
  batch = Batch(inputs, (y, jax.ShapeDtypeStruct(rows, jnp.bool_)))
  _, metrics = jax.eval_shape(spec.trainer.step, train, batch)
  return metrics


def _infer_targets(spec: StreamSpec, train: TrainState, inputs: Any) -> Any:
  """Return shapes and dtypes of labels [S, B, ...] that the loss accepts.

  Numbers of the outputs' shape are tried first, then one class index per row.

  Raises:
    ValueError: The loss accepts neither.
  """
  outputs = jax.eval_shape(spec.trainer.predict, train.params, inputs)
  candidates = (
    jax.ShapeDtypeStruct(outputs.shape, outputs.dtype),
    jax.ShapeDtypeStruct(outputs.shape[:2], jnp.int32),
  )
  for y in candidates:
    try:
      _trace_window(spec, train, inputs, y)
    except Exception:
      # A loss raises what it likes about targets that it does not take.
      continue
    return y
  raise ValueError(
    'y must be given to init, as an example of labels [n, B, ...], because the loss '
    f'takes neither numbers of the shape {outputs.shape} of the outputs nor class '
    f'indices of shape {outputs.shape[:2]}: got None.'
  )


def _method_of(model: Model, optimizer: optax.GradientTransformation) -> str:
  """Return the name of the method that an optimizer belongs to."""
  params = jax.eval_shape(model.init, jax.random.key(0))
  regularized = find_states(jax.eval_shape(optimizer.init, params))
  return 'fptt' if regularized else 'tbptt'


def _check_loss(loss: Loss) -> None:
  """Raise a ValueError if a loss has one target per sequence."""
  found = {'terminal': loss.terminal, 'last_only': loss.last_only}
  hint = 'Make one by losses.sequence_regression or from_function(terminal=False).'
  require(not any(found.values()), 'loss', 'one with a target per step', found, hint)


def _check_fading(fading: Any) -> tuple[float, float]:
  """Return the two fading factors; raise ValueError unless they lie in (0, 1]."""
  expected = 'two factors in (0, 1]'
  require(np.shape(fading) == (2,), 'fading', expected, fading)
  fast, slow = (
    check_number('fading', factor, FLOAT32_TINY, 1, expected) for factor in fading
  )
  return fast, slow
