"""Ends a command that hangs: a step, a read or a write that never returns is found and named.

What waits inside a library cannot be interrupted, so the process ends at once, with the exit code at which
schedulers start the command again. It goes on from the last checkpoint, as after a kill.
"""

import concurrent.futures
import contextlib
import faulthandler
import itertools
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from alexnet_flax.errors import PreemptedError, UsageError
from alexnet_flax.files import buckets
from alexnet_flax.training.distributed import of_process, tell_parent

Item = TypeVar('Item')
_UPLOAD_WITHIN = 20.0  # seconds


class _Sign(NamedTuple):
  """A sign of life: what the process began to do, and when."""

  what: str  # a clause
  at: float


_last: _Sign | None = None


def heard(items: Iterable[Item], what: str, first: int) -> Iterator[Item]:
  """Yields the items, each of which is a sign of life; they are called `what` and their number."""
  waiting = iter(items)
  for number in itertools.count(first):
    _note(f'the images of {what} {number} were asked for')
    try:
      item = next(waiting)
    except StopIteration:
      return
    _note(f'{what} {number} began')
    yield item


@contextlib.contextmanager
def ends_if_it_hangs(seconds: float, folder: pathlib.Path) -> Iterator[None]:
  """A block in which the process ends when it has given no sign of life for `seconds`; 0: never.

  Time counts from the first batch on: before, data may be copied for hours.
  What its threads wait for is written to `folder`/hang.txt, by process N > 0 of several to hang-N.txt, and
  uploaded if the run is in a bucket.
  """
  global _last
  over, _last = threading.Event(), None
  if seconds:
    threading.Thread(target=_watch, args=(seconds, folder, over), daemon=True).start()
  try:
    yield
  finally:
    over.set()


def _note(what: str) -> None:
  global _last
  _last = _Sign(what, time.monotonic())


def _watch(seconds: float, folder: pathlib.Path, over: threading.Event) -> None:
  tick = min(1.0, seconds / 4)
  while not _last or (waited := time.monotonic() - _last.at) <= seconds:
    before = time.monotonic()
    if over.wait(tick):
      return
    if _last and time.monotonic() - before > 10 * tick:  # the process itself was stopped, and goes on
      _note(_last.what)
  place = folder / of_process('hang.txt')
  with contextlib.suppress(OSError), place.open('w', encoding='utf-8') as file:
    faulthandler.dump_traceback(file, all_threads=True)
  reason = f'nothing has happened for {waited:.0f} s (hang_seconds), since {_last.what}'
  error = PreemptedError(f'{reason}; {_uploaded(place)} shows what waits; the same command goes on')
  with contextlib.suppress(OSError):
    print(error, file=sys.stderr, flush=True)
  os._exit(tell_parent(error.exit_code))


def _uploaded(place: pathlib.Path) -> str:
  """Uploads a file of a run in a bucket, which may be what hangs; returns where the file is."""
  if (url := buckets.url_of(place)) is None:
    return str(place)
  try:
    concurrent.futures.ThreadPoolExecutor(1).submit(buckets.upload, place, url).result(_UPLOAD_WITHIN)
    return url
  except (OSError, UsageError):  # messages name the bucket for the copy of a run, but not for what it is in
    return f'{place.name} below {place.parents[1]}'
