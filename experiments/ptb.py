"""Penn Treebank words (Mikolov's preprocessing) as integer arrays.

Reads ptb.train.txt, ptb.valid.txt and ptb.test.txt (or the same names with .gz) and checks that they are the originals. To carry
the data to a machine as one file of plain arrays:

    python -m experiments.ptb --data_dir=FOLDER --output=ptb.npz

and give that file as --data_dir.
"""

import dataclasses
import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple
import zipfile
import zlib

import numpy as np

from experiments import options
from experiments.options import UserError, option

SPLITS = ('train', 'valid', 'test')
SHA256 = {
  'train': 'fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf',
  'valid': 'c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2',
  'test': 'dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0',
}
SOURCE = (
  "the folder simple-examples/data of http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz, or any mirror of Mikolov's files"
)


class Text(NamedTuple):
  """A text in three splits.

  Attributes:
    train: int32 [N], token ids in order; a line ends with '<eos>'.
    valid: the same.
    test: the same.
    vocabulary: the V token strings by id, in order of first appearance in the training text.
  """

  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray
  vocabulary: list[str]


def load(path: Path, check_hashes: bool = True) -> Text:
  """Reads the three text files of a folder, or one .npz that :func:`save` wrote.

  Args:
    path: the folder or the .npz file.
    check_hashes: whether the files must be the original Penn Treebank; otherwise any text of that naming will do.

  Raises:
    UserError: a file is missing, damaged or not the original, or holds words that the training text has not.
  """
  if path.suffix == '.npz':
    return _load_arrays(path, check_hashes)
  lines = {split: _read(path, split, check_hashes) for split in SPLITS}
  tokens = {split: [word for line in lines[split] for word in (*line.split(), '<eos>')] for split in SPLITS}
  ids = {word: number for number, word in enumerate(dict.fromkeys(tokens['train']))}
  unknown = sorted({word for split in SPLITS for word in tokens[split]} - ids.keys())
  if unknown:
    raise UserError(f'{path}: {len(unknown)} words of the validation or test text are not in the training text: {unknown[:5]}.')
  arrays = [np.array([ids[word] for word in tokens[split]], np.int32) for split in SPLITS]
  return Text(*arrays, list(ids))


def save(text: Text, path: Path) -> None:
  """Writes the text as one .npz of plain arrays."""
  np.savez_compressed(path, train=text.train, valid=text.valid, test=text.test, vocabulary=np.array(text.vocabulary))


def fingerprint(text: Text) -> str:
  """sha256 of the three texts' words, whatever files they came from."""
  digest = hashlib.sha256()
  for split in SPLITS:
    digest.update(_as_file(text, split))
  return digest.hexdigest()


def _as_file(text: Text, split: str) -> bytes:
  """The split as the file it came from, Mikolov's layout: a blank before and after each line's words."""
  words = ' '.join(np.array(text.vocabulary)[getattr(text, split)].tolist())
  return ''.join(f' {line.strip()} \n' for line in words.removesuffix('<eos>').split('<eos>')).encode()


def _load_arrays(path: Path, check_hashes: bool) -> Text:
  try:
    with path.open('rb') as raw, np.load(raw) as file:
      text = Text(file['train'], file['valid'], file['test'], file['vocabulary'].tolist())
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(f'{path} is not an array file written by experiments.ptb: {error}') from error
  for split in SPLITS:
    tokens = getattr(text, split)
    if tokens.ndim != 1 or tokens.dtype != np.int32 or not tokens.size:
      raise UserError(f'{path}: {split} must be int32 token ids [N], got {tokens.dtype}{list(tokens.shape)}.')
    if tokens.min() < 0 or tokens.max() >= len(text.vocabulary):
      raise UserError(f'{path}: {split} holds ids {tokens.min()}..{tokens.max()} for a vocabulary of {len(text.vocabulary)}.')
    got = hashlib.sha256(_as_file(text, split)).hexdigest()
    if check_hashes and got != SHA256[split]:
      raise UserError(f'{path}: {split} is not the original text: its sha256 is {got}, {_expected(split)}')
  return text


def _expected(split: str) -> str:
  return f'expected sha256 {SHA256[split]}; get it from {SOURCE}.'


def _read(folder: Path, split: str, check_hash: bool) -> list[str]:
  name = f'ptb.{split}.txt'
  expected = _expected(split) if check_hash else ''
  path = folder / name
  try:
    if path.exists():
      content = path.read_bytes()
    elif path.with_name(name + '.gz').exists():
      path = path.with_name(name + '.gz')
      content = gzip.decompress(path.read_bytes())
    else:
      raise UserError(f'there is no {name} (or {name}.gz) in {folder}; {expected}')
    if check_hash and (got := hashlib.sha256(content).hexdigest()) != SHA256[split]:
      raise UserError(f'{path} is not the original text: its sha256 is {got}, {expected}')
    lines = content.decode().splitlines()
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise UserError(f'{path} cannot be read as text ({error}); {expected}') from error
  if not any(line.split() for line in lines):
    raise UserError(f'{path} is empty; {expected}')
  return lines


@dataclasses.dataclass(frozen=True)
class Config:
  """Where to read and write."""

  data_dir: str = option('', 'folder with the three text files')
  output: str = option('', 'the .npz file to write')

  def __post_init__(self) -> None:
    options.check(bool(self.data_dir), 'data_dir', self.data_dir, 'a folder')
    options.check(self.output.endswith('.npz'), 'output', self.output, 'a file name ending in .npz')


def main(config: Config) -> None:
  """Converts the text files into one file of arrays."""
  text = load(Path(config.data_dir))
  save(text, Path(config.output))
  counts = ', '.join(f'{len(getattr(text, split)):,} {split}' for split in SPLITS)
  print(f'wrote {config.output}: {counts} tokens, vocabulary {len(text.vocabulary):,}')


if __name__ == '__main__':
  options.run(main, Config)
