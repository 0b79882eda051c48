"""CUDA kernels that run a whole window, built by the machine's own nvcc when first needed and called through `jax.ffi`.

None has run on a GPU yet: they are compiled for one, and compared with the scans in emulation on the CPU. So no layer takes one
unless told to. They sum in full float32, whatever the precision of JAX's own products. H = 128 takes up to 136 KiB of shared
memory a block: an A100, an H100, or what came after them in data centres.
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

from fptt_jax.nn.fused import Window

LSTM_SIZES = (32, 64, 128)
SOURCE = Path(__file__).parent / 'lstm.cu'
SOURCES = (SOURCE, SOURCE.with_name('platform.h'))
TARGETS = ('lstm_forward', 'lstm_backward')
NUM_FACTORS = 6
_built: set[str] = set()


def available() -> bool:
  """Whether there are an NVIDIA GPU and the compiler that the kernels need."""
  try:
    return bool(jax.devices('cuda') and compile_command('CUDA'))
  except RuntimeError:
    return False


def build(platform: str) -> None:
  """Makes the kernels known to JAX, once a process; the library is kept for later ones in `$XDG_CACHE_HOME/fptt_jax`.

  Args:
    platform: 'CUDA', or 'cpu' for an emulation, much slower than any scan, that tests run.

  Raises:
    RuntimeError: there is no compiler or no GPU, or the compiler fails.
  """
  if platform in _built:
    return
  command = compile_command(platform)
  version = subprocess.run([command[0], '--version'], capture_output=True, text=True, check=True).stdout
  made_of = [*(source.read_text() for source in SOURCES), version, jax.__version__, *command]
  folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'fptt_jax'
  library = folder / f'lstm-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}.so'
  if not library.exists():
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:  # Moved there whole, as others may be at it too.
      made = Path(own) / library.name
      done = subprocess.run([*command, '-o', str(made)], capture_output=True, text=True, check=False)
      if done.returncode != 0:
        raise RuntimeError(f'{command[0]} failed to compile {SOURCE.name}:\n{done.stdout}{done.stderr}')
      made.replace(library)
  handlers = ctypes.CDLL(str(library))
  for target in TARGETS:
    jax.ffi.register_ffi_target(f'fptt_jax_{target}', jax.ffi.pycapsule(getattr(handlers, target)), platform=platform)
  _built.add(platform)


def compile_command(platform: str, architecture: str | None = None) -> list[str]:
  """What compiles the kernels to a library, but for `-o`; `architecture` is that of the first GPU, if not given ('sm_90')."""
  if platform == 'CUDA':
    if architecture is None:
      architecture = 'sm_' + jax.devices('cuda')[0].compute_capability.replace('.', '')
    command = [_compiler('nvcc', os.environ.get('CUDA_HOME')), f'-arch={architecture}', '-O3', '-Xcompiler', '-fPIC']
  else:
    command = [_compiler('g++'), '-O2', '-fPIC', '-x', 'c++']
  return [*command, '-std=c++17', '-shared', f'-I{jax.ffi.include_dir()}', str(SOURCE)]


def _compiler(name: str, home: str | None = None) -> str:
  found = shutil.which(name) or (home and shutil.which(str(Path(home) / 'bin' / name)))
  if not found:
    where = 'on the PATH or in $CUDA_HOME/bin' if name == 'nvcc' else 'on the PATH'
    raise RuntimeError(f'the kernels need {name} to be compiled, and it was not found {where}.')
  return found


def check_lstm(hidden_features: int, dtype: jax.typing.DTypeLike) -> None:
  """Raises what is wrong if the LSTM's kernel does not serve this size (ValueError) or dtype (TypeError)."""
  if hidden_features not in LSTM_SIZES:
    raise ValueError(f"the LSTM's kernel expected hidden_features to be one of {list(LSTM_SIZES)}, got {hidden_features}.")
  if jnp.dtype(dtype) != jnp.float32:
    raise TypeError(f"the LSTM's kernel expected float32, got {jnp.dtype(dtype).name}.")


def _call(target: str, shapes: list[tuple[int, ...]], *operands: jax.Array) -> list[jax.Array]:
  backend = jax.default_backend()
  if backend == 'gpu':
    build('CUDA')
  elif backend not in _built:
    raise RuntimeError(f"fused='kernel' runs on NVIDIA GPUs, got the default backend {backend!r}; fused=True runs everywhere.")
  results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return list(jax.ffi.ffi_call(f'fptt_jax_{target}', results, vmap_method='broadcast_all')(*operands))


def _mask(mask: jax.Array | None, like: jax.Array) -> jax.Array:
  return jnp.ones(like.shape[:2], bool) if mask is None else mask


def _lstm_forward(weights: Any, state: Any, drive: jax.Array, mask: jax.Array | None) -> tuple[Any, tuple[Any, Any]]:
  operands = {'drive': drive, 'w_h': weights[1], 'h': state.h, 'c': state.c, 'mask': _mask(mask, drive)}
  (steps, batch, width), size = drive.shape, drive.shape[-1] // 4
  shapes = {'drive': (steps, batch, width), 'w_h': (size, width), 'h': (batch, size), 'c': (batch, size), 'mask': (steps, batch)}
  for name, operand in operands.items():  # A kernel reads what it believes to be there.
    if operand.shape != shapes[name] or 0 in operand.shape:
      raise ValueError(f"the LSTM's kernel expected {name} of shape {shapes[name]} and not empty, got {operand.shape}.")
    if name != 'mask':
      check_lstm(size, operand.dtype)
  of_steps, of_state = (steps, batch, size), (batch, size)
  y, h, c, *factors = _call('lstm_forward', [of_steps, of_state, of_state, *NUM_FACTORS * [of_steps]], *operands.values())
  return type(state)(h, c), (y, tuple(factors))


def _lstm_backward(weights: Any, factors: Any, dy: jax.Array, mask: jax.Array | None, d_state: Any) -> tuple[Any, jax.Array]:
  steps, batch, size = dy.shape
  shapes = [(steps, batch, 4 * size), (batch, size), (batch, size)]
  dz, dh, dc = _call('lstm_backward', shapes, *factors, dy, *d_state, weights[1], _mask(mask, dy))
  return type(d_state)(dh, dc), dz


LSTM_WINDOW = Window(_lstm_forward, _lstm_backward)
"""All steps of :data:`fptt_jax.nn.fused.LSTM_CELL`, float32, H one of :data:`LSTM_SIZES`."""
