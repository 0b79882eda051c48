"""A text as parallel streams, cut into batches that continue each other."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.flags import UserError
import fptt_jax


def streams(tokens: np.ndarray, batch_size: int) -> np.ndarray:
  """A text as B streams side by side, [N, B]; what does not fill all of them is left
  out.
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
  """Cuts a text's streams into batches of T steps, in order; the last batch is padded,
  its lengths say so.
  """
  side_by_side = streams(tokens, batch_size)
  for place in places(len(side_by_side), seq_len):
    for number, start in enumerate(place.start):
      batch = padded(
        side_by_side,
        start,
        seq_len if place.steps is None else place.steps[number],
        seq_len,
      )
      yield batch._replace(lengths=None) if place.steps is None else batch


def padded(
  side_by_side: np.ndarray, start: int, steps: int, seq_len: int
) -> fptt_jax.Batch:
  """`steps` tokens of each stream and the tokens after them, laid out on `seq_len`
  steps.
  """
  padding = ((0, seq_len - steps), (0, 0))
  inputs, targets = (
    np.pad(side_by_side[first : first + steps], padding) for first in (start, start + 1)
  )
  return fptt_jax.Batch(
    inputs, targets, np.full(side_by_side.shape[1], steps, np.int32)
  )


class Place(NamedTuple):
  """Where batches lie in the streams.

  Attributes:
    start: int32 [N], the first token of each.
    steps: int32 [N], how many tokens of each stream it has, where that is fewer than T;
      None where all have T.
  """

  start: np.ndarray
  steps: np.ndarray | None


def places(length: int, seq_len: int) -> list[Place]:
  """Where :func:`sequences` cuts streams of `length` tokens: the whole batches, then
  the padded last one, if any.
  """
  whole, rest = divmod(length - 1, seq_len)
  found = [Place(seq_len * np.arange(whole, dtype=np.int32), None)] if whole else []
  return (
    [*found, Place(np.array([whole * seq_len], np.int32), np.array([rest], np.int32))]
    if rest
    else found
  )


def read(side_by_side: jax.Array, place: Place, seq_len: int) -> fptt_jax.Batch:
  """One batch out of streams [N + T, B] that end in T of padding. Traced."""
  rows = jax.lax.dynamic_slice_in_dim(side_by_side, place.start, seq_len + 1)
  lengths = None if place.steps is None else jnp.full(rows.shape[1], place.steps)
  return fptt_jax.Batch(rows[:-1], rows[1:], lengths)
