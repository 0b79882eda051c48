"""Devices and meshes: several CPU devices, and checks of a mesh."""

from typing import Any

import jax

from fptt_jax._checks import check_integer, check_type, require
from fptt_jax._cores import count_cores


def use_cpu_devices(num_devices: int | None = None) -> None:
  """Split the CPU into several devices, for `make_trainer(mesh=...)`.

  This pays for small networks: XLA runs much of their step on one thread per device.
  Call it before JAX looks for devices; afterwards it has no effect. Other backends are
  not affected.

  Args:
    num_devices: Number of devices; by default the cores that the process may use.

  Raises:
    ValueError: `num_devices` is not an integer from 1 to 1024. Each device has threads
      of its own.

  Example:
    At the start of a program::

      fptt_jax.use_cpu_devices()
      mesh = jax.make_mesh((jax.device_count(),), ('batch',))
      trainer = fptt_jax.make_trainer(model, loss, optimizer, num_windows=4, mesh=mesh)
  """
  if num_devices is None:
    num_devices = count_cores()
  expected = 'an integer from 1 to 1024'
  num_devices = check_integer('num_devices', num_devices, 1, 1024, expected)
  try:
    jax.config.update('jax_num_cpu_devices', num_devices)
  except RuntimeError:
    # JAX has looked for devices already.
    return


def one_axis(mesh: jax.sharding.Mesh) -> tuple[jax.sharding.Mesh, str]:
  """Return a mesh with its axis automatic, and the name of the axis.

  Args:
    mesh: Mesh with one axis of any type.

  Raises:
    TypeError: `mesh` is not a mesh.
    ValueError: `mesh` has several axes.
  """
  check_type('mesh', mesh, jax.sharding.Mesh)
  require(len(mesh.axis_names) == 1, 'mesh', 'of one axis', mesh.axis_names)
  return jax.sharding.Mesh(mesh.devices, mesh.axis_names), str(mesh.axis_names[0])


def check_placement(batch: Any, mesh: jax.sharding.Mesh | None) -> None:
  """Raise unless the caller's mesh and a batch's sharding agree with a trainer's.

  Args:
    batch: Tree of arrays, which may be traced or abstract.
    mesh: The trainer's mesh, whose axis is automatic, or None.

  Raises:
    ValueError: `jax.set_mesh` is in force with explicit axes or another mesh than
      `mesh`, or an array is sharded explicitly over another mesh.
  """
  current = jax.sharding.get_abstract_mesh()
  own = None if mesh is None else mesh.abstract_mesh
  fits = own is None or current.empty or current == own
  hint = 'Set the same mesh, with axis_types=(jax.sharding.AxisType.Auto,), or none.'
  require(fits, 'the mesh of jax.set_mesh', f"the trainer's mesh {own}", current, hint)
  accepted = 'without explicit sharding' if own is None else f'sharded over {own}'
  for path, leaf in jax.tree.leaves_with_path(batch):
    sharding = _explicit_sharding(leaf)
    same = mesh is not None and sharding and _same_axes(sharding.mesh, mesh)
    name = f'batch{jax.tree_util.keystr(path)}'
    require(sharding is None or same, name, accepted, sharding)


def _explicit_sharding(leaf: Any) -> Any:
  """Return the sharding of an array that is split over explicit axes, else None."""
  if not isinstance(leaf, jax.Array):
    return None
  sharding = getattr(jax.typeof(leaf), 'sharding', None)
  if sharding is None or sharding.mesh.empty or not sharding.mesh.explicit_axes:
    return None
  # A sharding without named axes is a copy on each device, which any mesh can use.
  return sharding if any(sharding.spec) else None


def _same_axes(mesh: Any, other: jax.sharding.Mesh) -> bool:
  """Return whether two meshes have the same axes of the same sizes.

  The types of their axes may differ.
  """
  return bool(mesh.axis_names == other.axis_names and mesh.size == other.size)


def check_divisible(which: str, number: int, devices: int) -> None:
  """Raise a ValueError unless the devices can share a number evenly."""
  accepted = f'a multiple of the {devices} devices it is split over'
  require(number % devices == 0, which, accepted, number)
