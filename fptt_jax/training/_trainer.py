"""The public functions of a trainer: they validate, place and compile."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fptt_jax._batch import (
  Batch,
  check_shapes,
  check_type,
  is_addressable,
  validate_batch,
  with_mask,
)
from fptt_jax._checks import as_key, check_arrays, check_flag
from fptt_jax._compiled import Compiled, explain_deleted
from fptt_jax._probe import check_model, check_state_rows
from fptt_jax._summary import find_states
from fptt_jax._trees import arrange_like, check_like, leaf_paths
from fptt_jax._types import Hidden, Model, Params, StepMetrics, Trainer, TrainState
from fptt_jax._usable import check_usable
from fptt_jax.influence import Influence
from fptt_jax.influence._check import check_map
from fptt_jax.losses import Loss, MetricSums
from fptt_jax.parallel._placement import Placement, make_placement
from fptt_jax.training._evaluate import run_evaluate, run_predict
from fptt_jax.training._schedules import Method
from fptt_jax.training._spec import StepSpec, resolve_spec
from fptt_jax.training._step import run_step
from fptt_jax.training._window import check_hidden, first_influence


def make_trainer(
  model: Model,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  method: str | Method = 'fptt',
  num_windows: int | None = None,
  window_size: int | None = None,
  carry_hidden: bool = False,
  loss_weights: Sequence[float] | np.ndarray | None = None,
  inner_steps: int = 1,
  truncation_steps: int | None = None,
  skip_nonfinite: bool = False,
  mesh: jax.sharding.Mesh | None = None,
  shard_params: bool = False,
  readout_chunk: int | None = None,
  return_outputs: bool = False,
  donate: bool = True,
  micro_batches: int = 1,
  influence: str | Influence = 'none',
  checkpoint_windows: bool = False,
) -> Trainer:
  """Make the functions that train a recurrent model forward through time.

  To start from given weights, such as imported ones, pass the model
  `model._replace(init=lambda key: params)`.

  Args:
    model: Pure functions of the model.
    loss: Loss of a window, see `fptt_jax.losses`.
    optimizer: Any optax transformation; for FPTT `fptt(base)`, or a chain around it.
      Its `update` gets those of these extra arguments that it takes: `value` (the
      objective), `grad` (its gradient), `value_fn` (params -> the same objective from
      the same hidden state), `grad_fn` (params and, optionally, an unused number -> its
      gradient) and `inner_steps`. `optax.contrib.reduce_on_plateau` sees one value per
      update. To count sequences, give it `accumulation_size` = K (times `inner_steps`)
      for methods with one update per window, and put it inside:
      `fptt(optax.chain(base, plateau))`. It then compares means of K objectives;
      windows without a valid step are not counted.
    method: A name in `METHODS`, or a `Method`. 'fptt' and 'tbptt' run the same step:
      the optimizer must contain `fptt` for the first and must not for the second.
    num_windows: K. The default is round(√T), as in the paper.
    window_size: Steps S of the longest window, in place of K. Methods that fix K
      ('bptt', 'tbptt_final', 'ogd') take neither.
    carry_hidden: Whether a batch starts from the last hidden state of the previous one,
      as in language modeling: row b continues row b. By default, each sequence starts
      from the model's initial state.
    loss_weights: K finite factors of the windows' losses; all 1 by default.
    inner_steps: Gradient steps per window, each from the hidden state before the
      window. The hidden state of the last one's pass is carried on. 'ftrl' runs through
      the sequence in each window, even if no sequence has steps left: then the pass
      uses the parameters after the last update.
    truncation_steps: k of 'tbptt_final': how many of the last steps are differentiated.
    skip_nonfinite: Whether to leave out updates whose objective, gradient norm or new λ
      is not finite in any inner step. Parameters, optimizer state, hidden state and
      loss state stay as they were, and the totals exclude the update; see
      `StepMetrics.skipped`. 'ftrl' runs through all windows in each update, so that a
      bad window skips all. The cost is a few more passes per window over the state,
      including large tables of the loss.
    mesh: Mesh with one axis, over whose devices the batch is split. There is one mean
      over the devices per window, of gradient and objective together. Parameters and
      optimizer state are the same on all devices. The batch size must be a multiple of
      the number of devices. Dropout noise differs from that on one device. A custom
      loss gets one device's rows, and its mean over the devices is taken;
      `window.mean` makes that exact for ragged batches, too. The devices may belong to
      several processes: see `fptt_jax.make_global_batch`.
    shard_params: Whether to split parameters and optimizer state (W, W̄, λ and the base
      optimizer's state) over the mesh, too. Each array is cut along the first axis that
      the number of devices divides, or is replicated if there is none. In each window,
      parameters are gathered once and gradients are reduced and scattered once.
    readout_chunk: Steps whose outputs, loss and gradient are computed at a time, for
      models with a `split` and losses with a `per_step`. By default all of a window
      unless, on a CPU, the readout would make an array above 32 MiB: then as many as
      make 10 MiB. It changes rounding, and for large vocabularies it saves memory and
      time. Such an objective has no forward-mode derivative.
    return_outputs: Whether `StepMetrics.outputs` holds the model's outputs of all T
      steps. It costs their memory, [T, B, ...], and the readout of all steps, where a
      `last_only` loss needs one per window; it excludes `readout_chunk`. Dropout noise
      after the last recurrent layer may differ.
    donate: Whether `step` reuses the old state's memory for the new state. False keeps
      old states alive and costs the memory of a second one. `scan_train_steps` and
      `vmap_trainer` follow the trainer.
    micro_batches: Number of parts in which a window's rows are run, one after the
      other; it must divide the rows per device. A window needs about the memory of one
      part, besides the model's outputs, and one more forward pass. Loss, gradient and
      metrics are those of the whole batch up to rounding, and there is still one
      update; dropout noise differs. Readouts with a `split` run in S/micro_batches
      steps at a time unless `readout_chunk` is given. Ragged batches are excluded for
      models that return penalties.
    influence: How a window's gradient gains what lies before the window: a name in
      `fptt_jax.influence.INFLUENCES`, or what a function of `fptt_jax.influence` makes,
      for methods with one update per window and gradients that reach back to its start.
      'none' leaves it out. The model must not draw noise, such as dropout, before or in
      its recurrent layers. Excludes `shard_params`.
    checkpoint_windows: Whether methods whose updates run through several windows
      ('bptt_aux', 'ftrl') run each window again for its gradient. Memory then grows
      with K + S rather than with T, for one more forward pass. With `loss_weights` of 0
      but for the last window, 'bptt_aux' is back-propagation of a final loss.

  Returns:
    A :class:`Trainer`. Masked steps change neither state, loss nor gradient. A window
    in which no sequence of a ragged batch has a valid step changes nothing, parameters
    and optimizer state included.

  Raises:
    ValueError: An option is out of range, options contradict each other, or the
      optimizer changes updates after `fptt`. When traced: shapes of a batch do not
      fit.
    TypeError: `model`, `loss` or `optimizer` is of another type. When traced: dtypes of
      a batch do not fit. Values in arrays are not checked in compiled code: see
      :func:`validate_batch`.

  Example:
    >>> import jax, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(
    ...   lambda rngs: nn.Sequential(
    ...     nn.GRU(1, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
    ...   )
    ... )
    >>> optimizer = fptt_jax.fptt(optax.adam(1e-3), alpha=0.1)
    >>> loss = fptt_jax.losses.terminal_regression()
    >>> trainer = fptt_jax.make_trainer(model, loss, optimizer, num_windows=4)
    >>> batch = fptt_jax.Batch(jax.numpy.ones((20, 8, 1)), jax.numpy.ones(8))
    >>> state = trainer.init(jax.random.key(0), batch)
    >>> state, metrics = trainer.step(state, batch)
    >>> metrics.loss.shape
    (4,)

  References:
    Kag and Saligrama, ICML 2021: Algorithms 1 and 2, "FPTT-K" and Table 3.
  """
  options = {
    'num_windows': num_windows,
    'window_size': window_size,
    'truncation_steps': truncation_steps,
    'carry_hidden': carry_hidden,
    'loss_weights': loss_weights,
    'inner_steps': inner_steps,
    'skip_nonfinite': skip_nonfinite,
    'readout_chunk': readout_chunk,
    'return_outputs': return_outputs,
    'micro_batches': micro_batches,
    'influence': influence,
    'checkpoint_windows': checkpoint_windows,
  }
  spec = resolve_spec(model, loss, optimizer, method, options)
  placement = make_placement(mesh, check_flag('shard_params', shard_params), loss)
  if shard_params and spec.influence is not None:
    _refuse_sharding(influence)
  spec = dataclasses.replace(spec, axis=placement.axis)
  return _compile(_Functions(spec, placement), check_flag('donate', donate))


def _refuse_sharding(influence: str | Influence) -> NoReturn:
  raise ValueError(
    'influence goes without shard_params, since each row needs the gradient of all '
    f'parameters: got influence={influence!r} and shard_params=True.'
  )


def _compile(functions: '_Functions', donate: bool) -> Trainer:
  """Return the compiled functions of a trainer."""
  # `init` and `end_epoch` run once per run and per epoch, and may see concrete values.
  return Trainer(
    init=functions.init,
    step=Compiled(functions.step, donate=donate),
    evaluate=Compiled(functions.evaluate),
    end_epoch=functions.end_epoch,
    predict=Compiled(
      functions.predict, static_argnames=('batch_major', 'return_hidden')
    ),
    donate=donate,
  )


class _Functions:
  """The functions of one trainer, before they are compiled."""

  def __init__(self, spec: StepSpec, placement: Placement) -> None:
    """Keep the options.

    Args:
      spec: Options of the trainer.
      placement: Where its arrays lie.
    """
    self.spec = spec
    self.placement = placement
    _check_optimizer(spec)

  def init(self, key: jax.Array, batch: Batch) -> TrainState:
    """Make the first state, see :class:`fptt_jax.Trainer`."""
    spec = self.spec
    self.placement.check(batch)
    batch = with_mask(batch)
    num_steps, batch_size = check_shapes(batch)
    key = as_key('key', key)
    if key.shape != ():
      raise ValueError(f'key must be one key, got shape {key.shape}.')
    init_key, run_key = jax.random.split(key)
    if all(is_addressable(leaf) for leaf in jax.tree.leaves(batch)):
      validate_batch(batch, spec.loss)
    params = _strong_copy(spec.model.init(init_key))
    _check_initial_state(spec.model, params, batch_size)
    check_model(spec.model, params, batch.inputs)
    # Some optimizers keep the parameters they start from, and donated arrays must not
    # be in two places.
    opt_state = jax.tree.map(jnp.copy, spec.optimizer.init(params))
    num_windows = spec.plan_windows(num_steps).num_windows
    hidden = _strong_copy(spec.model.start(params, batch_size))
    if spec.influence is not None:
      check_map(spec.model, params, batch.inputs, spec.plan_windows(num_steps).size)
    state = TrainState(
      params=params,
      opt_state=opt_state,
      hidden=hidden,
      loss_state=_strong_copy(spec.loss.init(num_windows)),
      key=run_key,
      step_count=jnp.zeros([], jnp.int32),
      influence=_strong_copy(first_influence(spec, params, hidden, batch)),
    )
    if self.placement.mesh is not None:
      _check_influence(state.influence, batch_size)
    self._check_rows(batch_size)
    return self.placement.place(state)

  def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    """Train on one batch, see :class:`fptt_jax.Trainer`."""
    spec = self.spec
    self.placement.check(batch)
    batch = with_mask(batch)
    _, batch_size = check_shapes(batch)
    check_type('state', state, TrainState)
    state = state._replace(key=as_key('state.key', state.key))
    state = _arrange_state(state, jax.eval_shape(self.init, state.key, batch))
    self._check_rows(batch_size)
    if spec.carry_hidden:
      self._check_hidden(state.hidden, batch_size, 'the carried hidden state')
    else:
      # Rows may start differently, so that the whole batch's state is made here, before
      # it is split over devices.
      hidden = _strong_copy(spec.model.start(state.params, batch_size))
      influence = jax.tree.map(jnp.zeros_like, state.influence)
      state = state._replace(hidden=hidden, influence=influence)
    step = functools.partial(run_step, spec, self.placement)
    return self.placement.wrap_step(step)(state, batch)

  def evaluate(
    self, params: Params, batch: Batch, hidden: Hidden | None = None
  ) -> tuple[MetricSums, Hidden]:
    """Evaluate a batch, see :class:`fptt_jax.Trainer`."""
    self.placement.check(batch)
    batch = with_mask(batch)
    params, hidden = self._arguments(params, batch, hidden)
    evaluate = functools.partial(run_evaluate, self.spec)
    return self.placement.wrap_evaluate(evaluate)(params, batch, hidden)

  def predict(
    self,
    params: Params,
    inputs: Any,
    lengths: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    hidden: Hidden | None = None,
    *,
    batch_major: bool = False,
    return_hidden: bool = False,
  ) -> Any:
    """Compute the model's outputs, see :class:`fptt_jax.Trainer`."""
    check_flag('batch_major', batch_major)
    check_flag('return_hidden', return_hidden)
    make_batch = Batch.from_batch_major if batch_major else Batch
    batch = make_batch(inputs, (), lengths, mask)
    self.placement.check(batch)
    batch = with_mask(batch)
    params, hidden = self._arguments(params, batch, hidden)
    predict = functools.partial(run_predict, self.spec)
    outputs, hidden = self.placement.wrap_predict(predict)(params, batch, hidden)
    if batch_major:
      outputs = outputs.swapaxes(0, 1)
    return (outputs, hidden) if return_hidden else outputs

  def end_epoch(self, state: TrainState) -> TrainState:
    """Do the loss's end-of-epoch work, see :class:`fptt_jax.Trainer`."""
    self.placement.check(())
    check_type('state', state, TrainState)
    explain_deleted('end_epoch', (state,))
    leaves = jax.tree.leaves(state.hidden)
    hidden = state.hidden
    if leaves:
      batch_size = leaves[0].shape[0]
      hidden = _strong_copy(self.spec.model.start(state.params, batch_size))
    loss_state = self.spec.loss.end_epoch(state.loss_state)
    influence = jax.tree.map(jnp.zeros_like, state.influence)
    state = state._replace(loss_state=loss_state, hidden=hidden, influence=influence)
    return self.placement.place(state)

  def _arguments(
    self, params: Params, batch: Batch, hidden: Hidden | None
  ) -> tuple[Params, Hidden]:
    """Return parameters and hidden state as a forward pass takes them."""
    model = self.spec.model
    _, batch_size = check_shapes(batch)
    expected = jax.eval_shape(model.init, jax.random.key(0))
    params = check_like('params', params, expected, 'as model.init makes it')
    if hidden is None:
      hidden = model.start(params, batch_size)
    self._check_hidden(hidden, batch_size, 'the given hidden state')
    return params, hidden

  def _check_hidden(self, hidden: Hidden, batch_size: int, name: str) -> None:
    initial_state = functools.partial(self.spec.model.initial_state, batch_size)
    check_hidden(hidden, jax.eval_shape(initial_state), name)

  def _check_rows(self, batch_size: int) -> None:
    rows = self.placement.rows_per_device(batch_size)
    parts = self.spec.micro_batches
    if rows % parts:
      raise ValueError(
        f'micro_batches must divide the {rows} rows of a batch (on each device), got '
        f'{parts}.'
      )


def _check_optimizer(spec: StepSpec) -> None:
  """Raise unless the optimizer works with the model's parameters and the method.

  Only shapes are looked at, so that a large model costs no memory.
  """
  params = jax.eval_shape(spec.model.init, jax.random.key(0))
  check_usable(spec.optimizer, params, _placeholder_extra_args(spec.inner_steps))
  regularized = bool(find_states(jax.eval_shape(spec.optimizer.init, params)))
  if spec.method.regularized and not regularized:
    raise ValueError(
      f'method {spec.method_name!r} needs fptt(...) around the optimizer, got one '
      "without; without it this is 'tbptt'."
    )
  if regularized and not spec.method.regularized:
    raise ValueError(
      f'method {spec.method_name!r} has no regularizer, got an optimizer with '
      'fptt(...) in it.'
    )


def _check_influence(influence: Any, batch_size: int) -> None:
  """Raise a ValueError if a mesh cannot split an influence with the rows."""
  for leaf in jax.tree.leaves(influence):
    if len(leaf) != batch_size:
      raise ValueError(
        f'influence must be arrays [B, ...] with B={batch_size} rows on a mesh, got '
        f"shape {leaf.shape}: uoro(rows='each') has an array for each row."
      )


def _check_initial_state(model: Model, params: Params, batch_size: int) -> None:
  """Raise unless the initial states of a model are [B, ...] and agree."""
  check_state_rows('model.initial_state', model.initial_state, (batch_size,))
  if model.learned_initial_state is None:
    return
  learned = jax.eval_shape(lambda p: model.start(p, batch_size), params)
  constant = jax.eval_shape(lambda: model.initial_state(batch_size))
  check_hidden(learned, constant, 'the state that model.learned_initial_state returns')


def _arrange_state(state: TrainState, expected: TrainState) -> TrainState:
  """Return a state in the structure in which `init` makes it.

  Args:
    state: The given state, perhaps of other containers.
    expected: Shapes of the state that `init` makes for the batch.

  Raises:
    ValueError: Leaves are missing, or have another shape or kind of numbers.
  """
  whose = 'as init makes it for this batch'
  for name in ('params', 'opt_state', 'loss_state', 'step_count', 'influence'):
    leaves = check_like(
      f'state.{name}', getattr(state, name), getattr(expected, name), whose
    )
    state = state._replace(**{name: leaves})
  # Shapes of the hidden state are checked where it is read: with carry_hidden.
  if sorted(leaf_paths(state.hidden)) == sorted(leaf_paths(expected.hidden)):
    hidden = arrange_like('state.hidden', state.hidden, expected.hidden, whose)
    state = state._replace(hidden=hidden)
  return state


def _strong_copy(tree: Any) -> Any:
  """Return copies that are strongly typed.

  A state may be donated, and its types must not change from step to step.
  """
  check_arrays('parameters and states of model and loss', tree)
  return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), tree)


def _placeholder_extra_args(inner_steps: int) -> dict[str, Any]:
  """Return extra arguments of the form that an optimizer's update gets."""

  def value_fn(
    params: Params, *, grad_fn: Any = None, inner_steps: Any = None
  ) -> jax.Array:
    del grad_fn, inner_steps
    return optax.tree.norm(params, squared=True).astype(jnp.float32)

  return {
    'value': jnp.ones([]),
    'value_fn': value_fn,
    'grad_fn': lambda params, step=None: params,
    'inner_steps': inner_steps,
  }
