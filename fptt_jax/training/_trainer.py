"""The train step: one scan over the windows of a sequence, an optimizer update in each.

The data's way: a time-major :class:`Batch` is cut into K windows; in each, the model
runs over S steps from the carried hidden state, the loss gives a scalar, its gradient
goes to the optimizer, and everything that changed is carried to the next window.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from fptt_jax._batch import (
  Batch,
  check_inputs,
  check_shapes,
  check_type,
  is_addressable,
  targets_by_row,
  validate_batch,
  with_mask,
)
from fptt_jax._checks import (
  FLOAT32_MAX,
  INT32_MAX,
  arrange_like,
  as_key,
  as_number,
  check_array,
  check_arrays,
  check_callable,
  check_flag,
  check_integer,
  check_like,
  check_size,
  leaf_paths,
)
from fptt_jax._compiled import Compiled, explain_deleted
from fptt_jax._dtypes import at_least_float32
from fptt_jax._probe import check_model, check_state_rows
from fptt_jax._transform import (
  accepted,
  check_nothing_follows,
  find_states,
  lambda_norm,
)
from fptt_jax._types import (
  FeaturesAndReadout,
  Hidden,
  Model,
  OutputsWithPenalty,
  Params,
  StepMetrics,
  Trainer,
  TrainState,
)
from fptt_jax._windows import (
  ValidSteps,
  WindowPlan,
  WindowView,
  lengths_in_range,
  make_windows,
  valid_steps,
  window_at,
  write_window,
)
from fptt_jax.losses import Loss, LossState, MetricSums
from fptt_jax.parallel._collectives import (
  batch_specs,
  gather_shards,
  mean_over_devices,
  named,
  place,
  shard_specs,
  sum_over_devices,
)
from fptt_jax.parallel._devices import check_divisible, check_placement, one_axis
from fptt_jax.training._micro_batches import in_micro_batches
from fptt_jax.training._readout import WindowLoss, chunked_loss, steps_at_once
from fptt_jax.training._schedules import METHODS, Method, Plan, plan


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
) -> Trainer:
  """Builds the train step of a recurrent model, forward through time.

  Args:
    model: the model's pure functions.
    loss: see `fptt_jax.losses`.
    optimizer: any optax transformation; for FPTT `fptt(base)`, or a chain around it. It
      is called with the extra arguments `value` (the objective), `grad` (its gradient),
      `value_fn` (params -> the same objective from the same hidden state), `grad_fn`
      (params and, if it likes, a number that is not used -> its gradient) and
      `inner_steps`, or those of them that its `update` takes.
      `optax.contrib.reduce_on_plateau` sees a value per update: to count sequences,
      give it `accumulation_size` = K (for methods with an update per window; times
      `inner_steps`) and put it inside, `fptt(optax.chain(base, plateau))`. It then
      compares the means of K objectives; a window without a valid step is no update and
      is not counted.
    method: a name in `METHODS` or a `Method`. 'fptt' and 'tbptt' run the same step: the
      regularizer is in the optimizer, which has to contain `fptt` for the one and not
      for the other.
    num_windows: K. Default round(√T), the paper's; or give
    window_size: the longest window's steps S. Methods that fix K (bptt, tbptt_final,
      ogd) take neither.
    carry_hidden: start a batch from the hidden state the last one ended with (language
      modelling: row b of a batch continues row b of the one before). Default: each
      sequence starts from the model's initial state.
    loss_weights: [K], finite factors of the windows' losses. Default all 1.
    inner_steps: gradient steps a window, each from the window's own initial hidden
      state; `fptt` must have the same number. The hidden state carried on is the one of
      the last inner step's pass. 'ftrl' passes through the sequence at each window,
      even if no sequence is left: then the pass has the parameters as they are after
      the last update.
    truncation_steps: k of 'tbptt_final': how many of the last steps are differentiated.
    skip_nonfinite: leave out an update whose objective, gradient (its global norm) or
      new λ is not finite, in any of its inner steps: parameters, optimizer state,
      hidden and loss state stay what they were before it, and what it measured is left
      out of the totals; `StepMetrics.skipped` tells. 'ftrl' goes through all windows in
      each update, so a bad one skips them all. Each window takes a few more passes over
      what may have to be kept, a large table of the loss included.
    mesh: devices, along one axis, to split the batch over: each runs its share of the
      sequences, and after each window there is one mean over the devices, of the
      gradient and the objective together. Parameters and optimizer state are the same
      on all. The batch size must be a multiple of their number. Dropout draws other
      noise than on one device. A loss of your own is given a share of the batch and its
      mean over the devices is taken; `window.mean` makes that right for ragged batches
      too. The devices may belong to several processes: see
      `fptt_jax.make_global_batch`.
    shard_params: split parameters and optimizer state (W, W̄, λ and the base
      optimizer's) over the mesh, too: of each array a device keeps its share along the
      first axis that their number divides, the whole where there is none. In each
      window the parameters are gathered once and each device gets the mean gradient of
      its share, which any optimizer moves.
    readout_chunk: how many steps' outputs are computed at a time, with their loss and
      its gradient, where the model has a `split` and the loss a `per_step`. By default
      all of a window, unless on a CPU the readout would make an array of more than 32
      MiB: then as many as make 10 MiB. It changes rounding, memory and time, which for
      large vocabularies both fall, and such an objective has no forward-mode
      derivative. A number of S or more: all.
    donate: let `step` use the old state's memory for the new one. False keeps old
      states alive, at the price of a second one's memory; `scan_train_steps` and
      `population` do as the trainer does.
    return_outputs: put the model's outputs of all T steps into `StepMetrics.outputs`.
      It costs their memory, [T, B, ...], and the readout of all steps, where otherwise
      a `last_only` loss needs a window's last one and `readout_chunk` a few at a time
      (so it does not go with that option). What dropout draws after the last recurrent
      layer may differ.
    micro_batches: in how many parts a window's rows are run, one after the other, of
      which the batch size (each device's share of it) must be a multiple. A window then
      needs about the memory of one part, beside the model's outputs, and one more
      forward pass. Loss, gradient and metrics are the whole batch's, up to rounding,
      and there is one update, as without; dropout draws other noise. Outputs with a
      `split` are read out S/micro_batches steps at a time unless `readout_chunk` says
      otherwise. Ragged batches do not go with models that return penalties.

  Returns:
    A :class:`Trainer`. Steps that a mask leaves out change neither state, loss nor
    gradient; a window in which no sequence of a ragged batch has a valid step changes
    nothing at all, parameters and optimizer included.

  To start from weights of your own (imported ones, say), give them as the model's:
  `model._replace(init=lambda key: params)`.

  Example:
    >>> import jax, optax, fptt_jax
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(lambda rngs: nn.Sequential(nn.GRU(1, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)))
    >>> optimizer = fptt_jax.fptt(optax.adam(1e-3), alpha=0.1)
    >>> trainer = fptt_jax.make_trainer(model, fptt_jax.losses.terminal_regression(), optimizer, num_windows=4)
    >>> batch = fptt_jax.Batch(jax.numpy.ones((20, 8, 1)), jax.numpy.ones(8))
    >>> state = trainer.init(jax.random.key(0), batch)
    >>> state, metrics = trainer.step(state, batch)
    >>> metrics.loss.shape
    (4,)

  References:
    Kag and Saligrama, ICML 2021: Algorithms 1 and 2, "FPTT-K" and Table 3.

  Raises:
    ValueError, TypeError: an argument outside its range (here), or a batch whose shapes
      or dtypes do not fit (when a step is traced). Values inside arrays are not looked
      at in compiled code: see :func:`validate_batch`.
  """
  _check_types(model, loss, optimizer)
  if isinstance(
    optimizer, optax.MultiSteps
  ):  # Not a transformation itself, and its own conversion drops extra arguments.
    optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
  name, method, truncation_steps, inner_steps = _resolve(
    method, num_windows, window_size, truncation_steps, inner_steps
  )
  optimizer = optax.with_extra_args_support(optimizer)
  weights, carry_hidden = (
    _checked_weights(loss_weights),
    check_flag('carry_hidden', carry_hidden),
  )
  donate = check_flag('donate', donate)
  skip_nonfinite, shard_params = (
    check_flag('skip_nonfinite', skip_nonfinite),
    check_flag('shard_params', shard_params),
  )
  readout_chunk = _checked_readout_steps(readout_chunk, model, loss)
  micro_batches = check_size('micro_batches', micro_batches)
  if check_flag('return_outputs', return_outputs) and readout_chunk is not None:
    raise ValueError(
      'return_outputs=True keeps all steps and does not go with readout_chunk, got '
      f'readout_chunk={readout_chunk}.'
    )
  training_model = _in_parts(model, micro_batches)

  axis = None
  if mesh is not None:
    mesh, axis = one_axis(mesh)
  elif shard_params:
    raise ValueError(
      'shard_params=True needs a mesh, over whose devices the parameters are split: '
      'got mesh=None.'
    )

  def cut_windows(num_steps: int) -> WindowPlan:
    """Where the windows lie in a sequence of `num_steps`; tbptt_final's single one
    starts `truncation_steps` before the end.
    """
    if method.truncated:
      assert truncation_steps is not None
      if truncation_steps > num_steps:
        raise ValueError(
          f'truncation_steps must be at most the sequence length T={num_steps}, got '
          f'{truncation_steps}.'
        )
      windows = make_windows(truncation_steps, num_windows=1).shifted(
        num_steps - truncation_steps
      )
    elif method.num_windows is not None:
      windows = make_windows(
        num_steps,
        num_windows=num_steps if method.num_windows == 'T' else int(method.num_windows),
      )
    else:
      windows = make_windows(
        num_steps, num_windows=num_windows, window_size=window_size
      )
    if weights is not None and len(weights) != windows.num_windows:
      raise ValueError(
        f'loss_weights must have one factor for each of the K={windows.num_windows} '
        f'windows, got {len(weights)}.'
      )
    return windows

  probed: list[bool] = []

  def init(key: jax.Array, batch: Batch) -> TrainState:
    check_placement(batch, mesh)
    batch = with_mask(batch)
    num_steps, batch_size = check_shapes(batch)
    key = as_key('key', key)
    if key.shape != ():
      raise ValueError(f'key must be one key, got shape {key.shape}.')
    init_key, run_key = jax.random.split(key)
    if all(is_addressable(leaf) for leaf in jax.tree.leaves(batch)):
      validate_batch(batch, loss)
    params = _own(model.init(init_key))
    check_state_rows('model.initial_state', model.initial_state, (batch_size,))
    if model.learned_initial_state is not None:
      learned = jax.eval_shape(lambda p: model.start(p, batch_size), params)
      _check_hidden(
        learned,
        jax.eval_shape(lambda: model.initial_state(batch_size)),
        'what model.learned_initial_state returns',
      )
    check_model(model, params, batch.inputs)
    # Some optimizers keep the parameters they start from: what is donated must not be
    # there twice.
    opt_state = jax.tree.map(jnp.copy, optimizer.init(params))
    if (
      not probed
    ):  # Once for each trainer: init is traced again for each shape of a batch.
      check_nothing_follows(
        optimizer, jax.tree.map(jnp.copy, params), _any_extra_args(inner_steps)
      )
      probed.append(True)
    if bool(find_states(opt_state)) != method.regularized:
      if method.regularized:
        raise ValueError(
          f'method {name!r} needs fptt(...) around the optimizer, got one without; '
          "without it this is 'tbptt'."
        )
      raise ValueError(
        f'method {name!r} has no regularizer, got an optimizer with fptt(...) in it.'
      )
    state = TrainState(
      params=params,
      opt_state=opt_state,
      hidden=_own(model.start(params, batch_size)),
      loss_state=_own(loss.init(cut_windows(num_steps).num_windows)),
      key=run_key,
      step_count=jnp.zeros([], jnp.int32),
    )
    check_rows(batch_size)
    return placed(state)

  def check_rows(batch_size: int) -> None:
    if mesh is not None:
      check_divisible('the batch size B', batch_size, mesh)
    share = batch_size if mesh is None else batch_size // mesh.size
    if micro_batches > 1 and share % micro_batches:
      raise ValueError(
        f'micro_batches must divide the {share} rows of a batch (on each device), got '
        f'{micro_batches}.'
      )

  def state_specs(state: TrainState) -> Any:
    """How a state lies on the devices: the hidden state's rows with their sequences,
    all else on each, or in shards.
    """
    specs: Any = [PartitionSpec()] * 6
    specs = TrainState(*specs)._replace(hidden=PartitionSpec(axis))
    if mesh is not None and shard_params:
      specs = specs._replace(
        params=shard_specs(state.params, mesh),
        opt_state=shard_specs(state.opt_state, mesh),
      )
    return specs

  def placed(state: TrainState) -> TrainState:
    return state if mesh is None else place(state, state_specs(state), mesh)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    check_placement(batch, mesh)
    batch = with_mask(batch)
    _, batch_size = check_shapes(batch)
    check_type('state', state, TrainState)
    state = state._replace(key=as_key('state.key', state.key))
    state = _checked_state(state, jax.eval_shape(init, state.key, batch))
    check_rows(batch_size)
    if mesh is None:
      return run_windows(state, batch)
    every: Any = PartitionSpec()
    columns: Any = PartitionSpec(None, axis) if return_outputs else None
    specs = (
      state_specs(state),
      StepMetrics(every, every, every, every, every, columns, every),
    )
    if shard_params:
      return jax.lax.with_sharding_constraint(
        run_windows(state, batch), named(specs, mesh)
      )
    if not carry_hidden:
      # Rows may start differently: the whole batch's initial state is made here, and
      # each device gets its rows of it.
      state = state._replace(hidden=_own(model.start(state.params, batch_size)))
    in_specs = (specs[0], batch_specs(batch, axis, targets_by_row(loss)))
    return jax.shard_map(
      run_windows, mesh=mesh, in_specs=in_specs, out_specs=specs, check_vma=False
    )(state, batch)

  def run_windows(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    """A step on one device's share of the batch; with `shard_params` on all of it, and
    only what runs the model is on shares.
    """
    num_steps, batch_size = check_shapes(batch)
    windows = cut_windows(num_steps)
    updates = plan(method, windows.num_windows)
    outer = None if shard_params else axis
    key = jax.random.fold_in(state.key, state.step_count)
    if outer is not None:
      key = jax.random.fold_in(key, jax.lax.axis_index(outer))
    if carry_hidden or outer is not None:
      hidden = state.hidden
      _check_hidden(
        hidden,
        jax.eval_shape(lambda: model.initial_state(batch_size)),
        'the carried hidden state',
      )
    else:
      hidden = _own(model.start(state.params, batch_size))
    fresh = None
    if model.learned_initial_state is not None and windows.starts[0] == 0:
      fresh = (
        _starts_here(model, state.params, hidden, outer)
        if carry_hidden
        else jnp.ones(batch_size, bool)
      )
    for field in ('lengths', 'mask'):
      if method.truncated and getattr(batch, field) is not None:
        raise ValueError(
          "method 'tbptt_final' differentiates the last steps before T and takes no "
          f'ragged batch: got {field}.'
        )
    specs = state_specs(state)

    columns: Any = PartitionSpec(None, axis)

    def on_shares(
      function: Callable[..., Any], out_specs: Any, others_specs: Any
    ) -> Callable[..., Any]:
      """A function of whole parameters and of one device's share of the rest as one of
      what lies on the devices.
      """
      if axis is None or not shard_params:
        return function

      def run(
        params: Params, hidden: Hidden, batch: Batch, key: jax.Array, others: Any
      ) -> Any:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        return function(
          gather_shards(params, specs.params, axis), hidden, batch, key, others
        )

      in_specs = (
        specs.params,
        specs.hidden,
        batch_specs(batch, axis, targets_by_row(loss)),
        PartitionSpec(),
        others_specs,
      )
      return jax.shard_map(
        run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
      )

    def share_prefix(
      params: Params, hidden: Hidden, batch: Batch, key: jax.Array, _: Any
    ) -> Hidden:
      """The hidden state before the first window."""
      prefix = jax.tree.map(lambda x: jnp.asarray(x)[: windows.starts[0]], batch.inputs)
      return model.apply(
        params, hidden, prefix, None, jax.random.fold_in(key, windows.num_windows)
      )[0]

    def share_gradient(
      params: Params,
      started: tuple[Hidden, jax.Array | None],
      batch: Batch,
      key: jax.Array,
      others: Any,
    ) -> tuple[Any, ...]:
      """(objective, gradient, what came of the windows) of one update; the means over
      the devices, the totals to be summed.

      Of a loss with a `memory`, an update of one window gives the note in place of the
      new loss state.
      """
      (loss_state, rows, first_loss_state), outputs = others
      hidden, fresh = started
      at_once = readout_chunk
      if micro_batches > 1 and at_once is None:
        at_once = -(-windows.size // micro_batches)
      objective = _objective(
        training_model,
        loss,
        batch,
        windows,
        updates,
        weights,
        first_loss_state,
        key,
        axis,
        at_once,
        micro_batches,
      )
      start = lambda p: (
        hidden if fresh is None else _with_start(model, p, hidden, fresh, axis)
      )
      run = lambda p: objective(p, start(p), loss_state, rows, outputs)
      (value, (hidden_next, loss_state, totals, outputs)), grads = jax.value_and_grad(
        run, has_aux=True
      )(params)
      # Of a complex parameter JAX returns the conjugate of the direction of ascent,
      # which optax expects.
      grads = jax.tree.map(jnp.conj, grads)
      value, grads = mean_over_devices(
        (value, grads), (PartitionSpec(), specs.params), axis
      )
      if shard_params:
        totals = jax.tree.map(lambda t: t[None], totals)
      return value, grads, (hidden_next, loss_state, totals, outputs)

    gradient = on_shares(
      share_gradient,
      (
        PartitionSpec(),
        specs.params,
        (specs.hidden, PartitionSpec(), PartitionSpec(axis), columns),
      ),
      (PartitionSpec(), columns),
    )
    start = hidden
    if windows.starts[0] > 0:
      start = on_shares(share_prefix, specs.hidden, PartitionSpec())(
        state.params, hidden, batch, key, ()
      )

    num_seen = updates.windows.shape[1]
    first_window = jnp.asarray(
      windows.starts if method.update_each_window else windows.starts[:1]
    )
    valid = valid_steps(windows, batch_size, batch.lengths, batch.mask)
    batch = _without_idle_targets(batch, valid, loss)
    occupied, longest = valid.occupied(), None
    if occupied is not None:
      if outer is not None:
        occupied = jax.lax.pmax(occupied.astype(jnp.int32), outer) > 0
      occupied = (occupied[updates.windows] & updates.records).any(1)
    elif valid.ragged:
      longest = jnp.max(jnp.asarray(batch.lengths, jnp.int32))
      longest = longest if outer is None else jax.lax.pmax(longest, outer)

    def body(
      carried: tuple[Any, Any], per_update: tuple[Any, ...]
    ) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
      carry, outputs = carried
      params, opt_state, hidden, loss_state = carry
      step_rows, first, occupied = per_update
      active = occupied if longest is None else longest > first
      hidden = jax.lax.stop_gradient(start if updates.restarts else hidden)
      started = hidden, None if fresh is None else fresh & (step_rows[0][0] == 0)

      def inner_step(params: Params, opt_state: optax.OptState) -> tuple[Any, ...]:
        """One optimizer step on this update's objective, always from the same hidden
        state.
        """
        run = lambda p: gradient(
          p, started, batch, key, ((loss_state, step_rows, state.loss_state), outputs)
        )
        value, grads, aux = run(params)
        extra_args = {
          'value': value,
          'grad': grads,
          'value_fn': _value_fn(run),
          'grad_fn': lambda p, step=None: run(p)[1],
          'inner_steps': inner_steps,
        }
        changes, opt_state = optimizer.update(
          grads, opt_state, params, **accepted(optimizer.update, extra_args)
        )
        return (
          optax.apply_updates(params, changes),
          opt_state,
          (value, _norm(grads)),
          aux,
        )

      def early_step(moved: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], Any]:
        params, opt_state, seen, _ = inner_step(*moved)
        if (
          active is not None and updates.restarts
        ):  # The last pass starts anew and is not to see parameters that are put back.
          params, opt_state = optax.tree.where(active, (params, opt_state), moved)
        return (params, opt_state), seen if skip_nonfinite else None

      new_params, new_opt_state, early = params, opt_state, None
      if inner_steps > 1:
        (new_params, new_opt_state), early = jax.lax.scan(
          early_step, (params, opt_state), length=inner_steps - 1
        )
      new_params, new_opt_state, seen, (new_hidden, new_loss_state, totals, outputs) = (
        inner_step(new_params, new_opt_state)
      )
      if (
        active is not None
      ):  # No valid step: no update. By where: a cond would copy the carry.
        new_params, new_opt_state = optax.tree.where(
          active, (new_params, new_opt_state), (params, opt_state)
        )
      skip = None
      if skip_nonfinite:
        skip = ~_all_finite((seen, early, lambda_norm(new_opt_state)))
      if loss.memory is not None and num_seen == 1:
        keep = True if skip is None else ~skip
        new_loss_state = loss.memory.write(loss_state, new_loss_state, keep)
      elif skip is not None:
        new_loss_state = optax.tree.where(skip, loss_state, new_loss_state)
      moved = (new_params, new_opt_state, new_hidden)
      if skip is not None:
        moved, totals = optax.tree.where(
          skip, (carry[:3], optax.tree.zeros_like(totals)), (moved, totals)
        )
      new = (*moved, new_loss_state)
      return (new, outputs), (*seen, totals, skip)

    carry = (state.params, state.opt_state, hidden, state.loss_state)
    rows = (
      jnp.asarray(updates.windows),
      jnp.asarray(updates.coefficients),
      jnp.asarray(updates.records),
    )
    outputs = (
      _no_outputs(model, state.params, hidden, batch, windows.size)
      if return_outputs
      else None
    )
    run = lambda carried: jax.lax.scan(body, carried, (rows, first_window, occupied))
    in_range = _in_range(loss, batch, outer)
    carried = (carry, outputs)
    (carry, outputs), seen = (
      run(carried) if in_range is None else _run_if(in_range, run, carried)
    )
    values, norms, totals, skips = seen
    params, opt_state, hidden, loss_state = carry
    next_state = TrainState(
      params,
      opt_state,
      jax.lax.stop_gradient(hidden),
      loss_state,
      state.key,
      optax.safe_increment(state.step_count),
    )
    totals = sum_over_devices(
      jax.tree.map(lambda t: t.sum((0, 1) if shard_params else 0), totals), outer
    )
    invalid = (
      jnp.zeros(values.shape, bool)
      if in_range is None
      else jnp.broadcast_to(~in_range, values.shape)
    )
    skipped = invalid if skips is None else invalid | skips
    return next_state, StepMetrics(
      values, norms, totals, skipped, lambda_norm(opt_state), outputs, invalid
    )

  def evaluate(
    params: Params, batch: Batch, hidden: Hidden | None = None
  ) -> tuple[MetricSums, Hidden]:
    check_placement(batch, mesh)
    batch = with_mask(batch)
    _, batch_size = check_shapes(batch)
    params = check_like(
      'params',
      params,
      jax.eval_shape(model.init, jax.random.key(0)),
      'as model.init makes it',
    )
    if hidden is None:
      hidden = model.start(params, batch_size)
    _check_hidden(
      hidden,
      jax.eval_shape(lambda: model.initial_state(batch_size)),
      'the given hidden state',
    )
    if mesh is None:
      return share_evaluate(params, batch, hidden, None)
    split = (
      axis if batch_size % mesh.size == 0 else None
    )  # Else each device does the whole.
    rows: Any = PartitionSpec(split)
    in_specs = (PartitionSpec(), batch_specs(batch, split, targets_by_row(loss)), rows)
    run = lambda params, batch, hidden: share_evaluate(params, batch, hidden, split)
    return jax.shard_map(
      run,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=(PartitionSpec(), rows),
      check_vma=False,
    )(params, batch, hidden)

  def share_evaluate(
    params: Params, batch: Batch, hidden: Hidden, axis: str | None
  ) -> tuple[MetricSums, Hidden]:
    """Evaluation on one device's share of the batch, or all of it."""
    num_steps, batch_size = check_shapes(batch)
    windows = make_windows(num_steps)
    valid = valid_steps(windows, batch_size, batch.lengths, batch.mask)
    batch = _without_idle_targets(batch, valid, loss)

    def body(hidden: Hidden, k: jax.Array) -> tuple[Hidden, MetricSums]:
      hidden, (outputs, _), window = _run_window(
        model, loss, params, hidden, batch, windows, valid, k, None, axis, readout_chunk
      )
      return hidden, outputs.totals if isinstance(
        outputs, WindowLoss
      ) else loss.measure(outputs, batch.targets, window)

    hidden, totals = jax.lax.scan(body, hidden, jnp.arange(windows.num_windows))
    totals = jax.tree.map(lambda t: t.sum(0), totals)
    in_range = _in_range(loss, batch, None)
    if in_range is not None:
      # No mean may pass for one of targets or lengths that mean nothing.
      spoiled = lambda t: (
        jnp.where(in_range, t, jnp.nan) if jnp.issubdtype(t.dtype, jnp.floating) else t
      )
      totals = jax.tree.map(spoiled, totals)
    return sum_over_devices(totals, axis), hidden

  def predict(
    params: Params,
    inputs: Any,
    lengths: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    hidden: Hidden | None = None,
    *,
    batch_major: bool = False,
    return_hidden: bool = False,
  ) -> Any:
    batch_major, return_hidden = (
      check_flag('batch_major', batch_major),
      check_flag('return_hidden', return_hidden),
    )
    batch = (
      Batch.from_batch_major(inputs, (), lengths, mask)
      if batch_major
      else Batch(inputs, (), lengths, mask)
    )
    check_placement(batch, mesh)
    batch = with_mask(batch)
    _, batch_size = check_shapes(batch)
    params = check_like(
      'params',
      params,
      jax.eval_shape(model.init, jax.random.key(0)),
      'as model.init makes it',
    )
    if hidden is None:
      hidden = model.start(params, batch_size)
    _check_hidden(
      hidden,
      jax.eval_shape(lambda: model.initial_state(batch_size)),
      'the given hidden state',
    )
    run = lambda params, batch, hidden: _predict(model, params, batch, hidden)
    if mesh is not None:
      split = (
        axis if batch_size % mesh.size == 0 else None
      )  # Else each device does the whole.
      rows: Any = PartitionSpec(split)
      specs = (PartitionSpec(), batch_specs(batch, split, targets_by_row(loss)), rows)
      run = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=specs,
        out_specs=(PartitionSpec(None, split), rows),
        check_vma=False,
      )
    outputs, hidden = run(params, batch, hidden)
    outputs = outputs.swapaxes(0, 1) if batch_major else outputs
    return (outputs, hidden) if return_hidden else outputs

  def end_epoch(state: TrainState) -> TrainState:
    check_placement((), mesh)
    check_type('state', state, TrainState)
    explain_deleted('end_epoch', (state,))
    leaves = jax.tree.leaves(state.hidden)
    hidden = (
      _own(model.start(state.params, leaves[0].shape[0])) if leaves else state.hidden
    )
    return placed(
      state._replace(loss_state=loss.end_epoch(state.loss_state), hidden=hidden)
    )

  return Trainer(
    init,
    Compiled(step, donate=donate),
    Compiled(evaluate),
    end_epoch,
    Compiled(predict, static_argnames=('batch_major', 'return_hidden')),
    donate,
  )


def _start_rows(model: Model, params: Params, rows: int, axis: str | None) -> Hidden:
  """Returns a device's rows of the whole batch's initial state."""
  if axis is None:
    return model.start(params, rows)
  whole = model.start(params, rows * jax.lax.axis_size(axis))
  first = jax.lax.axis_index(axis) * rows
  return jax.tree.map(
    lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, rows), whole
  )


