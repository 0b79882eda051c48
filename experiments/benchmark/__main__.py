"""Compare FPTT's speed with flax and PyTorch, and measure how time and memory grow.

    python -m experiments.benchmark
    python -m experiments.benchmark --part=rivals --cases=M28,tiny --rounds=20

It runs on the devices that JAX finds. PyTorch is compared if it is installed; on a GPU
it runs there too, also as a CUDA graph.

'rivals' times one training batch of each case by each system. All systems run in this
process and take turns, after two calls to warm up. The table has the minimum and the
median over the rounds. On a CPU, PyTorch runs with one thread and with as many threads
as there are cores, and the better of the two counts. Only 'ours' computes the logits of
a window a few steps at a time. Before and after each call a short probe shows whether
the machine was quiet, and medians are over the calls that nothing disturbed. On a CPU
the probe has an update per step, so it waits for the cores to hand work to each other.
The fastest of several products of large matrices is the peak that the speed of a case
is compared with.

'cells' times a step of every recurrent layer by each of its implementations, and
'latency' a window of a single step of one sequence, called from Python and inside a
program.

'growth' measures time against T, K, H and B, the time of an update in steps (C), the
time to compile, and the memory that a step needs besides its arguments.

'population' compares R members side by side with a single run.

'influence' times a step with credit across windows relative to one without it.

All these parts write their rows to one file, benchmark.json. Commands with the same
--workdir share it, so that cases and parts can be measured one after the other: new
rows replace earlier ones of the same case.

'gpu-day' is for a GPU that is available for a few minutes only: it checks the CUDA
kernels, runs the GPU's tests, and times the cases, the first of --cases first. It
writes one file, gpu-day.json, after each stage. A command with the same --workdir
resumes where the time ran out.

Systems compute in float32, matrix products on a GPU too unless --precision says
otherwise, except those with bfloat16 in their name. Batches are on the device before
anything is timed. Systems that cannot be timed are listed with the reason: the CUDA
kernels need nvcc, and Haiku and PyTorch are not dependencies.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from experiments.benchmark import gpu_day, plots, report
from experiments.benchmark.layers import measure_cells, measure_latency
from experiments.benchmark.measurements import (
  left_out,
  measure_growth,
  measure_influence,
  measure_population,
  measure_rivals,
)
from experiments.benchmark.settings import Config
from experiments.core import environment, flags, workdir

Rows = list[dict[str, Any]]

PLOTS: dict[str, Callable[[Path, Rows], None]] = {
  'rivals': plots.plot_rivals,
  'growth': plots.plot_growth,
  'population': plots.plot_population,
}
"""Functions (path, rows) that draw a part."""


def main(config: Config) -> None:
  """Measure, print tables, and write JSON and plots.

  Args:
    config: the parts, cases and rounds.

  Raises:
    UserError: the folder cannot be written.
  """
  folder = workdir.make_folder(config.workdir)
  if config.part == 'gpu-day':
    with jax.default_matmul_precision(config.precision):
      gpu_day.run_day(config, folder)
    return
  without = left_out()
  for name, reason in without.items():
    print(f'not timed: {name} ({reason})')
  about = {
    **environment.describe_machine('dm-haiku', 'torch'),
    'precision': config.precision,
    'rounds': config.rounds,
    'left_out': without,
  }
  parts: dict[str, Callable[[], Iterable[Rows]]] = {
    'rivals': lambda: measure_rivals(config, without),
    'cells': lambda: [measure_cells(config)],
    'latency': lambda: [measure_latency(config)],
    'population': lambda: measure_population(config),
    'growth': lambda: measure_growth(config),
    'influence': lambda: [measure_influence(config)],
  }
  chosen = [config.part]
  if config.part == 'all':
    chosen = [part for part in parts if part != 'influence']
  with jax.default_matmul_precision(config.precision):
    for part in chosen:
      # Files are written after each case, so a command that is stopped keeps its rows.
      for rows in parts[part]():
        merged = report.add_rows(folder, part, about, rows)
        if part in PLOTS:
          PLOTS[part](folder / f'{part}.png', merged)
      print((folder / f'{part}.txt').read_text())
  print(f'numbers, tables and plots are in {folder}')


if __name__ == '__main__':
  flags.run(main, Config)
