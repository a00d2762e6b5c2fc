"""Trained networks, loaded from a run's folder, a weights file, a URL or a published name."""

import contextlib
import dataclasses
import difflib
import functools
import glob
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import scipy.special

from alexnet_flax.data.augment import normalize
from alexnet_flax.data.images import evaluation_view
from alexnet_flax.errors import UsageError, needs_extra, one_line
from alexnet_flax.files import expanded, read_json, refuse_pipe, write_text
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Conv, Dense, Spec
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.weights import WRITABLE_ENDINGS, open_weights
from alexnet_flax.weights.download import PUBLISHED, local_path
from alexnet_flax.weights.format import WeightsFile
from alexnet_flax.weights.hub import PREFIX, WEIGHTS

if TYPE_CHECKING:
  from alexnet_flax.config import Config, DataConfig

FILE = 'classes.txt'  # in a run's folder
LOCAL = 'local.json'  # likewise: what concerns this machine alone, and is not for others to read
# Keras's list: {"0": ["n01440764", "tench"], ...}.
IMAGENET_INDEX = 'https://storage.googleapis.com/download.tensorflow.org/data/imagenet_class_index.json'
_SYNSET = re.compile(r'n\d{8}')


class Classification(NamedTuple):
  """A class of the network's, its name, and the probability that an image is of it."""

  label: int
  name: str
  probability: float


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
  """A trained network.

  Attributes:
    source: The run's folder, file, URL or name that it was loaded from.
    model: The network.
    variables: {'params', 'batch_stats'}.
    class_names: The names of its classes, as the data set has them.
    step: The step of the run's checkpoint; None for weights files.
  """

  source: str
  model: AlexNet
  variables: dict[str, Any]
  class_names: tuple[str, ...]
  step: int | None = None

  @property
  def spec(self) -> Spec:
    """The spec of the network."""
    return self.model.spec

  @property
  def num_parameters(self) -> int:
    """The number of parameters, without BatchNorm's statistics."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.variables['params']))

  @functools.cached_property
  def readable_names(self) -> tuple[str, ...]:
    """The names of the classes in words."""
    return readable(self.class_names)

  def label_of(self, text: str) -> int:
    """Returns the class of a name or a number; raises UsageError for none, or a name that several have."""
    names = [
      {one.lower(), words.lower()} for one, words in zip(self.class_names, self.readable_names, strict=True)
    ]
    found = [label for label, both in enumerate(names) if text.lower() in both]
    found = found or [label for label in range(len(names)) if str(label) == text]
    if len(found) == 1:
      return found[0]
    if found:
      raise UsageError(f'{text!r} is the name of the classes {", ".join(map(str, found))}; give a number')
    near = difflib.get_close_matches(text.lower(), sorted(set().union(*names)), cutoff=0.5)
    meant = f'did you mean {" or ".join(map(repr, near))}? ' if near else ''
    raise UsageError(f'there is no class {text!r}; {meant}give a name, or a number in 0 ... {len(names) - 1}')

  def logits(self, views: np.ndarray) -> np.ndarray:
    """Returns float32 logits [N, C] of images that have the network's size, uint8 RGB [N, S, S, 3]."""
    return np.asarray(_logits(self.model, self.variables, views))

  def classify(self, images: Sequence[np.ndarray], top: int = 5) -> list[list[Classification]]:
    """Returns the `top` most probable classes of each image, most probable first; all images are one batch.

    Images are uint8 RGB [H, W, 3] of any sizes; ValueError for others. An image of exactly the network's size
    [S, S, 3] is taken as it is; any other is resized and cropped as in evaluation, which needs Pillow.
    """
    own = (self.spec.image_size, self.spec.image_size, 3), np.uint8
    arrays = [np.asarray(image) for image in images]
    views = [x if (x.shape, x.dtype) == own else evaluation_view(x, self.spec) for x in arrays]
    rows = self.logits(np.stack(views)) if views else ()
    return [top_classes(row, self.readable_names, top) for row in rows]


