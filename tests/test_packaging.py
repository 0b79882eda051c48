"""What is declared in several places agrees: versions, bounds and extras."""

from pathlib import Path
import re
import tomllib

import pytest

import fptt_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']


def without_comments(path: Path) -> list[str]:
  """Returns the lines of a requirements file."""
  lines = (line.partition('#')[0].strip() for line in path.read_text().splitlines())
  return [line for line in lines if line]


def split_marker(requirement: str) -> tuple[str, str]:
  """Returns a requirement and its environment marker, '' for none."""
  bound, _, marker = requirement.partition(';')
  return bound.strip(), marker.strip()


def test_oldest_releases_are_the_lower_bounds() -> None:
  """`.ci/oldest.txt` pins each dependency to the bound that users are promised."""
  pins = {
    split_marker(line)[0] for line in without_comments(ROOT / '.ci' / 'oldest.txt')
  }
  requirements = list(PROJECT['dependencies'])
  for extra in ('experiments', 'export', 'river', 'tensorboard', 'test'):
    requirements += EXTRAS[extra]
  bounds = {
    split_marker(requirement)[0]
    for requirement in requirements
    if not requirement.startswith('fptt-jax[')
  }
  assert all('>=' in bound for bound in bounds), bounds
  assert {bound.replace('>=', '==') for bound in bounds} == pins


def test_readme_names_the_oldest_releases() -> None:
  """The README promises what is declared."""
  readme = (ROOT / 'README.md').read_text()
  for requirement in PROJECT['dependencies']:
    name, bound = split_marker(requirement)[0].split('>=')
    if name in ('jax', 'flax', 'optax'):
      assert f'{name} {bound}' in readme


def test_cuda_requirements_have_the_same_bound() -> None:
  """jax with CUDA is asked for in the release that the package asks for."""
  bounds = [line for line in PROJECT['dependencies'] if line.startswith('jax>=')]
  cuda = without_comments(ROOT / 'requirements-cuda.txt')
  assert cuda[0].replace('[cuda13]', '') == bounds[0]


def test_changelog_begins_with_the_version() -> None:
  """The newest entry is this version's, and tells whether it is released."""
  heading = re.search(
    r'^## (\S+) \((.*)\)$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE
  )
  assert heading is not None
  assert heading[1] == fptt_jax.__version__.removesuffix('.dev0')
  assert (heading[2] == 'unreleased') == fptt_jax.__version__.endswith('.dev0')


@pytest.mark.parametrize('folder', ['fptt_jax', 'experiments'])
def test_nothing_advises_to_install_scripts_from_a_wheel(folder: str) -> None:
  """No wheel holds the scripts, so no message installs them by the package's name."""
  for path in (ROOT / folder).rglob('*.py'):
    assert 'fptt-jax[experiments' not in path.read_text(), path
