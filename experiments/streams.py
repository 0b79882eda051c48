"""A text as parallel streams, cut into batches that continue each other."""

from collections.abc import Iterator

import numpy as np

from experiments.options import UserError
import fptt_jax


def streams(tokens: np.ndarray, batch_size: int) -> np.ndarray:
  """A text as B streams side by side, [N, B]; what does not fill all of them is left out."""
  steps = len(tokens) // batch_size
  if steps < 2:
    raise UserError(f'a text of {len(tokens)} tokens is too short for {batch_size} parallel streams.')
  return tokens[: steps * batch_size].reshape(batch_size, steps).T


def sequences(tokens: np.ndarray, seq_len: int, batch_size: int) -> Iterator[fptt_jax.Batch]:
  """Cuts a text's streams into batches of T steps, in order; the last batch is padded, its lengths say so."""
  side_by_side = streams(tokens, batch_size)
  for start in range(0, len(side_by_side) - 1, seq_len):
    steps = min(seq_len, len(side_by_side) - 1 - start)
    batch = padded(side_by_side, start, steps, seq_len)
    yield batch if steps < seq_len else batch._replace(lengths=None)


def padded(side_by_side: np.ndarray, start: int, steps: int, seq_len: int) -> fptt_jax.Batch:
  """`steps` tokens of each stream and the tokens after them, laid out on `seq_len` steps."""
  padding = ((0, seq_len - steps), (0, 0))
  inputs, targets = (np.pad(side_by_side[first : first + steps], padding) for first in (start, start + 1))
  return fptt_jax.Batch(inputs, targets, np.full(side_by_side.shape[1], steps, np.int32))
