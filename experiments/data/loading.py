"""Where a data set is looked for, in which order; keeping it as one .npz of plain
arrays.
"""

from collections.abc import Callable
import hashlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any
import zipfile
import zlib

import numpy as np

from experiments.core.flags import UserError
from experiments.data import images, sources, text
from experiments.data.images import Images
from experiments.data.text import Text

IMAGES = ('mnist', 'cifar10', 'arrays')
TEXTS = ('ptb', 'ptb_chars', 'text', 'text_chars')


def load_images(name: str, data_dir: str | Path = '') -> Images:
  """Reads a set of labelled images.

  Args:
    name: 'mnist' or 'cifar10', whose content is checked, or 'arrays', any .npz with the
      fields of :class:`Images`.
    data_dir: a folder with the official files, or a .npz that :func:`save` wrote; ''
      for a prepared copy or a download.

  Returns:
    :class:`Images` in the official order; only a copy that tensorflow-datasets'
    own builder prepared has its own order.

  Raises:
    ValueError: no such name.
    UserError: nothing is there, or it is damaged or not the original.
  """
  _check_name(name, IMAGES)
  path = _existing(data_dir)
  if name == 'arrays' or path.suffix == '.npz':
    return images.checked(
      Images(**_read_npz(path, Images._fields)), name, str(path), 'write it again.'
    )
  source = sources.SOURCES[name]
  _check_folder(data_dir, source)
  found, path = _prepared(
    source,
    data_dir,
    lambda builders, folder: builders.read_images(name, folder),
    lambda builders, files, folder: builders.write_images(
      name, images.decode(name, files), folder
    ),
  )
  return images.checked(found, name, str(path), 'delete that folder and run again.')


def load_text(name: str, data_dir: str | Path = '') -> Text:
  """Read a text in three splits.

  Args:
    name: 'ptb', the words of the original Penn Treebank (Mikolov's preprocessing), or
      'ptb_chars', its characters; 'text' or 'text_chars', a text of one's own by words
      or by characters, which is read as it is.
    data_dir: a folder with ptb.train.txt, ptb.valid.txt, ptb.test.txt (or .gz), or a
      .npz of the fields of :class:`Text`; '' for a prepared copy or a download of Penn
      Treebank. For a text of one's own also one file (or .gz), which is split in order
      by `text.SHARES`.

  Returns:
    The text as token ids. The .npz of 'ptb' serves 'ptb_chars', too; any other
    one holds the tokens that are asked for.

  Raises:
    ValueError: there is no such name.
    UserError: a file is missing, damaged or not the original.
  """
  _check_name(name, TEXTS)
  path = _existing(data_dir)
  if not name.startswith('ptb'):
    return _own_text(path, by_characters=name == 'text_chars')
  source = sources.SOURCES['ptb']
  if path.suffix == '.npz':
    found = text.checked(_text_of_npz(path), source.files, str(path), source.advice())
  else:
    _check_folder(data_dir, source)
    files, path = _prepared(
      source,
      data_dir,
      lambda builders, folder: builders.read_text(folder),
      lambda builders, *args: builders.write_text(*args),
    )
    found = text.words(text.decode(files, str(path)), str(path))
    found = text.checked(
      found, source.files, str(path), 'delete that folder and run again.'
    )
  return text.word_characters(found, str(path)) if name == 'ptb_chars' else found


def _own_text(path: Path, by_characters: bool) -> Text:
  """Read a text of one's own: three files, one file or a .npz of token ids."""
  where = str(path)
  if path.suffix == '.npz':
    found = text.checked(_text_of_npz(path), sources.ANY_TEXT.files, where, '')
    return text.check_symbols(found, where) if by_characters else found
  if path.is_dir():
    strings = text.decode(sources.find(sources.ANY_TEXT, path), where)
    if by_characters:
      return text.characters([strings[split] for split in text.SPLITS], where)
    return text.words(strings, where)
  string = text.read_file(path)
  shares = ' / '.join(map(str, text.SHARES))
  print(f'{path} is split in order, {shares} % for training, validation and test')
  if by_characters:
    return text.characters(text.divide(string, where), where)
  return text.number_words(text.divide(text.split_words(string, where), where), where)


def _text_of_npz(path: Path) -> Text:
  arrays = _read_npz(path, Text._fields)
  return Text(**{**arrays, 'vocabulary': arrays['vocabulary'].tolist()})


def _existing(data_dir: str | Path) -> Path:
  """Return the path of --data_dir, '.' if none is given.

  Raises:
    UserError: nothing is there.
  """
  path = Path(data_dir).expanduser()
  try:
    path.stat()
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'cannot read --data_dir={data_dir}: {reason}.') from error
  return path


def _check_folder(data_dir: str | Path, source: sources.Source) -> None:
  """Raise unless --data_dir is a folder, where one is given."""
  if data_dir and not Path(data_dir).expanduser().is_dir():
    raise UserError(
      f'--data_dir={data_dir} must be a folder with the files of {source.name}, or a '
      '.npz.'
    )


def save(data: Images | Text, path: Path) -> None:
  """Writes images or a text (by words) as one .npz of plain arrays, for
  :func:`load_images` or :func:`load_text`.
  """
  np.savez_compressed(
    path, **{name: np.asarray(value) for name, value in data._asdict().items()}
  )


def fingerprint(data: Images | Text) -> str:
  """sha256 of the data in their order, whatever files they came from: what makes two
  runs' data the same.
  """
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
  """The prepared copy and where it lies; prepared first, if need be, from the files in
  `data_dir` or from a download.
  """
  try:
    from experiments.data import builders
  except ModuleNotFoundError as error:
    advice = (
      "install what the scripts need with pip install -e '.[experiments]' in the "
      'folder that holds pyproject.toml, '
      'or give as --data_dir a .npz file made by python -m experiments.data.'
    )
    raise UserError(
      f'{source.name} is read through tensorflow-datasets ({error}): {advice}'
    ) from error
  folder = Path(
    os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  ).expanduser()  # the rule of tensorflow-datasets
  try:
    found = read(builders, folder)
    if found is None:
      files = (
        sources.find(source, Path(data_dir).expanduser())
        if data_dir
        else sources.download(source)
      )
      print(f'preparing {source.name} in {folder}', flush=True)
      write(builders, files, folder)
      found = read(builders, folder)
    if found is None:
      raise FileExistsError('there is a copy without its dataset_info.json')
  except builders.DAMAGED as error:
    advice = (
      f'If the copy in {folder / "fptt_jax" / source.name} is damaged, delete that '
      'folder and run again.'
    )
    raise UserError(
      f'cannot prepare or read {source.name} in {folder} (TFDS_DATA_DIR): {error}. '
      f'{advice}'
    ) from error
  return found


def _read_npz(path: Path, fields: tuple[str, ...]) -> dict[str, np.ndarray]:
  try:
    with path.open('rb') as raw, np.load(raw) as file:
      return {name: file[name] for name in fields}
  except (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise UserError(
      f'{path} is not an array file written by experiments.data: {error}'
    ) from error
