"""Loads batches into host memory, and moves them to the devices a few steps ahead.

NumPy determines what each batch contains and how images are cropped; threads read the bytes, and C libraries
decode them.
"""

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alexnet_flax.data import sampling
from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.decode import decode_eval, decode_train
from alexnet_flax.data.image_header import Encoded, Stored, convert_to_png, read_header
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.raw import RawImages
from alexnet_flax.data.source import Example, Source
from alexnet_flax.data.views import VIEW_NUMBERS, EvalView, TrainView
from alexnet_flax.errors import UsageError

HostBatch = dict[str, np.ndarray]
_Built = tuple[HostBatch, list[tuple[str, str]]]  # and (name, reason) of each image skipped in it
_PART = 128  # images that a thread decodes at a time: of whole large batches, threads would hold too many

# Otherwise glibc returns a batch's memory to the system and maps every page again: 4 % of the time.
with contextlib.suppress(AttributeError, OSError):  # other C libraries have no mallopt
  _libc = ctypes.CDLL(None)
  _libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
  _libc.mallopt(-2, 64 << 20)  # M_TOP_PAD
  _libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


def train_batches(
  source: Source,
  view: TrainView,
  *,
  seed: int,
  batch_size: int,
  first_step: int,
  last_step: int,
  process: int = 0,
  num_processes: int = 1,
  num_threads: int | None = None,
  bad: BadImages | None = None,
  raw: RawImages | None = None,
) -> Iterator[HostBatch]:
  """Yields this process's share of the batches of steps `first_step` ... `last_step` - 1.

  A batch is a function of the seed and the step alone; its example i goes to process i * P // batch_size.

  Args:
    source: The examples.
    view: The random view of each example.
    seed: The seed of order and views.
    batch_size: The global batch size, over all processes.
    first_step, last_step: The range of steps.
    process, num_processes: The share.
    num_threads: Decoding threads; one per core if None.
    bad: Handles images that cannot be decoded; UsageError if None.
    raw: The source's images, to be yielded whole with the windows of the view ('box', 'mirrored').

  Yields:
    {'image': uint8 [b, S, S, 3], 'label': int32 [b], 'weight': float32 [b], 'index': int64 [b]} with b =
    batch_size / num_processes and 'index' the examples' indices. The weight is 0 where an image was skipped;
    the next example takes its place, so that BatchNorm sees a normal image.
  """
  decode = raw.decode if raw else functools.partial(decode_train, view)
  reader = Reader(source, decode, bad or BadImages(), raw=raw)
  plan = train_plan(source.num_examples, seed, batch_size, process, num_processes)
  return reader.batches(plan, range(first_step, last_step), num_threads)


def train_plan(
  num_examples: int, seed: int, batch_size: int, process: int = 0, num_processes: int = 1
) -> Callable[[int], 'Plan']:
  """Returns what this process's share of a step's batch contains; arguments as of `train_batches`."""

  def plan(step: int) -> Plan:
    indices = sampling.batch_indices(seed, step, batch_size, num_examples)
    numbers = sampling.view_numbers(seed, step, batch_size, VIEW_NUMBERS)
    indices, numbers = (np.split(array, num_processes)[process] for array in (indices, numbers))
    return Plan(indices, np.ones(len(indices), np.float32), numbers)

  return plan


