"""Placement of a trainer's arrays on devices, and of its functions.

A :class:`Placement` wraps the functions of a trainer, so that the train step itself
never sees a mesh. There are three kinds:

* :class:`Placement`: one device; every wrapper is the identity.
* :class:`Replicated`: the batch is split over a mesh, parameters are on each device.
* :class:`Sharded`: parameters and optimizer state are split, too.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from fptt_jax._batch import Batch, targets_by_row
from fptt_jax._checks import require
from fptt_jax._types import (
  Hidden,
  Params,
  StepMetrics,
  TrainState,
  UpdateInputs,
  UpdateResult,
)
from fptt_jax.losses import Loss, MetricSums
from fptt_jax.parallel._collectives import (
  fold_device,
  gather_shards,
  mean_over_devices,
  sum_over_devices,
)
from fptt_jax.parallel._devices import check_divisible, check_placement, one_axis
from fptt_jax.parallel._specs import batch_specs, named, place, shard_specs

Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
Gradient = Callable[[Params, UpdateInputs], tuple[jax.Array, Params, UpdateResult]]
Prefix = Callable[[Params, Hidden, Batch, jax.Array], Hidden]
Evaluate = Callable[[str | None, Params, Batch, Hidden], tuple[MetricSums, Hidden]]
Predict = Callable[[Params, Batch, Hidden], tuple[Any, Hidden]]

# A spec is a pytree node in some releases of JAX and a leaf in others, so that it is
# typed as Any.
_EVERYWHERE: Any = PartitionSpec()


class Placement:
  """All arrays on one device, or wherever JAX puts them."""

  @property
  def mesh(self) -> jax.sharding.Mesh | None:
    """The mesh that the batch is split over; None for one device."""
    return None

  @property
  def axis(self) -> str | None:
    """Name of the mesh axis that is bound where the model runs."""
    return None

  @property
  def step_axis(self) -> str | None:
    """Name of the mesh axis that is bound in all of the step."""
    return None

  def rows_per_device(self, batch_size: int) -> int:
    """Return the rows of a batch that each device gets.

    Raises:
      ValueError: The devices cannot share the batch evenly.
    """
    return batch_size

  def check(self, batch: Any) -> None:
    """Raise a ValueError if the caller's mesh or shardings contradict this one."""
    check_placement(batch, self.mesh)

  def place(self, state: TrainState) -> TrainState:
    """Put a state where the step wants it."""
    return state

  def wrap_step(self, step: Step) -> Step:
    """Wrap a train step of one device's rows into one of the batch."""
    return step

  def wrap_gradient(self, gradient: Gradient) -> Gradient:
    """Wrap a gradient of one device's rows into the mean over the devices."""
    return gradient

  def wrap_prefix(self, prefix: Prefix) -> Prefix:
    """Wrap a forward pass over the steps before the first window."""
    return prefix

  def sum_totals(self, totals: MetricSums) -> MetricSums:
    """Sum metrics [U, ...] over updates and devices."""
    return jax.tree.map(lambda total: total.sum(0), totals)

  def wrap_evaluate(self, evaluate: Evaluate) -> Predict:
    """Wrap an evaluation of one device's rows into one of the batch."""

    def run(params: Params, batch: Batch, hidden: Hidden) -> Any:
      return evaluate(None, params, batch, hidden)

    return run

  def wrap_predict(self, predict: Predict) -> Predict:
    """Wrap a prediction for one device's rows into one for the batch."""
    return predict


