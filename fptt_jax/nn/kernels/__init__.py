"""CUDA kernels that run a whole window, built by the machine's own nvcc when first
needed and called through `jax.ffi`.

None has run on a GPU yet: they are compiled for one, and compared with the scans in
emulation on the CPU. So no layer takes one unless told to. They sum in full float32,
whatever the precision of JAX's own products. At H = 128 a block of the LSTM's takes up
to 128 KiB of shared memory, which an A100, an H100, or what came after them in data
centres have; the GRU's 30 KiB.
"""

import ctypes
import hashlib
import os
from pathlib import Path
import shutil
import subprocess
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from fptt_jax.nn.fused import WindowKernel

NUM_GATES = {'LSTM': 4, 'GRU': 3}
NUM_FACTORS = {'LSTM': 6, 'GRU': 5}
SIZES = (32, 64, 128)
FOLDER = Path(__file__).parent
_built: set[tuple[str, str]] = set()


def available() -> bool:
  """Whether there are an NVIDIA GPU and the compiler that the kernels need."""
  try:
    return bool(jax.devices('cuda') and _compiler('CUDA'))
  except RuntimeError:
    return False


def build(cell: str, platform: str) -> None:
  """Makes a cell's kernels known to JAX, once a process; the library is kept for later
  ones in `$XDG_CACHE_HOME/fptt_jax`.

  Args:
    cell: 'LSTM' or 'GRU'.
    platform: 'CUDA', or 'cpu' for an emulation, much slower than any scan, that tests
      run.

  Raises:
    RuntimeError: there is no compiler or no GPU, or the compiler fails.
  """
  if (cell, platform) in _built:
    return
  command = compile_command(cell, platform)
  version = subprocess.run(
    [command[0], '--version'], capture_output=True, text=True, check=True
  ).stdout
  source = _source(cell)
  made_of = [
    source.read_text(),
    *(header.read_text() for header in sorted(FOLDER.glob('*.h'))),
    version,
    jax.__version__,
    *command,
  ]
  folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'fptt_jax'
  library = (
    folder
    / f'{source.stem}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}.so'
  )
  if not library.exists():
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      dir=folder
    ) as own:  # Moved there whole, as others may be at it too.
      made = Path(own) / library.name
      done = subprocess.run(
        [*command, '-o', str(made)], capture_output=True, text=True, check=False
      )
      if done.returncode != 0:
        raise RuntimeError(
          f'{command[0]} failed to compile {source.name}:\n{done.stdout}{done.stderr}'
        )
      made.replace(library)
  handlers = ctypes.CDLL(str(library))
  for direction in ('forward', 'backward'):
    target = f'{source.stem}_{direction}'
    jax.ffi.register_ffi_target(
      f'fptt_jax_{target}',
      jax.ffi.pycapsule(getattr(handlers, target)),
      platform=platform,
    )
  _built.add((cell, platform))


def compile_command(
  cell: str, platform: str, architecture: str | None = None
) -> list[str]:
  """What compiles a cell's kernels to a library, but for `-o`; `architecture` is the
  first GPU's, if not given ('sm_90').
  """
  if platform == 'CUDA':
    if architecture is None:
      architecture = 'sm_' + jax.devices('cuda')[0].compute_capability.replace('.', '')
    options = [f'-arch={architecture}', '-O3', '-Xcompiler', '-fPIC']
  else:
    options = ['-O2', '-fPIC', '-x', 'c++']
  return [
    _compiler(platform),
    *options,
    '-std=c++17',
    '-shared',
    f'-I{jax.ffi.include_dir()}',
    str(_source(cell)),
  ]


def _compiler(platform: str) -> str:
  name, home = (
    ('nvcc', os.environ.get('CUDA_HOME')) if platform == 'CUDA' else ('g++', None)
  )
  found = shutil.which(name) or (home and shutil.which(str(Path(home) / 'bin' / name)))
  if not found:
    where = 'on the PATH or in $CUDA_HOME/bin' if name == 'nvcc' else 'on the PATH'
    raise RuntimeError(
      f'the kernels need {name} to be compiled, and it was not found {where}.'
    )
  return found


def _source(cell: str) -> Path:
  return FOLDER / f'{cell.lower()}.cu'


def check_kernel(cell: str, hidden_features: int, dtype: jax.typing.DTypeLike) -> None:
  """Raises what is wrong if a cell's kernel does not serve this size (ValueError) or
  dtype (TypeError).
  """
  if hidden_features not in SIZES:
    raise ValueError(
      f"the {cell}'s kernel expected hidden_features to be one of {list(SIZES)}, got "
      f'{hidden_features}.'
    )
  if jnp.dtype(dtype) != jnp.float32:
    raise TypeError(
      f"the {cell}'s kernel expected float32, got {jnp.dtype(dtype).name}."
    )


