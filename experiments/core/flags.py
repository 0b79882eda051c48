"""Configuration dataclasses and the absl flags generated from their fields.

Each setting is declared once, as a dataclass field made by :func:`option`.
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
"""Flags with paths, addresses and ranks that only fit one machine."""


EXIT_SECONDS = 5.0
"""Seconds that background threads get to finish after an error."""


MAX_RUNS = 10_000
"""Largest number of seeds or grid combinations; more are taken for a typo."""


INT32_MAX = 2**31 - 1
"""Largest integer setting: JAX computes with 32-bit integers by default."""


HELP_FLAGS = ('--help', '-help', '-h', '--helpshort', '--helpfull')
"""Command-line arguments that print the help text."""


class UserError(Exception):
  """Error that the user can fix; printed as one line, without a traceback."""


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

  def accepts(self, value: float) -> bool:
    """Return whether a number is in the range; NaN never is."""
    above = self.low <= value if self.includes_low else self.low < value
    below = value <= self.high if self.includes_high else value < self.high
    return above and below

  def describe(self, is_integer: bool) -> str:
    """Return the range in words, for error messages."""
    # '(-inf, inf)' excludes just NaN and infinity; the words are clearer.
    if self.low == -math.inf:
      return 'a finite number'
    if self.high == math.inf:
      kind = 'an integer' if is_integer else 'a finite number'
      if self.includes_high:
        kind = 'a number'
      return f'{kind} {">=" if self.includes_low else ">"} {self.low:g}'
    start = '[' if self.includes_low else '('
    end = ']' if self.includes_high else ')'
    return f'in {start}{self.low:g}, {self.high:g}{end}'


def _interval(text: str) -> Interval:
  """Parse an interval such as '[0, 1)' or '(0, inf)'."""
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
  """Declare a dataclass field that is also a flag.

  Args:
    default: the default value, which also sets the type. The flag of a tuple takes a
      comma-separated list of distinct values.
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
  """Declare a field of a base class again, with another default.

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
  """Return the name of a new folder, with the script and the current time."""
  return f'runs/{_script()}-{time.strftime("%Y%m%d-%H%M%S")}'


def run(
  main: Callable[[Any], None],
  config_class: Any,
  presets: dict[str, dict[str, Any]] | None = None,
  workdir: Callable[[Any], str] = dated_folder,
) -> None:
  """Parse the command line into a configuration and call `main` with it.

  Each field of `config_class` becomes a flag. The process exits with
  `signals.EXIT_CODE` after a signal that left everything saved, with 130 after Ctrl-C
  and with 1 after an error. The message names the command that resumes the runs.

  Args:
    main: (configuration) -> None, the script.
    config_class: a dataclass of :func:`option` fields.
    presets: defaults of other flags by value of the flag 'task'. Flags on the command
      line take precedence.
    workdir: (configuration) -> folder of the runs if --workdir is not given.

  Raises:
    SystemExit: the command line is wrong, or `main` has failed or been stopped.
  """
  _show_any_letter()
  fields = dataclasses.fields(config_class)
  for field in fields:
    _define(field)

  def start(argv: list[str]) -> None:
    # The CPU's devices cannot change after JAX has looked for them.
    fptt_jax.use_cpu_devices()
    if len(argv) > 1:
      raise SystemExit(f'error: {_stray(argv[1], config_class)} See --help.')
    if not flags.FLAGS['verbosity'].present:
      # orbax also logs the tracebacks of errors that it raises.
      logging.set_verbosity(logging.FATAL)
    config = _parsed_config(config_class, presets)
    again = [sys.executable, '-m', f'experiments.{_script()}', *sys.argv[1:]]
    if any(field.name == 'workdir' for field in fields) and not config.workdir:
      config = dataclasses.replace(config, workdir=workdir(config))
      # The default folder has the time in its name: resuming must name this one.
      again.append(f'--workdir={config.workdir}')
    _call_main(main, config, shlex.join(again))

  app.run(start, flags_parser=lambda argv: _parse_flags(argv, config_class))


def _parsed_config(config_class: Any, presets: dict[str, dict[str, Any]] | None) -> Any:
  """Return the configuration given by the parsed flags and the presets.

  Raises:
    SystemExit: a value, or a combination of values, is not accepted.
  """
  try:
    settings = {
      field.name: _read(field, flags.FLAGS[field.name].value)
      for field in dataclasses.fields(config_class)
    }
    if presets:
      preset = presets.get(settings['task'], {})
      # A flag may be given with its default value, so the values do not show it.
      settings |= {
        name: value for name, value in preset.items() if not flags.FLAGS[name].present
      }
    return config_class(**settings)
  except ValueError as error:
    raise SystemExit(f'error: {error} See --help.') from error


def _call_main(main: Callable[[Any], None], config: Any, resume_command: str) -> None:
  """Call a script's `main` and turn its errors into messages and exit codes."""
  try:
    main(config)
  except UserError as error:
    _leave(f'error: {error}', 1)
  except signals.Stopped as stopped:
    print_error(f'{stopped}; resume with\n  {resume_command}')
    # All processes stop here together, so a normal exit waits for nobody.
    raise SystemExit(signals.EXIT_CODE) from stopped
  except KeyboardInterrupt:
    # 128 + SIGINT, as shells report a program that Ctrl-C has ended.
    _leave(
      'interrupted by Ctrl-C; to resume from the last checkpoint, run\n'
      f'  {resume_command}',
      130,
    )
  except Exception as error:
    if jax.process_count() == 1:
      raise
    # A JaxRuntimeError mostly follows from the end of another process.
    if not isinstance(error, jax.errors.JaxRuntimeError):
      traceback.print_exc()
    _leave(
      f'error: {error}\nIf another process has stopped, start all of them again; '
      f'to resume, run\n  {resume_command}',
      1,
    )


