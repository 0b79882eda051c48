"""Optimizers and trainers made from a recipe."""

from collections.abc import Callable, Sequence
import warnings

import jax
import optax

from experiments.core import averaging, bootstrap
from experiments.core.recipe import (
  HYPERPARAMETERS,
  REGULARIZER,
  Recipe,
  updates_per_sequence,
)
import fptt_jax
from fptt_jax.influence import Influence


def make_optimizer(
  recipe: Recipe, method: str, decay: optax.Schedule | None = None
) -> optax.GradientTransformation:
  """Return the optimizer of one method.

  It is a chain of clipping, weight decay, the base optimizer and the regularizer. The
  optimizer's state holds the hyperparameters that :func:`hyperparameters` names, and
  they may be set there.

  A warning is given if FPTT's recursion is unstable at the initial learning rate, see
  :func:`warn_if_unstable`.

  Args:
    recipe: settings of the runs.
    method: training method.
    decay: (updates so far) -> factor of the learning rate; None keeps it constant.
  """
  recipe = recipe.for_method(method)
  warn_if_unstable(recipe, method)
  make = _fptt if fptt_jax.METHODS[method].regularized else _plain
  # Injected, so that runs with other values share one compiled program. The recipe and
  # the decay are static: they decide the structure of the chain.
  inject = optax.inject_hyperparams(make, static_args=('recipe', 'decay'))
  return inject(recipe=recipe, decay=decay, **hyperparameters(recipe, method))


def _base(
  recipe: Recipe,
  decay: optax.Schedule | None,
  learning_rate: jax.typing.ArrayLike,
  momentum: jax.typing.ArrayLike,
) -> optax.GradientTransformation:
  """Return weight decay and the base optimizer.

  Args:
    recipe: settings of the runs.
    decay: (updates so far) -> factor of the learning rate, or None.
    learning_rate: initial learning rate.
    momentum: decay of the first moment.
  """
  rate = learning_rate if decay is None else lambda count: learning_rate * decay(count)
  chain = []
  if recipe.weight_decay:
    chain.append(optax.add_decayed_weights(recipe.weight_decay))
  # A schedule-free optimizer has its momentum in the points where it takes gradients.
  moment = 0.0 if recipe.averaging == 'schedule_free' else momentum
  chain.append(_descent(recipe, rate, moment))
  return optax.chain(*chain)


def _descent(
  recipe: Recipe,
  rate: jax.typing.ArrayLike | optax.Schedule,
  momentum: jax.typing.ArrayLike,
) -> optax.GradientTransformation:
  """Return the base optimizer.

  Args:
    recipe: settings of the runs.
    rate: learning rate or its schedule.
    momentum: decay of the first moment.
  """
  windows = recipe.momentum_windows
  if recipe.optimizer == 'sgd':
    if not windows:
      return optax.sgd(rate, momentum, recipe.nesterov)
    return fptt_jax.sgd_by_window(
      rate, windows, momentum=momentum, nesterov=recipe.nesterov
    )
  if not windows:
    return optax.adam(rate, b1=momentum)
  return fptt_jax.adam_by_window(rate, windows, b1=momentum)


def _clipping(
  recipe: Recipe, clip: jax.typing.ArrayLike
) -> optax.GradientTransformation:
  """Return the clipping of the gradient's global norm."""
  # The recipe decides, since `clip` may be traced: 0 does not clip.
  return optax.clip_by_global_norm(clip) if recipe.clip else optax.identity()


def _plain(
  recipe: Recipe,
  decay: optax.Schedule | None,
  learning_rate: jax.typing.ArrayLike,
  momentum: jax.typing.ArrayLike,
  clip: jax.typing.ArrayLike,
) -> optax.GradientTransformation:
  """Return the optimizer of a method without the regularizer."""
  base = _base(recipe, decay, learning_rate, momentum)
  optimizer = optax.chain(_clipping(recipe, clip), base)
  if recipe.averaging == 'schedule_free':
    return optax.contrib.schedule_free(optimizer, learning_rate, b1=momentum)
  return _with_mean(recipe, optimizer)


