"""Text as parallel streams, cut into batches that continue each other."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.flags import UserError
import fptt_jax


def streams(tokens: np.ndarray, batch_size: int) -> np.ndarray:
  """Split a text into B streams of equal length.

  Args:
    tokens: int32 [tokens].
    batch_size: B.

  Returns:
    int32 [N, B]. The tokens at the end that do not fill all streams are left out.

  Raises:
    UserError: a stream would have fewer than two tokens.
  """
  steps = len(tokens) // batch_size
  if steps < 2:
    raise UserError(
      f'a text of {len(tokens)} tokens is too short for {batch_size} parallel streams.'
    )
  return tokens[: steps * batch_size].reshape(batch_size, steps).T


def sequences(
  tokens: np.ndarray, seq_len: int, batch_size: int
) -> Iterator[fptt_jax.Batch]:
  """Yield the batches of a text in order.

  The last batch is padded to T steps if it is shorter, and only then has lengths.

  Args:
    tokens: int32 [tokens].
    seq_len: T.
    batch_size: B.

  Raises:
    UserError: the text is too short.
  """
  side_by_side = streams(tokens, batch_size)
  for place in places(len(side_by_side), seq_len):
    for number, start in enumerate(place.start):
      if place.steps is None:
        batch = padded(side_by_side, start, seq_len, seq_len)
        yield batch._replace(lengths=None)
      else:
        yield padded(side_by_side, start, place.steps[number], seq_len)


def padded(
  side_by_side: np.ndarray, start: int, steps: int, seq_len: int
) -> fptt_jax.Batch:
  """Return a batch of consecutive tokens, padded to a given length.

  Args:
    side_by_side: int32 [N, B], the streams.
    start: first step of the inputs; the targets are one step later.
    steps: number of steps that are not padding.
    seq_len: T.
  """
  padding = ((0, seq_len - steps), (0, 0))
  inputs = np.pad(side_by_side[start : start + steps], padding)
  targets = np.pad(side_by_side[start + 1 : start + 1 + steps], padding)
  lengths = np.full(side_by_side.shape[1], steps, np.int32)
  return fptt_jax.Batch(inputs, targets, lengths)


class Place(NamedTuple):
  """Places of N batches in the streams.

  Attributes:
    start: int32 [N], first step of each batch.
    steps: int32 [N], number of steps of batches that are shorter than T; None if all
      have T steps.
  """

  start: np.ndarray
  steps: np.ndarray | None


def places(length: int, seq_len: int) -> list[Place]:
  """Return the places of the batches of :func:`sequences`.

  Args:
    length: number of tokens per stream.
    seq_len: T.

  Returns:
    The full batches, then the last batch if it is shorter; each only if it exists.
  """
  # The last token is a target only.
  whole, rest = divmod(length - 1, seq_len)
  found = []
  if whole:
    found.append(Place(seq_len * np.arange(whole, dtype=np.int32), None))
  if rest:
    start = np.array([whole * seq_len], np.int32)
    found.append(Place(start, np.array([rest], np.int32)))
  return found


def read(side_by_side: jax.Array, place: Place, seq_len: int) -> fptt_jax.Batch:
  """Read one batch from streams; JAX traces this function.

  Args:
    side_by_side: int32 [N + T, B], streams with T steps of padding at the end.
    place: `start` [] and `steps` [] or None of one batch.
    seq_len: T.
  """
  # Without the padding, dynamic_slice would move the last batch to an earlier start.
  rows = jax.lax.dynamic_slice_in_dim(side_by_side, place.start, seq_len + 1)
  lengths = None if place.steps is None else jnp.full(rows.shape[1], place.steps)
  return fptt_jax.Batch(rows[:-1], rows[1:], lengths)
