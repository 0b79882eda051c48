"""CPU kernels that run a whole window, compiled at first use and called by `jax.ffi`.

The source `own` has those that carry credit across windows.

The sources are C++17 with the vector extensions of GCC and Clang. A library is compiled
for the processor at hand, and kept for later processes, see
:mod:`fptt_jax.nn.kernels._libraries`.

Calls share the threads of XLA's pool. `$FPTT_JAX_NUM_THREADS` limits their number; the
default is the number of processors that the process may use. The number of threads does
not change results, but another processor may round differently.
"""

import ctypes
import functools
import hashlib
from importlib.metadata import version
import os
from pathlib import Path
import shutil
import subprocess
import sys
import threading
import warnings

import jax

from fptt_jax._checks import require
from fptt_jax._cores import count_cores
from fptt_jax.nn.kernels._libraries import load_library

THREADS_VARIABLE = 'FPTT_JAX_NUM_THREADS'
FOLDER = Path(__file__).parent
COMPILERS = ('g++', 'clang++')
FUNCTIONS = {'own': ('lstm', 'gru', 'elman', 'credit')}
"""Functions of a source that is not a cell's, which has 'forward' and 'backward'."""

_first_use = threading.RLock()
"""Held at the first use of a kernel: JAX takes each name once."""


def target(cell: str, products: str, function: str) -> str:
  """Return the name by which JAX knows the kernel of a cell."""
  return f'fptt_jax_cpu_{cell}_{products}_{function}'


def find_problem(cell: str, products: str) -> str | None:
  """Compile and register a cell's kernels, once per process.

  Args:
    cell: the name of a source file, such as 'lstm'.
    products: 'float32' or 'bfloat16', to which operands of products are rounded.

  Returns:
    None, or why the kernels cannot be used.

  Raises:
    ValueError: the environment variable of the threads is not a number of threads.
  """
  with _first_use:
    return _register(cell, products)


@functools.cache
def _register(cell: str, products: str) -> str | None:
  """Do what `find_problem` says, once per process."""
  num_threads = count_threads()
  try:
    library = _load(cell, products)
  except (OSError, RuntimeError) as error:
    return str(error)
  library.set_thread_limit(num_threads)
  for function in FUNCTIONS.get(cell, ('forward', 'backward')):
    capsule = jax.ffi.pycapsule(getattr(library, f'{cell}_{function}'))
    name = target(cell, products, function)
    jax.ffi.register_ffi_target(name, capsule, platform='cpu')
  return None


def count_threads() -> int:
  """Return how many threads the kernels of this process may use together.

  Raises:
    ValueError: the environment variable is not a whole number of at least 1.
  """
  wanted = os.environ.get(THREADS_VARIABLE)
  if wanted is None:
    return count_cores()
  fits = wanted.isdecimal() and int(wanted) >= 1
  require(fits, THREADS_VARIABLE, 'an integer >= 1', wanted)
  return int(wanted)


def compile_command(cell: str, products: str) -> list[str]:
  """Return the command that compiles a cell's kernels, without `-o`.

  Args:
    cell: the name of a source file.
    products: 'float32' or 'bfloat16'.

  Raises:
    RuntimeError: there is no compiler on the PATH.
  """
  compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
  if compiler is None or sys.platform == 'win32':
    raise RuntimeError(
      f'the kernels need {" or ".join(COMPILERS)} on the PATH of Linux or macOS'
    )
  options = ['-std=c++17', '-O3', '-march=native', '-ffp-contract=fast', '-fPIC']
  if products == 'bfloat16':
    options.append('-DFPTT_BFLOAT16')
  headers = ['-I', str(FOLDER), '-isystem', jax.ffi.include_dir()]
  return [compiler, *options, '-shared', *headers, str(FOLDER / f'{cell}.cc')]


def _load(cell: str, products: str) -> ctypes.CDLL:
  """Load a cell's library from the cache; compile it where it is absent.

  Raises:
    OSError: the library cannot be written or loaded.
    RuntimeError: there is no compiler, or it fails, or the processor has too narrow
      vectors or no such products.
  """
  command = compile_command(cell, products)
  macros = _read_macros(command)
  # With narrower vectors XLA's own programs are faster.
  if not any(name in macros for name in ('__AVX2__', '__aarch64__')):
    raise RuntimeError('the processor has neither AVX2 nor the vectors of 64-bit Arm')
  if products == 'bfloat16' and '__AVX512BF16__' not in macros:
    raise RuntimeError('the processor has no products of bfloat16 (AVX-512 BF16)')
  if products == 'bfloat16' and '__AMX_BF16__' in macros:
    if _request_tiles():
      command.insert(1, '-DFPTT_TILES')
    else:
      warnings.warn(
        "products='bfloat16' is slower than 'float32' here: the system does not grant "
        'the tile registers of AMX to this process.',
        stacklevel=2,
      )
  name = f'{cell}-{_digest(command, macros)}'
  return load_library(name, functools.partial(_compile, command))


def _request_tiles() -> bool:
  """Ask Linux for the tile registers of AMX, and return whether it grants them.

  They are large, so the system saves them only for processes that have asked. The
  request holds for the whole process, which may repeat it.
  """
  if sys.platform != 'linux':
    return False
  arguments = (158, 0x1023, 18)  # arch_prctl, ARCH_REQ_XCOMP_PERM and XTILEDATA.
  try:
    # The C library has no function for this call.
    return int(ctypes.CDLL(None).syscall(*map(ctypes.c_long, arguments))) == 0
  except (OSError, AttributeError):
    return False


def _read_macros(command: list[str]) -> str:
  """Return the macros that the compiler defines.

  They tell its version and the instructions of the processor.

  Raises:
    RuntimeError: the compiler fails.
  """
  return _run([*command[:-1], '-x', 'c++', '-dM', '-E', os.devnull])


def _run(command: list[str]) -> str:
  """Run a compiler and return its output.

  Raises:
    RuntimeError: it fails.
  """
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode != 0:
    raise RuntimeError(f'{command[0]} failed:\n{done.stdout}{done.stderr}')
  return done.stdout


def _digest(command: list[str], macros: str) -> str:
  """Return a digest of all that a library depends on.

  Folders are left out, so that environments with the same sources, compiler and jaxlib
  share a library. The version of jaxlib stands for the interface `jax.ffi`.
  """
  sources = [path.read_text() for path in sorted(FOLDER.glob('*.h'))]
  sources.append(Path(command[-1]).read_text())
  options = [word for word in command[1:] if not Path(word).is_absolute()]
  origins = [*sources, macros, version('jaxlib'), Path(command[0]).name, *options]
  return hashlib.sha256(repr(origins).encode()).hexdigest()[:32]


def _compile(command: list[str], library: Path) -> None:
  """Compile a library to a path.

  Raises:
    RuntimeError: the compiler fails.
  """
  _run([*command, '-o', str(library)])
