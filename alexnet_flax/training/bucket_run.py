"""A run in a bucket: trained in a folder of this machine, which is uploaded as it grows, under a lease.

The bucket is the truth. A start takes the lease, copies the run from the bucket (of its checkpoints the last
whole one), and goes on from there; what an earlier process of this machine had not uploaded is dropped.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator

import jax

from alexnet_flax.checkpoint import MANIFEST, PARTIAL
from alexnet_flax.errors import COPIES, BusyError, PreemptedError, UnreachableError, UsageError, one_line
from alexnet_flax.files import buckets, expanded, is_running
from alexnet_flax.files.cache import cache_folder
from alexnet_flax.training.experiment import check_devices

_RENEW, _LEASE = 10.0, 60.0  # seconds
_LOCK = '.lock'
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


def place_here(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder of this machine in which a run is trained."""
  if not buckets.is_bucket(workdir):
    return pathlib.Path(workdir)
  url = os.fspath(workdir)
  digest = hashlib.sha256(url.encode()).hexdigest()[:16]
  return cache_folder().absolute() / 'runs' / digest / url.rpartition('/')[2]


@contextlib.contextmanager
def _copied_run(url: str) -> Iterator[pathlib.Path]:
  check_devices()
  if jax.process_count() > 1:
    advice = 'several processes need a folder that they share'
    raise UsageError(f'--workdir={url}: a run in a bucket is of one process; {advice}')
  folder = place_here(url)
  COPIES[str(folder)] = url
  lease = _Lease(url)
  try:
    shutil.rmtree(folder, ignore_errors=True)
    objects = {name: one for name, one in buckets.listing(url).items() if not name.startswith(f'{_LOCK}/')}
    uploads = _Uploads(folder, url, lease, set(objects))
    for step in _steps(objects):
      if f'{step}/{MANIFEST}' not in objects:  # an upload of it was cut short
        uploads.remove(step)
    objects = {name: one for name, one in objects.items() if name in uploads.there}
    buckets.fetch(url, folder, buckets.without_arrays(objects))
    uploads.begin()
    try:
      yield folder
    finally:
      uploads.finish()
  finally:
    lease.release()


def _steps(names: Iterable[str]) -> set[str]:
  """Returns the folders of checkpoints, '...checkpoints/STEP', in which files of these names are."""
  return {found[1] for name in names if (found := _CHECKPOINT.match(name))}


class _Uploads(threading.Thread):
  """Uploads what is new in a run's folder, now and then and at the end; removes checkpoints that are gone."""

  def __init__(self, folder: pathlib.Path, url: str, lease: '_Lease', there: set[str]):
    super().__init__(daemon=True)
    self._folder, self._url, self._lease, self.there = folder, url, lease, there
    self._sent: dict[str, tuple[int, int]] = {}  # what tells whether a file has changed since
    self._end = threading.Event()

  def begin(self) -> None:
    self._sent = {name: self._state(name) for name in self._files()}
    self.start()

  def run(self) -> None:
    last, whole, warned = time.monotonic(), self._manifests(), False
    while not self._end.wait(_LOOK):
      if (now := self._manifests()) != whole or time.monotonic() - last > _EVERY:
        try:
          self._upload()
          warned = False
        except BusyError:  # the lease ends the run
          return
        except (UsageError, OSError) as error:
          if not warned:
            print(one_line(f'warning: {error}; the run goes on, and it is tried again'), flush=True)
          warned = True
        last, whole = time.monotonic(), now

  def finish(self) -> None:
    """Uploads what is left; raises UsageError if that cannot be."""
    self._end.set()
    self.join()
    self._upload()

  def remove(self, step: str) -> None:
    """Removes a checkpoint from the bucket, its manifest first: without it there is no checkpoint."""
    names = sorted(
      (x for x in self.there if x.startswith(f'{step}/')), key=lambda x: not x.endswith(MANIFEST)
    )
    self._lease.check()
    buckets.remove([f'{self._url}/{name}' for name in names])
    self.there -= {*names}
    self._sent = {name: state for name, state in self._sent.items() if name not in names}

  def _upload(self) -> None:
    names = self._files()  # before the logs are read, which then have all lines of these checkpoints
    for name in names:
      if not _CHECKPOINT.match(name):
        with contextlib.suppress(FileNotFoundError):
          self._send(name)
    for step in _steps(name for name in names if name.endswith(f'/{MANIFEST}')):
      with contextlib.suppress(FileNotFoundError):  # of one that Orbax removes
        if self._sent.get(f'{step}/{MANIFEST}') != self._state(f'{step}/{MANIFEST}'):
          self.remove(step)  # one of that step that was damaged
          inside = (name for name in names if name.startswith(f'{step}/'))
          for name in sorted(inside, key=lambda name: name.endswith(f'/{MANIFEST}')):
            self._send(name)
    for step in _steps(self.there):
      if not (self._folder / step).exists():
        self.remove(step)

  def _send(self, name: str) -> None:
    state = self._state(name)
    if self._sent.get(name) != state:
      self._lease.check()
      buckets.upload(self._folder / name, f'{self._url}/{name}')
      self._sent[name] = state
      self.there.add(name)

  def _state(self, name: str) -> tuple[int, int]:
    found = (self._folder / name).stat()
    return found.st_mtime_ns, found.st_size

  def _files(self) -> list[str]:
    """Returns the names of all files, without hidden and unfinished ones."""
    places = (pathlib.Path(place, name) for place, _, names in os.walk(self._folder) for name in names)
    found = (place.relative_to(self._folder) for place in places)
    return sorted(str(one) for one in found if not any(x[0] == '.' or PARTIAL in x for x in one.parts))

  def _manifests(self) -> list[str]:
    return [name for name in self._files() if name.endswith(f'/{MANIFEST}')]


