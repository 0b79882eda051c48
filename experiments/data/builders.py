"""The data sets as tensorflow-datasets keeps them, written and read without TensorFlow.

tensorflow-datasets' own builders need TensorFlow to prepare MNIST and CIFAR-10, and
read one example at a time. Ours, 'fptt_jax', writes records of many examples, in the
official order; it is given the content, checked before.
"""

from collections.abc import Iterator
import contextlib
import io
from pathlib import Path
from typing import Any, ClassVar

from absl import logging
from google.protobuf import json_format
import numpy as np
import tensorflow_datasets as tfds

from experiments.data import images, text

BLOCK = 1000  # images a record
DAMAGED = (
  OSError,
  ValueError,
  LookupError,
  RuntimeError,
  AssertionError,
  json_format.Error,
)  # What reading a damaged copy raises.


class FpttJax(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """MNIST and CIFAR-10 in records of 1,000 images, Penn Treebank in one record a
  split.
  """

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS: ClassVar = [
    tfds.core.BuilderConfig(name=name) for name in ('mnist', 'cifar10', 'ptb')
  ]

  def __init__(
    self, *, splits: dict[str, list[dict[str, Any]]] | None = None, **settings: Any
  ):
    self._splits = splits
    super().__init__(**settings)

  def _info(self) -> tfds.core.DatasetInfo:
    if self.builder_config.name == 'ptb':
      features = {'text': tfds.features.Text()}
    else:
      shape = (
        (None, 28, 28, 1) if self.builder_config.name == 'mnist' else (None, 32, 32, 3)
      )
      features = {
        'image': tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding='bytes')
      }
      features['label'] = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    return {split: self._generate_examples(split) for split in self._splits}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(self._splits[split])


def _builder(name: str, folder: Path, **settings: Any) -> FpttJax:
  """The builder, without its warning that there is nothing prepared yet."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    return FpttJax(config=name, data_dir=folder, **settings)
  finally:
    logging.set_verbosity(verbosity)


def write_images(name: str, arrays: images.Images, folder: Path) -> None:
  """Prepares 'mnist' or 'cifar10'."""
  splits = {}
  for split, pixels, labels in (('train', *arrays[:2]), ('test', *arrays[2:])):
    starts = range(0, len(labels), BLOCK)
    splits[split] = [
      {'image': pixels[n : n + BLOCK], 'label': labels[n : n + BLOCK]} for n in starts
    ]
  _write(name, splits, folder)


def write_text(files: dict[str, bytes], folder: Path) -> None:
  """Prepares 'ptb'."""
  _write(
    'ptb',
    {split: [{'text': files[f'ptb.{split}.txt']}] for split in text.SPLITS},
    folder,
  )


def _write(name: str, splits: dict[str, list[dict[str, Any]]], folder: Path) -> None:
  """Writes into a temporary folder, renamed when it is whole; two at once do no
  harm.
  """
  builder = _builder(name, folder, splits=splits)
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(
      io.StringIO()
    ):  # It says 'downloading', which it does not.
      builder.download_and_prepare(download_config=config, file_format='array_record')
  except OSError:
    if not _is_prepared(builder):  # Otherwise another process was first.
      raise


def _is_prepared(builder: FpttJax) -> bool:
  return (
    Path(builder.data_dir) / 'dataset_info.json'
  ).exists()  # The builder's own is_prepared() warns where nothing is.


def read_images(name: str, folder: Path) -> tuple[images.Images, Path] | None:
  """The prepared 'mnist' or 'cifar10' and where it lies, if it is there; else
  tensorflow-datasets' own, shuffled as it is.
  """
  builder = _builder(name, folder)
  if _is_prepared(builder):
    parts = {split: list(builder.as_data_source(split)) for split in ('train', 'test')}
    arrays = [
      np.concatenate([block[key] for block in parts[split]])
      for split in parts
      for key in ('image', 'label')
    ]
    return images.Images(*arrays), Path(builder.data_dir)
  for path in sorted(folder.glob(f'{name}/[0-9]*'), reverse=True):
    if any(path.glob('*.array_record*')) and (path / 'dataset_info.json').exists():
      stock = tfds.builder_from_directory(path)
      parts = {split: list(stock.as_data_source(split)) for split in ('train', 'test')}
      arrays = [
        np.stack([example[key] for example in parts[split]])
        for split in parts
        for key in ('image', 'label')
      ]
      return images.Images(
        arrays[0], arrays[1].astype(np.int32), arrays[2], arrays[3].astype(np.int32)
      ), path
  return None


def read_text(folder: Path) -> tuple[dict[str, bytes], Path] | None:
  """The prepared files of 'ptb' by name and where they lie, if they are there."""
  builder = _builder('ptb', folder)
  if not _is_prepared(builder):
    return None
  files = {
    f'ptb.{split}.txt': builder.as_data_source(split)[0]['text']
    for split in text.SPLITS
  }
  return files, Path(builder.data_dir)
