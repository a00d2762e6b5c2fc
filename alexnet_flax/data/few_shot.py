"""A few examples of each class, drawn by the seed."""

import dataclasses

import numpy as np

from alexnet_flax.data.source import Source
from alexnet_flax.errors import UsageError

_AT_ONCE = 4096


def few_per_class(source: Source, count: int, seed: int) -> Source:
  """The source with `count` examples of each class, the same for a seed.

  Reads all labels once; no picture is decoded.

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
