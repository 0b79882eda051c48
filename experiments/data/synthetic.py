"""Made-up data of the real data's kind, so that every script runs in seconds without a
download. Results on it mean nothing.
"""

from pathlib import Path

import numpy as np

from experiments import data


def data_files(folder: Path) -> dict[str, str]:
  """Writes made-up images and text below `folder`, if they are not there: {'images': a
  .npz, 'text': a folder of three texts}.
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
  """Grey images of noise with one bright row, whose number is the label."""
  labels = [rng.integers(0, size, count).astype(np.int32) for count in (train, test)]
  pixels = [
    rng.integers(0, 100, (len(part), size, size, 1)).astype(np.uint8) for part in labels
  ]
  for part, rows in zip(pixels, labels, strict=True):
    part[np.arange(len(rows)), rows] = 255
  return data.Images(pixels[0], labels[0], pixels[1], labels[1])


def text(lines: int) -> str:
  """Lines that go round in four words."""
  words = ['one', 'two', 'three', 'four']
  return ''.join(
    f' {" ".join(words[(number + step) % 4] for step in range(6))} \n'
    for number in range(lines)
  )
