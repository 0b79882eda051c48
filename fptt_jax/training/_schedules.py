"""The training methods the paper speaks of, each as a setting of one machinery.

A method is told apart by how often the parameters move (after each window, or once a
sequence), by how far back the gradient of each loss reaches (to its own window's start,
or to the sequence's), and by whether FPTT's regularizer is on. The number of
windows K does the rest: K = T is one update each step, K = 1 one window of the whole
  sequence.
"""

from typing import NamedTuple

import numpy as np


class Method(NamedTuple):
  """A training method.

  Attributes:
    regularized: whether the optimizer contains `fptt`. The train step takes the
      optimizer as it is given and checks this.
    update_each_window: True: an optimizer step after each window; False: one a
      sequence.
    whole_gradient: True: gradients reach back to the sequence's start; False: to the
      start of the loss's own window.
    num_windows: K if the method fixes it: a number, or 'T' for one window a step.
    truncated: the classic truncated BPTT: only the last steps (how many is the step's
      `truncation_steps`) are differentiated.
    summary: one line for tables and help texts.
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
    summary='FPTT-K: an update a window, dynamic regularizer (Algorithm 2)',
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
    summary='back-propagation through time: one update a sequence (Algorithm 1)',
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
    summary='at each window the mean of all losses so far, from the start: Ω(T²)',
  ),
}
"""Every method of the paper by name."""


class UpdatePlan(NamedTuple):
  """Which windows each of the U updates of a sequence looks at (V windows each), as
  constant arrays.

  Attributes:
    windows: int32 [U, V], indices of the windows an update runs through, in order.
    coefficients: float64 [U, V], weight of each window's loss in the update's
      objective.
    records: bool [U, V], True where the window is seen for the first time: its metrics
      and loss state count.
    restarts: whether each update starts from the sequence's initial hidden state rather
      than from the last one.
  """

  windows: np.ndarray
  coefficients: np.ndarray
  records: np.ndarray
  restarts: bool


def plan_updates(method: Method, num_windows: int) -> UpdatePlan:
  """Lays out the updates of one sequence of `num_windows` = K windows."""
  each = np.arange(num_windows, dtype=np.int32)
  if not method.update_each_window:
    return UpdatePlan(
      each[None, :], np.ones((1, num_windows)), np.ones((1, num_windows), bool), True
    )
  if not method.whole_gradient:
    return UpdatePlan(
      each[:, None], np.ones((num_windows, 1)), np.ones((num_windows, 1), bool), False
    )
  seen = each[None, :] <= each[:, None]
  coefficients = seen / (each[:, None] + 1)
  return UpdatePlan(
    np.broadcast_to(each, (num_windows, num_windows)),
    coefficients,
    np.eye(num_windows, dtype=bool),
    True,
  )
