"""Configurations as dataclasses, and the absl flags made from them: a setting is
declared in one place.
"""

from collections.abc import Callable
import dataclasses
import difflib
import io
import math
import os
from pathlib import Path
import re
import shlex
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging
import jax

from experiments.core import signals
import fptt_jax
from fptt_jax._checks import FLOAT32_MAX, FLOAT32_TINY, INT32_MAX, as_number

# The flags belong to the script that defines them, so that its --help shows them.
flags.disclaim_key_flags()


MACHINE_FLAGS = ('workdir', 'data_dir', 'coordinator', 'process_id')
"""Flags that say where a process runs, which means nothing on another machine."""


EXIT_SECONDS = 5.0
"""Seconds that what runs in the background is given when the process ends by an
error.
"""


MAX_RUNS = 10_000
"""So many seeds or combinations of a grid are no slip of the pen."""


class UserError(Exception):
  """Something the user can put right: printed as one line, without a traceback."""


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
  """A dataclass field that is also a flag. A tuple as default makes a comma-separated
  list.
  """
  return dataclasses.field(default=default, metadata={'help': text, 'choices': choices})


def dated_folder(config: Any) -> str:
  """A new folder for each start of a script."""
  return f'runs/{_script()}-{time.strftime("%Y%m%d-%H%M%S")}'


def run(
  main: Callable[[Any], None],
  config_class: Any,
  presets: dict[str, dict[str, Any]] | None = None,
  workdir: Callable[[Any], str] = dated_folder,
) -> None:
  """Defines a flag for each field of `config_class`, parses the command line, and calls
  `main` with the configuration.

  A run that a signal has stopped ends with the exit code of `experiments.stopping`, one
  that Ctrl-C has cut off with 130, one that cannot go on with 1; each says how to go
  on.

  Args:
    main: takes the configuration.
    config_class: a dataclass of :func:`option` fields.
    presets: by value of the flag 'task', other defaults of other flags; what the
      command line gives goes before them.
    workdir: (configuration) -> the folder where none is given.
  """
  _show_any_letter()
  fields = dataclasses.fields(config_class)
  for field in fields:
    _define(field)

  def parsed(argv: list[str]) -> None:
    fptt_jax.use_cpu_devices()
    if len(argv) > 1:
      raise SystemExit(f'error: {_stray(argv[1], config_class)} See --help.')
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(
        logging.FATAL
      )  # orbax prints tracebacks of errors that are raised as well
    try:
      settings = {
        field.name: _read(field, flags.FLAGS[field.name].value) for field in fields
      }
      if presets:
        preset = presets.get(settings['task'], {})
        settings |= {
          name: value for name, value in preset.items() if not flags.FLAGS[name].present
        }
      config = config_class(**settings)
    except ValueError as error:
      raise SystemExit(f'error: {error} See --help.') from error
    again = [sys.executable, '-m', f'experiments.{_script()}', *sys.argv[1:]]
    if 'workdir' in settings and not config.workdir:
      config = dataclasses.replace(config, workdir=workdir(config))
      again.append(f'--workdir={config.workdir}')
    try:
      main(config)
    except UserError as error:
      _leave(f'error: {error}', 1)
    except signals.Stopped as stopped:
      print_error(f'{stopped}; go on by\n  {shlex.join(again)}')
      raise SystemExit(signals.EXIT_CODE) from stopped
    except KeyboardInterrupt:
      _leave(
        f'cut off by Ctrl-C; what was saved is used again by\n  {shlex.join(again)}',
        130,
      )
    except Exception as error:
      if jax.process_count() == 1:
        raise
      if not isinstance(
        error, jax.errors.JaxRuntimeError
      ):  # Those come of others' ends.
        traceback.print_exc()
      _leave(
        f'error: {error}\nIf another process has ended, start all of them again; they go on by\n  {shlex.join(again)}',
        1,
      )

  app.run(parsed, flags_parser=lambda argv: _parse_flags(argv, config_class))


