"""Does FPTT converge as the paper argues? What its convergence study and Prop. 1 speak
of, measured along training.

For W_t to settle, W_t - W̄_t has to vanish; λ has to be the gradient it stands for (it
is only where the inner problem is solved exactly); and the limit has to be stationary
for the mean of all windows' losses.
"""

from collections.abc import Callable, Sequence
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
"""What a row of :func:`study` holds."""


class MonitoredState(NamedTuple):
  """State of :func:`monitored`: sums since the last :func:`read`.

  Attributes:
    windows: int32 [], windows summed over.
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
  """Finds the states of `fptt` in an optimizer's state."""

  def is_state(node: Any) -> bool:
    return isinstance(node, fptt_jax.FPTTState)

  nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
  return [node for node in nodes if is_state(node)]


def monitored(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer that contains one `fptt` and measures after each window how far
  it is from what theory asks.

  Updates are the optimizer's. `update` needs the extra argument `grad_fn`, which the
  trainer gives: the gradient of the window's loss at W_{t+1} from the same hidden state
  costs one more forward and backward pass.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params: optax.Params) -> MonitoredState:
    state = optimizer.init(params)
    if len(find_states(state)) != 1:
      raise ValueError(
        'monitored needs an optimizer with exactly one fptt(...) in it, got '
        f'{len(find_states(state))}.'
      )
    zeros = lambda: jnp.zeros([], float)
    return MonitoredState(
      jnp.zeros([], jnp.int32), zeros(), zeros(), optax.tree.zeros_like(params), state
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
    distance = optax.tree.norm(
      optax.tree.sub(params_next, fptt_jax.fptt_eval_params(new, params_next))
    )
    norm = optax.tree.norm(gradient)
    lam_gap = optax.tree.norm(optax.tree.sub(found.lam, gradient)) / jnp.maximum(
      norm, jnp.finfo(norm.dtype).tiny
    )
    # λ and W̄ move after the last of several inner steps.
    ends_window = found.step_count % extra_args.get('inner_steps', 1) == 0
    sums = (state.windows, state.distance, state.lam_gap, state.gradient)
    moved = (
      state.windows + 1,
      state.distance + distance,
      state.lam_gap + lam_gap,
      optax.tree.add(state.gradient, gradient),
    )
    return updates, MonitoredState(*optax.tree.where(ends_window, moved, sums), new)

  return optax.GradientTransformationExtraArgs(init, update)


def read(state: MonitoredState) -> tuple[dict[str, float], MonitoredState]:
  """Means over the windows since the last reading, and the state with its sums back at
  zero.

  Returns:
    distance: mean of the norm of W_t - W̄_t. lam_gap: mean relative error of λ_{t+1} as
    the gradient of the window's loss at W_{t+1}. path_gradient: norm of the mean of
    these gradients, which Prop. 1's proof sends to zero.
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
  return numbers, MonitoredState(
    *optax.tree.zeros_like(state[:-1]), state.optimizer_state
  )


class GradientSum(NamedTuple):
  """State of :func:`sum_gradients`.

  Attributes:
    windows: int32 [], how many there were.
    gradient: tree like the parameters, their sum.
  """

  windows: jax.Array
  gradient: optax.Updates


def sum_gradients() -> optax.GradientTransformation:
  """Leaves the parameters where they are and sums up the gradients."""
  return optax.GradientTransformation(
    lambda params: GradientSum(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params)),
    lambda grads, state, params=None: (
      optax.tree.zeros_like(grads),
      GradientSum(state.windows + 1, optax.tree.add(state.gradient, grads)),
    ),
  )


@functools.lru_cache(maxsize=4)
def _summing_trainer(
  model: fptt_jax.Model, loss: fptt_jax.Loss, num_windows: int
) -> fptt_jax.Trainer:
  """Kept, so that it is compiled once for all intervals of a study."""
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
  """Prop. 1's stationarity: the norm of the mean over all windows of all batches of the
  window's loss gradient at `params`.

  The hidden state is carried from window to window, its gradient stopped, as in
  training.
  """
  trainer = _summing_trainer(model, loss, num_windows)
  state = trainer.init(jax.random.key(0), batches[0])._replace(
    params=jax.tree.map(jnp.copy, params)
  )
  for batch in batches:
    state, _ = trainer.step(state, batch)
  return float(optax.tree.norm(state.opt_state.gradient) / state.opt_state.windows)


def study(
  config: add_task.Config,
  optimizer: optax.GradientTransformation,
  seed: int,
  num_fixed: int = 4,
) -> list[dict[str, float]]:
  """Trains the adding problem by FPTT and measures convergence over each interval of
  `config.eval_every` batches.

  Args:
    config: T, K, H, B, batches and interval; its optimizer's settings are not used.
    optimizer: contains one `fptt`.
    seed: of weights and data.
    num_fixed: batches, drawn once, that stationarity is measured on.

  Returns:
    A row an interval: step (batches so far) and the names in :data:`LABELS`;
      stationarity is that of W at the interval's end.
  """
  model, loss = add_task.make_model(config), fptt_jax.losses.terminal_regression()
  num_windows = fptt_jax.make_windows(
    config.seq_len, num_windows=config.num_windows
  ).num_windows
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
  rows, losses = [], []
  for step in tqdm(
    range(1, config.batches + 1), desc=f'seed {seed}', unit='batch', disable=None
  ):
    state, metrics = trainer.step(
      state, draw(jax.random.fold_in(data_key, step), config.seq_len, config.batch_size)
    )
    losses.append(metrics.loss)
    jax.block_until_ready(
      losses[-2:-1]
    )  # One batch ahead, no more: the bar tells the truth.
    if step % config.eval_every == 0 or step == config.batches:
      numbers, opt_state = read(state.opt_state)
      state = state._replace(opt_state=opt_state)
      stationarity = mean_gradient_norm(model, loss, state.params, fixed, num_windows)
      rows.append(
        {
          'step': step,
          **numbers,
          'stationarity': stationarity,
          'train_loss': float(np.mean(losses)),
        }
      )
      losses = []
  return rows


def plot(path: Path, studies: dict[str, Sequence[dict[str, float]]]) -> None:
  """A panel for each number, a line for each study."""
  figure = Figure(figsize=(15, 7), layout='constrained')
  panels = figure.subplots(2, 3).flat
  for axes, (name, label) in zip(panels, LABELS.items(), strict=False):
    for study_name, rows in studies.items():
      axes.plot(
        [row['step'] for row in rows], [row[name] for row in rows], label=study_name
      )
    axes.set(xlabel='batches', title=label, yscale='log')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which='both')
  panels[0].legend()
  figure.delaxes(figure.axes[-1])
  plotting.save_figure(figure, path)
