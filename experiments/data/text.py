"""Text as token ids, by words or by characters."""

from collections.abc import Sequence
import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple
import zlib

import numpy as np

from experiments.core.flags import UserError

SPLITS = ('train', 'valid', 'test')
"""Names of the three parts of a text."""


END_OF_LINE = '<eos>'
"""Token at the end of each line."""


UNKNOWN = '<unk>'
"""Token of words and characters that the training text does not have."""


SYMBOLS = {' ': '_', '\n': END_OF_LINE, '_': '<underscore>'}
"""Characters whose symbol is not the character itself.

The blank and the end of a line are named as in Mikolov's ptb.char.*.txt. The underscore
has a name of its own, so that no two characters share a symbol.
"""


SHARES = (90, 5, 5)
"""Shares of the training, validation and test text in a single file, in percent."""


class Text(NamedTuple):
  """A text in three splits.

  Attributes:
    train: int32 [N], token ids of the training text in order.
    valid: token ids of the validation text.
    test: token ids of the test text.
    vocabulary: the V token strings by id, in order of first appearance in the training
      text. '<unk>' is added at the end if another split needs it and the training text
      does not have it.
  """

  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray
  vocabulary: list[str]


def decode(files: dict[str, bytes], where: str) -> dict[str, str]:
  """Decode the three files of a text.

  Args:
    files: the content of ptb.train.txt, ptb.valid.txt and ptb.test.txt.
    where: the folder, for messages.

  Returns:
    The text by split, with each character that the file has.

  Raises:
    UserError: a file is not UTF-8 text.
  """
  names = {split: f'ptb.{split}.txt' for split in SPLITS}
  return {
    split: _decode(files[name], f'{where}: {name}') for split, name in names.items()
  }


def read_file(path: Path) -> str:
  """Read one text file, unzipped if its name ends in .gz.

  Raises:
    UserError: the file cannot be read or is not UTF-8 text.
  """
  try:
    content = path.read_bytes()
    if path.suffix == '.gz':
      content = gzip.decompress(content)
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f'{path} cannot be read ({error}).') from error
  return _decode(content, str(path))


def _decode(content: bytes, where: str) -> str:
  """Return the text of a file's content.

  Raises:
    UserError: the content is not UTF-8 text.
  """
  try:
    return content.decode()
  except ValueError as error:
    raise UserError(f'{where} cannot be read as text in UTF-8 ({error}).') from error


