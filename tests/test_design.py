"""Who may import whom."""

import ast
from collections.abc import Iterator
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / 'fptt_jax'


def files_of(*patterns: str) -> list[Path]:
  """Returns the files of the library that match; fails where a pattern has none."""
  found = []
  for pattern in patterns:
    matching = sorted(LIBRARY.glob(pattern))
    assert matching, pattern
    found += matching
  return found


def imports_of(path: Path) -> Iterator[str]:
  """Yields the full name of each module or object that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path} has a relative import'
      for alias in node.names:
        yield f'{node.module}.{alias.name}'


def offenders(paths: list[Path], prefixes: tuple[str, ...]) -> list[str]:
  """Lists the imports of names that start with one of the prefixes."""
  return [
    f'{path.relative_to(ROOT)}: {name}'
    for path in paths
    for name in imports_of(path)
    if f'{name}.'.startswith(tuple(f'{prefix}.' for prefix in prefixes))
  ]


def test_models_losses_and_equations_know_no_training() -> None:
  """`nn`, the losses, the equations and the types stand below the train step."""
  below = files_of(
    'nn/**/*.py',
    'influence/*.py',
    'losses*',
    'losses/*.py' if (LIBRARY / 'losses').is_dir() else 'losses.py',
    '_[!_]*.py',
  )
  paths = [path for path in below if path.suffix == '.py']
  assert not offenders(paths, ('fptt_jax.training', 'fptt_jax.parallel'))


def test_training_knows_no_streams() -> None:
  """A stream's window is a step of a trainer, not the other way around."""
  assert not offenders(files_of('training/*.py'), ('fptt_jax.streaming',))


def test_parallel_knows_no_training() -> None:
  """A placement wraps functions that it is given."""
  assert not offenders(files_of('parallel/*.py'), ('fptt_jax.training',))


def test_the_step_never_sees_a_mesh() -> None:
  """It has a placement and names of axes; what is compiled around it may see one."""
  around = {'_trainer', '_functions', '_members', '__init__'}
  paths = [path for path in files_of('training/*.py') if path.stem not in around]
  assert not offenders(paths, ('jax.sharding', 'fptt_jax.parallel._devices'))
  words = {'mesh', 'Mesh', 'PartitionSpec', 'NamedSharding', 'shard_map'}
  for path in paths:
    names = {
      node.id if isinstance(node, ast.Name) else node.attr
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.Name | ast.Attribute)
    }
    assert not names & words, path


def test_files_of_the_train_step_are_short() -> None:
  """Each holds one subject."""
  for path in files_of('training/*.py'):
    assert len(path.read_text().splitlines()) <= 250, path


def test_experiments_use_public_names_only() -> None:
  """No script imports a private module, or a private name, of the library."""
  private = [
    f'{path.relative_to(ROOT)}: {name}'
    for path in sorted((ROOT / 'experiments').rglob('*.py'))
    for name in imports_of(path)
    if name.startswith('fptt_jax.')
    and any(part.startswith('_') for part in name.split('.')[1:])
  ]
  assert not private


def test_the_library_starts_with_what_all_need() -> None:
  """Flax takes a second to import, and optimizers and losses need none of it; streams
  and exported steps wait until they are asked for.
  """
  program = """
import fptt_jax, sys
late = ('flax', 'fptt_jax.streaming', 'fptt_jax._exporting', 'fptt_jax.river')
found = [name for name in sys.modules if name.startswith(late)]
assert not found, found
"""
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)
