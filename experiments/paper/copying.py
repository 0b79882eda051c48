"""How many tokens a method needs until a network can copy sequences of some length.

A sequence shows l random bits, and then asks for them in the same order. The weights
are updated after every step. The longest sequences have one bit at first; whenever the
loss of an interval is below 0.15 bits per bit asked for, they have one more, and the
others have up to five bits less.

References:
  Menick et al., "Practical Real Time Recurrent Learning with a Sparse Approximation",
  ICLR 2021: the curriculum.
"""

from collections.abc import Sequence
import math
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import numpy as np
import optax
from tqdm import tqdm

import fptt_jax
from fptt_jax import influence, nn

MILESTONES = (2, 4, 8, 12)
"""Numbers of bits of which the tokens that were needed are reported."""

GROWS_BELOW = 0.15
"""Loss in bits per bit asked for, below which sequences become longer."""

SHORTER = 5
"""Bits that a sequence may have less than the longest."""

BLANK = 2
"""Label of the steps at which bits are shown; the bits themselves are 0 and 1."""

INFLUENCES: dict[str, str | influence.Influence] = {
  'none': 'none',
  'snap1': 'snap1',
  'snap2': influence.snap(2),
  'uoro': 'uoro',
  'kf': influence.kronecker(1, 'signs'),
  'rtrl': 'rtrl',
}
"""Influences by the name of their lines.

The optimal Kronecker sum is left out: its decompositions take over twenty minutes here.
"""


class Settings(NamedTuple):
  """Settings of a study.

  Attributes:
    hidden: H, units of the GRU.
    batch_size: B.
    batches: training batches.
    interval: batches after which the length may grow.
    longest: bits at which the length stays.
    lr: learning rate of Adam.
  """

  hidden: int
  batch_size: int
  batches: int
  interval: int
  longest: int
  lr: float


def draw(
  rng: np.random.Generator, num_steps: int, batch_size: int, longest: int
) -> fptt_jax.Batch:
  """Draw sequences of bits to copy.

  Args:
    rng: random numbers.
    num_steps: T, at least twice `longest`.
    batch_size: B.
    longest: bits of the longest sequences.

  Returns:
    A ragged batch of inputs float32 [T, B, 2], which are bits as ±1 and whether to
    recall, and labels int32 [T, B].
  """
  bits = rng.integers(max(1, longest - SHORTER), longest + 1, batch_size)
  shown = rng.integers(0, 2, (longest, batch_size))
  steps = np.arange(num_steps)[:, None]
  rows = np.arange(batch_size)
  is_shown = steps < bits
  is_asked = (steps >= bits) & (steps < 2 * bits)
  signs = 2 * shown[np.minimum(steps, longest - 1), rows] - 1
  inputs = np.stack([np.where(is_shown, signs, 0), is_asked], -1).astype(np.float32)
  recalled = shown[np.clip(steps - bits, 0, longest - 1), rows]
  labels = np.where(is_asked, recalled, BLANK).astype(np.int32)
  return fptt_jax.Batch(inputs, labels, lengths=(2 * bits).astype(np.int32))


def make_trainer(settings: Settings, name: str) -> fptt_jax.Trainer:
  """Return the trainer of one run, with an update after every step.

  Args:
    settings: settings of the study.
    name: a name in :data:`INFLUENCES`.
  """

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    return nn.Sequential(
      nn.GRU(2, settings.hidden, rngs=rngs),
      nnx.Linear(settings.hidden, BLANK + 1, rngs=rngs),
    )

  return fptt_jax.make_trainer(
    nn.from_nnx(build),
    fptt_jax.losses.sequence_classification(BLANK + 1),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(settings.lr)),
    method='ogd',
    influence=INFLUENCES[name],
  )


def study(settings: Settings, name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
  """Train runs with one influence side by side.

  Args:
    settings: settings of the study.
    name: a name in :data:`INFLUENCES`.
    seeds: seeds of the runs.

  Returns:
    A row per seed: `influence`, `seed`, the bits that the sequences had at the end
    (`bits`), all `tokens` shown, and for each of :data:`MILESTONES` the tokens shown
    until sequences had that many bits; None if they never had.
  """
  trainer = fptt_jax.vmap_trainer(make_trainer(settings, name), own_batches=True)
  run = fptt_jax.scan_train_steps(trainer)
  rngs = [np.random.default_rng(seed) for seed in seeds]
  lengths = np.ones(len(seeds), int)
  tokens = np.zeros(len(seeds), int)
  reached: list[dict[int, int]] = [{} for _ in seeds]
  state = None
  start = time.perf_counter()
  intervals = range(math.ceil(settings.batches / settings.interval))
  for _ in tqdm(intervals, desc=f'copying, {name}', disable=None):
    items = _draw_interval(settings, rngs, lengths)
    if state is None:
      keys = jax.numpy.stack([jax.random.key(seed) for seed in seeds])
      state = trainer.init(keys, jax.tree.map(lambda leaf: leaf[0], items))
    state, metrics = run(state, (), items)
    tokens += np.asarray(items.lengths).sum((0, 2))
    for number, loss in enumerate(_bits_per_bit(metrics)):
      if loss < GROWS_BELOW and lengths[number] < settings.longest:
        lengths[number] += 1
        reached[number][int(lengths[number])] = int(tokens[number])
  seconds = time.perf_counter() - start
  return [
    {
      'influence': name,
      'seed': seed,
      'bits': int(lengths[number]),
      'tokens': int(tokens[number]),
      **{f'tokens_to_{bits}': reached[number].get(bits) for bits in MILESTONES},
      'seconds_together': round(seconds, 1),
    }
    for number, seed in enumerate(seeds)
  ]


def _draw_interval(
  settings: Settings, rngs: Sequence[np.random.Generator], lengths: np.ndarray
) -> fptt_jax.Batch:
  """Draw the batches of an interval, arrays [N, R, ...] for R runs."""
  # A power of two, so that few numbers of steps have to be compiled.
  num_steps = 2 * 2 ** math.ceil(math.log2(lengths.max()))
  batches = []
  for _ in range(settings.interval):
    drawn = [
      draw(rng, num_steps, settings.batch_size, int(longest))
      for rng, longest in zip(rngs, lengths, strict=True)
    ]
    batches.append(jax.tree.map(lambda *leaves: np.stack(leaves), *drawn))
  together: fptt_jax.Batch = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
  return together


def _bits_per_bit(metrics: fptt_jax.StepMetrics) -> np.ndarray:
  """Return the loss of an interval for each run, in bits per bit asked for.

  The labels of the steps that show bits are learned at once, and are half of all steps.
  """
  sums = jax.tree.map(lambda leaf: np.asarray(leaf).sum(0), metrics.totals)
  losses = [
    fptt_jax.compute_metrics(jax.tree.map(lambda leaf, n=number: leaf[n], sums))['loss']
    for number in range(len(metrics.loss[0]))
  ]
  return 2 * np.array(losses) / math.log(2)
