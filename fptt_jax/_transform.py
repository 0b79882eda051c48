"""FPTT as an optax gradient transformation: the regularized update of one window.

W are the parameters, λ (`lam`) is a running vector that the paper derives as an
estimate of the previous window's loss gradient, and W̄ (`w_bar`) is the running summary
of the parameters. λ and W̄ live in :class:`FPTTState`.
This module knows nothing about time steps, losses or hidden states.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fptt_jax._checks import (
  check_choice,
  check_dtype,
  check_size,
  describe,
  require,
  require_type,
)
from fptt_jax._dtypes import at_least_float32
from fptt_jax._hyperparameters import (
  Hyperparameter,
  Hyperparameters,
  check_hyperparameters,
  values_at,
)
from fptt_jax._trees import (
  have_same_field,
  have_same_shapes,
  have_same_structure,
  is_floating,
  nodes_of,
  shapes,
)
from fptt_jax._usable import accepted_args, record_call

GRADIENT_ESTIMATES = ('running', 'recomputed', 'lagged')
COUPLINGS = ('gradient', 'update')


class FPTTState(NamedTuple):
  """State of :func:`fptt`.

  Attributes:
    step_count: int32 [], number of calls of `update` so far.
    w_bar: W̄_t, a tree like the parameters, in `state_dtype`.
    lam: λ_t, like `w_bar`: the previous window's loss gradient if each window's problem
      were solved exactly. With `coupling='update'` it is in units of the weights.
    base_optimizer_state: State of the wrapped optimizer.
  """

  step_count: jax.Array
  w_bar: optax.Params
  lam: optax.Params
  base_optimizer_state: optax.OptState


def fptt(
  base: optax.GradientTransformation,
  *,
  alpha: Hyperparameter = 0.5,
  beta: Hyperparameter = 0.5,
  kappa: Hyperparameter = 1.0,
  linear_scale: Hyperparameter = 1.0,
  gradient_estimate: str = 'running',
  coupling: str = 'gradient',
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Turn an optimizer into Forward Propagation Through Time.

  Call `update` once per window with the gradient :math:`g_t` of that window's loss at
  :math:`W_t`, where the hidden state of the previous window is held constant:

  .. math::

    \begin{align*}
      g'_t & = g_t - c\,\lambda_t + \kappa\alpha\,(W_t - \bar W_t) \\
      W_{t+1} & = \text{the base optimizer's step on } g'_t \\
      \lambda_{t+1} & = \lambda_t - \alpha\,(W_{t+1} - \bar W_t), & \lambda_0 & = 0 \\
      \bar W_{t+1} & = (1-\beta)\,\bar W_t + \beta\,W_{t+1}
        - \tfrac{\beta}{\alpha}\,\lambda_{t+1}, & \bar W_0 & = W_0
    \end{align*}

  Here c is `linear_scale`: the paper contradicts itself and has 1 in Eq. 6 and 1/2 in
  Eq. 4 and Algorithm 2 (see :func:`fptt_algorithm2`). The defaults are those of the
  authors' 2021 release. The first update of a fresh state equals the base optimizer's.

  If the inner problem were solved exactly with c = κ = 1, λ_{t+1} would be the gradient
  of the window's loss at W_{t+1}, and the last line would be the paper's Eq. 5.

  With `coupling='update'` the regularizer does not pass through the base optimizer, as
  weight decay does not in AdamW. Let :math:`u_t` be the base optimizer's update on the
  loss gradient alone. Then

  .. math::

    W_{t+1} = W_t + u_t + c\,\lambda_t - \kappa\alpha\,(W_t - \bar W_t)

  and the last two lines stay. α is then a number without units, and λ is in units of
  the weights. With plain SGD of rate η, both forms are the same if α here is η times
  α there. An adaptive optimizer divides the regularizer by its own scale in the first
  form, which makes it strongest where gradients are small; the second form pulls all
  weights alike.

  Composition with other transformations:

  * Gradient clipping in front, `optax.chain(clip, fptt(base))`, clips the loss
    gradient. Clipping inside, `fptt(optax.chain(clip, base))`, clips loss plus
    regularizer, as the release does. With 'recomputed', clip inside: the gradient that
    `grad_fn` returns is not clipped, so λ and a clipped g_t would differ in scale.
  * `MultiSteps(fptt(base), n)`, `apply_if_finite(fptt(base), n)` and
    `conditionally_mask(fptt(base), f)` work, with one gradient step per window. The
    reverse nesting raises an error, because λ and W̄ would move on skipped steps.
  * A base optimizer that asks for `grad` or `grad_fn` gets them with the regularizer;
    `value` and `value_fn` are of the loss alone. Leave out bases that take the value
    for their objective, such as `optax.polyak_sgd`; line searches raise an error.
  * Nothing may change the updates after `fptt`. A trainer raises an error for an
    optimizer that does; a training loop of your own must take care itself.
  * `optax.masked` passes the raw gradient of left-out leaves through, so they move. To
    freeze leaves, use `optax.partition` with `optax.set_to_zero()`.

  Args:
    base: The optimizer that takes the step on the regularized gradient.
    alpha: α > 0, strength of the tie between W and W̄: a number, an array [] or an
      optax schedule over windows ("starting small, gradually increased", Sec. 3.1). The
      release uses 0.1 on images, 0.5 on the adding problem and on PTB-300, and 0.2 on
      PTB-c and PTB-w.
    beta: β in (0, 1], mixing rate of W̄: number or schedule. A β above 1/2 gives the
      old W̄ the negative weight 1 - 2β and causes a warning. The release uses 0.7 on
      PTB-w.
    kappa: κ >= 0, scale of the quadratic term: number or schedule. The release uses 2
      on language.
    linear_scale: c in [0, 1], scale of the linear term: number or schedule. 1 is Eq. 6,
      1/2 is Eq. 4, and a smaller number fades the term.
    gradient_estimate: How λ_{t+1} is found. 'running': by the recursion above, at no
      extra cost. 'recomputed': as the gradient of the same window's loss at W_{t+1},
      from the same hidden state. This costs one more forward and backward pass, and
      `update` needs the extra argument `grad_fn(params) -> grads`; inside `MultiSteps`
      it is the last mini-batch's. 'lagged': as g_t itself.
    coupling: What the regularizer is added to: 'gradient', the base optimizer's input
      as in the paper, or 'update', its output. 'update' needs the running estimate, and
      clipping inside `fptt` then clips the loss gradient alone.
    state_dtype: Dtype of W̄ and λ. The default is each parameter's own dtype, but at
      least float32, since λ holds differences that bfloat16 would lose.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Updates have the gradients' dtype.
    Its `update` takes two extra arguments: `grad_fn`, and `inner_steps` (default 1),
    the number n of gradient steps per window. With n > 1, call `update` n times per
    window with gradients from the same hidden state. λ and W̄ then move on every n-th
    call only, and schedules count windows.

  Raises:
    ValueError: If an option or a hyperparameter is out of range. A schedule is checked
      in the first 65,536 windows and at some up to the millionth; where a traced value
      or a later one is out of range, the update is NaN. Also if `update` is called
      without parameters or with trees that do not match, or if 'recomputed' is used
      without `grad_fn` or inside `optax.masked` or `optax.partition`.
    TypeError: If `base` is not an optimizer, or parameters or gradients are not
      floating point.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import fptt_jax
    >>> tx = fptt_jax.fptt(optax.adam(1e-3), alpha=0.1)
    >>> params = {'w': jnp.ones(3)}
    >>> state = tx.init(params)
    >>> grads = jax.grad(lambda p: jnp.sum(p['w'] ** 2))(params)
    >>> updates, state = tx.update(grads, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> params_for_evaluation = fptt_jax.fptt_eval_params(state, params)

  References:
    Kag and Saligrama, "Training Recurrent Neural Networks via Forward Propagation
    Through Time", ICML 2021: Eqs. 4-6, Algorithm 2 and the λ recursion after Eq. 5.
  """
  _check_options(gradient_estimate, coupling)
  hyperparameters = check_hyperparameters(
    Hyperparameters(alpha, beta, kappa, linear_scale)
  )
  if state_dtype is not None:
    state_dtype = check_dtype('state_dtype', state_dtype)
  is_optimizer = hasattr(base, 'init') and hasattr(base, 'update')
  require_type(is_optimizer, 'base', 'an optimizer, such as optax.adam(1e-3)', base)
  base = optax.with_extra_args_support(base)
  init_fn = functools.partial(_init, base, state_dtype)

  def update_fn(
    grads: optax.Updates,
    state: FPTTState,
    params: optax.Params | None = None,
    *,
    inner_steps: jax.typing.ArrayLike = 1,
    **extra_args: Any,
  ) -> tuple[optax.Updates, FPTTState]:
    require(params is not None, 'params', 'the current parameters', params)
    _check_trees(grads, state, params)
    if not isinstance(inner_steps, jax.core.Tracer):
      inner_steps = check_size('inner_steps', inner_steps)
    window = state.step_count // jnp.asarray(inner_steps, jnp.int32)
    now = values_at(hyperparameters, window)
    step = _base_step if coupling == 'gradient' else _decoupled_step
    updates, base_state = step(base, now, grads, state, params, extra_args)
    # The rounded W_{t+1}, exactly as the caller will see it: bfloat16 parameters lose
    # part of the update.
    params_next = optax.apply_updates(params, updates)
    lam, w_bar = _move_state(
      gradient_estimate, now, inner_steps, grads, state, params_next, extra_args
    )
    updates = record_call(updates, inner_steps)
    return updates, FPTTState(
      optax.safe_increment(state.step_count), w_bar, lam, base_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def fptt_algorithm2(
  base: optax.GradientTransformation, alpha: Hyperparameter = 0.5
) -> optax.GradientTransformationExtraArgs:
  """Turn an optimizer into FPTT as the paper's Algorithm 2 prints it.

  This is :func:`fptt` with the coefficient 1/2 on λ and with λ recomputed at W_{t+1},
  which costs a second pass over each window. `update` therefore needs the extra
  argument `grad_fn`. Algorithm 2 also carries W_T instead of W_{T+1} to the next
  sequence, which drops the last update; neither the paper's text nor this function does
  that.

  Args:
    base: The optimizer that takes the step on the regularized gradient.
    alpha: α > 0, as for :func:`fptt`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError, TypeError: As for :func:`fptt`.

  Example:
    >>> import optax, fptt_jax
    >>> tx = fptt_jax.fptt_algorithm2(optax.sgd(0.1), alpha=0.5)
  """
  return fptt(base, alpha=alpha, linear_scale=0.5, gradient_estimate='recomputed')


def _check_options(gradient_estimate: str, coupling: str) -> None:
  """Raise unless the options exist and fit each other."""
  check_choice('gradient_estimate', gradient_estimate, GRADIENT_ESTIMATES)
  check_choice('coupling', coupling, COUPLINGS)
  # With the other estimates λ would be a gradient, not in units of the weights.
  fits = coupling == 'gradient' or gradient_estimate == 'running'
  accepted = "'running' with coupling='update'"
  require(fits, 'gradient_estimate', accepted, gradient_estimate)


def _init(
  base: optax.GradientTransformationExtraArgs,
  state_dtype: jax.typing.DTypeLike | None,
  params: optax.Params,
) -> FPTTState:
  """Return the state with W̄ = W and λ = 0."""
  base_state = base.init(params)
  _check_base_state(base_state)

  def summary(param: jax.Array) -> jax.Array:
    return jnp.array(param, dtype=_state_dtype(param, state_dtype), copy=True)

  def estimate(param: jax.Array) -> jax.Array:
    return jnp.zeros_like(param, dtype=_state_dtype(param, state_dtype))

  # All arrays are copies, so that a jitted step may donate both the parameters and the
  # state.
  return FPTTState(
    step_count=jnp.zeros([], jnp.int32),
    w_bar=jax.tree.map(summary, params),
    lam=jax.tree.map(estimate, params),
    base_optimizer_state=jax.tree.map(jnp.copy, base_state),
  )


def _base_step(
  base: optax.GradientTransformationExtraArgs,
  now: Hyperparameters,
  grads: optax.Updates,
  state: FPTTState,
  params: optax.Params,
  extra_args: Mapping[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
  """Return the base optimizer's updates, in the gradients' dtypes, and its new
  state.
  """

  def regularize(grads: optax.Updates, params: optax.Params) -> optax.Updates:
    return _regularized_gradient(grads, params, state.w_bar, state.lam, now)

  def regularized_grad_fn(params: optax.Params, step: Any = None) -> optax.Updates:
    del step  # Some optimizers pass the step size along.
    return regularize(extra_args['grad_fn'](params), params)

  regularized = regularize(grads, params)
  # Gradients that the base optimizer asks for must include the regularizer, which is
  # part of what it descends. `value` and `value_fn` are of the loss alone.
  base_args = dict(extra_args)
  if 'grad' in extra_args:
    base_args['grad'] = regularized
  if extra_args.get('grad_fn') is not None:
    base_args['grad_fn'] = regularized_grad_fn
  updates, base_state = base.update(
    regularized,
    state.base_optimizer_state,
    params,
    **accepted_args(base.update, base_args),
  )
  # A base optimizer may promote its updates, for example by a float32 learning rate.
  updates = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), updates, grads)
  return updates, base_state


def _decoupled_step(
  base: optax.GradientTransformationExtraArgs,
  now: Hyperparameters,
  grads: optax.Updates,
  state: FPTTState,
  params: optax.Params,
  extra_args: Mapping[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
  """Return u_t + c λ_t - κ α (W_t - W̄_t), in the gradients' dtypes, and the base
  optimizer's new state.
  """
  updates, base_state = base.update(
    grads, state.base_optimizer_state, params, **accepted_args(base.update, extra_args)
  )

  def leaf(
    u: jax.Array, g: jax.Array, w: jax.Array, wb: jax.Array, lm: jax.Array
  ) -> jax.Array:
    cast = _caster(wb)
    linear = cast(now.linear_scale) * cast(lm)
    quadratic = cast(now.kappa) * cast(now.alpha) * (cast(w) - cast(wb))
    return (cast(u) + linear - quadratic).astype(jnp.result_type(g))

  tied = jax.tree.map(leaf, updates, grads, params, state.w_bar, state.lam)
  return tied, base_state


def _move_state(
  gradient_estimate: str,
  now: Hyperparameters,
  inner_steps: jax.typing.ArrayLike,
  grads: optax.Updates,
  state: FPTTState,
  params_next: optax.Params,
  extra_args: Mapping[str, Any],
) -> tuple[optax.Params, optax.Params]:
  """Return λ and W̄ after this call: new ones if it ends a window, else the old
  ones.
  """
  ends_window = (state.step_count + 1) % jnp.asarray(inner_steps, jnp.int32) == 0
  one_step = isinstance(inner_steps, int) and inner_steps == 1

  def recomputed(params: optax.Params) -> optax.Params:
    return optax.tree.cast_like(_recomputed_gradient(params, extra_args), state.lam)

  if gradient_estimate == 'running':
    lam = _running_estimate(state.lam, params_next, state.w_bar, now.alpha)
  elif gradient_estimate == 'lagged':
    lam = grads
  elif one_step:
    lam = recomputed(params_next)
  else:
    # Only the last inner step needs the second pass over the window.
    lam = jax.lax.cond(ends_window, recomputed, lambda _: state.lam, params_next)
  lam = optax.tree.cast_like(lam, state.lam)
  w_bar = _running_summary(state.w_bar, params_next, lam, now.alpha, now.beta)
  if not one_step:
    lam = optax.tree.where(ends_window, lam, state.lam)
    w_bar = optax.tree.where(ends_window, w_bar, state.w_bar)
  return lam, w_bar


def _regularized_gradient(
  grads: optax.Updates,
  params: optax.Params,
  w_bar: optax.Params,
  lam: optax.Params,
  now: Hyperparameters,
) -> optax.Updates:
  """Return g'_t = g_t - c λ_t + κ α (W_t - W̄_t), in the gradients' dtypes."""

  def leaf(g: jax.Array, w: jax.Array, wb: jax.Array, lm: jax.Array) -> jax.Array:
    cast = _caster(wb)
    linear = cast(now.linear_scale) * cast(lm)
    quadratic = cast(now.kappa) * cast(now.alpha) * (cast(w) - cast(wb))
    return (cast(g) - linear + quadratic).astype(jnp.result_type(g))

  return jax.tree.map(leaf, grads, params, w_bar, lam)


def _running_estimate(
  lam: optax.Params,
  params_next: optax.Params,
  w_bar: optax.Params,
  alpha: jax.typing.ArrayLike,
) -> optax.Params:
  """Return λ_{t+1} = λ_t - α (W_{t+1} - W̄_t)."""

  def leaf(lm: jax.Array, w: jax.Array, wb: jax.Array) -> jax.Array:
    cast = _caster(wb)
    return cast(lm) - cast(alpha) * (cast(w) - cast(wb))

  return jax.tree.map(leaf, lam, params_next, w_bar)


def _running_summary(
  w_bar: optax.Params,
  params_next: optax.Params,
  lam_next: optax.Params,
  alpha: jax.typing.ArrayLike,
  beta: jax.typing.ArrayLike,
) -> optax.Params:
  """Return W̄_{t+1} = (1-β) W̄_t + β W_{t+1} - (β/α) λ_{t+1}."""

  def leaf(wb: jax.Array, w: jax.Array, lm: jax.Array) -> jax.Array:
    cast = _caster(wb)
    b = cast(beta)
    mixed = (1 - b) * cast(wb) + b * cast(w) - b / cast(alpha) * cast(lm)
    return mixed.astype(wb.dtype)

  return jax.tree.map(leaf, w_bar, params_next, lam_next)


def _recomputed_gradient(
  params_next: optax.Params, extra_args: Mapping[str, Any]
) -> optax.Updates:
  """Return ∇ℓ_t(W_{t+1}) by the caller's `grad_fn`."""
  grad_fn: Any = extra_args.get('grad_fn')
  accepted = "a function (params) -> gradient with gradient_estimate='recomputed'"
  require(grad_fn is not None, 'grad_fn', accepted, grad_fn)
  if any(map(is_masked, jax.tree.leaves(params_next, is_leaf=is_masked))):
    # grad_fn would get MaskedNodes in place of weights.
    raise ValueError(
      "gradient_estimate='recomputed' does not work inside optax.masked or "
      'optax.partition. Put the mask inside, fptt(optax.masked(base, ...)).'
    )
  grads: optax.Updates = grad_fn(params_next)
  same = have_same_structure(grads, params_next)
  require(same, 'the result of grad_fn', f'like {shapes(params_next)}', shapes(grads))
  return grads


def _caster(state_leaf: jax.Array) -> Callable[[jax.typing.ArrayLike], jax.Array]:
  """Return a cast to the dtype of the recursion: the state's, at least float32."""
  dtype = at_least_float32(state_leaf.dtype)
  return lambda x: jnp.asarray(x, dtype)


def _state_dtype(
  param: jax.typing.ArrayLike, state_dtype: jax.typing.DTypeLike | None
) -> jnp.dtype:
  """Return the dtype of W̄ and λ for a parameter."""
  hint = 'Keep others out of the trained tree, or use optax.partition.'
  require_type(is_floating(param), 'params', 'floating point', param, hint)
  if state_dtype is None:
    return at_least_float32(jnp.result_type(param))
  if jnp.iscomplexobj(param):
    like = describe(param)
    raise TypeError(f'state_dtype must be None for {like}, got {state_dtype!r}.')
  return jnp.dtype(state_dtype)


def _check_trees(grads: optax.Updates, state: FPTTState, params: optax.Params) -> None:
  """Raise unless the trees that `update` gets have the same structure and shapes."""
  trees = (grads, params, state.w_bar)
  names = 'grads, params and state.w_bar'
  same = have_same_shapes(grads, params) and have_same_shapes(state.w_bar, params)
  require(same, names, 'of the same structure and shapes', [*map(shapes, trees)])
  for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
    same = have_same_field(*leaves)
    got = [*map(describe, leaves)]
    require(same, names, 'floating point, all real or all complex', got, '', TypeError)


def _check_base_state(state: optax.OptState) -> None:
  """Raise if the base optimizer skips steps or evaluates the loss itself."""
  # λ and W̄ would move on calls without a step.
  skips = (
    optax.MultiStepsState,
    optax.ApplyIfFiniteState,
    optax.ApplyEvery,
    optax.ConditionallyMaskState,
  )
  # It would see the loss without the regularizer.
  searches = (
    optax.ScaleByZoomLinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
  )
  for node in nodes_of(state, *skips, *searches):
    got = describe(node)
    around = 'Put wrappers that skip steps around fptt; leave out apply_every.'
    accepted = 'an optimizer that steps on each call'
    require(type(node) not in skips, 'base', accepted, got, around)
    accepted = 'an optimizer without line search'
    require(type(node) not in searches, 'base', accepted, got)


def is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)