def _show_any_letter() -> None:
  """Make the standard streams escape characters that their encoding lacks."""
  # A folder with an umlaut must not end a run on a terminal of ASCII.
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def _parse_flags(argv: list[str], config_class: Any) -> list[str]:
  """Parse the command line.

  Args:
    argv: the command line, the program's name first.
    config_class: a dataclass of :func:`option` fields.

  Returns:
    The program's name and the words that are not flags.

  Raises:
    SystemExit: the help was asked for, a flag is unknown or its value has another type.
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
  """Return the message for an unknown flag, with the most similar flag."""
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
  # Typos come first; a loose match last, since it is right least often.
  near = difflib.get_close_matches(name, names, 1) or inside[:1] or described[:1]
  near = near or difflib.get_close_matches(name, names, 1, cutoff=0.4)
  return f'there is no --{name}.' + (f' Did you mean --{near[0]}?' if near else '')


def _illegal_value(text: str, config_class: Any) -> str:
  """Return the error message for a flag's value of the wrong type.

  Args:
    text: absl's message.
    config_class: a dataclass of :func:`option` fields. Its `COMPARABLE`, if any, lists
      the fields that --grid accepts.
  """
  # absl's exception has no attributes; only its text names the flag and the value.
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
  # Several values for one number are the likeliest mistake: they belong in --grid.
  values = [part for part in re.split(r'[,:;\s\[\]()]+', value) if part]
  if len(values) > 1:
    hint = ' It takes one value.'
    if name in getattr(config_class, 'COMPARABLE', ()):
      hint = f' To compare several values, give --grid={name}={":".join(values)}.'
  return f'--{name} must be {expected}, got {value!r}.{hint}'


def _stray(word: str, config_class: Any) -> str:
  """Return the message for a word that belongs to no flag, with a hint."""
  fields = {field.name: field for field in dataclasses.fields(config_class)}
  before = sys.argv[sys.argv.index(word) - 1] if word in sys.argv[1:] else ''
  name = before.lstrip('-').partition('=')[0]
  if word.partition('=')[0] in fields:
    hint = f'Did you mean --{word}?'
  # absl's boolean flags take no separate word: in `--decay false` it is left over.
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
  """Return the script's name, for `python -m experiments.NAME`."""
  path = Path(sys.argv[0])
  return path.parent.name if path.stem == '__main__' else path.stem


def command() -> str | None:
  """Return the command that started this process, without `MACHINE_FLAGS`.

  Returns:
    The command, quoted for a shell; None if no script of this package was started.
  """
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  name = spec.name.removesuffix('.__main__') if spec else ''
  if not name.startswith('experiments.'):
    return None
  # A value may follow its flag as a separate word, which has to go with it.
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
  """Print a message and end this process, even if background threads still run.

  Args:
    text: the message.
    code: the exit code.
  """
  print_error(text)
  deadline = time.monotonic() + EXIT_SECONDS
  others = [
    thread for thread in threading.enumerate() if thread is not threading.main_thread()
  ]
  # Threads may be writing a checkpoint. One deadline limits the wait for all of them.
  for thread in others:
    if not thread.daemon and jax.process_count() == 1:
      thread.join(max(0.0, deadline - time.monotonic()))
  if jax.process_count() > 1 or any(
    thread.is_alive() and not thread.daemon for thread in others
  ):
    # A normal exit of one process waits for the others, which wait for it. After a
    # failed checkpoint orbax's threads would hold it for minutes. os._exit flushes
    # nothing.
    sys.stdout.flush()
    os._exit(code)
  raise SystemExit(code)


def print_error(text: str) -> None:
  """Print a line to standard error at once."""
  print(text, file=sys.stderr, flush=True)