def _starts_here(
  model: Model, params: Params, hidden: Hidden, axis: str | None
) -> jax.Array:
  """Returns which rows of a carried hidden state still are the initial one, bool [B]:
  their sequences start in this batch.
  """
  leaves = jax.tree.leaves(hidden)
  starts = jax.tree.leaves(_start_rows(model, params, leaves[0].shape[0], axis))
  same = [
    (leaf == start).reshape(len(leaf), -1).all(1)
    for leaf, start in zip(leaves, starts, strict=True)
  ]
  return jnp.stack(same).all(0)


def _with_start(
  model: Model, params: Params, hidden: Hidden, fresh: jax.Array, axis: str | None
) -> Hidden:
  """Puts the initial state that `params` make into the rows that are `fresh`."""
  put = lambda start, old: jnp.where(
    fresh.reshape(-1, *[1] * (old.ndim - 1)), start.astype(old.dtype), old
  )
  return jax.tree.map(put, _start_rows(model, params, len(fresh), axis), hidden)


def _any_extra_args(inner_steps: int) -> dict[str, Any]:
  """Return extra arguments such as an optimizer's update gets, of any values."""

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


def _value_fn(
  run: Callable[[Params], tuple[Any, ...]],
) -> Callable[[Params], jax.Array]:
  """Return an objective whose gradient is the one that `run` finds, with its mean over
  the devices.

  Args:
    run: (params) -> (value, gradient, ...).
  """

  @jax.custom_vjp
  def objective(params: Params) -> jax.Array:
    value: jax.Array = run(params)[0]
    return value

  def forward(params: Params) -> tuple[jax.Array, Params]:
    value, grads, _ = run(params)
    return value, grads

  def backward(grads: Params, cotangent: jax.Array) -> tuple[Params]:
    # In JAX's convention, in which the gradient of a complex parameter is the conjugate
    # of optax's.
    return (jax.tree.map(lambda g: jnp.conj(g) * cotangent.astype(g.dtype), grads),)

  def value_fn(
    params: Params, *, grad_fn: Any = None, inner_steps: Any = None
  ) -> jax.Array:
    # Optax's line searches refuse extra arguments that the function they search along
    # does not take.
    del grad_fn, inner_steps
    value: jax.Array = objective(params)
    return value

  objective.defvjp(forward, backward)
  return value_fn


