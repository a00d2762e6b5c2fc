"""Networks that have been trained: of a run's folder, a weights file, a URL or a published name."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jax

from alexnet_flax import checkpoint
from alexnet_flax.config import Config, build_spec, from_dict
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Spec
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.weights import load_weights, stored_class_names, stored_spec
from alexnet_flax.weights.download import local_path


def load_pretrained(source: str | os.PathLike[str], spec: Spec | None = None) -> tuple[Spec, dict[str, Any]]:
  """A trained network and its variables.

  Args:
    source: a run's folder (its last checkpoint; the moving averages, if it has them), or what
      `load_weights` takes.
    spec: the network of a weights file, unless the file itself says; if None, the variant that it can
      be of.

  Raises:
    UsageError: there is no such source, it cannot be read, or it is not clear which network it is of.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return _of_run(folder)
  theirs = stored_spec(source, {} if spec else VARIANTS) or spec
  if theirs is None:
    raise UsageError(f'{source}: of none of the known networks; name its variant')
  return theirs, load_weights(source, theirs)


def load_variant(
  source: str, variant: str | None, width: float = 1.0, image_size: int | None = None
) -> tuple[Spec, dict[str, Any]]:
  """The same, of a variant by name and scaled.

  Raises:
    UsageError: as above, or there is no such variant, or the source says itself that it is of another.
  """
  if variant is not None and variant not in VARIANTS:
    raise unknown_name('variant', variant, VARIANTS)
  asked = variant is not None or width != 1 or image_size is not None
  if not asked or pathlib.Path(source).expanduser().is_dir():
    spec, variables = load_pretrained(source)
  else:
    known = VARIANTS[variant] if variant else stored_spec(source, VARIANTS)
    try:
      spec, variables = load_pretrained(source, known and known.scaled(width, image_size))
    except ValueError as error:
      raise UsageError(str(error)) from None
  if variant not in (None, spec.name):
    raise UsageError(f'{source} holds {spec.name}, not --variant={variant}')
  if image_size not in (None, spec.image_size):
    raise UsageError(f'{source} is for {spec.image_size}x{spec.image_size}, not --image_size={image_size}')
  return spec, variables


def run_config(folder: str | os.PathLike[str]) -> Config:
  """The configuration of a run's folder.

  Raises:
    UsageError: there is none.
  """
  path = pathlib.Path(folder).expanduser() / 'config.json'
  try:
    return from_dict(json.loads(path.read_text()))
  except (OSError, ValueError) as error:
    raise UsageError(f"{folder} is no run's folder: {path.name}: {error}") from None


def _of_run(folder: pathlib.Path) -> tuple[Spec, dict[str, Any]]:
  config = run_config(folder)
  _, variables = checkpoint.restore_variables(folder / 'checkpoints')
  return build_spec(config), variables


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained network.

  Attributes:
    source: the run's folder, file, URL or name it was loaded from.
    model: the network.
    variables: {'params', 'batch_stats'}.
    class_names: of its logits, as the data set has them.
  """

  source: str
  model: AlexNet
  variables: dict[str, Any]
  class_names: tuple[str, ...]

  @property
  def spec(self) -> Spec:
    """Of the network."""
    return self.model.spec

  @property
  def num_parameters(self) -> int:
    """How many parameters it has; statistics are none."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.variables['params']))

  @functools.cached_property
  def readable_names(self) -> tuple[str, ...]:
    """The classes for people."""
    return readable(self.class_names)


def load_trained(
  source: str, variant: str | None = None, width: float = 1.0, image_size: int | None = None
) -> Trained:
  """Loads a trained network; arguments and errors as for `pretrained.load_variant`."""
  return trained(source, *load_variant(source, variant, width, image_size))


def trained(source: str, spec: Spec, variables: dict[str, Any]) -> Trained:
  """A network whose variables are at hand; its head has as many classes as they say."""
  num_classes = variables['params'][spec.head]['bias'].shape[0]
  return Trained(source, AlexNet(spec, num_classes), variables, class_names(source, num_classes))


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
