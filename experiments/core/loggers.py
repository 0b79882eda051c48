"""Loggers that copy the metrics of a run to other programs."""

from collections.abc import Mapping
import importlib.util
from pathlib import Path

LOGGERS = ('none', 'tensorboard')
"""Values of `--logger`."""


def is_available(name: str) -> bool:
  """Return whether the package that a logger needs is installed."""
  # find_spec does not import: tensorboardX takes a while and may never be used.
  return name != 'tensorboard' or importlib.util.find_spec('tensorboardX') is not None


class TensorBoard:
  """Writer of the scalars of one run as event files in the run's folder."""

  def __init__(self, folder: Path, step: int):
    """Open a new event file.

    Args:
      folder: the run's folder; its name is the name of the run in TensorBoard.
      step: number of batches after which the run resumes. TensorBoard hides all later
        points of earlier processes.
    """
    import tensorboardX  # An optional dependency.

    # The batches after `step` are trained on again: without the purge their points
    # would be shown twice.
    self._writer = tensorboardX.SummaryWriter(
      str(folder),
      purge_step=step + 1,
      flush_secs=10,
      filename_suffix=f'.{step}',  # Two starts within one second need two names.
    )

  def log(self, step: int, scalars: Mapping[str, float]) -> None:
    """Write scalars by tag, as of `step` batches."""
    for tag, value in scalars.items():
      self._writer.add_scalar(tag, value, step)

  def flush(self) -> None:
    """Wait until all scalars are in the file."""
    self._writer.flush()

  def close(self) -> None:
    """Close the file."""
    self._writer.close()
