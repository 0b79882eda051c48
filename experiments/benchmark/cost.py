"""What each training method costs: gradient time, update time and memory, as Table 1 of
the paper lists them.

The gradient's time is that of a train step whose optimizer does nothing, the update's
what the real one takes beyond it.
"""

from collections.abc import Callable, Iterator, Sequence
import math
from pathlib import Path
import time
from typing import Any

import jax
from matplotlib.figure import Figure
import numpy as np
import optax
from scipy import stats

from experiments import add_task
from experiments.core import optimizers, plotting
import fptt_jax

FTRL_STEPS = 64
"""Longest sequence FTRL is measured at: its T updates run through all T steps each."""


def measure(
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  make_optimizer: Callable[[str], optax.GradientTransformation],
  method: str,
  batch: fptt_jax.Batch,
  *,
  num_windows: int | None,
  repeats: int,
  mesh: jax.sharding.Mesh | None = None,
  batches: int = 1,
) -> dict[str, Any]:
  """Costs of training on one batch by one method.

  Args:
    model: the model.
    loss: the loss.
    make_optimizer: (method) -> its optimizer.
    method: a name in `fptt_jax.METHODS`, but 'tbptt_final'.
    batch: what is trained on, again and again.
    num_windows: K; None for methods that fix it.
    repeats: timed calls of each program, the two taking turns; medians are reported.
    mesh: devices to split the batch over, as for the trainer.
    batches: how often it is trained on in one program, as scripts do. By itself a batch
      is dearer where it asks for much memory. Of several only the sum of both times
      tells: without updates the weights stay, and work with them may be done once for
      all.

  Returns:
    gradient_ms: a step without its updates. update_ms: what the updates add, the median
    of the differences. ± update_ms: half the width of its 95 % confidence interval,
    from the median deviation of the differences; None for one call. temp_bytes: memory
    of
    the step beside its arguments and results. compile_s: seconds to compile it.
      updates: how many updates the batch gives.
  """
  # The norm of the gradient, a metric, keeps it from being left out as unused.
  setting = fptt_jax.METHODS[method]._replace(regularized=False)
  without = fptt_jax.make_trainer(
    model, loss, optax.set_to_zero(), method=setting, num_windows=num_windows, mesh=mesh
  )
  trainer = fptt_jax.make_trainer(
    model,
    loss,
    make_optimizer(method),
    method=method,
    num_windows=num_windows,
    mesh=mesh,
  )
  gradient, gradient_state, _ = compile_step(_repeated(without, batches), batch)
  full, full_state, compile_s = compile_step(_repeated(trainer, batches), batch)
  batch = jax.device_put(batch, full.input_shardings[0][1])
  seconds = []
  for _ in range(repeats + 1):
    gradient_s, gradient_state, _ = timed_step(gradient, gradient_state, batch)
    full_s, full_state, metrics = timed_step(full, full_state, batch)
    seconds.append((gradient_s, full_s))
  gradient_ms, full_ms = (
    1e3 * np.array(seconds[1:]).T / batches
  )  # The first calls warm up.
  update_ms = full_ms - gradient_ms
  # A median's standard error is (π/2)^½ times a mean's, of normal numbers.
  error = (
    (math.pi / 2 / repeats) ** 0.5
    * stats.median_abs_deviation(update_ms, scale='normal')
    if repeats > 1
    else None
  )
  return {
    'gradient_ms': float(np.median(gradient_ms)),
    'update_ms': float(np.median(update_ms)),
    '± update_ms': None if error is None else float(stats.norm.ppf(0.975) * error),
    'temp_bytes': full.memory_analysis().temp_size_in_bytes,
    'compile_s': compile_s,
    'updates': metrics.loss.shape[-1],
  }


def _repeated(trainer: fptt_jax.Trainer, batches: int) -> fptt_jax.Trainer:
  """A trainer whose step trains so often on its batch, in one program."""
  if batches == 1:
    return trainer
  run = fptt_jax.scan_train_steps(trainer, lambda batch, _: batch)
  return trainer._replace(
    step=jax.jit(
      lambda state, batch: run(state, batch, np.arange(batches)), donate_argnums=0
    )
  )


def compile_step(
  trainer: fptt_jax.Trainer, batch: fptt_jax.Batch, key: jax.Array | None = None
) -> tuple[Any, fptt_jax.TrainState, float]:
  """(compiled step, a state of its own, seconds it took to compile); `key` is what the
  state is drawn from.
  """
  state = trainer.init(jax.random.key(0) if key is None else key, batch)
  start = time.perf_counter()
  compiled = trainer.step.lower(state, batch).compile()
  return compiled, state, time.perf_counter() - start


