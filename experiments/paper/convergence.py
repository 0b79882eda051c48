"""Measurement of the assumptions behind the paper's convergence argument, Prop. 1.

If W_t converges, W_t - W̄_t must vanish. λ must approach the gradient that it estimates;
the two are equal only if the inner problem is solved exactly. The limit must be
stationary for the mean loss of all windows. Each is measured while FPTT trains.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np
import optax
from tqdm import tqdm

from experiments import add_task
from experiments.core import plotting
import fptt_jax

LABELS = {
  'distance': r'$\|W_t - \bar W_t\|$',
  'lam_gap': (
    r'$\|\lambda_{t+1} - \nabla\ell_t(W_{t+1})\| \,/\, '
    r'\|\nabla\ell_t(W_{t+1})\|$'
  ),
  'path_gradient': r'$\|\mathrm{mean}_t \nabla\ell_t(W_{t+1})\|$',
  'stationarity': r'$\|\mathrm{mean}_t \nabla\ell_t(W)\|$, fixed data',
  'train_loss': 'mean window loss',
}
"""Labels of the entries of a row of :func:`study`."""


class MonitoredState(NamedTuple):
  """State of :func:`monitored`, with sums since the last :func:`read`.

  Attributes:
    windows: int32 [], number of windows in the sums.
    distance: float [], sum of the norms of W_{t+1} - W̄_{t+1}.
    lam_gap: float [], sum of the relative errors of λ_{t+1}.
    gradient: tree like the parameters, sum of the true gradients at W_{t+1}.
    optimizer_state: state of the wrapped optimizer.
  """

  windows: jax.Array
  distance: jax.Array
  lam_gap: jax.Array
  gradient: optax.Updates
  optimizer_state: optax.OptState


def find_states(opt_state: optax.OptState) -> list[fptt_jax.FPTTState]:
  """Return the states of `fptt` in an optimizer's state."""

  def is_state(node: Any) -> bool:
    return isinstance(node, fptt_jax.FPTTState)

  nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
  return [node for node in nodes if is_state(node)]


def monitored(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Wrap an optimizer so that its state measures convergence after each window.

  The updates stay those of `optimizer`. `update` needs the extra argument `grad_fn`,
  which the trainer passes. With it the gradient of the window's loss at W_{t+1} is
  computed from the same hidden state, which costs another forward and backward pass.

  Args:
    optimizer: an optimizer that contains exactly one `fptt`.

  Returns:
    The transformation, whose state is a :class:`MonitoredState`. Its `init` raises
    ValueError if `optimizer` does not contain exactly one `fptt`.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params: optax.Params) -> MonitoredState:
    state = optimizer.init(params)
    if len(find_states(state)) != 1:
      raise ValueError(
        'monitored needs an optimizer with exactly one fptt(...) in it, got '
        f'{len(find_states(state))}.'
      )
    # Two arrays of zeros, since one buffer cannot be donated twice.
    return MonitoredState(
      windows=jnp.zeros([], jnp.int32),
      distance=jnp.zeros([], float),
      lam_gap=jnp.zeros([], float),
      gradient=optax.tree.zeros_like(params),
      optimizer_state=state,
    )

  def update(
    grads: optax.Updates,
    state: MonitoredState,
    params: optax.Params,
    *,
    grad_fn: Callable[[Any], Any],
    **extra_args: Any,
  ) -> tuple[optax.Updates, MonitoredState]:
    updates, new = optimizer.update(
      grads, state.optimizer_state, params, grad_fn=grad_fn, **extra_args
    )
    params_next = optax.apply_updates(params, updates)
    (found,) = find_states(new)
    gradient = grad_fn(params_next)
    w_bar = fptt_jax.fptt_eval_params(new, params_next)
    distance = optax.tree.norm(optax.tree.sub(params_next, w_bar))
    moved = (
      state.windows + 1,
      state.distance + distance,
      state.lam_gap + _relative_error(found.lam, gradient),
      optax.tree.add(state.gradient, gradient),
    )
    # λ and W̄ move only after the last of several inner steps.
    ends_window = found.step_count % extra_args.get('inner_steps', 1) == 0
    windows, total_distance, total_gap, total_gradient = optax.tree.where(
      ends_window, moved, state[:-1]
    )
    return updates, MonitoredState(
      windows, total_distance, total_gap, total_gradient, new
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _relative_error(estimate: optax.Updates, gradient: optax.Updates) -> jax.Array:
  """Return the norm of the error of an estimated gradient over the gradient's norm."""
  norm = optax.tree.norm(gradient)
  error = optax.tree.norm(optax.tree.sub(estimate, gradient))
  # The floor avoids 0 / 0 in a window without a gradient.
  return error / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)


def read(state: MonitoredState) -> tuple[dict[str, float], MonitoredState]:
  """Return the means over the windows since the last reading, and reset the sums.

  Args:
    state: state of the monitored optimizer.

  Returns:
    (numbers, the state with its sums at zero). The numbers are
      * `distance`: mean of the norm of W_t - W̄_t;
      * `lam_gap`: mean relative error of λ_{t+1} as the gradient of the window's loss
        at W_{t+1};
      * `path_gradient`: norm of the mean of these gradients, which tends to zero in the
        proof of Prop. 1.

  Raises:
    TypeError: `state` is not a :class:`MonitoredState`.
    ValueError: there was no window since the last reading.
  """
  if not isinstance(state, MonitoredState):
    raise TypeError(
      f'read takes the optimizer state of monitored(...), got {type(state).__name__}.'
    )
  if not state.windows:
    raise ValueError('read needs at least one window since the last reading, got 0.')
  numbers = {
    'distance': float(state.distance / state.windows),
    'lam_gap': float(state.lam_gap / state.windows),
    'path_gradient': float(optax.tree.norm(state.gradient) / state.windows),
  }
  reset = state._replace(
    windows=jnp.zeros_like(state.windows),
    distance=jnp.zeros_like(state.distance),
    lam_gap=jnp.zeros_like(state.lam_gap),
    gradient=optax.tree.zeros_like(state.gradient),
  )
  return numbers, reset


