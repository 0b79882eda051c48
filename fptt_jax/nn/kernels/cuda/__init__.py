"""CUDA kernels that run a whole window, compiled on first use and called by `jax.ffi`.

The kernels are compiled for GPUs in the tests, but have only run in emulation on the
CPU so far. They sum in full float32, whatever the precision of JAX's own products. At
H = 128 a block needs up to 128 KiB of shared memory for the LSTM (A100, H100 or newer
data-center GPUs) and 30 KiB for the GRU.
"""

import functools
import hashlib
from importlib.metadata import version
import os
from pathlib import Path
import shutil
import subprocess
import threading

import jax
import jax.numpy as jnp

from fptt_jax._checks import Words, require
from fptt_jax.nn.kernels._libraries import load_library

NUM_GATES = {'LSTM': 4, 'GRU': 3}
NUM_FACTORS = {'LSTM': 6, 'GRU': 5}
SIZES = (32, 64, 128)
"""The hidden sizes H that kernels are compiled for."""
FOLDER = Path(__file__).parent
_built: set[tuple[str, str]] = set()
_first_use = threading.RLock()
"""Held while kernels are built: JAX takes each name once."""


def is_available() -> bool:
  """Return whether there are an NVIDIA GPU and the compiler that kernels need."""
  try:
    return bool(jax.devices('cuda') and _find_compiler('CUDA'))
  except RuntimeError:
    return False


def build(cell: str, platform: str) -> None:
  """Compile a cell's kernels and register them with JAX, once per process.

  The library is kept for later processes, see :mod:`fptt_jax.nn.kernels._libraries`.

  Args:
    cell: 'LSTM' or 'GRU'.
    platform: 'CUDA', or 'cpu' for the slow emulation that tests run.

  Raises:
    RuntimeError: there is no compiler or no GPU, or the compiler fails.
    OSError: the library cannot be written or loaded.
  """
  with _first_use:
    if (cell, platform) not in _built:
      _register(cell, platform)
      _built.add((cell, platform))


def _register(cell: str, platform: str) -> None:
  command = compile_command(cell, platform)
  compile_to = functools.partial(_compile, cell, command)
  handlers = load_library(_library_name(cell, command), compile_to)
  for direction in ('forward', 'backward'):
    target = f'{cell.lower()}_{direction}'
    # Targets are looked up by name when a compiled program is loaded.
    capsule = jax.ffi.pycapsule(getattr(handlers, target))
    jax.ffi.register_ffi_target(f'fptt_jax_{target}', capsule, platform=platform)


def compile_command(
  cell: str, platform: str, architecture: str | None = None
) -> list[str]:
  """Return the command that compiles a cell's kernels, without `-o`.

  Args:
    cell: 'LSTM' or 'GRU'.
    platform: 'CUDA' or 'cpu'.
    architecture: a GPU architecture such as 'sm_90'; None for the first GPU's.

  Raises:
    RuntimeError: there is no compiler, or no GPU whose architecture is needed.
  """
  if platform == 'CUDA':
    if architecture is None:
      capability = jax.devices('cuda')[0].compute_capability
      architecture = 'sm_' + capability.replace('.', '')
    options = [f'-arch={architecture}', '-O3', '-Xcompiler', '-fPIC']
  else:
    options = ['-O2', '-fPIC', '-x', 'c++']
  return [
    _find_compiler(platform),
    *options,
    '-std=c++17',
    '-shared',
    f'-I{jax.ffi.include_dir()}',
    str(_source(cell)),
  ]


def check_supported(
  cell: str, hidden_features: int, dtype: jax.typing.DTypeLike
) -> None:
  """Raise unless a cell's kernel exists for this size and dtype.

  Raises:
    ValueError: H is not one of :data:`SIZES`.
    TypeError: the dtype is not float32.
  """
  kernel = f'for the CUDA kernel of {cell}'
  fits, accepted = hidden_features in SIZES, f'one of {list(SIZES)} {kernel}'
  require(fits, 'hidden_features', accepted, hidden_features)
  name = Words(jnp.dtype(dtype))
  accepted = f'float32 {kernel}'
  require(name == 'float32', 'param_dtype', accepted, name, error=TypeError)


