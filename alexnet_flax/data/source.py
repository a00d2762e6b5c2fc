"""Examples by number: what data sets look like to all that reads them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from alexnet_flax.data.image_header import Encoded
from alexnet_flax.errors import UsageError


class Example(NamedTuple):
  """One example.

  Attributes:
    image: as it is stored.
    label: its class.
    name: its file's, where there is one.
    right: all classes that count as right, where the data set says so; there may be none.
  """

  image: bytes | memoryview | Encoded
  label: int
  name: str
  right: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """The examples of one split, by number.

  Attributes:
    name: data set and split, for messages.
    num_examples: how many there are.
    class_names: of the labels 0, 1, ...
    read: int [N] -> N examples.
    folder: where the data set lies.
    identity: what distinguishes its examples from those of others: name and version, or a digest.
  """

  name: str
  num_examples: int
  class_names: tuple[str, ...]
  read: Callable[[np.ndarray], list[Example]]
  folder: str
  identity: str = ''


_AT_ONCE = 4096


def few_per_class(source: Source, count: int, seed: int) -> Source:
  """The source with `count` examples of each class, the same for a seed.

  Reads all labels once; no image is decoded.

  Raises:
    UsageError: a class has fewer.
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
    name=f'{source.name} ({count} a class)',
    num_examples=len(indices),
    read=lambda numbers: source.read(indices[numbers]),
  )


def read_labels(source: Source) -> np.ndarray:
  """The labels of all examples, int64 [N]."""
  parts = (np.arange(source.num_examples)[i : i + _AT_ONCE] for i in range(0, source.num_examples, _AT_ONCE))
  return np.array([example.label for part in parts for example in source.read(part)], np.int64)
