"""The public functions of a trainer: they validate, place and compile."""

from collections.abc import Sequence
import dataclasses

import jax
import numpy as np
import optax

from fptt_jax._checks import check_flag, require
from fptt_jax._compiled import Compiled
from fptt_jax._types import Model, Trainer
from fptt_jax.influence import Influence
from fptt_jax.losses import Loss
from fptt_jax.parallel._placement import make_placement
from fptt_jax.training._functions import Functions
from fptt_jax.training._options import resolve_spec
from fptt_jax.training._schedules import Method


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
  `model._replace(init=lambda key: params)`. With `model._replace(apply=...)` the parts
  of the old `apply`, such as its chunked readout, are not used: see `Model.original`.

  Args:
    model: Pure functions of the model.
    loss: Loss of a window, see `fptt_jax.losses`.
    optimizer: Any optax transformation; for FPTT `fptt(base)`, or a chain around it.
      Its `update` gets those of these extra arguments that it takes: `value` (the
      objective), `grad` (its gradient), `value_fn` (params -> the same objective from
      the same hidden state), `grad_fn` (params and, optionally, an unused number -> its
      gradient), `inner_steps` and `window` (int32 [], the index of the update in its
      sequence, from 0). `optax.contrib.reduce_on_plateau` sees one value per update. To
      count sequences, give it `accumulation_size` = K (times `inner_steps`) for methods
      with one update per window, and put it inside:
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
      window. The hidden state of the last inner step's forward pass is carried on.
      'ftrl' runs the whole sequence for each window, even where no sequence has steps
      left; that pass uses the parameters after the last update.
    truncation_steps: k of 'tbptt_final': how many of the last steps are differentiated.
    skip_nonfinite: Whether to leave out updates whose objective, gradient norm, new λ
      or new parameters are not finite in any inner step. Parameters, optimizer state,
      hidden state and loss state stay as they were, and the totals exclude the update;
      see `StepMetrics.skipped`. An influence that is not finite starts anew, and so
      does one with numbers above 1e12 from which an update is skipped. 'ftrl' runs
      through all windows in each update, so that a bad window skips all. The cost is
      a few more passes per window over the state, including large tables of the loss.
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
      models with a `split` and losses with a `per_step`. By default a whole window.
      On a CPU, if the readout would make an array above 32 MiB, as many steps as make
      10 MiB. It changes rounding, and for large vocabularies it saves memory and
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
    influence: How a window's gradient includes what the weights did before the window:
      a name in `fptt_jax.influence.INFLUENCES`, or what a function of that module
      makes. It is for methods with one update per window and gradients that reach back
      to its start.
      'none' leaves it out. The model must not draw noise, such as dropout, before or in
      its recurrent layers. Excludes `shard_params`.
    checkpoint_windows: Whether methods whose updates run through several windows
      ('bptt_aux', 'ftrl') run each window again for its gradient. Memory then grows
      with K + S rather than with T, for one more forward pass. With `loss_weights` of 0
      but for the last window, 'bptt_aux' is back-propagation of a final loss.

  Returns:
    A :class:`Trainer`. Masked steps change neither state, loss nor gradient. A window
    in which no sequence of a ragged batch has a valid step changes nothing, parameters
    and optimizer state included; the state of a custom loss is whatever it returns.

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
  donate = check_flag('donate', donate)
  shard_params = check_flag('shard_params', shard_params)
  placement = make_placement(mesh, shard_params, loss)
  # Each row needs the gradient of all parameters.
  fits = not shard_params or spec.influence is None
  require(fits, 'influence', "'none' with shard_params=True", influence)
  spec = dataclasses.replace(spec, axis=placement.axis)
  return _compile(Functions(spec, placement), donate)


def _compile(functions: Functions, donate: bool) -> Trainer:
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
