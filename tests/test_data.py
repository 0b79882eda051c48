"""The data sets: looked for, checked, prepared once, read; every kind of damage has its
own line.
"""

import gzip
import hashlib
import io
import os
from pathlib import Path
import subprocess
import sys
import tarfile
from typing import Any

import hypothesis
from hypothesis import strategies
import numpy as np
import pytest

from experiments import data
from experiments.core.flags import UserError
from experiments.data import (
  __main__,
  builders,
  images,
  loading,
  sources,
  synthetic,
  text,
)

REAL = Path(os.environ.get('FPTT_JAX_DATA', 'unset'))
needs_real_data = pytest.mark.skipif(
  not (REAL / 'mnist').is_dir() or not (REAL / 'ptb').is_dir(),
  reason='real data: set FPTT_JAX_DATA to a folder with the official files',
)


@pytest.fixture(autouse=True)
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """A folder of tensorflow-datasets of the test's own, and no network."""
  folder = tmp_path / 'prepared'
  monkeypatch.setenv('TFDS_DATA_DIR', str(folder))

  def refuse(url: str, timeout: float) -> Any:
    raise OSError(f'no network in tests: {url}, {timeout}')

  monkeypatch.setattr(sources.urllib.request, 'urlopen', refuse)
  return folder


def write_text(folder: Path) -> Path:
  """A text with a rule: numbers in a cycle, a line each seven words."""
  folder.mkdir(parents=True, exist_ok=True)
  words = [f'w{n % 5}' for n in range(420)]
  for split, count in (('train', 420), ('valid', 105), ('test', 70)):
    lines = [' ' + ' '.join(words[n : n + 7]) + ' \n' for n in range(0, count, 7)]
    (folder / f'ptb.{split}.txt').write_text(''.join(lines))
  return folder


def idx(array: np.ndarray) -> bytes:
  """An array as a zipped idx file."""
  header = bytes([0, 0, 8, array.ndim]) + b''.join(
    size.to_bytes(4, 'big') for size in array.shape
  )
  return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


@pytest.fixture
def official(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, data.Images]:
  """MNIST and CIFAR-10 of a few images in the official formats, with the hashes made to
  fit: (folder, what MNIST holds).
  """
  rng = np.random.default_rng(0)
  arrays = images.Images(
    rng.integers(0, 256, (30, 28, 28, 1)).astype(np.uint8),
    rng.integers(0, 10, 30).astype(np.int32),
    rng.integers(0, 256, (7, 28, 28, 1)).astype(np.uint8),
    rng.integers(0, 10, 7).astype(np.int32),
  )
  folder = tmp_path / 'official'
  names = list(sources.SOURCES['mnist'].files)
  contents = [
    idx(arrays[0][..., 0]),
    idx(arrays[1]),
    idx(arrays[2][..., 0]),
    idx(arrays[3]),
  ]
  pixels = rng.integers(0, 256, (6, 4, 1 + 3072)).astype(np.uint8)
  pixels[:, :, 0] %= 10
  batches = {
    name: part.tobytes()
    for name, part in zip(sources.SOURCES['cifar10'].files, pixels, strict=True)
  }
  for name, files in (
    ('mnist', dict(zip(names, contents, strict=True))),
    ('cifar10', batches),
  ):
    (folder / name).mkdir(parents=True)
    for file, content in files.items():
      (folder / name / file).write_bytes(content)
    hashes = {
      file: hashlib.sha256(content).hexdigest() for file, content in files.items()
    }
    monkeypatch.setitem(
      sources.SOURCES, name, sources.SOURCES[name]._replace(files=hashes)
    )
    monkeypatch.setitem(
      images.CONTENT, name, images.content(images.decode(name, files))
    )
  return folder, arrays


# Images.


