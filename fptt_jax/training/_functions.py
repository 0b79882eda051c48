"""The functions of a trainer before they are compiled: they validate and place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fptt_jax._batch import (
  Batch,
  check_shapes,
  is_addressable,
  validate_batch,
  with_mask,
)
from fptt_jax._checks import as_key, check_shape, check_type, require
from fptt_jax._compiled import explain_deleted
from fptt_jax._probe import check_model
from fptt_jax._trees import arrange_like, check_like
from fptt_jax._types import Hidden, Params, StepMetrics, TrainState
from fptt_jax._window_momentum import check_window_count
from fptt_jax.influence._check import check_map
from fptt_jax.losses import MetricSums
from fptt_jax.parallel._placement import Placement
from fptt_jax.training._credit import first_influence, reset_influence
from fptt_jax.training._evaluate import run_evaluate, run_predict
from fptt_jax.training._invalid import clear_idle_targets
from fptt_jax.training._optimizer import check_optimizer
from fptt_jax.training._schedules import plan_updates
from fptt_jax.training._spec import StepSpec
from fptt_jax.training._state import (
  arrange_state,
  check_influence,
  check_initial_state,
  strong_copy,
)
from fptt_jax.training._step import run_step
from fptt_jax.training._window import check_hidden


class Functions:
  """The functions of one trainer, before they are compiled."""

  def __init__(self, spec: StepSpec, placement: Placement) -> None:
    """Keep the options.

    Args:
      spec: Options of the trainer.
      placement: Where its arrays lie.
    """
    self.spec = spec
    self.placement = placement
    check_optimizer(spec)

  def init(self, key: jax.Array, batch: Batch) -> TrainState:
    """Make the first state, see :class:`fptt_jax.Trainer`."""
    spec = self.spec
    self.placement.check(batch)
    batch = with_mask(batch)
    num_steps, batch_size = check_shapes(batch)
    key = as_key('key', key)
    check_shape('key', key, '[]', ())
    init_key, run_key = jax.random.split(key)
    if all(is_addressable(leaf) for leaf in jax.tree.leaves(batch)):
      validate_batch(batch, spec.loss)
    params = strong_copy(spec.model.init(init_key))
    check_initial_state(spec.model, params, batch_size)
    check_model(spec.model, params, batch.inputs)
    # Some optimizers keep the parameters they start from, and donated arrays must not
    # be in two places.
    opt_state = jax.tree.map(jnp.copy, spec.optimizer.init(params))
    num_windows = spec.plan_windows(num_steps).num_windows
    check_window_count(opt_state, len(plan_updates(spec.method, num_windows).windows))
    hidden = strong_copy(spec.model.start(params, batch_size))
    if spec.influence is not None:
      check_map(spec.model, params, batch.inputs, spec.plan_windows(num_steps).size)
    state = TrainState(
      params=params,
      opt_state=opt_state,
      hidden=hidden,
      loss_state=strong_copy(spec.loss.init(num_windows)),
      key=run_key,
      step_count=jnp.zeros([], jnp.int32),
      influence=strong_copy(first_influence(spec, params, hidden, batch)),
    )
    if self.placement.mesh is not None:
      check_influence(state.influence, batch_size)
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
    expected = jax.eval_shape(self.init, state.key, batch)
    influence = spec.influence
    if influence is not None and not influence.keeps and not spec.carry_hidden:
      # It starts anew with the hidden state, so that the batch may have another shape.
      anew = optax.tree.zeros_like(expected.influence)
      state = state._replace(influence=anew)
    state = arrange_state(state, expected)
    self._check_rows(batch_size)
    if spec.carry_hidden:
      self._check_hidden(state.hidden, batch_size, 'the carried hidden state')
    else:
      # Rows may start differently, so that the whole batch's state is made here, before
      # it is split over devices.
      hidden = strong_copy(spec.model.start(state.params, batch_size))
      state = state._replace(
        hidden=hidden, influence=reset_influence(spec, state.influence)
      )
    step = functools.partial(run_step, spec, self.placement)
    batch = clear_idle_targets(spec.loss, batch)
    return self.placement.wrap_step(step)(state, batch)

  def evaluate(
    self, params: Params, batch: Batch, hidden: Hidden | None = None
  ) -> tuple[MetricSums, Hidden]:
    """Evaluate a batch, see :class:`fptt_jax.Trainer`."""
    self.placement.check(batch)
    batch = with_mask(batch)
    params, hidden = self._arguments(params, batch, hidden)
    evaluate = functools.partial(run_evaluate, self.spec)
    batch = clear_idle_targets(self.spec.loss, batch)
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
      hidden = strong_copy(self.spec.model.start(state.params, batch_size))
    loss_state = self.spec.loss.end_epoch(state.loss_state)
    influence = reset_influence(self.spec, state.influence)
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
    like = jax.eval_shape(functools.partial(model.initial_state, batch_size))
    hidden = arrange_like('hidden', hidden, like, 'as the model makes it')
    self._check_hidden(hidden, batch_size, 'the given hidden state')
    return params, hidden

  def _check_hidden(self, hidden: Hidden, batch_size: int, name: str) -> None:
    initial_state = functools.partial(self.spec.model.initial_state, batch_size)
    check_hidden(hidden, jax.eval_shape(initial_state), name)

  def _check_rows(self, batch_size: int) -> None:
    rows = self.placement.rows_per_device(batch_size)
    parts = self.spec.micro_batches
    require(rows % parts == 0, 'micro_batches', f'a divisor of the {rows} rows', parts)
