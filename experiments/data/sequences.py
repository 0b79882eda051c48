"""Images as sequences, and a validation split."""

from typing import NamedTuple

import numpy as np

from experiments.core.flags import UserError
from experiments.data.images import Images

# Mean and standard deviation of pixels in [0, 1], as in the authors' release.
MOMENTS = {'mnist': (0.1307, 0.3081), 'cifar10': (0.5, 0.5), 'arrays': (0.5, 0.5)}


class Examples(NamedTuple):
  """Labelled images.

  Attributes:
    images: uint8 [N, height, width, channels].
    labels: int32 [N].
  """

  images: np.ndarray
  labels: np.ndarray


class Splits(NamedTuple):
  """What to train on, what to choose by, and what to test on, once."""

  train: Examples
  valid: Examples
  test: Examples


def hold_out(images: Images, size: int, seed: int) -> Splits:
  """Takes `size` training images, drawn by `seed` without regard to their labels, for
  validation; all keep their order.

  Raises:
    UserError: `size` leaves nothing to train on, or to validate on.
  """
  count = len(images.train_labels)
  if not 1 <= size < count:
    raise UserError(
      f'the validation split must have 1 to {count - 1} of the {count} training '
      f'images, got {size}.'
    )
  held_out = np.zeros(count, bool)
  held_out[np.random.default_rng(seed).permutation(count)[:size]] = True
  train, valid = (
    Examples(images.train_images[part], images.train_labels[part])
    for part in (~held_out, held_out)
  )
  return Splits(train, valid, Examples(images.test_images, images.test_labels))


def permutation(num_steps: int, seed: int) -> np.ndarray:
  """A fixed order of the steps, int64 [T], for permuted images; the same for the same T
  and seed.
  """
  return np.random.default_rng(seed).permutation(num_steps)


def to_sequences(
  images: np.ndarray,
  moments: tuple[float, float],
  rows: bool = False,
  order: np.ndarray | None = None,
) -> np.ndarray:
  """Images as time-major sequences, normalized.

  Args:
    images: uint8 [B, height, width, channels], of NumPy or JAX.
    moments: mean and standard deviation of pixels in [0, 1], from :data:`MOMENTS`.
    rows: a row a step, T = height and D = width * channels; by default a pixel a step,
      row after row, T = height * width and D = channels.
    order: int [T], which step comes when, from :func:`permutation`; by default as they
      are.

  Returns:
    float32 [T, B, D].
  """
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