def test_images_are_prepared_once_and_read_in_the_official_order(
  official: tuple[Path, data.Images], prepared: Path
) -> None:
  """From the files the first time, afterwards without them; pixel for pixel what they
  hold.
  """
  folder, arrays = official
  first = data.load_images('mnist', folder)
  for got, expected in zip(first, arrays, strict=True):
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == expected.dtype
  stamps = {
    path: path.stat().st_mtime_ns for path in prepared.rglob('*') if path.is_file()
  }
  second = data.load_images('mnist')
  assert data.fingerprint(second) == data.fingerprint(first)
  assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_cifar_s_planes_become_channels_from_files_or_any_archive(
  official: tuple[Path, data.Images], prepared: Path, tmp_path: Path
) -> None:
  """1 label byte, then 1,024 red, green and blue bytes; the six files loose or in a
  .tar.gz or .tar.xz give the same.
  """
  folder, _ = official
  record = np.frombuffer(
    (folder / 'cifar10' / 'data_batch_1.bin').read_bytes(), np.uint8
  )[:3073]
  found = data.load_images('cifar10', folder)
  assert (found.train_images.shape, found.test_images.shape) == (
    (20, 32, 32, 3),
    (4, 32, 32, 3),
  )
  assert found.train_labels[0] == record[0]
  np.testing.assert_array_equal(
    found.train_images[0, 3, 5],
    record[[1 + 32 * 3 + 5 + 1024 * channel for channel in range(3)]],
  )
  for mode in ('gz', 'xz'):
    place = tmp_path / mode
    place.mkdir()
    with tarfile.open(place / f'cifar-10-binary.tar.{mode}', f'w:{mode}') as archive:
      # The official archive is in no order either.
      for path in sorted((folder / 'cifar10').iterdir(), reverse=True):
        archive.add(path, f'cifar-10-batches-bin/{path.name}')
    files = sources.find(sources.SOURCES['cifar10'], place)
    assert images.content(images.decode('cifar10', files)) == images.CONTENT['cifar10']


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (
      lambda path: path.unlink(),
      r'no train-labels-idx1-ubyte\.gz in .*/mnist: get it from https://\S*/train-labels-idx1-ubyte\.gz',
    ),
    (
      lambda path: path.write_bytes(path.read_bytes()[:-9]),
      r'train-labels-idx1-ubyte\.gz is not the original: its sha256 is \w{64}',
    ),
    (
      lambda path: path.write_bytes(b''),
      r'train-labels-idx1-ubyte\.gz is not the original: its sha256 is e3b0c442',
    ),
  ],
  ids=['missing', 'truncated', 'empty'],
)
def test_damaged_files_are_named_and_nothing_is_prepared(
  official: tuple[Path, data.Images], prepared: Path, damage: Any, message: str
) -> None:
  """Which file, what was got, what was expected, where to get it; checked before
  anything is written.
  """
  folder, _ = official
  damage(folder / 'mnist' / 'train-labels-idx1-ubyte.gz')
  with pytest.raises(UserError, match=message):
    data.load_images('mnist', folder)
  assert not list(prepared.rglob('*.array_record*'))


def test_a_damaged_archive_is_named(
  official: tuple[Path, data.Images], tmp_path: Path
) -> None:
  """Cut off, or without one of the files."""
  folder, _ = official
  place = tmp_path / 'archive'
  place.mkdir()
  path = place / 'cifar-10-binary.tar.gz'
  with tarfile.open(path, 'w:gz') as archive:
    archive.add(folder / 'cifar10', 'cifar-10-batches-bin')
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(
    UserError,
    match=r'cifar-10-binary\.tar\.gz cannot be read .*https://\S*cifar-10-binary',
  ):
    data.load_images('cifar10', place)
  (folder / 'cifar10' / 'test_batch.bin').unlink()
  with tarfile.open(path, 'w:gz') as archive:
    archive.add(folder / 'cifar10', 'cifar-10-batches-bin')
  with pytest.raises(
    UserError,
    match=r'there is no cifar-10-batches-bin/test_batch\.bin in .*tar\.gz.*https://',
  ):
    data.load_images('cifar10', place)


