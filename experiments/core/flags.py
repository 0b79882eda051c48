"""Configurations as dataclasses, and the absl flags made from them: a setting is
declared in one place.
"""

from collections.abc import Callable, Iterable
import dataclasses
import difflib
import io
import math
import os
from pathlib import Path
import re
import shlex
import sys
import textwrap
import threading
import time
import traceback
from typing import Any, NamedTuple, NoReturn

from absl import app, flags, logging
import jax
import numpy as np

from experiments.core import signals
import fptt_jax

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


INT32_MAX = 2**31 - 1
HELP_FLAGS = ('--help', '-help', '-h', '--helpshort', '--helpfull')
"""Words on the command line that print the help text."""


class UserError(Exception):
  """Something the user can put right: printed as one line, without a traceback."""


GROUPS = ('task', 'model', 'optimizer', 'training', 'run', 'devices', 'settings')
"""Groups of flags, in the order in which --help lists them."""


class Interval(NamedTuple):
  """A range of numbers that a setting accepts.

  Attributes:
    low: lower end.
    high: upper end.
    includes_low: whether the lower end is accepted.
    includes_high: whether the upper end is accepted.
  """

  low: float
  high: float
  includes_low: bool
  includes_high: bool

  def __contains__(self, value: float) -> bool:
    """Returns whether a number is in the range; NaN never is."""
    above = self.low <= value if self.includes_low else self.low < value
    below = value <= self.high if self.includes_high else value < self.high
    return above and below

  def describe(self, is_integer: bool) -> str:
    """Returns the range in words, for error messages."""
    if self.low == -math.inf:
      return 'a finite number'
    if self.high == math.inf:
      kind = 'an integer' if is_integer else 'a finite number'
      return f'{kind} {">=" if self.includes_low else ">"} {self.low:g}'
    start = '[' if self.includes_low else '('
    end = ']' if self.includes_high else ')'
    return f'in {start}{self.low:g}, {self.high:g}{end}'


def _interval(text: str) -> Interval:
  """Parses an interval such as '[0, 1)' or '(0, inf)'."""
  low, high = (float(end) for end in text[1:-1].split(','))
  return Interval(low, high, text[0] == '[', text[-1] == ']')


def option(
  default: Any,
  text: str,
  choices: Iterable[str] | None = None,
  *,
  within: str | None = None,
  group: str = 'settings',
  required: bool = False,
) -> Any:
  """Declares a dataclass field that is also a flag.

  Args:
    default: the default value, which also decides the type. A tuple makes a
      comma-separated list of different values.
    text: help text.
    choices: accepted values, of each item of a list; None accepts all.
    within: range that a number, or each number of a list, must lie in, such as
      '[0, 1)' or '(0, inf)'.
    group: group of the flag in --help, one of `GROUPS`.
    required: whether a list needs at least one value.

  Returns:
    A dataclass field.
  """
  metadata = {
    'help': text,
    'choices': None if choices is None else tuple(choices),
    'within': None if within is None else _interval(within),
    'group': group,
    'required': required,
  }
  return dataclasses.field(default=default, metadata=metadata)


def redeclare(
  config_class: Any, name: str, default: Any, text: str | None = None
) -> Any:
  """Declares a field of a base class again, with another default.

  Args:
    config_class: the dataclass that declares the field.
    name: name of the field.
    default: the new default.
    text: new help text; None keeps the old one.

  Returns:
    A dataclass field with the same choices, range and group.
  """
  fields = {field.name: field for field in dataclasses.fields(config_class)}
  metadata = dict(fields[name].metadata)
  if text is not None:
    metadata['help'] = text
  return dataclasses.field(default=default, metadata=metadata)


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

  A run that a signal has stopped ends with the code of `experiments.core.signals`, one
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
        f'error: {error}\nIf another process has ended, start all of them again; '
        f'they go on by\n  {shlex.join(again)}',
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
  if any(word in HELP_FLAGS for word in argv[1:]):
    # absl lists the flags of one module in alphabetical order, and exits with 1.
    print(_help_text(config_class))
    raise SystemExit(0)
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
    hint = (
      'Settings are --NAME=VALUE; several values are separated by commas, without '
      'blanks.'
    )
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
  """Defines the flag of a field, in the field's group."""
  text = field.metadata['help']
  choices = field.metadata['choices']
  default = field.default
  group = field.metadata['group']
  if isinstance(default, tuple):
    values = [str(value) for value in default]
    flags.DEFINE_list(field.name, values, text, module_name=group)
  elif choices:
    flags.DEFINE_enum(field.name, default, list(choices), text, module_name=group)
  else:
    define = {
      bool: flags.DEFINE_bool,
      int: flags.DEFINE_integer,
      float: flags.DEFINE_float,
      str: flags.DEFINE_string,
    }
    define[_kind(field)](field.name, default, text, module_name=group)


