"""FPTT as an optax gradient transformation: the regularized update of one window.

`lam` is the running estimate of the previous window's loss gradient and `w_bar` the
running summary of the weights. Both live in :class:`FPTTState`; the window's own loss
and the hidden state are none of this file's business.
"""

from collections.abc import Callable, Mapping
import inspect
from types import MappingProxyType
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fptt_jax._checks import (
  ARRAYS,
  FLOAT32_MAX,
  FLOAT32_TINY,
  check_choice,
  check_dtype,
  check_number,
  check_size,
  shapes,
)
from fptt_jax._dtypes import at_least_float32

Hyperparameter = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]

CORRECTIONS = {'eq6': 1.0, 'eq4': 0.5}
GRADIENT_ESTIMATES = ('running', 'recomputed', 'lagged')

ALGORITHM_2: Mapping[str, Any] = MappingProxyType(
  dict(beta=0.5, kappa=1.0, rho=0.0, correction='eq4', gradient_estimate='recomputed')
)
"""Keywords of the paper's Algorithm 2 as printed: `fptt(base, alpha=alpha,
**ALGORITHM_2)`.

Coefficient 1/(2 alpha) on the previous gradient, and that gradient is evaluated at
W_{t+1} (a second pass over the window). The algorithm box also carries W_T, not
W_{T+1}, to the next sequence, which drops the last update; the paper's text does not,
nor do we.
"""

RELEASE: Mapping[str, Any] = MappingProxyType(
  dict(beta=0.5, kappa=1.0, rho=0.0, correction='eq6', gradient_estimate='running')
)
"""Keywords of the authors' 2021 release: Eq. 6 with the running estimate; also the
defaults of :func:`fptt`.

The release uses alpha 0.1 on images, 0.5 on the adding problem; on language `kappa` is
2 (alpha 0.5 for PTB-300, 0.2 for PTB-c and PTB-w, the last with `beta` 0.7).
"""


class FPTTState(NamedTuple):
  """State of :func:`fptt`.

  Attributes:
    step_count: int32 [], calls of `update` so far (windows times `inner_steps`).
    w_bar: W̄_t, tree of the parameters' shapes, dtype as `state_dtype` says.
    lam: λ_t, the running estimate of the previous window's loss gradient, like `w_bar`.
    base_optimizer_state: state of the wrapped optimizer.
  """

  step_count: jax.Array
  w_bar: optax.Params
  lam: optax.Params
  base_optimizer_state: optax.OptState


