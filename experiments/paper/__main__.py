"""One command for each figure and table of the paper.

    python -m experiments.paper --item=table6 --scale=cpu

An item is a list of runs, each in a folder of its own: stop it at any time, the same
command goes on. --tune first tries the declared learning rates on each line (at scale
'short' also numbers of windows), chosen by validation, and later runs of the item in
the same folder use what was found. It ends with a table (mean, ± half the width of its
95 % confidence interval over the seeds, beside the number that the paper has, measured
or quoted, and an independent replication's where the setting is theirs) as text, JSON
and plot.
"""

import dataclasses

from experiments.core import flags, workdir
from experiments.paper import studies
from experiments.paper.entries import chosen_entries, run_entry
from experiments.paper.settings import Config
from experiments.paper.tables import write_tables
from experiments.paper.tuning import tune


def main(config: Config) -> None:
  """Runs what is missing of an item and reports it."""
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
    results.append(
      run_entry(
        entry,
        dataclasses.replace(entry.config, seeds=config.seeds),
        folder / entry.label,
      )
    )
  write_tables(config, entries, results, folder)


if __name__ == '__main__':
  flags.run(main, Config, workdir=lambda config: f'runs/{config.item}-{config.scale}')
