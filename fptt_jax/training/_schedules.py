"""The training methods of the paper, each as settings of one train step.

A method is defined by its update frequency (after each window, or once per sequence),
by its gradient horizon (to the start of the loss's window, or of the sequence), and by
whether FPTT's regularizer is on. The number of windows K does the rest: K = T makes an
update per step, K = 1 is one window of the whole sequence.
"""

from typing import NamedTuple

import numpy as np


class Method(NamedTuple):
  """A training method.

  Attributes:
    regularized: Whether the optimizer must contain `fptt`. The trainer takes the
      optimizer as it is and checks this.
    update_each_window: Whether the optimizer steps after each window, rather than once
      per sequence.
    whole_gradient: Whether gradients reach back to the start of the sequence, rather
      than to the start of the loss's own window.
    num_windows: K if the method fixes it: a number, or 'T' for one window per step.
    truncated: Whether only the last `truncation_steps` steps are differentiated, as in
      classic truncated BPTT.
    summary: One line for tables and help texts.

  Example:
    >>> import fptt_jax
    >>> # One update per sequence, with the gradient cut at the windows' borders.
    >>> method = fptt_jax.Method(
    ...   regularized=False, update_each_window=False, whole_gradient=False
    ... )
  """

  regularized: bool
  update_each_window: bool
  whole_gradient: bool
  num_windows: int | str | None = None
  truncated: bool = False
  summary: str = ''


METHODS: dict[str, Method] = {
  'fptt': Method(
    True,
    True,
    False,
    summary='FPTT-K: an update per window, dynamic regularizer (Algorithm 2)',
  ),
  'tbptt': Method(
    False, True, False, summary='the same windows and losses without the regularizer'
  ),
  'ogd': Method(
    False,
    True,
    False,
    num_windows='T',
    summary='online gradient descent: an update each step (use SGD)',
  ),
  'bptt': Method(
    False,
    False,
    True,
    num_windows=1,
    summary='back-propagation through time: one update per sequence (Algorithm 1)',
  ),
  'tbptt_final': Method(
    False,
    False,
    True,
    num_windows=1,
    truncated=True,
    summary='one update, final loss, gradient cut to the last steps',
  ),
  'bptt_aux': Method(
    False, False, True, summary="one update on the sum of all windows' losses (Table 3)"
  ),
  'ftrl': Method(
    False,
    True,
    True,
    summary='at each window the mean of all losses so far, at K times the cost',
  ),
}
"""The methods of the paper by name."""


class UpdatePlan(NamedTuple):
  """The V windows of each of the U updates of a sequence, as constant arrays.

  Attributes:
    windows: int32 [U, V], windows that an update runs through, in order.
    coefficients: float64 [U, V], weights of the windows' losses in the objective.
    records: bool [U, V], whether a window is seen for the first time. Only then do its
      metrics and loss state count.
    restarts: Whether each update starts from the sequence's initial hidden state rather
      than from the last one.
  """

  windows: np.ndarray
  coefficients: np.ndarray
  records: np.ndarray
  restarts: bool


def plan_updates(method: Method, num_windows: int) -> UpdatePlan:
  """Lay out the updates of one sequence.

  Args:
    method: Training method.
    num_windows: K.

  Returns:
    One update of all windows, K updates of one window each, or, for methods with an
    update per window and whole gradients, K updates of all windows so far.
  """
  numbers = np.arange(num_windows, dtype=np.int32)
  if not method.update_each_window:
    ones = np.ones((1, num_windows))
    return UpdatePlan(numbers[None, :], ones, ones.astype(bool), True)
  if not method.whole_gradient:
    ones = np.ones((num_windows, 1))
    return UpdatePlan(numbers[:, None], ones, ones.astype(bool), False)
  # Update k takes the mean over windows 0..k. Later windows run along with weight 0, so
  # that all updates have one shape.
  so_far = numbers[None, :] <= numbers[:, None]
  return UpdatePlan(
    windows=np.broadcast_to(numbers, (num_windows, num_windows)),
    coefficients=so_far / (numbers[:, None] + 1),
    records=np.eye(num_windows, dtype=bool),
    restarts=True,
  )
