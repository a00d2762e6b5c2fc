"""What a network's answers are called, by its run or its weights file; ImageNet's synsets in words."""

import json
import pathlib
import re
import sys
from collections.abc import Sequence
from importlib import resources

from alexnet_flax.errors import UsageError
from alexnet_flax.weights import stored_class_names
from alexnet_flax.weights.download import local_path

FILE = 'classes.txt'  # in a run's folder
# Keras's list: {"0": ["n01440764", "tench"], ...}.
IMAGENET_INDEX = 'https://storage.googleapis.com/download.tensorflow.org/data/imagenet_class_index.json'
_SYNSET = re.compile(r'n\d{8}')


def class_names(source: str, num_classes: int) -> tuple[str, ...]:
  """The names of a trained network's classes as its data set has them.

  Args:
    source: a run's folder, a weights file, a URL or a published name.
    num_classes: how many the network tells apart. 1000 without names are taken for ImageNet's.

  Raises:
    UsageError: the names that are stored are of another number.
  """
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    names = read_names(path / FILE) if (path / FILE).exists() else ()
  else:
    names = stored_class_names(source)
  if not names and num_classes == 1000:
    names = imagenet_synsets()
  if len(names) > num_classes:
    raise UsageError(f'{source}: names of {len(names)} classes for a network of {num_classes}')
  return (*names, *unnamed(num_classes)[len(names) :])


def unnamed(num_classes: int) -> tuple[str, ...]:
  """What classes without names are called: 'class 0', 'class 1', ..."""
  return tuple(f'class {number}' for number in range(num_classes))


def read_names(path: str | pathlib.Path, num_classes: int | None = None) -> tuple[str, ...]:
  """The lines of a text file, one name each.

  Raises:
    UsageError: it cannot be read, or does not have as many as asked for.
  """
  try:
    text = pathlib.Path(path).expanduser().read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise UsageError(f'cannot read the names of classes in {path}: {error}') from None
  names = tuple(text.removesuffix('\n').split('\n'))
  if num_classes is not None and len(names) != num_classes:
    raise UsageError(f'{path} has {len(names)} lines; it must have one for each of {num_classes} classes')
  return names


def write_names(folder: pathlib.Path, names: Sequence[str]) -> None:
  """Writes the names of a run's classes."""
  text = ''.join(name.replace('\n', ' ') + '\n' for name in names)
  (folder / FILE).write_text(text, encoding='utf-8')


def imagenet_synsets() -> tuple[str, ...]:
  """ImageNet's 1,000 synsets ('n01440764', ...) in the order of their labels, as TFDS lists them."""
  listed = resources.files('tensorflow_datasets') / 'datasets' / 'imagenet2012' / 'labels.txt'
  return tuple(listed.read_text().split())


def readable(names: Sequence[str]) -> tuple[str, ...]:
  """The same names for people: synsets in words, where their list is at hand or can be downloaded.

  >>> readable(['cat', 'great_white_shark'])
  ('cat', 'great white shark')
  """
  if any(_SYNSET.fullmatch(name) for name in names):
    try:
      words = dict(json.loads(local_path(IMAGENET_INDEX).read_text()).values())
      names = [words.get(name, name) for name in names]
    except UsageError:
      print("note: ImageNet's classes stay synsets: their names cannot be downloaded", file=sys.stderr)
    except (ValueError, TypeError, AttributeError):
      print(f'note: {local_path(IMAGENET_INDEX)} is no list of classes; remove it', file=sys.stderr)
  return tuple(name.replace('_', ' ') for name in names)
