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

from collections.abc import Callable, Iterator
import dataclasses
import importlib.util
import os
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure
import numpy as np
import optax
from tabulate import tabulate

from experiments import cost, options, recipe, reporting, rivals, runs
from experiments.options import check, option
from experiments.rivals import Case
import fptt_jax
from fptt_jax import nn
from fptt_jax.nn import kernels

CASES = {
  case.name: case
  for case in (
    Case('M28', 784, 28, 128, 1, 128, batches=429),  # Pixel MNIST, of 55,000 images.
    Case('M7', 784, 7, 128, 1, 128),
    Case('M112', 784, 112, 128, 1, 128),
    Case('M784', 784, 784, 128, 1, 128),
    Case('M-bptt', 784, 1, 128, 1, 128),
    Case('add', 200, 10, 128, 2, 128, 1),
    Case('ptb300-core', 300, 6, 128, 256, 256),
    Case('ptb300', 300, 6, 128, 256, 256, 10_000, words=True),
    Case('wide', 64, 4, 16, 256, 1024),
    Case('tiny', 784, 28, 8, 1, 16),
    Case('smoke', 12, 3, 4, 1, 4),
  )
}
POPULATION_CASES = ('M28', 'add', 'tiny', 'smoke')
POPULATION_SIZES = (1, 2, 4, 8, 16, 32)
DEFAULT_CASES = tuple(name for name in CASES if name != 'smoke')
MANY = 4
MANY_NAME = f'{MANY} batches a program'
"""The end of the names of systems whose calls train on several batches; the times in
the tables are of one.
"""
PAUSE = 0.3
"""Seconds after each call of PyTorch or NumPy on a CPU: their threads go on spinning
for a while after their work, on cores that the next system would need."""
QUIET = 1.3
"""A call was disturbed where what is timed before it, or after it, took longer than
this times the quickest.
"""
PRODUCT_SIZE = {'cpu': 2048, 'gpu': 8192}
"""Rows of the square matrices multiplied to see how quick the machine is."""


@dataclasses.dataclass(frozen=True)
class Config:
  """What to measure."""

  part: str = option(
    'all', 'what to measure', ('all', 'rivals', 'growth', 'population')
  )
  cases: tuple[str, ...] = option(DEFAULT_CASES, 'cases of rivals')
  rounds: int = option(9, 'timed calls of each program')
  precision: str = option(
    'float32',
    "of matrix products on a GPU, ours and the others'",
    ('float32', 'tensorfloat32'),
  )
  workdir: str = option('', 'folder; default runs/benchmark-TIME')

  def __post_init__(self) -> None:
    options.check_fields(self)
    check(
      bool(self.cases) and set(self.cases) <= set(CASES),
      'cases',
      self.cases,
      f'out of {", ".join(CASES)}',
    )
    check(self.rounds >= 1, 'rounds', self.rounds, 'at least 1')


def make_trainer(
  case: Case,
  cell: Any,
  mesh: jax.sharding.Mesh | None = None,
  whole: bool = False,
  one_buffer: bool = False,
) -> fptt_jax.Trainer:
  """`fptt_jax`'s trainer of a case.

  Args:
    case: what is trained.
    cell: (rngs) -> the recurrent layer.
    mesh: devices to split a batch over.
    whole: whether words are read out all of a window at once.
    one_buffer: whether the optimizer sees all parameters as one vector.
  """
  model, optimizer = rivals.make_model(case, cell), rivals.make_optimizer()
  if one_buffer:
    optimizer = optax.flatten(optimizer)
  steps = case.size if whole and case.words else None
  return fptt_jax.make_trainer(
    model,
    rivals.make_loss(case),
    optimizer,
    num_windows=case.num_windows,
    mesh=mesh,
    readout_chunk=steps,
  )


def lstm_cell(case: Case, fused: bool | str = True) -> Any:
  """The LSTM of `fptt_jax`."""
  return lambda rngs: nn.LSTM(case.features, case.hidden, fused=fused, rngs=rngs)