@dataclasses.dataclass(frozen=True)
class Replicated(Placement):
  """Rows of the batch split over a mesh; parameters and optimizer state replicated.

  Attributes:
    devices: Mesh with one axis.
    terminal: Whether the loss has one target per sequence.
  """

  devices: jax.sharding.Mesh
  terminal: bool

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """The mesh that the batch is split over."""
    return self.devices

  @property
  def axis(self) -> str:
    """Name of the mesh axis that is bound where the model runs."""
    return str(self.devices.axis_names[0])

  @property
  def step_axis(self) -> str | None:
    """Name of the mesh axis that is bound in all of the step."""
    return self.axis

  @property
  def _rows(self) -> Any:
    return PartitionSpec(self.axis)

  @property
  def _columns(self) -> Any:
    return PartitionSpec(None, self.axis)

  def rows_per_device(self, batch_size: int) -> int:
    """Return the rows of a batch that each device gets."""
    check_divisible('the batch size B', batch_size, self.devices.size)
    return batch_size // self.devices.size

  def place(self, state: TrainState) -> TrainState:
    """Put a state on the mesh."""
    placed: TrainState = place(state, self._state_specs(state), self.devices)
    return placed

  def wrap_step(self, step: Step) -> Step:
    """Run the whole step on each device, on its rows."""

    def run(state: TrainState, batch: Batch) -> Any:
      specs = self._state_specs(state)
      inputs = (specs, self._batch_specs(batch))
      return self._on_devices(step, inputs, (specs, self._metrics_specs()))(
        state, batch
      )

    return run

  def wrap_gradient(self, gradient: Gradient) -> Gradient:
    """Take the mean of objective and gradient over the devices."""

    def run(params: Params, inputs: UpdateInputs) -> Any:
      value, grads, result = gradient(params, inputs)
      # Without an influence there is no credit, and the tree has no leaf of it.
      value, grads, credit = mean_over_devices(
        (value, grads, result.credit), _EVERYWHERE, self.axis
      )
      return value, grads, result._replace(credit=credit)

    return run

  def sum_totals(self, totals: MetricSums) -> MetricSums:
    """Sum metrics [U, ...] over updates and devices."""
    return sum_over_devices(super().sum_totals(totals), self.axis)

  def wrap_evaluate(self, evaluate: Evaluate) -> Predict:
    """Evaluate each device's rows and sum the totals."""
    return self._split_rows(evaluate, lambda axis: _EVERYWHERE)

  def wrap_predict(self, predict: Predict) -> Predict:
    """Predict for each device's rows."""

    def run(axis: str | None, params: Params, batch: Batch, hidden: Hidden) -> Any:
      del axis  # Rows are independent.
      return predict(params, batch, hidden)

    return self._split_rows(run, lambda axis: PartitionSpec(None, axis))

  def _split_rows(
    self, function: Evaluate, specs_of_first: Callable[[str | None], Any]
  ) -> Predict:
    """Run (axis, params, batch, hidden) -> (first, hidden) on each device's rows."""

    def run(params: Params, batch: Batch, hidden: Hidden) -> Any:
      batch_size = jax.tree.leaves(batch.inputs)[0].shape[1]
      # Each device runs all rows if the devices cannot share them evenly.
      axis = self.axis if batch_size % self.devices.size == 0 else None

      def on_device(params: Params, batch: Batch, hidden: Hidden) -> Any:
        return function(axis, params, batch, hidden)

      rows = PartitionSpec(axis)
      inputs = (_EVERYWHERE, batch_specs(batch, axis, self.terminal), rows)
      outputs = (specs_of_first(axis), rows)
      return self._on_devices(on_device, inputs, outputs)(params, batch, hidden)

    return run

  def _on_devices(
    self, function: Callable[..., Any], in_specs: Any, out_specs: Any
  ) -> Callable[..., Any]:
    return jax.shard_map(
      function,
      mesh=self.devices,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )

  def _batch_specs(self, batch: Batch) -> Any:
    return batch_specs(batch, self.axis, self.terminal)

  def _param_specs(self, tree: Any) -> Any:
    return _EVERYWHERE

  def _state_specs(self, state: TrainState) -> Any:
    """Return the specs of a state: rows of the hidden state go with the batch's."""
    return TrainState(
      params=self._param_specs(state.params),
      opt_state=self._param_specs(state.opt_state),
      hidden=self._rows,
      loss_state=_EVERYWHERE,
      key=_EVERYWHERE,
      step_count=_EVERYWHERE,
      influence=self._rows,
    )

  def _metrics_specs(self) -> Any:
    metrics = StepMetrics(**dict.fromkeys(StepMetrics._fields, _EVERYWHERE))
    return metrics._replace(outputs=self._columns)


