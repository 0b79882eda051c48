"""Choice of the devices that a batch or a population is split over."""

from typing import NamedTuple

import jax

from experiments.core.flags import check, checked
from experiments.core.recipe import Recipe

MIN_WORK_PER_CORE = 4096
"""B times H from which on one run keeps a CPU's core busy."""


class Meshes(NamedTuple):
  """Devices to split work over, None for one.

  Attributes:
    batch: where each takes its share of a batch.
    members: where each takes its share of a population.
  """

  batch: jax.sharding.Mesh | None
  members: jax.sharding.Mesh | None


def choose_meshes(
  recipe: Recipe, batch_size: int, hidden: int, steps: int, members: int = 1
) -> Meshes:
  """What to split: a batch where there is one member, else the members. `steps` are
  those of a window.

  Raises:
    UserError: more devices than there are, or a batch size or population that is no
      multiple of them.
  """
  devices = jax.devices()
  which, number = (
    ('batch size', batch_size) if members == 1 else ('population', members)
  )
  if over_all_devices(recipe):
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
    devices = devices[: recipe.devices]
  elif number % len(devices) or (
    members == 1 and is_cpu() and not pays_on_cpu(batch_size, hidden, steps)
  ):
    devices = devices[:1]
  mesh = jax.sharding.Mesh(devices, ('devices',)) if len(devices) > 1 else None
  return Meshes(mesh, None) if members == 1 else Meshes(None, mesh)


def population_size(recipe: Recipe, batch_size: int, hidden: int) -> int | None:
  """How many runs to train side by side, None for all."""
  if over_all_devices(recipe):
    return 1
  if recipe.population == 0 and is_cpu() and batch_size * hidden >= MIN_WORK_PER_CORE:
    return 1
  return recipe.population or None


def over_all_devices(recipe: Recipe) -> bool:
  """Whether every batch is split over all devices of all processes."""
  return recipe.data_parallel or jax.process_count() > 1


def is_cpu() -> bool:
  """Whether this process computes on a CPU."""
  return jax.default_backend() == 'cpu'


def pays_on_cpu(batch_size: int, hidden: int, steps: int) -> bool:
  """Whether half a batch on each of two cores is quicker than XLA's own use of both.

  Seen for LSTMs of H = 128 and 256, B = 20 to 128, windows of 7 steps and more; not at
  H = 1024, where each core would read all weights, nor where the devices mostly wait
  for each other: B = 8, H = 16, or windows of one step.
  """
  return (
    hidden <= 512
    and batch_size * hidden >= MIN_WORK_PER_CORE
    and batch_size * hidden * steps >= 16 * MIN_WORK_PER_CORE
  )
