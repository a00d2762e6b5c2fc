"""Graceful shutdown: the first signal checkpoints and exits, the second exits immediately."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Self

_SAME_SECONDS = 1.0  # schedulers send a signal to a process and to its group


def heeded_signals() -> list[signal.Signals]:
  """Returns the signals that end a run; under nohup, which lets a process ignore it, without SIGHUP."""
  under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  return [signal.SIGTERM, signal.SIGINT, *([] if under_nohup else [signal.SIGHUP])]


class GracefulShutdown:
  """A context in which SIGTERM, SIGINT and SIGHUP request the end of training, and do not end the process."""

  def __init__(self) -> None:
    self.requested: bool = False
    self._since = 0.0
    self._before: dict[int, object] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
      self._before = {number: signal.signal(number, self._handle) for number in heeded_signals()}
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)  # type: ignore[arg-type]

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if not self.requested:
      self.requested, self._since = True, time.monotonic()
      line = f'{signal.Signals(number).name}: finishing the step; once more ends at once\n'
      with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, line.encode())
    elif time.monotonic() - self._since > _SAME_SECONDS:
      os._exit(128 + number)  # as a shell reports the signal