def _norm(grads: Params) -> jax.Array:
  """Return the global norm [] in at least float32: float16 holds no square above
  65,504.
  """
  return optax.tree.norm(
    jax.tree.map(lambda g: g.astype(at_least_float32(g.dtype)), grads)
  )


def _all_finite(tree: Any) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _without_idle_targets(batch: Batch, valid: ValidSteps, loss: Loss) -> Batch:
  """Puts 0 in the place of targets [B, ...] of sequences that a mask leaves without any
  valid step.

  They may be anything: NaN there would come back as a NaN gradient, although it counts
    for nothing.
  """
  if batch.mask is None or not targets_by_row(loss):
    return batch

  def cleared(leaf: Any) -> jax.Array:
    target = jnp.asarray(leaf)
    counts = (valid.lengths > 0).reshape(-1, *[1] * (target.ndim - 1))
    return jnp.where(counts, target, jnp.zeros([], target.dtype))

  return batch._replace(targets=jax.tree.map(cleared, batch.targets))


def _in_parts(model: Model, micro_batches: int) -> Model:
  """The model as it is trained: its rows in parts, one after the other."""
  if micro_batches == 1:
    return model
  apply_last, split = model.apply_last, model.split
  if apply_last is not None:
    apply_last = in_micro_batches(apply_last, micro_batches)
  if split is not None:
    split = split._replace(features=in_micro_batches(split.features, micro_batches))
  return model._replace(
    apply=in_micro_batches(model.apply, micro_batches),
    apply_last=apply_last,
    split=split,
  )


