"""Text as token ids, by words or by characters."""

import hashlib
from typing import NamedTuple

import numpy as np

from experiments.options import UserError

SPLITS = ('train', 'valid', 'test')


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


def words(files: dict[str, bytes], where: str) -> Text:
  """The words of ptb.train.txt, ptb.valid.txt and ptb.test.txt.

  Raises:
    UserError: a file is no text or empty, or holds words that the training text has not.
  """
  tokens = {split: _tokens(files[f'ptb.{split}.txt'], f'{where}: ptb.{split}.txt') for split in SPLITS}
  ids = {word: number for number, word in enumerate(dict.fromkeys(tokens['train']))}
  unknown = sorted({word for split in SPLITS for word in tokens[split]} - ids.keys())
  if unknown:
    raise UserError(f'{where}: {len(unknown)} words of the validation or test text are not in the training text: {unknown[:5]}.')
  arrays = [np.array([ids[word] for word in tokens[split]], np.int32) for split in SPLITS]
  return Text(*arrays, list(ids))


def _tokens(content: bytes, where: str) -> list[str]:
  try:
    lines = content.decode().splitlines()
  except ValueError as error:
    raise UserError(f'{where} cannot be read as text ({error}).') from error
  if not any(line.split() for line in lines):
    raise UserError(f'{where} is empty.')
  return [word for line in lines for word in (*line.split(), '<eos>')]


def characters(text: Text) -> Text:
  """The text of :func:`words` by characters: '_' between the words of a line, '<eos>' after it.

  These are the characters of Mikolov's ptb.char.*.txt.
  """
  strings = [''.join(line.replace(' ', '_') + '\n' for line in _lines(text, split)) for split in SPLITS]
  codes = [np.frombuffer(string.encode('utf-32-le'), np.uint32) for string in strings]
  known, first = np.unique(codes[0], return_index=True)  # Every word, so every character, is in the training text.
  order = np.argsort(first)
  ids = np.argsort(order).astype(np.int32)
  vocabulary = [chr(code) if code != ord('\n') else '<eos>' for code in known[order]]
  return Text(*(ids[np.searchsorted(known, code)] for code in codes), vocabulary)


def as_file(text: Text, split: str) -> bytes:
  """The split as the file it came from, Mikolov's layout: a blank before and after each line's words."""
  return ''.join(f' {line} \n' for line in _lines(text, split)).encode()


def _lines(text: Text, split: str) -> list[str]:
  joined = ' '.join(np.array(text.vocabulary)[getattr(text, split)].tolist())
  return [line.strip() for line in joined.removesuffix('<eos>').split('<eos>')]


def checked(text: Text, hashes: dict[str, str], where: str, advice: str) -> Text:
  """`text`, if its ids are valid and it is the text with these hashes by file name; '' stands for any.

  Raises:
    UserError: it is not.
  """
  for split in SPLITS:
    tokens, expected = getattr(text, split), hashes[f'ptb.{split}.txt']
    if tokens.ndim != 1 or tokens.dtype != np.int32 or not tokens.size:
      raise UserError(f'{where}: {split} must be int32 token ids [N], got {tokens.dtype}{list(tokens.shape)}.')
    if tokens.min() < 0 or tokens.max() >= len(text.vocabulary):
      raise UserError(f'{where}: {split} holds ids {tokens.min()}..{tokens.max()} for a vocabulary of {len(text.vocabulary)}.')
    got = hashlib.sha256(as_file(text, split)).hexdigest()
    if expected and got != expected:
      raise UserError(f'{where}: {split} is not the original text: its sha256 is {got}, expected sha256 {expected}; {advice}')
  return text