class GradientSum(NamedTuple):
  """State of :func:`sum_gradients`.

  Attributes:
    windows: int32 [], number of windows.
    gradient: tree like the parameters, sum of the gradients.
  """

  windows: jax.Array
  gradient: optax.Updates


def sum_gradients() -> optax.GradientTransformation:
  """Return an optimizer that sums the gradients and does not move the parameters."""

  def init(params: optax.Params) -> GradientSum:
    return GradientSum(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

  def update(
    grads: optax.Updates, state: GradientSum, params: optax.Params | None = None
  ) -> tuple[optax.Updates, GradientSum]:
    del params
    total = optax.tree.add(state.gradient, grads)
    return optax.tree.zeros_like(grads), GradientSum(state.windows + 1, total)

  return optax.GradientTransformation(init, update)


@functools.lru_cache(maxsize=4)
def _summing_trainer(
  model: fptt_jax.Model, loss: fptt_jax.Loss, num_windows: int
) -> fptt_jax.Trainer:
  """Return the trainer that sums the gradients of all windows.

  It is cached, so that a study compiles it once.
  """
  return fptt_jax.make_trainer(
    model, loss, sum_gradients(), method='tbptt', num_windows=num_windows
  )


def mean_gradient_norm(
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  params: Any,
  batches: Sequence[fptt_jax.Batch],
  num_windows: int,
) -> float:
  """Return the stationarity of Prop. 1, the norm of a mean gradient.

  The mean is over the gradients of all windows' losses at `params`. As in training, the
  hidden state is carried from window to window without its gradient.

  Args:
    model: the model.
    loss: the loss.
    params: the parameters W.
    batches: batches with the same shapes.
    num_windows: K.
  """
  trainer = _summing_trainer(model, loss, num_windows)
  state = trainer.init(jax.random.key(0), batches[0])
  # The step donates its state, and the caller goes on training with `params`.
  state = state._replace(params=jax.tree.map(jnp.copy, params))
  for batch in batches:
    state, _ = trainer.step(state, batch)
  return float(optax.tree.norm(state.opt_state.gradient) / state.opt_state.windows)


def study(
  config: add_task.Config,
  optimizer: optax.GradientTransformation,
  seed: int,
  num_fixed: int = 4,
) -> list[dict[str, float]]:
  """Train the adding problem by FPTT and measure convergence.

  Args:
    config: T, K, H, B, the number of batches and the interval `eval_every` between
      measurements. Its settings of the optimizer are not used.
    optimizer: an optimizer that contains one `fptt`.
    seed: seed of the weights and the data.
    num_fixed: number of fixed batches on which stationarity is measured.

  Returns:
    A row per interval: `step`, the number of batches so far, and the names in
    :data:`LABELS`. `stationarity` is that of W at the end of the interval.
  """
  model = add_task.make_model(config)
  loss = fptt_jax.losses.terminal_regression()
  plan = fptt_jax.make_windows(config.seq_len, num_windows=config.num_windows)
  num_windows = plan.num_windows
  trainer = fptt_jax.make_trainer(
    model,
    loss,
    monitored(optimizer),
    num_windows=num_windows,
    inner_steps=config.inner_steps,
  )
  draw = jax.jit(add_task.draw_batch, static_argnums=(1, 2))
  init_key, data_key, fixed_key = jax.random.split(jax.random.key(seed), 3)
  fixed = [
    draw(key, config.seq_len, config.batch_size)
    for key in jax.random.split(fixed_key, num_fixed)
  ]
  state = trainer.init(init_key, fixed[0])
  rows = []
  losses: list[jax.Array] = []
  steps = range(1, config.batches + 1)
  for step in tqdm(steps, desc=f'seed {seed}', unit='batch', disable=None):
    batch_key = jax.random.fold_in(data_key, step)
    batch = draw(batch_key, config.seq_len, config.batch_size)
    state, metrics = trainer.step(state, batch)
    losses.append(metrics.loss)
    # JAX may be one batch ahead, so the device never waits, but no more: the progress
    # bar must show batches that are done.
    jax.block_until_ready(losses[-2:-1])
    if step % config.eval_every == 0 or step == config.batches:
      numbers, opt_state = read(state.opt_state)
      state = state._replace(opt_state=opt_state)
      row = {'step': step, **numbers}
      row['stationarity'] = mean_gradient_norm(
        model, loss, state.params, fixed, num_windows
      )
      row['train_loss'] = float(np.mean(losses))
      rows.append(row)
      losses = []
  return rows


def plot(path: Path, studies: Mapping[str, Sequence[dict[str, Any]]]) -> None:
  """Draw a panel per entry of the rows, with a line per study.

  Args:
    path: the image to write.
    studies: rows of :func:`study` by the name of the line.
  """
  figure = Figure(figsize=(15, 7), layout='constrained')
  panels = figure.subplots(2, 3).flat
  for axes, (name, label) in zip(panels, LABELS.items(), strict=False):
    for study_name, rows in studies.items():
      steps = [row['step'] for row in rows]
      axes.plot(steps, [row[name] for row in rows], label=study_name)
    axes.set(xlabel='batches', title=label, yscale='log')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which='both')
  panels[0].legend()
  # There are five entries for six panels.
  figure.delaxes(figure.axes[-1])
  plotting.save_figure(figure, path)