def load_pretrained(
  source: str | os.PathLike[str] | WeightsFile,
  spec: Spec | None = None,
  *,
  variant: str | None = None,
  width: float = 1.0,
  image_size: int | None = None,
) -> PretrainedModel:
  """Loads a trained network.

  Args:
    source: A run's folder (its last checkpoint; the moving averages, if it has them), RUN@best or
      RUN@STEP (another of its checkpoints), what `load_weights` takes, or an open weights file.
    spec: The network of a weights file that does not describe itself.
    variant: The name of that network instead; if both are None, the variant that the file can be of.
    width: The variant's scale, as for `Spec.scaled`; if it is 1, the file's.
    image_size: The variant's image size; if None, the file's, if it says it, or else the variant's own.

  Raises:
    UsageError: There is no such source or variant, it cannot be read, it is not clear which network it is
      of, or it says itself that it is of another.
  """
  named = VARIANTS[variant] if variant is not None else None
  if not 0 < width < math.inf:
    raise UsageError(f'--width={width} must be positive')
  if not isinstance(source, WeightsFile) and (run := find_run(source)):
    found = _load_run(str(source), *run)
  else:
    file = source if isinstance(source, WeightsFile) else open_weights(source)
    source, theirs = file.source, file.spec or spec
    if theirs is None:
      if (known := named or file.find_spec()) is None:
        raise UsageError(f'{source}: of none of the known networks; name its variant')
      theirs = file.scaled(known, width, image_size)
    found = _model(source, theirs, file.variables(theirs), file.class_names)
  if variant not in (None, found.spec.name):
    raise UsageError(f'{source} holds {found.spec.name}, not --variant={variant}')
  whole = VARIANTS.get(found.spec.name, found.spec)
  both = (found.spec, whole.scaled(width))
  ours, asked = ([x.features for x in one.layers if isinstance(x, Conv | Dense)] for one in both)
  if width != 1.0 and ours != asked:
    raise UsageError(f'{source} says itself how wide it is, and that is not --width={width}; leave it out')
  if image_size not in (None, found.spec.image_size):
    side = found.spec.image_size
    raise UsageError(f'{source} is for {side}x{side}, not --image_size={image_size}')
  return found


def find_run(source: str | os.PathLike[str]) -> tuple[pathlib.Path, str | None] | None:
  """Returns the folder in RUN, RUN@best or RUN@STEP, and what follows the @; None if there is no such folder.

  Raises UsageError if something else follows the @.
  """
  if os.path.isdir(path := expanded(source)):  # a folder from the Hub has a config.json too
    is_run = os.path.isdir(path / 'checkpoints') or not os.path.isfile(path / WEIGHTS)
    return (path, None) if is_run else None
  folder, _, which = os.fspath(source).rpartition('@')
  if not folder or os.path.exists(path) or not os.path.isdir(path := expanded(folder)):
    return None
  if which != 'best' and not re.fullmatch('[0-9]+', which):
    raise UsageError(f'{source}: after the @ comes best, or the step of a checkpoint, not {which!r}')
  return path, which


def seed_runs(source: str | os.PathLike[str]) -> list[str]:
  """Returns the runs of several seeds in FOLDER, FOLDER@best or FOLDER@STEP, as RUN or RUN@..., if any."""
  folder, which = find_run(source) or (pathlib.Path(source), None)
  is_run = os.path.exists(folder / 'config.json')
  found = [] if is_run else glob.glob('seed-*/config.json', root_dir=folder)
  runs = sorted(str(folder / one.removesuffix('/config.json')) for one in found)
  return [f'{run}@{which}' for run in runs] if which else runs


def is_network(text: str) -> bool:
  """Whether a word of a command line names a trained network and not a file or folder of images."""
  if run := find_run(text):
    return (run[0] / 'config.json').exists()
  if os.path.exists(expanded(text)):
    endings = *WRITABLE_ENDINGS, '.pt', '.pth.tar', '.h5'
    from_hub = (os.path.isfile(expanded(text) / name) for name in (WEIGHTS, 'config.json'))
    return text.endswith(endings) or all(from_hub)
  return text in PUBLISHED or text.startswith(('http://', 'https://', PREFIX))


def run_config(source: str | os.PathLike[str]) -> 'Config':
  """Returns the configuration of a run, RUN, RUN@best or RUN@STEP; raises UsageError if there is none."""
  from alexnet_flax.config import from_dict

  folder, _ = find_run(source) or (pathlib.Path(source), None)
  stored = read_json(folder / 'config.json')
  if stored is None:
    if runs := seed_runs(source):
      raise UsageError(f'{source} holds the runs of several seeds; name them: {" ".join(runs)}')
    raise UsageError(f"{source} is not a run's folder: it has no config.json")
  return from_dict(stored)


def run_data(source: str | os.PathLike[str], data_dir: str | None = None) -> 'DataConfig':
  """Returns the data keys of a run, with the folder where its data lie: `data_dir`, or where they lay.

  Raises UsageError if it is no run, or does not say where its data lay.
  """
  data, (folder, _) = run_config(source).data, find_run(source) or (pathlib.Path(source), None)
  if data_dir is None:
    local = read_json(folder / LOCAL)
    data_dir = data.data_dir if local is None else local.get('data_dir')  # None: a run of another machine
    if isinstance(mirror := (local or {}).get('mirror'), str) and os.path.isdir(mirror):
      data_dir = mirror
  if not isinstance(data_dir, str | None) or '\0' in (data_dir or ''):
    raise UsageError(f'{folder / LOCAL} is broken: its data_dir is no path; remove it, or give --data_dir')
  if (data_dir or '').startswith('.../'):
    raise UsageError(f'the data of {source} lay in a folder {data_dir} of another machine; give --data_dir')
  return dataclasses.replace(data, data_dir=data_dir, mirror=None)


