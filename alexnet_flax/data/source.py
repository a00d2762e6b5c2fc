"""Examples by number: what data sets look like to all that reads them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from alexnet_flax.data.encoded import Encoded


class Example(NamedTuple):
  """One example.

  Attributes:
    picture: as it is stored.
    label: its class.
    name: its file's, where there is one.
    right: all classes that count as right, where the data set says so; there may be none.
  """

  picture: bytes | memoryview | Encoded
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
