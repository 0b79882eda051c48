"""Functions to read and write JSON and text, with one-line errors."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import json
import os
from pathlib import Path
import textwrap
from typing import IO, Any, Literal
import zipfile
import zlib

import numpy as np

from experiments.core.flags import UserError


def first_line(error: Exception) -> str:
  """Return the first line of an exception's message, or its type."""
  # Messages of orbax and tensorstore hold whole tracebacks or lists of arrays.
  line = next(iter(str(error).splitlines()), type(error).__name__)
  return textwrap.shorten(line, 300, placeholder=' ...').rstrip('.')


def read_jsonl(path: Path) -> list[dict[str, Any]]:
  """Read the complete lines of a metrics file.

  A last line without a line break, cut off by a kill, is left out.

  Args:
    path: the file; a missing file has no lines.

  Returns:
    A row per line.

  Raises:
    UserError: the file cannot be read, or a line is not a row of metrics.
  """
  if not exists(path):
    return []
  rows = []
  for number, line in enumerate(_read_bytes(path).splitlines(keepends=True), start=1):
    # The restored checkpoint does not count a cut line, so nothing is lost.
    if line.endswith(b'\n'):
      rows.append(_parsed(line, f'line {number} of {path}', ('step',)))
  return rows


def read_json(path: Path, names: Sequence[str] = ()) -> dict[str, Any]:
  """Read a JSON file that holds an object.

  Args:
    path: the file.
    names: keys that the object must have.

  Returns:
    The object.

  Raises:
    UserError: the file cannot be read, or holds something else.
  """
  return _parsed(_read_bytes(path), str(path), names)


NPZ_ERRORS = (
  OSError,
  EOFError,
  ValueError,
  LookupError,
  NotImplementedError,
  zipfile.BadZipFile,
  zlib.error,
)
"""Errors that NumPy and zipfile raise for a missing or damaged .npz file.

zipfile raises NotImplementedError where damage has changed the compression method.
"""


def read_npz(path: Path) -> dict[str, np.ndarray]:
  """Read all arrays of a .npz file.

  Raises:
    NPZ_ERRORS: the file is missing or damaged.
  """
  with path.open('rb') as raw, np.load(raw) as file:
    return {name: file[name] for name in file.files}


def exists(path: Path) -> bool:
  """Return whether a file exists.

  Raises:
    UserError: the folder of the file cannot be read.
  """
  # Unreadable must not count as missing: the run would silently start anew.
  try:
    return path.exists()
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}.') from error


def _read_bytes(path: Path) -> bytes:
  """Read a file, or raise a UserError with its path."""
  try:
    return path.read_bytes()
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}.') from error


def read_rows(path: Path) -> list[dict[str, Any]]:
  """Read a JSON file that holds a list of objects.

  Args:
    path: the file.

  Returns:
    The objects.

  Raises:
    UserError: the file cannot be read, or holds something else.
  """
  content = _decode_json(_read_bytes(path), str(path))
  if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
    raise damaged_file(
      str(path), f'it holds {json.dumps(content)[:40]}, not a list of objects'
    )
  return content


def computed_rows(
  path: Path, compute: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
  """Return the rows of a JSON file, which are computed and written if there is none.

  So a command that was stopped resumes with the first file that is missing.

  Args:
    path: the file.
    compute: returns the rows.

  Raises:
    UserError: the file cannot be read or written, or holds something else.
  """
  if not exists(path):
    write_json(path, compute())
  return read_rows(path)


def _parsed(text: bytes, which: str, names: Sequence[str]) -> dict[str, Any]:
  """Parse a JSON object with the given keys; `which` names it in errors."""
  content = _decode_json(text, which)
  if not isinstance(content, dict):
    raise damaged_file(which, f'it holds {json.dumps(content)[:40]}, not an object')
  missing = [name for name in names if name not in content]
  if missing:
    raise damaged_file(which, f'it has no "{missing[0]}"')
  return content


def _decode_json(text: bytes, which: str) -> Any:
  """Parse JSON in UTF-8; `which` names it in errors."""
  try:
    return json.loads(text.decode())
  # Damaged files also hold bytes outside UTF-8 or thousands of open brackets.
  except (ValueError, RecursionError) as error:
    raise damaged_file(which, str(error)) from error


def damaged_file(which: str, reason: str) -> UserError:
  """Return the error for a file, or a line of one, with unexpected contents."""
  return UserError(
    f'{which} is damaged: {reason}. Put it back, or choose another --workdir.'
  )


def write_json(path: Path, content: Any) -> None:
  """Write a value as indented JSON, completely or not at all.

  Raises:
    UserError: the file cannot be written.
  """
  write_text(path, json.dumps(content, indent=2) + '\n')


def write_text(path: Path, text: str) -> None:
  """Write a text file, completely or not at all.

  Raises:
    UserError: the file cannot be written.
  """
  with user_errors(path), atomic_write(path) as file:
    file.write(text)


@contextlib.contextmanager
def user_errors(path: Path) -> Iterator[None]:
  """Turn errors of writing a file into a one-line UserError."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write {path}: {error}. The same command resumes from what is saved.'
    ) from error


@contextlib.contextmanager
def atomic_write(path: Path, mode: Literal['w', 'wb'] = 'w') -> Iterator[IO[Any]]:
  """Open a file that replaces `path` when the context ends without an error.

  Args:
    path: the file to replace or to create.
    mode: 'w' for text in UTF-8, 'wb' for bytes.

  Yields:
    The open file.
  """
  # In the same folder, because a rename is atomic within one file system only. Other
  # commands that share the folder write files of their own.
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  with temporary.open(mode, encoding='utf-8' if mode == 'w' else None) as file:
    yield file
  temporary.replace(path)
