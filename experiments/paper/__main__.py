"""One command for each figure and table of the paper.

    python -m experiments.paper --item=table6 --scale=cpu

An item is a list of lines, each with runs in a folder of its own. A command that is
stopped can be given again and resumes where it was.

--tune tries several learning rates for each line, at scale 'short' also several numbers
of windows. The best by validation is chosen, and later runs of the item in the same
folder use it.

Otherwise the command ends with a table as text, JSON and plot. The table has the mean
over the seeds with half the width of its 95 % confidence interval. Next to it are the
number of the paper, measured or quoted there, and the number of an independent
replication with the same settings.
"""

import dataclasses

from experiments.core import flags, workdir
from experiments.paper import studies
from experiments.paper.entries import chosen_entries, run_entry
from experiments.paper.settings import Config
from experiments.paper.tables import write_tables
from experiments.paper.tuning import tune


def main(config: Config) -> None:
  """Run the missing runs of an item and report all of them.

  Args:
    config: settings of the command.

  Raises:
    UserError: no line is left, or a file cannot be read or written.
  """
  folder = workdir.make_folder(config.workdir)
  if config.item in studies.STUDIES:
    studies.STUDIES[config.item](config.scale, folder)
    return
  entries = chosen_entries(config, folder)
  if config.tune:
    tune(config, entries, folder)
    return
  results = []
  for entry in entries:
    print(f'--- {config.item}: {entry.label}', flush=True)
    seeded = dataclasses.replace(entry.config, seeds=config.seeds)
    results.append(run_entry(entry, seeded, folder / entry.label))
  write_tables(config, entries, results, folder)


if __name__ == '__main__':
  flags.run(main, Config, workdir=lambda config: f'runs/{config.item}-{config.scale}')
