"""Recurrent layers by name, as the image and language scripts build them, and how many
parameters there are.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import Any

from flax import nnx
import jax

from fptt_jax import nn

CELLS: dict[str, Callable[[int, int, float | None, nnx.Rngs], Any]] = {
  'lstm': lambda features, hidden, forget_bias, rngs: nn.LSTM(
    features, hidden, forget_bias=forget_bias, rngs=rngs
  ),
  'gru': lambda features, hidden, _, rngs: nn.GRU(
    features, hidden, recurrent_bias=False, rngs=rngs
  ),
  'rnn': lambda features, hidden, _, rngs: nn.ElmanRNN(features, hidden, rngs=rngs),
  'antisymmetric': lambda features, hidden, _, rngs: nn.AntisymmetricRNN(
    features, hidden, rngs=rngs
  ),
  'fastgrnn': lambda features, hidden, _, rngs: nn.FastGRNN(
    features, hidden, rngs=rngs
  ),
  'irnn': lambda features, hidden, _, rngs: nn.IncrementalRNN(
    features, hidden, rngs=rngs
  ),
  'indrnn': lambda features, hidden, _, rngs: nn.IndRNN(
    features, hidden, max_weight=1.0, rngs=rngs
  ),
  'lru': lambda features, hidden, _, rngs: nn.LRU(
    features, hidden, r_min=0.9, r_max=0.999, rngs=rngs
  ),
}
"""(features in, H, initial bias of the LSTM's forget gate or None, rngs) -> layer."""


WITH_W_H = ('lstm', 'gru', 'rnn')
"""Those that have one recurrent matrix, whose weights can be dropped out."""


def recurrent_parameters(cell: str, widths: Sequence[int]) -> int:
  """Parameters of layers one on another; `widths` are features of the inputs, then of
  each layer.
  """
  build = lambda: nnx.List(
    [CELLS[cell](*sizes, None, nnx.Rngs(0)) for sizes in itertools.pairwise(widths)]
  )
  return count(nnx.state(nnx.eval_shape(build), nnx.Param))


def count(params: Any) -> int:
  """Numbers in a tree of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
