"""Clean end of a run on SIGTERM or Ctrl-C.

The current batches are finished and everything is saved before the process ends.
"""

from collections.abc import Iterator
import contextlib
import os
import signal
import threading
from types import FrameType

EXIT_CODE = 75
"""Exit code of a process that a signal stopped and that can be resumed.

It is EX_TEMPFAIL, "try again", of sysexits.h.
"""


_noted: list[str] = []
"""Names of the signals received so far."""


class Stopped(Exception):
  """Exception for an end that a signal asked for; everything is saved.

  The text names the signal.
  """


@contextlib.contextmanager
def catch_signals() -> Iterator[None]:
  """Note a first SIGTERM or Ctrl-C within the context.

  The work inside must look at :func:`requested`. A second signal acts at once, as
  usual.
  """
  # Python delivers signals to the main thread, and only there can handlers be set.
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def note(number: int, frame: FrameType | None) -> None:
    _noted.append(signal.Signals(number).name)
    restore()
    # Not print: the signal may have come in the middle of one.
    text = f'\n{_noted[-1]}: stopping after this chunk; send it again to stop at once\n'
    os.write(2, text.encode())

  # A signal that is ignored, as in background jobs of a shell, stays ignored.
  heard = [
    number
    for number in (signal.SIGTERM, signal.SIGINT)
    if signal.getsignal(number) != signal.SIG_IGN
  ]
  before = {number: signal.signal(number, note) for number in heard}

  def restore() -> None:
    for number, handler in before.items():
      signal.signal(number, handler)

  try:
    yield
  finally:
    restore()
    _noted.clear()


def requested() -> str | None:
  """Return the name of the signal that asked for the end, or None."""
  return _noted[-1] if _noted else None
