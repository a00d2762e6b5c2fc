"""Random access to the examples of a data set: the interface that all data sets implement."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from alexnet_flax.data.image_header import Encoded
from alexnet_flax.errors import UsageError


class Example(NamedTuple):
  """One example.

  Attributes:
    image: The image as it is stored.
    label: Its class.
    name: Its file name, if there is one.
    correct: All classes that count as correct, possibly none; None if that is the label alone.
  """

  image: bytes | memoryview | Encoded
  label: int
  name: str
  correct: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """The examples of one split, by index.

  Attributes:
    name: Data set and split, for messages.
    num_examples: The number of examples.
    class_names: The names of the labels 0, 1, ...
    read: Reads examples by index, int [N].
    folder: The folder of the data set.
    identity: Identifies the examples: name and version, or a digest.
  """

  name: str
  num_examples: int
  class_names: tuple[str, ...]
  read: Callable[[np.ndarray], list[Example]]
  folder: str
  identity: str = ''

  def read_all(self) -> Iterator[Example]:
    """Yields all examples in order."""
    for start in range(0, self.num_examples, _AT_ONCE):
      yield from self.read(np.arange(start, min(start + _AT_ONCE, self.num_examples)))


_AT_ONCE = 4096


def few_per_class(source: Source, count: int, seed: int) -> Source:
  """Returns a subset with `count` examples of each class, chosen by the seed.

  Reads all labels once; no image is decoded.

  Raises:
    UsageError: A class has fewer examples.
  """
  labels = read_labels(source)
  chosen = []
  for label, name in enumerate(source.class_names):
    members = np.flatnonzero(labels == label)
    if len(members) < count:
      raise UsageError(
        f'{source.name} has {len(members)} examples of {name!r}; data.examples_per_class is {count}'
      )
    keys = np.random.Philox(key=[seed, label]).random_raw(len(members))
    chosen.append(members[np.argsort(keys, kind='stable')[:count]])
  indices = np.sort(np.concatenate(chosen))
  return dataclasses.replace(
    source,
    name=f'{source.name} ({count} per class)',
    num_examples=len(indices),
    read=lambda numbers: source.read(indices[numbers]),
  )


def read_labels(source: Source) -> np.ndarray:
  """Returns the labels of all examples, int64 [N]."""
  return np.array([example.label for example in source.read_all()], np.int64)
