"""Batches built by several processes: where one interpreter's lock limits how many images are decoded.

Each process opens the data set itself and decodes into memory that all share. Tasks and answers, without
images, go through sockets. The memory has no name, and a process ends when its socket is closed, or by the
system when the run ends: nothing is left behind, whoever is killed.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.corruption import Corruption, training_examples
from alexnet_flax.data.decode import decode_train
from alexnet_flax.data.loader import HostBatch, Plan, Reader, in_parts
from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.data.views import TrainView
from alexnet_flax.errors import PreemptedError, UsageError

_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent ends
_PATIENCE = 10  # seconds for a process to finish its task at the end
_TASKS = 4  # that a process has not answered yet
_BATCHES = 6  # in the shared memory: those being built, those on their way to the devices


@dataclasses.dataclass(frozen=True)
class TrainingExamples:
  """How a process opens the examples to train on. The fields are keys of the configuration."""

  dataset: str
  train_split: str
  data_dir: str | None
  mirror: str | None
  verify_records: bool
  examples_per_class: int | None
  corruption: Corruption
  seed: int
  bad: BadImages

  def open(self) -> Source:
    """Opens them; raises UsageError as `open_dataset` does."""
    source = open_dataset(self.dataset, self.train_split, self.data_dir, self.verify_records, self.mirror)
    how = self.examples_per_class, self.corruption, self.seed, self.bad.max_pixels
    return training_examples(source, *how)


def process_batches(
  examples: TrainingExamples, view: TrainView, plan: Callable[[int], Plan], steps: range, processes: int
) -> Iterator[HostBatch]:
  """Yields the batches of steps, all of one size, as `Reader.batches` does.

  Args:
    examples: The examples, which each process opens.
    view: Their random views.
    plan: What a step's batch contains.
    steps: The steps.
    processes: How many processes decode, each in one thread.

  Raises:
    UsageError: An image cannot be decoded, and is not to be skipped.
    PreemptedError: A process was killed.
  """
  if not steps:
    return
  rows = len(plan(steps[0]).indices)
  shape = rows, view.image_size, view.image_size, 3
  memory = _SharedBatches(shape, _BATCHES)
  with contextlib.ExitStack() as stack:
    workers = [_Worker(stack.enter_context(_process(examples, view, memory))) for _ in range(processes)]
    turns = itertools.cycle(workers)
    ahead: collections.deque[tuple[int, list[_Worker]]] = collections.deque()
    waiting = iter(steps)
    while True:
      while not memory.free.empty() and (step := next(waiting, None)) is not None:
        place, asked, first = memory.free.get(), [], 0
        for part in in_parts(plan(step)):
          asked.append(next(turns))
          asked[-1].ask((place, first, part))
          first += len(part.indices)
        ahead.append((place, asked))
      if not ahead:
        return
      place, asked = ahead.popleft()
      answers = [worker.answer() for worker in asked]
      for answer in answers:
        if isinstance(answer, Exception):
          raise answer
        for name, reason in answer[1]:
          examples.bad.report(name, reason)
      others = [others for others, _ in answers]
      batch = {name: np.concatenate([part[name] for part in others]) for name in others[0]}
      # If the caller keeps all batches, it gets copies, or there would be no place for the next one.
      is_last = memory.free.empty() and not ahead
      yield {'image': memory.take(place, copy=is_last), **batch}


class _Worker:
  """A process that answers in order. It is asked for little ahead, or each would wait for the other."""

  def __init__(self, connection: Connection):
    self._connection, self._open = connection, 0
    self._answers: collections.deque[Any] = collections.deque()

  def ask(self, task: tuple[int, int, Plan]) -> None:
    with _alive():
      while self._open >= _TASKS:
        self._answers.append(self._connection.recv())
        self._open -= 1
      self._connection.send(task)
    self._open += 1

  def answer(self) -> Any:
    if self._answers:
      return self._answers.popleft()
    self._open -= 1
    with _alive():
      return self._connection.recv()


class _SharedBatches:
  """Memory for the images of some batches. A place is free again when nobody has its array any more."""

  def __init__(self, shape: tuple[int, ...], count: int):
    if not hasattr(os, 'memfd_create'):
      raise UsageError('data.num_processes needs Linux; leave it out, and threads decode')
    self.shape, self.size = shape, int(np.prod(shape))
    self.file = os.memfd_create('batches')
    os.ftruncate(self.file, max(self.size * count, 1))
    self._map = mmap.mmap(self.file, 0)
    self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(count):
      self.free.put(place)
    weakref.finalize(self, os.close, self.file)

  def take(self, place: int, *, copy: bool) -> np.ndarray:
    """Returns a batch's images, uint8 `shape`, and frees their place once nobody has them."""
    array = np.frombuffer(self._map, np.uint8, self.size, self.size * place)
    if copy:
      self.free.put(place)
      return array.reshape(self.shape).copy()
    weakref.finalize(array, self.free.put, place)
    return array.reshape(self.shape)


@contextlib.contextmanager
def _process(examples: TrainingExamples, view: TrainView, memory: _SharedBatches) -> Iterator[Connection]:
  """A process that decodes; it ends with the block, and if this process does."""
  ours, theirs = socket.socketpair()
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), 'JAX_PLATFORMS': 'cpu'}
  process = subprocess.Popen(
    [sys.executable, '-P', '-m', __name__, str(theirs.fileno()), str(memory.file)],
    process_group=0,  # Ctrl-C is meant for the run, which ends its processes
    pass_fds=(theirs.fileno(), memory.file),
    stdin=subprocess.DEVNULL,
    env=environment,
  )
  theirs.close()
  try:
    with Connection(ours.detach()) as connection:
      quiet = dataclasses.replace(examples, bad=dataclasses.replace(examples.bad, say=_nothing))
      with _alive():
        connection.send((quiet, view, memory.shape))
      yield connection
  finally:
    try:
      process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


@contextlib.contextmanager
def _alive() -> Iterator[None]:
  try:
    yield
  except (EOFError, ConnectionError):
    reason = 'a process that decodes images was killed (out of memory?)'
    raise PreemptedError(f'{reason}; run the same command again') from None


def _nothing(line: str) -> None:
  del line


def _work(connection: Connection, file: int) -> None:
  """Builds what is asked for until the socket is closed."""
  examples, view, shape = connection.recv()
  memory = mmap.mmap(file, 0)
  size, suspects = int(np.prod(shape)), set[int]()
  source: Source | None = None
  while True:
    place, first, plan = connection.recv()
    images = np.frombuffer(memory, np.uint8, size, size * place).reshape(shape)[
      first : first + len(plan.indices)
    ]
    try:
      source = source or examples.open()
      decode = functools.partial(decode_train, view, out=images)
      built, skipped = Reader(source, decode, examples.bad, suspects=suspects).build(plan)
      del built['image']  # which is `images`
      answer: Any = built, skipped
    except (UsageError, MemoryError) as error:
      answer = error
    except Exception:  # an error of any class may not survive being sent
      answer = RuntimeError(traceback.format_exc())
    connection.send(answer)


def _main() -> None:
  # Also if it is stopped, or waits for a dead disk, when the run is killed.
  ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
  with Connection(int(sys.argv[1])) as connection, contextlib.suppress(EOFError, ConnectionError):
    _work(connection, int(sys.argv[2]))


if __name__ == '__main__':
  _main()