def fptt(
  base_optimizer: optax.GradientTransformation,
  *,
  alpha: Hyperparameter = 0.5,
  beta: Hyperparameter = 0.5,
  kappa: Hyperparameter = 1.0,
  rho: Hyperparameter = 0.0,
  correction: str = 'eq6',
  gradient_estimate: str = 'running',
  inner_steps: int = 1,
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Turns `base_optimizer` into Forward Propagation Through Time.

  Call `update` once a window, with the gradient :math:`g_t` of that window's loss at
  :math:`W_t` (hidden state of the previous window held constant):

  .. math::

    \begin{align*}
      g'_t & = g_t - c\,(1-\rho)\,\lambda_t + \kappa\alpha\,(W_t - \bar W_t) \\ W_{t+1}
      & = \text{base optimizer's step on } g'_t \\ \lambda_{t+1} & = \lambda_t -
      \alpha\,(W_{t+1} - \bar W_t), & \lambda_0 & = 0 \\ \bar W_{t+1} & =
      (1-\beta)\,\bar W_t + \beta\,W_{t+1} - \tfrac{\beta}{\alpha}\,\lambda_{t+1}, &
      \bar W_0 & = W_0
    \end{align*}

  with c = 1 (`correction='eq6'`) or 1/2 (`'eq4'`, as Eq. 4 and Algorithm 2 print it;
  the paper contradicts itself here). The first update of a fresh state equals the base
  optimizer's. If the inner problem were solved to its arg-min with c = κ = 1 and ρ = 0,
  λ_{t+1} would be the gradient of the window's loss at W_{t+1}, and the last line the
  paper's Eq. 5 (which is not itself a first-order condition, as the paper says).

  Compose it like this: gradient clipping before it (`optax.chain(clip, fptt(base))`)
  clips the loss gradient; inside (`fptt(optax.chain(clip, base))`) it clips loss plus
  regularizer, as the authors' release does. `MultiSteps(fptt(base))` and
  `apply_if_finite(fptt(base), n)` are right, the reverse nestings are refused: λ and W̄
  would move on skipped steps. Nothing may change the updates after `fptt`; a trainer
  refuses an optimizer that does, in a loop of your own nothing can see to it. With
  'recomputed' keep the clipping inside: λ is the gradient `grad_fn` returns, unclipped,
  and against a g_t clipped before it is of another scale. `optax.masked` lets the raw
  gradient of left-out leaves through (they move!): to freeze them use `optax.partition`
  with `optax.set_to_zero()`.

  Args:
    base_optimizer: takes the step on the regularized gradient.
    alpha: α > 0, strength of the tie of W to W̄; a number, an array [] or an optax
      schedule over windows ("starting small, gradually increased", Sec. 3.1).
    beta: β in (0, 1], mixing of W̄; number or schedule. Above 1/2 the old mean gets a
      negative weight (1 - 2β): warned about.
    kappa: κ >= 0, scale of the quadratic term only; number or schedule. The release's
      language runs use 2.
    rho: ρ in [0, 1], fades the linear term; number or schedule.
    correction: 'eq6' or 'eq4', the coefficient c above.
    gradient_estimate: what λ_{t+1} is. 'running': the recursion above, no extra cost.
      'recomputed': the gradient of the same window's loss at W_{t+1} from the same
      hidden state; `update` then needs the extra argument `grad_fn(params) -> grads`
      (one more forward and backward pass; inside `MultiSteps` it is the last
      mini-batch's). 'lagged': g_t itself.
    inner_steps: gradient steps a window towards the arg-min of Eq. 4. With n > 1, λ and
      W̄ move on every n-th call only and schedules count windows; the caller gives
      gradients of the same window, from the same hidden state, n times.
    state_dtype: dtype of W̄ and λ. Default: the parameter's own, but at least float32,
      since λ holds differences that bfloat16 loses.

  Returns:
    An `optax.GradientTransformationExtraArgs`; updates have the gradients' dtype.

  Raises:
    ValueError: an option or hyper-parameter outside its range (checked here unless it
      is traced; of a schedule in the first 65,536 windows and some up to the millionth;
      where it is found later, the update is NaN), or `update` called without params or
      with trees that do not fit each other, or 'recomputed' without `grad_fn` or under
      `optax.masked`/`optax.partition`.
    TypeError: `base_optimizer` is no transformation, or `init` on parameters or
      `update` on gradients that are not floating point, or `update` on another state.

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

  References: Kag and Saligrama, "Training Recurrent Neural Networks via Forward
    Propagation Through Time", ICML 2021: Eqs. 4-6, Algorithm 2 and the λ recursion
    after Eq. 5.
  """
  check_choice('correction', correction, sorted(CORRECTIONS))
  check_choice('gradient_estimate', gradient_estimate, GRADIENT_ESTIMATES)
  alpha, beta, kappa, rho = _checked_hyperparameters(
    dict(alpha=alpha, beta=beta, kappa=kappa, rho=rho)
  )
  if not isinstance(inner_steps, jax.core.Tracer):
    inner_steps = check_size('inner_steps', inner_steps)
  if not isinstance(base_optimizer, optax.GradientTransformation):
    raise TypeError(
      'base_optimizer must be an optax.GradientTransformation, such as '
      f'optax.adam(1e-3), got {base_optimizer!r}.'
    )
  if state_dtype is not None:
    state_dtype = check_dtype('state_dtype', state_dtype)
  base = optax.with_extra_args_support(base_optimizer)
  c = CORRECTIONS[correction]

  def init_fn(params: optax.Params) -> FPTTState:
    base_state = base.init(params)
    _check_base_state(base_state)
    return FPTTState(
      step_count=jnp.zeros([], jnp.int32),
      # Copies, so that a jitted step may donate both the parameters and the state.
      w_bar=jax.tree.map(
        lambda p: jnp.array(p, dtype=_state_dtype(p, state_dtype), copy=True), params
      ),
      lam=jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=_state_dtype(p, state_dtype)), params
      ),
      base_optimizer_state=jax.tree.map(jnp.copy, base_state),
    )

  def update_fn(
    grads: optax.Updates,
    state: FPTTState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, FPTTState]:
    if params is None:
      raise ValueError(
        'fptt needs the current parameters: call update(grads, state, params), got '
        'params=None.'
      )
    _check_trees(grads, state, params)
    callers_steps = extra_args.pop('inner_steps', inner_steps)
    if isinstance(inner_steps, int) and callers_steps != inner_steps:
      raise ValueError(
        f'fptt was built with inner_steps={inner_steps}, got a caller that takes '
        f'inner_steps={callers_steps} a window.'
      )
    window_count = state.step_count // jnp.asarray(inner_steps, jnp.int32)
    hyperparameters = {'alpha': alpha, 'beta': beta, 'kappa': kappa, 'rho': rho}
    alpha_t, beta_t, kappa_t, rho_t = (
      _value_at(name, h, window_count) for name, h in hyperparameters.items()
    )

    regularize = lambda g, p: _regularized_gradient(
      g, p, state.w_bar, state.lam, alpha_t, kappa_t, c * (1 - rho_t)
    )
    regularized = regularize(grads, params)
    base_args = dict(extra_args)
    if 'grad' in extra_args:
      base_args['grad'] = regularized
    if (
      extra_args.get('grad_fn') is not None
    ):  # What the base optimizer descends has the regularizer in it.
      base_args['grad_fn'] = lambda p, step=None: regularize(
        extra_args['grad_fn'](p), p
      )
    updates, base_state = base.update(
      regularized,
      state.base_optimizer_state,
      params,
      **accepted(base.update, base_args),
    )
    updates = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), updates, grads)
    # The rounded W_{t+1}, exactly as the caller will see it: bfloat16 parameters lose
    # part of the update.
    params_next = optax.apply_updates(params, updates)

    ends_window = (state.step_count + 1) % jnp.asarray(inner_steps, jnp.int32) == 0
    one_step = isinstance(inner_steps, int) and inner_steps == 1
    if gradient_estimate == 'running':
      lam_next = _running_estimate(state.lam, params_next, state.w_bar, alpha_t)
    elif gradient_estimate == 'lagged':
      lam_next = grads
    else:
      explicit = lambda p: optax.tree.cast_like(
        _explicit_gradient(p, extra_args), state.lam
      )
      # The second pass is needed after the last inner step only.
      lam_next = (
        explicit(params_next)
        if one_step
        else jax.lax.cond(ends_window, explicit, lambda _: state.lam, params_next)
      )
    lam_next = optax.tree.cast_like(lam_next, state.lam)
    w_bar_next = _running_summary(state.w_bar, params_next, lam_next, alpha_t, beta_t)
    if not one_step:
      lam_next = optax.tree.where(ends_window, lam_next, state.lam)
      w_bar_next = optax.tree.where(ends_window, w_bar_next, state.w_bar)
    for seen in _RECORDS:
      seen.extend(jax.tree.leaves(updates))
    return updates, FPTTState(
      optax.safe_increment(state.step_count), w_bar_next, lam_next, base_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def fptt_eval_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
  """Returns W̄, the parameters to evaluate FPTT at (the release evaluates here; W
  itself is the other choice).

  Args:
    opt_state: any optimizer state that holds one or more :class:`FPTTState`, however
      deep (chains, masks, `MultiSteps`, `inject_hyperparams`, `apply_if_finite`,
      `partition`; several are merged).
    params: the current parameters; leaves that no state covers come back as they are.

  Returns:
    W̄ cast to the parameters' dtypes, a copy.

  Raises:
    ValueError: there is no FPTTState in `opt_state`, or its W̄ does not fit `params`.

  Example: With `flax.training.train_state.TrainState` these are `state.opt_state` and
    `state.params`; with `nnx.Optimizer`:

    >>> import optax, fptt_jax
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, fptt_jax.fptt(optax.adam(1e-3)), wrt=nnx.Param)
    >>> w_bar = fptt_jax.fptt_eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    >>> evaluated = nnx.clone(model)
    >>> nnx.update(evaluated, w_bar)
  """
  summary = params
  for state in _fptt_states(opt_state):
    summary = _overlay(state.w_bar, summary)
  return jax.tree.map(
    lambda w, p: jnp.array(w, dtype=jnp.result_type(p), copy=True), summary, params
  )


def fptt_restart(
  opt_state: optax.OptState, params: optax.Params
) -> tuple[optax.Params, optax.OptState]:
  """Restarts the recursion at its summary: W := W̄, λ := 0; the base optimizer's state
  is kept.

  The release does this after each epoch (not for PTB-300 and PTB-c, where λ is kept).
  Call it between windows: with `inner_steps` > 1 the calls of a window already begun
  still count.

  Args:
    opt_state: as for :func:`fptt_eval_params`.
    params: the current parameters; leaves that no state covers come back as they are.

  Returns: (params, opt_state). The next update equals the base optimizer's: W̄ is set
    to the returned W, rounding included.

  Raises:
    ValueError: as for :func:`fptt_eval_params`.

  Example: With flax's `TrainState`, `state.replace(params=params, opt_state=opt_state)`
    of what this returns; with `nnx.Optimizer`:

    >>> import optax, fptt_jax
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, fptt_jax.fptt(optax.adam(1e-3)), wrt=nnx.Param)
    >>> params, optimizer.opt_state = fptt_jax.fptt_restart(optimizer.opt_state, nnx.state(model, nnx.Param))
    >>> nnx.update(model, params)
  """
  params_next = fptt_eval_params(opt_state, params)

  def restart(node: Any) -> Any:
    if not isinstance(node, FPTTState):
      return node
    w_bar = jax.tree.map(
      lambda w, p: w if _is_masked(w) else jnp.array(p, dtype=w.dtype, copy=True),
      node.w_bar,
      _in_structure_of(node.w_bar, params_next),
      is_leaf=_is_masked,
    )
    return node._replace(w_bar=w_bar, lam=optax.tree.zeros_like(node.lam))

  return params_next, jax.tree.map(restart, opt_state, is_leaf=_is_state)


def _regularized_gradient(
  grads: optax.Updates,
  params: optax.Params,
  w_bar: optax.Params,
  lam: optax.Params,
  alpha: jax.typing.ArrayLike,
  kappa: jax.typing.ArrayLike,
  lam_coefficient: jax.typing.ArrayLike,
) -> optax.Updates:
  """g'_t = g_t - c (1-ρ) λ_t + κ α (W_t - W̄_t): the analytic gradient of loss +
  regularizer, in the gradient's dtype.
  """

  def leaf(g: jax.Array, w: jax.Array, wb: jax.Array, l: jax.Array) -> jax.Array:
    cast = _caster(wb)
    g_next = (
      cast(g)
      - cast(lam_coefficient) * cast(l)
      + cast(kappa) * cast(alpha) * (cast(w) - cast(wb))
    )
    return g_next.astype(jnp.result_type(g))

  return jax.tree.map(leaf, grads, params, w_bar, lam)


def _running_estimate(
  lam: optax.Params,
  params_next: optax.Params,
  w_bar: optax.Params,
  alpha: jax.typing.ArrayLike,
) -> optax.Params:
  """λ_{t+1} = λ_t - α (W_{t+1} - W̄_t)."""

  def leaf(l: jax.Array, w: jax.Array, wb: jax.Array) -> jax.Array:
    cast = _caster(wb)
    return cast(l) - cast(alpha) * (cast(w) - cast(wb))

  return jax.tree.map(leaf, lam, params_next, w_bar)


def _running_summary(
  w_bar: optax.Params,
  params_next: optax.Params,
  lam_next: optax.Params,
  alpha: jax.typing.ArrayLike,
  beta: jax.typing.ArrayLike,
) -> optax.Params:
  """W̄_{t+1} = (1-β) W̄_t + β W_{t+1} - (β/α) λ_{t+1}."""

  def leaf(wb: jax.Array, w: jax.Array, l: jax.Array) -> jax.Array:
    cast = _caster(wb)
    b = cast(beta)
    return ((1 - b) * cast(wb) + b * cast(w) - b / cast(alpha) * cast(l)).astype(
      wb.dtype
    )

  return jax.tree.map(leaf, w_bar, params_next, lam_next)


def _explicit_gradient(
  params_next: optax.Params, extra_args: Mapping[str, Any]
) -> optax.Updates:
  """∇ℓ_t(W_{t+1}) through the caller's `grad_fn`."""
  grad_fn: Callable[[optax.Params], optax.Updates] | None = extra_args.get('grad_fn')
  if grad_fn is None:
    raise ValueError(
      "fptt(gradient_estimate='recomputed') evaluates the window's gradient at "
      'W_{t+1}: call update(grads, state, params, '
      'grad_fn=f) with f(params) -> grads over the same window from the same hidden '
      'state; got no grad_fn.'
    )
  if any(_is_masked(leaf) for leaf in jax.tree.leaves(params_next, is_leaf=_is_masked)):
    raise ValueError(
      "fptt(gradient_estimate='recomputed') got masked parameters: inside optax.masked "
      'or optax.partition its grad_fn would see '
      'MaskedNodes instead of weights. Put the mask inside, fptt(optax.masked(base, '
      "...)), or use 'running' or 'lagged'."
    )
  grads = grad_fn(params_next)
  if not _same_structure(grads, params_next):
    raise ValueError(
      'grad_fn must return gradients of the structure of the parameters, '
      f'{jax.tree.structure(params_next)}, got '
      f'{jax.tree.structure(grads)}.'
    )
  return grads


def _caster(state_leaf: jax.Array) -> Callable[[jax.typing.ArrayLike], jax.Array]:
  """Casts to the dtype the recursion is computed in: the state's own, at least
  float32.
  """
  dtype = at_least_float32(state_leaf.dtype)
  return lambda x: jnp.asarray(x, dtype)


def _state_dtype(
  param: jax.typing.ArrayLike, state_dtype: jax.typing.DTypeLike | None
) -> jnp.dtype:
  if not _is_floating(param):
    raise TypeError(
      f'fptt needs floating-point parameters, got a leaf of {_described(param)}: keep '
      'it out of the trained tree, or give it '
      'another transformation with optax.partition.'
    )
  if state_dtype is not None and jnp.iscomplexobj(param):
    raise TypeError(
      f'state_dtype must be left out with complex parameters, got {state_dtype!r} and '
      f'a leaf of {_described(param)}.'
    )
  return (
    jnp.dtype(state_dtype)
    if state_dtype is not None
    else at_least_float32(jnp.result_type(param))
  )


def _is_floating(leaf: Any) -> bool:
  return (
    jnp.issubdtype(leaf.dtype, jnp.inexact)
    if isinstance(leaf, ARRAYS)
    else isinstance(leaf, float | complex)
  )


def _described(leaf: Any) -> str:
  return (
    f'dtype {leaf.dtype} and shape {leaf.shape}'
    if isinstance(leaf, ARRAYS)
    else f'type {type(leaf).__name__}'
  )


def _check_trees(grads: optax.Updates, state: FPTTState, params: optax.Params) -> None:
  """Raises unless the trees that `update` is given belong together."""
  if not isinstance(state, FPTTState):
    raise TypeError(
      f'fptt needs the FPTTState that init returned, got {type(state).__name__}.'
    )
  if not _fit(grads, params) or not _fit(state.w_bar, params):
    raise ValueError(
      'gradients, parameters and W̄ must have the same structure and shapes, got '
      f'gradients {shapes(grads)}, parameters '
      f'{shapes(params)}, W̄ {shapes(state.w_bar)}.'
    )
  for leaves in zip(*map(jax.tree.leaves, (grads, params, state.w_bar)), strict=True):
    if not _alike(*leaves):
      raise TypeError(
        'fptt needs gradients, parameters and W̄ that are all floating-point, and all '
        'complex if one is, got leaves of '
        f'{", ".join(map(_described, leaves))}.'
      )


def _same_structure(a: Any, b: Any) -> bool:
  structure: Any = jax.tree.structure(a)
  return bool(structure == jax.tree.structure(b))


def _fit(a: Any, b: Any) -> bool:
  return _same_structure(a, b) and jax.tree.all(
    jax.tree.map(lambda x, y: shapes(x) == shapes(y), a, b)
  )


def _alike(*leaves: Any) -> bool:
  """Whether all are floating-point, and all complex if one is."""
  return all(map(_is_floating, leaves)) and len(set(map(jnp.iscomplexobj, leaves))) == 1


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)


