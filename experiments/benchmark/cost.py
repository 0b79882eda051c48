"""Cost of each training method: gradient time, update time and memory.

These are the columns of Table 1 of the paper. The gradient's time is that of a train
step whose optimizer does nothing. The update's time is the difference to a step with
the real optimizer.
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
"""Longest sequence at which FTRL is measured.

Each of its T updates runs through up to T steps, so its time grows with T².
"""


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
  """Measure the cost of training on one batch by one method.

  Args:
    model: the model.
    loss: the loss.
    make_optimizer: (method) -> its optimizer.
    method: a name in `fptt_jax.METHODS` except 'tbptt_final'.
    batch: the batch that every step trains on.
    num_windows: K; None for methods that fix it.
    repeats: number of timed calls of each of the two programs, which take turns.
    mesh: devices to split the batch over, as for the trainer.
    batches: number of steps per program. The scripts train on several batches per
      program, which is cheaper per batch if a batch needs much memory. With several,
      only the sum of both times is meaningful: without updates the weights stay the
      same, and XLA may compute with them once for all steps.

  Returns:
    A row of
      * `gradient_ms`: milliseconds of a step without its updates, the median;
      * `update_ms`: milliseconds that the updates add, the median of the differences;
      * `± update_ms`: half the width of its 95 % confidence interval, from the median
        deviation of the differences; None for one call;
      * `temp_bytes`: memory of the step besides its arguments and results;
      * `compile_s`: seconds to compile it;
      * `updates`: number of updates per batch.
  """
  # A step without updates still computes its gradient, whose norm is a metric. A
  # regularized method would refuse an optimizer without FPTT.
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
  # The first calls warm up.
  _, gradient_state, _ = timed_step(gradient, gradient_state, batch)
  _, full_state, metrics = timed_step(full, full_state, batch)
  # The programs take turns, so that a slow moment of the machine hits both alike.
  for _ in range(repeats):
    gradient_s, gradient_state, _ = timed_step(gradient, gradient_state, batch)
    full_s, full_state, _ = timed_step(full, full_state, batch)
    seconds.append((gradient_s, full_s))
  gradient_ms, full_ms = 1e3 * np.array(seconds).T / batches
  update_ms = full_ms - gradient_ms
  return {
    'gradient_ms': float(np.median(gradient_ms)),
    'update_ms': float(np.median(update_ms)),
    '± update_ms': _median_error(update_ms),
    'temp_bytes': full.memory_analysis().temp_size_in_bytes,
    'compile_s': compile_s,
    'updates': metrics.loss.shape[-1],
  }


def _median_error(values: np.ndarray) -> float | None:
  """Return half the width of the 95 % confidence interval of a median.

  Args:
    values: the sample [N]; one value has no interval.
  """
  if len(values) == 1:
    return None
  # The median deviation, unlike the standard deviation, ignores a few disturbed calls.
  deviation = stats.median_abs_deviation(values, scale='normal')
  # For normal numbers a median's standard error is (π/2)^½ times that of a mean.
  error = (math.pi / 2 / len(values)) ** 0.5 * deviation
  return float(stats.norm.ppf(0.975) * error)


def _repeated(trainer: fptt_jax.Trainer, batches: int) -> fptt_jax.Trainer:
  """Return a trainer whose step trains several times on its batch, in one program."""
  if batches == 1:
    return trainer
  run = fptt_jax.scan_train_steps(trainer, lambda batch, _: batch)

  def step(
    state: fptt_jax.TrainState, batch: fptt_jax.Batch
  ) -> tuple[fptt_jax.TrainState, fptt_jax.StepMetrics]:
    return run(state, batch, np.arange(batches))

  return trainer._replace(step=jax.jit(step, donate_argnums=0))


def compile_step(
  trainer: fptt_jax.Trainer, batch: fptt_jax.Batch, key: jax.Array | None = None
) -> tuple[Any, fptt_jax.TrainState, float]:
  """Compile a train step ahead of its first call.

  Args:
    trainer: the trainer.
    batch: a batch with the shapes to compile for.
    key: PRNG key, or keys of a population, of the initial state; seed 0 if None.

  Returns:
    (compiled step, initial state, seconds it took to compile).
  """
  state = trainer.init(jax.random.key(0) if key is None else key, batch)
  step: Any = trainer.step  # A compiled function, which has more than its signature.
  start = time.perf_counter()
  compiled = step.lower(state, batch).compile()
  return compiled, state, time.perf_counter() - start


def timed_step(
  step: Any, state: fptt_jax.TrainState, batch: fptt_jax.Batch
) -> tuple[float, fptt_jax.TrainState, Any]:
  """Return (seconds of a step, the next state, the metrics)."""
  start = time.perf_counter()
  state, metrics = jax.block_until_ready(step(state, batch))
  return time.perf_counter() - start, state, metrics


def growth(xs: Sequence[float], ys: Sequence[float]) -> float:
  """Fit y = c x^p and return the exponent p.

  The fit is by least squares of log y on log x.

  Args:
    xs: two or more different positive numbers.
    ys: as many positive numbers.

  Raises:
    ValueError: a number is not positive, or all x are equal.
  """
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
  """Measure the methods of Table 1 on the adding problem.

  These are BPTT, FPTT with K = T, FPTT with fewer windows, and FTRL up to
  T = :data:`FTRL_STEPS`.

  Args:
    lengths: the T to measure at.
    windows: the K of FPTT; values of T or more are left out at that T.
    hidden: H of the LSTM.
    batch_size: B.
    repeats: number of timed calls, see :func:`measure`.
    progress: callback that receives each row when it is measured.

  Returns:
    Rows with T, method, K, the entries of :func:`measure`, and C. C is None for methods
    other than FPTT, and if the update's time is below the error of its measurement.
  """
  rows = []
  for num_steps in lengths:
    for method, num_windows in _methods(num_steps, windows):
      config = add_task.Config(
        method=(method,), seq_len=num_steps, hidden=hidden, batch_size=batch_size
      )
      costs = _measure_add_task(config, method, num_windows, repeats)
      row = {'T': num_steps, 'method': method, 'K': num_windows, **costs}
      rows.append(row)
      # A long command that is stopped has shown what it measured.
      progress(row)
  return rows


def _methods(num_steps: int, windows: Sequence[int]) -> Iterator[tuple[str, int]]:
  """Yield the pairs (method, K) to measure at T = `num_steps`, in Table 1's order."""
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
  """Measure one method on the adding problem, with the constant C."""
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
  # A constant out of noise would be read as a result.
  is_measured = costs['update_ms'] > (costs['± update_ms'] or 0.0)
  constant = None
  if method == 'fptt' and is_measured:
    constant = update_constant(config.seq_len, costs)
  return costs | {'C': constant}


