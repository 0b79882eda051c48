"""Official files of the data sets: names, hashes, addresses, and how to read them.

The hashes of MNIST's files and of CIFAR-10's archive are those that tensorflow-datasets
lists. The hashes of Penn Treebank are those of Mikolov's simple-examples. The files
within CIFAR-10's archive have hashes of their own, so any packing is accepted.
"""

import gzip
import hashlib
import http.client
import lzma
from pathlib import Path, PurePosixPath
import shutil
import tarfile
import tempfile
from typing import NamedTuple
import urllib.request
import zlib

from experiments.core.flags import UserError

TIMEOUT = 5.0
"""Seconds without a byte after which a download fails."""


TRIES = 2
"""Number of attempts to download a file."""


DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError)
"""Exceptions of the standard library when it reads a damaged file."""


class Source(NamedTuple):
  """Files of a data set.

  Attributes:
    name: name of the data set's folder within a folder of several data sets.
    files: SHA-256 by the name of the file; '' accepts any content.
    urls: SHA-256 of the downloads, or '', by address.
    archive: name, without its ending, of a tar archive with the files; '' if there is
      none.
    inside: folder within the archive.
  """

  name: str
  files: dict[str, str]
  urls: dict[str, str]
  archive: str = ''
  inside: str = ''

  def advice(self, name: str = '') -> str:
    """Return advice where to get one file, or all files if no name is given."""
    addresses = [url for url in self.urls if PurePosixPath(url).name == name]
    addresses = addresses or list(self.urls)
    # Several files have one folder, which is shorter than a list of addresses.
    if len(addresses) > 1:
      addresses = [addresses[0].rpartition('/')[0] + '/']
    return f'get it from {addresses[0]}' if addresses else 'put it there'


def _mnist() -> Source:
  """Return the files of MNIST."""
  files = {
    'train-images-idx3-ubyte.gz': '440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609',
    'train-labels-idx1-ubyte.gz': '3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c',
    't10k-images-idx3-ubyte.gz': '8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6',
    't10k-labels-idx1-ubyte.gz': 'f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6',
  }
  # The mirror that tensorflow-datasets downloads from, too.
  base = 'https://storage.googleapis.com/cvdf-datasets/mnist/'
  urls = {base + name: sha256 for name, sha256 in files.items()}
  return Source('mnist', files, urls)


def _cifar10() -> Source:
  """Return the files of CIFAR-10."""
  files = {
    'data_batch_1.bin': 'cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5',
    'data_batch_2.bin': 'a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed',
    'data_batch_3.bin': 'bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67',
    'data_batch_4.bin': '014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48',
    'data_batch_5.bin': '755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add',
    'test_batch.bin': '8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b',
  }
  url = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
  archive_hash = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
  return Source(
    'cifar10', files, {url: archive_hash}, 'cifar-10-binary', 'cifar-10-batches-bin'
  )


def _ptb() -> Source:
  """Return the files of Penn Treebank."""
  files = {
    'ptb.train.txt': 'fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf',
    'ptb.valid.txt': 'c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2',
    'ptb.test.txt': 'dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0',
  }
  url = 'http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz'
  return Source('ptb', files, {url: ''}, 'simple-examples', 'simple-examples/data')


SOURCES = {source.name: source for source in (_mnist(), _cifar10(), _ptb())}
"""Data sets whose content is checked, by name."""


ANY_TEXT = SOURCES['ptb']._replace(
  files=dict.fromkeys(SOURCES['ptb'].files, ''), urls={}, archive='', inside=''
)
"""Any text in three files with the names of Penn Treebank's."""


def find(source: Source, folder: Path) -> dict[str, bytes]:
  """Find and check the files of a data set.

  They may be in `folder` or in its folder with the data set's name. There they may be
  plain files, have .gz added to their names, or be in the archive.

  Args:
    source: the data set.
    folder: the folder to search.

  Returns:
    The content of the files by name.

  Raises:
    UserError: a file is missing, damaged or not the official one.
  """
  for place in (folder, folder / source.name):
    for loose in (place, place / source.inside):
      if any(_path(loose, name) for name in source.files):
        return {name: _read(source, loose, name) for name in source.files}
    if source.archive:
      for archive in sorted(place.glob(f'{source.archive}.t*')):
        return _unpack(source, archive)
  raise UserError(
    f'{folder} holds no file of {source.name} ({", ".join(source.files)}): '
    f'{source.advice()}.'
  )


