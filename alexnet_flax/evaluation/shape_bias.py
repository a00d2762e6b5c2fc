"""Shape bias and error consistency: decisions on cue-conflict images (Geirhos et al. 2019, 2020, 2021).

An image `cat7-elephant1.png` in the folder `cat` has the shape of one category and the texture of another.
"""

import csv
import io
import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.special

from alexnet_flax.data.images import image_files, views_of_files
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.evaluation.scores import proportion
from alexnet_flax.files import expanded, refuse_pipe, write_text
from alexnet_flax.pretrained import PretrainedModel, imagenet_synsets, unnamed


def _classes(text: str) -> tuple[int, ...]:
  """The numbers in '8 10-16'."""
  ends = [[int(end) for end in part.split('-')] for part in text.split()]
  return tuple(number for first, *last in ends for number in range(first, (last or [first])[0] + 1))


# The 16 categories, with their classes of ImageNet's 1,000 by number (bethgelab/model-vs-human,
# modelvshuman/helper/human_categories.py).
CATEGORIES: dict[str, tuple[int, ...]] = {
  'airplane': _classes('404'),
  'bear': _classes('294-297'),
  'bicycle': _classes('444 671'),
  'bird': _classes('8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145'),
  'boat': _classes('472 554 625 814 914'),
  'bottle': _classes('440 720 737 898 899 901 907'),
  'car': _classes('436 511 817'),
  'cat': _classes('281-286'),
  'chair': _classes('423 559 765 857'),
  'clock': _classes('409 530 892'),
  'dog': _classes('152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268'),
  'elephant': _classes('385 386'),
  'keyboard': _classes('508 878'),
  'knife': _classes('499'),
  'oven': _classes('766'),
  'truck': _classes('555 569 656 675 717 734 864 867'),
}
COLUMNS = ('subj', 'session', 'trial', 'rt', 'object_response', 'category', 'condition', 'imagename')
_NAME = re.compile(r'(?:.*_)?(([a-z]+)\d+-([a-z]+)\d+\.\w+)')  # a trial's name begins with its number

Decisions = dict[str, str]  # an image's name, 'cat7-elephant1.png' -> a category, or another response


def cues(name: str) -> tuple[str, str, str]:
  """Returns an image's own name, its shape and its texture.

  >>> cues('0001_s5n_s01_0_cat_00_cat7-elephant1.png')
  ('cat7-elephant1.png', 'cat', 'elephant')

  Raises:
    UsageError: The name has another form, or a category is none of the 16.
  """
  match = _NAME.fullmatch(name)
  if match is None:
    raise UsageError(f'{name}: the name must be SHAPE1-TEXTURE1.png, such as cat7-elephant1.png')
  for category in (match[2], match[3]):
    if category not in CATEGORIES:
      raise unknown_name(f'category in {name}:', category, CATEGORIES)
  return match[1], match[2], match[3]


def decide(logits: np.ndarray) -> list[str]:
  """Returns a category for each row of logits of ImageNet's classes, float [N, 1000].

  It is the one whose classes have the greatest mean probability, as in the authors' toolbox.
  """
  probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
  means = np.stack([probabilities[:, classes].mean(1) for classes in CATEGORIES.values()], 1)
  return [list(CATEGORIES)[best] for best in means.argmax(1)]


def cue_images(folder: str) -> dict[str, str]:
  """Returns the images FOLDER/SHAPE/SHAPE1-TEXTURE1.png, by their own names.

  Raises:
    UsageError: There are none, or one has another name, is there twice, or lies in the wrong folder.
  """
  images: dict[str, str] = {}
  if not os.path.isdir(expanded(folder)):
    raise UsageError(f'{folder} is no folder; it must hold a folder of images for each shape')
  for file in image_files([folder]):
    place, base = os.path.split(file)
    try:
      name, shape, _ = cues(base)
    except UsageError as error:
      raise UsageError(f'in {place}: {error}') from None
    if os.path.basename(place) != shape:
      raise UsageError(f'{file} is not in the folder of its shape; it must be in a folder {shape}')
    if name in images:
      raise UsageError(f'{file} and {images[name]} are the same image')
    images[name] = file
  return images


def network_decisions(network: PretrainedModel, images: Mapping[str, str], batch_size: int = 64) -> Decisions:
  """Returns a network's decisions on image files by name, each seen as in evaluation.

  Raises:
    UsageError: The network's classes are not ImageNet's 1,000, or an image cannot be read.
  """
  if network.class_names not in (imagenet_synsets(), unnamed(1000)):
    count = f'{len(network.class_names):,} classes'
    raise UsageError(f"{network.source} has {count}, which are not ImageNet's 1,000 in their order")
  files, decided, size = list(images.values()), list[str](), min(batch_size, len(images))
  for views in views_of_files(files, network.spec, size):
    for file, view in zip(files[len(decided) :], views, strict=False):
      if isinstance(view, str):
        raise UsageError(f'cannot read {file}: {view}')
    batch = np.stack(views)
    padded = np.resize(batch, (size, *batch.shape[1:]))  # so that the network is compiled once
    decided += decide(network.logits(padded)[: len(views)])
  return dict(zip(images, decided, strict=True))


