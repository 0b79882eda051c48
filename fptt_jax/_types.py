"""The named tuples of the public interface: models, train states, metrics, trainers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from fptt_jax._batch import Batch
from fptt_jax.losses import LossState, MetricSums

Params = Any
Hidden = Any


class OutputsWithPenalty(NamedTuple):
  """What a model's `apply` may return in place of plain outputs: outputs with a penalty
  of the model's own on them.

  Attributes:
    outputs: [S, B, ...], what the loss sees.
    penalty: float [S, B], added to the window's objective as its mean over the valid
      steps. Evaluation leaves it out.
  """

  outputs: jax.Array
  penalty: jax.Array


class FeaturesAndReadout(NamedTuple):
  """A model's `apply` in two parts; one after the other they are to give what it gives.

  Attributes:
    features: (params, state, x [S, B, ...], mask [S, B] or None, key or None) ->
      (state, features [S, B, ...]), which may be :class:`OutputsWithPenalty`.
    readout: (params, features [s, B, ...], key or None) -> outputs [s, B, ...], of any
      s of the window's steps, each by itself. It is given the window's key for
      whichever of its steps.
  """

  features: Callable[
    [Params, Hidden, jax.Array, jax.Array | None, jax.Array | None],
    tuple[Hidden, jax.Array | OutputsWithPenalty],
  ]
  readout: Callable[[Params, jax.Array, jax.Array | None], jax.Array]


class Model(NamedTuple):
  """A recurrent model as pure functions; `fptt_jax.nn` makes them from Flax modules.

  Attributes:
    init: (key) -> params.
    initial_state: (batch_size) -> hidden state before the first step, a tree of arrays
      [B, ...]. Where there is a `learned_initial_state`, only its shapes and dtypes are
      used.
    apply: (params, state, x [S, B, ...], mask [S, B] or None, key or None) -> (state,
      outputs [S, B, ...]), a whole window. x is an array or a tree of them, as the
      batch's inputs are, 0 at masked steps, which may be anywhere. A step whose mask is
      False leaves the state as it is; mask None means that all steps are real. key None
      means evaluation: no dropout. In place of the outputs it may return
      :class:`OutputsWithPenalty` ones.
    apply_last: as `apply`, with one more argument: each sequence's last valid step in
      the window, an int or int [B], the outputs of which are all that is wanted;
      (params, state, x, mask, key, last) -> (state, outputs [1, B, ...]). Of a sequence
      without steps in the window they mean nothing. What follows the last recurrent
      layer is computed there alone. Used with losses that are `last_only`; None where a
      model cannot.
    split: `apply` in two parts, the readout being one. Used with losses that have a
      `per_step`, see `readout_chunk` of :func:`make_trainer`; None where a model has no
      such part.
    learned_initial_state: (params, batch_size) -> hidden state before the first step,
      of floating-point arrays, where it is trained with the parameters; None where it
      is constant. A window that starts a sequence has a gradient with respect to it.
  """

  init: Callable[[jax.Array], Params]
  initial_state: Callable[[int], Hidden]
  apply: Callable[
    [Params, Hidden, jax.Array, jax.Array | None, jax.Array | None],
    tuple[Hidden, jax.Array | OutputsWithPenalty],
  ]
  apply_last: Callable[..., tuple[Hidden, jax.Array | OutputsWithPenalty]] | None = None
  split: FeaturesAndReadout | None = None
  learned_initial_state: Callable[[Params, int], Hidden] | None = None

  def start(self, params: Params, batch_size: int) -> Hidden:
    """Makes the hidden state before the first step.

    Args:
      params: the model's parameters.
      batch_size: B.

    Returns:
      A tree of arrays [B, ...], as `learned_initial_state` gives it or, without
      one, `initial_state`.
    """
    if self.learned_initial_state is None:
      return self.initial_state(batch_size)
    return self.learned_initial_state(params, batch_size)


class TrainState(NamedTuple):
  """All that the next step depends on: save it and a run goes on where it was.

  Attributes:
    params: W. Moved by each update.
    opt_state: the optimizer's; holds W̄ and λ under `fptt`. Moved by each update.
    hidden: [B, ...], the hidden state after the last window. Moved by each window; read
      again only with `carry_hidden`.
    loss_state: what the loss remembers (Q tables). Moved by each window.
    key: typed PRNG key, never moved: a window's key is folded in from `step_count` and
      the window's index.
    step_count: int32 [], sequences (batches) so far.
  """

  params: Params
  opt_state: optax.OptState
  hidden: Hidden
  loss_state: LossState
  key: jax.Array
  step_count: jax.Array


class StepMetrics(NamedTuple):
  """What one step saw.

  Attributes:
    loss: [U], the objective of each update (U = K, or 1 for one update a sequence),
      before the update.
    grad_norm: [U], global norm of the loss gradient, before clipping and without the
      regularizer.
    totals: what the loss measures, summed over the sequence; see
      `fptt_jax.compute_metrics`.
    skipped: bool [U], the updates that `skip_nonfinite` left out, whose loss and norm
      stand as they were seen, and those of `invalid`.
    lambda_norm: float32 [], global norm of λ after the sequence, 0 without `fptt`.
    outputs: [T, B, ...], the model's outputs as each window was first seen, before its
      update (in the last inner step), zeros at masked steps; None unless the trainer
      was made with `return_outputs`.
    invalid: bool [U], all True if a target (a label, an example id) or a length of the
      batch is out of range. Then nothing but `step_count` moves, with or without
      `skip_nonfinite`: all updates count as skipped, too, their loss and norm are NaN,
      and the totals are of nothing.
  """

  loss: jax.Array
  grad_norm: jax.Array
  totals: MetricSums
  skipped: jax.Array
  lambda_norm: jax.Array
  outputs: jax.Array | None = None
  invalid: jax.Array | None = None


class Trainer(NamedTuple):
  """The functions :func:`make_trainer` makes.

  Attributes:
    init: (key, batch) -> TrainState. A concrete batch is looked at by
      :func:`validate_batch`; otherwise only its shapes are used, and
      `jax.ShapeDtypeStruct` leaves will do. It also runs a model of unknown layers once
      on a few small windows and refuses one that mixes the rows of a batch, looks
      ahead, or keeps memory outside the hidden state.
    step: (state, batch) -> (state, StepMetrics), compiled once for each batch shape;
      the old state is donated unless the trainer was made with `donate=False`.
    evaluate: (params, batch, hidden=None) -> (totals, hidden), compiled, without
      dropout; `hidden` None starts from the model's initial state. WindowPlan of about
      √T steps bound its memory, whatever the method.
    end_epoch: (state) -> state with the loss's end-of-epoch work done and the hidden
      state back at the start.
    predict: (params, inputs, lengths=None, mask=None, hidden=None, *,
      batch_major=False, return_hidden=False) -> outputs [T, B, ...] of all steps,
      compiled once for each shape, without dropout. Any T will do: windows of about √T
      steps bound the memory beside the outputs. Inputs, lengths and mask are those of a
      :class:`Batch`; outputs at masked steps are 0. `hidden` None starts from the
      model's initial state. With `batch_major`, inputs, mask and outputs are [B, T,
      ...]. With `return_hidden` it returns (outputs, hidden), from which a next call
      goes on.
    donate: whether `step` gives the old state's memory to the new one. The old state's
      arrays are then gone, those among them that were put there under a name of their
      own, too: keep copies, or choose `donate=False`.

  `step`, `evaluate` and `predict` also take a state or parameters as other programs
  give them back: of NumPy arrays, with integer keys as texts ('0' for 0), as dicts for
  named tuples, with the key as its data. They return JAX's arrays in the structure that
  `init` makes.
  """

  init: Callable[[jax.Array, Batch], TrainState]
  step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
  evaluate: Callable[..., tuple[MetricSums, Hidden]]
  end_epoch: Callable[[TrainState], TrainState]
  predict: Callable[..., Any]
  donate: bool = True


class UpdateInputs(NamedTuple):
  """What the objective of one update depends on besides the parameters.

  Attributes:
    hidden: [B, ...], hidden state before the update's first window.
    fresh: bool [B], rows that start from the learned initial state; None for none.
    batch: The batch of sequences.
    key: PRNG key of the sequence.
    loss_state: State of the loss.
    schedule: Windows int [V], coefficients float [V] and records bool [V]: the windows
      that the update runs through, their weights, and whether each is new.
    first_loss_state: State of the loss before the sequence.
    outputs: [T, B, ...], the model's outputs so far, or None.
  """

  hidden: Hidden
  fresh: jax.Array | None
  batch: Batch
  key: jax.Array
  loss_state: LossState
  schedule: tuple[jax.Array, jax.Array, jax.Array]
  first_loss_state: LossState
  outputs: jax.Array | None


class UpdateResult(NamedTuple):
  """What an update's windows compute besides the objective.

  Attributes:
    hidden: [B, ...], hidden state after the last window.
    loss_state: State of the loss after the last window. With a `memory` and one window
      per update, the note that is to be written to it.
    totals: Metrics of the windows.
    outputs: [T, B, ...], the model's outputs so far, or None.
  """

  hidden: Hidden
  loss_state: LossState
  totals: MetricSums
  outputs: jax.Array | None
