"""Optimizers and trainers made from a recipe."""

from collections.abc import Callable
import warnings

import jax
import optax

from experiments.core.recipe import HYPERPARAMETERS, REGULARIZER, Recipe
import fptt_jax


def make_optimizer(
  recipe: Recipe, method: str, decay: optax.Schedule | None = None
) -> optax.GradientTransformation:
  """The chain of clipping, weight decay, base optimizer and regularizer for one method.

  Its state holds what `HYPERPARAMETERS` names (those the method has), which may be set.
  `decay`: (updates so far) -> factor of the learning rate.

  Warns when FPTT's own recursion would grow: the advisor's radius at the initial
  learning rate is above 1.
  """
  recipe = recipe.for_method(method)
  regularized = fptt_jax.METHODS[method].regularized
  warn_if_unstable(recipe, method)

  def base(
    learning_rate: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike,
    clip: jax.typing.ArrayLike,
  ) -> tuple[optax.GradientTransformation, ...]:
    """(what clips, all else)."""
    rate = (
      learning_rate if decay is None else lambda count: learning_rate * decay(count)
    )
    chain = (
      [optax.add_decayed_weights(recipe.weight_decay)] if recipe.weight_decay else []
    )
    chain.append(
      optax.sgd(rate, momentum)
      if recipe.optimizer == 'sgd'
      else optax.adam(rate, b1=momentum)
    )
    return optax.clip_by_global_norm(
      clip
    ) if recipe.clip else optax.identity(), optax.chain(*chain)

  def plain(
    learning_rate: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike,
    clip: jax.typing.ArrayLike,
  ) -> optax.GradientTransformation:
    return optax.chain(*base(learning_rate, momentum, clip))

  def fptt(
    learning_rate: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike,
    clip: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
    beta: jax.typing.ArrayLike,
    kappa: jax.typing.ArrayLike,
  ) -> optax.GradientTransformation:
    clipping, rest = base(learning_rate, momentum, clip)
    if recipe.clip_regularizer:
      return regularize(recipe, optax.chain(clipping, rest), alpha, beta, kappa)
    return optax.chain(clipping(recipe, rest, alpha, beta, kappa))

  return optax.inject_hyperparams(fptt if regularized else plain)(
    **hyperparameters(recipe, method)
  )


def hyperparameters(recipe: Recipe, method: str) -> dict[str, float]:
  """What a method's optimizer holds in its state, by the names it has there."""
  recipe = recipe.for_method(method)
  names = [
    name
    for name in HYPERPARAMETERS
    if fptt_jax.METHODS[method].regularized or name not in REGULARIZER
  ]
  values = {
    name: recipe.first_moment if name == 'momentum' else getattr(recipe, name)
    for name in names
  }
  return {HYPERPARAMETERS[name]: value for name, value in values.items()}


def regularize(
  recipe: Recipe,
  base: optax.GradientTransformation,
  alpha: jax.typing.ArrayLike,
  beta: jax.typing.ArrayLike,
  kappa: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
  """FPTT around `base`; the recipe says what is not given."""
  warmup = optax.linear_schedule(0.1, 1.0, recipe.alpha_warmup)
  return fptt_jax.fptt(
    base,
    alpha=(lambda count: alpha * warmup(count)) if recipe.alpha_warmup else alpha,
    beta=beta,
    kappa=kappa,
    linear_scale=recipe.linear_scale,
    gradient_estimate=recipe.gradient_estimate,
  )


def flat_loss_radius(recipe: Recipe, method: str) -> float | None:
  """The advisor's spectral radius of FPTT with SGD where the loss is flat; None for
  what it knows nothing of.
  """
  if (
    not fptt_jax.METHODS[method].regularized
    or recipe.optimizer != 'sgd'
    or recipe.gradient_estimate != 'running'
  ):
    return None
  settings = dict(
    kappa=recipe.kappa, beta=recipe.beta, linear_scale=recipe.linear_scale
  )
  if recipe.first_moment < 0:
    return None
  settings |= dict(momentum=recipe.first_moment)
  return fptt_jax.spectral_radius(recipe.lr, recipe.alpha, **settings)


def warn_if_unstable(recipe: Recipe, method: str) -> None:
  """Warns when FPTT with SGD at these settings is unstable even where the loss is
  flat.
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
  wrap: Callable[
    [optax.GradientTransformation], optax.GradientTransformation
  ] = lambda optimizer: optimizer,
) -> fptt_jax.Trainer:
  """The trainer of one method; `wrap` goes around its optimizer, `decay` as for
  :func:`make_optimizer`.
  """
  setting = fptt_jax.METHODS[method]
  return fptt_jax.make_trainer(
    model,
    loss,
    wrap(make_optimizer(recipe, method, decay)),
    method=method,
    num_windows=recipe.num_windows if setting.num_windows is None else None,
    carry_hidden=carry_hidden,
    inner_steps=recipe.inner_steps,
    truncation_steps=(recipe.truncation_steps or min(300, seq_len))
    if setting.truncated
    else None,
    mesh=mesh,
    shard_params=recipe.shard_params and mesh is not None,
    skip_nonfinite=recipe.on_nonfinite == 'skip',
  )


def evaluation_params(
  recipe: Recipe, method: str, state: fptt_jax.TrainState
) -> jax.typing.ArrayLike:
  """The parameters to evaluate at."""
  if recipe.evaluate_at == 'w_bar' and fptt_jax.METHODS[method].regularized:
    return fptt_jax.fptt_eval_params(state.opt_state, state.params)
  return state.params
