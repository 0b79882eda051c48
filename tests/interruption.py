"""Stopping a training script where it hurts most."""

from collections.abc import Iterator
import contextlib
from typing import Any

import pytest

from experiments import runs


@contextlib.contextmanager
def interrupted_at(step: int, times: int = 1) -> Iterator[None]:
  """Lets a training script run until its metrics of `step` are written and its checkpoint is not: that of the first run, or of the
  one that is saved `times`-th."""
  save, left = runs.Run.save, [times]

  def interrupted_save(self: runs.Run, at: int, carry: Any, **record: Any) -> None:
    if at == step:
      left[0] -= 1
      if not left[0]:
        self.close()
        raise KeyboardInterrupt
    save(self, at, carry, **record)
    if at == step:
      self.wait()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs.Run, 'save', interrupted_save)
    try:
      yield
    except KeyboardInterrupt:
      return
  pytest.fail(f'the run ended before a checkpoint of step {step}')
