"""One command for a short loan of a GPU: checks, times, and one JSON file.

The stages run in the order of their importance. The file is written after each stage,
so that a machine that is taken away keeps what it measured. The same command with the
same --workdir goes on with the stages that are left, and repeats those that failed.
"""

from collections.abc import Callable
import dataclasses
import functools
from pathlib import Path
import subprocess
import sys
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import measurements
from experiments.benchmark.cases import POPULATION_CASES
from experiments.benchmark.settings import Config
from experiments.core import environment, files
from experiments.core.flags import UserError
from fptt_jax import nn
from fptt_jax.nn.kernels import cuda

KERNEL_LAYERS: dict[str, Callable[..., nnx.Module]] = {'LSTM': nn.LSTM, 'GRU': nn.GRU}
"""Layers with a CUDA kernel."""

KERNEL_SIZES = cuda.SIZES
"""Hidden sizes that the kernels are compiled for."""

ROOT = Path(__file__).parents[2]


class Stage(NamedTuple):
  """A part of the day.

  Attributes:
    name: its name in the file.
    run: () -> its results, as JSON holds them.
  """

  name: str
  run: Callable[[], Any]


def run_day(config: Config, folder: Path) -> dict[str, Any]:
  """Run the stages that are left, and write gpu-day.json after each.

  Args:
    config: the cases, the rounds and the minutes that the command may start stages for.
    folder: the folder to write to.

  Returns:
    What the file holds.
  """
  return run_stages(make_stages(config), folder / 'gpu-day.json', config.minutes)


def make_stages(config: Config) -> list[Stage]:
  """Return the stages, the most important ones first."""
  first, *others = config.cases
  stages = [
    Stage('kernels', check_kernels),
    Stage('tests', run_gpu_tests),
    *_stages_of_case(config, first),
  ]
  for name in others:
    stages += _stages_of_case(config, name)
  return stages


def _stages_of_case(config: Config, name: str) -> list[Stage]:
  """Return the stages that time a case, each within a config of that case alone."""
  alone = dataclasses.replace(config, cases=(name,))
  stages = [Stage(f'rivals {name}', functools.partial(time_rivals, alone))]
  if name in POPULATION_CASES:
    run = functools.partial(time_population, alone)
    stages.append(Stage(f'population {name}', run))
  return stages


def run_stages(stages: list[Stage], path: Path, minutes: float) -> dict[str, Any]:
  """Run the stages that have no result yet.

  Args:
    stages: the stages in order.
    path: the JSON file, which may hold results of an earlier call.
    minutes: no stage starts later than this. One that runs is not interrupted.

  Returns:
    What the file holds: by stage its seconds, its result or error, and the machine.

  Raises:
    UserError: the file was measured with another precision.
  """
  began = time.monotonic()
  content = files.read_json(path) if path.exists() else {'stages': {}}
  config: Any = jax.config  # Its attributes are made at run time.
  precision = config.jax_default_matmul_precision
  found = content.setdefault('precision', precision)
  if found != precision:
    raise UserError(
      f'{path} was measured with --precision={found}, not {precision}: choose another '
      '--workdir.'
    )
  for stage in stages:
    if 'result' in content['stages'].get(stage.name, {}):
      continue
    if time.monotonic() - began > 60 * minutes:
      break
    content['stages'][stage.name] = _run_stage(stage)
    files.write_json(path, content)
  done = [
    stage.name for stage in stages if 'result' in content['stages'].get(stage.name, {})
  ]
  left = [stage.name for stage in stages if stage.name not in done]
  print(f'{len(done)} of {len(stages)} stages have results, in {path}')
  if left:
    print(f'left: {", ".join(left)}; the same command goes on with them')
  return content


def _run_stage(stage: Stage) -> dict[str, Any]:
  """Return seconds and result of a stage, or its error."""
  start = time.monotonic()
  entry: dict[str, Any] = {}
  try:
    entry['result'] = stage.run()
  # A driver, a compiler or memory may fail in any way; the other stages still run.
  except Exception as error:
    entry['error'] = f'{type(error).__name__}: {error}'[:4000]
  entry['seconds'] = time.monotonic() - start
  # Stages of one file may run on several days.
  entry['machine'] = environment.describe_machine('torch')
  outcome = entry.get('error', 'done').partition('\n')[0]
  print(f'{stage.name}: {outcome} ({entry["seconds"]:.0f} s)', flush=True)
  return entry


def run_gpu_tests() -> dict[str, Any]:
  """Run the tests that need a GPU, in a process of their own.

  Returns:
    The last lines of pytest's output.

  Raises:
    RuntimeError: a test failed, or was skipped, so that nothing was tested.
  """
  options = ['-q', '-rs', '-m', 'gpu', 'tests/test_gpu.py']
  command = [sys.executable, '-m', 'pytest', *options]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  last = done.stdout.splitlines()[-20:]
  if done.returncode or ' skipped' in last[-1]:
    raise RuntimeError('\n'.join(last) + done.stderr[-1000:])
  return {'output': last}


def check_kernels() -> list[dict[str, Any]]:
  """Compile each CUDA kernel and compare it with the scan.

  Returns:
    A row per layer and size: seconds of the first call, which compiles, and the largest
    error of outputs, end state and gradients, relative to their largest number.

  Raises:
    RuntimeError: an error is larger than float32 sums of other orders explain.
  """
  rows: list[dict[str, Any]] = []
  for layer in KERNEL_LAYERS:
    for hidden in KERNEL_SIZES:
      start = time.monotonic()
      found = _window_and_gradients(layer, hidden, 'cuda')
      seconds = time.monotonic() - start
      expected = _window_and_gradients(layer, hidden, 'custom_vjp')
      error = max(map(_relative_error, found, expected))
      rows.append({'layer': layer, 'H': hidden, 'seconds': seconds, 'error': error})
  worst = max(row['error'] for row in rows)
  if not worst < 1e-4:
    raise RuntimeError(f'the largest relative error is {worst}: {rows}')
  return rows


def _window_and_gradients(
  layer: str, hidden: int, implementation: str
) -> list[np.ndarray]:
  """Return outputs, end state and gradients of a ragged window of 28 steps."""

  def build(rngs: nnx.Rngs) -> nnx.Module:
    return KERNEL_LAYERS[layer](3, hidden, implementation=implementation, rngs=rngs)

  model = nn.from_nnx(build)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(28, 32, 3)), jnp.float32)
  mask = jnp.asarray(rng.random((28, 32)) < 0.8)

  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def window(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    outputs: Any
    end, outputs = model.apply(params, model.initial_state(32), x, mask, None)
    # Outputs of masked steps are undefined.
    y = jnp.where(mask[..., None], outputs, 0)
    total = jnp.sum(jnp.sin(y)) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(end))
    return total, (y, end)

  with jax.default_matmul_precision('float32'):
    results = jax.jit(window)(model.init(jax.random.key(0)), x)
  return [np.asarray(leaf) for leaf in jax.tree.leaves(results)]


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
  """Return the largest difference relative to the largest number that is expected."""
  return float(np.abs(found - expected).max() / np.abs(expected).max())


def time_rivals(config: Config) -> dict[str, Any]:
  """Time a case by all systems, and say which could not be timed."""
  without = measurements.left_out()
  *_, rows = measurements.measure_rivals(config, without)
  return {'lines': rows, 'left_out': without}


def time_population(config: Config) -> list[dict[str, Any]]:
  """Time populations of a case against a single run."""
  *_, rows = measurements.measure_population(config)
  return rows
