"""W̄ and λ in the state of an optimizer, at any depth."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fptt_jax._checks import describe, require
from fptt_jax._dtypes import widen
from fptt_jax._transform import FPTTState, is_masked
from fptt_jax._trees import have_same_field, have_same_shapes, nodes_of, shapes


def fptt_eval_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
  """Return W̄, the parameters at which the authors' release evaluates.

  The alternative is to evaluate at W itself.

  Args:
    opt_state: An optimizer state that holds one :class:`FPTTState` or more at any depth
      (chains, masks, `MultiSteps`, `inject_hyperparams`, `apply_if_finite`,
      `partition`). Several are merged.
    params: The current parameters. Leaves that no state covers are returned unchanged.

  Returns:
    A copy of W̄ in the parameters' dtypes.

  Raises:
    ValueError: If `opt_state` holds no FPTTState, or its W̄ does not match `params`.

  Example:
    With `flax.training.train_state.TrainState`, pass `state.opt_state` and
    `state.params`. With `nnx.Optimizer`:

    >>> import optax, fptt_jax
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, fptt_jax.fptt(optax.adam(1e-3)), wrt=nnx.Param)
    >>> params = nnx.state(model, nnx.Param)
    >>> w_bar = fptt_jax.fptt_eval_params(optimizer.opt_state, params)
    >>> evaluated = nnx.clone(model)
    >>> nnx.update(evaluated, w_bar)
  """
  states = find_states(opt_state)
  accepted = 'the state of an optimizer with fptt(...) in it'
  require(states, 'opt_state', accepted, describe(opt_state))
  summary = params
  for state in states:
    summary = _overlay(state.w_bar, summary)

  def as_param(w: jax.Array, p: jax.Array) -> jax.Array:
    return jnp.array(w, dtype=jnp.result_type(p), copy=True)

  return jax.tree.map(as_param, summary, params)


def fptt_restart(
  opt_state: optax.OptState, params: optax.Params
) -> tuple[optax.Params, optax.OptState]:
  """Restart the recursion at its summary: W := W̄ and λ := 0.

  The base optimizer's state is kept. The release does this after each epoch, except on
  PTB-300 and PTB-c. Call it between windows: with `inner_steps` > 1, the calls within
  an unfinished window still count. Call it before `Trainer.end_epoch`, whose hidden
  state starts from the weights that it gets.

  Args:
    opt_state: As for :func:`fptt_eval_params`.
    params: The current parameters. Leaves that no state covers are returned unchanged.

  Returns:
    (params, opt_state). The next update equals the base optimizer's, because W̄ is set
    to the returned W, rounding included.

  Raises:
    ValueError: As for :func:`fptt_eval_params`.

  Example:
    With flax's `TrainState`, call
    `state.replace(params=params, opt_state=opt_state)` with the result. With
    `nnx.Optimizer`:

    >>> import optax, fptt_jax
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, fptt_jax.fptt(optax.adam(1e-3)), wrt=nnx.Param)
    >>> params = nnx.state(model, nnx.Param)
    >>> params, opt_state = fptt_jax.fptt_restart(optimizer.opt_state, params)
    >>> optimizer.opt_state = opt_state
    >>> nnx.update(model, params)
  """
  params_next = fptt_eval_params(opt_state, params)

  def as_summary(w: Any, p: Any) -> Any:
    if is_masked(w):
      return w
    return jnp.array(p, dtype=w.dtype, copy=True)

  def restart(node: Any) -> Any:
    if not isinstance(node, FPTTState):
      return node
    source = _in_structure_of(node.w_bar, params_next)
    w_bar = jax.tree.map(as_summary, node.w_bar, source, is_leaf=is_masked)
    return node._replace(w_bar=w_bar, lam=optax.tree.zeros_like(node.lam))

  return params_next, jax.tree.map(restart, opt_state, is_leaf=_is_state)


def find_states(opt_state: optax.OptState) -> list[FPTTState]:
  """Return every FPTTState in an optimizer's state, at any depth."""
  return nodes_of(opt_state, FPTTState)


def lambda_norm(opt_state: optax.OptState) -> jax.Array:
  """Return the global norm of λ in an optimizer's state, float32 []; 0 without FPTT."""
  estimates = [jax.tree.map(widen, state.lam) for state in find_states(opt_state)]
  return optax.tree.norm(estimates).astype(jnp.float32)


def _is_state(node: Any) -> bool:
  return isinstance(node, FPTTState)


def _in_structure_of(like: Any, tree: Any) -> Any:
  """Return `tree` in the structure of `like` if their leaves have the same paths.

  `nnx.Optimizer` keeps W̄ and λ in variables of another type than the parameters', at
  the same paths. A tree with other paths is returned as it is.
  """
  paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
  if paths != [path for path, _ in jax.tree.leaves_with_path(like)]:
    return tree
  return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def _overlay(w_bar: optax.Params, params: optax.Params) -> optax.Params:
  """Return `w_bar` where it has leaves, and `params` where it is masked."""
  w_bar = _in_structure_of(params, w_bar)

  def leaf(w: Any, p: Any) -> Any:
    if is_masked(w):
      return p  # A leaf or a whole subtree.
    if not have_same_shapes(p, w) or not have_same_field(p, w):
      raise ValueError('not the same leaf')
    return w

  try:
    return jax.tree.map(leaf, w_bar, params, is_leaf=is_masked)
  except (ValueError, TypeError) as error:
    message = f'params must be like W̄, {shapes(w_bar)}, got {shapes(params)}.'
    raise ValueError(message) from error