def _with_mean(
  recipe: Recipe, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Return an optimizer that also keeps the running mean of the weights, if asked."""
  if recipe.averaging != 'running' and not recipe.bootstrap:
    return optimizer
  return averaging.running_mean(optimizer, recipe.average_horizon)


def _fptt(
  recipe: Recipe,
  decay: optax.Schedule | None,
  learning_rate: jax.typing.ArrayLike,
  momentum: jax.typing.ArrayLike,
  clip: jax.typing.ArrayLike,
  alpha: jax.typing.ArrayLike,
  beta: jax.typing.ArrayLike,
  kappa: jax.typing.ArrayLike,
) -> optax.GradientTransformation:
  """Return the optimizer of a method with the regularizer."""
  base = _base(recipe, decay, learning_rate, momentum)
  clipping = _clipping(recipe, clip)
  # Inside `fptt` the regularized gradient is clipped, outside the loss gradient alone.
  if recipe.clip_regularizer:
    inner = optax.chain(clipping, base)
    return _with_mean(recipe, regularize(recipe, inner, alpha, beta, kappa))
  outer = optax.chain(clipping, regularize(recipe, base, alpha, beta, kappa))
  return _with_mean(recipe, outer)


def hyperparameters(recipe: Recipe, method: str) -> dict[str, float]:
  """Return the hyperparameters in the state of a method's optimizer.

  Args:
    recipe: settings of the runs.
    method: training method.

  Returns:
    Initial values by the name that they have in the state.
  """
  recipe = recipe.for_method(method)
  regularized = fptt_jax.METHODS[method].regularized
  found = {}
  for name, state_name in HYPERPARAMETERS.items():
    if regularized or name not in REGULARIZER:
      # A recipe may leave the momentum to the base optimizer; a state cannot.
      value = recipe.first_moment if name == 'momentum' else getattr(recipe, name)
      # Integers are given from Python, and the state has float32 numbers.
      found[state_name] = float(value)
  return found


def regularize(
  recipe: Recipe,
  base: optax.GradientTransformation,
  alpha: jax.typing.ArrayLike,
  beta: jax.typing.ArrayLike,
  kappa: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
  """Return FPTT around an optimizer.

  Args:
    recipe: settings that are not among the arguments.
    base: the optimizer.
    alpha: final α, after the warm-up.
    beta: β.
    kappa: κ.
  """
  warmup = optax.linear_schedule(0.1, 1.0, recipe.alpha_warmup)
  return fptt_jax.fptt(
    base,
    alpha=(lambda count: alpha * warmup(count)) if recipe.alpha_warmup else alpha,
    beta=beta,
    kappa=kappa,
    linear_scale=recipe.linear_scale,
    gradient_estimate=recipe.gradient_estimate,
    coupling=recipe.coupling,
  )


def flat_loss_radius(recipe: Recipe, method: str) -> float | None:
  """Return the spectral radius of FPTT's recursion where the loss is flat.

  Args:
    recipe: settings of the runs.
    method: training method.

  Returns:
    The radius, see :func:`fptt_jax.spectral_radius`; None for optimizers and gradient
    estimates that the analysis does not cover, and for methods without the regularizer.
  """
  regularized = fptt_jax.METHODS[method].regularized
  is_linear = recipe.optimizer == 'sgd' or recipe.coupling == 'update'
  is_other = recipe.nesterov or recipe.momentum_windows > 0
  has_plain_momentum = recipe.first_moment == 0 or not is_other
  is_analyzed = (
    is_linear and has_plain_momentum and recipe.gradient_estimate == 'running'
  )
  if not regularized or not is_analyzed or recipe.first_moment < 0:
    return None
  # A recipe whose rate is not chosen yet has no radius either.
  if recipe.lr is None:
    return None
  return fptt_jax.spectral_radius(
    recipe.lr,
    recipe.alpha,
    kappa=recipe.kappa,
    beta=recipe.beta,
    linear_scale=recipe.linear_scale,
    momentum=recipe.first_moment,
    coupling=recipe.coupling,
  )


def warn_if_unstable(recipe: Recipe, method: str) -> None:
  """Warn if FPTT with SGD is unstable at these settings even where the loss is flat.

  Args:
    recipe: settings of the runs.
    method: training method.
  """
  found = flat_loss_radius(recipe, method)
  if found is not None and found > 1:
    others = ', '.join(
      f'{name}={getattr(recipe, name):g}' for name in ('kappa', 'beta', 'linear_scale')
    )
    others += f', momentum={recipe.first_moment:g}'
    warnings.warn(
      f'FPTT with SGD at lr={recipe.lr:g}, alpha={recipe.alpha:g}, {others} is '
      'unstable even on a flat loss: its linearized recursion has spectral radius '
      f'{found:.2f} > 1. Lower lr * alpha.',
      stacklevel=2,
    )


def make_trainer(
  recipe: Recipe,
  method: str,
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  seq_len: int,
  *,
  decay: optax.Schedule | None = None,
  mesh: jax.sharding.Mesh | None = None,
  carry_hidden: bool = False,
  influence: str | Influence = 'none',
  loss_weights: Sequence[float] | None = None,
  num_batches: int = 0,
  wrap: Callable[
    [optax.GradientTransformation], optax.GradientTransformation
  ] = lambda optimizer: optimizer,
) -> fptt_jax.Trainer:
  """Return the trainer of one method.

  Args:
    recipe: settings of the runs.
    method: training method.
    model: the model.
    loss: the loss.
    seq_len: sequence length T.
    decay: factor of the learning rate, see :func:`make_optimizer`.
    mesh: devices to split a batch over.
    carry_hidden: whether the hidden state is carried from batch to batch.
    influence: how credit crosses the border of a window.
    loss_weights: factors of the windows' losses; None for 1.
    num_batches: batches of the run, over which the targets of `bootstrap` change.
    wrap: function that is applied to the optimizer.
  """
  setting = fptt_jax.METHODS[method]
  # The trainer refuses options that its method does not have.
  num_windows = recipe.num_windows if setting.num_windows is None else None
  truncation_steps = None
  if setting.truncated:
    truncation_steps = recipe.truncation_steps or min(300, seq_len)
  if recipe.bootstrap:
    loss = bootstrap.with_window_targets(loss)
  trainer = fptt_jax.make_trainer(
    model,
    loss,
    wrap(make_optimizer(recipe, method, decay)),
    method=method,
    num_windows=num_windows,
    carry_hidden=carry_hidden,
    influence=influence,
    loss_weights=loss_weights,
    inner_steps=recipe.inner_steps,
    truncation_steps=truncation_steps,
    mesh=mesh,
    # On one device there is nothing to split the parameters over.
    shard_params=recipe.shard_params and mesh is not None,
    skip_nonfinite=recipe.on_nonfinite == 'skip',
  )
  if not recipe.bootstrap:
    return trainer
  num_windows, _ = updates_per_sequence(recipe, method, seq_len)
  plan = fptt_jax.make_windows(seq_len, num_windows=num_windows)
  share = optax.linear_schedule(0.0, recipe.bootstrap, num_batches)
  return bootstrap.bootstrapped(trainer, plan, share)


def evaluation_params(
  recipe: Recipe, method: str, state: fptt_jax.TrainState
) -> optax.Params:
  """Return the parameters to evaluate: W, its summary or an average.

  Args:
    recipe: settings of the runs.
    method: training method. Methods without the regularizer have no summary.
    state: the training state.

  Returns:
    A tree like the parameters.
  """
  if recipe.averaging == 'running':
    return averaging.running_params(state.opt_state, state.params)
  if recipe.averaging == 'schedule_free':
    # The state of the optimizer itself has the b1 that it began with, which another
    # may have replaced since.
    b1 = optax.tree.get(state.opt_state, 'momentum')
    return averaging.schedule_free_params(state.opt_state, state.params, b1)
  if recipe.evaluate_at == 'w_bar' and fptt_jax.METHODS[method].regularized:
    return fptt_jax.fptt_eval_params(state.opt_state, state.params)
  return state.params
