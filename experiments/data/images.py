"""Images with labels: the official files and hashes of their content."""

import gzip
import hashlib
from typing import NamedTuple

import numpy as np

from experiments.core.flags import UserError

CONTENT = {
  'mnist': '8cbf20b4f056d0a78cdf58be22ebba98f4bb2e73f2f21acca0ecd12ab362af14',
  'cifar10': '14a2f6eb706e199895e9811f10954375f34963bcf8cbd41fda23e7f265f5c099',
}
"""Results of :func:`content` for the original data sets."""


class Images(NamedTuple):
  """Labeled images in two splits.

  Attributes:
    train_images: uint8 [N, height, width, channels].
    train_labels: int32 [N], class numbers from 0.
    test_images: images of the test split, as `train_images`.
    test_labels: labels of the test split, as `train_labels`.
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


def decode(name: str, files: dict[str, bytes]) -> Images:
  """Return the arrays in the official files, in their order.

  Args:
    name: 'mnist' or 'cifar10'.
    files: content of the files, in the order of `sources.SOURCES`.
  """
  if name == 'mnist':
    images, labels, test_images, test_labels = [
      np.frombuffer(gzip.decompress(file), np.uint8) for file in files.values()
    ]
    # Headers of 16 and 8 bytes hold a magic number and the sizes.
    return Images(
      images[16:].reshape(-1, 28, 28, 1),
      labels[8:].astype(np.int32),
      test_images[16:].reshape(-1, 28, 28, 1),
      test_labels[8:].astype(np.int32),
    )
  # A record of CIFAR-10 is a label and an image of three planes of 32 rows.
  *train, test = [
    np.frombuffer(file, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    for file in files.values()
  ]
  return Images(*_split_records(np.concatenate(train)), *_split_records(test))


def _split_records(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return the images and labels in CIFAR-10's records, uint8 [N, 3073]."""
  planes = records[:, 1:].reshape(-1, 3, 32, 32)
  pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
  return pixels, records[:, 0].astype(np.int32)


def content(images: Images) -> str:
  """Return the SHA-256 of the examples, which does not depend on their order."""
  # tensorflow-datasets' own copies are shuffled, so the hashes of examples are sorted.
  digest = hashlib.sha256()
  for pixels, labels in (images[:2], images[2:]):
    examples = [
      hashlib.sha256(image.tobytes() + b'%d' % label).digest()
      for image, label in zip(pixels, labels, strict=True)
    ]
    digest.update(b''.join(sorted(examples)) + b'%d' % len(examples))
  return digest.hexdigest()


def checked(images: Images, name: str, where: str, advice: str) -> Images:
  """Return the images after a check of their arrays and their content.

  Args:
    images: the images.
    name: name of the data set. Any content is accepted for 'arrays'.
    where: file or folder, for messages.
    advice: end of the message about content that is not the original.

  Raises:
    UserError: an array has another shape or type, or the content is not the original.
  """
  for split in ('train', 'test'):
    pixels = getattr(images, f'{split}_images')
    labels = getattr(images, f'{split}_labels')
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
