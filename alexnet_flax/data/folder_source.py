"""Opens folders of images, SPLIT/CLASS/image, through TFDS's ImageFolder."""

import hashlib
import os

import numpy as np
import tensorflow_datasets as tfds

from alexnet_flax.data.source import Example, Source
from alexnet_flax.errors import UsageError, unknown_name


def open_folder(split: str, data_dir: str | None) -> Source:
  """Opens a split of a folder of images, in an order that mixes the classes.

  Raises:
    UsageError: There is no such folder or split, or fewer than two classes.
  """
  builder = _builder(data_dir)
  images = builder._split_examples  # in a fixed shuffled order; TFDS has no public access to the files
  names = builder.info.features['label'].names
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
  except (KeyError, ValueError):
    hint = '' if split not in images else "; in TFDS, split names consist of letters, digits, '_' and '-'"
    raise UsageError(f'{data_dir}: {unknown_name("split", split, sorted(images))}{hint}') from None
  chosen = [example for part in parts for example in images[part.splitname][part.from_ : part.to]]
  if not chosen:
    raise UsageError(f'{data_dir}: the split {split!r} has no images')
  number_of = {name: number for number, name in enumerate(names)}
  labels = [number_of[example.label] for example in chosen]
  paths = [os.fspath(example.image_path) for example in chosen]
  for part in sorted({part.splitname for part in parts}):
    _report_unused(builder, part, {os.fspath(example.image_path) for example in images[part]})

  def read(numbers: np.ndarray) -> list[Example]:
    return [_read_file(paths[number], labels[number]) for number in numbers.tolist()]

  digest = hashlib.sha256('\0'.join(os.path.relpath(path, builder._data_dir) for path in paths).encode())
  return Source(f'{data_dir}:{split}', len(paths), tuple(names), read, str(data_dir), digest.hexdigest())


def _read_file(path: str, label: int) -> Example:
  try:
    with open(path, 'rb') as file:
      return Example(file.read(), label, path)
  except OSError:  # missing or unreadable: treated as an empty file
    return Example(b'', label, path)


def _report_unused(builder: tfds.folder_dataset.ImageFolder, split: str, used: set[str]) -> None:
  """Prints which files TFDS ignores: all but .jpg, .jpeg and .png directly below a class."""
  root = os.path.join(builder._data_dir, split)
  below = [os.path.join(folder, name) for folder, _, files in os.walk(root) for name in files]
  unused = sorted(path for path in below if path not in used and not os.path.basename(path).startswith('.'))
  if unused:
    print(
      f'note: {len(unused)} files below {root} are not used (the first: {os.path.relpath(unused[0], root)});'
      ' images are CLASS/NAME.jpg, .jpeg or .png'
    )


def folder_splits(data_dir: str | None) -> list[str]:
  """Returns the splits of a folder of images; raises the errors of `open_folder`."""
  return sorted(_builder(data_dir).info.splits)


def _builder(data_dir: str | None) -> tfds.folder_dataset.ImageFolder:
  if data_dir is None or not os.path.isdir(os.path.expanduser(data_dir)):
    raise UsageError(f'image_folder: data_dir (={data_dir}) must be a folder of SPLIT/CLASS/image')
  builder = tfds.folder_dataset.ImageFolder(os.path.expanduser(data_dir))
  if not builder.info.splits.total_num_examples:
    raise UsageError(f'no images in {data_dir}; it must contain SPLIT/CLASS/image.jpg (or .jpeg, .png)')
  names = builder.info.features['label'].names
  if len(names) < 2:
    raise UsageError(f'{data_dir} has one class ({names[0]!r}); a classifier needs at least two')
  return builder
