"""Images as sequences, and a validation split."""

from typing import NamedTuple

import numpy as np

from experiments.core.flags import UserError
from experiments.data.images import Images

MOMENTS = {'mnist': (0.1307, 0.3081), 'cifar10': (0.5, 0.5), 'arrays': (0.5, 0.5)}
"""Mean and standard deviation of pixels in [0, 1], as in the authors' release."""


class Examples(NamedTuple):
  """Labeled images.

  Attributes:
    images: uint8 [N, height, width, channels].
    labels: int32 [N].
  """

  images: np.ndarray
  labels: np.ndarray


class Splits(NamedTuple):
  """Splits of a data set.

  Attributes:
    train: examples to train on.
    valid: examples by which settings and epochs are chosen.
    test: examples that are evaluated once, in the end.
  """

  train: Examples
  valid: Examples
  test: Examples


def hold_out(images: Images, size: int, seed: int) -> Splits:
  """Hold out training images for validation.

  They are drawn at random, without regard to their labels. All images keep their order.

  Args:
    images: the images.
    size: number of images to hold out.
    seed: seed of the draw.

  Raises:
    UserError: `size` leaves no images to train on or to validate on.
  """
  count = len(images.train_labels)
  if not 1 <= size < count:
    raise UserError(
      f'the validation split must have 1 to {count - 1} of the {count} training '
      f'images, got {size}.'
    )
  held_out = np.zeros(count, bool)
  held_out[np.random.default_rng(seed).permutation(count)[:size]] = True
  return Splits(
    train=Examples(images.train_images[~held_out], images.train_labels[~held_out]),
    valid=Examples(images.train_images[held_out], images.train_labels[held_out]),
    test=Examples(images.test_images, images.test_labels),
  )


def permutation(num_steps: int, seed: int) -> np.ndarray:
  """Return a random order of the steps for permuted images.

  Args:
    num_steps: T.
    seed: seed of the order.

  Returns:
    int64 [T], the same for the same T and seed.
  """
  return np.random.default_rng(seed).permutation(num_steps)


def to_sequences(
  images: np.ndarray,
  moments: tuple[float, float],
  rows: bool = False,
  order: np.ndarray | None = None,
  pool: int = 1,
) -> np.ndarray:
  """Return images as normalized, time-major sequences.

  Args:
    images: uint8 [B, height, width, channels], a NumPy or JAX array.
    moments: mean and standard deviation of pixels in [0, 1], from :data:`MOMENTS`.
    rows: whether a step is a row, with T = height and D = width * channels. By default
      it is a pixel, row after row, with T = height * width and D = channels.
    order: int [T], order of the steps from :func:`permutation`; None keeps them.
    pool: number of pixels, in height and in width, of which a mean makes one.

  Returns:
    float32 [T, B, D].
  """
  if pool > 1:
    batch_size, height, width, channels = images.shape
    blocks = (batch_size, height // pool, pool, width // pool, pool, channels)
    images = images.reshape(blocks).mean((2, 4), dtype=np.float32)
  batch_size, height, width, channels = images.shape
  shape = (
    (batch_size, height, width * channels)
    if rows
    else (batch_size, height * width, channels)
  )
  steps = images.reshape(shape).swapaxes(0, 1)
  if order is not None:
    steps = steps[order]
  mean, deviation = moments
  return (steps.astype(np.float32) / 255 - mean) / deviation
