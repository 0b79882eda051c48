"""Collect run folders into the committed results, and make tables and plots of them.

python -m experiments.results --collect=runs/table6-cpu --item=table6
python -m experiments.results --tables
python -m experiments.results --plots=runs/plots
"""

import dataclasses
from pathlib import Path

from experiments.core import flags
from experiments.core.flags import check, option
from experiments.records import plots, store, tables
from experiments.records.collect import HOMES, Origin, collect_folder, known_items


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the command.

  A command with several tasks collects first, then writes tables, then draws plots.
  """

  collect: str = option('', 'run folder to collect results from')
  item: str = option('', 'item that the results belong to', ('', *known_items()))
  series: str = option('', 'name of the series of runs; default the scale')
  scale: str = option('', 'scale of the runs; default that of their reports')
  command: str = option('', 'command that started the runs; default the recorded one')
  commit: str = option('', 'revision of the code; default the recorded one')
  notes: str = option('', 'remarks for the readers of the series')
  tables: bool = option(False, 'rewrite the tables of README.md and docs/')
  plots: str = option('', 'folder for the plots of all results')

  def __post_init__(self) -> None:
    flags.check_fields(self)
    has_task = bool(self.collect or self.tables or self.plots)
    check(has_task, 'collect', '', 'given, or --tables or --plots')
    has_both = bool(self.item) == bool(self.collect)
    check(has_both, 'item', self.item, 'given with --collect')
    # Without runs to describe these flags would be ignored in silence.
    for field in dataclasses.fields(Origin):
      value = getattr(self, field.name)
      is_used = bool(self.collect) or not value
      check(is_used, field.name, value, 'left out without --collect')
    # They become parts of the names of files.
    for name in ('series', 'scale'):
      value = getattr(self, name)
      accepted = not value or store.NAME.fullmatch(value) is not None
      check(accepted, name, value, 'letters, digits, dots, dashes and underscores')


def pages(root: Path) -> list[Path]:
  """Return the Markdown pages that may hold tables.

  Args:
    root: folder of the repository.
  """
  return [root / 'README.md', *sorted((root / 'docs').rglob('*.md'))]


def main(config: Config) -> None:
  """Collect results, write tables and draw plots, as far as the flags ask for it.

  Args:
    config: settings of the command.

  Raises:
    UserError: a folder holds no results, or a file cannot be read or written.
  """
  root = Path(__file__).parents[2]
  if config.collect:
    names = [field.name for field in dataclasses.fields(Origin)]
    origin = Origin(**{name: getattr(config, name) for name in names})
    number = collect_folder(Path(config.collect), config.item, origin, store.FOLDER)
    home = HOMES.get(config.item, config.item)
    print(f'{number} rows of {config.collect} are in {home}.json')
  if config.tables:
    changed = tables.update_pages(pages(root))
    names = [str(page.relative_to(root)) for page in changed]
    print(f'tables changed in: {", ".join(names) or "none"}')
  if config.plots:
    out = Path(config.plots)
    drawn = [path for name in store.item_names() for path in plots.draw(name, out)]
    print(f'{len(drawn)} plots are in {config.plots}')


if __name__ == '__main__':
  flags.run(main, Config)