def timed_step(
  step: Any, state: fptt_jax.TrainState, batch: fptt_jax.Batch
) -> tuple[float, fptt_jax.TrainState, Any]:
  start = time.perf_counter()
  state, metrics = jax.block_until_ready(step(state, batch))
  return time.perf_counter() - start, state, metrics


def growth(xs: Sequence[float], ys: Sequence[float]) -> float:
  """The exponent p of y = c x^p, by least squares of log y on log x."""
  if len(set(xs)) < 2 or min(*xs, *ys) <= 0:
    raise ValueError(
      f'growth needs positive numbers at two or more different x, got {list(xs)} and '
      f'{list(ys)}.'
    )
  return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def table1(
  lengths: Sequence[int],
  windows: Sequence[int],
  hidden: int,
  batch_size: int,
  repeats: int,
  progress: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
  """Measures BPTT, FPTT (K = T), FPTT-K and, up to T = :data:`FTRL_STEPS`, FTRL on the
  adding problem.

  Args:
    lengths: the T to measure at.
    windows: the K of FPTT-K; those of T or more are left out at that T.
    hidden: H of the LSTM.
    batch_size: B.
    repeats: see :func:`measure`.
    progress: is given each row as soon as it is there.

  Returns:
    A row each: T, method, K, what :func:`measure` measures, and C (None for methods
    that do not update a window at a time, and where the update's time does not stand
    out of its interval).
  """
  rows = []
  for num_steps in lengths:
    for method, num_windows in _methods(num_steps, windows):
      config = add_task.Config(
        method=(method,), seq_len=num_steps, hidden=hidden, batch_size=batch_size
      )
      rows.append(
        {
          'T': num_steps,
          'method': method,
          'K': num_windows,
          **_measure_add_task(config, method, num_windows, repeats),
        }
      )
      progress(rows[-1])
  return rows


def _methods(num_steps: int, windows: Sequence[int]) -> Iterator[tuple[str, int]]:
  """(method, K) to measure at T = `num_steps`, as Table 1 lists them."""
  yield 'bptt', 1
  if num_steps <= FTRL_STEPS:
    yield 'ftrl', num_steps
  yield 'fptt', num_steps
  yield from (
    ('fptt', num_windows) for num_windows in windows if num_windows < num_steps
  )


def _measure_add_task(
  config: add_task.Config, method: str, num_windows: int, repeats: int
) -> dict[str, Any]:
  """`measure` at the adding problem's settings, and the constant C."""
  fixed = fptt_jax.METHODS[method].num_windows is not None
  costs = measure(
    add_task.make_model(config),
    fptt_jax.losses.terminal_regression(),
    lambda name: optimizers.make_optimizer(config, name),
    method,
    add_task.draw_batch(jax.random.key(0), config.seq_len, config.batch_size),
    num_windows=None if fixed else num_windows,
    repeats=repeats,
  )
  seen = costs['update_ms'] > (costs['± update_ms'] or 0.0)
  return costs | {
    'C': update_constant(config.seq_len, costs) if method == 'fptt' and seen else None
  }


def update_constant(num_steps: int, costs: dict[str, Any]) -> float:
  """C of Sec. 4.2: the time of one window's update in units of one step's gradient; the
  paper's best K is about T/C.
  """
  return (costs['update_ms'] / costs['updates']) / (costs['gradient_ms'] / num_steps)


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
  """Time of a batch and memory against T, a line a method (FPTT: a line each K), each
  with its growth exponent.
  """
  lines: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    k = 'T' if row['K'] == row['T'] else row['K']
    lines.setdefault(
      f'{row["method"]} K={k}' if row['method'] == 'fptt' else row['method'], []
    ).append(row)
  figure = Figure(figsize=(11, 4.5), layout='constrained')
  panels = {
    'ms a batch': lambda row: row['gradient_ms'] + row['update_ms'],
    'temporary memory, MiB': lambda row: row['temp_bytes'] / 2**20,
  }
  for axes, (ylabel, value) in zip(figure.subplots(1, 2), panels.items(), strict=True):
    for name, points in lines.items():
      x, y = [row['T'] for row in points], [value(row) for row in points]
      label = f'{name}: $T^{{{growth(x, y):.2f}}}$' if len(set(x)) > 1 else name
      axes.plot(x, y, marker='o', label=label)
    axes.set(xlabel='T', ylabel=ylabel, xscale='log', yscale='log')
    lengths = sorted({row['T'] for row in rows})
    axes.set_xticks(lengths, map(str, lengths))
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which='both')
    axes.legend()
  plotting.save_figure(figure, path)
