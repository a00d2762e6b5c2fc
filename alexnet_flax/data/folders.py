"""Folders of pictures, SPLIT/CLASS/picture, by way of TFDS's ImageFolder."""

import os

import numpy as np
import tensorflow_datasets as tfds

from alexnet_flax.data.source import Example, Source
from alexnet_flax.errors import UsageError, unknown_name


def open_folder(split: str, data_dir: str | None) -> Source:
  """A split of a folder of pictures, in an order that mixes the classes.

  Raises:
    UsageError: there is no such folder or split, or fewer than two classes.
  """
  builder = _builder(data_dir)
  pictures = builder._split_examples  # shuffled, always alike; there is no public way to the files
  names = builder.info.features['label'].names
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
  except (KeyError, ValueError):
    raise UsageError(f'{data_dir}: {unknown_name("split", split, sorted(pictures))}') from None
  chosen = [example for part in parts for example in pictures[part.splitname][part.from_ : part.to]]
  if not chosen:
    raise UsageError(f'{data_dir}: the split {split!r} has no pictures')
  labels = [names.index(example.label) for example in chosen]

  def read(numbers: np.ndarray) -> list[Example]:
    return [_read_file(chosen[number].image_path, labels[number]) for number in numbers.tolist()]

  return Source(f'{data_dir}:{split}', len(chosen), tuple(names), read, str(data_dir))


def _read_file(path: str, label: int) -> Example:
  with open(path, 'rb') as file:
    return Example(file.read(), label, os.fspath(path))


def folder_splits(data_dir: str | None) -> list[str]:
  """The splits of a folder of pictures; errors as for `open_folder`."""
  return sorted(_builder(data_dir).info.splits)


def _builder(data_dir: str | None) -> tfds.folder_dataset.ImageFolder:
  if data_dir is None or not os.path.isdir(os.path.expanduser(data_dir)):
    raise UsageError(f'image_folder: data_dir (={data_dir}) must be a folder of SPLIT/CLASS/picture')
  builder = tfds.folder_dataset.ImageFolder(os.path.expanduser(data_dir))
  if not builder.info.splits.total_num_examples:
    raise UsageError(f'no pictures in {data_dir}; it must hold SPLIT/CLASS/picture.jpg (or .jpeg, .png)')
  names = builder.info.features['label'].names
  if len(names) < 2:
    raise UsageError(f'{data_dir} holds one class ({names[0]!r}); a classifier needs at least two')
  return builder