def _is_state(node: Any) -> bool:
  return isinstance(node, FPTTState)


def accepted(
  update: Callable[..., Any], extra_args: Mapping[str, Any]
) -> dict[str, Any]:
  """Return those of the extra arguments that an optimizer's `update` takes."""
  parameters = inspect.signature(update).parameters.values()
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
    return dict(extra_args)
  names = {parameter.name for parameter in parameters}
  return {name: value for name, value in extra_args.items() if name in names}


def find_states(opt_state: optax.OptState) -> list[FPTTState]:
  """Every FPTTState in an optimizer's state, however deep."""
  return [
    node for node in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(node)
  ]


def lambda_norm(opt_state: optax.OptState) -> jax.Array:
  """Global norm of λ over every FPTTState in an optimizer's state, float32 []; 0 where
  there is none.
  """
  estimates = [
    jax.tree.map(lambda l: l.astype(at_least_float32(l.dtype)), state.lam)
    for state in find_states(opt_state)
  ]
  return optax.tree.norm(estimates).astype(jnp.float32)


def _fptt_states(opt_state: optax.OptState) -> list[FPTTState]:
  states = find_states(opt_state)
  if not states:
    raise ValueError(
      f'the optimizer state must hold an FPTTState, got a {type(opt_state).__name__} '
      'without one: pass the state of a '
      'transformation that contains fptt(...). For an optimizer without FPTT evaluate '
      'at the parameters themselves.'
    )
  return states


