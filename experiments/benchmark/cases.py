"""Models, shapes and data that are timed."""

import math
from typing import NamedTuple

import numpy as np

import fptt_jax


class Case(NamedTuple):
  """Shape of a model and of its data.

  Attributes:
    name: name in the tables.
    num_steps: T.
    num_windows: K.
    batch_size: B.
    features: D; for words the size of their embedding.
    hidden: H.
    outputs: C classes or V words; 1 for regression.
    words: whether it is a language model, with tokens as inputs and a label per step.
      Otherwise there is one label per sequence.
    batches: number of batches per epoch of the real task; 0 if the table has no time
      per epoch.
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
    """Number of steps S of the longest window."""
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
    # The recurrence of ptb300 alone: its readout takes most of the time there.
    Case('ptb300-core', 300, 6, 128, 256, 256),
    Case('ptb300', 300, 6, 128, 256, 256, 10_000, words=True),
    # Bound by the products of the cell.
    Case('wide', 64, 4, 16, 256, 1024),
    # Bound by the overhead of each step.
    Case('tiny', 784, 28, 8, 1, 16),
    Case('smoke', 12, 3, 4, 1, 4),
  )
}
"""Cases by the values of --cases; 'smoke' is for tests."""


POPULATION_CASES = ('M28', 'add', 'tiny', 'smoke')
"""Cases that are also trained as populations."""


POPULATION_SIZES = (1, 2, 4, 8, 16, 32)
"""Numbers R of members; the first must be 1, which the others are compared with."""


DEFAULT_CASES = tuple(name for name in CASES if name != 'smoke')
"""Cases that are timed unless --cases names others."""


class CreditCase(NamedTuple):
  """A layer that is trained with credit across windows.

  Attributes:
    layer: name of a layer of `fptt_jax.nn`.
    influences: the influences to time, besides 'none'.
    implementation: that of the layer; '' for its default.
  """

  layer: str
  influences: tuple[str, ...]
  implementation: str = ''


CREDIT_CASES = (
  CreditCase('LSTM', ('snap1', 'uoro', 'lookback', 'synthetic')),
  CreditCase('GRU', ('snap1',)),
  # Without the native kernels, which make the steps without an influence faster.
  CreditCase('LSTM', ('snap1',), 'custom_vjp'),
  CreditCase('GRU', ('snap1',), 'custom_vjp'),
  CreditCase('LRU', ('rtrl',)),
  CreditCase('IndRNN', ('rtrl',)),
)
"""Layers and influences of the part 'influence'."""


CREDIT_SHAPE = Case('credit', 256, 16, 32, 1, 64)
"""Shape of the models of the part 'influence': windows of 16 steps."""


CELL_SHAPE = Case('cell', 112, 4, 64, 1, 128)
"""Shape of the models of the part 'cells': windows of 28 steps."""


LATENCY_WINDOWS = 1000
"""Number of windows, of one step each, that the part 'latency' times together."""


LR = 1e-3
"""Learning rate of Adam, of all systems."""


CLIP = 1.0
"""Limit of the global norm of the regularized gradient, of all systems."""


ALPHA = 0.1
"""α of FPTT, of all systems."""


BETA = 0.5
"""β of FPTT's summary of the weights, of all systems."""


def flops(case: Case) -> float:
  """Count the floating-point operations of the matrix products of a batch.

  These are the products of the LSTM and of the readout, once forward and twice
  backward.

  Args:
    case: the shapes.
  """
  # The gradient of inputs is needed only if they are trained embeddings.
  input_products = 3 if case.words else 2
  per_step = 8 * case.hidden * (3 * case.hidden + input_products * case.features)
  readouts = case.num_steps if case.words else case.num_windows
  readout = 2 * case.hidden * case.outputs * readouts
  return float(case.batch_size * (case.num_steps * per_step + 3 * readout))


def varied_cases(small: bool) -> dict[str, list[tuple[int, Case]]]:
  """Return the cases whose time is measured as a function of one dimension.

  T, H and B vary at windows of 16 steps, K at the length of pixel MNIST.

  Args:
    small: whether to return tiny shapes, for tests.

  Returns:
    By the dimension's letter, (value, case) for each of its values.
  """
  base = Case('', 256, 16, 64, 1, 128)
  mnist = CASES['M28']
  lengths: tuple[int, ...] = (256, 1024, 4096, 16_384)
  windows: tuple[int, ...] = (1, 28, 112, 392)
  factors: tuple[int, ...] = (1, 2, 4)
  if small:
    base = Case('', 32, 2, 4, 1, 4)
    mnist = Case('', 12, 3, 4, 1, 4)
    lengths = (32, 64)
    windows = (1, 3, 12)
    factors = (1, 2)
  widths = [base.hidden * factor for factor in factors]
  batch_sizes = [base.batch_size * factor for factor in factors]
  return {
    'T': [(n, base._replace(num_steps=n, num_windows=n // 16)) for n in lengths],
    'K': [(n, mnist._replace(num_windows=n)) for n in windows],
    'H': [(n, base._replace(hidden=n)) for n in widths],
    'B': [(n, base._replace(batch_size=n)) for n in batch_sizes],
  }


def draw(case: Case) -> tuple[np.ndarray, np.ndarray]:
  """Draw random inputs and targets, time-major.

  Args:
    case: the shapes.

  Returns:
    Inputs float32 [T, B, D] and targets [B], float32 for regression and int32 for
    classes; or int32 tokens [T, B] and the next tokens [T, B].
  """
  rng = np.random.default_rng(0)
  if case.words:
    shape = (case.num_steps + 1, case.batch_size)
    tokens = rng.integers(0, case.outputs, shape).astype(np.int32)
    return tokens[:-1], tokens[1:]
  shape_with_features = (case.num_steps, case.batch_size, case.features)
  inputs = rng.uniform(size=shape_with_features).astype(np.float32)
  if case.outputs == 1:
    return inputs, rng.uniform(size=case.batch_size).astype(np.float32)
  return inputs, rng.integers(0, case.outputs, case.batch_size).astype(np.int32)


def make_loss(case: Case) -> fptt_jax.Loss:
  """Return the loss of a case.

  Words have a cross-entropy at each step. Other cases have a cross-entropy or a squared
  error at the end of each window, times β.

  Args:
    case: the shapes.
  """
  if case.words:
    return fptt_jax.losses.sequence_classification(case.outputs)
  if case.outputs == 1:
    return fptt_jax.losses.terminal_regression()
  # The rivals compute no divergence term, so ours must not pay for one either.
  return fptt_jax.losses.terminal_classification(case.outputs, divergence='none')