def shape_bias(decisions: Decisions) -> dict[str, Any]:
  """Returns the share of shapes among the decisions for shape or texture (Geirhos et al. 2019, section 3.1).

  Images whose shape and texture are of one category are left out.

  Returns:
    'shape_bias' and its 95 % interval, 'low' and 'high' (all None if no decision is for either); the numbers
    'images', 'shape' and 'texture'.
  """
  conflicts = [(one, *cues(name)[1:]) for name, one in decisions.items() if len({*cues(name)[1:]}) == 2]
  shapes, textures = (sum(one[0] == one[cue] for one in conflicts) for cue in (1, 2))
  total = shapes + textures
  value, low, high = proportion(shapes, total) if total else (None, None, None)
  counts = {'images': len(conflicts), 'shape': shapes, 'texture': textures}
  return {'shape_bias': value, 'low': low, 'high': high, **counts}


def by_shape(decisions: Decisions) -> dict[str, dict[str, Any]]:
  """Returns what `shape_bias` returns, for the images of each shape that has one with a conflict."""
  parts: dict[str, Decisions] = {}
  for name, decision in decisions.items():
    parts.setdefault(cues(name)[1], {})[name] = decision
  found = {shape: shape_bias(part) for shape, part in sorted(parts.items())}
  return {shape: figures for shape, figures in found.items() if figures['images']}


def error_consistency(first: Decisions, second: Decisions) -> float:
  """Returns Cohen's kappa of two observers' being right on the same images (Geirhos et al. 2020, section 2).

  Right is the shape. 1 if they are right on the same images; 0 if they agree no more often than two observers
  of the same accuracies who are right independently of each other.

  >>> first = {'cat1-dog1.png': 'cat', 'cat2-dog1.png': 'cat', 'cat3-dog1.png': 'cat', 'cat4-dog1.png': 'dog'}
  >>> error_consistency(first, first | {'cat3-dog1.png': 'dog'})
  0.5
  """
  right = np.array([[one[name] == cues(name)[1] for name in first] for one in (first, second)])
  observed, (mean, other) = float(np.mean(right[0] == right[1])), right.mean(1).tolist()
  expected = mean * other + (1 - mean) * (1 - other)
  return 1.0 if observed == 1 else (observed - expected) / (1 - expected)


def with_observers(decisions: Decisions, observers: Mapping[str, Decisions]) -> dict[str, Any]:
  """Returns the figures of a network beside those of other observers.

  Returns:
    What `shape_bias` returns; 'observers', for each the same and its 'error_consistency' with the network;
    the means of the error consistencies with them, and among them (None without one, without two).
  """
  each = {name: shape_bias(theirs) for name, theirs in observers.items()}
  kappas = [error_consistency(decisions, theirs) for theirs in observers.values()]
  among = [error_consistency(*pair) for pair in itertools.combinations(observers.values(), 2)]
  for figures, kappa in zip(each.values(), kappas, strict=True):
    figures['error_consistency'] = kappa
  means = (float(np.mean(some)) if some else None for some in (kappas, among))
  names = 'error_consistency', 'error_consistency_among_observers'
  return shape_bias(decisions) | dict(zip(names, means, strict=True)) | {'observers': each}


def read_trials(paths: Sequence[str], names: Collection[str]) -> dict[str, Decisions]:
  """Returns the decisions of each observer in CSV files as the toolbox has them in raw-data.

  Args:
    paths: Files with the columns `subj`, `object_response` and `imagename`.
    names: The images; every observer must have seen each of them once.

  Raises:
    UsageError: A file cannot be read, has other columns, or is of other images.
  """
  observers: dict[str, Decisions] = {}
  for path in paths:
    try:
      refuse_pipe(expanded(path))
      with open(expanded(path), encoding='utf-8-sig', newline='') as file:
        for row in csv.DictReader(file, restval=''):
          one = {str(column).lower(): value for column, value in row.items()}
          name, seen = cues(one['imagename'])[0], observers.setdefault(one['subj'], {})
          if name in seen:
            raise UsageError(f'{one["subj"]} has two trials with {name}')
          seen[name] = one['object_response']
    except KeyError as error:
      raise UsageError(f'{path} has no column {error}; it must have {", ".join(COLUMNS)}') from None
    except (UnicodeDecodeError, csv.Error):
      raise UsageError(f'cannot read {path}: it is no CSV file in UTF-8') from None
    except (OSError, UsageError) as error:
      raise UsageError(f'cannot read {path}: {getattr(error, "strerror", None) or error}') from None
  for observer, seen in observers.items():
    if other := sorted(seen.keys() ^ set(names)):
      what = f'{len(seen)} images, and the folder {len(names)}; {other[0]} is not in both'
      raise UsageError(f'{observer} has trials with {what}')
  if paths and not observers:
    raise UsageError(f'no trials in {", ".join(paths)}')
  return observers


def write_trials(path: str, observer: str, decisions: Decisions) -> None:
  """Writes decisions as the toolbox does; raises UsageError if the file cannot be written."""
  text = io.StringIO()
  rows = csv.writer(text, lineterminator='\n')
  rows.writerow(COLUMNS)
  for number, (name, decision) in enumerate(decisions.items(), start=1):
    rows.writerow((observer, 1, number, 'NaN', decision, cues(name)[1], 'NaN', name))
  try:
    write_text(expanded(path), text.getvalue())
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror}') from None
