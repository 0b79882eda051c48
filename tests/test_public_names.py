"""The public modules show their public names and nothing else, and `import fptt_jax`
leaves Flax alone.
"""

import importlib
from pathlib import Path
import pkgutil
import re
import subprocess
import sys
import types

import pytest

import fptt_jax
from fptt_jax import influence, losses, nn

ROOT = Path(__file__).parents[1]
PUBLIC_MODULES = (fptt_jax, influence, losses, nn)


@pytest.mark.parametrize('module', PUBLIC_MODULES, ids=lambda module: module.__name__)
def test_every_listed_name_is_public_and_exists(module: types.ModuleType) -> None:
  """Completion shows the names of `__all__`; the package also shows its version and its
  modules.
  """
  extra = {'__version__', 'nn'} if module is fptt_jax else set()
  assert set(dir(module)) == set(module.__all__) | extra
  assert sorted(module.__all__) == sorted(set(module.__all__))
  for name in dir(module):
    getattr(module, name)


@pytest.mark.parametrize('module', PUBLIC_MODULES, ids=lambda module: module.__name__)
def test_the_reference_names_all_that_is_public(module: types.ModuleType) -> None:
  """Each name has a page, or a sentence if it is a constant or a type."""
  page = (ROOT / 'docs' / 'api' / 'index.md').read_text()
  prefix = module.__name__.removeprefix('fptt_jax').removeprefix('.')
  named = set(re.findall(r'(?m)(?:^   |`)([\w.]+)(?:`|$)', page))
  # A section of a submodule leaves its name out.
  missing = {name for name in module.__all__ if not {name, f'{prefix}.{name}'} & named}
  assert missing <= {public.__name__.rpartition('.')[2] for public in PUBLIC_MODULES}


@pytest.mark.parametrize('module', PUBLIC_MODULES, ids=lambda module: module.__name__)
def test_no_listed_name_comes_from_another_library(module: types.ModuleType) -> None:
  """Neither imported modules nor other libraries' functions and classes are listed."""
  for name in dir(module):
    value = getattr(module, name)
    if isinstance(value, types.ModuleType):
      assert value in PUBLIC_MODULES, name
    elif isinstance(value, type) or callable(value):
      if value in (
        losses.LossState,
        losses.MetricSums,
      ):  # Type aliases belong to typing.
        continue
      assert value.__module__.startswith('fptt_jax'), name


@pytest.mark.parametrize(
  'package', [fptt_jax, nn], ids=lambda package: package.__name__
)
def test_no_name_hides_a_module(package: types.ModuleType) -> None:
  """An attribute that shares a submodule's name is that submodule."""
  for found in pkgutil.iter_modules(package.__path__):
    if found.name == 'river':
      pytest.importorskip('river', reason='river is not installed.')
    submodule = importlib.import_module(f'{package.__name__}.{found.name}')
    assert getattr(package, found.name) is submodule


def test_flax_is_imported_when_nn_is_first_used() -> None:
  """A fresh interpreter has no Flax after `import fptt_jax`, and the layers after
  `fptt_jax.nn`.
  """
  program = """
import sys
import fptt_jax
assert 'flax' not in sys.modules
assert 'nn' in dir(fptt_jax)
assert 'flax' not in sys.modules
assert fptt_jax.nn.LSTM.__name__ == 'LSTM'
assert 'flax' in sys.modules
from fptt_jax import nn
assert nn is fptt_jax.nn
"""
  subprocess.run([sys.executable, '-c', program], check=True)


@pytest.mark.parametrize('module', PUBLIC_MODULES, ids=lambda module: module.__name__)
def test_a_name_that_does_not_exist_is_an_attribute_error(
  module: types.ModuleType,
) -> None:
  """The error names the attribute."""
  with pytest.raises(AttributeError, match='LSTMM'):
    _ = module.LSTMM
