"""The examples in the docstrings run as printed; the figures of
docs/guides/several_devices.md are what its formulas give.
"""

import doctest
import importlib
from pathlib import Path
import pkgutil
from typing import NamedTuple

import jax
import pytest

from experiments import images, language_model
import fptt_jax

MODULES = [
  module.name for module in pkgutil.walk_packages(fptt_jax.__path__, 'fptt_jax.')
]


@pytest.mark.parametrize('name', MODULES)
def test_docstring_examples(name: str) -> None:
  """Each example stands on its own imports and gives what it shows."""
  if name == 'fptt_jax.river':
    pytest.importorskip('river', reason='river is not installed.')
  module = importlib.import_module(name)
  for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs={}):
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0, test.name


def test_there_are_examples() -> None:
  """The finder finds them: the main entry points have one each."""
  found = {
    test.name
    for name in MODULES
    if name != 'fptt_jax.river'
    for test in doctest.DocTestFinder().find(importlib.import_module(name))
    if test.examples
  }
  assert {
    'fptt_jax._transform.fptt',
    'fptt_jax.training._trainer.make_trainer',
    'fptt_jax.parallel._batches.make_global_batch',
    'fptt_jax._stability.spectral_radius',
    'fptt_jax.losses._function.from_function',
    'fptt_jax.nn._from_nnx.from_nnx',
    'fptt_jax.training._scan.scan_train_steps',
    'fptt_jax.training._members.vmap_trainer',
    'fptt_jax.streaming._learner.make_learner',
  } <= found


SUSTAINED = 20e12
"""Assumed flop/s of a device."""
LINKS = {
  'NVLink 4': (450e9, 2e-6),
  'PCIe 4 x16': (32e9, 5e-6),
  '400 Gbit/s': (50e9, 5e-6),
  '100 Gbit/s': (12.5e9, 20e-6),
}
"""Assumed bytes/s each way and seconds a hop."""
DEVICES = 8


class Case(NamedTuple):
  """A model and the windows it is trained in."""

  name: str
  parameters: int
  multiply_adds: int  # A token: products with weights.
  num_steps: int
  num_windows: int
  batch_size: int

  @property
  def tokens(self) -> float:
    """Those of a window on each device."""
    return -(-self.num_steps // self.num_windows) * self.batch_size / DEVICES

  def break_even(self, link: str) -> float:
    """Tokens of a window on each device for which computation takes as long as
    communication.
    """
    bandwidth, latency = LINKS[link]
    sent = 2 * (DEVICES - 1) / DEVICES * 4 * self.parameters
    return (
      (sent / bandwidth + 2 * (DEVICES - 1) * latency)
      * SUSTAINED
      / (3 * 2 * self.multiply_adds)
    )


def lstm(features: int, hidden: int) -> int:
  return 4 * hidden * (features + hidden)


def cases() -> list[Case]:
  """Parameters as the experiments' models have them."""
  images_model = images.make_model(images.Config(), 784, 1, 10)
  words_model = language_model.make_model(language_model.Config(), 10_000)
  awd = language_model.TASKS['ptb_w']
  awd_model = language_model.make_model(
    language_model.Config(task='ptb_w', **awd), 10_000
  )
  e, h, last, m = (
    awd[name] for name in ('embedding', 'hidden', 'last_hidden', 'experts')
  )
  awd_products = (
    lstm(e, h) + lstm(h, h) + lstm(h, last) + last * m * (e + 1) + m * e * 10_000
  )
  count = lambda model: sum(
    leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
  )
  return [
    Case('pixel MNIST, LSTM 128', count(images_model), lstm(1, 128), 784, 28, 128),
    Case(
      'PTB-300, LSTM 256',
      count(words_model),
      lstm(256, 256) + 256 * 10_000,
      300,
      6,
      128,
    ),
    Case('PTB-w, AWD-LSTM', count(awd_model), awd_products, 70, 3, 6),
  ]


def test_scaling_tables() -> None:
  """The three tables have these rows and no others."""
  text = (
    Path(__file__).parents[1] / 'docs' / 'guides' / 'several_devices.md'
  ).read_text()
  number = lambda x: f'{x:,.0f}' if x >= 10 else f'{x:.2g}'
  expected = []
  for case in cases():
    megabytes = 2 * (DEVICES - 1) / DEVICES * 4 * case.parameters / 1e6
    ratios = [
      (
        case.break_even(link) / case.tokens,
        case.break_even(link) / (case.batch_size / DEVICES),
      )
      for link in LINKS
    ]
    shape = [
      f'{case.parameters:,}',
      f'{case.multiply_adds:,}',
      str(case.num_windows),
      number(case.tokens),
    ]
    expected += [
      [case.name, *shape, f'{megabytes:.3g}', f'{case.num_windows * megabytes:.3g}'],
      [case.name, *(number(case.break_even(link)) for link in LINKS)],
      [case.name, *(f'{number(window)}, {number(step)}' for window, step in ratios)],
    ]
  names = tuple(f'| {row[0]} |' for row in expected)
  found = [
    line.strip('| ').split(' | ')
    for line in text.splitlines()
    if line.startswith(names)
  ]
  assert sorted(found) == sorted(expected)