def _load_run(source: str, folder: pathlib.Path, which: str | None) -> PretrainedModel:
  with needs_extra("a run's folder"):
    from alexnet_flax import checkpoint
    from alexnet_flax.config import build_spec
  spec, names = build_spec(run_config(folder)), folder / FILE
  step, variables = checkpoint.restore_variables(folder / 'checkpoints', which)
  params = variables['params'].items()
  theirs = {name: leaves['kernel'].shape[-1] for name, leaves in params if 'kernel' in leaves}
  layers = [(name, layer) for name, layer in spec.named_layers() if isinstance(layer, Conv | Dense)]
  ours = {name: layer.features or theirs.get(name) for name, layer in layers}  # the head has none in the spec
  if different := sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)):
    what = f'the checkpoint of step {step} is of another network than its config.json: {different[0]} differs'
    raise UsageError(f'{source}: {what}; put back the config.json that the run was trained with')
  found = _model(source, spec, variables, read_names(names) if names.exists() else ())
  return dataclasses.replace(found, step=step)


def _model(source: str, spec: Spec, variables: dict[str, Any], names: tuple[str, ...]) -> PretrainedModel:
  """Completes class names: of 1000 classes ImageNet's, of 365 those of Places365 if the file is called so."""
  num_classes = variables['params'][spec.head]['bias'].shape[0]
  if not names and num_classes == 1000:
    names = imagenet_synsets()
  if not names and num_classes == 365 and 'places365' in pathlib.PurePath(source).name.lower():
    names = _listed_in_tfds('image_classification/categories_places365.txt')
  if len(names) > num_classes:
    raise UsageError(f'{source}: names of {len(names)} classes for a network of {num_classes}')
  names = (*names, *unnamed(num_classes)[len(names) :])
  return PretrainedModel(source, AlexNet(spec, num_classes), variables, names)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: AlexNet, variables: Any, images: jax.Array) -> Any:
  inputs = normalize({'image': images}, preprocessing=model.spec.preprocessing)['image']
  return model.apply(variables, inputs, train=False)


def top_classes(logits: np.ndarray, names: Sequence[str], top: int = 5) -> list[Classification]:
  """Returns the most probable classes of an image by its logits, float [C]; most probable first."""
  probabilities = scipy.special.softmax(logits.astype(np.float64))
  best = np.argsort(-probabilities, kind='stable')[:top].tolist()
  return [Classification(label, names[label], float(probabilities[label])) for label in best]


def unnamed(num_classes: int) -> tuple[str, ...]:
  """Returns names for classes without names: 'class 0', 'class 1', ..."""
  return tuple(f'class {number}' for number in range(num_classes))


def read_names(path: str | pathlib.Path, num_classes: int | None = None) -> tuple[str, ...]:
  """Reads class names from a text file, one a line; one that JSON quotes is read as JSON, as it was written.

  Raises UsageError if it cannot be read, or has not `num_classes` lines.
  """
  try:
    refuse_pipe(expanded(path))
    text = expanded(path).read_text(encoding='utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise UsageError(f'cannot read the class names in {path}: {error}') from None
  names = tuple(map(_unquoted, text.removesuffix('\n').split('\n')))
  if num_classes is not None and len(names) != num_classes:
    raise UsageError(f'{path} has {len(names)} lines; it must have one for each of {num_classes} classes')
  return names


def write_names(folder: pathlib.Path, names: Sequence[str]) -> None:
  """Writes the class names of a run to its folder; a name that is not one line of plain text becomes JSON."""
  lines = [
    json.dumps(name) if name[:1] in ('"', '\ufeff') or one_line(name) != name else name for name in names
  ]
  write_text(folder / FILE, ''.join(f'{line}\n' for line in lines))


def _unquoted(line: str) -> str:
  if line.startswith('"') and line.endswith('"'):
    with contextlib.suppress(ValueError):
      return str(json.loads(line))
  return line


def imagenet_synsets() -> tuple[str, ...]:
  """Returns ImageNet's 1,000 synsets ('n01440764', ...) by label, as TFDS lists them; () without TFDS."""
  return _listed_in_tfds('datasets/imagenet2012/labels.txt')


def _listed_in_tfds(path: str) -> tuple[str, ...]:
  found = importlib.util.find_spec('tensorflow_datasets')  # does not import it
  if found is None or found.origin is None:
    return ()
  return tuple((pathlib.Path(found.origin).parent / path).read_text(encoding='utf-8').split())


def readable(names: Sequence[str]) -> tuple[str, ...]:
  """Returns class names in words: synsets by their list, if it is in the cache or can be downloaded.

  >>> readable(['cat', 'great_white_shark'])
  ('cat', 'great white shark')
  """
  if any(_SYNSET.fullmatch(name) for name in names):
    try:
      words = dict(json.loads(local_path(IMAGENET_INDEX).read_text(encoding='utf-8')).values())
      names = [words.get(name, name) for name in names]
    except UsageError:
      print("note: ImageNet's classes stay synsets: their names cannot be downloaded", file=sys.stderr)
    except (ValueError, TypeError, AttributeError):
      print(f'note: {local_path(IMAGENET_INDEX)} is not a list of classes; remove it', file=sys.stderr)
  return tuple(name.replace('_', ' ') for name in names)