def _no_outputs(
  model: Model, params: Params, hidden: Hidden, batch: Batch, size: int
) -> jax.Array:
  """Zeros [T, B, ...] in the place of what the model will return, in windows of `size`
  steps.
  """
  x = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:size], batch.inputs)
  _, outputs = jax.eval_shape(
    lambda params, hidden, x: model.apply(params, hidden, x, None, None),
    params,
    hidden,
    x,
  )
  shape: Any = outputs.outputs if isinstance(outputs, OutputsWithPenalty) else outputs
  return jnp.zeros((check_inputs(batch.inputs)[0], *shape.shape[1:]), shape.dtype)


def _predict(
  model: Model, params: Params, batch: Batch, hidden: Hidden
) -> tuple[jax.Array, Hidden]:
  """(outputs [T, B, ...], hidden state after them), in windows of about √T steps."""
  num_steps, batch_size = check_inputs(batch.inputs)
  windows = make_windows(num_steps)
  valid = valid_steps(windows, batch_size, batch.lengths, batch.mask)

  def body(
    carry: tuple[Hidden, jax.Array], k: jax.Array
  ) -> tuple[tuple[Hidden, jax.Array], None]:
    hidden, sequence = carry
    window = window_at(windows, k, valid)
    x = jax.tree.map(lambda leaf: window.slice(jnp.asarray(leaf)), batch.inputs)
    new_hidden, outputs = model.apply(
      params, hidden, x, window.mask if window.masked else None, None
    )
    outputs = outputs.outputs if isinstance(outputs, OutputsWithPenalty) else outputs
    _check_hidden(new_hidden, hidden, 'the hidden state that model.apply returns')
    return (new_hidden, write_window(sequence, outputs, window)), None

  start = (hidden, _no_outputs(model, params, hidden, batch, windows.size))
  (hidden, outputs), _ = jax.lax.scan(body, start, jnp.arange(windows.num_windows))
  return outputs, hidden