def _show_any_letter() -> None:
  """Escape letters that the terminal's encoding lacks, in place of failing at them."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def _parse_flags(argv: list[str], config_class: Any) -> list[str]:
  """Parse the command line.

  Args:
    argv: the command line, the program's name first.
    config_class: a dataclass of :func:`option` fields.

  Returns:
    The program's name and the words that are no flags.

  Raises:
    SystemExit: a flag is unknown, or its value is not one that it can have.
  """
  try:
    remaining: list[str] = flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    raise SystemExit(
      f'error: {_unknown_flag(error.flagname, config_class)} See --help.'
    ) from error
  except flags.Error as error:
    raise SystemExit(
      f'error: {_illegal_value(str(error), config_class)} See --help.'
    ) from error
  return remaining


def _unknown_flag(name: str, config_class: Any) -> str:
  """Say that there is no such flag, and which one is the nearest."""
  names = []
  for field in dataclasses.fields(config_class):
    names.append(field.name)
    if isinstance(field.default, bool):
      names.append(f'no{field.name}')
  inside = [known for known in names if name in known or known in name]
  described = [
    field.name
    for field in dataclasses.fields(config_class)
    if field.metadata['help'].startswith(name.replace('_', ' '))
  ]
  near = difflib.get_close_matches(name, names, 1) or inside[:1] or described[:1]
  near = near or difflib.get_close_matches(name, names, 1, cutoff=0.4)
  return f'there is no --{name}.' + (f' Did you mean --{near[0]}?' if near else '')


def _illegal_value(text: str, config_class: Any) -> str:
  """Say what a flag's value must be.

  Args:
    text: absl's message.
    config_class: a dataclass of :func:`option` fields, of which `COMPARABLE` names
      those that --grid takes.
  """
  match = re.fullmatch(r'flag --(\w+)=(.*?): .*', text, re.DOTALL)
  fields = {field.name: field for field in dataclasses.fields(config_class)}
  if match is None or match[1] not in fields:
    return text.splitlines()[0].rstrip('.') + '.'
  name, value = match.groups()
  field = fields[name]
  if field.metadata['choices']:
    expected = f'one of {", ".join(field.metadata["choices"])}'
  else:
    expected = {
      bool: 'true or false',
      int: 'an integer',
      float: 'a number',
      str: 'a text',
    }[_kind(field)]
  hint = ''
  values = [part for part in re.split(r'[,:;\s\[\]()]+', value) if part]
  if len(values) > 1:
    hint = ' It takes one value.'
    if name in getattr(config_class, 'COMPARABLE', ()):
      hint = f' To compare several values, give --grid={name}={":".join(values)}.'
  return f'--{name} must be {expected}, got {value!r}.{hint}'


def _stray(word: str, config_class: Any) -> str:
  """Say that a word of the command line belongs to no flag, and what was meant."""
  fields = {field.name: field for field in dataclasses.fields(config_class)}
  before = sys.argv[sys.argv.index(word) - 1] if word in sys.argv[1:] else ''
  name = before.lstrip('-').partition('=')[0]
  if word.partition('=')[0] in fields:
    hint = f'Did you mean --{word}?'
  elif name in fields and isinstance(fields[name].default, bool):
    hint = f'Did you mean --{name}={word}, or --no{name}?'
  else:
    hint = 'Settings are --NAME=VALUE; several values are separated by commas, without blanks.'
  shown = word if len(word) <= 60 else f'{word[:60]}...'
  return f'{shown!r} belongs to no flag. {hint}'


def _script() -> str:
  """The script's name: `python -m experiments.NAME` runs it again."""
  path = Path(sys.argv[0])
  return path.parent.name if path.stem == '__main__' else path.stem


def command() -> str | None:
  """The command that started this process, without the places of its machine.

  Returns:
    The command as a shell reads it; None where no script of this package was started.
  """
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  name = spec.name.removesuffix('.__main__') if spec else ''
  if not name.startswith('experiments.'):
    return None
  kept: list[str] = []
  is_value = False
  for argument in sys.argv[1:]:
    flag, equals, _ = argument.lstrip('-').partition('=')
    is_place = argument.startswith('-') and flag in MACHINE_FLAGS
    if not is_place and not is_value:
      kept.append(argument)
    is_value = is_place and not equals
  return shlex.join(['python', '-m', name, *kept])


