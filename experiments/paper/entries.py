"""Selection and execution of the lines of an item."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.core import files, workdir
from experiments.core.flags import UserError
from experiments.data import synthetic
from experiments.paper import items
from experiments.paper.items import Entry
from experiments.paper.settings import Config


def chosen_entries(config: Config, folder: Path) -> list[Entry]:
  """The item's lines that are asked for, with the data's place and the settings tuned
  before.

  Raises:
    UserError: a name that is no line, or nothing left.
  """
  entries = items.ITEMS[config.item](config.scale)
  labels = [entry.label for entry in entries]
  unknown = sorted(set(config.lines) - {'all', *labels})
  if unknown:
    raise UserError(
      f'--lines must be out of {", ".join(labels)}, got {", ".join(unknown)}.'
    )
  wanted = lambda entry: (
    'all' in config.methods or entry.config.method[0] in config.methods
  )
  entries = [
    entry
    for entry in entries
    if wanted(entry) and ('all' in config.lines or entry.label in config.lines)
  ]
  if not entries:
    raise UserError(
      f'--methods={",".join(config.methods)} and --lines={",".join(config.lines)} '
      f'leave no line of {config.item}.'
    )
  tuned = (
    {} if config.tune else read_tuned(folder)
  )  # The grid is that of the declared setting, every time.
  place = (
    synthetic.data_files(folder / 'data')
    if config.scale == 'smoke'
    else dict.fromkeys(('images', 'text'), config.data_dir)
  )
  kinds = {'experiments.images': 'images', 'experiments.language_model': 'text'}

  def prepared(entry: Entry) -> Entry:
    settings: dict[str, Any] = dict(allow_config_change=config.allow_config_change)
    if entry.label in tuned:
      found = tuned[entry.label]
      settings |= {name: found[name] for name in ('lr', 'num_windows') if name in found}
    if entry.script.__name__ in kinds:
      settings['data_dir'] = place[kinds[entry.script.__name__]]
    return entry._replace(config=dataclasses.replace(entry.config, **settings))

  return [prepared(entry) for entry in entries]


def run_entry(entry: Entry, config: Any, folder: Path) -> list[dict[str, Any]]:
  """Runs a configuration in a folder of its own, every seed, and writes its summary."""
  path, summaries = entry.script.run(config, str(folder))
  workdir.write_summary(path, summaries)
  return summaries


def read_tuned(folder: Path) -> dict[str, Any]:
  """What --tune chose for each line; {} before that."""
  path = folder / 'tuned.json'
  return files.read_json(path) if path.exists() else {}
