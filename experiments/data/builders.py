"""Prepared copies in the format of tensorflow-datasets, without TensorFlow.

The builders of tensorflow-datasets need TensorFlow to prepare MNIST and CIFAR-10, and
they read one example at a time. Our builder, 'fptt_jax', writes records of many
examples in the official order. It receives content that has been checked.
"""

from collections.abc import Callable, Iterator
import contextlib
import io
from pathlib import Path
from typing import Any, ClassVar

from absl import logging
from google.protobuf import json_format
import numpy as np
import tensorflow_datasets as tfds

from experiments.data import images, text

BLOCK = 1000
"""Number of images per record; one record per image is slow to read."""


DAMAGED = (
  OSError,
  ValueError,
  LookupError,
  RuntimeError,
  AssertionError,
  json_format.Error,
)
"""Exceptions of tensorflow-datasets when it reads a damaged copy."""


# Registered, it would be listed among the public data sets.
with tfds.core.registered.skip_registration():

  class FpttJax(tfds.core.GeneratorBasedBuilder):
    """Builder of MNIST, CIFAR-10 and Penn Treebank.

    Images are in records of 1,000. Penn Treebank has one record per split.
    """

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS: ClassVar = [
      tfds.core.BuilderConfig(name=name) for name in ('mnist', 'cifar10', 'ptb')
    ]

    def __init__(
      self, *, splits: dict[str, list[dict[str, Any]]] | None = None, **settings: Any
    ):
      """Open the builder of a data set.

      Args:
        splits: records by split, for writing; None for reading.
        **settings: `config`, the name of the data set, and `data_dir`.
      """
      # A builder that only reads has nothing to generate.
      self._splits = splits or {}
      super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
      """Return the features of a record."""
      features: dict[str, Any]
      if self.builder_config.name == 'ptb':
        features = {'text': tfds.features.Text()}
      else:
        sizes = {'mnist': (28, 28, 1), 'cifar10': (32, 32, 3)}
        # The last record may be shorter, hence None.
        shape = (None, *sizes[self.builder_config.name])
        pixels = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding='bytes')
        labels = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        features = {'image': pixels, 'label': labels}
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      """Return the generator of the records of each split."""
      return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
      """Yield the records of a split with their numbers."""
      yield from enumerate(self._splits[split])


def _builder(name: str, folder: Path, **settings: Any) -> FpttJax:
  """Return the builder of a data set without its warnings.

  Args:
    name: 'mnist', 'cifar10' or 'ptb'.
    folder: folder of tensorflow-datasets.
    **settings: `splits`, for writing.
  """
  # It warns if nothing is prepared yet, which is the normal case at the first run.
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    return FpttJax(config=name, data_dir=folder, **settings)
  finally:
    logging.set_verbosity(verbosity)


def write_images(name: str, arrays: images.Images, folder: Path) -> None:
  """Prepare a copy of 'mnist' or 'cifar10'.

  Args:
    name: the data set.
    arrays: its images in the official order.
    folder: folder of tensorflow-datasets.
  """
  splits = {}
  for split, pixels, labels in (('train', *arrays[:2]), ('test', *arrays[2:])):
    starts = range(0, len(labels), BLOCK)
    splits[split] = [
      {'image': pixels[n : n + BLOCK], 'label': labels[n : n + BLOCK]} for n in starts
    ]
  _write(name, splits, folder)


def write_text(files: dict[str, bytes], folder: Path) -> None:
  """Prepare a copy of 'ptb'.

  Args:
    files: content of ptb.train.txt, ptb.valid.txt and ptb.test.txt.
    folder: folder of tensorflow-datasets.
  """
  splits = {split: [{'text': files[f'ptb.{split}.txt']}] for split in text.SPLITS}
  _write('ptb', splits, folder)


def _write(name: str, splits: dict[str, list[dict[str, Any]]], folder: Path) -> None:
  """Write a prepared copy.

  tensorflow-datasets writes to a temporary folder and renames it when it is complete,
  so two processes may prepare the same data set at once.

  Args:
    name: the data set.
    splits: records by split.
    folder: folder of tensorflow-datasets.
  """
  builder = _builder(name, folder, splits=splits)
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  tfds.disable_progress_bar()
  try:
    # It prints that it downloads, although it does not.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_config=config, file_format='array_record')
  except OSError:
    # The renaming fails if another process was faster; its copy is as good.
    if not _is_prepared(builder):
      raise


def _is_prepared(builder: FpttJax) -> bool:
  """Return whether a builder's copy is complete."""
  # The builder's own is_prepared() prints a warning if there is none.
  return (Path(builder.data_dir) / 'dataset_info.json').exists()


def read_images(name: str, folder: Path) -> tuple[images.Images, Path] | None:
  """Read a prepared copy of 'mnist' or 'cifar10'.

  Our own copy comes first. A copy of tensorflow-datasets is shuffled and stays so.

  Args:
    name: the data set.
    folder: folder of tensorflow-datasets.

  Returns:
    (images, folder of the copy), or None if there is no copy.
  """
  builder = _builder(name, folder)
  if _is_prepared(builder):
    return _read_arrays(builder, np.concatenate), Path(builder.data_dir)
  # The newest version first; other file formats need TensorFlow.
  for path in sorted(folder.glob(f'{name}/[0-9]*'), reverse=True):
    if any(path.glob('*.array_record*')) and (path / 'dataset_info.json').exists():
      return _read_arrays(tfds.builder_from_directory(path), np.stack), path
  return None


def _read_arrays(
  builder: Any, join: Callable[[list[np.ndarray]], np.ndarray]
) -> images.Images:
  """Read all records of a builder.

  Args:
    builder: a prepared builder.
    join: `np.concatenate` for records of many examples, `np.stack` for single examples.
  """
  parts = {}
  for split in ('train', 'test'):
    records = list(builder.as_data_source(split))
    parts[f'{split}_images'] = join([record['image'] for record in records])
    # tensorflow-datasets' own labels are int64.
    labels = join([record['label'] for record in records])
    parts[f'{split}_labels'] = labels.astype(np.int32)
  return images.Images(**parts)


def read_text(folder: Path) -> tuple[dict[str, bytes], Path] | None:
  """Read a prepared copy of 'ptb'.

  Args:
    folder: folder of tensorflow-datasets.

  Returns:
    (content of the files by name, folder of the copy), or None if there is no copy.
  """
  builder = _builder('ptb', folder)
  if not _is_prepared(builder):
    return None
  files = {
    f'ptb.{split}.txt': builder.as_data_source(split)[0]['text']
    for split in text.SPLITS
  }
  return files, Path(builder.data_dir)
