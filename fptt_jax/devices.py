"""Several devices on a machine that has a CPU only."""

import os

import jax

from fptt_jax.checks import HUGE, check_integer


def cpu_setup(num_devices: int | None = None) -> None:
  """Lets JAX see the CPU as several devices, for `trainer(mesh=...)` to split a batch over.

  It pays for small networks: much of their step XLA runs on one thread a device. Call it before anything makes JAX look for
  devices; where that has happened already it does nothing, silently. Other backends are not affected.

  Args:
    num_devices: how many; default as many as the process may use cores.

  Raises:
    ValueError: num_devices is no integer >= 1.
  """
  if num_devices is None:
    num_devices = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  num_devices = check_integer('num_devices', num_devices, 1, HUGE, 'at least 1')
  try:
    jax.config.update('jax_num_cpu_devices', num_devices)
  except RuntimeError:  # Too late: JAX knows its devices.
    return
