"""Batches as they are planned to batches of pixels: tf.data decodes, and odd pictures are dealt with."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from alexnet_flax.data.bad_pictures import BadPictures
from alexnet_flax.data.decoding import first_row
from alexnet_flax.data.encoded import Encoded, made_plain, read_header
from alexnet_flax.data.source import Source
from alexnet_flax.errors import UsageError
from alexnet_flax.pictures import UnreadableError

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a batch holds: the examples' numbers, their weights, and the numbers of their views."""

  indices: np.ndarray
  weights: np.ndarray
  numbers: np.ndarray


@dataclasses.dataclass
class Reader:
  """Reads plans. Where TensorFlow fails at a picture, the step is read anew with that one suspected.

  A suspect is decoded beforehand, so that the stream need not break at it again; what becomes of it is a
  function of picture and view alone.
  """

  source: Source
  columns: Callable[[list[Encoded], np.ndarray], HostBatch]
  decode: Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]
  num_classes: int | None  # None for any labels
  bad: BadPictures | None
  accept: Callable[[Encoded], None] = lambda encoded: None  # raises UnreadableError
  suspects: set[int] = dataclasses.field(default_factory=set)

  @property
  def _bad(self) -> BadPictures:
    return self.bad or BadPictures()

  def batches(
    self, plan: Callable[[int], Plan], steps: range, num_threads: int | None
  ) -> Iterator[HostBatch]:
    bad = self._bad
    while steps:
      left_out: dict[int, list[tuple[str, str]]] = {}
      try:
        for batch in self._stream(plan, steps, left_out, num_threads):
          for name, reason in left_out.pop(steps[0], []):
            bad.report(name, reason)
          yield batch
          steps = steps[1:]
      except tf.errors.InvalidArgumentError as error:
        found = self._undecodable(plan(steps[0])) - self.suspects
        if not found:
          raise
        self.suspects |= found
        del error

  def _stream(
    self,
    plan: Callable[[int], Plan],
    steps: range,
    left_out: dict[int, list[tuple[str, str]]],
    num_threads: int | None,
  ) -> Iterator[HostBatch]:
    failure: list[Exception] = []

    def drawn() -> Iterator[HostBatch]:
      try:
        for step in steps:
          batch, left_out[step] = self._read(plan(step))
          yield batch
      except UsageError as error:  # TensorFlow would make a traceback of it
        failure.append(error)

    stream = drawn()
    first = next(stream, None)
    if first is not None:
      signature = {
        name: tf.TensorSpec((None, *array.shape[1:]), tf.string if array.dtype == object else array.dtype)
        for name, array in first.items()
      }
      again = itertools.chain([first], stream)
      threads = num_threads or os.cpu_count()
      dataset = tf.data.Dataset.from_generator(lambda: again, output_signature=signature)
      dataset = dataset.prefetch(2).flat_map(tf.data.Dataset.from_tensor_slices).map(self._decoded, threads)
      dataset = dataset.batch(len(first['label']), drop_remainder=True).prefetch(2)
      options = tf.data.Options()
      options.deterministic = True
      options.autotune.enabled = False
      options.threading.private_threadpool_size = threads
      yield from dataset.with_options(options).as_numpy_iterator()
    if failure:
      raise failure[0]

  def _decoded(self, example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return self.decode(example) | {name: example[name] for name in ('label', 'weight', 'index')}

  def _read(self, plan: Plan) -> tuple[HostBatch, list[tuple[str, str]]]:
    """A plan's columns, and (name, reason) of what is left out of it."""
    examples = self.source.read(plan.indices)
    labels = np.array([example.label for example in examples], np.int64)
    if self.num_classes is not None:
      check_labels(self.source, labels, self.num_classes)
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
    columns = self.columns(pictures, plan.numbers)
    columns |= {'label': labels.astype(np.int32), 'index': plan.indices}
    return columns | {'weight': weights}, left_out

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

  def _undecodable(self, plan: Plan) -> set[int]:
    """The examples of a plan at which TensorFlow fails."""
    found = set()
    examples = self.source.read(plan.indices)
    for row, (number, example) in enumerate(zip(plan.indices.tolist(), examples, strict=True)):
      picture = example.picture
      encoded = picture if isinstance(picture, Encoded) else read_header(picture)
      if encoded is not None and not self._decodes(encoded, plan.numbers[row]):
        found.add(number)
    return found

  def _decodes(self, encoded: Encoded, numbers: np.ndarray) -> bool:
    columns = self.columns([encoded], numbers[None])
    try:
      self.decode(first_row(columns))
    except tf.errors.InvalidArgumentError:
      return False
    return True


def check_labels(source: Source, labels: np.ndarray, num_classes: int) -> None:
  """Raises UsageError if a label is not one of 0 ... num_classes - 1."""
  low, high = labels.min(), labels.max()
  if low < 0 or high >= num_classes:
    wrong = low if low < 0 else high
    raise UsageError(
      f'{source.name} holds the label {wrong}; labels must be 0 ... {num_classes - 1}'
      f' (num_classes={num_classes})'
    )