def trained(
  case: Case, cell: Any, mesh: jax.sharding.Mesh | None = None, **settings: bool
) -> Callable[..., Any]:
  """A step of the trainer as a function of inputs and targets."""
  trainer = make_trainer(case, cell, mesh, **settings)
  state = [trainer.init(jax.random.key(0), fptt_jax.Batch(*rivals.draw(case)))]

  def step(inputs: np.ndarray, targets: np.ndarray) -> Any:
    state[0], metrics = trainer.step(state[0], fptt_jax.Batch(inputs, targets))
    return jax.block_until_ready(metrics.loss)

  return step


def many_trained(
  case: Case, cell: Any, mesh: jax.sharding.Mesh | None
) -> Callable[..., Any]:
  """Steps of the trainer, `MANY` a program, all on one batch."""
  trainer = make_trainer(case, cell, mesh)
  run = fptt_jax.scan_train_steps(trainer, lambda batch, _: batch)
  state = [trainer.init(jax.random.key(0), fptt_jax.Batch(*rivals.draw(case)))]

  def step(inputs: np.ndarray, targets: np.ndarray) -> Any:
    state[0], metrics = run(state[0], fptt_jax.Batch(inputs, targets), np.arange(MANY))
    return jax.block_until_ready(metrics.loss)

  return step


def split(case: Case) -> jax.sharding.Mesh | None:
  """The devices that 'ours' splits a batch over, as the scripts do."""
  return recipe.choose_meshes(
    recipe.Recipe(), case.batch_size, case.hidden, case.size
  ).batch


def left_out() -> dict[str, str]:
  """What cannot be timed here, and why."""
  reasons = {}
  if not kernels.available():
    reasons['ours, kernel'] = (
      'needs an NVIDIA GPU, and nvcc on the PATH or in $CUDA_HOME/bin'
    )
  if not importlib.util.find_spec('torch'):
    reasons['PyTorch'] = 'not installed'
  elif not recipe.is_cpu():
    import torch

    if not torch.cuda.is_available():
      reasons['PyTorch'] = f'version {torch.__version__} finds no GPU'
  return reasons


def systems(case: Case) -> dict[str, Callable[[], Callable[..., Any]]]:
  """What is timed, by name; each is a function that makes the step."""
  mesh, without = split(case), left_out()
  found: dict[str, Callable[[], Callable[..., Any]]] = {
    'ours': lambda: trained(case, lstm_cell(case), mesh)
  }
  if mesh is not None:
    found['ours, one device'] = lambda: trained(case, lstm_cell(case))
  found[f'ours, {MANY_NAME}'] = lambda: many_trained(case, lstm_cell(case), mesh)
  if (
    not recipe.is_cpu()
  ):  # There one vector of all parameters takes several times as long.
    found['ours, one buffer'] = lambda: trained(
      case, lstm_cell(case), mesh, one_buffer=True
    )
  if 'ours, kernel' not in without and case.hidden in kernels.SIZES:
    found['ours, kernel'] = lambda: trained(case, lstm_cell(case, fused='kernel'), mesh)
    found[f'ours, kernel, {MANY_NAME}'] = lambda: many_trained(
      case, lstm_cell(case, fused='kernel'), mesh
    )
  if case.words:
    found['ours, whole readout'] = lambda: trained(
      case, lstm_cell(case), mesh, whole=True
    )
  found['flax, one jit'] = lambda: trained(case, rivals.flax_cell(case), whole=True)
  found['flax, a loop'] = lambda: rivals.flax_loop(case)
  if 'PyTorch' not in without:
    on_cpu = recipe.is_cpu()
    for kind in ('plain', 'optimized') if on_cpu else ('plain', 'optimized', 'graph'):
      for threads in (
        sorted({1, os.cpu_count() or 1}) if on_cpu else (os.cpu_count() or 1,)
      ):
        make = lambda kind=kind: rivals.torch_loop(
          case, kind, device='cpu' if on_cpu else 'cuda'
        )
        found[f'PyTorch {kind}, threads {threads}'] = (
          lambda make=make, threads=threads: with_threads(make(), threads)
        )
  return found


