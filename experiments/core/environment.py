"""Description of the machine and the software that a result was measured on."""

import contextlib
import importlib.metadata
import os
from pathlib import Path
import platform
import subprocess
from typing import Any

import jax

from experiments.core.flags import command
import fptt_jax


def describe_machine(*packages: str) -> dict[str, Any]:
  """What this process is, and what it runs on.

  Args:
    *packages: packages whose versions are told, too, if they are installed.

  Returns:
    command and commit (None where they are not known), hardware, versions.
  """
  devices = sorted({device.device_kind for device in jax.devices()})
  versions = {'python': platform.python_version(), 'fptt_jax': fptt_jax.__version__}
  for package in ('jax', 'jaxlib', 'flax', 'optax', 'numpy', *packages):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {
    'command': command(),
    'commit': _commit(),
    'hardware': {
      'devices': devices,
      'number': len(jax.devices()),
      'cpu': _cpu(),
      'cpu_cores': os.cpu_count(),
      'machine': platform.machine(),
    },
    'versions': versions,
  }


def _commit() -> str | None:
  """The revision of this code, '-dirty' if files differ; None outside a repository."""
  describe_command = [
    'git',
    'describe',
    '--always',
    '--dirty',
    '--exclude=*',
    '--abbrev=12',
  ]
  try:
    found = subprocess.run(
      describe_command,
      cwd=Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip()


def _cpu() -> str | None:
  """The processor's name, where the system tells."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor() or None
  return next(
    (line.partition(':')[2].strip() for line in lines if line.startswith('model name')),
    None,
  )
