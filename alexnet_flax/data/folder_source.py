"""Opens folders of images, SPLIT/CLASS/image or CLASS/image.

A class is a folder that holds images. Hidden files and folders are left out, and links are followed, as in
`predict` and `features` (`images.walk_files`).
"""

import collections
import functools
import hashlib
import os
import random
import sys
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from alexnet_flax.data.images import IMAGE_SUFFIXES, is_image_file, printable, walk_files
from alexnet_flax.data.source import Example, Source, rank_in_class, read_file
from alexnet_flax.errors import UsageError, one_line, unknown_name
from alexnet_flax.files import expanded, public

_LAYOUTS = 'SPLIT/CLASS/image or CLASS/image'
_EVERY = 5  # of a folder without splits, the share of images that is held out


_Image = tuple[str, str]  # its path and its class


class _Folder(NamedTuple):
  root: str
  splits: dict[str, list[_Image]]  # in a fixed order that mixes the classes
  is_divided: bool  # into folders of its own, SPLIT/CLASS/image
  unused: list[str]  # files


def open_folder(split: str, data_dir: str | None) -> Source:
  """Opens a split of a folder of images, in an order that mixes the classes.

  Its classes are the folders with images in this split and in all splits that share a class with it. A folder
  of CLASS/image is divided by a fixed rule: of each class, by name, every fifth image belongs to 'validation'
  and the others to 'train'. Raises UsageError if there is no such folder or split, if there are fewer than
  two classes, or if names of classes differ in case alone.
  """
  folder = _scan(data_dir)
  splits = folder.splits
  infos = {
    name: tfds.core.SplitInfo(name=name, shard_lengths=[len(splits[name])], num_bytes=0) for name in splits
  }
  try:
    parts = split_parts(split, infos)
  except (KeyError, ValueError, NotImplementedError):  # the last is TFDS's of 'all[:50%]'
    hint = '' if split not in splits else "; in TFDS, split names consist of letters, digits, '_' and '-'"
    if os.path.isdir(os.path.join(folder.root, split)) and split not in splits:
      hint = f'; the folder {split} holds no CLASS/image'
    raise UsageError(f'{data_dir}: {unknown_name("split", split, sorted(splits))}{hint}') from None
  chosen = [image for name, start, end in parts for image in splits[name][start:end]]
  if not chosen:
    raise UsageError(f'{data_dir}: the split {split!r} has no images')
  opened = {name for name, _, _ in parts}
  names = _class_names(folder, opened)
  if len(names) < 2:
    raise UsageError(f'{data_dir} has one class ({names[0]!r}); a classifier needs at least two')
  _report(folder, f'{data_dir}:{split}', opened, chosen, names)

  number_of = {name: number for number, name in enumerate(names)}
  paths, labels = zip(*((path, number_of[name]) for path, name in chosen), strict=True)

  def scan(numbers: np.ndarray) -> list[Example]:
    return [Example(b'', labels[number], printable(paths[number])) for number in numbers.tolist()]

  def read(numbers: np.ndarray) -> list[Example]:
    contents = [read_file(paths[number]) for number in numbers.tolist()]
    return [example._replace(image=one) for example, one in zip(scan(numbers), contents, strict=True)]

  inside = (os.fsencode(path.removeprefix(os.path.join(folder.root, ''))) for path in paths)
  digest, name = hashlib.sha256(b'\0'.join(inside)).hexdigest(), printable(f'{public(str(data_dir))}:{split}')
  return Source(name, len(paths), names, read, scan, str(data_dir), digest, parts)


def split_parts(split: str, splits: Mapping[str, Any]) -> tuple[tuple[str, int, int], ...]:
  """Returns what a slice in TFDS's notation consists of: (split, first example, end).

  Raises TFDS's errors for a split that there is not.
  """
  absolute = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
  return tuple(
    (part.splitname, part.from_ or 0, splits[part.splitname].num_examples if part.to is None else part.to)
    for part in absolute
  )


