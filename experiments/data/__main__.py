"""Write a data set as one .npz file of plain arrays.

The file can be carried to a machine without network or tensorflow-datasets:

    python -m experiments.data --dataset=mnist --data_dir=FOLDER --output=mnist.npz

The scripts read it as --data_dir. The file of 'ptb' serves by words and by characters.
Files with other data must have the same arrays:

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
  """Settings of the command: the data set to read and the file to write."""

  dataset: str = option('mnist', 'the data set', ('mnist', 'cifar10', 'ptb'))
  data_dir: str = option(
    '',
    'folder with the official files; by default they are downloaded, unless a prepared '
    'copy is there',
  )
  output: str = option('', 'the .npz file to write')

  def __post_init__(self) -> None:
    flags.check_fields(self)
    is_npz = self.output.endswith('.npz')
    flags.check(is_npz, 'output', self.output, 'a file name ending in .npz')


def main(config: Config) -> None:
  """Convert a data set into one file of arrays.

  Args:
    config: the data set and the file.

  Raises:
    UserError: the data set cannot be read, or the file cannot be written.
  """
  found: data.Text | data.Images
  if config.dataset == 'ptb':
    found = text = data.load_text(config.dataset, config.data_dir)
    counts = (
      f'{len(text.train):,} train, {len(text.valid):,} valid, {len(text.test):,} '
      f'test tokens, vocabulary {len(text.vocabulary):,}'
    )
  else:
    found = images = data.load_images(config.dataset, config.data_dir)
    counts = (
      f'{len(images.train_labels):,} train, {len(images.test_labels):,} test images '
      f'{list(images.train_images.shape[1:])}'
    )
  try:
    data.save(found, Path(config.output))
  except OSError as error:
    raise UserError(f'cannot write --output={config.output}: {error}') from error
  print(f'wrote {config.output}: {counts}')


if __name__ == '__main__':
  flags.run(main, Config)
