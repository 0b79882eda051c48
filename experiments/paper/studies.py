"""The paper's items that are measured rather than trained to an end: costs (Table 1,
Sec. 6.2) and convergence.
"""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tabulate import tabulate

from experiments import add_task, images
from experiments.benchmark import cost
from experiments.core import devices, environment, files, optimizers
from experiments.paper import convergence
import fptt_jax


def table1(scale: str, folder: Path) -> None:
  """Gradient time, update time and memory of BPTT, FTRL, FPTT and FPTT-K over T and
  K.
  """
  lengths, windows, hidden, batch_size, repeats = {
    'smoke': ((8,), (2,), 4, 4, 1),
    'cpu': ((32, 64, 128, 256, 512), (4, 16), 128, 128, 5),
    'full': ((32, 64, 128, 256, 512, 1024, 2048), (4, 16, 64), 128, 128, 11),
  }[scale]
  rows = cost.table1(lengths, windows, hidden, batch_size, repeats, print_row)
  cost.plot(folder / 'table1.png', rows)
  write_rows('table1', scale, rows, folder)


def walltime(scale: str, folder: Path) -> None:
  """Seconds an epoch of the terminal tasks by BPTT and by FPTT (Sec. 6.2), from the
  time of a batch, split over devices and some in one program as the scripts do."""
  shapes = {'smoke': [('arrays', 12, 1, 64)]}.get(
    scale, [('mnist, permuted', 784, 1, 55_000), ('cifar10', 1024, 3, 45_000)]
  )
  hidden, batch_size, repeats, batches = {
    'smoke': (4, 8, 1, 2),
    'cpu': (128, 128, 3, 4),
    'full': (128, 128, 11, 4),
  }[scale]
  rows = []
  for name, num_steps, features, examples in shapes:
    config = images.Config(hidden=hidden, num_windows=min(10, num_steps))
    loss = fptt_jax.losses.terminal_classification(num_classes=10)
    key = jax.random.key(0)
    batch = fptt_jax.Batch(
      jax.random.uniform(key, (num_steps, batch_size, features)),
      jnp.arange(batch_size, dtype=jnp.int32) % 10,
    )
    model = images.make_model(config, num_steps, features, num_classes=10)
    make_optimizer = lambda method, config=config: optimizers.make_optimizer(
      config, method
    )
    for method, num_windows in (
      ('bptt', None),
      ('fptt', round(num_steps**0.5)),
      ('fptt', config.num_windows),
    ):
      mesh = devices.choose_meshes(
        config, batch_size, hidden, num_steps // (num_windows or 1)
      ).batch
      settings = dict(
        num_windows=num_windows, repeats=repeats, mesh=mesh, batches=batches
      )
      costs = cost.measure(model, loss, make_optimizer, method, batch, **settings)
      seconds = (
        (costs['gradient_ms'] + costs['update_ms']) / 1e3 * (examples // batch_size)
      )
      rows.append(
        {
          'task': name,
          'T': num_steps,
          'method': method,
          'K': num_windows or 1,
          'epoch_s': seconds,
          **costs,
        }
      )
      print_row(rows[-1])
  write_rows('walltime', scale, rows, folder)


def convergence_study(scale: str, folder: Path) -> None:
  """The distance of W to its summary, the error of lambda as a gradient, stationarity:
  along training on the adding problem.
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
      given = dict(alpha=alpha, optimizer=optimizer, lr=lr, momentum=momentum)
      chosen = dataclasses.replace(config, **given)
      name = f'{optimizer}-alpha{alpha}'
      path = folder / f'{name}-{scale}.json'
      if not path.exists():  # Each is run once.
        rows = convergence.study(
          chosen, optimizers.make_optimizer(chosen, 'fptt'), seed=0
        )
        files.write_json(path, rows)
      studies[name] = files.read_rows(path)
  convergence.plot(folder / 'convergence.png', studies)
  write_rows(
    'convergence',
    scale,
    [{'run': name, **rows[-1]} for name, rows in studies.items()],
    folder,
  )


def print_row(row: dict[str, Any]) -> None:
  """One line of what was just measured."""
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
  """Prints the rows as a table and writes them as text and JSON."""
  text = tabulate(
    [list(row.values()) for row in rows], list(rows[0]), floatfmt='.4g', missingval='-'
  )
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
}
"""By name: (scale, folder) -> None."""
