"""Compiled libraries, kept for later processes in a folder of the user alone.

It is `$FPTT_JAX_CACHE_DIR`, else `fptt_jax` in `$XDG_CACHE_HOME` or `~/.cache`.
"""

from collections.abc import Callable
import contextlib
import ctypes
import os
from pathlib import Path
import stat
import tempfile

CACHE_VARIABLE = 'FPTT_JAX_CACHE_DIR'


def load_library(name: str, compile_to: Callable[[Path], None]) -> ctypes.CDLL:
  """Load a library from the cache; compile it where it is absent or damaged.

  Where there is no such folder, or it does not take the library, each process compiles
  for itself.

  Args:
    name: the name of the file without its ending, which tells all that the library
      depends on.
    compile_to: compiles the library to a path.

  Raises:
    OSError: the library cannot be written or loaded anywhere.
    RuntimeError: there is no compiler, or it fails.
  """
  folder = _private_folder()
  if folder is not None:
    # The disk may be full, or forbid to run what lies on it.
    with contextlib.suppress(OSError):
      return _load_kept(folder / f'{name}.so', compile_to)
  with tempfile.TemporaryDirectory() as temporary:
    library = Path(temporary) / f'{name}.so'
    compile_to(library)
    # What is loaded stays when the file is gone.
    return ctypes.CDLL(str(library))


def _load_kept(library: Path, compile_to: Callable[[Path], None]) -> ctypes.CDLL:
  """Load a library of the cache, compiled anew if it cannot be loaded.

  Raises:
    OSError: the folder does not take it.
    RuntimeError: as in `load_library`.
  """
  if _is_private(library):
    with contextlib.suppress(OSError):
      return ctypes.CDLL(str(library))
  if not os.access(library.parent, os.W_OK):
    raise PermissionError(f'{library.parent} cannot be written')
  # Other processes may compile the same library: each moves a whole file into place,
  # and the last one that ends wins.
  with tempfile.TemporaryDirectory(dir=library.parent) as folder:
    output = Path(folder) / library.name
    compile_to(output)
    output.chmod(0o700)
    output.replace(library)
  return ctypes.CDLL(str(library))


def _private_folder() -> Path | None:
  """Return the folder of compiled libraries, or None if others may write it."""
  try:
    base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    # Without a folder in its name, a library is searched for elsewhere.
    folder = Path(os.environ.get(CACHE_VARIABLE) or base / 'fptt_jax').resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # There is no home.
    return None
  return folder if _is_private(folder) else None


def _is_private(path: Path) -> bool:
  """Return whether a path exists and only this user may write it.

  A library runs with the rights of the process, so another user must not supply it.
  """
  try:
    status = path.stat()
  except OSError:
    return False
  others = stat.S_IWGRP | stat.S_IWOTH
  return status.st_uid == os.getuid() and not status.st_mode & others