def _objective(
  model: Model,
  loss: Loss,
  batch: Batch,
  windows: WindowPlan,
  updates: Plan,
  weights: np.ndarray | None,
  initial_loss_state: LossState,
  key: jax.Array,
  axis: str | None,
  readout_chunk: int | None,
  micro_batches: int,
) -> Callable[
  ..., tuple[jax.Array, tuple[Hidden, LossState, MetricSums, jax.Array | None]]
]:
  """The scalar one update descends: the weighted losses of the windows it runs through,
  from a given hidden state.
  """
  factors = jnp.asarray(np.ones(windows.num_windows) if weights is None else weights)
  valid = valid_steps(windows, check_shapes(batch)[1], batch.lengths, batch.mask)
  num_seen = updates.windows.shape[1]
  apply = loss.apply if loss.memory is None else loss.memory.observe

  def objective(
    params: Params,
    hidden: Hidden,
    loss_state: LossState,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    sequence: jax.Array | None,
  ) -> tuple[jax.Array, tuple[Hidden, LossState, MetricSums, jax.Array | None]]:
    def body(carry: tuple[Any, ...], row: tuple[jax.Array, ...]) -> tuple[Any, Any]:
      hidden, loss_state, sequence = carry
      k, coefficient, record = row
      hidden, (outputs, penalty), window = _run_window(
        model,
        loss,
        params,
        hidden,
        batch,
        windows,
        valid,
        k,
        key,
        axis,
        readout_chunk,
        whole=sequence is not None,
      )
      if isinstance(outputs, WindowLoss):
        (value, totals), new_loss_state = outputs, loss_state
      else:
        value, new_loss_state = apply(outputs, batch.targets, window, loss_state)
        totals = loss.measure(jax.lax.stop_gradient(outputs), batch.targets, window)
        if not updates.records.all():
          # A window seen before has moved the loss state already: its loss is that of
          # the sequence's start, as when first seen.
          value, _ = apply(outputs, batch.targets, window, initial_loss_state)
      value = _scalar(value)
      if loss.memory is not None and num_seen > 1:
        keep = True if updates.records.all() else record
        new_loss_state = loss.memory.write(loss_state, new_loss_state, keep)
      elif not updates.records.all():
        new_loss_state = optax.tree.where(record, new_loss_state, loss_state)
      if not updates.records.all():
        totals = jax.tree.map(lambda t: jnp.where(record, t, 0), totals)
      if sequence is not None:
        assert not isinstance(outputs, WindowLoss)
        recorded = None if updates.records.all() else record
        sequence = write_window(
          sequence, jax.lax.stop_gradient(outputs), window, recorded
        )
      if penalty is not None:
        if micro_batches > 1 and window.ragged:
          raise ValueError(
            'micro_batches > 1 takes no ragged batches with a model that returns '
            'penalties, which may be means over the rows '
            f'they see: got micro_batches={micro_batches} and lengths or a mask.'
          )
        value += window.mean(penalty, window.mask).astype(value.dtype)
      return (hidden, new_loss_state, sequence), (
        (coefficient * factors[k]).astype(value.dtype) * value,
        totals,
      )

    if num_seen == 1:  # The usual case: one window an update, no inner loop.
      carry, (value, totals) = body(
        (hidden, loss_state, sequence), jax.tree.map(lambda r: r[0], rows)
      )
      hidden, loss_state, sequence = carry
      return value, (hidden, loss_state, totals, sequence)
    carry, (values, totals) = jax.lax.scan(body, (hidden, loss_state, sequence), rows)
    hidden, loss_state, sequence = carry
    return values.sum(), (
      hidden,
      loss_state,
      jax.tree.map(lambda t: t.sum(0), totals),
      sequence,
    )

  return objective


