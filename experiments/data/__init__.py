"""The paper's data sets as NumPy arrays: MNIST, CIFAR-10 and Penn Treebank.

`load_images` and `load_text` look in these places, in this order:

1. `data_dir`, if it is a .npz that `python -m experiments.data --dataset=...
   --output=x.npz` wrote; this needs no tensorflow-datasets;
2. a prepared copy in the folder of tensorflow-datasets (TFDS_DATA_DIR, by default
   ~/tensorflow_datasets);
3. the official files in `data_dir` or, without `data_dir`, at their official addresses.
   Their content is checked and prepared into that folder once.

Other data sets are read without a check of their content: 'arrays' (a .npz of images),
and 'text' and 'text_chars' (three text files, one text file, or a .npz of token ids).
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
