"""The options of one trainer, validated once and passed on as one object."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fptt_jax._checks import require
from fptt_jax._types import Hidden, Model
from fptt_jax._windows import WindowPlan, make_windows
from fptt_jax.influence import Influence
from fptt_jax.losses import Loss
from fptt_jax.training._schedules import Method


@dataclasses.dataclass(frozen=True)
class StepSpec:
  """Resolved options of a trainer. The inner functions take it as first argument.

  Attributes:
    model: Model as evaluation runs it.
    training_model: Model as training runs it: in micro-batches, where asked for.
    loss: Loss of a window.
    optimizer: Optax transformation that accepts extra arguments.
    method: Training method.
    method_name: Its name in `METHODS`, or 'custom'.
    num_windows: K, or None.
    window_size: Size S of the longest window, or None.
    truncation_steps: Steps that 'tbptt_final' differentiates, or None.
    carry_hidden: Whether a batch continues the sequences of the previous one.
    loss_weights: float [K], weights of the windows' losses, or None.
    inner_steps: Gradient steps per window.
    skip_nonfinite: Whether updates with non-finite numbers are left out.
    readout_chunk: Steps per chunk of the readout, or None.
    return_outputs: Whether a step returns the model's outputs.
    micro_batches: Parts that a window's rows are run in.
    axis: Name of the mesh axis that is bound where the model runs, or None.
    influence: How credit crosses the windows' borders, or None.
    hidden_map: The window map that the influence differentiates, or None.
    checkpoint_windows: Whether windows are run again for their gradients.
  """

  model: Model
  training_model: Model
  loss: Loss
  optimizer: optax.GradientTransformationExtraArgs
  method: Method
  method_name: str
  num_windows: int | None = None
  window_size: int | None = None
  truncation_steps: int | None = None
  carry_hidden: bool = False
  loss_weights: np.ndarray | None = None
  inner_steps: int = 1
  skip_nonfinite: bool = False
  readout_chunk: int | None = None
  return_outputs: bool = False
  micro_batches: int = 1
  axis: str | None = None
  influence: Influence | None = None
  hidden_map: Callable[..., Hidden] | None = None
  checkpoint_windows: bool = False

  def plan_windows(self, num_steps: int) -> WindowPlan:
    """Cut a sequence into the method's windows.

    Args:
      num_steps: T.

    Returns:
      The K windows. The only window of 'tbptt_final' is the last
      `truncation_steps` steps.

    Raises:
      ValueError: `num_steps` is too short for the options.
    """
    windows = self._windows_of_method(num_steps)
    weights = self.loss_weights
    if weights is not None:
      count = windows.num_windows
      accepted = f'one factor for each of the K={count} windows'
      require(len(weights) == count, 'loss_weights', accepted, len(weights))
    return windows

  def _windows_of_method(self, num_steps: int) -> WindowPlan:
    steps = self.truncation_steps
    if steps is not None:
      accepted = f'at most the sequence length T={num_steps}'
      require(steps <= num_steps, 'truncation_steps', accepted, steps)
      return make_windows(steps, num_windows=1).shifted(num_steps - steps)
    fixed = self.method.num_windows
    # Methods with an update per step have as many windows as the sequence has steps.
    if isinstance(fixed, str):
      return make_windows(num_steps, num_windows=num_steps)
    if fixed is not None:
      return make_windows(num_steps, num_windows=fixed)
    return make_windows(
      num_steps, num_windows=self.num_windows, window_size=self.window_size
    )

  def window_weights(self, num_windows: int) -> jax.Array:
    """Return the weights of the windows' losses, float [K]; 1 by default."""
    if self.loss_weights is None:
      return jnp.asarray(np.ones(num_windows))
    return jnp.asarray(self.loss_weights)