def divide(tokens: Sequence[str], where: str) -> list[Sequence[str]]:
  """Cut a text into training, validation and test text, in order, by `SHARES`.

  Args:
    tokens: words or characters.
    where: the file, for messages.

  Returns:
    The three parts; put end to end they are the text.

  Raises:
    UserError: the text is too short for three parts.
  """
  ends = [len(tokens) * share // 100 for share in np.cumsum(SHARES)]
  starts = [0, *ends[:-1]]
  parts = [tokens[start:end] for start, end in zip(starts, ends, strict=True)]
  if not all(parts):
    shares = ' / '.join(map(str, SHARES))
    raise UserError(
      f'{where} holds {len(tokens)} tokens, too few to be split into {shares} %.'
    )
  return parts


def split_words(string: str, where: str) -> list[str]:
  """Split a text at blanks of any kind; '<eos>' ends each line.

  A byte order mark at the beginning is not part of the first word.

  Raises:
    UserError: the text has no words.
  """
  lines = [line.split() for line in string.removeprefix('\ufeff').splitlines()]
  if not any(lines):
    raise UserError(f'{where} is empty.')
  return [word for line in lines for word in (*line, END_OF_LINE)]


def words(strings: dict[str, str], where: str) -> Text:
  """Read a text by words.

  Words of the validation or test text that are not in the training text become '<unk>';
  how many these are is printed.

  Args:
    strings: the text by split.
    where: the folder, for messages.

  Returns:
    The text as token ids.

  Raises:
    UserError: a split has no words.
  """
  parts = [split_words(strings[split], f'{where}: ptb.{split}.txt') for split in SPLITS]
  return number_words(parts, where)


def number_words(parts: Sequence[Sequence[str]], where: str) -> Text:
  """Number the words of the three parts; see :func:`words`."""
  # A dictionary keeps the order of first appearance, unlike a set.
  ids = {word: number for number, word in enumerate(dict.fromkeys(parts[0]))}
  strangers = [sum(word not in ids for word in part) for part in parts]
  if any(strangers):
    unknown = ids.setdefault(UNKNOWN, len(ids))
    _tell_unknown(where, 'words', strangers)
  else:
    unknown = -1
  train, valid, test = (
    np.array([ids.get(word, unknown) for word in part], np.int32) for part in parts
  )
  return Text(train, valid, test, list(ids))


def _tell_unknown(where: str, kind: str, counts: Sequence[int]) -> None:
  """Print how many tokens of the validation and test text become '<unk>'."""
  print(
    f'{where}: {counts[1]:,} {kind} of the validation text and {counts[2]:,} of the '
    f'test text are not in the training text and read as {UNKNOWN}'
  )


def characters(parts: Sequence[Sequence[str]], where: str) -> Text:
  """Read a text by characters; each character is a token.

  A character is a Unicode code point. Blanks, tabs, carriage returns and a byte order
  mark are characters like all others. Those in `SYMBOLS` have a name in the vocabulary.
  Characters of the validation or test text that are not in the training text become
  '<unk>', and their number is printed.

  Args:
    parts: training, validation and test text.
    where: the folder or file, for messages.

  Returns:
    The text as token ids.

  Raises:
    UserError: a part is empty.
  """
  for split, part in zip(SPLITS, parts, strict=True):
    if not part:
      raise UserError(f'{where}: the {split} text is empty.')
  # Arrays of code points, since a loop over millions of characters would be slow.
  codes = [
    np.frombuffer(''.join(part).encode('utf-32-le'), np.uint32) for part in parts
  ]
  known, first = np.unique(codes[0], return_index=True)
  # `unique` sorts by code point; ids are in order of first appearance.
  order = np.argsort(first)
  vocabulary = [SYMBOLS.get(chr(code), chr(code)) for code in known[order]]
  ids = np.argsort(order).astype(np.int32)
  places = [np.minimum(np.searchsorted(known, code), len(known) - 1) for code in codes]
  strangers = [known[place] != code for place, code in zip(places, codes, strict=True)]
  arrays = [
    np.where(strange, np.int32(len(vocabulary)), ids[place])
    for place, strange in zip(places, strangers, strict=True)
  ]
  if any(strange.any() for strange in strangers):
    vocabulary.append(UNKNOWN)
    _tell_unknown(where, 'characters', [int(strange.sum()) for strange in strangers])
  train, valid, test = arrays
  return Text(train, valid, test, vocabulary)


def word_characters(text: Text, where: str) -> Text:
  """Read the words of a text by characters, with one blank between words of a line.

  For Penn Treebank these are the characters of Mikolov's ptb.char.*.txt, which have no
  blanks at the beginning or the end of a line.
  """
  parts = []
  for split in SPLITS:
    lines = as_file(text, split).decode().splitlines()
    parts.append(''.join(line.strip(' ') + '\n' for line in lines))
  return characters(parts, where)


def as_file(text: Text, split: str) -> bytes:
  """Return a split in Mikolov's layout, with a blank before and after each token."""
  pieces = ['\n ' if token == END_OF_LINE else f'{token} ' for token in text.vocabulary]
  written = ' ' + ''.join([pieces[token] for token in getattr(text, split).tolist()])
  return (written[:-1] if written.endswith('\n ') else written).encode()


def decode_tokens(
  tokens: Sequence[int], vocabulary: Sequence[str], by_characters: bool
) -> str:
  """Return token ids as text; characters give exactly the text that was read.

  Args:
    tokens: the ids.
    vocabulary: the token strings by id.
    by_characters: whether a token is a character.

  Returns:
    The text. Words have one blank between them and a line break for '<eos>'.
  """
  symbols = [vocabulary[token] for token in tokens]
  if not by_characters:
    pieces = ['\n' if symbol == END_OF_LINE else f'{symbol} ' for symbol in symbols]
    return ''.join(pieces).replace(' \n', '\n')
  meaning = {symbol: character for character, symbol in SYMBOLS.items()}
  return ''.join(meaning.get(symbol, symbol) for symbol in symbols)


def encode_prompt(
  prompt: str, vocabulary: Sequence[str], by_characters: bool
) -> list[int]:
  """Read a text as token ids of a vocabulary.

  Args:
    prompt: the text.
    vocabulary: the token strings by id.
    by_characters: whether a token is a character.

  Returns:
    The ids; tokens that are not in the vocabulary become '<unk>'.

  Raises:
    UserError: the vocabulary has neither the token nor '<unk>'.
  """
  ids = {symbol: number for number, symbol in enumerate(vocabulary)}
  if by_characters:
    tokens = list(prompt)
    symbols = [SYMBOLS.get(token, token) for token in tokens]
  else:
    tokens = symbols = prompt.replace('\n', f' {END_OF_LINE} ').split()
  if UNKNOWN not in ids:
    for token, symbol in zip(tokens, symbols, strict=True):
      if symbol not in ids:
        raise UserError(f'--prompt holds {token!r}, which is not in the vocabulary.')
  return [ids[symbol] if symbol in ids else ids[UNKNOWN] for symbol in symbols]


def checked(text: Text, hashes: dict[str, str], where: str, advice: str) -> Text:
  """Return a text after a check of its ids, its vocabulary and its content.

  Args:
    text: the text.
    hashes: SHA-256 by the name of the file; '' accepts any text.
    where: the folder or file, for messages.
    advice: end of the message about a text that is not the original.

  Raises:
    UserError: the ids or the vocabulary are invalid, or the text has another hash.
  """
  size = len(text.vocabulary)
  are_strings = all(isinstance(token, str) for token in text.vocabulary)
  if len(set(text.vocabulary)) != size or not are_strings:
    raise UserError(f'{where}: vocabulary must be str [V], all different.')
  for split in SPLITS:
    tokens = getattr(text, split)
    expected = hashes[f'ptb.{split}.txt']
    if tokens.ndim != 1 or tokens.dtype != np.int32 or not tokens.size:
      got = f'{tokens.dtype}{list(tokens.shape)}'
      raise UserError(f'{where}: {split} must be int32 token ids [N], got {got}.')
    if tokens.min() < 0 or tokens.max() >= size:
      got = f'{tokens.min()}..{tokens.max()}'
      raise UserError(f'{where}: {split} holds ids {got} for a vocabulary of {size}.')
    if not expected:
      continue
    found = hashlib.sha256(as_file(text, split)).hexdigest()
    if found != expected:
      raise UserError(
        f'{where}: {split} is not the original text: its sha256 is {found}, expected '
        f'sha256 {expected}; {advice}'
      )
  return text


def check_symbols(text: Text, where: str) -> Text:
  """Return a text after a check that its tokens can be characters.

  Raises:
    UserError: the vocabulary holds words.
  """
  named = {*SYMBOLS.values(), UNKNOWN}
  found = [token for token in text.vocabulary if len(token) > 1 and token not in named]
  if found:
    raise UserError(
      f'{where}: vocabulary holds words such as {found[0]!r}, not characters; read it '
      'by words, or give the text itself.'
    )
  return text