def _in_range(loss: Loss, batch: Batch, axis: str | None) -> jax.Array | None:
  """Return bool [], whether all targets and lengths are in range; None where none can
  be out of it.

  Args:
    loss: the loss, whose `valid` looks at the targets.
    batch: a device's share of the batch, or all of it.
    axis: name of the mesh axis over which all devices are to be asked, None for this
      share alone.
  """
  num_steps, batch_size = jax.tree.leaves(batch.inputs)[0].shape[:2]
  mask = (
    jnp.ones((num_steps, batch_size), bool)
    if batch.mask is None
    else jnp.asarray(batch.mask)
  )
  valid = []
  if batch.lengths is not None:
    lengths = jnp.asarray(batch.lengths, jnp.int32)
    valid.append(lengths_in_range(lengths, num_steps))
    mask &= jnp.arange(num_steps)[:, None] < lengths[None, :]
  if loss.valid is not None:
    valid.append(loss.valid(batch.targets, mask))
  if not valid:
    return None
  here = jnp.stack(valid).all()
  return here if axis is None else jax.lax.pmin(here.astype(jnp.int32), axis) > 0


def _run_if(valid: jax.Array, run: Callable[[Any], Any], carry: Any) -> Any:
  """Return (carry, what was seen) of `run`; without running, if not valid, the carry as
  it is and numbers that say so.
  """
  jaxpr, shape = jax.make_jaxpr(run, return_shape=True)(
    carry
  )  # Traced once, for both branches.
  structure: Any = jax.tree.structure(shape)

  def train(carry: Any) -> Any:
    return structure.unflatten(
      jax.extend.core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(carry))
    )

  def refuse(carry: Any) -> Any:
    _, (values, norms, totals, skips) = shape
    nan = lambda like: jnp.full(like.shape, jnp.nan, like.dtype)
    return carry, (
      nan(values),
      nan(norms),
      optax.tree.zeros_like(totals),
      optax.tree.zeros_like(skips),
    )

  return jax.lax.cond(valid, train, refuse, carry)


