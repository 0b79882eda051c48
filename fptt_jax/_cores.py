"""The cores of the machine."""

import os


def count_cores() -> int:
  """Return how many cores the process may use."""
  # Containers and job schedulers often grant fewer cores than there are.
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