def eval_batches(
  source: Source,
  view: EvalView,
  *,
  batch_size: int,
  process: int = 0,
  num_processes: int = 1,
  num_threads: int | None = None,
  bad: BadImages | None = None,
) -> Iterator[HostBatch]:
  """Yields every example once, in order; the last batch is padded with examples of weight 0.

  So have examples without a label, -1. Otherwise as `train_batches`. 'image' is uint8 [b, 10, S, S, 3] for a
  ten-crop view.
  """

  def plan(step: int) -> Plan:
    indices = np.split(np.arange(step * batch_size, (step + 1) * batch_size), num_processes)[process]
    real = indices < source.num_examples
    return Plan(np.where(real, indices, 0), real.astype(np.float32), np.zeros((len(indices), 0)))

  turn = not source.is_published if view.turn is None else view.turn
  reader = Reader(source, functools.partial(decode_eval, view), bad or BadImages(), -1, turn)
  for batch in reader.batches(plan, range(-(-source.num_examples // batch_size)), num_threads):
    has_label = batch['label'] >= 0
    yield batch | {'label': batch['label'] * has_label, 'weight': batch['weight'] * has_label}


def to_devices(
  batches: Iterable[HostBatch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
  """Yields the batches as global arrays, sharded over all processes; transfers run `ahead` batches ahead.

  The examples' indices ('index') stay on the host.
  """
  hosts = ({name: part for name, part in batch.items() if name != 'index'} for batch in batches)
  arrays = (jax.make_array_from_process_local_data(sharding, batch) for batch in hosts)
  queue = collections.deque(itertools.islice(arrays, ahead))
  while queue:
    batch = queue.popleft()
    queue.extend(itertools.islice(arrays, 1))
    yield batch


class Plan(NamedTuple):
  """The contents of a batch: example indices, weights, and the random numbers of the views."""

  indices: np.ndarray
  weights: np.ndarray
  numbers: np.ndarray


@dataclasses.dataclass
class Reader:
  """Reads and decodes planned batches.

  If an image fails to decode, its batch is read again with that image as a suspect. A suspect is decoded
  by itself first, so that its treatment depends on image and view alone.
  """

  source: Source
  # Decodes B images, given the numbers of their views, float32 [B, N]; raises UnreadableError.
  decode: Callable[[Sequence[Encoded], np.ndarray], HostBatch]
  bad: BadImages
  first_label: int = 0  # -1 where examples need no label
  turn: bool = True  # images as their metadata say
  suspects: set[int] = dataclasses.field(default_factory=set)
  raw: RawImages | None = None  # which need no reading once they were read

  def batches(
    self, plan: Callable[[int], Plan], steps: range, num_threads: int | None
  ) -> Iterator[HostBatch]:
    """Yields the batches of steps, all of one size."""
    if not steps:
      return
    num_parts = len(in_parts(plan(steps[0])))
    plans = (part for step in steps for part in in_parts(plan(step)))
    pairs: Iterator[tuple[Plan, list[Example] | None]] = ((plan, None) for plan in plans)
    if self.source.ahead:  # by threads of its own, which wait for a network
      pairs = _in_order(lambda plan: (plan, self.source.read(plan.indices)), plans, self.source.ahead)
    built = _in_order(lambda pair: self.build(*pair), pairs, num_threads or os.cpu_count() or 1)
    for _ in steps:
      parts = []
      for part, skipped in itertools.islice(built, num_parts):
        for name, reason in skipped:
          self.bad.report(name, reason)
        parts.append(part)
      joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if num_parts > 1}
      yield joined or parts[0]

  def build(self, plan: Plan, examples: list[Example] | None = None) -> _Built:
    """Returns the decoded images of a plan, and the name and the reason of each skipped one.

    `examples` are the plan's, if they were read already.
    """
    if self.raw and (gathered := self.raw.gather(plan.indices, plan.numbers)):
      return gathered | {'index': plan.indices, 'weight': plan.weights}, []
    while True:
      known = frozenset(self.suspects)  # other threads add to them
      images, batch, skipped = self._read(plan, examples)
      try:
        built = self.decode(images, plan.numbers) | batch
        if self.raw:
          self.raw.remember(plan.indices, images, built)
        return built, skipped
      except UnreadableError:
        rows = zip(plan.indices.tolist(), images, plan.numbers, strict=True)
        found = {number for number, *image in rows if not self._decodes(*image)} - known
        if not found:
          raise
        self.suspects |= found

  def _read(
    self, plan: Plan, examples: list[Example] | None
  ) -> tuple[list[Encoded], HostBatch, list[tuple[str, str]]]:
    """Returns a plan's images, the rest of the batch, and (name, reason) of each skipped image."""
    examples = examples or self.source.read(plan.indices)
    labels = np.array([example.label for example in examples], np.int64)
    images, skipped, weights = [], [], plan.weights.copy()
    for row, (number, example) in enumerate(zip(plan.indices.tolist(), examples, strict=True)):
      try:
        images.append(self._image(example.image, number in self.suspects, plan.numbers[row]))
      except UnreadableError as error:
        if weights[row]:
          name = f'{self.source.name}: {example.name or f"example {number}"}'
          if self.bad.policy == 'error':
            self.bad.report(name, str(error))
          skipped.append((name, str(error)))
        image, labels[row] = self._stand_in(number, plan.numbers[row], str(error))
        images.append(image)
        weights[row] = 0.0
    last = len(self.source.class_names) - 1
    if wrong := [label for label in labels.tolist() if not self.first_label <= label <= last]:
      hint = ' (-1 stands for a secret label; train on another split)' if wrong[0] == -1 else ''
      raise UsageError(f'{self.source.name} contains the label {wrong[0]}; labels must be 0 ... {last}{hint}')
    return images, {'label': labels.astype(np.int32), 'index': plan.indices, 'weight': weights}, skipped

  def _image(self, image: Stored, suspected: bool, numbers: np.ndarray) -> Encoded:
    if isinstance(image, UnreadableError):
      raise image
    limits = self.turn, self.bad.max_pixels
    encoded = image if isinstance(image, Encoded) else read_header(image, *limits)
    if encoded is None or (suspected and not self._decodes(encoded, numbers)):
      encoded = convert_to_png(image.content if isinstance(image, Encoded) else image, *limits)
      if suspected:
        self.decode([encoded], numbers[None])  # also images that Pillow reads may not become a view
    return encoded

  def _stand_in(self, number: int, numbers: np.ndarray, reason: str) -> tuple[Encoded, int]:
    """Returns the next example that can be decoded, so that BatchNorm sees a normal image, with its label.

    It is a function of the example and its view alone, so that all processes and batch sizes agree.
    """
    for other in (*range(number + 1, self.source.num_examples), *range(number)):
      (example,) = self.source.read(np.array([other]))
      try:
        return self._image(example.image, True, numbers), example.label
      except UnreadableError:
        continue
    raise UsageError(f'no image of {self.source.name} can be decoded: {reason}')

  def _decodes(self, encoded: Encoded, numbers: np.ndarray) -> bool:
    with contextlib.suppress(UnreadableError):
      self.decode([encoded], numbers[None])
      return True
    return False


def in_parts(plan: Plan) -> list[Plan]:
  """Returns the parts of a plan that are decoded one at a time."""
  count = -(-len(plan.indices) // _PART)
  return [Plan(*part) for part in zip(*(np.array_split(array, count) for array in plan), strict=True)]


def _in_order(function: Callable[[Any], Any], plans: Iterable[Any], threads: int) -> Iterator[Any]:
  """Yields `function` of each plan in order; threads compute a few ahead."""
  waiting = iter(plans)
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    ahead = collections.deque(pool.submit(function, plan) for plan in itertools.islice(waiting, threads + 2))
    while ahead:
      yield ahead.popleft().result()
      ahead.extend(pool.submit(function, plan) for plan in itertools.islice(waiting, 1))
  finally:
    pool.shutdown(wait=False, cancel_futures=True)  # not waiting: one of its own threads may collect this
