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
  """Outputs of a model's `apply` together with a penalty on them.

  Attributes:
    outputs: [S, B, ...], the outputs that the loss sees.
    penalty: float [S, B]. Its mean over the valid steps is added to the window's
      objective. Evaluation ignores it.
  """

  outputs: jax.Array
  penalty: jax.Array


class FeaturesAndReadout(NamedTuple):
  """A model's `apply` factored in two: `readout(features(x))` must equal `apply(x)`.

  Attributes:
    features: (params, state, x [S, B, ...], mask [S, B] or None, key or None) ->
      (state, features [S, B, ...]), perhaps as :class:`OutputsWithPenalty`.
    readout: (params, features [s, B, ...], key or None) -> outputs [s, B, ...]. It acts
      on each of any s steps of the window by itself. The key is the window's, for any
      of its steps.
  """

  features: Callable[
    [Params, Hidden, jax.Array, jax.Array | None, jax.Array | None],
    tuple[Hidden, jax.Array | OutputsWithPenalty],
  ]
  readout: Callable[[Params, jax.Array, jax.Array | None], jax.Array]


class OwnProduct(NamedTuple):
  """Parameters that act on a step of a layer through the same pre-activations.

  Each of n units has k pre-activations, called sums here, such as the gates of an LSTM:
  z = a A + b B + c.

  Attributes:
    gains: For each of the m arrays of state and each of the k sums of a unit, the
      derivative [R, n] of the array after the step with respect to the sum; None for 0.
    operands: {name of a parameter: what it is multiplied by, [R, q], or None if it is
      added}. A parameter that is multiplied has the shape [q, k n] and one that is
      added [k n], units fastest.
  """

  gains: tuple[tuple[jax.Array | None, ...], ...]
  operands: dict[str, jax.Array | None]


class OwnStep(NamedTuple):
  """Derivatives of a step of a recurrent layer that stay within each unit.

  Attributes:
    transition: For each of the m arrays of state, the derivatives [R, n] of its units
      after the step with respect to each of their m arrays before it.
    products: How the layer's parameters act on the step.
  """

  transition: tuple[tuple[jax.Array, ...], ...]
  products: tuple[OwnProduct, ...]


class OwnKernels(NamedTuple):
  """Native kernels for the influence of parameters on their own units.

  Attributes:
    advance: (params, state [B, ...], x [S, B, ...], mask [S, B] or None, influence
      {path: [B, ..., m, k n]}, credit {path: [..., k n]} that was computed from it or
      {}, own_only) -> the influence after the window, of the layers that have a kernel.
    credit: (gradient of the state [B, m, n], influence of a parameter [B, ..., m, k n])
      -> its credit [..., k n]; None where no kernel can compute it.
  """

  advance: Callable[..., dict[str, jax.Array]]
  credit: Callable[[jax.Array, jax.Array], jax.Array | None]