def _help_text(config_class: Any) -> str:
  """Returns the script's description, and its flags with their defaults by group."""
  about = sys.modules[config_class.__module__].__doc__ or ''
  main_module = sys.modules['__main__']
  spec = getattr(main_module, '__spec__', None)
  if spec is not None and spec.name.startswith('experiments.'):
    # The configuration of a package is declared beside its __main__.
    about = main_module.__doc__ or about
  sections = [about.strip()]
  for group in GROUPS:
    fields = [
      field
      for field in dataclasses.fields(config_class)
      if field.metadata['group'] == group
    ]
    if fields:
      lines = '\n'.join(_flag_help(field) for field in fields)
      sections.append(f'{group.capitalize()} flags:\n{lines}')
  return '\n\n'.join(sections)


def _flag_help(field: Any) -> str:
  """Returns a flag with its default and its help text, wrapped."""
  default = field.default
  if isinstance(default, tuple):
    default = ','.join(map(str, default))
  elif isinstance(default, bool):
    default = str(default).lower()
  flag = f'  --{field.name}={"" if default is None else default}'
  text = field.metadata['help']
  choices = field.metadata['choices']
  if choices and not all(choice in text for choice in choices):
    text = f'{text}: {", ".join(choices)}'
  indent = ' ' * 30
  wrapped = textwrap.fill(text, 88, initial_indent=indent, subsequent_indent=indent)
  if len(flag) < len(indent):
    return flag.ljust(len(indent)) + wrapped.lstrip()
  return f'{flag}\n{wrapped}'


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
  """Validates each setting on its own: type, choices and range.

  Args:
    config: a dataclass instance of :func:`option` fields.

  Raises:
    ValueError: a value has the wrong type, is not a choice or is out of range, or a
      list is empty or repeats a value.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(field.default, tuple):
      check(isinstance(value, tuple), field.name, value, 'a tuple')
      is_missing = field.metadata['required'] and not value
      check(not is_missing, field.name, value, 'a list of at least one value')
      for item in value:
        _check_item(field, int if 'int' in str(field.type) else str, item)
      is_distinct = len(set(value)) == len(value)
      check(is_distinct, field.name, value, 'values different from each other')
    elif value is not None or 'None' not in str(field.type):
      _check_item(field, _kind(field), value)


def _check_item(field: Any, kind: type, value: Any) -> None:
  """Validates one value of a field.

  Args:
    field: the dataclass field.
    kind: the type that the value must have.
    value: the value, or one item of a list.

  Raises:
    ValueError: the value is not accepted.
  """
  choices = field.metadata['choices']
  within = field.metadata['within']
  if choices:
    is_choice = isinstance(value, str) and value in choices
    check(is_choice, field.name, value, f'one of {", ".join(choices)}')
    return
  if kind is int:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    fits = is_integer and abs(value) <= INT32_MAX
    check(fits, field.name, value, f'an integer of at most {INT32_MAX}')
  elif kind is float:
    check(_fits_float32(value), field.name, value, 'a number that float32 holds')
  else:
    expected = {bool: 'true or false', str: 'a text'}[kind]
    check(isinstance(value, kind), field.name, value, expected)
  if within is not None:
    check(value in within, field.name, value, within.describe(kind is int))


def _fits_float32(value: Any) -> bool:
  """Returns whether a value is a number that neither underflows nor overflows."""
  if isinstance(value, bool) or not isinstance(value, int | float | np.number):
    return False
  # Infinity and NaN are left to the range, whose message is plainer.
  if value == 0 or not math.isfinite(value):
    return True
  limits = np.finfo(np.float32)
  return bool(limits.tiny <= abs(value) <= limits.max)


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
