"""The examples in the docstrings run as printed."""

import doctest
import importlib
import pkgutil

import pytest

import fptt_jax

MODULES = [module.name for module in pkgutil.walk_packages(fptt_jax.__path__, 'fptt_jax.')]


@pytest.mark.parametrize('name', MODULES)
def test_docstring_examples(name: str) -> None:
  """Each example stands on its own imports and gives what it shows."""
  module = importlib.import_module(name)
  for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs={}):
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0, test.name


def test_there_are_examples() -> None:
  """The finder finds them: the main entry points have one each."""
  found = {test.name for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples}
  assert {
    'fptt_jax.transformation.fptt',
    'fptt_jax.training.trainer',
    'fptt_jax.stability.stability',
    'fptt_jax.losses.from_function',
    'fptt_jax.nn.adapters.from_nnx',
    'fptt_jax.programs.scan_steps',
    'fptt_jax.programs.population',
  } <= found
