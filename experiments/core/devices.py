"""Choice of the devices that a batch or a population is split over."""

from typing import NamedTuple

import jax

from experiments.core.flags import check, checked
from experiments.core.recipe import Recipe

MIN_WORK_PER_CORE = 4096
"""Smallest batch size times hidden size that keeps a CPU core busy."""


class Meshes(NamedTuple):
  """Meshes to split work over; None stands for a single device.

  Attributes:
    batch: mesh whose devices each take a share of the batch.
    members: mesh whose devices each take a share of the population.
  """

  batch: jax.sharding.Mesh | None
  members: jax.sharding.Mesh | None


def choose_meshes(
  recipe: Recipe, batch_size: int, hidden: int, steps: int, members: int = 1
) -> Meshes:
  """Return the meshes for a program of one or several runs.

  The batch of a single run is split over the devices. Of several runs, each device
  takes whole members.

  Args:
    recipe: settings with the flags of the devices.
    batch_size: batch size B.
    hidden: hidden size H.
    steps: time steps of a window.
    members: number of runs in the program.

  Raises:
    UserError: `recipe` asks for more devices than there are, or the batch size or the
      number of runs is not a multiple of them.
  """
  devices = _choose_devices(recipe, batch_size, hidden, steps, members)
  mesh = jax.sharding.Mesh(devices, ('devices',)) if len(devices) > 1 else None
  # Members first: they need no communication, and a batch one sum per window.
  return Meshes(mesh, None) if members == 1 else Meshes(None, mesh)


def _choose_devices(
  recipe: Recipe, batch_size: int, hidden: int, steps: int, members: int
) -> list[jax.Device]:
  """Return the devices that share the work, as in :func:`choose_meshes`."""
  devices = jax.devices()
  which, number = (
    ('batch size', batch_size) if members == 1 else ('population', members)
  )
  if over_all_devices(recipe):
    # No fallback to fewer devices: each process has to take part.
    checked(
      check,
      number % len(devices) == 0,
      'batch_size',
      number,
      f'a multiple of the {len(devices)} devices there are',
    )
  elif recipe.devices:
    checked(
      check,
      recipe.devices <= len(devices),
      'devices',
      recipe.devices,
      f'at most the {len(devices)} there are',
    )
    checked(
      check,
      number % recipe.devices == 0,
      'devices',
      recipe.devices,
      f'a divisor of the {which}, {number}',
    )
    return devices[: recipe.devices]
  # Nothing was asked for, so work that does not divide is accepted.
  elif number % len(devices) or (
    members == 1 and is_cpu() and not pays_on_cpu(batch_size, hidden, steps)
  ):
    return devices[:1]
  return devices


def population_size(recipe: Recipe, batch_size: int, hidden: int) -> int | None:
  """Return the largest number of runs per program; None means no limit."""
  if over_all_devices(recipe):
    return 1
  # A run that fills the cores by itself gains nothing from others in its program.
  if recipe.population == 0 and is_cpu() and batch_size * hidden >= MIN_WORK_PER_CORE:
    return 1
  return recipe.population or None


def over_all_devices(recipe: Recipe) -> bool:
  """Return whether batches are split over all devices of all processes."""
  return recipe.data_parallel or jax.process_count() > 1


def is_cpu() -> bool:
  """Return whether this process computes on a CPU."""
  return jax.default_backend() == 'cpu'


def pays_on_cpu(batch_size: int, hidden: int, steps: int) -> bool:
  """Return whether a batch split over CPU cores beats XLA's own threads.

  The limits were measured with LSTMs on two cores. Splitting is faster for H = 128 and
  256, B = 20 to 128 and windows of at least 7 steps. It is slower for B = 8, H = 16,
  for windows of one step and for H = 1024.

  Args:
    batch_size: batch size B.
    hidden: hidden size H.
    steps: time steps of a window.
  """
  # Each core reads all weights, which no longer fit its cache for a large H. For
  # small products, the cores mostly wait for each other at the end of each window.
  return (
    hidden <= 512
    and batch_size * hidden >= MIN_WORK_PER_CORE
    and batch_size * hidden * steps >= 16 * MIN_WORK_PER_CORE
  )
