"""Where a data set is looked for, in which order; keeping it as one .npz of plain arrays."""

from collections.abc import Callable
import hashlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any
import zipfile
import zlib

import numpy as np

from experiments.data import images, sources, text
from experiments.data.images import Images
from experiments.data.text import Text
from experiments.options import UserError

IMAGES = ('mnist', 'cifar10', 'arrays')
TEXTS = ('ptb', 'ptb_chars', 'text', 'text_chars')


def load_images(name: str, data_dir: str | Path = '') -> Images:
  """Reads a set of labelled images.

  Args:
    name: 'mnist' or 'cifar10', whose content is checked, or 'arrays', any .npz with the fields of :class:`Images`.
    data_dir: a folder with the official files, or a .npz that :func:`save` wrote; '' for a prepared copy or a download.

  Returns:
    :class:`Images` in the official order; only a copy that tensorflow-datasets' own builder prepared has its own order.

  Raises:
    ValueError: no such name.
    UserError: nothing is there, or it is damaged or not the original.
  """
  _check_name(name, IMAGES)
  path = Path(data_dir).expanduser()
  if name == 'arrays' or path.suffix == '.npz':
    return images.checked(Images(**_read_npz(path, Images._fields)), name, str(path), 'write it again.')
  found, path = _prepared(
    sources.SOURCES[name],
    data_dir,
    lambda builders, folder: builders.read_images(name, folder),
    lambda builders, files, folder: builders.write_images(name, images.decode(name, files), folder),
  )
  return images.checked(found, name, str(path), 'delete that folder and run again.')


def load_text(name: str, data_dir: str | Path = '') -> Text:
  """Reads a text in three splits.

  Args:
    name: 'ptb', the words of the original Penn Treebank (Mikolov's preprocessing), or 'text', any three files of that naming,
      which are read as they are; 'ptb_chars' and 'text_chars' are the same by characters.
    data_dir: a folder with ptb.train.txt, ptb.valid.txt, ptb.test.txt (or .gz), or a .npz that :func:`save` wrote of words;
      '' for a prepared copy or a download.

  Raises:
    ValueError: no such name.
    UserError: a file is missing, damaged or not the original, or holds words that the training text has not.
  """
  _check_name(name, TEXTS)
  path = Path(data_dir).expanduser()
  source = sources.SOURCES['ptb'] if name.startswith('ptb') else sources.ANY_TEXT
  if path.suffix == '.npz':
    arrays = _read_npz(path, Text._fields)
    found = Text(**{**arrays, 'vocabulary': arrays['vocabulary'].tolist()})
    found = text.checked(found, source.files, str(path), source.described(source.files))
  elif source is sources.ANY_TEXT:
    found = text.words(sources.find(source, path), str(path))
  else:
    files, path = _prepared(
      source, data_dir, lambda builders, folder: builders.read_text(folder), lambda builders, *args: builders.write_text(*args)
    )
    found = text.checked(text.words(files, str(path)), source.files, str(path), 'delete that folder and run again.')
  return text.characters(found) if name.endswith('_chars') else found


def save(data: Images | Text, path: Path) -> None:
  """Writes images or a text (by words) as one .npz of plain arrays, for :func:`load_images` or :func:`load_text`."""
  np.savez_compressed(path, **{name: np.asarray(value) for name, value in data._asdict().items()})


def fingerprint(data: Images | Text) -> str:
  """sha256 of the data in their order, whatever files they came from: what makes two runs' data the same."""
  digest = hashlib.sha256()
  if isinstance(data, Text):
    for split in text.SPLITS:
      digest.update(text.as_file(data, split))
  else:
    for array in data:
      digest.update(repr(array.shape).encode())
      digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()


def _check_name(name: str, names: tuple[str, ...]) -> None:
  if name not in names:
    raise ValueError(f'the data set must be one of {", ".join(names)}, got {name!r}.')


def _prepared(
  source: sources.Source,
  data_dir: str | Path,
  read: Callable[[ModuleType, Path], tuple[Any, Path] | None],
  write: Callable[[ModuleType, dict[str, bytes], Path], None],
) -> tuple[Any, Path]:
  """The prepared copy and where it lies; prepared first, if need be, from the files in `data_dir` or from a download."""
  try:
    from experiments.data import builders
  except ModuleNotFoundError as error:
    advice = "install it with pip install 'fptt-jax[experiments]', or give as --data_dir a .npz of python -m experiments.data."
    raise UserError(f'{source.name} is read through tensorflow-datasets ({error}): {advice}') from error
  folder = Path(os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')).expanduser()  # the rule of tensorflow-datasets
  try:
    found = read(builders, folder)
    if found is None:
      files = sources.find(source, Path(data_dir).expanduser()) if data_dir else sources.download(source)
      print(f'preparing {source.name} in {folder}', flush=True)
      write(builders, files, folder)
      found = read(builders, folder)
    if found is None:
      raise FileExistsError('there is a copy without its dataset_info.json')
  except builders.DAMAGED as error:
    advice = f'If the copy in {folder / "fptt_jax" / source.name} is damaged, delete that folder and run again.'
    raise UserError(f'cannot prepare or read {source.name} in {folder} (TFDS_DATA_DIR): {error}. {advice}') from error
  return found


def _read_npz(path: Path, fields: tuple[str, ...]) -> dict[str, np.ndarray]:
  try:
    with path.open('rb') as raw, np.load(raw) as file:
      return {name: file[name] for name in fields}
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(f'{path} is not an array file written by experiments.data: {error}') from error
