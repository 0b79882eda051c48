"""Reading and writing of JSON and text; damaged files give one-line errors."""

from collections.abc import Iterator, Sequence
import contextlib
import json
from pathlib import Path
import textwrap
from typing import IO, Any, Literal

from experiments.core.flags import UserError


def first_line(error: Exception) -> str:
  """The first line of what an exception says, or what it is."""
  line = next(iter(str(error).splitlines()), type(error).__name__)
  return textwrap.shorten(line, 300, placeholder=' ...').rstrip('.')


def read_jsonl(path: Path) -> list[dict[str, Any]]:
  """Read the whole lines of a metrics file; a last line cut off by a kill is left out.

  Args:
    path: the file; one that is not there has no lines.

  Returns:
    A row per line.

  Raises:
    UserError: the file cannot be read, or a line is not a row of metrics.
  """
  if not exists(path):
    return []
  rows = []
  for number, line in enumerate(_read_bytes(path).splitlines(keepends=True), start=1):
    if line.endswith(b'\n'):
      rows.append(_parsed(line, f'line {number} of {path}', ('step',)))
  return rows


def read_json(path: Path, names: Sequence[str] = ()) -> dict[str, Any]:
  """Read a JSON file that holds an object.

  Args:
    path: the file.
    names: what the object must have.

  Returns:
    The object.

  Raises:
    UserError: the file cannot be read, or holds something else.
  """
  return _parsed(_read_bytes(path), str(path), names)


def exists(path: Path) -> bool:
  """Return whether a file is there.

  Raises:
    UserError: the folder that it would be in cannot be read.
  """
  try:
    return path.exists()
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}.') from error


def _read_bytes(path: Path) -> bytes:
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


def _parsed(text: bytes, which: str, names: Sequence[str]) -> dict[str, Any]:
  content = _decode_json(text, which)
  if not isinstance(content, dict):
    raise damaged_file(which, f'it holds {json.dumps(content)[:40]}, not an object')
  missing = [name for name in names if name not in content]
  if missing:
    raise damaged_file(which, f'it has no "{missing[0]}"')
  return content


def _decode_json(text: bytes, which: str) -> Any:
  try:
    return json.loads(text.decode())
  except (ValueError, RecursionError) as error:
    raise damaged_file(which, str(error)) from error


def damaged_file(which: str, reason: str) -> UserError:
  return UserError(
    f'{which} is damaged: {reason}. Put it back, or choose another --workdir.'
  )


def write_json(path: Path, content: Any) -> None:
  """As :func:`write_text`, as JSON."""
  write_text(path, json.dumps(content, indent=2) + '\n')


def write_text(path: Path, text: str) -> None:
  """Writes it whole or not at all.

  Raises:
    UserError: it cannot be written.
  """
  with user_errors(path), atomic_write(path) as file:
    file.write(text)


@contextlib.contextmanager
def user_errors(path: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write {path}: {error}. The same command goes on from what is saved.'
    ) from error


@contextlib.contextmanager
def atomic_write(path: Path, mode: Literal['w', 'wb'] = 'w') -> Iterator[IO[Any]]:
  """Open a file, of text or bytes, that takes the place of `path` when it is
  complete.
  """
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open(mode, encoding='utf-8' if mode == 'w' else None) as file:
    yield file
  temporary.replace(path)