def with_threads(step: Callable[..., Any], threads: int) -> Callable[..., Any]:
  """Sets PyTorch's threads before each call, and its precision on a GPU to JAX's."""
  import torch

  if not recipe.is_cpu():
    exact = jax.config.jax_default_matmul_precision == 'float32'
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact

  def run(*data: Any) -> Any:
    torch.set_num_threads(threads)
    return step(*data)

  return run


def measure_rivals(
  config: Config, without: dict[str, str]
) -> Iterator[list[dict[str, Any]]]:
  """Rows of each case and system: all that are there, after each case. A rival that
  fails goes into `without`, with the reason.
  """
  pause, size = (
    (PAUSE, PRODUCT_SIZE['cpu']) if recipe.is_cpu() else (0.0, PRODUCT_SIZE['gpu'])
  )
  size = 16 if 'smoke' in config.cases else size
  product = multiplied(size)
  checked = handed_over('smoke' in config.cases) if recipe.is_cpu() else product
  check_quiet = lambda: min(timed(checked) for _ in range(3))
  rows: list[dict[str, Any]] = []
  for case in (CASES[name] for name in config.cases):
    steps, data = {}, {}
    for name, make in systems(case).items():
      try:
        step, data[name] = make(), placed(case, name)
        for _ in range(2):
          step(*data[name])
      except Exception as error:  # A compiler, a driver, memory: the others go on.
        if name == 'ours':
          raise
        without[f'{case.name}: {name}'] = (
          f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'
        )
        print(
          f'not timed: {case.name}: {name} ({without[f"{case.name}: {name}"]})',
          flush=True,
        )
      else:
        steps[name] = step
    calls: dict[str, list[Call]] = {name: [] for name in steps}
    products = []
    for _ in range(config.rounds):
      products.append(timed(product))
      time.sleep(pause)
      before = check_quiet()
      for name, step in steps.items():
        seconds = timed(step, *data[name]) / (MANY if name.endswith(MANY_NAME) else 1)
        time.sleep(pause if name.startswith('PyTorch') else 0.0)
        after = check_quiet()
        calls[name].append(Call(seconds, max(before, after)))
        before = after
    found = [
      {'case': case.name, 'system': name, **summary}
      for name, summary in best_threads(undisturbed(calls)).items()
    ]
    peak = 2e-9 * size**3 / min(products)
    for row in found:
      row['times_ours'] = row['median_ms'] / found[0]['median_ms']
      row['gflops'] = 1e-9 * flops(case) / (1e-3 * row['median_ms'])
      row |= {'peak_gflops': peak, 'of_peak': row['gflops'] / peak}
      row['epoch_s'] = 1e-3 * row['median_ms'] * case.batches or None
    rows += found
    yield rows


class Call(NamedTuple):
  """A timed call: how long it took, and the longer one of the checks before and after
  it, in seconds.
  """

  seconds: float
  check: float


def undisturbed(calls: dict[str, list[Call]]) -> dict[str, dict[str, Any]]:
  """By system the times of the calls that nothing disturbed (of all where there is no
  such call), and of how many something did.
  """
  limit = QUIET * min(call.check for several in calls.values() for call in several)
  found: dict[str, dict[str, Any]] = {}
  for name, several in calls.items():
    quiet = [call.seconds for call in several if call.check <= limit]
    every = {
      'all_ms': [1e3 * call.seconds for call in several],
      'check_ms': [1e3 * call.check for call in several],
    }
    found[name] = (
      milliseconds(quiet or [call.seconds for call in several])
      | every
      | {'disturbed': len(several) - len(quiet)}
    )
  return found


