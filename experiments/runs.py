"""A run's folder: its configuration, metrics, checkpoints, summary and plot.

WORKDIR/config.json        what was asked for
WORKDIR/NAME/metrics.jsonl one line an interval (NAME is method, seed and values out of a grid)
WORKDIR/NAME/checkpoints/  the whole carry, so that the same command goes on where a killed run stopped
WORKDIR/NAME/result.json   what this run came to; there when it has ended
WORKDIR/summary.json       what came out, and on which machine
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
import platform
import time
from typing import Any, TextIO

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import orbax.checkpoint as ocp
from tabulate import tabulate

from experiments.options import UserError
import fptt_jax

NO_SETTINGS = ('workdir', 'data_dir', 'devices', 'population', 'chunk')
"""Where and how a run runs, which is not what it is: it may go on otherwise."""


class Run:
  """One training run (a method and a seed) in its own folder.

  Attributes:
    folder: where it writes.
    rows: the metrics lines so far, restored ones included.
  """

  def __init__(self, folder: Path):
    self.folder = folder
    self.rows: list[dict[str, Any]] = []
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    self._checkpoints = ocp.CheckpointManager((folder / 'checkpoints').absolute(), options=options)
    self._seconds_before = 0.0
    self._started = time.perf_counter()

  def restore(self, step: int, carry: Any) -> tuple[Any, dict[str, Any]]:
    """(carry, record) as they were saved after `step`, or (`carry`, {}) for step 0.

    What was written later is dropped: those steps are about to be run again.
    """
    self.rows = [row for row in read_jsonl(self.folder / 'metrics.jsonl') if row['step'] <= step]
    with replaced(self.folder / 'metrics.jsonl') as file:
      file.writelines(json.dumps(row) + '\n' for row in self.rows)
    for later in [saved for saved in self._checkpoints.all_steps() if saved > step]:
      self._checkpoints.delete(later)
    if not step:
      return carry, {}
    arguments = ocp.args.Composite(carry=ocp.args.StandardRestore(carry), record=ocp.args.JsonRestore())
    saved = self._checkpoints.restore(step, args=arguments)
    self._seconds_before = saved.record['seconds']
    return saved.carry, saved.record

  def log(self, step: int, **metrics: Any) -> dict[str, Any]:
    """Appends a line to metrics.jsonl; `seconds` is the wall-clock, restarts included; numbers that are not finite become null."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    row = {'step': step, 'seconds': round(self.seconds, 2), **finite}
    self.rows.append(row)
    with (self.folder / 'metrics.jsonl').open('a') as file:
      file.write(json.dumps(row) + '\n')
    return row

  def save(self, step: int, carry: Any, **record: Any) -> None:
    """Saves the carry after `step`, in the background."""
    arguments = ocp.args.Composite(
      carry=ocp.args.StandardSave(carry), record=ocp.args.JsonSave({'seconds': self.seconds, **record})
    )
    self._checkpoints.save(step, args=arguments)

  def wait(self) -> None:
    """Waits for the last checkpoint."""
    self._checkpoints.wait_until_finished()

  def column(self, name: str) -> list[float]:
    """One metric of all rows so far."""
    return [row[name] for row in self.rows]

  @property
  def seconds(self) -> float:
    """Wall-clock of the run so far, that of earlier processes included."""
    return self._seconds_before + time.perf_counter() - self._started

  def close(self) -> None:
    """Waits for the last checkpoint; nothing more is saved."""
    self._checkpoints.close()


def open_workdir(workdir: str, script: str, config: Any, **identity: str) -> Path:
  """Makes the folder and writes config.json, or checks that the folder was made with the same configuration.

  Other methods, seeds and values of a grid may join those that are there: each run has its own folder. `identity` says what else
  makes it the same run, such as a hash of the data.

  Raises:
    UserError: the folder holds runs of another configuration, or cannot be written.
  """
  folder = Path(workdir or f'runs/{script}-{time.strftime("%Y%m%d-%H%M%S")}').absolute()
  described = {'script': script, **json.loads(json.dumps(dataclasses.asdict(config))), **identity}
  for name in NO_SETTINGS:
    described.pop(name, None)
  path = folder / 'config.json'
  try:
    if path.exists():
      found = json.loads(path.read_text())
      keys = sorted({*found, *described} - {'method', 'seeds', 'grid'})
      differ = [f'{k}: was {found.get(k)!r}, now {described.get(k)!r}' for k in keys if found.get(k) != described.get(k)]
      if differ:
        raise UserError(f'{folder} holds runs of another configuration; {"; ".join(differ)}. Choose another --workdir.')
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
      file.write(json.dumps(described, indent=2) + '\n')
  except OSError as error:
    raise UserError(f'cannot write to --workdir={folder}: {error}') from error
  return folder