class _Lease(threading.Thread):
  """The right to write to a run: the object .lock/NUMBER of the greatest number, which its holder renews.

  A bucket creates an object once, so of several processes that create the next number one has the right. A
  holder that does not renew it for a minute, or was a process of this machine and is gone, has ended.

  Raises BusyError if another process has it.
  """

  def __init__(self, url: str):
    super().__init__(daemon=True)
    self._place, self._url, self._end, self._beat = f'{url}/{_LOCK}', url, threading.Event(), 0
    before = self._greatest()
    if before and not _has_ended(f'{self._place}/{before}'):
      raise self._busy()
    self._number = before + 1
    try:
      self._write(only_if_absent=True)
    except FileExistsError:
      raise self._busy() from None
    if before:
      buckets.remove([f'{self._place}/{before}'])
    self.start()

  def check(self) -> None:
    """Renews it if that is overdue: raises BusyError if another process has it, or what a network raises."""
    if time.monotonic() > self._until:
      self._renew()

  def run(self) -> None:
    while not self._end.wait(_RENEW):
      try:
        self._renew()
      except BusyError as error:
        print(one_line(f'{error}; this one ends'), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return
      except UsageError:  # it is tried again
        pass

  def release(self) -> None:
    self._end.set()
    self.join()
    with contextlib.suppress(UsageError):
      buckets.remove([f'{self._place}/{self._number}'])

  def _busy(self) -> BusyError:
    return BusyError(f'another process trains in {self._url}; wait for its end, or use another --workdir')

  def _greatest(self) -> int:
    return max((int(name) for name in buckets.listing(self._place) if name.isdigit()), default=0)

  def _renew(self) -> None:
    if self._greatest() > self._number:
      raise self._busy()
    self._write()

  def _write(self, only_if_absent: bool = False) -> None:
    start, self._beat = time.monotonic(), self._beat + 1
    holder = {'machine': _machine(), 'process': os.getpid(), 'beat': self._beat}
    buckets.write(f'{self._place}/{self._number}', json.dumps(holder).encode(), only_if_absent)
    self._until = start + _LEASE - _RENEW


def _has_ended(lock: str) -> bool:
  """Whether the holder of a lock has ended: it was a process of this machine, or does not renew it."""
  before = buckets.stat(lock)
  if before is None:
    return True
  with contextlib.suppress(ValueError, TypeError, KeyError):  # not ours
    holder = json.loads(buckets.read_ranges([(lock, 0, before.size)])[0])
    if holder['machine'] == _machine() and not is_running(int(holder['process'])):
      return True
  print(f'note: {lock} is of a process that may have been killed; waiting for a minute', flush=True)
  for seconds in (2 * _RENEW, _LEASE - 2 * _RENEW):  # a living one renews it within the first of them
    time.sleep(seconds)
    now = buckets.stat(lock)
    if now is None or now.tag != before.tag:
      return now is None
  return True


def _machine() -> str:
  """Identifies a machine, or the container in which processes have numbers of their own."""
  with contextlib.suppress(OSError):
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()
    return f'{platform.node()} {boot} {os.readlink("/proc/self/ns/pid")}'
  return platform.node()
