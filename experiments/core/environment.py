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
  """Return the command, commit, hardware and package versions of this process.

  Args:
    *packages: further packages to list the versions of, if they are installed.

  Returns:
    A dict for JSON. The command and the commit are None if they are unknown.
  """
  # A set, since several devices of one kind are the rule; `number` counts them.
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
  """Return the git revision of this code, or None outside a repository.

  The revision ends in '-dirty' if tracked files have been changed.
  """
  describe_command = [
    'git',
    'describe',
    '--always',
    '--dirty',
    # Tags move and a clone may lack them; the hash always names one commit.
    '--exclude=*',
    '--abbrev=12',
  ]
  try:
    found = subprocess.run(
      describe_command,
      # The script may have been started inside another repository.
      cwd=Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    # An installed package has no repository, and a cluster node may have no git.
    return None
  return found.stdout.strip()


def _cpu() -> str | None:
  """Return the name of the processor, or None if it is unknown."""
  # platform.processor() is empty or just the architecture on most Linux systems.
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor() or None
  return next(
    (line.partition(':')[2].strip() for line in lines if line.startswith('model name')),
    None,
  )
