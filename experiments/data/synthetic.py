"""Synthetic data with which every script runs in seconds, without a download.

Results on these data mean nothing.
"""

from pathlib import Path

import numpy as np

from experiments import data


def data_files(folder: Path) -> dict[str, str]:
  """Write synthetic images and texts.

  Args:
    folder: folder to write to.

  Returns:
    Values of --data_dir: 'images', a .npz file, and 'text', a folder of three files.
  """
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  pictures = folder / 'images.npz'
  if not pictures.exists():
    data.save(images(rng), pictures)
  for split, lines in (('train', 120), ('valid', 30), ('test', 30)):
    (folder / f'ptb.{split}.txt').write_text(text(lines))
  return {'images': str(pictures), 'text': str(folder)}


def images(
  rng: np.random.Generator, train: int = 64, test: int = 16, size: int = 6
) -> data.Images:
  """Draw gray images of noise with one bright row, whose number is the label.

  Args:
    rng: random generator.
    train: number of training images.
    test: number of test images.
    size: height and width.
  """
  labels = [rng.integers(0, size, count).astype(np.int32) for count in (train, test)]
  pixels = []
  for rows in labels:
    noise = rng.integers(0, 100, (len(rows), size, size, 1)).astype(np.uint8)
    noise[np.arange(len(rows)), rows] = 255
    pixels.append(noise)
  return data.Images(pixels[0], labels[0], pixels[1], labels[1])


def text(lines: int) -> str:
  """Return lines of six words, which repeat four words in turn."""
  words = ['one', 'two', 'three', 'four']
  written = []
  for number in range(lines):
    line = ' '.join(words[(number + step) % 4] for step in range(6))
    # Blanks at both ends, as in the files of Penn Treebank.
    written.append(f' {line} \n')
  return ''.join(written)