def update_constant(num_steps: int, costs: dict[str, Any]) -> float:
  """Return C of Sec. 4.2, the time of an update in units of one step's gradient.

  The paper's best K is about T/C.

  Args:
    num_steps: T.
    costs: a row of :func:`measure`.
  """
  update = costs['update_ms'] / costs['updates']
  gradient = costs['gradient_ms'] / num_steps
  return float(update / gradient)


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
  """Draw time per batch and memory against T, with the exponents of their growth.

  Each method has a line, FPTT one for each K.

  Args:
    path: the image to write.
    rows: rows of :func:`table1`.
  """
  lines: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    name = row['method']
    if name == 'fptt':
      # One line for K = T, although its K differs from T to T.
      name = f'fptt K={"T" if row["K"] == row["T"] else row["K"]}'
    lines.setdefault(name, []).append(row)
  figure = Figure(figsize=(11, 4.5), layout='constrained')
  panels = {
    'ms a batch': lambda row: row['gradient_ms'] + row['update_ms'],
    'temporary memory, MiB': lambda row: row['temp_bytes'] / 2**20,
  }
  for axes, (ylabel, value) in zip(figure.subplots(1, 2), panels.items(), strict=True):
    for name, points in lines.items():
      x = [row['T'] for row in points]
      y = [value(row) for row in points]
      label = f'{name}: $T^{{{growth(x, y):.2f}}}$' if len(set(x)) > 1 else name
      axes.plot(x, y, marker='o', label=label)
    axes.set(xlabel='T', ylabel=ylabel, xscale='log', yscale='log')
    lengths = sorted({row['T'] for row in rows})
    axes.set_xticks(lengths, map(str, lengths))
    # Minor ticks of a log axis would overlap the lengths.
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which='both')
    axes.legend()
  plotting.save_figure(figure, path)
