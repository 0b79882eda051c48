"""Loading of data sets from their possible places, and saving as one .npz file."""

from collections.abc import Callable
import hashlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from experiments.core import files
from experiments.core.flags import UserError
from experiments.data import images, sources, text
from experiments.data.images import Images
from experiments.data.text import Text

IMAGES = ('mnist', 'cifar10', 'arrays')
"""Names that :func:`load_images` accepts."""


TEXTS = ('ptb', 'ptb_chars', 'text', 'text_chars')
"""Names that :func:`load_text` accepts."""


def load_images(name: str, data_dir: str | Path = '') -> Images:
  """Read a set of labeled images.

  Args:
    name: 'mnist' or 'cifar10', whose content is checked, or 'arrays', any .npz with the
      fields of :class:`Images`.
    data_dir: a folder with the official files, or a .npz that :func:`save` wrote; ''
      for a prepared copy or a download.

  Returns:
    The images in the official order. A copy that tensorflow-datasets' own builder
    prepared has another order.

  Raises:
    ValueError: there is no such name.
    UserError: a file is missing, damaged or not the original.
  """
  _check_name(name, IMAGES)
  path = _existing(data_dir)
  if name == 'arrays' or path.suffix == '.npz':
    arrays = Images(**_read_npz(path, Images._fields))
    return images.checked(arrays, name, str(path), 'write it again.')
  source = sources.SOURCES[name]
  _check_folder(data_dir, source)

  def read(builders: Any, folder: Path) -> tuple[Images, Path] | None:
    return builders.read_images(name, folder)

  def write(builders: Any, files: dict[str, bytes], folder: Path) -> None:
    builders.write_images(name, images.decode(name, files), folder)

  found, path = _prepared(source, data_dir, read, write)
  # Our own copies were checked when they were written, but those of others were not.
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
  """Read a text from the .npz file that :func:`save` wrote."""
  arrays = _read_npz(path, Text._fields)
  return Text(
    arrays['train'], arrays['valid'], arrays['test'], arrays['vocabulary'].tolist()
  )


def _existing(data_dir: str | Path) -> Path:
  """Return the path of --data_dir, '.' if none is given.

  Raises:
    UserError: nothing is there.
  """
  path = Path(data_dir).expanduser()
  # A wrong path is reported as such, before any other reason why nothing is found.
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
  """Write a data set as one .npz of plain arrays.

  Args:
    data: images, or a text by words.
    path: the file, which :func:`load_images` or :func:`load_text` reads.

  Raises:
    OSError: the file cannot be written.
  """
  arrays: dict[str, Any] = {
    name: np.asarray(value) for name, value in data._asdict().items()
  }
  np.savez_compressed(path, **arrays)


def fingerprint(data: Images | Text) -> str:
  """Return the SHA-256 of a data set.

  It depends on the content and its order, not on the files that it was read from. Two
  runs with the same fingerprint have the same data.
  """
  digest = hashlib.sha256()
  if isinstance(data, Text):
    for split in text.SPLITS:
      digest.update(text.as_file(data, split))
  else:
    for array in data:
      # Without the shape, images of other sizes could have the same bytes.
      digest.update(repr(array.shape).encode())
      digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()


def _check_name(name: str, names: tuple[str, ...]) -> None:
  """Raise ValueError unless a name is among the accepted ones."""
  if name not in names:
    raise ValueError(f'the data set must be one of {", ".join(names)}, got {name!r}.')


def _prepared(
  source: sources.Source,
  data_dir: str | Path,
  read: Callable[[ModuleType, Path], tuple[Any, Path] | None],
  write: Callable[[ModuleType, dict[str, bytes], Path], None],
) -> tuple[Any, Path]:
  """Read a prepared copy, and prepare it first if there is none.

  Args:
    source: the official files.
    data_dir: folder with the official files; '' downloads them.
    read: (module `builders`, folder of tensorflow-datasets) -> (data, folder of the
      copy), or None if there is no copy.
    write: (module `builders`, official files, folder of tensorflow-datasets) -> None;
      prepares the copy.

  Returns:
    (data, folder of the copy).

  Raises:
    UserError: tensorflow-datasets is not installed, the files are missing or damaged,
      or the copy cannot be written or read.
  """
  # Imported late: a .npz file is read without tensorflow-datasets, whose import takes
  # seconds.
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
  # The rule of tensorflow-datasets.
  given = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  folder = Path(given).expanduser()
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
  """Read arrays from a .npz file by name.

  Raises:
    UserError: the file cannot be read, or an array is missing.
  """
  try:
    arrays = files.read_npz(path)
    return {name: arrays[name] for name in fields}
  except files.NPZ_ERRORS as error:
    raise UserError(
      f'{path} is not an array file written by experiments.data: {error}'
    ) from error
