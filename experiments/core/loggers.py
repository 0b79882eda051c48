"""Loggers that a run may write to beside its metrics.jsonl."""

from collections.abc import Mapping
import importlib.util
from pathlib import Path

LOGGERS = ('none', 'tensorboard')
"""What `--logger` accepts."""


def is_available(name: str) -> bool:
  """Returns whether the package that a logger needs is installed."""
  return name != 'tensorboard' or importlib.util.find_spec('tensorboardX') is not None


class TensorBoard:
  """Writes scalars of one run as event files into the run's folder.

  TensorBoard drops what an earlier process of the same run wrote after `step`: those
  batches are about to be trained on again.
  """

  def __init__(self, folder: Path, step: int):
    """Opens a new event file.

    Args:
      folder: the run's folder; its name is the name of the run in TensorBoard.
      step: batches after which the run goes on.
    """
    import tensorboardX  # An optional dependency.

    self._writer = tensorboardX.SummaryWriter(
      str(folder),
      purge_step=step + 1,
      flush_secs=10,
      filename_suffix=f'.{step}',  # Two starts within one second have a file each.
    )

  def log(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes scalars by tag, after `step` batches."""
    for tag, value in scalars.items():
      self._writer.add_scalar(tag, value, step)

  def flush(self) -> None:
    """Waits until all scalars are in the file."""
    self._writer.flush()

  def close(self) -> None:
    """Ends the file."""
    self._writer.close()
