"""Examples to batches in host memory, and batches to the devices, a few steps ahead.

What each batch holds and how it is seen is decided in NumPy; threads find the bytes, and C++ decodes them.
TensorFlow is imported by this part of the package alone, and never sees a GPU.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

import jax
import numpy as np
import tensorflow as tf

from alexnet_flax.data import order
from alexnet_flax.data.bad_pictures import BadPictures
from alexnet_flax.data.decoding import eval_decoder
from alexnet_flax.data.reading import HostBatch, Plan, Reader
from alexnet_flax.data.source import Source
from alexnet_flax.data.train_decoding import decode_train
from alexnet_flax.data.views import VIEW_NUMBERS, EvalView, TrainView

tf.config.set_visible_devices([], 'GPU')

# glibc gives a batch's memory back to the system, and every page of the next is mapped anew: 4 % of the time.
with contextlib.suppress(AttributeError, OSError):  # other systems' C libraries have no mallopt
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
  num_classes: int,
  process: int = 0,
  num_processes: int = 1,
  num_threads: int | None = None,
  bad: BadPictures | None = None,
) -> Iterator[HostBatch]:
  """This process's share of the batches of steps `first_step` ... `last_step` - 1.

  Args:
    source: the examples.
    view: of each.
    seed: of order and views; what a step holds depends on nothing but this and the step.
    batch_size: of all processes together.
    first_step, last_step: the steps asked for.
    num_classes: labels must be less.
    process, num_processes: which share; example i of a batch goes to process i * P // batch_size.
    num_threads: for decoding; one a core if None.
    bad: what to do with pictures that cannot be decoded; an error if None.

  Yields:
    {'image': uint8 [b, S, S, 3], 'label': int32 [b], 'weight': float32 [b], 'index': int64 [b]}, b =
    batch_size / num_processes; 'index' are the examples' numbers. Weights are 1, and 0 where a picture was
    left out; the next example is in its place, for BatchNorm.

  Raises:
    UsageError: a label is out of range, or a picture cannot be decoded and may not be left out.
  """
  share = _share(batch_size, process, num_processes)

  def plan(step: int) -> Plan:
    indices = order.batch_indices(seed, step, batch_size, source.num_examples)[share]
    numbers = order.view_numbers(seed, step, batch_size, VIEW_NUMBERS)[share]
    return Plan(indices, np.ones(len(indices), np.float32), numbers)

  reader = Reader(source, functools.partial(decode_train, view), num_classes, bad)
  return reader.batches(plan, range(first_step, last_step), num_threads)


def eval_batches(
  source: Source,
  view: EvalView,
  *,
  batch_size: int,
  num_classes: int,
  process: int = 0,
  num_processes: int = 1,
  num_threads: int | None = None,
  bad: BadPictures | None = None,
) -> Iterator[HostBatch]:
  """Every example once, in order; the last batch is filled up with examples of weight 0.

  As `train_batches`; 'image' is uint8 [b, 10, S, S, 3] if the view is of ten crops.
  """
  share = _share(batch_size, process, num_processes)

  def plan(step: int) -> Plan:
    indices = np.arange(step * batch_size, (step + 1) * batch_size)[share]
    real = indices < source.num_examples
    return Plan(np.where(real, indices, 0), real.astype(np.float32), np.zeros((len(indices), 0)))

  reader = Reader(source, eval_decoder(view), num_classes, bad)
  return reader.batches(plan, range(-(-source.num_examples // batch_size)), num_threads)


def picture(source: Source, number: int, view: EvalView) -> np.ndarray:
  """One example in a view of evaluation, uint8 [S, S, 3]."""
  one = dataclasses.replace(source, num_examples=1, read=lambda _: source.read(np.array([number])))
  (batch,) = eval_batches(one, view, batch_size=1, num_classes=len(source.class_names))
  return batch['image'][0]


def to_devices(
  batches: Iterable[HostBatch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
  """The same batches as global arrays, sharded over all processes, `ahead` of them on their way.

  The examples' numbers ('index') stay on the host.
  """
  arrays = (
    {
      name: jax.make_array_from_process_local_data(sharding, part)
      for name, part in batch.items()
      if name != 'index'
    }
    for batch in batches
  )
  queue = collections.deque(itertools.islice(arrays, ahead))
  while queue:
    batch = queue.popleft()
    queue.extend(itertools.islice(arrays, 1))
    yield batch


def _share(batch_size: int, process: int, num_processes: int) -> slice:
  part = batch_size // num_processes
  return slice(process * part, (process + 1) * part)
