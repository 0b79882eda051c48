"""The folder of a command: its configuration, locks and summary."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
import sys
from typing import Any

import filelock

from experiments.core import processes
from experiments.core.environment import describe_machine
from experiments.core.files import damaged_file, read_json, write_json
from experiments.core.flags import UserError

RUNTIME_FLAGS = (
  *(
    'workdir',
    'data_dir',
    'devices',
    'population',
    'steps_per_call',
    'host_data',
    'max_to_keep',
    'checkpoint_minutes',
    'allow_config_change',
  ),
  *('logger', 'tune', 'sample', 'prompt', 'temperature', 'sample_seed'),
  *('data_parallel', 'shard_params', 'coordinator', 'num_processes', 'process_id'),
)
"""Where and how a run runs, which is not what it is: it may go on otherwise."""


RUN_FLAGS = ('method', 'seeds', 'grid')
"""What may differ from command to command in one folder: each run has a folder of its
own there.
"""


def open_workdir(workdir: str, script: str, config: Any, **identity: str) -> Path:
  """Makes the folder and writes config.json, or checks that the folder was made with
  the same configuration.

  Other methods, seeds and values of a grid may join those that are there: each run has
  its own folder. `identity` says what else makes it the same run, such as a hash of the
  data. With `config.allow_config_change` other settings are taken, and config.json says
  which were there before.

  Raises:
    UserError: the folder holds runs of another configuration, or cannot be written.
  """
  folder = Path(workdir).absolute()
  _check_letters(folder)
  described = {
    'script': script,
    **json.loads(json.dumps(dataclasses.asdict(config))),
    **identity,
  }
  for name in RUNTIME_FLAGS:
    described.pop(name, None)
  described['sha256'] = hashlib.sha256(
    json.dumps(_settings(described), sort_keys=True).encode()
  ).hexdigest()
  alike = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if name not in ('workdir', 'data_dir', 'process_id')
  }
  settings = json.loads(json.dumps(alike))
  if processes.any_process(processes.on_first_process(lambda: settings) != settings):
    raise UserError(
      'the processes were started with different settings; only --process_id and '
      'folders may differ.'
    )
  return Path(
    processes.on_first_process(_claim, folder, described, config.allow_config_change)
  )


def _check_letters(folder: Path) -> None:
  """Raise if orbax cannot take a folder's name.

  It takes Unicode; of bytes that the locale's encoding lacks Python makes something
  else.
  """
  try:
    str(folder).encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'--workdir={folder} has letters that the encoding {sys.getfilesystemencoding()} '
      'lacks: '
      'choose another name, or set PYTHONUTF8=1.'
    ) from error


def _claim(folder: Path, described: dict[str, Any], override: bool) -> str:
  """Writes config.json, or checks what is there; the folder is the first process's:
  those of others may have another date.
  """
  path, overrides = folder / 'config.json', []
  try:
    if path.exists():
      found = read_config(folder)
      overrides = found['overrides']
      differ = differences(_settings(found), _settings(described))
      if differ and not override:
        raise UserError(
          f'{folder} holds runs of another configuration; {"; ".join(differ)}. Choose '
          'another --workdir, or go on with '
          'these runs by --allow_config_change.'
        )
      if differ:
        print(f'{folder} goes on with other settings than before; {"; ".join(differ)}')
        overrides = [*overrides, {'sha256': found['sha256'], 'differences': differ}]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**described, 'overrides': overrides})
  except OSError as error:
    raise UserError(f'cannot write to --workdir={folder}: {error}') from error
  return str(folder)


def _settings(described: dict[str, Any]) -> dict[str, Any]:
  """What makes the runs of a folder what they are."""
  return {
    name: value
    for name, value in described.items()
    if name not in (*RUN_FLAGS, 'sha256', 'overrides')
  }


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """What two descriptions do not agree in."""
  names = sorted({*was, *now})
  return [
    f'{name}: was {was.get(name)!r}, now {now.get(name)!r}'
    for name in names
    if was.get(name) != now.get(name)
  ]


@contextlib.contextmanager
def lock_runs(folders: Sequence[Path]) -> Iterator[None]:
  """Keeps runs to this process, and those beside it, until they have been trained; a
  process that dies lets go of them.

  Raises:
    UserError: they are being trained elsewhere, or a folder cannot be written.
  """
  with contextlib.ExitStack() as held:

    def hold() -> None:
      for folder in folders:
        try:
          folder.mkdir(exist_ok=True)
          held.enter_context(filelock.FileLock(folder / 'lock', timeout=0))
        except filelock.Timeout as error:
          raise UserError(
            f'{folder} is being trained by another command; wait for it, or choose '
            'another --workdir.'
          ) from error
        except OSError as error:
          raise UserError(f'cannot write to {folder}: {error}') from error

    processes.on_first_process(hold)
    yield


def config_sha256(folder: Path) -> str:
  """Hash of the configuration that a folder's runs have."""
  found: str = read_config(folder)['sha256']
  return found


def read_config(folder: Path) -> dict[str, Any]:
  """Read a folder's config.json.

  Args:
    folder: a --workdir.

  Returns:
    The settings, with 'sha256' and 'overrides'.

  Raises:
    UserError: the file cannot be read, or is not one that a script wrote.
  """
  path = folder / 'config.json'
  config = read_json(path, ('script', 'sha256', 'overrides'))
  overrides = config['overrides']
  whole = isinstance(overrides, list) and all(
    isinstance(override, dict) and 'sha256' in override for override in overrides
  )
  if not whole:
    raise damaged_file(str(path), '"overrides" is not a list of earlier settings')
  return config


def write_summary(
  folder: Path, runs: list[dict[str, Any]], best: str | None = None
) -> None:
  """Writes what came out, which run was the best, and what they ran on."""
  chosen = {} if best is None else {'best': best}
  write_json(
    folder / 'summary.json',
    {'config': read_config(folder), **chosen, 'runs': runs, **describe_machine()},
  )


def make_folder(path: str) -> Path:
  """The folder, made if need be.

  Raises:
    UserError: it cannot be.
  """
  folder = Path(path).absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'cannot write to --workdir={folder}: {error}') from error
  return folder