def _in_structure_of(like: Any, tree: Any) -> Any:
  """`tree` in the structure of `like`, if only the types of their nodes differ; else
  `tree` itself.

  `nnx.Optimizer` keeps W̄ and λ in variables of a type of its own, in the places of the
  parameters' variables.
  """
  leaves, paths = (
    jax.tree.leaves(tree),
    [path for path, _ in jax.tree.leaves_with_path(tree)],
  )
  if paths != [path for path, _ in jax.tree.leaves_with_path(like)]:
    return tree
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _overlay(w_bar: optax.Params, params: optax.Params) -> optax.Params:
  """`w_bar` where it has leaves, `params` (leaf or whole subtree) where it is
  masked.
  """
  w_bar = _in_structure_of(params, w_bar)

  def leaf(w: Any, p: Any) -> Any:
    if _is_masked(w):
      return p
    if not _fit(p, w) or not _alike(p, w):
      raise ValueError('not the same leaf')
    return w

  try:
    return jax.tree.map(leaf, w_bar, params, is_leaf=_is_masked)
  except (ValueError, TypeError) as error:
    raise ValueError(
      'the FPTTState does not belong to these parameters: W̄ has the structure and '
      'shapes '
      f'{shapes(w_bar)}, got parameters of {shapes(params)}.'
    ) from error


