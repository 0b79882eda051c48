"""Influence of the parameters on the hidden state, carried across windows.

Windows cut the gradient at their start. An :class:`Influence` carries what they cut
off: the derivative of the hidden state with respect to the parameters, exact or
approximated. `fptt_jax.make_trainer(..., influence=...)` takes a name of `INFLUENCES`,
or what the functions of this module make.
"""

from fptt_jax._types import OwnProduct, OwnStep
from fptt_jax.influence._base import Influence, WindowMap, attach
from fptt_jax.influence._exact import rtrl
from fptt_jax.influence._kronecker import kronecker
from fptt_jax.influence._lookback import lookback
from fptt_jax.influence._snap import snap, snap1
from fptt_jax.influence._synthetic import synthetic
from fptt_jax.influence._uoro import uoro

INFLUENCES: dict[str, Influence] = {
  'rtrl': rtrl(),
  'snap1': snap1(),
  'uoro': uoro(),
  'kronecker': kronecker(),
  'lookback': lookback(),
  'synthetic': synthetic(),
}
"""The influences by name, with their default settings."""

__all__ = (
  'INFLUENCES',
  'Influence',
  'OwnProduct',
  'OwnStep',
  'WindowMap',
  'attach',
  'kronecker',
  'lookback',
  'rtrl',
  'snap',
  'snap1',
  'synthetic',
  'uoro',
)


def __dir__() -> list[str]:
  """List the public names only."""
  return sorted(__all__)
