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

'growth' measures time against T, K, H and B, the time of an update in steps (C), the
time to compile, and the memory that a step needs besides its arguments.

'population' compares R members side by side with a single run.

'influence' times a step with credit across windows relative to one without it.

'gpu-day' is for a GPU that is there for a few minutes: it checks the CUDA kernels, runs
the GPU's tests, and times the cases, the first of --cases first. It writes one file,
gpu-day.json, after each stage. The same --workdir goes on where the time ran out.

All computations are in float32, matrix products on a GPU too unless --precision says
otherwise. Batches are on the device before anything is timed. Systems that cannot be
timed are listed with the reason: the CUDA kernels need nvcc, and PyTorch is not a
dependency.
"""

from pathlib import Path
from typing import Any

import jax
from tabulate import tabulate

from experiments.benchmark import gpu_day
from experiments.benchmark.cases import varied_cases
from experiments.benchmark.measurements import (
  left_out,
  measure_influence,
  measure_population,
  measure_programs,
  measure_rivals,
)
from experiments.benchmark.plots import (
  fitted,
  plot_growth,
  plot_population,
  plot_rivals,
  update_steps,
)
from experiments.benchmark.settings import Config
from experiments.core import environment, files, flags, workdir


def main(config: Config) -> None:
  """Measure, print tables, and write JSON and plots.

  Args:
    config: the parts, cases and rounds.

  Raises:
    UserError: the folder cannot be written.
  """
  folder = workdir.make_folder(config.workdir)
  without = left_out()
  about = {
    **environment.describe_machine('torch'),
    'precision': config.precision,
    'rounds': config.rounds,
    'left_out': without,
  }
  for name, reason in without.items():
    print(f'not timed: {name} ({reason})')
  with jax.default_matmul_precision(config.precision):
    # Files are written after each case, so a command that is stopped keeps its numbers.
    if config.part in ('all', 'rivals'):
      for rows in measure_rivals(config, without):
        write_rows(folder, 'rivals', about, rows)
        plot_rivals(folder / 'rivals.png', rows)
      print((folder / 'rivals.txt').read_text())
    if config.part in ('all', 'population'):
      for rows in measure_population(config):
        write_rows(folder, 'population', about, rows)
        plot_population(folder / 'population.png', rows)
        print((folder / 'population.txt').read_text())
    if config.part in ('all', 'growth'):
      report_growth(config, folder, about)
    if config.part == 'influence':
      rows = measure_influence(config)
      write_rows(folder, 'influence', about, rows)
      print((folder / 'influence.txt').read_text())
    if config.part == 'gpu-day':
      gpu_day.run_day(config, folder)
  print(f'numbers, tables and plots are in {folder}')


def report_growth(config: Config, folder: Path, about: dict[str, Any]) -> None:
  """Measure the growth with T, K, H and B, and write tables, JSON and a plot.

  Args:
    config: settings of the benchmark.
    folder: the folder to write to.
    about: entries that the JSON begins with.
  """
  cases = varied_cases(small='smoke' in config.cases)
  growth: dict[str, list[dict[str, Any]]] = {}
  tables = []
  for name, chosen in cases.items():
    growth[name] = measure_programs(chosen, config.rounds)
    files.write_json(folder / 'growth.json', about | {'growth': growth})
    lines = [{name: row['value'], **shown(row)} for row in growth[name]]
    tables.append(tabulate(lines, 'keys', floatfmt='.4g'))
    print(tables[-1])
  constant = update_steps(growth['K'], cases['K'][0][1].num_steps)
  tables.append(f'C, the time of an update: {constant:.2f} steps')
  print(tables[-1])
  files.write_text(folder / 'growth.txt', '\n\n'.join(tables) + '\n')
  results = {'growth': growth, 'exponents': fitted(growth), 'C': constant}
  files.write_json(folder / 'growth.json', about | results)
  plot_growth(folder / 'growth.png', growth)


def write_rows(
  folder: Path, name: str, about: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
  """Write rows as JSON and as a table.

  Args:
    folder: the folder to write to.
    name: name of the files without their ends.
    about: entries that the JSON begins with.
    rows: the rows.
  """
  files.write_json(folder / f'{name}.json', about | {'lines': rows})
  lines = [shown(row) for row in rows]
  table = tabulate(lines, 'keys', floatfmt='.3g', missingval='-')
  files.write_text(folder / f'{name}.txt', table + '\n')


def shown(row: dict[str, Any]) -> dict[str, Any]:
  """Return the entries of a row that tables show."""
  # The times of all calls are in the JSON.
  return {
    name: value
    for name, value in row.items()
    if name not in ('value', 'all_ms', 'check_ms')
  }


if __name__ == '__main__':
  flags.run(main, Config)