def test_a_prepared_copy_that_was_changed_is_refused(
  official: tuple[Path, data.Images], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Its content no longer has the hash: the message says which folder to delete."""
  folder, _ = official
  data.load_images('mnist', folder)
  monkeypatch.setitem(images.CONTENT, 'mnist', 'another')
  with pytest.raises(
    UserError,
    match=(
      r'does not hold the original mnist: .* expected another; delete that folder '
      r'and run again'
    ),
  ):
    data.load_images('mnist')


def test_a_prepared_copy_that_is_damaged_is_named(
  official: tuple[Path, data.Images], prepared: Path
) -> None:
  """Records cut off or overwritten: the folder is named, nothing is read as data."""
  folder, _ = official
  data.load_images('mnist', folder)
  [path] = prepared.rglob('*train*.array_record*')
  whole = path.read_bytes()
  for content in (whole[: len(whole) // 2], b'', bytes(len(whole))):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'mnist.*prepared'):
      data.load_images('mnist')


@pytest.mark.parametrize(
  'content', [None, b'', b'{}'], ids=['missing', 'empty', 'blank']
)
def test_a_prepared_copy_without_its_description_is_named(
  official: tuple[Path, data.Images], prepared: Path, content: bytes | None
) -> None:
  """dataset_info.json lost or emptied: neither read as data nor taken for nothing; the
  message says which folder to delete.
  """
  folder, _ = official
  data.load_images('mnist', folder)
  [path] = prepared.rglob('dataset_info.json')
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(
    UserError,
    match=(
      r'cannot prepare or read mnist .*fptt_jax/mnist is damaged, delete that folder '
      r'and run again'
    ),
  ):
    data.load_images('mnist', folder)


def test_a_copy_that_tensorflow_datasets_prepared_is_used(
  prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Laid out like its own 'mnist' (an image a record, shuffled): the same examples in
  another order, under the same hash.
  """
  from PIL import Image
  import tensorflow_datasets as tfds

  rng = np.random.default_rng(0)
  pixels, labels = (
    rng.integers(0, 256, (9, 28, 28, 1)).astype(np.uint8),
    np.arange(9, dtype=np.int32),
  )

  class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('3.0.1')

    def _info(self) -> Any:
      features = {
        'image': tfds.features.Image(shape=(28, 28, 1)),
        'label': tfds.features.ClassLabel(num_classes=10),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager: Any) -> Any:
      return {
        'train': self._generate_examples(range(6)),
        'test': self._generate_examples(range(6, 9)),
      }

    def _generate_examples(self, numbers: range) -> Any:
      yield from (
        (n, {'image': Image.fromarray(pixels[n, ..., 0]), 'label': n}) for n in numbers
      )

  tfds.disable_progress_bar()
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  Mnist(data_dir=prepared).download_and_prepare(
    download_config=config, file_format='array_record'
  )
  expected = images.Images(pixels[:6], labels[:6], pixels[6:], labels[6:])
  monkeypatch.setitem(images.CONTENT, 'mnist', images.content(expected))
  found = data.load_images('mnist')
  np.testing.assert_array_equal(found.train_images, pixels[found.train_labels])
  assert sorted(found.train_labels) == list(range(6))
  assert found.train_labels.dtype == np.int32
  assert not (prepared / 'fptt_jax').exists()


def test_two_preparations_at_once_do_no_harm(
  official: tuple[Path, data.Images], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A second one begins and ends while the first is writing: the first gives way, and
  both read one whole copy.
  """

  folder, arrays = official
  generate, others = builders.FpttJax._generate_examples, []

  def interrupted(self: Any, split: str) -> Any:
    yield from generate(self, split)
    if not others:
      others.append(None)
      others.append(data.load_images('mnist', folder))

  monkeypatch.setattr(builders.FpttJax, '_generate_examples', interrupted)
  for found in (data.load_images('mnist', folder), others[1]):
    assert data.fingerprint(found) == data.fingerprint(arrays)
  assert [path.name for path in (prepared / 'fptt_jax' / 'mnist').iterdir()] == [
    '1.0.0'
  ]


def test_preparing_that_is_killed_leaves_nothing_half_made(
  official: tuple[Path, data.Images], prepared: Path
) -> None:
  """A process that is ended hard between two records: the next run finds no prepared
  copy and makes a whole one.
  """
  folder, arrays = official
  script = f"""
import os, sys
from pathlib import Path
from experiments.data import builders, images, sources, text
import numpy as np
def dying(self, split):
  yield 0, self._splits[split][0]
  os._exit(9)
builders.FpttJax._generate_examples = dying
folder = Path({str(folder)!r}) / 'mnist'
names = sources.SOURCES['mnist'].files
files = {{name: (folder / name).read_bytes() for name in names}}
builders.write_images('mnist', images.decode('mnist', files), Path({str(prepared)!r}))
"""
  ended = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=False
  )
  assert ended.returncode == 9, ended.stderr
  with pytest.raises(UserError, match='cannot download'):
    data.load_images('mnist')
  for got, expected in zip(data.load_images('mnist', folder), arrays, strict=True):
    np.testing.assert_array_equal(got, expected)


def test_without_network_the_error_names_files_and_addresses() -> None:
  """At once, also for the text, in a line that can be read."""
  for load, name, words in (
    (
      data.load_images,
      'mnist',
      ('train-images-idx3-ubyte.gz', 'storage.googleapis.com', '--data_dir'),
    ),
    (data.load_images, 'cifar10', ('data_batch_1.bin', 'cs.toronto.edu', '--data_dir')),
    (data.load_text, 'ptb', ('ptb.train.txt', 'fit.vutbr.cz', '--data_dir')),
  ):
    with pytest.raises(UserError, match='cannot download') as caught:
      load(name)
    for word in words:
      assert word in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
  'name', ['mnist', 'cifar10', 'arrays', 'ptb', 'ptb_chars', 'text', 'text_chars']
)
def test_a_folder_that_is_missing_or_empty_is_said_in_a_short_line(
  name: str, tmp_path: Path
) -> None:
  """A place that is not there comes first, without hashes; so does one that is a
  dangling link, a file or empty.
  """
  load = data.load_images if name in loading.IMAGES else data.load_text
  (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
  for place in ('nowhere', 'link', 'nowhere.npz', 'nul\0byte'):
    with pytest.raises(UserError, match=f'--data_dir=.*{place}: ') as caught:
      load(name, tmp_path / place)
    assert len(str(caught.value)) < 80 + len(str(tmp_path / place))
  if name != 'arrays':
    with pytest.raises(UserError, match='holds no file of') as caught:
      load(name, tmp_path)
    assert len(str(caught.value)) < 250 + len(str(tmp_path))
    assert 'sha256' not in str(caught.value)
  if name in ('mnist', 'cifar10', 'ptb', 'ptb_chars'):
    (tmp_path / 'file').write_text('a word')
    with pytest.raises(UserError, match=r'--data_dir=.*/file must be a folder'):
      load(name, tmp_path / 'file')


def test_a_download_is_checked(
  official: tuple[Path, data.Images], monkeypatch: pytest.MonkeyPatch
) -> None:
  """What an address answers with has to have the hash; if it has, it is prepared like
  files that were given.
  """
  folder, arrays = official
  source = sources.SOURCES['mnist']
  urls = {url: source.files[Path(url).name] for url in source.urls}
  monkeypatch.setitem(sources.SOURCES, 'mnist', source._replace(urls=urls))
  answer = lambda url, timeout: io.BytesIO(
    (folder / 'mnist' / Path(url).name).read_bytes()
  )
  monkeypatch.setattr(
    sources.urllib.request, 'urlopen', lambda url, timeout: io.BytesIO(b'<html>')
  )
  with pytest.raises(
    UserError,
    match=(
      r'train-images-idx3-ubyte\.gz answers is not the official file: its sha256 '
      r'is'
    ),
  ):
    data.load_images('mnist')
  monkeypatch.setattr(sources.urllib.request, 'urlopen', answer)
  np.testing.assert_array_equal(
    data.load_images('mnist').train_images, arrays.train_images
  )


def test_one_file_of_arrays_does_without_tensorflow_datasets(
  official: tuple[Path, data.Images], tmp_path: Path
) -> None:
  """The .npz of `python -m experiments.data` is read where tensorflow_datasets cannot
  be imported; under an official name it is checked."""
  _, arrays = official
  data.save(arrays, tmp_path / 'mnist.npz')
  np.testing.assert_array_equal(
    data.load_images('mnist', tmp_path / 'mnist.npz').test_labels, arrays.test_labels
  )
  data.save(
    arrays._replace(test_labels=arrays.test_labels[::-1].copy()), tmp_path / 'other.npz'
  )
  with pytest.raises(UserError, match='does not hold the original mnist'):
    data.load_images('mnist', tmp_path / 'other.npz')
  script = """
import sys
sys.modules['tensorflow_datasets'] = None
from experiments import data
from experiments.core.flags import UserError
print(len(data.load_images('arrays', sys.argv[1]).train_labels))
try:
  data.load_images('mnist')
except UserError as error:
  print(error)
"""
  arguments = [sys.executable, '-c', script, str(tmp_path / 'other.npz')]
  shown = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
  assert shown.splitlines()[0] == '30'
  assert "pip install -e '.[experiments]'" in shown  # No wheel holds the scripts.


def test_arrays_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
  """Shape, dtype, labels, no such file: what was got and what was expected."""
  good = synthetic.images(np.random.default_rng(0))
  for change, message in (
    (
      dict(train_images=good.train_images[..., 0]),
      r'train_images must be uint8 \[N, height, width, channels\], got uint8\[64, '
      r'6, 6\]',
    ),
    (
      dict(test_images=good.test_images.astype(np.float32)),
      r'test_images must be uint8 .*, got float32',
    ),
    (
      dict(train_labels=good.train_labels[:3]),
      r'train_labels must be int32 \[N=64\] numbers from 0, got int32\[3\]',
    ),
    (
      dict(test_labels=good.test_labels - 9),
      r'test_labels must be int32 \[N=16\] numbers from 0',
    ),
  ):
    data.save(good._replace(**change), tmp_path / 'bad.npz')
    with pytest.raises(UserError, match=message):
      data.load_images('arrays', tmp_path / 'bad.npz')
  for content in (b'no zip', b'', b'PK' + bytes(100)):
    (tmp_path / 'bad.npz').write_bytes(content)
    with pytest.raises(UserError, match=r'bad\.npz is not an array file'):
      data.load_images('arrays', tmp_path / 'bad.npz')
  with pytest.raises(UserError, match=r'--data_dir=.*none\.npz: No such file'):
    data.load_images('arrays', tmp_path / 'none.npz')
  with pytest.raises(
    ValueError, match="must be one of mnist, cifar10, arrays, got 'minst'"
  ):
    data.load_images('minst')


# Sequences.


def test_pixels_come_row_after_row_and_rows_whole() -> None:
  """Step t of an image of width w is pixel (t // w, t % w), all its channels; by rows
  it is row t; normalized as (x/255 - m)/s.
  """
  pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 2)).astype(np.uint8)
  x = data.to_sequences(pictures, (0.25, 0.5))
  assert (x.shape, x.dtype) == ((20, 3, 2), np.float32)
  np.testing.assert_allclose(x[7, 2], (pictures[2, 1, 2] / 255 - 0.25) / 0.5, rtol=1e-6)
  rows = data.to_sequences(pictures, (0.25, 0.5), rows=True)
  assert rows.shape == (4, 3, 10)
  np.testing.assert_allclose(rows[1, 2].reshape(5, 2), x[5:10, 2], rtol=1e-6)
  order = data.permutation(20, seed=1)
  np.testing.assert_array_equal(
    data.to_sequences(pictures, (0.25, 0.5), order=order), x[order]
  )
  np.testing.assert_array_equal(order, data.permutation(20, seed=1))
  assert not np.array_equal(order, data.permutation(20, seed=2))


def test_pooled_pixels_are_means_of_blocks() -> None:
  pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 1)).astype(np.uint8)
  x = data.to_sequences(pictures, (0.25, 0.5), pool=2)
  assert x.shape == (6, 3, 1)
  block = pictures[1, 2:4, 4:6].mean()  # The last of the second row.
  np.testing.assert_allclose(x[5, 1, 0], (block / 255 - 0.25) / 0.5, rtol=1e-5)


def test_validation_images_are_held_out() -> None:
  """Every training image is in exactly one of the two parts, with its label; by seed
  alone; test is untouched.
  """
  found = synthetic.images(np.random.default_rng(0))
  found = found._replace(train_labels=np.arange(64, dtype=np.int32))
  splits = data.hold_out(found, 10, seed=3)
  assert sorted([*splits.train.labels, *splits.valid.labels]) == list(range(64))
  assert len(splits.valid.labels) == 10
  np.testing.assert_array_equal(
    splits.valid.images, found.train_images[splits.valid.labels]
  )
  np.testing.assert_array_equal(
    splits.valid.labels, data.hold_out(found, 10, seed=3).valid.labels
  )
  assert not np.array_equal(
    splits.valid.labels, data.hold_out(found, 10, seed=4).valid.labels
  )
  np.testing.assert_array_equal(splits.test.images, found.test_images)


# Text.


def test_words_come_in_order_with_an_end_of_line_each(tmp_path: Path) -> None:
  """Words split at blanks, '<eos>' ends each line, ids count up by first appearance;
  .gz and .npz read the same.
  """
  found = data.load_text('text', write_text(tmp_path / 'text'))
  assert found.vocabulary == ['w0', 'w1', 'w2', 'w3', 'w4', '<eos>']
  np.testing.assert_array_equal(found.train[:10], [0, 1, 2, 3, 4, 0, 1, 5, 2, 3])
  assert (len(found.train), len(found.valid), len(found.test)) == (480, 120, 80)
  for split in text.SPLITS:
    path = tmp_path / 'text' / f'ptb.{split}.txt'
    path.with_name(path.name + '.gz').write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
  data.save(found, tmp_path / 'text.npz')
  for other in (
    data.load_text('text', tmp_path / 'text'),
    data.load_text('text', tmp_path / 'text.npz'),
  ):
    assert data.fingerprint(other) == data.fingerprint(found)
    for mine, theirs in zip(found, other, strict=True):
      np.testing.assert_array_equal(mine, theirs)


def test_characters_of_words_are_mikolov_s(tmp_path: Path) -> None:
  """'_' between words, '<eos>' at the end of a line, nothing else; worked out by hand
  for one line.
  """
  words = data.load_text('text', write_text(tmp_path))
  found = text.word_characters(words, 'here')
  first = [found.vocabulary[token] for token in found.train[:21]]
  assert first == [*'w0_w1_w2_w3_w4_w0_w1', '<eos>']
  assert found.vocabulary[:4] == ['w', '0', '_', '1']
  assert len(found.train) == 60 * 21


TEXTS = [
  'x_y = x y\n  x\n',
  'a\tb\r\nc\rd\n',
  '\ufeffbegins with a mark\n',
  'no end of line',
  '\n\n\n',
  ' leading and trailing \n',
  'cafe\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u4e2d\u6587\n',
  'page\x0cbreak\x0bline\x85\u2028\u2029\x1c\x1d\x1e\n',
  'nul\0byte\0',
  '<eos> <unk> <underscore> _\n',
  '\x7f\xa0\u3000\u200b\n',
]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(strategies.text(strategies.characters(codec='utf-8'), min_size=1))
def test_a_text_by_characters_loses_nothing(source: str) -> None:
  """A token and a symbol for each character, whatever it is; the text can be written
  from the tokens.
  """
  found = text.characters([source, source[::-1], source], 'here')
  assert len(found.train) == len(source)
  assert len(found.vocabulary) == len(set(found.vocabulary)) == len(set(source))
  assert (
    text.decode_tokens(found.train.tolist(), found.vocabulary, by_characters=True)
    == source
  )
  assert (
    text.encode_prompt(source, found.vocabulary, by_characters=True)
    == found.train.tolist()
  )
  assert {found.train.dtype, found.valid.dtype} == {np.dtype(np.int32)}


@pytest.mark.parametrize('source', TEXTS)
def test_files_by_characters_lose_nothing(source: str, tmp_path: Path) -> None:
  """Out of three files or .gz, the characters of awkward kinds; a .npz of them reads
  the same.
  """
  for split in text.SPLITS:
    (tmp_path / f'ptb.{split}.txt').write_bytes(source.encode())
  (tmp_path / 'ptb.valid.txt').unlink()
  (tmp_path / 'ptb.valid.txt.gz').write_bytes(gzip.compress(source.encode()))
  found = data.load_text('text_chars', tmp_path)
  for split in text.SPLITS:
    assert (
      text.decode_tokens(
        getattr(found, split).tolist(), found.vocabulary, by_characters=True
      )
      == source
    )
  if '\0' not in source:
    data.save(found, tmp_path / 'x.npz')
    assert data.fingerprint(
      data.load_text('text_chars', tmp_path / 'x.npz')
    ) == data.fingerprint(found)


def test_fingerprints_tell_texts_by_characters_apart() -> None:
  """Blanks, ends of lines and a missing end of the last one count."""
  sources = [
    *TEXTS,
    *(source + ' ' for source in TEXTS),
    *(source + '\n' for source in TEXTS),
    'a\tb\nc\rd\n',
  ]
  assert len(
    {data.fingerprint(text.characters([source] * 3, 'here')) for source in sources}
  ) == len(sources)


def test_only_the_validation_text_has_some_characters(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Words may be new where their characters are not; new characters are '<unk>', said
  with their number.
  """
  for split, content in {
    'train': 'a cab\na bad cab\n',
    'valid': 'a dab\n',
    'test': 'bad\n',
  }.items():
    (tmp_path / f'ptb.{split}.txt').write_text(content)
  found = data.load_text('text_chars', tmp_path)
  assert [found.vocabulary[token] for token in found.valid] == [
    'a',
    '_',
    'd',
    'a',
    'b',
    '<eos>',
  ]
  assert '<unk>' not in found.vocabulary
  assert capsys.readouterr().out == ''
  (tmp_path / 'ptb.valid.txt').write_text('a fab zoo\n')
  found = data.load_text('text_chars', tmp_path)
  symbols = [found.vocabulary[token] for token in found.valid]
  assert symbols == [
    'a',
    '_',
    '<unk>',
    'a',
    'b',
    '_',
    '<unk>',
    '<unk>',
    '<unk>',
    '<eos>',
  ]
  assert found.vocabulary.index('<unk>') == len(found.vocabulary) - 1
  assert (
    '4 characters of the validation text and 0 of the test text'
    in capsys.readouterr().out
  )


@pytest.mark.parametrize('known', [True, False])
def test_unknown_words_are_unk(
  known: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """That of the training text where it has one, else the last of the vocabulary."""
  for split, content in {
    'train': '<unk> a b\n' if known else 'a b\n',
    'valid': 'a new b\n',
    'test': 'so new\n',
  }.items():
    (tmp_path / f'ptb.{split}.txt').write_text(content)
  found = data.load_text('text', tmp_path)
  assert [found.vocabulary[token] for token in found.valid] == [
    'a',
    '<unk>',
    'b',
    '<eos>',
  ]
  assert found.vocabulary == (
    ['<unk>', 'a', 'b', '<eos>'] if known else ['a', 'b', '<eos>', '<unk>']
  )
  assert (
    '1 words of the validation text and 2 of the test text' in capsys.readouterr().out
  )


def test_words_of_any_line_ends(tmp_path: Path) -> None:
  """Line ends of other systems, a byte order mark and no final line end give the same
  words.
  """
  expected = None
  for content in (
    'a b\n\nc\n',
    'a b\r\n\r\nc\r\n',
    '\ufeffa b\n\n c',
    '\ta  b \r\rc\n',
  ):
    for split in text.SPLITS:
      (tmp_path / f'ptb.{split}.txt').write_bytes(content.encode())
    found = data.load_text('text', tmp_path)
    expected = expected or found.vocabulary
    assert [found.vocabulary[token] for token in found.train] == [
      'a',
      'b',
      '<eos>',
      '<eos>',
      'c',
      '<eos>',
    ]
    assert found.vocabulary == expected
    assert (
      text.decode_tokens(found.train.tolist(), found.vocabulary, by_characters=False)
      == 'a b\n\nc\n'
    )


@pytest.mark.parametrize('name', ['book.txt', 'book.txt.gz', 'book'])
def test_one_file_is_split_in_order(
  name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """90, 5 and 5 % of its characters or words; put end to end they are the text; the
  split is said.
  """
  source = ''.join(f'{number} ' + '\n' * (number % 7 == 0) for number in range(200))
  content = source.encode()
  (tmp_path / name).write_bytes(
    gzip.compress(content) if name.endswith('.gz') else content
  )
  by_characters = data.load_text('text_chars', tmp_path / name)
  by_words = data.load_text('text', tmp_path / name)
  assert '90 / 5 / 5 %' in capsys.readouterr().out
  assert len(by_characters.train) == len(source) * 9 // 10
  assert abs(len(by_characters.valid) - len(by_characters.test)) <= 1
  assert len(by_words.train) == (200 + 30) * 9 // 10
  joined = np.concatenate(by_characters[:3]).tolist()
  written = text.decode_tokens(joined, by_characters.vocabulary, by_characters=True)
  assert len(written.replace('<unk>', '?')) == len(source)
  assert sum(len(part) for part in by_words[:3]) == 200 + 30
  assert written.startswith(source[: len(by_characters.train)])


def test_one_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
  """Empty, too short for three parts, not UTF-8, a damaged .gz."""
  path = tmp_path / 'book.txt'
  for content, message in (
    (b'', 'too few'),
    (b'abc', '3 tokens, too few'),
    (b'a\xff' * 90, 'as text'),
    (('a' * 90).encode('utf-16'), 'as text'),
  ):
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf'book\.txt.*{message}'):
      data.load_text('text_chars', path)
  (tmp_path / 'book.txt.gz').write_bytes(gzip.compress(b'some words' * 100)[:-9])
  with pytest.raises(UserError, match=r'book\.txt\.gz cannot be read'):
    data.load_text('text', tmp_path / 'book.txt.gz')


def test_bad_text_files_are_named(tmp_path: Path) -> None:
  """Missing, not the original, truncated, not text, empty: one clear line each."""
  write_text(tmp_path)
  with pytest.raises(
    UserError,
    match=(
      r'ptb\.train\.txt is not the original: its sha256 is .*expected '
      r'fcea919f.*http'
    ),
  ):
    data.load_text('ptb', tmp_path)
  valid = tmp_path / 'ptb.valid.txt'
  for content, message in (
    (b'w0 \xff w1', r'ptb\.valid\.txt cannot be read as text'),
    (b' \n \n', r'ptb\.valid\.txt is empty'),
  ):
    valid.write_bytes(content)
    with pytest.raises(UserError, match=message):
      data.load_text('text', tmp_path)
  valid.unlink()
  with pytest.raises(
    UserError, match=r'there is no ptb\.valid\.txt \(or ptb\.valid\.txt\.gz\) in '
  ):
    data.load_text('text', tmp_path)
  damaged = bytearray(gzip.compress(b'w0 w1\n' * 100))
  damaged[12:20] = bytes(8)
  for content in (gzip.compress(b'w0 w1\n' * 100)[:-12], bytes(damaged)):
    valid.with_name('ptb.valid.txt.gz').write_bytes(content)
    with pytest.raises(UserError, match=r'ptb\.valid\.txt\.gz cannot be read'):
      data.load_text('text', tmp_path)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match=r'holds no file of .*ptb\.train\.txt'):
    data.load_text('text', tmp_path / 'empty')


def test_bad_token_arrays_are_named(tmp_path: Path) -> None:
  """Ids outside the vocabulary, another shape, another text where the original is asked
  for.
  """
  found = data.load_text('text', write_text(tmp_path))
  path = tmp_path / 'text.npz'
  for change, message in (
    ({}, r'train is not the original text: its sha256 is .*, expected sha256 fcea919f'),
    (dict(valid=found.valid + 1), r'valid holds ids 1\.\.6 for a vocabulary of 6'),
    (dict(vocabulary=['w0'] * 6), 'vocabulary must be str'),
    (
      dict(test=found.test[None]),
      r'test must be int32 token ids \[N\], got int32\[1, 80\]',
    ),
  ):
    data.save(found._replace(**change), path)
    with pytest.raises(UserError, match=message):
      data.load_text('text' if change else 'ptb', path)


def test_the_command_writes_arrays(
  official: tuple[Path, data.Images], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """And says what they hold."""

  folder, arrays = official
  __main__.main(
    __main__.Config(
      dataset='mnist', data_dir=str(folder), output=str(tmp_path / 'x.npz')
    )
  )
  assert '30 train, 7 test images [28, 28, 1]' in capsys.readouterr().out
  np.testing.assert_array_equal(
    data.load_images('mnist', tmp_path / 'x.npz').train_images, arrays.train_images
  )
  with pytest.raises(UserError, match='cannot write --output='):
    __main__.main(
      __main__.Config(
        dataset='mnist', data_dir=str(folder), output=str(tmp_path / 'no' / 'x.npz')
      )
    )
  with pytest.raises(ValueError, match=r"--output must be .*, got ''"):
    __main__.Config()


# The originals.


@needs_real_data
def test_real_mnist() -> None:
  """60,000 and 10,000 images with the counts of every digit; prepared, and read again
  without the files.
  """
  found = data.load_images('mnist', REAL)
  assert np.bincount(found.train_labels).tolist() == [
    5923,
    6742,
    5958,
    6131,
    5842,
    5421,
    5918,
    6265,
    5851,
    5949,
  ]
  assert np.bincount(found.test_labels).tolist() == [
    980,
    1135,
    1032,
    1010,
    982,
    892,
    958,
    1028,
    974,
    1009,
  ]
  assert np.mean(found.train_images) / 255 == pytest.approx(
    data.MOMENTS['mnist'][0], abs=1e-4
  )
  assert data.fingerprint(data.load_images('mnist')) == data.fingerprint(found)


@needs_real_data
def test_real_penn_treebank() -> None:
  """The counts every paper quotes, and by characters the very files of Mikolov's
  ptb.char.*.txt.
  """
  found = data.load_text('ptb', REAL)
  assert (
    len(found.train),
    len(found.valid),
    len(found.test),
    len(found.vocabulary),
  ) == (929_589, 73_760, 82_430, 10_000)
  chars = data.load_text('ptb_chars')
  assert (
    len(chars.train),
    len(chars.valid),
    len(chars.test),
    len(chars.vocabulary),
  ) == (5_017_482, 393_042, 442_423, 50)
  expected = '21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8'
  symbols = np.array(
    ['\n' if symbol == '<eos>' else symbol for symbol in chars.vocabulary]
  )
  written = ''.join(f'{symbol} ' for symbol in symbols[chars.valid].tolist())
  assert hashlib.sha256(written.encode()).hexdigest() == expected


@pytest.mark.slow
@needs_real_data
def test_real_cifar10() -> None:
  """5,000 and 1,000 images a class."""
  found = data.load_images('cifar10', REAL)
  assert np.bincount(found.train_labels).tolist() == [5000] * 10
  assert np.bincount(found.test_labels).tolist() == [1000] * 10
  assert loading.fingerprint(data.load_images('cifar10')) == loading.fingerprint(found)