def _run_window(
  model: Model,
  loss: Loss,
  params: Params,
  hidden: Hidden,
  batch: Batch,
  windows: WindowPlan,
  valid: ValidSteps,
  k: jax.Array,
  key: jax.Array | None,
  axis: str | None,
  readout_chunk: int | None,
  whole: bool = False,
) -> tuple[Hidden, tuple[jax.Array | WindowLoss, jax.Array | None], WindowView]:
  """Runs the model through the `k`-th window: (hidden state after it, (outputs, penalty
  or None), the window).

  The outputs are [S, B, ...], or [1, B, ...], those of each sequence's last valid step,
  where loss and model are content with them; where they are computed a few steps at a
  time, what the loss says of them is returned instead. `whole` asks for all steps'
  ones.
  """
  window = window_at(windows, k, valid, axis)
  x = jax.tree.map(lambda leaf: window.slice(jnp.asarray(leaf)), batch.inputs)
  mask, batch_size = window.mask if window.masked else None, window.mask.shape[1]
  key = None if key is None else jax.random.fold_in(key, k)
  split, per_step, steps = model.split, loss.per_step, windows.size
  at_once = steps
  if split is not None and per_step is not None and not whole:
    at_once = _steps_at_once(
      split, params, hidden, x, mask, key, windows.size, readout_chunk
    )
  if loss.last_only and model.apply_last is not None and not whole:
    steps = 1
    new_hidden, outputs = model.apply_last(params, hidden, x, mask, key, window.last)
  elif split is None or at_once == steps:
    new_hidden, outputs = model.apply(params, hidden, x, mask, key)
  else:
    new_hidden, outputs = split.features(params, hidden, x, mask, key)
  outputs, penalty = (
    outputs if isinstance(outputs, OutputsWithPenalty) else (outputs, None)
  )
  _check_hidden(new_hidden, hidden, 'the hidden state that model.apply returns')
  check_array('the outputs that model.apply returns', outputs)
  if outputs.shape[:2] != (steps, batch_size):
    raise ValueError(
      f'the model must return outputs [S, B, ...] = {(steps, batch_size)} + features, '
      f'got shape {outputs.shape}.'
    )
  if penalty is not None and penalty.shape != window.mask.shape:
    raise ValueError(
      f'the penalty that model.apply returns must be [S, B] = {window.mask.shape}, got '
      f'shape {penalty.shape}.'
    )
  if split is not None and per_step is not None and at_once < steps:
    window_loss = chunked_loss(
      split.readout,
      per_step,
      params,
      outputs,
      batch.targets,
      window,
      key,
      steps=at_once,
      evaluating=key is None,
    )
    return new_hidden, (window_loss, penalty), window
  return new_hidden, (outputs, penalty), window


def _steps_at_once(
  split: FeaturesAndReadout,
  params: Params,
  hidden: Hidden,
  x: Any,
  mask: jax.Array | None,
  key: jax.Array | None,
  num_steps: int,
  given: int | None,
) -> int:
  """How many of a window's S steps to read out at a time: as `given`, or by size."""
  if given is None and jax.default_backend() != 'cpu':
    return num_steps
  shape: Any = jax.eval_shape(split.features, params, hidden, x, mask, key)[1]
  features: Any = shape.outputs if isinstance(shape, OutputsWithPenalty) else shape
  if not isinstance(
    features, jax.ShapeDtypeStruct
  ):  # All layers are the readout: these are the inputs, a tree.
    return num_steps
  if not jnp.issubdtype(
    features.dtype, jnp.floating
  ):  # Tokens: there is no gradient with respect to them.
    return num_steps
  return (
    steps_at_once(split.readout, params, features, key)
    if given is None
    else min(given, num_steps)
  )