_RECORDS: list[list[Any]] = []
"""What every `fptt` puts its updates into, for :func:`check_nothing_follows`."""


def check_nothing_follows(
  optimizer: optax.GradientTransformationExtraArgs,
  params: optax.Params,
  extra_args: Mapping[str, Any],
) -> None:
  """Raise if updates are changed after `fptt`, which would follow weights that never
  were.

  It traces one update, computing nothing: what `fptt` returned has to come out of the
    optimizer as it is.

  Args:
    optimizer: Any optimizer; one without `fptt` passes if it can be called.
    params: The parameters, or their shapes.
    extra_args: The extra arguments of its update.

  Raises:
    ValueError: Updates are changed.
    TypeError: The optimizer asks for other extra arguments.
  """
  changed = False

  def update(params: optax.Params) -> optax.Updates:
    nonlocal changed
    state = optimizer.init(params)
    seen: list[Any] = []
    _RECORDS.append(seen)
    try:
      given = accepted(optimizer.update, {**extra_args, 'grad': params})
      updates, _ = optimizer.update(params, state, params, **given)
    finally:
      _RECORDS.remove(seen)
    # These two apply updates or leave them out, by branches, and change nothing else.
    branches = (optax.MultiStepsState, optax.ApplyIfFiniteState)
    branch = any(isinstance(node, branches) for node in _nodes(state, branches))
    returned = {id(leaf) for leaf in jax.tree.leaves(updates)}
    changed = not branch and any(id(leaf) not in returned for leaf in seen)
    return updates

  try:
    jax.eval_shape(update, params)
  except TypeError as error:
    raise TypeError(
      'optimizer cannot be used by a trainer, which calls its update with those of '
      f'{sorted(extra_args)} that it takes: {error}'
    ) from error
  if changed:
    raise ValueError(
      'optimizer changes the updates after fptt(...), whose W̄ and λ would follow '
      'weights that were never applied: put the '
      'rest inside, fptt(optax.chain(base, rest)), or in front, optax.chain(first, '
      'fptt(base)).'
    )


