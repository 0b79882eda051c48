"""The data sets of the paper in NumPy arrays: MNIST, CIFAR-10, Penn Treebank by words
and by characters.

`load_images` and `load_text` look, in this order, at

1. `data_dir`, if it is a .npz that `python -m experiments.data --dataset=...
--output=x.npz` wrote (needs no tensorflow-datasets); 2. a prepared copy in the folder
of tensorflow-datasets (TFDS_DATA_DIR, by default ~/tensorflow_datasets); 3. the
official files in `data_dir`, or, where none is given, at their official addresses; what
they hold is checked, and prepared
   into that folder once.

A data set of one's own is read as it is: 'arrays' (a .npz of images), 'text' and
'text_chars' (three text files, or one, or a .npz of token ids).
"""

from experiments.data.images import Images
from experiments.data.loading import (
  IMAGES,
  TEXTS,
  fingerprint,
  load_images,
  load_text,
  save,
)
from experiments.data.sequences import (
  MOMENTS,
  Examples,
  Splits,
  hold_out,
  permutation,
  to_sequences,
)
from experiments.data.text import Text

__all__ = (
  'IMAGES',
  'MOMENTS',
  'TEXTS',
  'Examples',
  'Images',
  'Splits',
  'Text',
  'fingerprint',
  'hold_out',
  'load_images',
  'load_text',
  'permutation',
  'save',
  'to_sequences',
)