def _resolve(
  method: str | Method,
  num_windows: int | None,
  window_size: int | None,
  truncation_steps: int | None,
  inner_steps: int,
) -> tuple[str, Method, int | None, int]:
  """The name and the Method meant, `truncation_steps` and `inner_steps`, after checking
  that the options go with it.
  """
  if isinstance(method, Method):
    name = 'custom'
    for flag in ('regularized', 'update_each_window', 'whole_gradient', 'truncated'):
      check_flag(f'method.{flag}', getattr(method, flag))
    windows = method.num_windows
    if windows is not None and not (isinstance(windows, str) and windows == 'T'):
      method = method._replace(
        num_windows=check_integer(
          'method.num_windows', windows, 1, INT32_MAX, "an integer >= 1, 'T' or None"
        )
      )
  elif isinstance(method, str) and method in METHODS:
    name, method = method, METHODS[method]
  else:
    raise ValueError(
      f'method must be one of {list(METHODS)} or a Method, got {method!r}.'
    )
  if num_windows is not None and window_size is not None:
    raise ValueError(
      f'give num_windows or window_size, not both: got num_windows={num_windows} and '
      f'window_size={window_size}.'
    )
  for option, value in (('num_windows', num_windows), ('window_size', window_size)):
    if value is not None and method.num_windows is not None:
      raise ValueError(
        f'method {name!r} fixes K={method.num_windows}: leave out {option}, got '
        f'{option}={value}.'
      )
    if value is not None:
      check_size(option, value)
  if method.truncated != (truncation_steps is not None):
    raise ValueError(
      "truncation_steps goes with the method 'tbptt_final': got "
      f'truncation_steps={truncation_steps} and method {name!r}.'
    )
  if truncation_steps is not None:
    truncation_steps = check_size('truncation_steps', truncation_steps)
  return name, method, truncation_steps, check_size('inner_steps', inner_steps)


def _checked_readout_steps(
  readout_chunk: int | None, model: Model, loss: Loss
) -> int | None:
  """A size, or None, that goes with model and loss."""
  if readout_chunk is None:
    return None
  readout_chunk = check_size('readout_chunk', readout_chunk)
  for part, which, given in (
    ('a model', 'split', model.split),
    ('a loss', 'per_step', loss.per_step),
  ):
    if given is None:
      raise ValueError(
        f'readout_chunk goes with {part} that has a {which}: got '
        f'readout_chunk={readout_chunk} and {which} None.'
      )
  return readout_chunk


def _checked_weights(loss_weights: Any) -> np.ndarray | None:
  """Factors of the windows' losses as an array [K]."""
  if loss_weights is None:
    return None
  is_array = isinstance(loss_weights, np.ndarray | jax.Array) and loss_weights.ndim == 1
  is_list = isinstance(loss_weights, Sequence) and not isinstance(
    loss_weights, str | bytes | bytearray
  )
  weights = (
    [as_number(weight) for weight in loss_weights] if is_array or is_list else []
  )
  finite = [
    weight for weight in weights if weight is not None and abs(weight) <= FLOAT32_MAX
  ]
  if not finite or len(finite) < len(weights):
    raise ValueError(f'loss_weights must be K finite numbers, got {loss_weights!r}.')
  return np.array(finite)


def _check_types(
  model: Model, loss: Loss, optimizer: optax.GradientTransformation
) -> None:
  if not isinstance(model, Model):
    raise TypeError(
      'model must be a fptt_jax.Model, as fptt_jax.nn.from_nnx makes one, got '
      f'{type(model).__name__}.'
    )
  if not isinstance(loss, Loss):
    raise TypeError(
      'loss must be a fptt_jax.Loss, as fptt_jax.losses makes them (from_function for '
      f'your own), got {loss!r}.'
    )
  if not isinstance(optimizer, optax.GradientTransformation | optax.MultiSteps):
    raise TypeError(
      f'optimizer must be an optax.GradientTransformation, got {optimizer!r}.'
    )
  optional: dict[str, Any] = {
    'model.learned_initial_state': model.learned_initial_state
  }
  optional |= {
    'model.apply_last': model.apply_last,
    'loss.per_step': loss.per_step,
    'loss.valid': loss.valid,
  }
  functions = {
    f'model.{name}': getattr(model, name) for name in ('init', 'initial_state', 'apply')
  }
  functions |= {
    f'loss.{name}': getattr(loss, name)
    for name in ('init', 'apply', 'measure', 'end_epoch', 'check')
  }
  functions |= {name: part for name, part in optional.items() if part is not None}
  for name, function in functions.items():
    check_callable(name, function)
  if model.split is not None and not isinstance(model.split, FeaturesAndReadout):
    raise TypeError(
      f'model.split must be a fptt_jax.FeaturesAndReadout or None, got {model.split!r}.'
    )


def _checked_state(state: TrainState, expected: TrainState) -> TrainState:
  """Return the state in the structure in which `init` makes it; raise unless all but
  the hidden state is like that.
  """
  whose = 'as init makes it for this batch'
  names = ('params', 'opt_state', 'loss_state', 'step_count')
  checked = {
    name: check_like(
      f'state.{name}', getattr(state, name), getattr(expected, name), whose
    )
    for name in names
  }
  hidden = state.hidden
  if sorted(leaf_paths(hidden)) == sorted(leaf_paths(expected.hidden)):
    hidden = arrange_like('state.hidden', hidden, expected.hidden, whose)
  return state._replace(hidden=hidden, **checked)


def _own(tree: Any) -> Any:
  """Copies, strongly typed: a state may be donated, and its types never change from
  step to step.
  """
  check_arrays('what model and loss make', tree)
  return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), tree)


def _scalar(value: Any) -> jax.Array:
  if isinstance(value, jax.Array | np.ndarray | np.generic | float):
    value = jnp.asarray(value)
  if (
    not isinstance(value, jax.Array)
    or value.ndim
    or not jnp.issubdtype(value.dtype, jnp.floating)
  ):
    got = (
      f'{value.dtype}{list(value.shape)}'
      if isinstance(value, jax.Array)
      else type(value).__name__
    )
    raise ValueError(
      f'a loss must return one floating-point number a window, got {got}.'
    )
  # The sum over windows may be beyond float16, and half a precision loses small weights
  # of windows.
  return value.astype(at_least_float32(value.dtype))


def _check_hidden(got: Hidden, expected: Hidden, which: str) -> None:
  def describe(tree: Hidden) -> Hidden:
    return jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', tree)

  if describe(got) != describe(expected):
    raise ValueError(
      f"{which} must have the structure, shapes and dtypes of the model's initial "
      f'state for this batch, {describe(expected)}; '
      f'got {describe(got)}.'
    )
