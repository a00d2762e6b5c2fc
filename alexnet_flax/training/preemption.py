"""SIGTERM and SIGINT as a request to finish the step and save; the second one stops at once."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 1.0  # schedulers send a signal to a process and to its group


class StopRequest:
  """Within it, signals ask for an end instead of ending the process.

  Attributes:
    asked: whether one has come.
  """

  def __init__(self) -> None:
    self.asked = False
    self._since = 0.0
    self._before: dict[int, object] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
      self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)  # type: ignore[arg-type]

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    now = time.monotonic()
    if self.asked and now - self._since > _SAME_SECONDS:
      os._exit(128 + number)  # as a shell reports the signal
    if not self.asked:
      self.asked, self._since = True, now
      os.write(2, f'{signal.Signals(number).name}: finishing the step; once more ends at once\n'.encode())
