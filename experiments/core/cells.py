"""Registry of the recurrent layers and counts of their parameters."""

from collections.abc import Callable, Sequence
import itertools
from typing import Any

from flax import nnx
import jax

from fptt_jax import nn

Builder = Callable[[int, int, float | None, nnx.Rngs], Any]
"""(features in, hidden size H, forget bias or None, random streams) -> layer."""


def _lstm(
  features: int,
  hidden: int,
  forget_bias: float | None,
  rngs: nnx.Rngs,
) -> nn.LSTM:
  """Build an LSTM; None leaves its forget bias at the default."""
  return nn.LSTM(features, hidden, forget_bias=forget_bias, rngs=rngs)


def _plain(layer: Callable[..., Any], **settings: Any) -> Builder:
  """Return the builder of a layer that has no initial forget bias."""

  def build(
    features: int,
    hidden: int,
    forget_bias: float | None,
    rngs: nnx.Rngs,
  ) -> Any:
    # Accepted and ignored, so that the scripts can call all builders alike.
    del forget_bias
    return layer(features, hidden, rngs=rngs, **settings)

  return build


CELLS: dict[str, Builder] = {
  'lstm': _lstm,
  # One bias per gate: the GRUs of the paper's Table 2 have this many parameters.
  'gru': _plain(nn.GRU, recurrent_bias=False),
  'rnn': _plain(nn.ElmanRNN),
  'antisymmetric': _plain(nn.AntisymmetricRNN),
  'fastgrnn': _plain(nn.FastGRNN),
  'irnn': _plain(nn.IncrementalRNN),
  # The paper's limit 2 ** (1 / T) tends to 1 for the long sequences here.
  'indrnn': _plain(nn.IndRNN, max_weight=1.0),
  # Eigenvalues near the unit circle keep a memory of hundreds of steps.
  'lru': _plain(nn.LRU, r_min=0.9, r_max=0.999),
}
"""Builders of the recurrent layers, by the value of --cell."""


WITH_W_H = ('lstm', 'gru', 'rnn')
"""Cells with one recurrent matrix, which weight dropout can be applied to."""


def recurrent_parameters(cell: str, widths: Sequence[int]) -> int:
  """Return the number of parameters of a stack of recurrent layers.

  Args:
    cell: a name in `CELLS`.
    widths: number of input features, then the hidden size of each layer.
  """

  def build() -> nnx.List[Any]:
    return nnx.List(
      [CELLS[cell](*sizes, None, nnx.Rngs(0)) for sizes in itertools.pairwise(widths)]
    )

  # Shapes are enough for a count, and large layers take seconds to initialize.
  return count(nnx.state(nnx.eval_shape(build), nnx.Param))


def count(params: Any) -> int:
  """Return the number of scalars in a tree of arrays or of their shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
