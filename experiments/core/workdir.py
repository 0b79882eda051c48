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
  'workdir',
  'data_dir',
  'devices',
  'population',
  'steps_per_call',
  'host_data',
  'max_to_keep',
  'checkpoint_minutes',
  'allow_config_change',
  'logger',
  'tune',
  'sample',
  'prompt',
  'temperature',
  'sample_seed',
  'data_parallel',
  'shard_params',
  'coordinator',
  'num_processes',
  'process_id',
)
"""Settings that do not affect results and may change when a run is resumed."""


RUN_FLAGS = ('method', 'seeds', 'grid')
"""Settings in which commands for one folder may differ.

They decide which runs there are, and each run has a folder of its own.
"""


TEST_FLAGS = ('evaluate_test', 'dynamic_evaluation', 'dynamic_tokens')
"""Settings on which only the test scores of a run depend, not its training."""


NEWER_SETTINGS: dict[str, dict[str, Any]] = {
  'all': {
    'coupling': 'gradient',
    'nesterov': False,
    'momentum_windows': 0,
    'averaging': 'none',
    'average_horizon': 500,
    'bootstrap': 0.0,
  },
  'add_task': {'influence': 'none'},
  'images': {'pool': 1},
  'online': {'every_window': False},
}
"""Settings, of all scripts or of one, that folders of earlier versions do not have.

At these values they change nothing and are not recorded, so that such folders go on.
"""


_opened: dict[str, str] = {}
"""Hashes of the configurations with which this process opened folders."""


def open_workdir(workdir: str, script: str, config: Any, **identity: str) -> Path:
  """Make the folder of a command, or check that its configuration is the same.

  Runs of other methods, seeds and grid values may join the runs in a folder.

  Args:
    workdir: the folder.
    script: name of the script.
    config: settings of the runs. With `allow_config_change` the folder may have another
      configuration; config.json then lists the earlier ones.
    **identity: further entries that must not change, such as a hash of the data.

  Returns:
    The absolute path of the folder.

  Raises:
    UserError: the folder holds runs of another configuration, or cannot be written.
  """
  folder = Path(workdir).absolute()
  _check_letters(folder)
  settings = json.loads(json.dumps(dataclasses.asdict(config)))
  _check_same_settings(settings)
  described = {'script': script, **settings, **identity}
  for name in RUNTIME_FLAGS:
    described.pop(name, None)
  newer = {**NEWER_SETTINGS['all'], **NEWER_SETTINGS.get(script, {})}
  for name, value in newer.items():
    if described.get(name) == value:
      del described[name]
  content = json.dumps(_settings(described), sort_keys=True)
  described['sha256'] = hashlib.sha256(content.encode()).hexdigest()
  claimed = processes.on_first_process(
    _claim, folder, described, config.allow_config_change
  )
  _opened[claimed] = described['sha256']
  return Path(claimed)


def _check_same_settings(settings: dict[str, Any]) -> None:
  """Raise UserError if the processes of a distributed run have different settings."""
  # Folders may be mounted in different places.
  alike = {
    name: value
    for name, value in settings.items()
    if name not in ('workdir', 'data_dir', 'process_id')
  }
  first = processes.on_first_process(lambda: alike)
  if processes.any_process(first != alike):
    raise UserError(
      'the processes were started with different settings; only --process_id and '
      'folders may differ.'
    )


def _check_letters(folder: Path) -> None:
  """Raise UserError if orbax cannot handle a folder's name.

  Orbax needs Unicode. Python represents bytes that the locale's encoding does not have
  by characters that are not valid Unicode.
  """
  try:
    str(folder).encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'--workdir={folder} has letters that the encoding {sys.getfilesystemencoding()} '
      'lacks: choose another name, or set PYTHONUTF8=1.'
    ) from error


def _claim(folder: Path, described: dict[str, Any], override: bool) -> str:
  """Write config.json, or check the one that exists.

  Args:
    folder: the folder.
    described: the content to write, without `overrides`.
    override: whether another configuration is accepted.

  Returns:
    The folder. All processes use that of process 0, since default names hold the time.

  Raises:
    UserError: the configuration differs, or the folder cannot be written.
  """
  path = folder / 'config.json'
  overrides: list[dict[str, Any]] = []
  try:
    if path.exists():
      found = read_config(folder)
      overrides = found['overrides']
      differ = differences(_settings(found), _settings(described))
      if differ and not override:
        raise UserError(
          f'{folder} holds runs of another configuration; {"; ".join(differ)}. Choose '
          'another --workdir, or resume these runs with --allow_config_change.'
        )
      if differ:
        print(f'{folder} is resumed with other settings; {"; ".join(differ)}')
        overrides = [*overrides, {'sha256': found['sha256'], 'differences': differ}]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**described, 'overrides': overrides})
  except OSError as error:
    raise UserError(f'cannot write to --workdir={folder}: {error}') from error
  return str(folder)


def _settings(described: dict[str, Any]) -> dict[str, Any]:
  """Return the settings that all runs of a folder must share."""
  return {
    name: value
    for name, value in described.items()
    if name not in (*RUN_FLAGS, 'sha256', 'overrides')
  }


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Return a text per entry in which two descriptions differ.

  Args:
    was: the earlier description.
    now: the new one.
  """
  names = sorted({*was, *now})
  return [
    f'{name}: was {was.get(name)!r}, now {now.get(name)!r}'
    for name in names
    if was.get(name) != now.get(name)
  ]


def changes_since(folder: Path, sha256: str | None) -> list[tuple[str, str]]:
  """Return the settings of a folder that changed after an earlier configuration.

  Args:
    folder: the --workdir.
    sha256: hash of the earlier configuration; None for none.

  Returns:
    (name, text on the difference) per change, in order. Without such an earlier
    configuration there are none.

  Raises:
    UserError: config.json cannot be read.
  """
  config = read_config(folder)
  earlier = [override['sha256'] for override in config['overrides']]
  if sha256 == config['sha256'] or sha256 not in earlier:
    return []
  # The last one, since settings may have been changed back and forth.
  later = config['overrides'][len(earlier) - 1 - earlier[::-1].index(sha256) :]
  texts = [text for override in later for text in override['differences']]
  return [(text.partition(':')[0], text) for text in texts]


@contextlib.contextmanager
def lock_runs(folders: Sequence[Path]) -> Iterator[None]:
  """Lock the folders of runs while they are trained.

  The locks belong to process 0 and are released when it ends, even if it is killed.

  Args:
    folders: folders of the runs, which are made if they are missing.

  Raises:
    UserError: another command trains one of the runs, or a folder cannot be written.
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
  """Return the hash of the configuration that this process uses a folder with.

  Another command may have changed the file since this one opened the folder.
  """
  return _opened.get(str(folder.absolute())) or str(read_config(folder)['sha256'])


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
  """Write summary.json: configuration, results and machine.

  Args:
    folder: the --workdir.
    runs: summaries of the runs.
    best: name of the best run; None if there is only one.

  Raises:
    UserError: a file cannot be read or written.
  """
  chosen = {} if best is None else {'best': best}
  write_json(
    folder / 'summary.json',
    {'config': read_config(folder), **chosen, 'runs': runs, **describe_machine()},
  )


def make_folder(path: str) -> Path:
  """Make a folder unless it exists, and return its absolute path.

  Raises:
    UserError: the folder cannot be made.
  """
  folder = Path(path).absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'cannot write to --workdir={folder}: {error}') from error
  return folder
