"""Ending a run from outside: SIGTERM and Ctrl-C are answered after the batches under
way, with everything saved.
"""

from collections.abc import Iterator
import contextlib
import os
import signal
import threading
from types import FrameType

EXIT_CODE = 75
"""How a process ends that a signal stopped and that can go on: EX_TEMPFAIL of
sysexits.h, "try again".
"""


_noted: list[str] = []


class Stopped(Exception):
  """A signal asked for an end, and all is saved; the text names the signal."""


@contextlib.contextmanager
def catch_signals() -> Iterator[None]:
  """A first SIGTERM or Ctrl-C is noted, for the loop inside to look at
  :func:`requested`; a second one acts at once, as always.
  """
  if (
    threading.current_thread() is not threading.main_thread()
  ):  # Others are sent no signals.
    yield
    return

  def note(number: int, frame: FrameType | None) -> None:
    _noted.append(signal.Signals(number).name)
    restore()
    # Not print: the signal may have come in the middle of one.
    os.write(
      2,
      f'\n{_noted[-1]}: stopping after this chunk; once more stops at once\n'.encode(),
    )

  heard = [
    number
    for number in (signal.SIGTERM, signal.SIGINT)
    if signal.getsignal(number) != signal.SIG_IGN
  ]  # As nohup does.
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
  """Name of the signal that asked for an end, if any did."""
  return _noted[-1] if _noted else None
