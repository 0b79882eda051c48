"""Images with labels: what the official files hold, and what identifies them."""

import gzip
import hashlib
from typing import NamedTuple

import numpy as np

from experiments.core.flags import UserError

# Hashes of `content` below, so of the examples in any order.
CONTENT = {
  'mnist': '8cbf20b4f056d0a78cdf58be22ebba98f4bb2e73f2f21acca0ecd12ab362af14',
  'cifar10': '14a2f6eb706e199895e9811f10954375f34963bcf8cbd41fda23e7f265f5c099',
}


class Images(NamedTuple):
  """Labelled images in two splits.

  Attributes:
    train_images: uint8 [N, height, width, channels].
    train_labels: int32 [N], from 0.
    test_images: the same for the test split.
    test_labels: the same.
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


def decode(name: str, files: dict[str, bytes]) -> Images:
  """The arrays in the official files of 'mnist' or 'cifar10', in the files' order."""
  if name == 'mnist':
    # Headers of 16 and 8 bytes: magic number and sizes.
    images, labels, test_images, test_labels = [
      np.frombuffer(gzip.decompress(file), np.uint8) for file in files.values()
    ]
    images, test_images = (
      images[16:].reshape(-1, 28, 28, 1),
      test_images[16:].reshape(-1, 28, 28, 1),
    )
    return Images(
      images, labels[8:].astype(np.int32), test_images, test_labels[8:].astype(np.int32)
    )
  records = [
    np.frombuffer(file, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    for file in files.values()
  ]
  train, test = np.concatenate(records[:-1]), records[-1]
  pixels = [
    np.ascontiguousarray(part[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    for part in (train, test)
  ]
  return Images(
    pixels[0], train[:, 0].astype(np.int32), pixels[1], test[:, 0].astype(np.int32)
  )


def content(images: Images) -> str:
  """sha256 of the examples whatever their order: tensorflow-datasets' own copies are
  shuffled.
  """
  digest = hashlib.sha256()
  for pixels, labels in (images[:2], images[2:]):
    examples = [
      hashlib.sha256(image.tobytes() + b'%d' % label).digest()
      for image, label in zip(pixels, labels, strict=True)
    ]
    digest.update(b''.join(sorted(examples)) + b'%d' % len(examples))
  return digest.hexdigest()


def checked(images: Images, name: str, where: str, advice: str) -> Images:
  """`images`, if they are such and, but for 'arrays', the original ones.

  Raises:
    UserError: they are not.
  """
  for split in ('train', 'test'):
    pixels, labels = (
      getattr(images, f'{split}_images'),
      getattr(images, f'{split}_labels'),
    )
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or not pixels.size:
      got = f'{pixels.dtype}{list(pixels.shape)}'
      raise UserError(
        f'{where}: {split}_images must be uint8 [N, height, width, channels], got '
        f'{got}.'
      )
    if labels.shape != pixels.shape[:1] or labels.dtype != np.int32 or labels.min() < 0:
      got = f'{labels.dtype}{list(labels.shape)}'
      raise UserError(
        f'{where}: {split}_labels must be int32 [N={len(pixels)}] numbers from 0, got '
        f'{got}.'
      )
  if name in CONTENT and (got := content(images)) != CONTENT[name]:
    raise UserError(
      f'{where} does not hold the original {name}: its content hash is {got}, expected '
      f'{CONTENT[name]}; {advice}'
    )
  return images