def _define(field: Any) -> None:
  """Define the absl flag of a field."""
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
    define: dict[type, Callable[..., Any]] = {
      bool: flags.DEFINE_bool,
      int: flags.DEFINE_integer,
      float: flags.DEFINE_float,
      str: flags.DEFINE_string,
    }
    define[_kind(field)](field.name, default, text, module_name=group)


def _help_text(config_class: Any) -> str:
  """Return the script's description, and its flags by group."""
  about = sys.modules[config_class.__module__].__doc__ or ''
  main_module = sys.modules['__main__']
  spec = getattr(main_module, '__spec__', None)
  if spec is not None and spec.name.startswith('experiments.'):
    # The configuration of a package is declared in another module than __main__.
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
  """Return a flag with its default and its help text, wrapped."""
  default = field.default
  if isinstance(default, tuple):
    default = ','.join(map(str, default))
  elif isinstance(default, bool):
    default = str(default).lower()
  flag = f'  --{field.name}={"" if default is None else default}'
  text = field.metadata['help']
  choices = field.metadata['choices']
  # Some help texts explain each choice; listing them again would be noise.
  if choices and not all(choice in text for choice in choices):
    text = f'{text}: {", ".join(choices)}'
  indent = ' ' * 30
  wrapped = textwrap.fill(text, 88, initial_indent=indent, subsequent_indent=indent)
  if len(flag) < len(indent):
    return flag.ljust(len(indent)) + wrapped.lstrip()
  return f'{flag}\n{wrapped}'


def _kind(field: Any) -> type:
  """Return the type of a field that is not a list."""
  # With None as default only the annotation, such as `int | None`, has the type.
  if field.default is not None:
    return type(field.default)
  return next(kind for kind in (int, float, str) if kind.__name__ in str(field.type))


def _read(field: Any, value: Any) -> Any:
  """Return the setting of a flag's value; lists become tuples.

  In lists of integers '0:3' stands for 0, 1, 2.

  Raises:
    ValueError: an item is not an integer or a range, or a range is too long.
  """
  if not isinstance(field.default, tuple):
    return value
  if 'int' not in str(field.type):
    return tuple(value)
  items: list[int] = []
  for text in value:
    parts = [part.strip() for part in text.split(':')]
    # isdigit would accept superscripts, which int rejects. The limited length keeps
    # the ends of ranges small.
    are_integers = len(parts) <= 2 and all(
      part.isdecimal() and len(part) <= len(str(INT32_MAX)) for part in parts
    )
    numbers = [int(part) for part in parts] if are_integers else []
    found = range(*numbers) if len(numbers) == 2 else numbers
    check(len(found) > 0, field.name, text, 'integers, or a range such as 0:3')
    # A range is checked while it is lazy: its numbers could fill the memory.
    check(len(found) <= MAX_RUNS, field.name, text, f'at most {MAX_RUNS} numbers')
    items.extend(found)
  return tuple(items)


def check_fields(config: Any) -> None:
  """Validate the type, choices and range of each setting.

  Args:
    config: a dataclass instance of :func:`option` fields.

  Raises:
    ValueError: a value has the wrong type, is not a choice or is out of range, or a
      list is empty or repeats a value.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    # Configurations are also built in Python, where no flag has parsed the values.
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
  """Validate one value of a field.

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
    # bool is a subclass of int, but True is not a number of windows.
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    fits = is_integer and abs(value) <= INT32_MAX
    check(fits, field.name, value, f'an integer of at most {INT32_MAX}')
  elif kind is float:
    check(_fits_float32(value), field.name, value, 'a number that float32 holds')
  else:
    expected = {bool: 'true or false', str: 'a text'}[kind]
    check(isinstance(value, kind), field.name, value, expected)
  if within is not None:
    check(within.accepts(value), field.name, value, within.describe(kind is int))


def _fits_float32(value: Any) -> bool:
  """Return whether a value is a number in the range of float32."""
  if isinstance(value, bool) or not isinstance(value, int | float | np.number):
    return False
  # Infinity and NaN are left to the range, whose message is plainer.
  is_finite = isinstance(value, int) or math.isfinite(value)
  if value == 0 or not is_finite:
    return True
  limits = np.finfo(np.float32)
  # A comparison with a float32 would round the value to float32 first.
  magnitude: Any = abs(value)
  return bool(float(limits.tiny) <= magnitude <= float(limits.max))


def check(condition: bool, name: str, got: Any, expected: str) -> None:
  """Raise ValueError with a flag's name and value unless a condition holds."""
  if not condition:
    raise ValueError(f'--{name} must be {expected}, got {got!r}.')


def checked(function: Callable[..., Any], *args: Any) -> Any:
  """Return `function(*args)`, with a ValueError turned into a UserError.

  This is for checks that run after the command line has been parsed, such as those
  that need the data.
  """
  try:
    return function(*args)
  except ValueError as error:
    raise UserError(str(error)) from error
