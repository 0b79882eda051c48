"""Stopping a training script where it hurts most."""

from collections.abc import Iterator
import contextlib
from typing import Any

import pytest

from experiments import runs


@contextlib.contextmanager
def interrupted_at(step: int) -> Iterator[None]:
  """Lets a training script run until its metrics of `step` are written and its checkpoint is not."""
  save = runs.Run.save

  def interrupted_save(self: runs.Run, at: int, carry: Any, **record: Any) -> None:
    if at == step:
      self.close()
      raise KeyboardInterrupt
    save(self, at, carry, **record)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs.Run, 'save', interrupted_save)
    try:
      yield
    except KeyboardInterrupt:
      return
  pytest.fail(f'the run ended before a checkpoint of step {step}')
