"""Measurements of the paper (costs, convergence) and of our own studies."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tabulate import tabulate

from experiments import add_task, images
from experiments.benchmark import cost
from experiments.core import devices, environment, files, optimizers
from experiments.paper import convergence, copying, costs, interleaving, items
import fptt_jax


def table1(scale: str, folder: Path) -> None:
  """Measure Table 1: gradient time, update time and memory of the methods.

  Args:
    scale: 'smoke', 'cpu' or 'full'.
    folder: the folder to write to.
  """
  lengths, windows, hidden, batch_size, repeats = {
    'smoke': ((8,), (2,), 4, 4, 1),
    'cpu': ((32, 64, 128, 256, 512), (4, 16), 128, 128, 5),
    'full': ((32, 64, 128, 256, 512, 1024, 2048), (4, 16, 64), 128, 128, 11),
  }[scale]
  rows = cost.table1(lengths, windows, hidden, batch_size, repeats, print_row)
  cost.plot(folder / 'table1.png', rows)
  write_rows('table1', scale, rows, folder)


class _Walltime(NamedTuple):
  """A terminal task whose time per epoch is measured.

  Attributes:
    name: name in the table.
    num_steps: T.
    features: D.
    examples: number of training examples.
  """

  name: str
  num_steps: int
  features: int
  examples: int


def walltime(scale: str, folder: Path) -> None:
  """Measure Sec. 6.2: seconds per epoch of the terminal tasks by BPTT and by FPTT.

  They are computed from the time of a batch. As in the scripts, a batch is split over
  the devices and a program trains on several batches.

  Args:
    scale: 'smoke', 'cpu' or 'full'.
    folder: the folder to write to.
  """
  tasks = [
    _Walltime('mnist, permuted', 784, 1, 55_000),
    _Walltime('cifar10', 1024, 3, 45_000),
  ]
  if scale == 'smoke':
    tasks = [_Walltime('arrays', 12, 1, 64)]
  hidden, batch_size, repeats, batches = {
    'smoke': (4, 8, 1, 2),
    'cpu': (128, 128, 3, 4),
    'full': (128, 128, 11, 4),
  }[scale]
  rows = []
  for task in tasks:
    config = images.Config(hidden=hidden, num_windows=min(10, task.num_steps))
    # FPTT with √T windows and with the number of windows of the scripts.
    for method, num_windows in (
      ('bptt', None),
      ('fptt', round(task.num_steps**0.5)),
      ('fptt', config.num_windows),
    ):
      costs = _terminal_costs(
        task, config, method, num_windows, batch_size, repeats, batches
      )
      batch_ms = costs['gradient_ms'] + costs['update_ms']
      row = {
        'task': task.name,
        'T': task.num_steps,
        'method': method,
        'K': num_windows or 1,
        'epoch_s': batch_ms / 1e3 * (task.examples // batch_size),
        **costs,
      }
      rows.append(row)
      print_row(row)
  write_rows('walltime', scale, rows, folder)


def _terminal_costs(
  task: _Walltime,
  config: images.Config,
  method: str,
  num_windows: int | None,
  batch_size: int,
  repeats: int,
  batches: int,
) -> dict[str, Any]:
  """Measure the cost of a terminal task by one method, on random pixels.

  Args:
    task: the shapes.
    config: settings of the model and the optimizer.
    method: 'bptt' or 'fptt'.
    num_windows: K; None for BPTT.
    batch_size: B.
    repeats: number of timed calls.
    batches: number of batches per program.
  """
  key = jax.random.key(0)
  inputs = jax.random.uniform(key, (task.num_steps, batch_size, task.features))
  labels = jnp.arange(batch_size, dtype=jnp.int32) % 10
  window = task.num_steps // (num_windows or 1)
  meshes = devices.choose_meshes(config, batch_size, config.hidden, window)
  return cost.measure(
    images.make_model(config, task.num_steps, task.features, num_classes=10),
    fptt_jax.losses.terminal_classification(num_classes=10),
    lambda name: optimizers.make_optimizer(config, name),
    method,
    fptt_jax.Batch(inputs, labels),
    num_windows=num_windows,
    repeats=repeats,
    mesh=meshes.batch,
    batches=batches,
  )


def convergence_study(scale: str, folder: Path) -> None:
  """Measure convergence while FPTT trains on the adding problem.

  The measures are the distance of W to its summary, the error of λ as a gradient, and
  the stationarity of W.

  Args:
    scale: 'smoke', 'cpu' or 'full'.
    folder: the folder to write to.
  """
  settings: dict[str, Any] = {
    'smoke': dict(
      seq_len=12, num_windows=3, hidden=4, batch_size=8, batches=4, eval_every=2
    ),
    'cpu': dict(seq_len=60, num_windows=6, hidden=64, batch_size=64, batches=2000),
    'full': dict(seq_len=200, num_windows=10, batches=10_000),
  }[scale]
  config = add_task.Config(method=('fptt',), **{'eval_every': 100} | settings)
  studies = {}
  for alpha in (0.5,) if scale == 'smoke' else (0.1, 0.5):
    for optimizer, lr, momentum in (('adam', 1e-3, 0.9), ('sgd', 0.1, 0.0)):
      chosen = dataclasses.replace(
        config, alpha=alpha, optimizer=optimizer, lr=lr, momentum=momentum
      )
      name = f'{optimizer}-alpha{alpha}'
      tx = optimizers.make_optimizer(chosen, 'fptt')
      study = functools.partial(convergence.study, chosen, tx, seed=0)
      studies[name] = files.computed_rows(folder / f'{name}-{scale}.json', study)
  convergence.plot(folder / 'convergence.png', studies)
  rows = [{'run': name, **rows[-1]} for name, rows in studies.items()]
  write_rows('convergence', scale, rows, folder)


def copying_study(scale: str, folder: Path) -> None:
  """Measure how many tokens each influence needs to copy sequences of some length.

  The paper has no such comparison. 'full' is the same as 'cpu'.

  Args:
    scale: a name of `items.SCALES`.
    folder: the folder to write to.
  """
  settings = copying.Settings(
    hidden=16, batch_size=16, batches=4000, interval=20, longest=16, lr=3e-3
  )
  seeds = range(5)
  names = list(copying.INFLUENCES)
  if scale == 'smoke':
    settings = settings._replace(hidden=4, batch_size=4, batches=4, interval=2)
    seeds, names = range(2), ['none', 'rtrl']
  rows = []
  for name in names:
    study = functools.partial(copying.study, settings, name, seeds)
    rows += files.computed_rows(folder / f'{name}-{scale}.json', study)
  write_rows('copying', scale, rows, folder)


def interleaving_study(scale: str, folder: Path) -> None:
  """Measure what momentum does to windows that follow each other or are interleaved.

  The paper has no such comparison. 'full' is the same as 'cpu'.

  Args:
    scale: a name of `items.SCALES`.
    folder: the folder to write to.
  """
  settings = interleaving.Settings(
    seq_len=100,
    num_windows=25,
    hidden=32,
    batch_size=32,
    lanes=10,
    rounds=60,
    test_size=512,
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
  )
  seeds = range(5)
  momenta: Sequence[float] = interleaving.MOMENTA
  if scale == 'smoke':
    settings = settings._replace(
      seq_len=8, num_windows=2, hidden=4, batch_size=4, lanes=2, rounds=1, test_size=8
    )
    seeds, momenta = range(2), momenta[:1]
  rows = []
  for order in interleaving.ORDERS:
    for momentum in momenta:
      study = functools.partial(interleaving.study, settings, order, momentum, seeds)
      found = files.computed_rows(folder / f'{order}-{momentum}-{scale}.json', study)
      print(f'{order}, b1 = {momentum}: rate {found[0]["rate"]:g}', flush=True)
      rows += found
  write_rows('interleaving', scale, rows, folder)


def costs_study(scale: str, folder: Path) -> None:
  """Measure the time of a batch by each method of the tournament.

  The paper has no such comparison. Streams are left out: they are seen once.

  Args:
    scale: a name of `items.SCALES`.
    folder: the folder to write to.
  """
  batches, rounds = (1, 1) if scale == 'smoke' else (2, 9)
  by_task: dict[str, list[items.Entry]] = {}
  for entry in items.tournament_of(scale):
    if items.TOURNAMENT_SCRIPTS['stream'] is not entry.script:
      by_task.setdefault(entry.task, []).append(entry)
  rows = []
  for task, entries in by_task.items():
    if scale == 'smoke':
      entries = [entry for entry in entries if entry.label == f'{task}.tbptt']
    study = functools.partial(costs.measure, entries, batches, rounds)
    rows += files.computed_rows(folder / f'{task}-{scale}.json', study)
    print(f'{task}: {len(entries)} methods are measured', flush=True)
  write_rows('costs', scale, rows, folder)


def print_row(row: dict[str, Any]) -> None:
  """Print a line for a row of :func:`cost.measure`."""
  interval = '' if row['± update_ms'] is None else f' ± {row["± update_ms"]:.2f}'
  times = (
    f'gradient {row["gradient_ms"]:9.2f} ms  update '
    f'{row["update_ms"]:8.2f}{interval} ms'
  )
  memory = f'memory {row["temp_bytes"] / 2**20:8.2f} MiB'
  print(
    f'T {row["T"]:>5}  {row["method"]:>5}  K {row["K"]:>5}  {times}  {memory}',
    flush=True,
  )


def write_rows(name: str, scale: str, rows: list[dict[str, Any]], folder: Path) -> None:
  """Print rows as a table and write them as text and JSON.

  Args:
    name: name of the study.
    scale: its scale.
    rows: rows with the same entries.
    folder: the folder to write to.
  """
  values = [list(row.values()) for row in rows]
  text = tabulate(values, list(rows[0]), floatfmt='.4g', missingval='-')
  print(text)
  files.write_text(folder / f'{name}.txt', f'{name}, scale {scale}\n{text}\n')
  files.write_json(
    folder / f'{name}.json',
    {'item': name, 'scale': scale, **environment.describe_machine(), 'lines': rows},
  )
  print(f'table, numbers and plots are in {folder}')


STUDIES: dict[str, Callable[[str, Path], None]] = {
  'table1': table1,
  'walltime': walltime,
  'convergence': convergence_study,
  'copying': copying_study,
  'interleaving': interleaving_study,
  'costs': costs_study,
}
"""Studies by the value of --item: (scale, folder) -> None."""


SHORT = ('costs',)
"""Studies that have the scale 'short'."""
