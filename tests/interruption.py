"""Stopping a training script where it hurts most."""

from collections.abc import Iterator
import contextlib
from typing import Any

import pytest

from experiments.core import checkpoints


@contextlib.contextmanager
def interrupted_at(number: int) -> Iterator[None]:
  """Lets a training script run until its `number`-th checkpoint, of whichever run, is
  to be saved: its metrics are written.
  """
  save, calls = checkpoints.Run.save, []

  def interrupted_save(
    self: checkpoints.Run, step: int, carry: Any, **record: Any
  ) -> None:
    calls.append(step)
    if len(calls) == number:
      self.close()
      raise KeyboardInterrupt
    save(self, step, carry, **record)
    self.wait()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoints.Run, 'save', interrupted_save)
    try:
      yield
    except KeyboardInterrupt:
      return
  pytest.fail(f'the run ended with {len(calls)} checkpoints, before number {number}')