def _nodes(state: Any, kinds: tuple[type, ...]) -> list[Any]:
  """Return the nodes of an optimizer's state that are of some kinds, or leaves."""
  return jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))


def _check_base_state(state: optax.OptState) -> None:
  """Raise if the optimizer within `fptt` leaves steps out, or searches along the loss
  without the regularizer.
  """
  refused = {
    optax.MultiStepsState: 'MultiSteps must be around fptt, MultiSteps(fptt(base), n): λ and W̄ would move on calls without a step',
    optax.ApplyIfFiniteState: 'apply_if_finite must be around fptt: λ and W̄ would move on calls without a step',
    optax.ScaleByZoomLinesearchState: 'a line search does not go into fptt: it would see the loss without the regularizer',
    optax.ScaleByBacktrackingLinesearchState: 'a line search does not go into fptt: it would see the loss without the regularizer',
  }
  for node in _nodes(state, tuple(refused)):
    if type(node) in refused:
      raise ValueError(
        f'base_optimizer got a {type(node).__name__}: {refused[type(node)]}.'
      )


def _value_at(
  name: str, value: Hyperparameter, window: jax.Array
) -> jax.typing.ArrayLike:
  """Return a hyperparameter's value at a window; NaN, which nobody can miss, in place
  of one that is out of range.
  """
  if isinstance(value, float):  # Checked when it was given.
    return value
  low, high, _ = RANGES[name]
  now = jnp.asarray(value(window) if callable(value) else value)
  return jnp.where((now >= low) & (now <= high), now, jnp.nan)