class Sharded(Replicated):
  """Rows of the batch, parameters and optimizer state split over a mesh.

  Only the gradient and the prefix run on each device by itself; the compiler lays out
  the rest of the step.
  """

  @property
  def step_axis(self) -> None:
    """No axis is bound outside of the gradient."""
    return None

  def wrap_step(self, step: Step) -> Step:
    """Constrain the new state to lie as the old one."""

    def run(state: TrainState, batch: Batch) -> Any:
      specs = self._state_specs(state)
      new_state, metrics = step(state, batch)
      # Parameters in shards exclude an influence, and so its metric.
      metrics_specs = self._metrics_specs()._replace(credit_norm=None)
      if metrics.outputs is None:
        metrics_specs = metrics_specs._replace(outputs=None)
      return jax.lax.with_sharding_constraint(
        (new_state, metrics), named((specs, metrics_specs), self.devices)
      )

    return run

  def wrap_gradient(self, gradient: Gradient) -> Gradient:
    """Gather the parameters, differentiate, scatter the mean gradient."""

    def run(params: Params, inputs: UpdateInputs) -> Any:
      specs = self._param_specs(params)

      def on_device(params: Params, inputs: UpdateInputs) -> Any:
        inputs = inputs._replace(key=fold_device(inputs.key, self.axis))
        whole = gather_shards(params, specs, self.axis)
        value, grads, result = gradient(whole, inputs)
        value, grads = mean_over_devices(
          (value, grads), (_EVERYWHERE, specs), self.axis
        )
        # A leading axis, over which the devices' totals are joined.
        totals = jax.tree.map(lambda total: total[None], result.totals)
        return value, grads, result._replace(totals=totals)

      in_specs = (specs, self._input_specs(inputs))
      out_specs = (_EVERYWHERE, specs, self._result_specs())
      return self._on_devices(on_device, in_specs, out_specs)(params, inputs)

    return run

  def wrap_prefix(self, prefix: Prefix) -> Prefix:
    """Gather the parameters and run each device's rows."""

    def run(params: Params, hidden: Hidden, batch: Batch, key: jax.Array) -> Any:
      specs = self._param_specs(params)

      def on_device(
        params: Params, hidden: Hidden, batch: Batch, key: jax.Array
      ) -> Hidden:
        whole = gather_shards(params, specs, self.axis)
        return prefix(whole, hidden, batch, fold_device(key, self.axis))

      in_specs = (specs, self._rows, self._batch_specs(batch), _EVERYWHERE)
      return self._on_devices(on_device, in_specs, self._rows)(
        params, hidden, batch, key
      )

    return run

  def sum_totals(self, totals: MetricSums) -> MetricSums:
    """Sum metrics [U, n, ...] over updates and devices."""
    return jax.tree.map(lambda total: total.sum((0, 1)), totals)

  def _param_specs(self, tree: Any) -> Any:
    return shard_specs(tree, self.devices)

  def _input_specs(self, inputs: UpdateInputs) -> Any:
    return UpdateInputs(
      hidden=self._rows,
      fresh=self._rows,
      batch=self._batch_specs(inputs.batch),
      key=_EVERYWHERE,
      loss_state=_EVERYWHERE,
      schedule=_EVERYWHERE,
      first_loss_state=_EVERYWHERE,
      outputs=self._columns,
      influence=self._rows,
    )

  def _result_specs(self) -> Any:
    return UpdateResult(
      hidden=self._rows,
      loss_state=_EVERYWHERE,
      totals=self._rows,
      outputs=self._columns,
      credit=_EVERYWHERE,
    )


def make_placement(
  mesh: jax.sharding.Mesh | None, shard_params: bool, loss: Loss
) -> Placement:
  """Return the placement for a trainer's options.

  Args:
    mesh: Mesh with one axis, or None for one device.
    shard_params: Whether parameters and optimizer state are split over the mesh.
    loss: Loss whose targets the batches hold.

  Raises:
    TypeError: `mesh` is not a mesh.
    ValueError: `mesh` has several axes, or is missing although `shard_params` is set.
  """
  if mesh is None:
    require(not shard_params, 'shard_params', 'False with mesh=None', shard_params)
    return Placement()
  mesh, _ = one_axis(mesh)
  kind = Sharded if shard_params else Replicated
  return kind(mesh, targets_by_row(loss))