def _leave(text: str, code: int) -> NoReturn:
  """End this process with a last word, whatever waits in the background.

  An orderly end of one of several processes waits for the others, and after a
  checkpoint that could not be written orbax's threads wait for minutes.

  Args:
    text: what to say.
    code: the exit code.
  """
  print_error(text)
  deadline = time.monotonic() + EXIT_SECONDS
  others = [
    thread for thread in threading.enumerate() if thread is not threading.main_thread()
  ]
  for thread in others:
    if not thread.daemon and jax.process_count() == 1:
      thread.join(max(0.0, deadline - time.monotonic()))
  if jax.process_count() > 1 or any(
    thread.is_alive() and not thread.daemon for thread in others
  ):
    sys.stdout.flush()
    os._exit(code)
  raise SystemExit(code)


def print_error(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _define(field: Any) -> None:
  text, choices, default = (
    field.metadata['help'],
    field.metadata['choices'],
    field.default,
  )
  if isinstance(default, tuple):
    flags.DEFINE_list(field.name, [str(value) for value in default], text)
  elif choices:
    flags.DEFINE_enum(field.name, default, list(choices), text)
  else:
    define = {
      bool: flags.DEFINE_bool,
      int: flags.DEFINE_integer,
      float: flags.DEFINE_float,
      str: flags.DEFINE_string,
    }
    define[_kind(field)](field.name, default, text)


def _kind(field: Any) -> type:
  """The type of a flag that is no list."""
  if field.default is not None:
    return type(field.default)
  return next(kind for kind in (int, float, str) if kind.__name__ in str(field.type))


def _read(field: Any, value: Any) -> Any:
  """A list flag's strings as a tuple of the default's type; '0:3' stands for 0, 1,
  2.
  """
  if not isinstance(field.default, tuple):
    return value
  if 'int' not in str(field.type):
    return tuple(value)
  items: list[int] = []
  for text in value:
    parts = [part.strip() for part in text.split(':')]
    are_integers = len(parts) <= 2 and all(
      part.isdecimal() and len(part) <= len(str(INT32_MAX)) for part in parts
    )
    numbers = [int(part) for part in parts] if are_integers else []
    found = range(*numbers) if len(numbers) == 2 else numbers
    check(len(found) > 0, field.name, text, 'integers, or a range such as 0:3')
    check(len(found) <= MAX_RUNS, field.name, text, f'at most {MAX_RUNS} numbers')
    items.extend(found)
  return tuple(items)


def check_fields(config: Any) -> None:
  """Raises unless each setting is what its flag can be: of its type, one of its
  choices, and a number that 32 bits hold.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(field.default, tuple):
      kind = int if 'int' in str(field.type) else str
      check(isinstance(value, tuple), field.name, value, 'a tuple')
      for item in value:
        _check_field(field, kind, item)
    elif value is not None or 'None' not in str(field.type):
      _check_field(field, _kind(field), value)


def _check_field(field: Any, kind: type, value: Any) -> None:
  choices = field.metadata['choices']
  if choices:
    check(
      isinstance(value, str) and value in choices,
      field.name,
      value,
      f'one of {", ".join(choices)}',
    )
  elif kind is int:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    check(
      is_integer and abs(value) <= INT32_MAX,
      field.name,
      value,
      f'an integer of at most {INT32_MAX}',
    )
  elif kind is float:
    number = as_number(value)
    held = number is not None and (
      number == 0
      or not math.isfinite(number)
      or FLOAT32_TINY <= abs(number) <= FLOAT32_MAX
    )
    check(held, field.name, value, 'a number that float32 holds')
  else:
    check(
      isinstance(value, kind),
      field.name,
      value,
      {bool: 'true or false', str: 'a text'}[kind],
    )


def check(condition: bool, name: str, got: Any, expected: str) -> None:
  """Raises the ValueError that a flag with a value of no meaning deserves."""
  if not condition:
    raise ValueError(f'--{name} must be {expected}, got {got!r}.')


def checked(function: Callable[..., Any], *args: Any) -> Any:
  """`function(*args)`, its ValueError turned into one line for the user: for checks
  that need the data.
  """
  try:
    return function(*args)
  except ValueError as error:
    raise UserError(str(error)) from error