RANGES = {
  'alpha': (FLOAT32_TINY, FLOAT32_MAX, 'a finite number > 0'),
  'beta': (FLOAT32_TINY, 1.0, 'a number in (0, 1]'),
  'kappa': (0.0, FLOAT32_MAX, 'a finite number >= 0'),
  'rho': (0.0, 1.0, 'a number in [0, 1]'),
}
"""Least and greatest value of each hyper-parameter, and the range in words."""


def _checked_hyperparameters(
  hyperparameters: Mapping[str, Hyperparameter],
) -> list[Hyperparameter]:
  """The hyper-parameters, those that have a value yet as floats."""
  checked = []
  for name, value in hyperparameters.items():
    first = value(jnp.zeros([], jnp.int32)) if callable(value) else value
    if isinstance(first, jax.core.Tracer):
      checked.append(value)
      continue
    low, high, expected = RANGES[name]
    which = f'{name} at window 0' if callable(value) else name
    number = check_number(which, first, low, high, f'{expected} or a schedule')
    if callable(value):
      _check_schedule(name, value)
    if name == 'beta' and number > 0.5:
      warnings.warn(
        f'fptt with beta={number:g} > 0.5 extrapolates: W̄ weighs its old value by 1 - '
        f'2 beta = {1 - 2 * number:g}, and momentum '
        'makes it unstable early (see fptt_jax.spectral_radius).',
        stacklevel=3,
      )
    checked.append(value if callable(value) else number)
  return checked


def _check_schedule(
  name: str, schedule: Callable[[jax.Array], jax.typing.ArrayLike]
) -> None:
  """Raise unless a schedule stays in its range in the first 65,536 windows, and at some
  hundreds up to the millionth.
  """
  windows = np.unique(
    np.concatenate([np.arange(2**16), np.geomspace(2**16, 10**6, 512)]).astype(np.int32)
  )
  low, high, expected = RANGES[name]
  try:
    values = np.asarray(jax.vmap(schedule)(jnp.asarray(windows)), np.float64)
  except (
    jax.errors.ConcretizationTypeError
  ):  # It takes plain numbers alone: a table, say, of unknown length.
    return
  bad = ~((values >= low) & (values <= high))
  if bad.any():
    first = int(bad.argmax())
    raise ValueError(
      f'{name} at window {windows[first]} must be {expected}, got {values[first]:g} '
      'from the schedule.'
    )
