"""Measurements of the benchmark: rivals, growth and populations."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import importlib.util
import os
import time
from typing import Any

from flax import nnx
import jax
import numpy as np
import optax

from experiments.benchmark import cases, cost, rivals_flax, rivals_haiku, rivals_torch
from experiments.benchmark.cases import (
  CASES,
  CREDIT_CASES,
  CREDIT_SHAPE,
  POPULATION_CASES,
  POPULATION_SIZES,
  Case,
  CreditCase,
  flops,
  varied_cases,
)
from experiments.benchmark.ours import (
  MANY,
  MANY_NAME,
  choose_mesh,
  lstm,
  make_model,
  make_trainer,
  train_step,
  train_steps,
)
from experiments.benchmark.plots import fitted, update_steps
from experiments.benchmark.rivals_torch import with_threads
from experiments.benchmark.settings import Config
from experiments.benchmark.timing import (
  PAUSE,
  PRODUCT_SIZE,
  Call,
  best_threads,
  drop_noisy_calls,
  milliseconds,
  product_probe,
  sync_probe,
  timed,
)
from experiments.core import devices, recipe
import fptt_jax
from fptt_jax import nn

Step = Callable[..., Any]
"""(inputs, targets) -> losses; trains on one batch, or on several by its name."""


def left_out() -> dict[str, str]:
  """Return the systems that cannot be timed on this machine, with the reasons."""
  reasons = {}
  if devices.is_cpu():
    reasons['ours, kernel'] = 'needs an NVIDIA GPU'
  if not importlib.util.find_spec('haiku'):
    reasons['Haiku'] = 'not installed'
  if not importlib.util.find_spec('torch'):
    reasons['PyTorch'] = 'not installed'
  elif not devices.is_cpu():
    import torch

    if not torch.cuda.is_available():
      reasons['PyTorch'] = f'version {torch.__version__} finds no GPU'
  return reasons


def systems(case: Case) -> dict[str, Callable[[], Step]]:
  """Return the systems to time on a case.

  A system that cannot be built, such as a CUDA kernel without a compiler, fails when
  its function is called.

  Args:
    case: model and shapes.

  Returns:
    By name a function () -> step.
  """
  without = left_out()
  found = _our_systems(case, without)
  flax = rivals_flax
  found['flax, one jit'] = lambda: train_step(
    case, make_model(case, flax.flax_cell(case)), whole=True
  )
  found['flax, nnx.RNN'] = lambda: train_step(case, flax.rnn_model(case), whole=True)
  found['flax, a loop'] = lambda: rivals_flax.flax_loop(case)
  if 'Haiku' not in without:
    found['Haiku'] = lambda: train_step(case, rivals_haiku.make_model(case), whole=True)
  if 'PyTorch' not in without:
    found |= _torch_systems(case)
  return found


def _our_systems(case: Case, without: dict[str, str]) -> dict[str, Callable[[], Step]]:
  """Return the systems of `fptt_jax`; 'ours', the reference, comes first."""
  mesh = choose_mesh(case)
  found: dict[str, Callable[[], Step]] = {
    'ours': lambda: train_step(case, lstm(case), mesh)
  }
  if mesh is not None:
    found['ours, one device'] = lambda: train_step(case, lstm(case))
  # On a CPU the layer's default is a native kernel, where it can be compiled.
  if devices.is_cpu():
    found['ours, XLA alone'] = lambda: train_step(
      case, lstm(case, implementation='custom_vjp'), mesh
    )
  found['ours, bfloat16'] = lambda: train_step(
    case, lstm(case, products='bfloat16'), mesh
  )
  found[f'ours, {MANY_NAME}'] = lambda: train_steps(case, lstm(case), mesh)
  # On a CPU one vector of all parameters takes several times as long.
  if not devices.is_cpu():
    found['ours, one buffer'] = lambda: train_step(
      case, lstm(case), mesh, one_buffer=True
    )
  if 'ours, kernel' not in without:
    found['ours, kernel'] = lambda: train_step(
      case, lstm(case, implementation='cuda'), mesh
    )
    found[f'ours, kernel, {MANY_NAME}'] = lambda: train_steps(
      case, lstm(case, implementation='cuda'), mesh
    )
  if case.words:
    found['ours, whole readout'] = lambda: train_step(
      case, lstm(case), mesh, whole=True
    )
  return found


def _torch_systems(case: Case) -> dict[str, Callable[[], Step]]:
  """Return the systems of PyTorch, by style and number of threads."""
  cores = os.cpu_count() or 1
  device = 'cuda'
  kinds = ['plain', 'optimized', 'bfloat16', 'compiled', 'graph']
  threads = [cores]
  if devices.is_cpu():
    device = 'cpu'
    kinds = ['plain', 'optimized', 'bfloat16', 'compiled']
    # Small products are often faster in one thread; the table keeps the better one.
    threads = sorted({1, cores})

  def make(kind: str, number: int) -> Step:
    return with_threads(rivals_torch.torch_loop(case, kind, device=device), number)

  return {
    f'PyTorch {kind}, threads {number}': (functools.partial(make, kind, number))
    for kind in kinds
    for number in threads
  }


@dataclasses.dataclass(frozen=True)
class _Probes:
  """Probes of the machine, which is not always equally fast.

  Attributes:
    pause: seconds to rest after calls of PyTorch and NumPy.
    size: rows of the matrices of `product`.
    product: product of two matrices; its fastest call is the peak speed.
    sync: the program that is timed before and after each call of a system.
  """

  pause: float
  size: int
  product: Callable[[], Any]
  sync: Callable[[], Any]

  def check_quiet(self) -> float:
    """Return the seconds of the fastest of three probes."""
    return min(timed(self.sync) for _ in range(3))


def _make_probes(small: bool) -> _Probes:
  """Return the probes for this machine; small ones for tests."""
  if not devices.is_cpu():
    size = 16 if small else PRODUCT_SIZE['gpu']
    product = product_probe(size)
    # A GPU has no cores that drift apart; the product shows a lowered clock.
    return _Probes(0.0, size, product, product)
  size = 16 if small else PRODUCT_SIZE['cpu']
  return _Probes(PAUSE, size, product_probe(size), sync_probe(small))


def measure_rivals(
  config: Config, without: dict[str, str]
) -> Iterator[list[dict[str, Any]]]:
  """Time a training batch of each case by each system.

  Args:
    config: cases and number of rounds.
    without: receives the rivals that fail, with the reasons.

  Yields:
    After each case, the rows of all systems and cases so far.
  """
  probes = _make_probes('smoke' in config.cases)
  rows: list[dict[str, Any]] = []
  for case in (CASES[name] for name in config.cases):
    programs = _warm_programs(case, config.without, without)
    calls, peak = _time_rounds(programs, probes, config.rounds)
    quiet = best_threads(drop_noisy_calls(calls))
    rows += _rival_rows(case, quiet, peak)
    yield rows


def _warm_programs(
  case: Case, words: Sequence[str], without: dict[str, str]
) -> dict[str, Callable[[], Any]]:
  """Return a call () -> losses of each system of a case, compiled and warm.

  Args:
    case: model and shapes.
    words: words in the names of systems to leave out.
    without: receives the systems that fail.
  """
  programs: dict[str, Callable[[], Any]] = {}
  for name, make in systems(case).items():
    # All others are compared with 'ours'.
    if name != 'ours' and any(word in name for word in words):
      continue
    try:
      step = make()
      data = place_batch(case, name)
      # The first call compiles; a second one compiles again if the state that it gets
      # lies elsewhere than the initial one.
      for _ in range(2):
        step(*data)
    # A compiler, a driver or memory may fail in any way; the others are still timed.
    except Exception as error:
      if name == 'ours':
        raise
      # Compilers add pages to the first line of their message.
      first_line = str(error).partition('\n')[0]
      reason = f'{type(error).__name__}: {first_line}'
      without[f'{case.name}: {name}'] = reason
      print(f'not timed: {case.name}: {name} ({reason})', flush=True)
    else:
      programs[name] = functools.partial(step, *data)
  return programs


def _time_rounds(
  programs: dict[str, Callable[[], Any]], probes: _Probes, rounds: int
) -> tuple[dict[str, list[Call]], float]:
  """Time the systems in turns.

  Args:
    programs: calls by the name of their system.
    probes: the probes of the machine.
    rounds: number of calls of each system.

  Returns:
    (calls by name, peak speed in GFLOP/s).
  """
  calls: dict[str, list[Call]] = {name: [] for name in programs}
  products = []
  # In turns, so that a slow minute of the machine hits all systems alike.
  for _ in range(rounds):
    products.append(timed(probes.product))
    time.sleep(probes.pause)
    before = probes.check_quiet()
    for name, program in programs.items():
      seconds = timed(program) / (MANY if name.endswith(MANY_NAME) else 1)
      if name.startswith('PyTorch'):
        time.sleep(probes.pause)
      after = probes.check_quiet()
      calls[name].append(Call(seconds, max(before, after)))
      before = after
  # A product of two [n, n] matrices has n³ multiplications and n³ additions.
  return calls, 2e-9 * probes.size**3 / min(products)


def _rival_rows(
  case: Case, times: dict[str, dict[str, Any]], peak: float
) -> list[dict[str, Any]]:
  """Return the rows of the table for one case.

  Args:
    case: model and shapes.
    times: statistics of the calls by system; 'ours' comes first.
    peak: GFLOP/s of the machine's fastest product.
  """
  ours_ms = times['ours']['median_ms']
  rows = []
  for name, summary in times.items():
    median_ms = summary['median_ms']
    gflops = 1e-9 * flops(case) / (1e-3 * median_ms)
    system, _, threads = name.partition(', threads ')
    row: dict[str, Any] = {'case': case.name, 'system': system}
    row['precision'] = 'bfloat16' if 'bfloat16' in system else _precision()
    # XLA and the kernels use all cores.
    row['threads'] = int(threads or os.cpu_count() or 1)
    row |= summary
    row['times_ours'] = median_ms / ours_ms
    row['gflops'] = gflops
    row['peak_gflops'] = peak
    row['of_peak'] = gflops / peak
    row['epoch_s'] = 1e-3 * median_ms * case.batches or None
    rows.append(row)
  return rows


def _precision() -> str:
  """Return the precision of matrix products, which --precision sets."""
  config: Any = jax.config  # Its attributes are made at run time.
  return str(config.jax_default_matmul_precision or 'float32')


def place_batch(case: Case, system: str) -> tuple[Any, Any]:
  """Draw a batch and put it where a system reads it.

  Args:
    case: the shapes.
    system: the system's name.

  Returns:
    (inputs, targets): tensors for PyTorch, else arrays on the system's devices.
  """
  data = cases.draw(case)
  mesh = choose_mesh(case)
  if system.startswith('PyTorch'):
    return rivals_torch.tensors(*data, device='cpu' if devices.is_cpu() else 'cuda')
  if mesh is None or not system.startswith('ours') or system == 'ours, one device':
    return jax.device_put(data)
  # Programs of several batches read them from a source, which each device has whole.
  if system.endswith(MANY_NAME):
    on_all = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(data, on_all)
  batch = fptt_jax.make_global_batch(fptt_jax.Batch(*data), cases.make_loss(case), mesh)
  return batch.inputs, batch.targets


@dataclasses.dataclass
class _Program:
  """A compiled train step that is timed.

  Attributes:
    step: the compiled step.
    state: the state, which each call replaces.
    batch: the batch, where the step reads it.
    row: facts about the program for its row in the table.
    times: seconds of the calls so far.
  """

  step: Any
  state: fptt_jax.TrainState
  batch: fptt_jax.Batch
  row: dict[str, Any]
  times: list[float] = dataclasses.field(default_factory=list)

  def call(self) -> None:
    """Train on the batch and note the time."""
    seconds, self.state, _ = cost.timed_step(self.step, self.state, self.batch)
    self.times.append(seconds)


def _time_in_turns(programs: list[_Program], rounds: int) -> list[dict[str, Any]]:
  """Call the programs in turns and return a row of times for each."""
  # One round more than is counted: the first one warms up.
  for _ in range(rounds + 1):
    for program in programs:
      program.call()
  return [_row_of(program) for program in programs]


def _row_of(program: _Program) -> dict[str, Any]:
  """Return the facts about a program, with its times."""
  # XLA and the kernels use all cores.
  common = {'precision': _precision(), 'threads': os.cpu_count() or 1}
  return program.row | common | milliseconds(program.times[1:])


def measure_programs(
  variants: list[tuple[int, Case]], rounds: int
) -> list[dict[str, Any]]:
  """Time several cases in turns, on one device.

  Args:
    variants: (value of what is varied, case).
    rounds: number of timed calls of each.

  Returns:
    A row per case: `value`, `compile_s`, `temp_mib` (memory besides arguments and
    results) and the times.
  """
  programs = []
  for value, case in variants:
    trainer = make_trainer(case, lstm(case))
    batch = fptt_jax.Batch(*cases.draw(case))
    compiled, state, compile_s = cost.compile_step(trainer, batch)
    row = {
      'value': value,
      'compile_s': compile_s,
      'temp_mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    placed = jax.device_put(batch, compiled.input_shardings[0][1])
    programs.append(_Program(compiled, state, placed, row))
  return _time_in_turns(programs, rounds)


def measure_growth(config: Config) -> Iterator[list[dict[str, Any]]]:
  """Time cases of growing T, K, H and B, see :func:`measure_programs`.

  Args:
    config: number of rounds; with the case 'smoke' toys.

  Yields:
    After each varied dimension all rows so far. In the end there is a row for the
    exponents of growth, and for C, the time of an update in steps.
  """
  variants = varied_cases(small='smoke' in config.cases)
  growth: dict[str, list[dict[str, Any]]] = {}
  for name, chosen in variants.items():
    growth[name] = [
      {'varied': name, **row} for row in measure_programs(chosen, config.rounds)
    ]
    yield [row for rows in growth.values() for row in rows]
  constant = update_steps(growth['K'], variants['K'][0][1].num_steps)
  fit = {'varied': 'fit', 'exponents': fitted(growth), 'C': constant}
  yield [*(row for rows in growth.values() for row in rows), fit]


def measure_population(config: Config) -> Iterator[list[dict[str, Any]]]:
  """Time a step of R members side by side, each with a batch of its own.

  The throughput is relative to a single run, which has all devices to itself.

  Args:
    config: cases and number of rounds.

  Yields:
    After each case, the rows of all cases so far.
  """
  rows: list[dict[str, Any]] = []
  for case in (CASES[name] for name in config.cases if name in POPULATION_CASES):
    sizes = (1, 2) if case.name == 'smoke' else POPULATION_SIZES
    programs = [_population_program(case, size) for size in sizes]
    found = _time_in_turns(programs, config.rounds)
    alone_ms = found[0]['median_ms']
    for row in found:
      row['throughput'] = row['R'] * alone_ms / row['median_ms']
    rows += found
    yield rows


def _population_program(case: Case, size: int) -> _Program:
  """Compile the step of a population of a given size."""
  meshes = devices.choose_meshes(
    recipe.Recipe(), case.batch_size, case.hidden, case.size, size
  )
  trainer = make_trainer(case, lstm(case), meshes.batch)
  batch = fptt_jax.Batch(*cases.draw(case))
  key = jax.random.key(0)
  # A population of one is an ordinary run: the others are compared with it.
  if size > 1:
    trainer = fptt_jax.vmap_trainer(trainer, own_batches=True, mesh=meshes.members)
    key = jax.random.split(key, size)
    batch = jax.tree.map(lambda leaf: np.stack([leaf] * size), batch)
  compiled, state, _ = cost.compile_step(trainer, batch, key)
  placed = jax.device_put(batch, compiled.input_shardings[0][1])
  return _Program(compiled, state, placed, {'case': case.name, 'R': size})


def measure_influence(config: Config) -> list[dict[str, Any]]:
  """Time a step with credit across windows, in turns with one without it.

  Args:
    config: number of rounds; with the case 'smoke' one layer of a toy's shape.

  Returns:
    A row per layer and influence: `implementation` of the layer, `state_mib` of the
    influence, `temp_mib` (memory besides arguments and results), the times, and
    `times_none`, the ratio of the fastest calls with and without the influence.
  """
  small = 'smoke' in config.cases
  shape = CASES['smoke'] if small else CREDIT_SHAPE
  rows: list[dict[str, Any]] = []
  for case in CREDIT_CASES[-1:] if small else CREDIT_CASES:
    programs = [
      _influence_program(case, shape, name) for name in ('none', *case.influences)
    ]
    found = _time_in_turns(programs, config.rounds)
    for row in found:
      row['times_none'] = row['min_ms'] / found[0]['min_ms']
    rows += found
  return rows


def _influence_program(case: CreditCase, shape: Case, influence: str) -> _Program:
  """Compile the step of a layer with an influence, on one device."""
  kind = getattr(nn, case.layer)
  settings = {'implementation': case.implementation} if case.implementation else {}

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    layer = kind(shape.features, shape.hidden, rngs=rngs, **settings)
    return nn.Sequential(layer, nnx.Linear(shape.hidden, shape.outputs, rngs=rngs))

  trainer = fptt_jax.make_trainer(
    nn.from_nnx(build),
    cases.make_loss(shape),
    fptt_jax.fptt(optax.adam(cases.LR), alpha=cases.ALPHA),
    num_windows=shape.num_windows,
    influence=influence,
  )
  batch = fptt_jax.Batch(*cases.draw(shape))
  compiled, state, _ = cost.compile_step(trainer, batch)
  state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.influence))
  row = {
    'layer': case.layer,
    'implementation': case.implementation or 'default',
    'influence': influence,
    'state_mib': state_bytes / 2**20,
    'temp_mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
  }
  placed = jax.device_put(batch, compiled.input_shardings[0][1])
  return _Program(compiled, state, placed, row)