def handed_over(small: bool) -> Callable[[], Any]:
  """A few windows of one step: their work goes back and forth between the cores, and
  takes twice as long when a virtual machine's are, for a while, not close to each
  other. Warm.
  """
  case = CASES['smoke' if small else 'M784']
  case = case._replace(num_steps=48, num_windows=48)
  step, data = trained(case, lstm_cell(case)), jax.device_put(rivals.draw(case))
  run: Callable[[], Any] = lambda: step(*data)
  run()
  return run


def multiplied(size: int) -> Callable[[], Any]:
  """A product of two matrices [size, size] on what JAX runs on: on a CPU by NumPy.
  Warm.
  """
  matrix = np.ones((size, size), np.float32)
  run: Callable[[], Any] = lambda: np.matmul(matrix, matrix)
  if not recipe.is_cpu():
    there, compiled = jax.device_put(matrix), jax.jit(jax.numpy.matmul)
    run = lambda: jax.block_until_ready(compiled(there, there))
  run()
  return run


def placed(case: Case, system: str) -> tuple[Any, Any]:
  """A batch where a system wants it: on its device, or split over those that it is
  split over.
  """
  data, mesh = rivals.draw(case), split(case)
  if system.startswith('PyTorch'):
    return rivals.tensors(*data, device='cpu' if recipe.is_cpu() else 'cuda')
  if mesh is None or not system.startswith('ours') or system == 'ours, one device':
    return jax.device_put(data)
  if system.endswith(MANY_NAME):  # A source, which all devices read from.
    return jax.device_put(
      data, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
  batch = fptt_jax.make_global_batch(
    fptt_jax.Batch(*data), rivals.make_loss(case), mesh
  )
  return batch.inputs, batch.targets


def milliseconds(times: list[float]) -> dict[str, Any]:
  """Minimum, median and maximum of seconds, and all."""
  ms = [1e3 * value for value in times]
  return {
    'min_ms': min(ms),
    'median_ms': float(np.median(ms)),
    'max_ms': max(ms),
    'all_ms': ms,
  }


def best_threads(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Of a system timed with several numbers of threads only the one of the least
  median.
  """
  best: dict[str, str] = {}
  for name, row in rows.items():
    base = name.partition(', threads')[0]
    if base not in best or row['median_ms'] < rows[best[base]]['median_ms']:
      best[base] = name
  return {name: rows[name] for name in best.values()}


def flops(case: Case) -> float:
  """Floating-point operations of the matrix products of a batch: LSTM and readout,
  forward and twice backward; but nobody asks for the gradient of inputs that are
  data.
  """
  lstm = 8 * case.hidden * (3 * case.hidden + (3 if case.words else 2) * case.features)
  readout = (
    2
    * case.hidden
    * case.outputs
    * (case.num_steps if case.words else case.num_windows)
  )
  return float(case.batch_size * (case.num_steps * lstm + 3 * readout))


def timed(function: Callable[..., Any], *args: Any) -> float:
  """Seconds of a call."""
  start = time.perf_counter()
  function(*args)
  return time.perf_counter() - start


def varied_cases(small: bool) -> dict[str, list[tuple[int, Case]]]:
  """By what is varied its values and their cases: T, H and B at S = 16, K at the T of
  pixel MNIST.
  """
  base, mnist = Case('', 256, 16, 64, 1, 128), CASES['M28']
  lengths, windows, factors = (256, 1024, 4096, 16_384), (1, 28, 112, 392), (1, 2, 4)
  if small:
    base, mnist = Case('', 32, 2, 4, 1, 4), Case('', 12, 3, 4, 1, 4)
    lengths, windows, factors = (32, 64), (1, 3, 12), (1, 2)
  return {
    'T': [(n, base._replace(num_steps=n, num_windows=n // 16)) for n in lengths],
    'K': [(n, mnist._replace(num_windows=n)) for n in windows],
    'H': [(n * base.hidden, base._replace(hidden=n * base.hidden)) for n in factors],
    'B': [
      (n * base.batch_size, base._replace(batch_size=n * base.batch_size))
      for n in factors
    ],
  }


def measure_programs(
  cases: list[tuple[int, Case]], rounds: int
) -> list[dict[str, Any]]:
  """A row for each case, timed by turns, on one device."""
  programs = []
  for value, case in cases:
    trainer, batch = (
      make_trainer(case, lstm_cell(case)),
      fptt_jax.Batch(*rivals.draw(case)),
    )
    compiled, state, compile_s = cost.compile_step(trainer, batch)
    batch = jax.device_put(batch, compiled.input_shardings[0][1])
    row = {
      'value': value,
      'compile_s': compile_s,
      'temp_mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    programs.append([compiled, state, batch, row, []])
  for _ in range(rounds + 1):
    for program in programs:
      compiled, state, batch, _, times = program
      seconds, program[1], _ = cost.timed_step(compiled, state, batch)
      times.append(seconds)
  return [row | milliseconds(times[1:]) for *_, row, times in programs]


def measure_population(config: Config) -> Iterator[list[dict[str, Any]]]:
  """Time of a step of R members of a case, each with a batch of its own, and the
  throughput in terms of one run's by itself, which has the devices to itself. All rows
  that are there, after each case.
  """
  rows: list[dict[str, Any]] = []
  for case in (CASES[name] for name in config.cases if name in POPULATION_CASES):
    programs = []
    for size in POPULATION_SIZES if case.name != 'smoke' else (1, 2):
      meshes = recipe.choose_meshes(
        recipe.Recipe(), case.batch_size, case.hidden, case.size, size
      )
      trainer, batch, key = (
        make_trainer(case, lstm_cell(case), meshes.batch),
        fptt_jax.Batch(*rivals.draw(case)),
        jax.random.key(0),
      )
      if size > 1:
        trainer, key = (
          fptt_jax.vmap_trainer(trainer, own_batches=True, mesh=meshes.members),
          jax.random.split(key, size),
        )
        batch = jax.tree.map(lambda leaf, size=size: np.stack([leaf] * size), batch)
      compiled, state, _ = cost.compile_step(trainer, batch, key)
      programs.append(
        [
          size,
          compiled,
          state,
          jax.device_put(batch, compiled.input_shardings[0][1]),
          [],
        ]
      )
    for _ in range(config.rounds + 1):
      for program in programs:
        seconds, program[2], _ = cost.timed_step(program[1], *program[2:4])
        program[4].append(seconds)
    found = [
      {'case': case.name, 'R': size, **milliseconds(times[1:])}
      for size, *_, times in programs
    ]
    rows += [
      row | {'throughput': row['R'] * found[0]['median_ms'] / row['median_ms']}
      for row in found
    ]
    yield rows


def plot_population(path: Path, rows: list[dict[str, Any]]) -> None:
  """Throughput against R."""
  figure = Figure(figsize=(6, 4.5), layout='constrained')
  axes = figure.subplots()
  for case in dict.fromkeys(row['case'] for row in rows):
    chosen = [row for row in rows if row['case'] == case]
    axes.plot(
      [row['R'] for row in chosen],
      [row['throughput'] for row in chosen],
      marker='o',
      label=case,
    )
  axes.set(
    xlabel='R, members side by side',
    ylabel='throughput / that of one alone',
    xscale='log',
    yscale='log',
  )
  axes.grid(alpha=0.3, which='both')
  axes.legend()
  reporting.save_figure(figure, path)


def update_steps(rows: list[dict[str, Any]], num_steps: int) -> float:
  """C, the time of one update in steps: the slope of the time over K > 1 by the time of
  a step. (K = 1 uses the caches less.)
  """
  windows, times = np.array(
    [(row['value'], row['median_ms']) for row in rows if row['value'] > 1]
  ).T
  slope, intercept = np.polyfit(windows, times, 1)
  return float(slope / (intercept / num_steps))


def plot_rivals(path: Path, rows: list[dict[str, Any]]) -> None:
  """Time of each system over ours, a group of bars a case."""
  cases = list(dict.fromkeys(row['case'] for row in rows))
  names = list(dict.fromkeys(row['system'].partition(', threads')[0] for row in rows))
  figure = Figure(figsize=(max(7, 1.4 * len(cases)), 4.5), layout='constrained')
  axes = figure.subplots()
  for number, name in enumerate(names):
    chosen = [row for row in rows if row['system'].partition(', threads')[0] == name]
    places = [cases.index(row['case']) + 0.8 * (number / len(names)) for row in chosen]
    axes.bar(
      places,
      [row['times_ours'] for row in chosen],
      0.8 / len(names),
      align='edge',
      label=name,
    )
  axes.axhline(1, color='0.5', linewidth=1)
  axes.set(ylabel='time / ours (medians)', yscale='log')
  axes.set_xticks(np.arange(len(cases)) + 0.4, cases)
  axes.grid(alpha=0.3, axis='y', which='both')
  axes.legend()
  reporting.save_figure(figure, path)


def fitted(growth: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
  """By what is varied, the exponents with which time, memory and the time to compile
  grow.
  """
  of = lambda rows, measure: cost.growth(
    [row['value'] for row in rows], [row[measure] for row in rows]
  )
  return {
    name: {
      measure: of(rows, measure) for measure in ('median_ms', 'temp_mib', 'compile_s')
    }
    for name, rows in growth.items()
  }


def plot_growth(path: Path, growth: dict[str, list[dict[str, Any]]]) -> None:
  """Time, memory and time to compile against what is varied, each with its exponent."""
  exponents = fitted(growth)
  figure = Figure(figsize=(3.5 * len(growth), 4), layout='constrained')
  for axes, (name, rows) in zip(
    figure.subplots(1, len(growth)), growth.items(), strict=True
  ):
    values = [row['value'] for row in rows]
    for measure, label in (
      ('median_ms', 'ms a batch'),
      ('temp_mib', 'temporary MiB'),
      ('compile_s', 's to compile'),
    ):
      axes.plot(
        values,
        [row[measure] for row in rows],
        marker='o',
        label=f'{label}: {name}^{exponents[name][measure]:.2f}',
      )
    axes.set(xlabel=name, xscale='log', yscale='log')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
  reporting.save_figure(figure, path)


def main(config: Config) -> None:
  """Measures, prints tables, writes JSON and plots."""
  folder = runs.make_folder(config.workdir)
  without = left_out()
  about = {
    **runs.machine('torch'),
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
        keep(folder, 'rivals', about, rows)
        plot_rivals(folder / 'rivals.png', rows)
      print((folder / 'rivals.txt').read_text())
    if config.part in ('all', 'population'):
      for rows in measure_population(config):
        keep(folder, 'population', about, rows)
        plot_population(folder / 'population.png', rows)
        print((folder / 'population.txt').read_text())
    if config.part in ('all', 'growth'):
      cases = varied_cases(small='smoke' in config.cases)
      growth: dict[str, list[dict[str, Any]]] = {}
      for name, chosen in cases.items():
        growth[name] = measure_programs(chosen, config.rounds)
        runs.write_json(folder / 'growth.json', about | {'growth': growth})
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
      runs.write_text(folder / 'growth.txt', '\n\n'.join(tables) + '\n')
      runs.write_json(
        folder / 'growth.json',
        about | {'growth': growth, 'exponents': fitted(growth), 'C': constant},
      )
      plot_growth(folder / 'growth.png', growth)
  print(f'numbers, tables and plots are in {folder}')


def keep(
  folder: Path, name: str, about: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
  """Writes rows as JSON and as a table."""
  runs.write_json(folder / f'{name}.json', about | {'lines': rows})
  runs.write_text(
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
  options.run(main, Config)
