"""Models, shapes and data that are timed."""

import math
from typing import NamedTuple

import numpy as np

import fptt_jax


class Case(NamedTuple):
  """What is trained, and its shape.

  Attributes:
    name: for tables.
    num_steps: T.
    num_windows: K.
    batch_size: B.
    features: D; for words the size of their embedding.
    hidden: H.
    outputs: C classes or V words; 1 for regression.
    words: whether it is a language model: tokens in, a label each step. Else terminal.
    batches: those of an epoch of the real task; 0 where an epoch's time is of no
      interest.
  """

  name: str
  num_steps: int
  num_windows: int
  batch_size: int
  features: int
  hidden: int
  outputs: int = 10
  words: bool = False
  batches: int = 0

  @property
  def size(self) -> int:
    """S."""
    return math.ceil(self.num_steps / self.num_windows)


CASES = {
  case.name: case
  for case in (
    Case('M28', 784, 28, 128, 1, 128, batches=429),  # Pixel MNIST, of 55,000 images.
    Case('M7', 784, 7, 128, 1, 128),
    Case('M112', 784, 112, 128, 1, 128),
    Case('M784', 784, 784, 128, 1, 128),
    Case('M-bptt', 784, 1, 128, 1, 128),
    Case('add', 200, 10, 128, 2, 128, 1),
    Case('ptb300-core', 300, 6, 128, 256, 256),
    Case('ptb300', 300, 6, 128, 256, 256, 10_000, words=True),
    Case('wide', 64, 4, 16, 256, 1024),
    Case('tiny', 784, 28, 8, 1, 16),
    Case('smoke', 12, 3, 4, 1, 4),
  )
}


POPULATION_CASES = ('M28', 'add', 'tiny', 'smoke')


POPULATION_SIZES = (1, 2, 4, 8, 16, 32)


DEFAULT_CASES = tuple(name for name in CASES if name != 'smoke')


def flops(case: Case) -> float:
  """Floating-point operations of the matrix products of a batch: LSTM and readout,
  forward and twice backward; but nobody asks for the gradient of inputs that are
  data.
  """
  lstm = 8 * case.hidden * (3 * case.hidden + (3 if case.words else 2) * case.features)
  readout = (
    2
    * case.hidden
    * case.outputs
    * (case.num_steps if case.words else case.num_windows)
  )
  return float(case.batch_size * (case.num_steps * lstm + 3 * readout))


def varied_cases(small: bool) -> dict[str, list[tuple[int, Case]]]:
  """By what is varied its values and their cases: T, H and B at S = 16, K at the T of
  pixel MNIST.
  """
  base, mnist = Case('', 256, 16, 64, 1, 128), CASES['M28']
  lengths, windows, factors = (256, 1024, 4096, 16_384), (1, 28, 112, 392), (1, 2, 4)
  if small:
    base, mnist = Case('', 32, 2, 4, 1, 4), Case('', 12, 3, 4, 1, 4)
    lengths, windows, factors = (32, 64), (1, 3, 12), (1, 2)
  return {
    'T': [(n, base._replace(num_steps=n, num_windows=n // 16)) for n in lengths],
    'K': [(n, mnist._replace(num_windows=n)) for n in windows],
    'H': [(n * base.hidden, base._replace(hidden=n * base.hidden)) for n in factors],
    'B': [
      (n * base.batch_size, base._replace(batch_size=n * base.batch_size))
      for n in factors
    ],
  }


LR = 1e-3


CLIP = 1.0


ALPHA = 0.1


BETA = 0.5


def draw(case: Case) -> tuple[np.ndarray, np.ndarray]:
  """Inputs and targets, time-major."""
  rng = np.random.default_rng(0)
  steps = (case.num_steps, case.batch_size)
  if case.words:
    tokens = rng.integers(
      0, case.outputs, (case.num_steps + 1, case.batch_size)
    ).astype(np.int32)
    return tokens[:-1], tokens[1:]
  inputs = rng.uniform(size=(*steps, case.features)).astype(np.float32)
  if case.outputs == 1:
    return inputs, rng.uniform(size=case.batch_size).astype(np.float32)
  return inputs, rng.integers(0, case.outputs, case.batch_size).astype(np.int32)


def make_loss(case: Case) -> fptt_jax.Loss:
  """Cross-entropy or squared error, at each window's end times β, or at each word."""
  if case.words:
    return fptt_jax.losses.sequence_classification(case.outputs)
  if case.outputs == 1:
    return fptt_jax.losses.terminal_regression()
  return fptt_jax.losses.terminal_classification(case.outputs, divergence='none')
