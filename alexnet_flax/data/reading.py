"""Batches as they are planned to batches of pixels, by threads, in order; odd pictures are dealt with."""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alexnet_flax.data.bad_pictures import BadPictures
from alexnet_flax.data.encoded import Encoded, made_plain, read_header
from alexnet_flax.data.source import Source
from alexnet_flax.errors import UsageError
from alexnet_flax.pictures import UnreadableError

HostBatch = dict[str, np.ndarray]
_Built = tuple[HostBatch, list[tuple[str, str]]]  # and (name, reason) of what was left out of it

# A thread takes so many pictures of a batch at a time: of large ones, many threads would hold too many.
_PART = 128


class Plan(NamedTuple):
  """What a batch holds: the examples' numbers, their weights, and the numbers of their views."""

  indices: np.ndarray
  weights: np.ndarray
  numbers: np.ndarray


@dataclasses.dataclass
class Reader:
  """Reads plans. Where a picture of a batch proves broken, the batch is read anew with that one suspected.

  A suspect is decoded by itself beforehand; what becomes of it is a function of picture and view alone.

  Attributes:
    source: the examples.
    decode: pictures and float32 [B, N], the numbers of their views, to arrays of B; or UnreadableError.
    num_classes: labels must be less; any labels if None.
    bad: what to do with pictures that cannot be decoded; an error if None.
    accept: raises UnreadableError for pictures that are not wanted.
  """

  source: Source
  decode: Callable[[Sequence[Encoded], np.ndarray], HostBatch]
  num_classes: int | None
  bad: BadPictures | None
  accept: Callable[[Encoded], None] = lambda encoded: None
  suspects: set[int] = dataclasses.field(default_factory=set)

  @property
  def _bad(self) -> BadPictures:
    return self.bad or BadPictures()

  def batches(
    self, plan: Callable[[int], Plan], steps: range, num_threads: int | None
  ) -> Iterator[HostBatch]:
    """The batches of steps, all of one size."""
    if not steps:
      return
    threads, bad = num_threads or os.cpu_count() or 1, self._bad
    num_parts = -(-len(plan(steps[0]).indices) // _PART)
    plans = (
      Plan(*part)
      for step in steps
      for part in zip(*(np.array_split(array, num_parts) for array in plan(step)), strict=True)
    )
    built = _in_order(self._build, plans, threads)
    for _ in steps:
      parts = []
      for part, left_out in itertools.islice(built, num_parts):
        for name, reason in left_out:
          bad.report(name, reason)
        parts.append(part)
      yield (
        parts[0]
        if num_parts == 1
        else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
      )

  def _build(self, plan: Plan) -> _Built:
    while True:
      known = frozenset(self.suspects)  # other threads add to them
      pictures, batch, left_out = self._read(plan)
      try:
        return self.decode(pictures, plan.numbers) | batch, left_out
      except UnreadableError:
        rows = zip(plan.indices.tolist(), pictures, plan.numbers, strict=True)
        found = {number for number, *picture in rows if not self._decodes(*picture)} - known
        if not found:
          raise
        self.suspects |= found

  def _read(self, plan: Plan) -> tuple[list[Encoded], HostBatch, list[tuple[str, str]]]:
    """A plan's pictures, what else a batch holds, and (name, reason) of what is left out of it."""
    examples = self.source.read(plan.indices)
    labels = np.array([example.label for example in examples], np.int64)
    if self.num_classes is not None:
      _check_labels(self.source, labels, self.num_classes)
    pictures, left_out, weights = [], [], plan.weights.copy()
    for row, (number, example) in enumerate(zip(plan.indices.tolist(), examples, strict=True)):
      try:
        pictures.append(self._picture(example.picture, number in self.suspects, plan.numbers[row]))
      except UnreadableError as error:
        if weights[row]:
          name = f'{self.source.name}: {example.name or f"example {number}"}'
          if self._bad.policy == 'error':
            self._bad.report(name, str(error))
          left_out.append((name, str(error)))
        picture, labels[row] = self._stand_in(number, plan.numbers[row], str(error))
        pictures.append(picture)
        weights[row] = 0.0
    return pictures, {'label': labels.astype(np.int32), 'index': plan.indices, 'weight': weights}, left_out

  def _picture(self, picture: Encoded | bytes | memoryview, suspected: bool, numbers: np.ndarray) -> Encoded:
    encoded = picture if isinstance(picture, Encoded) else read_header(picture)
    content = picture.content if isinstance(picture, Encoded) else picture
    if encoded is not None:
      self.accept(encoded)
    if encoded is None or (suspected and not self._decodes(encoded, numbers)):
      encoded = made_plain(content)
      self.accept(encoded)
    return encoded

  def _stand_in(self, number: int, numbers: np.ndarray, reason: str) -> tuple[Encoded, int]:
    """The next example that can be decoded, with its label: BatchNorm is to see nothing strange.

    A function of the example and its view alone, so that all processes and batch sizes agree on it.
    """
    for other in (*range(number + 1, self.source.num_examples), *range(number)):
      (example,) = self.source.read(np.array([other]))
      try:
        return self._picture(example.picture, True, numbers), example.label
      except UnreadableError:
        continue
    raise UsageError(f'no picture of {self.source.name} can be decoded: {reason}')

  def _decodes(self, encoded: Encoded, numbers: np.ndarray) -> bool:
    try:
      self.decode([encoded], numbers[None])
    except UnreadableError:
      return False
    return True


def _check_labels(source: Source, labels: np.ndarray, num_classes: int) -> None:
  """Raises UsageError if a label is not one of 0 ... num_classes - 1."""
  low, high = labels.min(), labels.max()
  if low < 0 or high >= num_classes:
    wrong = low if low < 0 else high
    raise UsageError(
      f'{source.name} holds the label {wrong}; labels must be 0 ... {num_classes - 1}'
      f' (num_classes={num_classes})'
    )


def _in_order(function: Callable[[Plan], _Built], plans: Iterable[Plan], threads: int) -> Iterator[_Built]:
  """`function` of each plan, computed by threads, a few ahead."""
  waiting = iter(plans)
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    ahead = collections.deque(pool.submit(function, plan) for plan in itertools.islice(waiting, threads + 2))
    while ahead:
      yield ahead.popleft().result()
      ahead.extend(pool.submit(function, plan) for plan in itertools.islice(waiting, 1))
  finally:
    pool.shutdown(wait=False, cancel_futures=True)  # a thread of its own may be what collects this
