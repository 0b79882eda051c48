"""Stopping a training script where it hurts most, and what is compared afterwards."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
from typing import Any

import pytest

from experiments.core import checkpoints, files


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


def assert_same_runs(
  folder: Path, whole: list[dict[str, Any]], cut: list[dict[str, Any]]
) -> None:
  """Results, metrics and the weights last saved are the very same, but for the
  clock.
  """
  assert [{**summary, 'seconds': 0} for summary in cut] == [
    {**summary, 'seconds': 0} for summary in whole
  ]
  for summary in whole:
    a, b = (folder / name / summary['run'] for name in ('whole', 'cut'))
    assert [{**row, 'seconds': 0} for row in files.read_jsonl(a / 'metrics.jsonl')] == [
      {**row, 'seconds': 0} for row in files.read_jsonl(b / 'metrics.jsonl')
    ]
    assert last_saved(a) == last_saved(b)


def last_saved(folder: Path) -> tuple[int, str]:
  """(step, hash of all that was saved) of a run's last checkpoint."""
  step = checkpoints.saved_steps(folder)[-1]
  return step, files.read_json(
    folder / 'checkpoints' / str(step) / 'record' / 'metadata'
  )['sha256']
