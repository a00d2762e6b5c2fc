"""Examples to batches in host memory, and batches to the devices, a few steps ahead.

Python decides what each batch holds and reads its bytes; tf.data decodes them in C++ threads.
TensorFlow is imported here and in `views.py`, and never sees a GPU.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
import tensorflow as tf

from alexnet_flax.data import order, views
from alexnet_flax.data.datasets import Source
from alexnet_flax.errors import UsageError

tf.config.set_visible_devices([], 'GPU')

HostBatch = dict[str, np.ndarray]


def train_batches(
  source: Source,
  view: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
  *,
  seed: int,
  batch_size: int,
  first_step: int,
  last_step: int,
  num_classes: int,
  process: int = 0,
  num_processes: int = 1,
  num_threads: int | None = None,
) -> Iterator[HostBatch]:
  """This process's share of the batches of steps `first_step` ... `last_step` - 1.

  Args:
    source: the examples.
    view: (encoded picture, float32 [VIEW_NUMBERS]) -> uint8 [S, S, 3].
    seed: of order and views; what a step holds depends on nothing but this and the step.
    batch_size: of all processes together.
    first_step, last_step: the steps asked for.
    num_classes: labels must be less.
    process, num_processes: which share; example i of a batch goes to process i * P // batch_size.
    num_threads: for decoding; one a core if None.

  Yields:
    {'image': uint8 [b, S, S, 3], 'label': int32 [b], 'weight': float32 [b] of ones},
    b = batch_size / num_processes.
  """
  share = _share(batch_size, process, num_processes)

  def draws() -> Iterator[HostBatch]:
    for step in range(first_step, last_step):
      indices = order.batch_indices(seed, step, batch_size, source.num_examples)[share]
      numbers = order.view_numbers(seed, step, batch_size, views.VIEW_NUMBERS)[share]
      yield source.fetch(indices) | {'numbers': numbers, 'weight': np.ones(len(indices), np.float32)}

  return _decoded(source, draws, view, batch_size // num_processes, num_classes, num_threads)


def eval_batches(
  source: Source,
  view: Callable[[tf.Tensor], tf.Tensor],
  *,
  batch_size: int,
  num_classes: int,
  process: int = 0,
  num_processes: int = 1,
  num_threads: int | None = None,
) -> Iterator[HostBatch]:
  """Every example once, in order; the last batch is filled up with examples of weight 0."""
  share = _share(batch_size, process, num_processes)

  def draws() -> Iterator[HostBatch]:
    for start in range(0, source.num_examples, batch_size):
      indices = np.arange(start, start + batch_size)[share]
      real = indices < source.num_examples
      numbers = np.zeros((len(indices), views.VIEW_NUMBERS), np.float32)
      fetched = source.fetch(np.where(real, indices, 0))
      yield fetched | {'numbers': numbers, 'weight': real.astype(np.float32)}

  return _decoded(
    source, draws, lambda encoded, _: view(encoded), batch_size // num_processes, num_classes, num_threads
  )


def _share(batch_size: int, process: int, num_processes: int) -> slice:
  part = batch_size // num_processes
  return slice(process * part, (process + 1) * part)


def _decoded(
  source: Source,
  draws: Callable[[], Iterator[HostBatch]],
  view: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
  batch_size: int,
  num_classes: int,
  num_threads: int | None,
) -> Iterator[HostBatch]:
  stream = draws()
  first = next(stream, None)
  if first is None:
    return
  signature = {
    name: tf.TensorSpec((None, *array.shape[1:]), tf.string if array.dtype == object else array.dtype)
    for name, array in first.items()
  }

  def decode(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    encoded, label = source.parse(example)
    image = view(encoded, example['numbers'])
    return {'image': image, 'label': tf.cast(label, tf.int32), 'weight': example['weight']}

  again = itertools.chain([first], stream)
  dataset = tf.data.Dataset.from_generator(lambda: again, output_signature=signature)
  dataset = dataset.prefetch(2).unbatch().map(decode, num_threads or tf.data.AUTOTUNE)
  dataset = dataset.batch(batch_size, drop_remainder=True).prefetch(2)
  options = tf.data.Options()
  options.deterministic = True
  options.threading.private_threadpool_size = num_threads or 0
  for batch in _readable(source, dataset.with_options(options).as_numpy_iterator()):
    low, high = batch['label'].min(), batch['label'].max()
    if low < 0 or high >= num_classes:
      wrong = low if low < 0 else high
      raise UsageError(
        f'{source.name} holds the label {wrong}; labels must be 0 ... {num_classes - 1}'
        f' (num_classes={num_classes})'
      )
    yield batch


def _readable(source: Source, batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
  try:
    yield from batches
  except tf.errors.InvalidArgumentError as error:
    reason = str(error).partition('[Op:')[0].strip().splitlines()[0]
    raise UsageError(f'{source.name} holds a picture that cannot be decoded: {reason}') from None


def to_devices(
  batches: Iterable[HostBatch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
  """The same batches as global arrays, sharded over all processes, `ahead` of them on their way."""
  arrays = (
    {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}
    for batch in batches
  )
  queue = collections.deque(itertools.islice(arrays, ahead))
  while queue:
    batch = queue.popleft()
    queue.extend(itertools.islice(arrays, 1))
    yield batch
