"""Measurements of the benchmark: rivals, growth and populations."""

from collections.abc import Callable, Iterator
import importlib.util
import os
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmark import cases, cost, rivals_flax, rivals_torch
from experiments.benchmark.cases import (
  CASES,
  POPULATION_CASES,
  POPULATION_SIZES,
  Case,
  flops,
)
from experiments.benchmark.ours import (
  MANY,
  MANY_NAME,
  choose_mesh,
  lstm_cell,
  make_trainer,
  train_step,
  train_steps,
)
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
from fptt_jax.nn.kernels import cuda


def left_out() -> dict[str, str]:
  """What cannot be timed here, and why."""
  reasons = {}
  if not cuda.is_available():
    reasons['ours, kernel'] = (
      'needs an NVIDIA GPU, and nvcc on the PATH or in $CUDA_HOME/bin'
    )
  if not importlib.util.find_spec('torch'):
    reasons['PyTorch'] = 'not installed'
  elif not devices.is_cpu():
    import torch

    if not torch.cuda.is_available():
      reasons['PyTorch'] = f'version {torch.__version__} finds no GPU'
  return reasons


def systems(case: Case) -> dict[str, Callable[[], Callable[..., Any]]]:
  """What is timed, by name; each is a function that makes the step."""
  mesh, without = choose_mesh(case), left_out()
  found: dict[str, Callable[[], Callable[..., Any]]] = {
    'ours': lambda: train_step(case, lstm_cell(case), mesh)
  }
  if mesh is not None:
    found['ours, one device'] = lambda: train_step(case, lstm_cell(case))
  found[f'ours, {MANY_NAME}'] = lambda: train_steps(case, lstm_cell(case), mesh)
  if (
    not devices.is_cpu()
  ):  # There one vector of all parameters takes several times as long.
    found['ours, one buffer'] = lambda: train_step(
      case, lstm_cell(case), mesh, one_buffer=True
    )
  if 'ours, kernel' not in without and case.hidden in cuda.SIZES:
    found['ours, kernel'] = lambda: train_step(
      case, lstm_cell(case, implementation='cuda'), mesh
    )
    found[f'ours, kernel, {MANY_NAME}'] = lambda: train_steps(
      case, lstm_cell(case, implementation='cuda'), mesh
    )
  if case.words:
    found['ours, whole readout'] = lambda: train_step(
      case, lstm_cell(case), mesh, whole=True
    )
  found['flax, one jit'] = lambda: train_step(
    case, rivals_flax.flax_cell(case), whole=True
  )
  found['flax, a loop'] = lambda: rivals_flax.flax_loop(case)
  if 'PyTorch' not in without:
    on_cpu = devices.is_cpu()
    for kind in ('plain', 'optimized') if on_cpu else ('plain', 'optimized', 'graph'):
      for threads in (
        sorted({1, os.cpu_count() or 1}) if on_cpu else (os.cpu_count() or 1,)
      ):
        make = lambda kind=kind: rivals_torch.torch_loop(
          case, kind, device='cpu' if on_cpu else 'cuda'
        )
        found[f'PyTorch {kind}, threads {threads}'] = (
          lambda make=make, threads=threads: with_threads(make(), threads)
        )
  return found


def measure_rivals(
  config: Config, without: dict[str, str]
) -> Iterator[list[dict[str, Any]]]:
  """Rows of each case and system: all that are there, after each case. A rival that
  fails goes into `without`, with the reason.
  """
  pause, size = (
    (PAUSE, PRODUCT_SIZE['cpu']) if devices.is_cpu() else (0.0, PRODUCT_SIZE['gpu'])
  )
  size = 16 if 'smoke' in config.cases else size
  product = product_probe(size)
  checked = sync_probe('smoke' in config.cases) if devices.is_cpu() else product
  check_quiet = lambda: min(timed(checked) for _ in range(3))
  rows: list[dict[str, Any]] = []
  for case in (CASES[name] for name in config.cases):
    steps, data = {}, {}
    for name, make in systems(case).items():
      try:
        step, data[name] = make(), place_batch(case, name)
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
      for name, summary in best_threads(drop_noisy_calls(calls)).items()
    ]
    peak = 2e-9 * size**3 / min(products)
    for row in found:
      row['times_ours'] = row['median_ms'] / found[0]['median_ms']
      row['gflops'] = 1e-9 * flops(case) / (1e-3 * row['median_ms'])
      row |= {'peak_gflops': peak, 'of_peak': row['gflops'] / peak}
      row['epoch_s'] = 1e-3 * row['median_ms'] * case.batches or None
    rows += found
    yield rows


def place_batch(case: Case, system: str) -> tuple[Any, Any]:
  """A batch where a system wants it: on its device, or split over those that it is
  split over.
  """
  data, mesh = cases.draw(case), choose_mesh(case)
  if system.startswith('PyTorch'):
    return rivals_torch.tensors(*data, device='cpu' if devices.is_cpu() else 'cuda')
  if mesh is None or not system.startswith('ours') or system == 'ours, one device':
    return jax.device_put(data)
  if system.endswith(MANY_NAME):  # A source, which all devices read from.
    return jax.device_put(
      data, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
  batch = fptt_jax.make_global_batch(fptt_jax.Batch(*data), cases.make_loss(case), mesh)
  return batch.inputs, batch.targets


def measure_programs(
  variants: list[tuple[int, Case]], rounds: int
) -> list[dict[str, Any]]:
  """A row for each case, timed by turns, on one device."""
  programs = []
  for value, case in variants:
    trainer, batch = (
      make_trainer(case, lstm_cell(case)),
      fptt_jax.Batch(*cases.draw(case)),
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
      meshes = devices.choose_meshes(
        recipe.Recipe(), case.batch_size, case.hidden, case.size, size
      )
      trainer, batch, key = (
        make_trainer(case, lstm_cell(case), meshes.batch),
        fptt_jax.Batch(*cases.draw(case)),
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