class Model(NamedTuple):
  """A recurrent model as pure functions; `fptt_jax.nn` makes them from Flax modules.

  Attributes:
    init: (key) -> params.
    initial_state: (batch_size) -> hidden state before the first step, a tree of arrays
      [B, ...]. With a `learned_initial_state`, only its shapes and dtypes are used.
    apply: (params, state, x [S, B, ...], mask [S, B] or None, key or None) -> (state,
      outputs [S, B, ...]) over a whole window. x is an array or a tree of arrays, like
      the batch's inputs, 0 at masked steps. Masked steps may be anywhere, and must
      leave the state as it is; mask None means that all steps are valid. key None means
      evaluation, without dropout. The outputs may be :class:`OutputsWithPenalty`.
    apply_last: (params, state, x, mask, key, last) -> (state, outputs [1, B, ...]).
      Like `apply`, but returns only the output at step `last`, an int or int [B]: each
      sequence's last valid step in the window. Undefined for sequences with no step in
      this window. Layers after the last recurrent layer run at that step alone. Used
      with losses that are `last_only`; None if the model has none.
    split: `apply` factored in two. Used with losses that have a `per_step`, see
      `readout_chunk` of :func:`make_trainer`; None if the model has no such parts.
    learned_initial_state: (params, batch_size) -> hidden state before the first step,
      of floating-point arrays, if it is trained with the parameters. A window that
      starts a sequence is differentiated with respect to it. None if it is constant.
    plain: `apply` in a form that `jax.jvp`, `jax.vmap` and derivatives of any order
      take, for windows of any size. None if `apply` itself is of that form.
    own_steps: (params, state [R, ...], x [1, R, ...], own_only) -> {index of an array:
      :class:`fptt_jax.influence.OwnStep`}, one for each recurrent layer that defines
      `own_step`. The key is the index of the layer's first array among the
      floating-point arrays of the state. Used by `fptt_jax.influence`, which
      differentiates layers that are not there.
    own_kernels: Kernels for what `own_steps` is for; None if the model has none.
    original: The model as a function of `fptt_jax.nn` made it. If `apply` was replaced
      since, a trainer ignores those of `apply_last`, `split`, `plain`, `own_steps` and
      `own_kernels` that are still the original's, so that `model._replace(apply=...)`
      trains with the new function. Replace them together with `apply` to keep them, or
      pass `original=None` if the new `apply` computes the same. Without `plain` a
      layer with a hand-written backward pass has no forward mode, which 'uoro' needs.
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
  plain: Callable[..., tuple[Hidden, jax.Array | OutputsWithPenalty]] | None = None
  own_steps: Callable[..., dict[int, OwnStep]] | None = None
  own_kernels: OwnKernels | None = None
  original: 'Model | None' = None

  def start(self, params: Params, batch_size: int) -> Hidden:
    """Make the hidden state before the first step.

    Args:
      params: Parameters of the model.
      batch_size: B.

    Returns:
      A tree of arrays [B, ...], from `learned_initial_state` or, without one, from
      `initial_state`.
    """
    if self.learned_initial_state is None:
      return self.initial_state(batch_size)
    return self.learned_initial_state(params, batch_size)

  def without_stale_parts(self) -> 'Model':
    """Return the model without parts of an `apply` that it no longer has."""
    # Not `==`, which an `apply` of one's own may define.
    if self.original is None or self.original.apply is self.apply:
      return self
    parts = ('apply_last', 'split', 'plain', 'own_steps', 'own_kernels')
    stale: dict[str, Any] = {
      name: None
      for name in parts
      if getattr(self, name) is getattr(self.original, name)
    }
    return self._replace(**stale)


class TrainState(NamedTuple):
  """Everything the next step depends on: a run resumes exactly from a saved state.

  Attributes:
    params: W. Changed by each update.
    opt_state: State of the optimizer; with `fptt` it holds W̄ and λ. Changed by each
      update.
    hidden: [B, ...], hidden state after the last window. Changed by each window; the
      next step reads it only with `carry_hidden`.
    loss_state: State of the loss, such as tables of predictions. Changed by each
      window.
    key: Typed PRNG key. It never changes: a window's key is folded from `step_count`
      and the window's index.
    step_count: int32 [], number of batches so far.
    influence: [B, ...], effect of the parameters on `hidden` as the trainer's
      `influence` represents it; () without one. Changed by each window; the next step
      reads it only with `carry_hidden`.
  """

  params: Params
  opt_state: optax.OptState
  hidden: Hidden
  loss_state: LossState
  key: jax.Array
  step_count: jax.Array
  influence: Any = ()


class StepMetrics(NamedTuple):
  """Metrics of one step.

  Attributes:
    loss: [U], the objective before each update. U is K, or 1 for methods with one
      update per sequence. With several inner steps, `loss`, `grad_norm` and `totals`
      are of the last one, whose parameters the earlier ones have already fitted.
    grad_norm: [U], global norm of its gradient, before clipping and without the
      regularizer.
    totals: Metrics of the loss, summed over the sequence; see
      `fptt_jax.compute_metrics`.
    skipped: bool [U], updates left out by `skip_nonfinite`, or `invalid`. Their loss
      and gradient norm are reported as measured.
    lambda_norm: float32 [], global norm of λ after the sequence; 0 without `fptt`.
    outputs: [T, B, ...], the model's outputs in each window before its update (in the
      last inner step), 0 at masked steps and, with 'tbptt_final', before its window.
      None unless the trainer was made with `return_outputs`.
    invalid: bool [U], all True if a target (a label, an example id) or a length of the
      batch is out of range. Then only `step_count` changes, with or without
      `skip_nonfinite`: all updates count as skipped, their losses and gradient norms
      are NaN, and the totals are 0.
    credit_norm: [U], global norm of the part of the gradient that `influence` carried
      into the window (or, with 'synthetic', guessed for the steps after it), after the
      mean over devices. Divided by `grad_norm`, it shows how much windows without
      credit would leave out. None without an influence; the step then computes nothing
      for it.
  """

  loss: jax.Array
  grad_norm: jax.Array
  totals: MetricSums
  skipped: jax.Array
  lambda_norm: jax.Array
  outputs: jax.Array | None = None
  invalid: jax.Array | None = None
  credit_norm: jax.Array | None = None


class Trainer(NamedTuple):
  """The functions that :func:`make_trainer` makes.

  Attributes:
    init: (key, batch) -> TrainState. Concrete batches are validated by
      :func:`validate_batch`; abstract ones (`jax.ShapeDtypeStruct`) contribute shapes
      only. A model of unknown layers is run once on a few small windows. It is rejected
      if it mixes the rows of a batch, looks ahead, or keeps memory outside the hidden
      state.
    step: (state, batch) -> (state, StepMetrics), compiled once per batch shape. The old
      state is donated unless the trainer was made with `donate=False`.
    evaluate: (params, batch, hidden=None) -> (totals, hidden), compiled, without
      dropout. Without `hidden` it starts from the model's initial state. It runs in
      windows of about √T steps, which bound its memory, for any method.
    end_epoch: (state) -> state after the loss's end-of-epoch work, with the hidden
      state back at the start.
    predict: (params, inputs, lengths=None, mask=None, hidden=None; by keyword
      batch_major=False, return_hidden=False) -> outputs [T, B, ...] of all steps,
      compiled once per shape, without dropout. Any T is accepted: windows of about √T
      steps bound the memory besides the outputs. Inputs, lengths and mask are those of
      a :class:`Batch`; outputs at masked steps are 0. Without `hidden` it starts from
      the model's initial state. With `batch_major`, inputs, mask and outputs are
      [B, T, ...]. With `return_hidden` it returns (outputs, hidden), and a next call
      can continue from there.
    donate: Whether `step` reuses the old state's memory for the new state. The old
      arrays are deleted then, including those that were put into the state by hand:
      keep copies, or pass `donate=False`.

  `step`, `evaluate` and `predict` also take states and parameters as checkpoint
  libraries restore them: NumPy arrays, dicts in place of named tuples, integer keys as
  strings ('0' for 0), and the data of PRNG keys. They return JAX arrays in the
  structure that `init` makes.
  """

  init: Callable[[jax.Array, Batch], TrainState]
  step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
  evaluate: Callable[..., tuple[MetricSums, Hidden]]
  end_epoch: Callable[[TrainState], TrainState]
  predict: Callable[..., Any]
  donate: bool = True


class UpdateInputs(NamedTuple):
  """Inputs of the objective of one update, besides the parameters.

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
    influence: [B, ...], influence on the hidden state; () without one.
  """

  hidden: Hidden
  fresh: jax.Array | None
  batch: Batch
  key: jax.Array
  loss_state: LossState
  schedule: tuple[jax.Array, jax.Array, jax.Array]
  first_loss_state: LossState
  outputs: jax.Array | None
  influence: Any = ()


class UpdateResult(NamedTuple):
  """Results of an update's windows, besides the objective.

  Attributes:
    hidden: [B, ...], hidden state after the last window.
    loss_state: State of the loss after the last window. With a `memory` and one window
      per update, the note that is to be written to it.
    totals: Metrics of the windows.
    outputs: [T, B, ...], the model's outputs so far, or None.
    credit: The part of the gradient from beyond the window, a tree like the parameters;
      () without an influence.
    d_hidden: [B, ...], gradient of the hidden state before the window, for influences
      that learn from it; else ().
  """

  hidden: Hidden
  loss_state: LossState
  totals: MetricSums
  outputs: jax.Array | None
  credit: Params = ()
  d_hidden: Hidden = ()
