"""Timing of calls, and probes that detect a noisy machine."""

from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmark import cases
from experiments.benchmark.cases import CASES
from experiments.benchmark.ours import lstm_cell, train_step
from experiments.core import devices

PAUSE = 0.3
"""Seconds after each call of PyTorch or NumPy on a CPU: their threads go on spinning
for a while after their work, on cores that the next system would need."""


NOISE_RATIO = 1.3
"""A call was disturbed where what is timed before it, or after it, took longer than
this times the quickest.
"""


PRODUCT_SIZE = {'cpu': 2048, 'gpu': 8192}
"""Rows of the square matrices multiplied to see how quick the machine is."""


class Call(NamedTuple):
  """A timed call: how long it took, and the longer one of the checks before and after
  it, in seconds.
  """

  seconds: float
  check: float


def drop_noisy_calls(calls: dict[str, list[Call]]) -> dict[str, dict[str, Any]]:
  """By system the times of the calls that nothing disturbed (of all where there is no
  such call), and of how many something did.
  """
  limit = NOISE_RATIO * min(
    call.check for several in calls.values() for call in several
  )
  found: dict[str, dict[str, Any]] = {}
  for name, several in calls.items():
    quiet = [call.seconds for call in several if call.check <= limit]
    every = {
      'all_ms': [1e3 * call.seconds for call in several],
      'check_ms': [1e3 * call.check for call in several],
    }
    found[name] = (
      milliseconds(quiet or [call.seconds for call in several])
      | every
      | {'disturbed': len(several) - len(quiet)}
    )
  return found


def sync_probe(small: bool) -> Callable[[], Any]:
  """A few windows of one step: their work goes back and forth between the cores, and
  takes twice as long when a virtual machine's are, for a while, not close to each
  other. Warm.
  """
  case = CASES['smoke' if small else 'M784']
  case = case._replace(num_steps=48, num_windows=48)
  step, data = train_step(case, lstm_cell(case)), jax.device_put(cases.draw(case))
  run: Callable[[], Any] = lambda: step(*data)
  run()
  return run


def product_probe(size: int) -> Callable[[], Any]:
  """A product of two matrices [size, size] on what JAX runs on: on a CPU by NumPy.
  Warm.
  """
  matrix = np.ones((size, size), np.float32)
  run: Callable[[], Any] = lambda: np.matmul(matrix, matrix)
  if not devices.is_cpu():
    there, compiled = jax.device_put(matrix), jax.jit(jax.numpy.matmul)
    run = lambda: jax.block_until_ready(compiled(there, there))
  run()
  return run


def milliseconds(times: list[float]) -> dict[str, Any]:
  """Minimum, median and maximum of seconds, and all."""
  ms = [1e3 * value for value in times]
  return {
    'min_ms': min(ms),
    'median_ms': float(np.median(ms)),
    'max_ms': max(ms),
    'all_ms': ms,
  }


def best_threads(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Of a system timed with several numbers of threads only the one of the least
  median.
  """
  best: dict[str, str] = {}
  for name, row in rows.items():
    base = name.partition(', threads')[0]
    if base not in best or row['median_ms'] < rows[best[base]]['median_ms']:
      best[base] = name
  return {name: rows[name] for name in best.values()}


def timed(function: Callable[..., Any], *args: Any) -> float:
  """Seconds of a call."""
  start = time.perf_counter()
  function(*args)
  return time.perf_counter() - start
