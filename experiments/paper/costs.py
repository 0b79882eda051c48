"""Time of a batch by each method of the tournament.

Runs of the tournament share the machine with other programs, so that their seconds do
not compare methods. This study times a few batches of each method by turns. Tables use
its times for scores at equal seconds.
"""

from collections.abc import Callable, Sequence
import time
from typing import Any

import jax
import numpy as np

from experiments import add_task, images, language_model, online
from experiments.core.loop import Task
from experiments.data.sequences import Examples, Splits
from experiments.data.text import Text
from experiments.paper.items import Entry
import fptt_jax

VOCABULARY = {'ptb_c': 50, 'text_c': 50}
"""Number of tokens of a text; 10,000 of those not named."""


def measure(
  entries: Sequence[Entry], batches: int, rounds: int
) -> list[dict[str, Any]]:
  """Time the batches of several methods on one task, by turns.

  The data are random numbers of the shapes of the task. Evaluations are not timed.

  Args:
    entries: the lines of the task, `tbptt` among them.
    batches: batches per program.
    rounds: timed calls of each program.

  Returns:
    A row per line: `batch_ms`, the median time of a batch, and `relative`, the median
    over the rounds of the ratio to `tbptt`.
  """
  programs = {entry.label: _compiled(entry, batches) for entry in entries}
  times: dict[str, list[float]] = {label: [] for label in programs}
  for _ in range(rounds):
    for label, program in programs.items():
      start = time.perf_counter()
      program()
      times[label].append(1e3 * (time.perf_counter() - start) / batches)
  baseline = np.asarray(times[f'{entries[0].task}.tbptt'])
  return [
    {
      'task': entry.task,
      'method': entry.label.removeprefix(f'{entry.task}.'),
      'batch_ms': float(np.median(times[entry.label])),
      'relative': float(np.median(np.asarray(times[entry.label]) / baseline)),
    }
    for entry in entries
  ]


def _compiled(entry: Entry, batches: int) -> Callable[[], None]:
  """Return a program that trains on some batches, run once already.

  Args:
    entry: the line.
    batches: number of batches.
  """
  task = make_task(entry, batches)
  portion = next(iter(task.portions(1, 0)))
  items = jax.tree.map(lambda leaf: leaf[:batches], portion.items)
  first = jax.tree.map(lambda leaf: leaf[0], items)
  source = jax.device_put(task.source)
  steps = fptt_jax.scan_train_steps(task.trainer, task.read)
  state = task.trainer.init(jax.random.key(0), task.read(source, first))

  def run() -> None:
    nonlocal state
    state, _ = steps(state, source, items)
    jax.block_until_ready(state)

  run()
  return run


def make_task(entry: Entry, batches: int) -> Task:
  """Return the task of one run, with random data in place of images and texts.

  Args:
    entry: the line.
    batches: number of batches that an epoch must have.
  """
  config = entry.config
  method = config.method[0]
  rng = np.random.default_rng(0)
  if isinstance(config, images.Config):
    count = batches * config.batch_size
    pixels = rng.integers(0, 256, (count, 28, 28, 1), np.uint8)
    labels = rng.integers(0, 10, count, np.int32)
    drawn = Examples(pixels, labels)
    splits = Splits(drawn, drawn, drawn)
    order = None
    if config.task == 'permuted':
      order = rng.permutation(28 if config.row else (28 // config.pool) ** 2)
    moments = (0.5, 0.5)
    sequences = images.Sequences(splits, moments, config.row, order, 10, config.pool)
    return images.make_task(config, sequences, method, 1)
  if isinstance(config, language_model.Config):
    size = VOCABULARY.get(config.task, 10_000)
    # One token more than the inputs, since the last input needs a target.
    length = config.batch_size * (batches * config.seq_len + 1)
    tokens = rng.integers(0, size, length, np.int32)
    text = Text(tokens, tokens, tokens, [str(number) for number in range(size)])
    return language_model.make_task(config, text, method, 1)
  if isinstance(config, online.Config):
    return online.make_task(config, (0,), method, 1)
  return add_task.make_task(config, (0,), method, 1)
