"""Selection and execution of the lines of an item."""

import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

from experiments import images, language_model
from experiments.core import files, workdir
from experiments.core.flags import UserError
from experiments.data import synthetic
from experiments.paper import items
from experiments.paper.items import Entry
from experiments.paper.settings import Config


def chosen_entries(config: Config, folder: Path) -> list[Entry]:
  """Select the lines of an item that the flags ask for.

  The lines get the folder of the data and the settings that --tune chose before.

  Args:
    config: settings of the command.
    folder: the item's folder.

  Returns:
    The lines, in the item's order.

  Raises:
    UserError: a name is not a line of the item, or no line is left.
  """
  entries = items.ITEMS[config.item](config.scale)
  labels = [entry.label for entry in entries]
  unknown = [
    pattern
    for pattern in sorted(set(config.lines) - {'all'})
    if not fnmatch.filter(labels, pattern)
  ]
  if unknown:
    raise UserError(
      f'--lines must be out of {", ".join(labels)}, got {", ".join(unknown)}.'
    )
  if 'all' not in config.methods:
    entries = [entry for entry in entries if entry.config.method[0] in config.methods]
  if 'all' not in config.lines:
    entries = [
      entry
      for entry in entries
      if any(fnmatch.fnmatchcase(entry.label, pattern) for pattern in config.lines)
    ]
  if not entries:
    raise UserError(
      f'--methods={",".join(config.methods)} and --lines={",".join(config.lines)} '
      f'leave no line of {config.item}.'
    )
  # Tuning starts from the declared settings every time, so that it can be resumed.
  tuned = {} if config.tune else read_tuned(folder)
  data_dirs = dict.fromkeys(('images', 'text'), config.data_dir)
  if config.scale == 'smoke':
    data_dirs = synthetic.data_files(folder / 'data')
  return [_prepared(entry, config, tuned, data_dirs) for entry in entries]


def _prepared(
  entry: Entry, config: Config, tuned: dict[str, Any], data_dirs: dict[str, str]
) -> Entry:
  """Return a line with its tuned settings and the folder of its data.

  Args:
    entry: the line.
    config: settings of the command.
    tuned: settings chosen by tuning, by the label of the line.
    data_dirs: folders of 'images' and 'text'.
  """
  settings: dict[str, Any] = {'allow_config_change': config.allow_config_change}
  found = tuned.get(entry.label, {})
  settings |= {name: found[name] for name in ('lr', 'num_windows') if name in found}
  # The adding problem draws its data and has no such setting.
  if entry.script is images:
    settings['data_dir'] = data_dirs['images']
  elif entry.script is language_model:
    settings['data_dir'] = data_dirs['text']
  return entry._replace(config=dataclasses.replace(entry.config, **settings))


def run_entry(entry: Entry, config: Any, folder: Path) -> list[dict[str, Any]]:
  """Run every seed of a configuration and write the summary.

  Args:
    entry: the line, whose script is run.
    config: the configuration.
    folder: the folder of these runs alone.

  Returns:
    The summaries of the runs.
  """
  path, summaries = entry.script.run(config, str(folder))
  workdir.write_summary(path, summaries)
  return summaries


def read_tuned(folder: Path) -> dict[str, Any]:
  """Read the settings that --tune chose, by the label of the line.

  Args:
    folder: the item's folder; without tuned settings the result is empty.
  """
  path = folder / 'tuned.json'
  return files.read_json(path) if path.exists() else {}
