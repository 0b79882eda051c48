"""File of a run's best parameters."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.core import files, processes
from experiments.core.checkpoints import describe
from experiments.core.files import atomic_write, first_line, user_errors
from experiments.core.flags import UserError
from experiments.core.workdir import config_sha256, differences

PARAMETERS_FILE = 'parameters.npz'
"""Name of the file of a run's best parameters."""


def write_parameters(folder: Path, params: Any) -> None:
  """Write a run's best parameters.

  All processes must call it; process 0 writes.

  Args:
    folder: the run's folder.
    params: a tree of arrays.

  Raises:
    UserError: the file cannot be written.
  """
  leaves = jax.tree.leaves_with_path(params)
  arrays: dict[str, Any] = {
    jax.tree_util.keystr(place): processes.gather_to_host(leaf)
    for place, leaf in leaves
  }
  path = folder / PARAMETERS_FILE

  def write() -> None:
    # With the hash a file of other settings is noticed, which may have equal shapes.
    arrays['config_sha256'] = np.array(config_sha256(folder.parent))
    with user_errors(path), atomic_write(path, 'wb') as file:
      np.savez(file, **arrays)

  processes.on_first_process(write)


def read_parameters(folder: Path, template: Any, config_sha256: str) -> Any:
  """Read the parameters that :func:`write_parameters` wrote.

  Args:
    folder: the run's folder.
    template: tree of arrays, or of their shapes and types, like the parameters.
    config_sha256: hash of the configuration of the run.

  Returns:
    A tree like `template`, of JAX arrays.

  Raises:
    UserError: the file is missing, damaged or of another model.
  """
  path = folder / PARAMETERS_FILE
  try:
    arrays = files.read_npz(path)
  except FileNotFoundError as error:
    raise UserError(
      f'there is no {path}: put it back, or train this run again.'
    ) from error
  except files.NPZ_ERRORS as error:
    raise UserError(
      f'{path} is damaged: {first_line(error)}. Put it back, or train this run again.'
    ) from error
  found = str(arrays.pop('config_sha256', ''))
  if found != config_sha256:
    raise UserError(
      f'{path} is of another configuration than config.json: put it back, or train '
      'this run again.'
    )
  shapes = {name: f'{leaf.dtype}{list(leaf.shape)}' for name, leaf in arrays.items()}
  differ = differences(describe(template), shapes)
  if differ:
    raise UserError(
      f'{path} does not fit the model of config.json; {"; ".join(differ[:3])}.'
    )

  def fetch(place: Any, _: Any) -> jax.Array:
    return jax.numpy.asarray(arrays[jax.tree_util.keystr(place)])

  return jax.tree.map_with_path(fetch, template)
