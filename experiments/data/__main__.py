"""Writes a data set as one .npz of plain arrays, to carry it to a machine without
network or tensorflow-datasets.

    python -m experiments.data --dataset=mnist --data_dir=FOLDER --output=mnist.npz

The file is then given as --data_dir. That of 'ptb' serves by words and by characters.
Files of your own have the same arrays:

  images  train_images, test_images  uint8 [N, height, width, channels]
          train_labels, test_labels  int32 [N], class numbers from 0
  text    train, valid, test         int32 [N], token ids from 0
          vocabulary                 str [V], the token of each id
"""

import dataclasses
from pathlib import Path

from experiments import data
from experiments.core import flags
from experiments.core.flags import UserError, option


@dataclasses.dataclass(frozen=True)
class Config:
  """What to read and where to write it."""

  dataset: str = option('mnist', 'the data set', ('mnist', 'cifar10', 'ptb'))
  data_dir: str = option(
    '',
    'folder with the official files; by default they are downloaded, unless a prepared '
    'copy is there',
  )
  output: str = option('', 'the .npz file to write')

  def __post_init__(self) -> None:
    flags.check_fields(self)
    flags.check(
      self.output.endswith('.npz'), 'output', self.output, 'a file name ending in .npz'
    )


def main(config: Config) -> None:
  """Converts the data set into one file of arrays."""
  if config.dataset == 'ptb':
    found = data.load_text(config.dataset, config.data_dir)
    counts = (
      f'{len(found.train):,} train, {len(found.valid):,} valid, {len(found.test):,} '
      'test tokens'
    )
    counts += f', vocabulary {len(found.vocabulary):,}'
  else:
    found = data.load_images(config.dataset, config.data_dir)
    counts = (
      f'{len(found.train_labels):,} train, {len(found.test_labels):,} test images '
      f'{list(found.train_images.shape[1:])}'
    )
  try:
    data.save(found, Path(config.output))
  except OSError as error:
    raise UserError(f'cannot write --output={config.output}: {error}') from error
  print(f'wrote {config.output}: {counts}')


if __name__ == '__main__':
  flags.run(main, Config)
