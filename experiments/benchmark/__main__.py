"""How fast FPTT runs here, beside flax and PyTorch (where it is installed), and how
time and memory grow.

    python -m experiments.benchmark
    python -m experiments.benchmark --part=rivals --cases=M28,tiny --rounds=20

It runs on whatever JAX finds; on a GPU PyTorch runs there too, also as a CUDA graph.
'rivals' times one training batch of each case by each system: all in this process,
taking turns, after two calls to warm up; minimum and median over the rounds. On a CPU
PyTorch runs with one thread and with as many as there are cores, and the better of the
two counts. Only 'ours' computes the logits of a window a few steps at a time. Before
and after each call something short is timed that tells whether the machine was quiet,
on a CPU an update a step, which waits for the cores to hand work to each other; medians
are of calls that nothing disturbed. The quickest of a large matrix product is the peak
that the products of a case are compared with. 'growth' measures time against T, K, H
and B, the time of an update in steps (C), compile times and the memory a step needs
beside its arguments. 'population' times R members side by side against a run by itself.
All in float32, products on a GPU too unless --precision says otherwise. Batches are on
the device before anything is timed. What could not be timed is said, and why: kernels
need nvcc, PyTorch is no dependency.
"""

from pathlib import Path
from typing import Any

import jax
from tabulate import tabulate

from experiments.benchmark.cases import varied_cases
from experiments.benchmark.measurements import (
  left_out,
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
  """Measures, prints tables, writes JSON and plots."""
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
    if config.part in ('all', 'rivals'):
      for rows in measure_rivals(
        config, without
      ):  # After each case: what was measured is not lost.
        write_rows(folder, 'rivals', about, rows)
        plot_rivals(folder / 'rivals.png', rows)
      print((folder / 'rivals.txt').read_text())
    if config.part in ('all', 'population'):
      for rows in measure_population(config):
        write_rows(folder, 'population', about, rows)
        plot_population(folder / 'population.png', rows)
        print((folder / 'population.txt').read_text())
    if config.part in ('all', 'growth'):
      cases = varied_cases(small='smoke' in config.cases)
      growth: dict[str, list[dict[str, Any]]] = {}
      for name, chosen in cases.items():
        growth[name] = measure_programs(chosen, config.rounds)
        files.write_json(folder / 'growth.json', about | {'growth': growth})
        tables = [
          tabulate(
            [{key: row['value'], **shown(row)} for row in rows], 'keys', floatfmt='.4g'
          )
          for key, rows in growth.items()
        ]
        print(tables[-1])
      constant = update_steps(growth['K'], cases['K'][0][1].num_steps)
      tables.append(f'C, the time of an update: {constant:.2f} steps')
      print(tables[-1])
      files.write_text(folder / 'growth.txt', '\n\n'.join(tables) + '\n')
      files.write_json(
        folder / 'growth.json',
        about | {'growth': growth, 'exponents': fitted(growth), 'C': constant},
      )
      plot_growth(folder / 'growth.png', growth)
  print(f'numbers, tables and plots are in {folder}')


def write_rows(
  folder: Path, name: str, about: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
  """Writes rows as JSON and as a table."""
  files.write_json(folder / f'{name}.json', about | {'lines': rows})
  files.write_text(
    folder / f'{name}.txt',
    tabulate([shown(row) for row in rows], 'keys', floatfmt='.3g', missingval='-')
    + '\n',
  )


def shown(row: dict[str, Any]) -> dict[str, Any]:
  """What of a row is printed."""
  return {
    name: value
    for name, value in row.items()
    if name not in ('value', 'all_ms', 'check_ms')
  }


if __name__ == '__main__':
  flags.run(main, Config)
