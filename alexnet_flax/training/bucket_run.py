"""A run in a bucket: trained in a folder of this machine, which is uploaded as it grows, under a lease.

The bucket is the truth. A start takes the lease, copies the run from the bucket (of its checkpoints the last
whole one), and goes on from there; what an earlier process of this machine had not uploaded is dropped.
Of several processes each has such a folder. The first has the lease and saves; the others upload what they
alone write, and of a checkpoint its manifest waits for that.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from alexnet_flax.checkpoint import MANIFEST, PARTIAL
from alexnet_flax.errors import (
  COPIES,
  BusyError,
  DivergedError,
  PreemptedError,
  StoppedError,
  UnreachableError,
  UsageError,
  one_line,
)
from alexnet_flax.files import buckets, expanded, is_running
from alexnet_flax.files.cache import cache_folder
from alexnet_flax.training import distributed
from alexnet_flax.training.experiment import check_devices
from alexnet_flax.training.preemption import GracefulShutdown

_RENEW, _LEASE = 10.0, 60.0  # seconds
_LOCK = '.lock'
_EVERY = 5.0  # seconds between uploads of the logs; a checkpoint is uploaded as soon as it is whole
_LOOK = 0.5
_GIVEN_UP = 20.0  # seconds for the others to upload, after an error of one process
# What processes post: the step that the first uploads; that until which another has; renewals of the lease.
_UPLOADS, _UPLOADED, _BEAT = 'uploads', 'uploaded', 'beat'
_CHECKPOINT = re.compile(r'((?:.*/)?checkpoints/\d+)/')


@contextlib.contextmanager
def run_folder(workdir: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives the folder of a run; for one in a bucket a copy, whose changes are uploaded until the block ends.

  Raises:
    UsageError: Another run trains there, the bucket cannot be used, or a process has another.
    PreemptedError: A bucket, of the run or of its data, does not answer.
  """
  try:
    url = os.fspath(workdir).rstrip('/') if buckets.is_bucket(workdir) else None
    check_devices()
    distributed.check_equal({'the bucket of --workdir': url})
    if url:
      with _copied_run(url) as folder:
        yield folder
    else:
      yield expanded(workdir)
  except UnreachableError as error:
    raise PreemptedError(f'{error}; the same command goes on when it does') from None