def folder_splits(data_dir: str | None) -> list[str]:
  """Returns the splits of a folder of images; raises the errors of `open_folder`."""
  return sorted(_scan(data_dir).splits)


def _scan(data_dir: str | None) -> _Folder:
  root = str(expanded(data_dir)) if data_dir else ''
  if not os.path.isdir(root):
    raise UsageError(f'image_folder: data_dir (={data_dir}) must be a folder of {_LAYOUTS}')
  prefix = os.path.join(root, '')
  files = {path: path.removeprefix(prefix).split(os.sep) for path in walk_files(root)}
  deep, flat = (
    {p: parts for p, parts in files.items() if is_image_file(p) and len(parts) == n} for n in (3, 2)
  )
  if not deep and not flat:
    raise UsageError(f'no images in {data_dir}; it must contain {_LAYOUTS} ({", ".join(IMAGE_SUFFIXES)})')
  used = flat if len(flat) > len(deep) else deep
  splits: dict[str, list[_Image]] = {}
  order = sorted(used.items(), key=lambda item: item[1])
  ranks = rank_in_class(np.unique([parts[-2] for _, parts in order], return_inverse=True)[1])
  for (path, (*given, label, _)), rank in zip(order, ranks.tolist(), strict=True):
    by_rule = 'validation' if rank % _EVERY == _EVERY - 1 else 'train'
    splits.setdefault(given[0] if given else by_rule, []).append((path, label))
  for split, images in splits.items():
    random.Random(split).shuffle(images)  # as TFDS's ImageFolder does
  return _Folder(root, splits, used is deep, sorted(files.keys() - used.keys()))


def _class_names(folder: _Folder, opened: set[str]) -> tuple[str, ...]:
  """Returns the classes of the splits that are opened and of those that belong to them, sorted by name."""
  keys = {split: {_key(label) for _, label in images} for split, images in folder.splits.items()}
  used, before = opened, set[str]()
  while used != before:
    before, shared = used, set.union(*(keys[split] for split in used))
    used = {split for split in keys if keys[split] & shared}
  counts = collections.Counter(sorted(label for split in used for _, label in folder.splits[split]))
  alike: dict[str, list[str]] = {}
  for name in sorted(counts):
    if printable(name) != name:
      what = f'the name of the class {printable(name)!r}'
      raise UsageError(f'{folder.root}: {what} is not UTF-8; rename its folder')
    alike.setdefault(_key(name), []).append(name)
  for same in alike.values():
    if len(same) > 1:
      found = ' and '.join(f'{name!r} ({counts[name]} images)' for name in same)
      raise UsageError(f'{folder.root}: {found} differ in case or encoding alone; give the folders one name')
  return tuple(counts)


def _key(name: str) -> str:
  """The same for names that file systems or readers do not tell apart."""
  return unicodedata.normalize('NFC', name).casefold()


def _report(
  folder: _Folder, name: str, opened: set[str], chosen: list[_Image], names: tuple[str, ...]
) -> None:
  """Says what may not be as it was meant."""
  counts = collections.Counter(label for _, label in chosen)
  if not folder.is_divided:
    rule = "of each class, every fifth image by name is in 'validation', the others are in 'train'"
    _note(f'{name}: {len(chosen)} images; {rule}')
  if few := [f'{one} ({counts[one]})' for one in names if counts[one] < 2]:
    _note(f'{name} has classes with one image or none: {", ".join(few)}')
  where = [os.path.join(folder.root, split, '') for split in opened] if folder.is_divided else [folder.root]
  if unused := [path for path in folder.unused if path.startswith(tuple(where))]:
    first, place = os.path.relpath(unused[0], folder.root), ' and '.join(where)
    _note(f'{len(unused)} files below {place} are not used (the first: {first}); images are CLASS/NAME.jpg')


@functools.cache  # a run opens its splits several times
def _note(text: str) -> None:
  print(one_line(f'note: {printable(text)}'), file=sys.stderr)