def _call(
  cell: str, direction: str, shapes: list[tuple[int, ...]], *operands: jax.Array
) -> list[jax.Array]:
  backend = jax.default_backend()
  if backend == 'gpu':
    build(cell, 'CUDA')
  elif (cell, backend) not in _built:
    raise RuntimeError(
      f"fused='kernel' runs on NVIDIA GPUs, got the default backend {backend!r}; "
      'fused=True runs everywhere.'
    )
  results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return list(
    jax.ffi.ffi_call(
      f'fptt_jax_{cell.lower()}_{direction}', results, vmap_method='broadcast_all'
    )(*operands)
  )


def _mask(mask: jax.Array | None, like: jax.Array) -> jax.Array:
  return jnp.ones(like.shape[:2], bool) if mask is None else mask


def _forward(
  cell: str,
  drive: jax.Array,
  weights: dict[str, jax.Array],
  state: dict[str, jax.Array],
  mask: jax.Array | None,
) -> tuple[list[jax.Array], tuple[jax.Array, tuple[jax.Array, ...]]]:
  """(parts of the state after the window, (y, factors)); the recurrent weights and
  parts of the state as the kernel names them.
  """
  (steps, batch, width), size = drive.shape, drive.shape[-1] // NUM_GATES[cell]
  of_steps, of_state = (steps, batch, size), (batch, size)
  operands = {'drive': drive, **weights, **state, 'mask': _mask(mask, drive)}
  shapes = {
    'drive': (steps, batch, width),
    'w_h': (size, width),
    'recurrent_bias': (width,),
    'mask': (steps, batch),
  }
  for name, operand in operands.items():  # A kernel reads what it believes to be there.
    shape = shapes.get(name, of_state)
    if operand.shape != shape or 0 in operand.shape:
      raise ValueError(
        f"the {cell}'s kernel expected {name} of shape {shape} and not empty, got "
        f'{operand.shape}.'
      )
    if name != 'mask':
      check_kernel(cell, size, operand.dtype)
  results = [of_steps, *len(state) * [of_state], *NUM_FACTORS[cell] * [of_steps]]
  y, *others = _call(cell, 'forward', results, *operands.values())
  return others[: len(state)], (y, tuple(others[len(state) :]))


def _lstm_forward(
  weights: Any, state: Any, drive: jax.Array, mask: jax.Array | None
) -> tuple[Any, tuple[Any, Any]]:
  end, outputs = _forward(
    'LSTM', drive, {'w_h': weights[1]}, {'h': state.h, 'c': state.c}, mask
  )
  return type(state)(*end), outputs


def _lstm_backward(
  weights: Any, factors: Any, dy: jax.Array, mask: jax.Array | None, d_state: Any
) -> tuple[Any, jax.Array]:
  steps, batch, size = dy.shape
  shapes = [(steps, batch, 4 * size), (batch, size), (batch, size)]
  dz, *before = _call(
    'LSTM', 'backward', shapes, *factors, dy, *d_state, weights[1].T, _mask(mask, dy)
  )
  return type(d_state)(*before), dz


def _gru_forward(
  weights: Any, h: jax.Array, drive: jax.Array, mask: jax.Array | None
) -> tuple[Any, tuple[Any, Any]]:
  (end,), outputs = _forward(
    'GRU', drive, {'w_h': weights[1], 'recurrent_bias': weights[3][0]}, {'h': h}, mask
  )
  return end, outputs


def _gru_backward(
  weights: Any, factors: Any, dy: jax.Array, mask: jax.Array | None, dh: jax.Array
) -> tuple[Any, Any]:
  steps, batch, size = dy.shape
  shapes = [(steps, batch, 3 * size), (steps, batch, 3 * size), (batch, size)]
  inputs, recurrent, dh = _call(
    'GRU', 'backward', shapes, *factors, dy, dh, weights[1].T, _mask(mask, dy)
  )
  return dh, (inputs, recurrent)


LSTM_WINDOW = WindowKernel(_lstm_forward, _lstm_backward)
"""All steps of :data:`fptt_jax.nn.fused.LSTM_CELL`, float32, H one of :data:`SIZES`."""
GRU_WINDOW = WindowKernel(_gru_forward, _gru_backward)
"""All steps of :data:`fptt_jax.nn.fused.GRU_CELL`, likewise."""
