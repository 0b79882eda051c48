"""Timing of calls, and probes that detect a noisy machine."""

from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmark import cases
from experiments.benchmark.cases import CASES
from experiments.benchmark.ours import lstm, train_step
from experiments.core import devices

PAUSE = 0.3
"""Seconds of rest after each call of PyTorch or NumPy on a CPU.

Their threads keep spinning for a while after their work, on cores that the next system
needs.
"""


NOISE_RATIO = 1.3
"""Ratio to the fastest probe above which a call counts as disturbed."""


PRODUCT_SIZE = {'cpu': 2048, 'gpu': 8192}
"""Rows of the square matrices whose product measures the peak speed of the machine."""


class Call(NamedTuple):
  """A timed call.

  Attributes:
    seconds: duration of the call.
    check: duration of the slower of the probes before and after the call, in seconds.
  """

  seconds: float
  check: float


def drop_noisy_calls(calls: dict[str, list[Call]]) -> dict[str, dict[str, Any]]:
  """Summarize the calls of each system that nothing disturbed.

  A call was disturbed if its probe took more than :data:`NOISE_RATIO` times the fastest
  probe. If all calls of a system were disturbed, all of them count.

  Args:
    calls: calls by the name of the system.

  Returns:
    By system a row as in :func:`milliseconds`, `check_ms` of all calls, and the number
    `disturbed`. `all_ms` has all calls, too.
  """
  # One limit for all systems, since all calls have the same program as their probe.
  limit = NOISE_RATIO * min(
    call.check for several in calls.values() for call in several
  )
  found: dict[str, dict[str, Any]] = {}
  for name, several in calls.items():
    every = [call.seconds for call in several]
    quiet = [call.seconds for call in several if call.check <= limit]
    found[name] = milliseconds(quiet or every) | {
      'all_ms': [1e3 * seconds for seconds in every],
      'check_ms': [1e3 * call.check for call in several],
      'disturbed': len(several) - len(quiet),
    }
  return found


def sync_probe(small: bool) -> Callable[[], Any]:
  """Return a short program that shows whether the cores answer each other quickly.

  The program is already compiled. It trains on 48 windows of one step, whose work is
  handed back and forth between the cores. It takes twice as long while a virtual
  machine's cores are far apart.

  Args:
    small: whether to train a tiny model, for tests.
  """
  case = CASES['smoke' if small else 'M784']
  case = case._replace(num_steps=48, num_windows=48)
  step = train_step(case, lstm(case))
  data = jax.device_put(cases.draw(case))

  def run() -> Any:
    return step(*data)

  run()
  return run


def product_probe(size: int) -> Callable[[], Any]:
  """Return a product of two matrices [size, size], run once already.

  It runs on JAX's device. On a CPU NumPy computes it.

  Args:
    size: number of rows of the square matrices.
  """
  matrix = np.ones((size, size), np.float32)
  if devices.is_cpu():
    # NumPy's BLAS is the fastest product on a CPU, so it is the peak to compare with.
    run: Callable[[], Any] = lambda: np.matmul(matrix, matrix)
  else:
    on_device = jax.device_put(matrix)
    product = jax.jit(jax.numpy.matmul)
    run = lambda: jax.block_until_ready(product(on_device, on_device))
  run()
  return run


def milliseconds(times: list[float]) -> dict[str, Any]:
  """Return minimum, median, maximum and all of some times, in milliseconds.

  Args:
    times: durations in seconds.
  """
  ms = [1e3 * value for value in times]
  return {
    'min_ms': min(ms),
    'median_ms': float(np.median(ms)),
    'max_ms': max(ms),
    'all_ms': ms,
  }


def best_threads(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Keep the row with the least median of each system.

  A system may have been timed with several numbers of threads. Such names end in
  ', threads N'.

  Args:
    rows: rows with `median_ms` by name.
  """
  best: dict[str, str] = {}
  for name, row in rows.items():
    base = name.partition(', threads')[0]
    if base not in best or row['median_ms'] < rows[best[base]]['median_ms']:
      best[base] = name
  return {name: rows[name] for name in best.values()}


def timed(function: Callable[..., Any], *args: Any) -> float:
  """Return the wall-clock seconds of a call."""
  start = time.perf_counter()
  function(*args)
  return time.perf_counter() - start