def saved_steps(folder: Path) -> list[int]:
  """Steps after which a run was saved, in order; what a killed process left half-made is not among them."""
  steps = (entry.name for entry in (folder / 'checkpoints').glob('*'))
  return sorted(int(name) for name in steps if name.isdigit())


def write_summary(folder: Path, runs: list[dict[str, Any]]) -> None:
  """Writes what came out and what it ran on."""
  described = {'config': json.loads((folder / 'config.json').read_text()), 'runs': runs, **machine()}
  with replaced(folder / 'summary.json') as file:
    file.write(json.dumps(described, indent=2) + '\n')


def machine() -> dict[str, Any]:
  """What this process runs on."""
  devices = sorted({device.device_kind for device in jax.devices()})
  return {
    'hardware': {'devices': devices, 'cpu_cores': os.cpu_count(), 'machine': platform.machine()},
    'versions': {'python': platform.python_version(), 'jax': jax.__version__, 'fptt_jax': fptt_jax.__version__},
  }


def report(
  folder: Path, summaries: list[dict[str, Any]], y: str, plot: str, xlabel: str, ylabel: str, lines: dict[str, float], digits: int
) -> None:
  """Writes the summary, draws metric `y` of every run as FOLDER/`plot`, prints the table."""
  write_summary(folder, summaries)
  curves: dict[str, list[tuple[list[float], list[float]]]] = {}
  for summary in summaries:
    rows = read_jsonl(folder / summary['run'] / 'metrics.jsonl')
    line = summary['run'].replace(f'-seed{summary["seed"]}', '')
    curves.setdefault(line, []).append(([row['step'] for row in rows], [row[y] for row in rows]))
  plot_curves(folder / plot, curves, xlabel, ylabel, lines)
  names = dict.fromkeys(name for summary in summaries for name in summary if name != 'run')  # A run that diverged has fewer.
  rows = [[summary.get(name) for name in names] for summary in summaries]
  print(tabulate(rows, [name.replace('_', ' ') for name in names], floatfmt=f'.{digits}f', missingval='-'))
  print(f'metrics, summary.json and {plot} are in {folder}')


def plot_curves(
  path: Path,
  curves: dict[str, Sequence[tuple[list[float], list[float]]]],
  xlabel: str,
  ylabel: str,
  lines: dict[str, float],
  xscale: str = 'linear',
) -> None:
  """One colour a method, one thin line a seed; `lines` are horizontal marks. What is in % has a linear axis, all else a log one."""
  figure = Figure(figsize=(7, max(4.5, 0.3 * len(curves))), layout='constrained')
  axes = figure.subplots()
  for number, (name, runs) in enumerate(curves.items()):
    for seed, (x, y) in enumerate(runs):
      style = ('-', '--', ':')[number // 10 % 3]
      axes.plot(
        x, y, style, color=f'C{number % 10}', label=name if seed == 0 else None, linewidth=1.5, marker='.' if len(x) < 4 else None
      )
  for number, (name, value) in enumerate(lines.items()):
    axes.axhline(value, color='0.5', linestyle=('--', ':')[number % 2], linewidth=1, label=name)
  axes.set(xlabel=xlabel, ylabel=ylabel, yscale='linear' if ylabel.endswith('%') else 'log', xscale=xscale)
  if xscale == 'linear':
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.grid(alpha=0.3, which='both')
  if len(curves) > 6:  # Beside the curves, not over them.
    figure.set_figwidth(10)
    axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))
  else:
    axes.legend()
  figure.savefig(path, dpi=120)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
  """The whole lines of a JSONL file; a last line cut off by a kill is left out."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')]


def make_folder(path: str) -> Path:
  """The folder, made if need be.

  Raises:
    UserError: it cannot be.
  """
  folder = Path(path).absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'cannot write to --workdir={folder}: {error}') from error
  return folder


def write_json(path: Path, content: Any) -> None:
  """Writes it whole or not at all."""
  with replaced(path) as file:
    file.write(json.dumps(content, indent=2) + '\n')


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[TextIO]:
  """A file that takes the place of `path` when it is complete."""
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open('w') as file:
    yield file
  temporary.replace(path)
