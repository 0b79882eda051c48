"""Registry of the recurrent layers and counts of their parameters."""

from collections.abc import Callable, Sequence
import itertools
from typing import Any

from flax import nnx
import jax

from experiments.core.flags import check
from experiments.core.recipe import Recipe
from fptt_jax import nn

Builder = Callable[..., Any]
"""(features in, hidden size H, forget bias or None, random streams, **settings) ->
layer.
"""


def _lstm(
  features: int,
  hidden: int,
  forget_bias: float | None,
  rngs: nnx.Rngs,
  **settings: Any,
) -> nn.LSTM:
  """Build an LSTM; None leaves its forget bias at the default."""
  return nn.LSTM(features, hidden, forget_bias=forget_bias, rngs=rngs, **settings)


def _plain(layer: Callable[..., Any], **fixed: Any) -> Builder:
  """Return the builder of a layer that has no initial forget bias."""

  def build(
    features: int,
    hidden: int,
    forget_bias: float | None,
    rngs: nnx.Rngs,
    **settings: Any,
  ) -> Any:
    # Accepted and ignored, so that the scripts can call all builders alike.
    del forget_bias
    return layer(features, hidden, rngs=rngs, **fixed, **settings)

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


WITH_KERNEL = ('lstm', 'gru', 'rnn', 'antisymmetric')
"""Cells with a native kernel."""


def build(
  config: Recipe,
  cell: str,
  features: int,
  hidden: int,
  forget_bias: float | None,
  rngs: nnx.Rngs,
) -> Any:
  """Build a recurrent layer that runs as --implementation and --products say.

  Args:
    config: settings that `check_settings` accepts.
    cell: a name in `CELLS`.
    features: number of input features.
    hidden: H.
    forget_bias: initial bias of an LSTM's forget gate; None for the layer's default.
    rngs: random streams.
  """
  settings = {}
  if config.implementation != 'auto':
    settings['implementation'] = config.implementation
  if config.products != 'float32':
    settings['products'] = config.products
  return CELLS[cell](features, hidden, forget_bias, rngs, **settings)


def check_settings(config: Recipe, cell: str) -> None:
  """Check that a cell can run as --implementation and --products say.

  Raises:
    ValueError: the cell has no native kernel, or the settings exclude each other.
  """
  without = f'with --cell={cell}, which is not {", ".join(WITH_KERNEL)}'
  is_plain = config.implementation == 'auto' or cell in WITH_KERNEL
  expected = f"'auto' {without}"
  check(is_plain, 'implementation', config.implementation, expected)
  is_plain = config.products == 'float32' or cell in WITH_KERNEL
  check(is_plain, 'products', config.products, f"'float32' {without}")
  is_plain = config.products == 'float32' or config.implementation != 'scan'
  expected = "'float32' with --implementation=scan"
  check(is_plain, 'products', config.products, expected)


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