def download(source: Source) -> dict[str, bytes]:
  """Download and check the files of a data set.

  Args:
    source: the data set.

  Returns:
    The content of the files by name.

  Raises:
    UserError: an address does not answer, or answers with another file.
  """
  with tempfile.TemporaryDirectory() as folder:
    for url, sha256 in source.urls.items():
      path = Path(folder) / PurePosixPath(url).name
      print(f'downloading {url}', flush=True)
      _fetch(source, url, path)
      if sha256 and (got := _sha256(path.read_bytes())) != sha256:
        raise UserError(
          f'what {url} answers is not the official file: its sha256 is {got}, expected '
          f'{sha256}.'
        )
    return find(source, Path(folder))


def _fetch(source: Source, url: str, path: Path) -> None:
  """Download one file.

  Raises:
    UserError: the address does not answer.
  """
  for trial in range(TRIES):
    try:
      with (
        urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
        path.open('wb') as file,
      ):
        shutil.copyfileobj(answer, file)
      return
    # The errors and time-outs of urllib are OSErrors; those of HTTP itself are not.
    except (OSError, ValueError, http.client.HTTPException) as error:
      if trial == TRIES - 1:
        needed = ', '.join(source.files)
        raise UserError(
          f'cannot download {url} ({error}): give a folder with {needed} as --data_dir.'
        ) from error


def _path(folder: Path, name: str) -> Path | None:
  """Return the path of a file, zipped or not; None if there is none."""
  for path in (folder / name, folder / f'{name}.gz'):
    if path.is_file():
      return path
  return None


def _read(source: Source, folder: Path, name: str) -> bytes:
  """Read and check one file.

  Raises:
    UserError: the file is missing, damaged or not the official one.
  """
  path = _path(folder, name)
  if path is None:
    zipped = '' if name.endswith('.gz') else f' (or {name}.gz)'
    raise UserError(f'there is no {name}{zipped} in {folder}: {source.advice(name)}.')
  try:
    content = path.read_bytes()
    # MNIST's official files are zipped themselves, and stay so.
    if path.name != name:
      content = gzip.decompress(content)
  except DAMAGED as error:
    raise UserError(
      f'{path} cannot be read ({error}): {source.advice(name)}.'
    ) from error
  return _checked(source, name, content, path)


def _unpack(source: Source, archive: Path) -> dict[str, bytes]:
  """Read and check the files in an archive.

  Returns:
    The content of the files by name.

  Raises:
    UserError: the archive is damaged, or a file is missing or not the official one.
  """
  members = {f'{source.inside}/{name}': name for name in source.files}
  contents: dict[str, bytes] = {}
  try:
    with tarfile.open(archive) as file:
      # In the order of the archive, since going back would unpack it again.
      for member in file:
        name = members.get(member.name.removeprefix('./'))
        if name and (stream := file.extractfile(member)):
          contents[name] = _checked(source, name, stream.read(), archive / member.name)
  except DAMAGED as error:
    raise UserError(
      f'{archive} cannot be read ({error}): {source.advice()}.'
    ) from error
  missing = [name for name in source.files if name not in contents]
  if missing:
    raise UserError(
      f'there is no {source.inside}/{missing[0]} in {archive}: {source.advice()}.'
    )
  # The order of the files tells training from test.
  return {name: contents[name] for name in source.files}


def _checked(source: Source, name: str, content: bytes, path: Path) -> bytes:
  """Return the content of a file after a check of its hash.

  Args:
    source: the data set.
    name: name of the file.
    content: its content.
    path: its path, for messages.

  Raises:
    UserError: the content is not the official one.
  """
  got = _sha256(content)
  if source.files[name] and got != source.files[name]:
    raise UserError(
      f'{path} is not the original: its sha256 is {got}, expected '
      f'{source.files[name]}; {source.advice(name)}.'
    )
  return content


def _sha256(content: bytes) -> str:
  """Return the SHA-256 in hexadecimal digits."""
  return hashlib.sha256(content).hexdigest()
