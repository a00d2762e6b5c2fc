"""Random access to the examples of a data set: the interface that all data sets implement."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from alexnet_flax.data.image_header import Encoded
from alexnet_flax.errors import UsageError


class Example(NamedTuple):
  """One example: its image as it is stored, and its label."""

  image: bytes | memoryview | Encoded
  label: int
  name: str  # of its file, if there is one
  correct: tuple[int, ...] | None = None  # all classes that count as correct; None if that is the label alone


@dataclasses.dataclass(frozen=True)
class Source:
  """The examples of one split, by index."""

  name: str  # data set and split, for messages
  num_examples: int
  class_names: tuple[str, ...]  # of the labels 0, 1, ...
  read: Callable[[np.ndarray], list[Example]]  # by index, int [N]
  folder: str  # of the data set
  identity: str = ''  # of the examples: name and version, or a digest

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
  labels, chosen = read_labels(source), []
  for label, name in enumerate(source.class_names):
    members = np.flatnonzero(labels == label)
    if len(members) < count:
      has = f'{source.name} has {len(members)} examples of {name!r}'
      raise UsageError(f'{has}; data.examples_per_class is {count}')
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
