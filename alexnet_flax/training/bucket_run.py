"""A run in a bucket: trained in a folder of this machine, which is uploaded as it grows, under a lease.

The bucket is the truth. A start takes the lease, copies the run from the bucket (of its checkpoints the last
whole one), and goes on from there; what an earlier process of this machine had not uploaded is dropped.
"""

import contextlib
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator

import jax

from alexnet_flax import buckets
from alexnet_flax.checkpoint import MANIFEST, PARTIAL
from alexnet_flax.errors import BusyError, PreemptedError, UnreachableError, UsageError, one_line
from alexnet_flax.files import expanded, is_running

_RENEW, _LEASE = 10.0, 60.0  # seconds
_LOCK = '.lock-'
_EVERY = 5.0  # seconds between uploads of the logs; a checkpoint is uploaded as soon as it is whole
_LOOK = 0.5
_CHECKPOINT = re.compile(r'((?:.*/)?checkpoints/\d+)/')


@contextlib.contextmanager
def run_folder(workdir: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives the folder of a run; for one in a bucket a copy, whose changes are uploaded until the block ends.

  Raises:
    UsageError: Another process trains there, or the bucket cannot be used.
    PreemptedError: A bucket, of the run or of its data, does not answer.
  """
  try:
    if buckets.is_bucket(workdir):
      with _copied_run(os.fspath(workdir).rstrip('/')) as folder:
        yield folder
    else:
      yield expanded(workdir)
  except UnreachableError as error:
    raise PreemptedError(f'{error}; the same command goes on when it does') from None


@contextlib.contextmanager
def _copied_run(url: str) -> Iterator[pathlib.Path]:
  if jax.process_count() > 1:
    advice = 'several processes need a folder that they share'
    raise UsageError(f'--workdir={url}: a run in a bucket is of one process; {advice}')
  folder = buckets.copy_place(url, 'runs')
  with _lease(url) as held:
    shutil.rmtree(folder, ignore_errors=True)
    objects = {name: one for name, one in buckets.listing(url).items() if not name.startswith(_LOCK)}
    steps = {found[1] for name in objects if (found := _CHECKPOINT.match(name))}
    for cut_short in (step for step in steps if f'{step}/{MANIFEST}' not in objects):
      names = [name for name in objects if name.startswith(f'{cut_short}/')]
      buckets.remove([f'{url}/{name}' for name in names])
      objects = {name: one for name, one in objects.items() if name not in names}
    buckets.fetch(url, folder, buckets.without_arrays(objects))
    uploads = _Uploads(folder, url, held, set(objects))
    uploads.start()
    try:
      yield folder
    finally:
      uploads.finish()


class _Uploads(threading.Thread):
  """Uploads what is new in a run's folder, now and then and at the end."""

  def __init__(self, folder: pathlib.Path, url: str, held: threading.Event, there: set[str]):
    super().__init__(daemon=True)
    self._folder, self._url, self._held, self._there = folder, url, held, there
    self._sent = {name: self._state(name) for name in there if (folder / name).exists()}
    self._end, self._warned = threading.Event(), False

  def run(self) -> None:
    last, whole = time.monotonic(), self._whole()
    while not self._end.wait(_LOOK):
      if (now := self._whole()) != whole or time.monotonic() - last > _EVERY:
        try:
          self._upload()
        except UsageError as error:
          if not self._warned:
            print(one_line(f'warning: {error}; the run goes on, and it is tried again'), flush=True)
          self._warned = True
        last, whole = time.monotonic(), now

  def finish(self) -> None:
    """Uploads what is left; raises UsageError or UnreachableError if that cannot be."""
    self._end.set()
    self.join()
    self._upload()

  def _state(self, name: str) -> tuple[int, int]:
    found = (self._folder / name).stat()
    return found.st_mtime_ns, found.st_size

  def _files(self, below: str = '.') -> list[str]:
    """Returns the names of all files, without hidden and unfinished ones."""
    places = (
      pathlib.Path(place, name) for place, _, names in os.walk(self._folder / below) for name in names
    )
    found = (place.relative_to(self._folder) for place in places)
    return sorted(str(one) for one in found if not any(x[0] == '.' or PARTIAL in x for x in one.parts))

  def _whole(self) -> dict[str, tuple[int, int]]:
    """Returns the checkpoints that are whole here, with what tells whether they have been replaced."""
    places = [*self._folder.glob('checkpoints/*'), *self._folder.glob('*/checkpoints/*')]
    found = {}
    for name in (str(place.relative_to(self._folder)) for place in places):
      if _CHECKPOINT.match(f'{name}/'):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
          found[name] = self._state(f'{name}/{MANIFEST}')
    return found

  def _upload(self) -> None:
    whole = self._whole()  # before the logs, which then have all lines of these checkpoints
    for name in self._files():
      if not _CHECKPOINT.match(name):
        with contextlib.suppress(FileNotFoundError):
          self._send(name)
    for step, manifest in whole.items():
      if self._sent.get(f'{step}/{MANIFEST}') != manifest:
        self._remove(step)  # one of that step that was damaged
        with contextlib.suppress(FileNotFoundError):  # of one that Orbax removes
          names = sorted(self._files(step), key=lambda name: name.endswith(f'/{MANIFEST}'))
          for name in names:  # the manifest last: without it there is no checkpoint
            self._send(name)
    steps = {found[1] for name in self._there if (found := _CHECKPOINT.match(name))}
    for step in steps:
      if not (self._folder / step).exists():
        self._remove(step)
    self._warned = False

  def _send(self, name: str) -> None:
    state = self._state(name)
    if self._sent.get(name) != state and self._held.is_set():
      buckets.upload(self._folder / name, f'{self._url}/{name}')
      self._sent[name] = state
      self._there.add(name)

  def _remove(self, step: str) -> None:
    """Removes a checkpoint from the bucket, its manifest first."""
    names = [name for name in self._there if name.startswith(f'{step}/')]
    if self._held.is_set():
      names.sort(key=lambda name: not name.endswith(f'/{MANIFEST}'))
      buckets.remove([f'{self._url}/{name}' for name in names])
      self._there -= {*names}
      self._sent = {name: state for name, state in self._sent.items() if name not in names}


@contextlib.contextmanager
def _lease(url: str) -> Iterator[threading.Event]:
  """Holds the right to write to a run, as the object .lock-NUMBER of the greatest number.

  Who creates the next number has it: a bucket creates an object once. Its holder renews it; one that is not
  renewed for a minute, or whose process of this machine is gone, has ended. Gives an event that is set as
  long as the right is held.

  Raises:
    BusyError: Another process has it.
  """
  place, beat, end, held = f'{url}/{_LOCK}', 0, threading.Event(), threading.Event()
  me = {'machine': _machine(), 'process': os.getpid()}
  before = max((int(name) for name in buckets.listing_of(place) if name.isdigit()), default=0)
  busy = BusyError(f'another process trains in {url}; wait for its end, or use another --workdir')
  if before and not _has_ended(f'{place}{before}'):
    raise busy
  mine = before + 1
  try:
    buckets.write(f'{place}{mine}', json.dumps(me).encode(), only_if_absent=True)
  except FileExistsError:
    raise busy from None
  held.set()
  if before:
    buckets.remove([f'{place}{before}'])

  def renew() -> None:
    nonlocal beat
    while not end.wait(_RENEW):
      with contextlib.suppress(UsageError):  # it is tried again; without an answer nothing is uploaded either
        if any(name.isdigit() and int(name) > mine for name in buckets.listing_of(place)):
          held.clear()
          print(f'another process has taken over the run in {url}; this one ends', flush=True)
          os.kill(os.getpid(), signal.SIGTERM)
          return
        beat += 1
        buckets.write(f'{place}{mine}', json.dumps(me | {'beat': beat}).encode())

  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  try:
    yield held
  finally:
    end.set()
    thread.join()
    with contextlib.suppress(UsageError):
      buckets.remove([f'{place}{mine}'])


def _has_ended(lock: str) -> bool:
  """Whether the holder of a lock has ended: it is a process of this machine, or does not renew it."""
  seen = None
  for waited in range(int(_LEASE / _RENEW) + 2):
    if (found := buckets.stat(lock)) is None:
      return True
    if seen is None:
      try:
        holder = json.loads(buckets.read_ranges([(lock, 0, found.size)])[0])
        if holder['machine'] == _machine() and not is_running(int(holder['process'])):
          return True
      except (ValueError, TypeError, KeyError):  # not ours
        pass
    elif found.tag != seen:
      return False
    seen = found.tag
    if not waited:
      print(f'note: {lock} is of a process that may have been killed; waiting for a minute', flush=True)
    time.sleep(_RENEW)
  return True


def _machine() -> str:
  """Identifies a machine, or the container in which processes have numbers of their own."""
  with contextlib.suppress(OSError):
    return f'{platform.node()} {os.readlink("/proc/self/ns/pid")}'
  return platform.node()