def run_forward(
  cell: str,
  drive: jax.Array,
  weights: dict[str, jax.Array],
  state: dict[str, jax.Array],
  mask: jax.Array | None,
) -> tuple[list[jax.Array], tuple[jax.Array, tuple[jax.Array, ...]]]:
  """Run a window forward.

  Args:
    cell: 'LSTM' or 'GRU'.
    drive: [S, B, GH].
    weights: the recurrent weights by the kernel's names.
    state: the parts of the state [B, H] by the kernel's names.
    mask: bool [S, B] or None.

  Returns:
    (parts of the state after the window, (y [S, B, H], factors [S, B, H])).

  Raises:
    ValueError: an operand has another shape than the kernel reads.
    TypeError: an operand is not float32.
  """
  num_steps, batch_size, width = drive.shape
  size = width // NUM_GATES[cell]
  operands = {'drive': drive, **weights, **state, 'mask': _fill_mask(mask, drive)}
  shapes = {
    'drive': (num_steps, batch_size, width),
    'w_h': (size, width),
    'recurrent_bias': (width,),
    'mask': (num_steps, batch_size),
  }
  # A kernel reads raw memory by these shapes, so a wrong operand must not reach it.
  for name, operand in operands.items():
    shape = shapes.get(name, (batch_size, size))
    fits = operand.shape == shape and 0 not in shape
    accepted = f'of shape {shape}, without zeros, for the CUDA kernel of {cell}'
    require(fits, name, accepted, operand.shape)
    if name != 'mask':
      check_supported(cell, size, operand.dtype)
  step_results = (num_steps, batch_size, size)
  # In the order in which the kernel writes them.
  results = [
    step_results,
    *len(state) * [(batch_size, size)],
    *NUM_FACTORS[cell] * [step_results],
  ]
  y, *others = _call(cell, 'forward', results, *operands.values())
  return others[: len(state)], (y, tuple(others[len(state) :]))


def run_backward(
  cell: str,
  shapes: list[tuple[int, ...]],
  operands: tuple[jax.Array, ...],
  dy: jax.Array,
  mask: jax.Array | None,
) -> list[jax.Array]:
  """Run a window backward.

  Args:
    cell: 'LSTM' or 'GRU'.
    shapes: the shapes of the results.
    operands: the kernel's operands, without the mask.
    dy: gradient of the outputs [S, B, H].
    mask: bool [S, B] or None.

  Returns:
    dz of the steps and the gradients of the state before the window, as `shapes` says.
  """
  return _call(cell, 'backward', shapes, *operands, _fill_mask(mask, dy))


def _call(
  cell: str, direction: str, shapes: list[tuple[int, ...]], *operands: jax.Array
) -> list[jax.Array]:
  backend = jax.default_backend()
  # Built while tracing, so that layers can be constructed without a GPU.
  if backend == 'gpu':
    build(cell, 'CUDA')
  elif (cell, backend) not in _built:
    raise RuntimeError(
      "implementation='cuda' runs on NVIDIA GPUs, got the default backend "
      f"{backend!r}; implementation='custom_vjp' runs everywhere."
    )
  results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  # Kernels take any leading axes as members, each with weights of its own.
  function = jax.ffi.ffi_call(
    f'fptt_jax_{cell.lower()}_{direction}', results, vmap_method='broadcast_all'
  )
  return list(function(*operands))


def _fill_mask(mask: jax.Array | None, like: jax.Array) -> jax.Array:
  return jnp.ones(like.shape[:2], bool) if mask is None else mask


def _library_name(cell: str, command: list[str]) -> str:
  """Return the name of the compiled library, with a digest of its origins."""
  compiler = subprocess.run(
    [command[0], '--version'], capture_output=True, text=True, check=True
  )
  source = _source(cell)
  headers = sorted(FOLDER.glob('*.h'))
  # Everything that the binary depends on: a stale library would give wrong numbers.
  origins = [
    source.read_text(),
    *(header.read_text() for header in headers),
    compiler.stdout,
    version('jaxlib'),
    *command,
  ]
  digest = hashlib.sha256(repr(origins).encode()).hexdigest()[:32]
  return f'{source.stem}-{digest}'


def _compile(cell: str, command: list[str], library: Path) -> None:
  done = subprocess.run(
    [*command, '-o', str(library)], capture_output=True, text=True, check=False
  )
  if done.returncode != 0:
    problem = f'{command[0]} failed to compile {_source(cell).name}'
    raise RuntimeError(f'{problem}:\n{done.stdout}{done.stderr}')


def _find_compiler(platform: str) -> str:
  """Return the path of nvcc or g++."""
  if platform != 'CUDA':
    name = 'g++'
    places = 'on the PATH'
    found = shutil.which(name)
  else:
    name = 'nvcc'
    places = 'on the PATH or in $CUDA_HOME/bin'
    home = os.environ.get('CUDA_HOME')
    in_home = shutil.which(str(Path(home) / 'bin' / name)) if home else None
    found = shutil.which(name) or in_home
  if not found:
    raise RuntimeError(f'the kernels need {name}, which was not found {places}.')
  return found


def _source(cell: str) -> Path:
  return FOLDER / f'{cell.lower()}.cu'
