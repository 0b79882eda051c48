"""Time of a step of each recurrent layer, and of a window that has a single step."""

from collections.abc import Callable
import os
from typing import Any, NamedTuple

from flax import nnx
import jax

from experiments.benchmark import cases, cost
from experiments.benchmark.cases import CASES, CELL_SHAPE, LATENCY_WINDOWS, Case
from experiments.benchmark.ours import lstm, make_model, make_trainer
from experiments.benchmark.settings import Config
from experiments.benchmark.timing import milliseconds, timed
import fptt_jax
from fptt_jax import nn


class Variant(NamedTuple):
  """A layer, and how its windows run.

  Attributes:
    layer: its name in `fptt_jax.nn`.
    implementation: that of the layer; '' if the layer has only one.
    products: what the operands of its products are rounded to.
  """

  layer: str
  implementation: str = ''
  products: str = 'float32'

  def make_cell(self, shape: Case) -> Callable[[nnx.Rngs], Any]:
    """Return a function (rngs) -> the layer."""
    settings = {}
    if self.implementation:
      settings['implementation'] = self.implementation
    if self.products != 'float32':
      settings['products'] = self.products
    kind = getattr(nn, self.layer)
    return lambda rngs: kind(shape.features, shape.hidden, rngs=rngs, **settings)


NATIVE_LAYERS = ('LSTM', 'GRU', 'ElmanRNN', 'AntisymmetricRNN')
"""Layers with a native kernel."""

VARIANTS = (
  *(
    variant
    for layer in NATIVE_LAYERS
    for variant in (
      Variant(layer, 'scan'),
      Variant(layer, 'custom_vjp'),
      Variant(layer, 'native'),
      Variant(layer, 'native', 'bfloat16'),
    )
  ),
  *(
    Variant(layer, implementation)
    for layer in ('IndRNN', 'LRU')
    for implementation in ('scan', 'custom_vjp')
  ),
  Variant('FastGRNN'),
  Variant('IncrementalRNN'),
)
"""Layers and implementations of the part 'cells'."""


def measure_cells(config: Config) -> list[dict[str, Any]]:
  """Time a train step of each layer by each of its implementations, in turns.

  Args:
    config: number of rounds; with the case 'smoke' two layers of a toy's shape.

  Returns:
    A row per layer and implementation: `step_us`, the time of a batch by T, and
    `times_scan`, the time of the layer's first implementation relative to its own.
  """
  small = 'smoke' in config.cases
  shape = CASES['smoke'] if small else CELL_SHAPE
  variants = (VARIANTS[0], VARIANTS[1], VARIANTS[-1]) if small else VARIANTS
  steps = [_step_of(variant, shape) for variant in variants]
  times: list[list[float]] = [[] for _ in steps]
  for _ in range(config.rounds):
    for step, several in zip(steps, times, strict=True):
      several.append(timed(step))
  rows: list[dict[str, Any]] = []
  for variant, several in zip(variants, times, strict=True):
    found = milliseconds(several)
    row: dict[str, Any] = {
      'layer': variant.layer,
      'implementation': variant.implementation or 'scan',
      'precision': variant.products,
      'threads': os.cpu_count() or 1,
      'step_us': 1e3 * found['median_ms'] / shape.num_steps,
    }
    scan = next((row for row in rows if row['layer'] == variant.layer), row)
    row['times_scan'] = scan['step_us'] / row['step_us']
    rows.append(row | found)
  return rows


def _step_of(variant: Variant, shape: Case) -> Callable[[], Any]:
  """Return a call that trains a layer on a batch, compiled and warm."""
  trainer = make_trainer(shape, make_model(shape, variant.make_cell(shape)))
  batch = jax.device_put(fptt_jax.Batch(*cases.draw(shape)))
  state = trainer.init(jax.random.key(0), batch)

  def step() -> Any:
    nonlocal state
    state, metrics = trainer.step(state, batch)
    return jax.block_until_ready(metrics.loss)

  step()
  return step


def measure_latency(config: Config) -> list[dict[str, Any]]:
  """Time a window of one step, with its update, of one sequence and 32 units.

  Args:
    config: number of rounds; with the case 'smoke' a few windows per call, by the
      default implementation alone.

  Returns:
    A row for calls of one window each, and one for many windows in a program, for the
    default and for the kernel: `window_us` per window.
  """
  small = 'smoke' in config.cases
  many = 8 if small else LATENCY_WINDOWS
  rows = []
  for implementation in ('auto',) if small else ('auto', 'native'):
    for where, windows, calls in (('a call', 1, many), ('a program', many, 1)):
      shape = Case('', windows, windows, 1, 1, 32)
      run = _many_calls(shape, implementation, calls)
      found = milliseconds([timed(run) for _ in range(config.rounds)])
      rows.append(
        {
          'window': where,
          'implementation': implementation,
          'precision': 'float32',
          'threads': 1,
          'window_us': 1e3 * found['median_ms'] / many,
          **found,
        }
      )
  return rows


def _many_calls(shape: Case, implementation: str, calls: int) -> Callable[[], None]:
  """Return a function that calls a train step several times, compiled and warm."""
  trainer = make_trainer(shape, lstm(shape, implementation=implementation))
  batch = jax.device_put(fptt_jax.Batch(*cases.draw(shape)))
  _, state, _ = cost.compile_step(trainer, batch)

  def run() -> None:
    nonlocal state
    for _ in range(calls):
      state, _ = trainer.step(state, batch)
    jax.block_until_ready(state)

  run()
  return run
