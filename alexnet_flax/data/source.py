"""Random access to the examples of a data set: the interface that all data sets implement."""

import dataclasses
import errno
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from alexnet_flax.data.image_header import Stored
from alexnet_flax.data.images import UnreadableError, printable
from alexnet_flax.errors import UsageError
from alexnet_flax.files import refuse_pipe

_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN, errno.EHOSTDOWN}
_WAITS = (0.1, 1.0, 5.0)  # seconds before reading is tried again
_AT_ONCE = 4096


class Example(NamedTuple):
  """One example: its image, and its label; -1 if it has none, as in TFDS's sets whose labels are secret."""

  image: Stored
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
  scan: Callable[[np.ndarray], list[Example]]  # the same, but images may be missing, and nothing is verified
  folder: str  # of the data set
  identity: str = ''  # of the examples: name and version, or a digest
  parts: tuple[tuple[str, int, int], ...] = ()  # the splits it is of, with the first example and the end
  ahead: int = 0  # parts of batches that are read before they are decoded; 0: reading them is no waiting
  is_published: bool = False  # by TFDS: figures over it are over images as they are stored, never turned

  def scan_all(self) -> Iterator[Example]:
    """Yields all examples in order, for their labels."""
    for start in range(0, self.num_examples, _AT_ONCE):
      yield from self.scan(np.arange(start, min(start + _AT_ONCE, self.num_examples)))


def few_per_class(source: Source, count: int, seed: int) -> Source:
  """Returns a subset with `count` examples of each class, chosen by the seed; no image is decoded.

  Raises UsageError if a class has fewer examples.
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
    scan=lambda numbers: source.scan(indices[numbers]),
  )


def read_labels(source: Source) -> np.ndarray:
  """Returns the labels of all examples, int64 [N]."""
  return np.array([example.label for example in source.scan_all()], np.int64)


def require_same_classes(one: Source, other: Source) -> None:
  """Raises UsageError if two splits have different classes."""
  if one.class_names != other.class_names:
    only = {s.name: sorted({*s.class_names} - {*t.class_names}) for s, t in ((one, other), (other, one))}
    found = [f'only {name} has {", ".join(map(repr, names))}' for name, names in only.items() if names]
    raise UsageError(f'{one.name} and {other.name} have different classes: {"; ".join(found)}')


def require_labels(source: Source) -> None:
  """Raises UsageError if no example has a label, to judge by a few of them."""
  chosen = np.unique(np.linspace(0, source.num_examples - 1, 64).astype(np.int64))
  if all(example.label < 0 for example in source.scan(chosen)):
    hint = 'TFDS stores -1 for secret ones'
    raise UsageError(f'{source.name}: no image has a label ({hint}); name another split')


def rank_in_class(labels: np.ndarray) -> np.ndarray:
  """Returns the position of each example among those of its class, int64 [N]."""
  rank, order = np.empty(len(labels), np.int64), np.argsort(labels, kind='stable')
  rank[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
  return rank


def read_file(path: str) -> bytes | UnreadableError:
  """Reads an image's file; of one that cannot be opened, returns the reason.

  Raises UsageError where the disk or the network fails, also after some seconds. That is no fault of the
  image, and must not decide which images a run skips.
  """
  for wait in (*_WAITS, 0.0):
    try:
      refuse_pipe(path)
      with open(path, 'rb') as file:
        return file.read()
    except OSError as error:
      if error.errno not in _TRANSIENT:
        return UnreadableError(error.strerror)
      reason = error.strerror
    time.sleep(wait)
  raise UsageError(f'cannot read {printable(path)}: {reason}; try again when it can be read')