def place_here(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder of this machine in which the first process trains a run, or did so last."""
  if not buckets.is_bucket(workdir):
    return pathlib.Path(workdir)
  url = os.fspath(workdir).rstrip('/')
  starts = _places(url)
  return (max(starts, key=lambda one: int(one.name)) if starts else _place(url)) / url.rpartition('/')[2]


def _place(url: str, process: int = 0) -> pathlib.Path:
  digest = hashlib.sha256(url.encode()).hexdigest()[:16]
  return cache_folder().absolute() / 'runs' / (f'{digest}-{process}' if process else digest)


def _places(url: str, process: int = 0) -> list[pathlib.Path]:
  """Returns the folders of a process, of which each start has its own: an earlier one may still write."""
  with contextlib.suppress(FileNotFoundError):
    return [path for path in _place(url, process).iterdir() if path.name.isdigit()]
  return []


@contextlib.contextmanager
def _copied_run(url: str) -> Iterator[pathlib.Path]:
  distributed.clear_posts()
  index, is_first = jax.process_index(), jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    with distributed.together():
      lease = _Lease(url) if is_first else _LeaseOfFirst(url)
    stack.callback(lease.release)
    for old in _places(url, index):
      shutil.rmtree(old, ignore_errors=True)
    start = distributed.gather(time.time_ns())[0]
    folder = _place(url, index) / str(start) / url.rpartition('/')[2]
    COPIES[str(folder)] = url
    uploads, in_step = _Uploads(folder, url, lease), jax.process_count() == 1
    for of_first in (True, False):  # the first removes what the others must not copy
      with distributed.together():
        if of_first == is_first:
          uploads.fetch()
    uploads.begin()
    try:
      yield folder
      in_step = True
    except (DivergedError, StoppedError):
      in_step = True
      raise
    finally:  # after another error the others may still train, or be lost
      with distributed.end_together() if in_step else contextlib.nullcontext(), GracefulShutdown():
        uploads.finish(in_step)


def _steps(names: Iterable[str]) -> set[str]:
  """Returns the folders of checkpoints, '...checkpoints/STEP', in which files of these names are."""
  return {found[1] for name in names if (found := _CHECKPOINT.match(name))}


def _number(step: str) -> int:
  return int(step.rpartition('/')[2])


class _Uploads(threading.Thread):
  """Uploads what is new in a run's folder, now and then and at the end; removes checkpoints that are gone.

  Checkpoints are the business of the first process. Another uploads its own files.
  """

  def __init__(self, folder: pathlib.Path, url: str, lease: '_Lease | _LeaseOfFirst'):
    super().__init__(daemon=True)
    self._folder, self._url, self._lease = folder, url, lease
    self._is_first = isinstance(lease, _Lease)
    self._there: set[str] = set()
    self._sent: dict[str, tuple[int, int]] = {}  # what tells whether a file has changed since
    self._end, self._given_up = threading.Event(), False

  def fetch(self) -> None:
    """Copies the run from the bucket, without arrays; the first removes half checkpoints before."""
    objects = buckets.listing(self._url)
    self._there = {*objects}
    for step in _steps(self._there) if self._is_first else ():
      if f'{step}/{MANIFEST}' not in self._there:
        self._remove(step)
    wanted = {name: objects[name] for name in self._there}
    buckets.fetch(self._url, self._folder, buckets.without_arrays(wanted))

  def begin(self) -> None:
    self._sent = {name: self._state(name) for name in self._files()}
    self.start()

  def run(self) -> None:
    last, before, warned = time.monotonic(), self._due(), False
    while not self._end.wait(_LOOK):
      if (now := self._due()) != before or time.monotonic() - last > _EVERY:
        try:
          self._upload()
          distributed.post(_UPLOADED, now[1])
          warned = False
        except BusyError:  # the lease ends the run
          return
        except (UsageError, OSError) as error:
          if not warned:
            print(one_line(f'warning: {error}; the run goes on, and it is tried again'), flush=True)
          warned = True
        last, before = time.monotonic(), now

  def finish(self, everything: bool) -> None:
    """Ends, and uploads what is left; raises UsageError if it is to be `everything`, and cannot be."""
    self._given_up = not everything
    self._end.set()
    self.join()
    try:
      self._upload()
    except UsageError as error:
      if everything:
        raise
      print(one_line(f'warning: not all of the run is in the bucket: {error}'), flush=True)
    distributed.post(_UPLOADED, sys.maxsize)

  def _due(self) -> tuple[list[str], int]:
    """Returns what calls for an upload when it changes: checkpoints here, and the first process's post."""
    manifests = [name for name in self._files() if name.endswith(f'/{MANIFEST}')]
    return manifests, distributed.posted(_UPLOADS, 0) or 0

  def _upload(self) -> None:
    names = self._files()  # before the logs are read, which then have all lines of these checkpoints
    for name in names:
      if not _CHECKPOINT.match(name):
        with contextlib.suppress(FileNotFoundError):
          self._send(name)
    if not self._is_first:
      return
    whole = _steps(name for name in names if name.endswith(f'/{MANIFEST}'))
    for step in sorted(whole, key=_number):  # what a kill loses of them is made again
      with contextlib.suppress(FileNotFoundError):  # of one that Orbax removes
        if self._sent.get(f'{step}/{MANIFEST}') != self._state(f'{step}/{MANIFEST}'):
          self._remove(step)  # one of that step that was damaged
          inside = (name for name in names if name.startswith(f'{step}/'))
          for name in sorted(inside, key=lambda name: name.endswith(f'/{MANIFEST}')):
            if name.endswith(f'/{MANIFEST}'):
              self._wait_for_others(_number(step))
            self._send(name)
    for step in _steps(self._there):
      if not (self._folder / step).exists():
        self._remove(step)

  def _wait_for_others(self, step: int) -> None:
    """Returns when the other processes have uploaded what they wrote until a step."""
    distributed.post(_UPLOADS, step)
    end = time.monotonic() + (_GIVEN_UP if self._given_up else _LEASE)
    for one in range(1, jax.process_count()):
      while (distributed.posted(_UPLOADED, one) or 0) < step:
        if time.monotonic() > end:
          raise UnreachableError(f'process {one} has not uploaded what it wrote until step {step}')
        time.sleep(_LOOK)

  def _remove(self, step: str) -> None:
    """Removes a checkpoint from the bucket, its manifest first: without it there is no checkpoint."""
    names = sorted(
      (x for x in self._there if x.startswith(f'{step}/')), key=lambda x: not x.endswith(MANIFEST)
    )
    self._lease.check()
    buckets.remove([f'{self._url}/{name}' for name in names])
    self._there -= {*names}
    self._sent = {name: state for name, state in self._sent.items() if name not in names}

  def _send(self, name: str) -> None:
    state = self._state(name)
    if self._sent.get(name) != state:
      self._lease.check()
      buckets.upload(self._folder / name, f'{self._url}/{name}')
      self._sent[name] = state
      self._there.add(name)

  def _state(self, name: str) -> tuple[int, int]:
    found = (self._folder / name).stat()
    return found.st_mtime_ns, found.st_size

  def _files(self) -> list[str]:
    """Returns the names of all files, without hidden and unfinished ones."""
    places = (pathlib.Path(place, name) for place, _, names in os.walk(self._folder) for name in names)
    found = (place.relative_to(self._folder) for place in places)
    return sorted(str(one) for one in found if not any(x[0] == '.' or PARTIAL in x for x in one.parts))


class _Lease(threading.Thread):
  """The right to write to a run: the object .lock/NUMBER of the greatest number, which its holder renews.

  A bucket creates an object once, so of several processes that create the next number one has the right. A
  holder that does not renew it for a minute, or was a process of this machine and is gone, has ended.

  Raises BusyError if another process has it. Once it is lost it stays lost, whatever becomes of the other.
  """

  def __init__(self, url: str):
    super().__init__(daemon=True)
    self._place, self._url, self._end, self._beat = f'{url}/{_LOCK}', url, threading.Event(), 0
    self._token, self._is_lost = secrets.token_hex(8), False
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
    """Renews it if that is overdue: raises BusyError if it is lost, or what a network raises."""
    if self._is_lost:
      raise self._busy()
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
    if (
      self._greatest() != self._number or _holder(f'{self._place}/{self._number}').get('token') != self._token
    ):
      self._is_lost = True  # to a process that may have ended since
      raise self._busy()
    self._write()

  def _write(self, only_if_absent: bool = False) -> None:
    start, self._beat = time.monotonic(), self._beat + 1
    holder = {'machine': _machine(), 'process': os.getpid(), 'beat': self._beat, 'token': self._token}
    buckets.write(f'{self._place}/{self._number}', json.dumps(holder).encode(), only_if_absent)
    self._until = start + _LEASE - _RENEW
    distributed.post(_BEAT, self._beat)


class _LeaseOfFirst:
  """What another process knows of the first one's lease: when it was renewed last."""

  def __init__(self, url: str):
    self._url, self._seen, self._beat = url, time.monotonic(), None

  def check(self) -> None:
    """Raises UnreachableError if the first process may have lost its lease."""
    if (beat := distributed.posted(_BEAT, 0)) != self._beat:
      self._seen, self._beat = time.monotonic(), beat
    if time.monotonic() - self._seen > _LEASE - _RENEW:
      raise UnreachableError(f'process 0 cannot renew its right to write to {self._url}')

  def release(self) -> None:
    """Does nothing: the first does it."""


def _holder(lock: str) -> dict[str, Any]:
  """Returns what is written in a lock; nothing if it is gone, or not ours."""
  with contextlib.suppress(ValueError, TypeError, AttributeError):
    found = buckets.stat(lock)
    return dict(json.loads(buckets.read_ranges([(lock, 0, found.size)])[0])) if found else {}
  return {}


def _has_ended(lock: str) -> bool:
  """Whether the holder of a lock has ended: it was a process of this machine, or does not renew it."""
  before = buckets.stat(lock)
  if before is None:
    return True
  with contextlib.suppress(ValueError, KeyError):  # not ours
    holder = _holder(lock)
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
