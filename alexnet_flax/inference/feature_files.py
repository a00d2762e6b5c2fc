"""Files of features, HDF5 or .npz: written for image files by `alexnet-flax features`, and read again."""

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import pathlib
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from alexnet_flax.data.images import image_files, printable, views_of_files
from alexnet_flax.errors import UsageError, needs_extra, one_line, shown, unknown_name
from alexnet_flax.files import atomic_path, check_writable, expanded, refuse_pipe
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.models.spec import Spec
from alexnet_flax.pretrained import PretrainedModel
from alexnet_flax.weights import LAYER_NAMES

_NAMES_KEY, _DIGESTS_KEY, _ATTRIBUTES_KEY = 'names', 'sha256', 'attributes'
_VERSIONS = ('alexnet_flax', 'jax', 'numpy')
_AXES = {4: 'image, row, column, channel', 2: 'image, channel'}
_BROKEN = (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


class FeatureFile(NamedTuple):
  """What a file of features says of itself; `read_layer` reads the values."""

  path: str
  layers: tuple[str, ...]
  stimuli: int  # how many
  names: list[str]  # of the stimuli; empty if the file does not say
  digests: list[str]  # SHA-256 of the image files; empty if the file does not say
  attributes: dict[str, Any]  # of the file, as `write_features` describes them


def write_features(
  network: PretrainedModel,
  images: Sequence[str],
  layers: Sequence[str],
  out: str,
  *,
  names: str = 'ours',
  pool: str | None = None,
  half: bool = False,
  batch_size: int = 64,
) -> list[str]:
  """Writes one row an image, in the order given, with the images' names and digests, and says what it wrote.

  The file itself says what it holds: HDF5 by attributes of the file (source, digest of the weights, variant,
  image size, preprocessing, pooling, versions, date, layers in their order) and of each data set (layer,
  axes); `.npz` by an array 'attributes', the same as JSON.

  Args:
    network: The network.
    images: Files, folders and patterns, as for `image_files`.
    layers: The layers, by the names of the scheme `names`.
    out: `.h5` or `.hdf5`, one data set a layer (Caffe's conv1/bn is conv1.bn there); or `.npz`, one array
      a layer. Both also hold 'names', and 'sha256' of the image files.
    names: Whose names of layers to take and to write, of `weights.LAYER_NAMES`: 'ours', 'torchvision'
      or 'caffe'.
    pool: 'mean' or 'max' over space, or None for all of it.
    half: float16 rows instead of float32.
    batch_size: Images at a time.

  Returns:
    The images that could not be read; their rows are NaN.

  Raises:
    UsageError: A name is unknown, there are no images, or the file cannot be written.
  """
  path, files = feature_path(out), image_files(images)
  ours = our_layers(network.spec, layers, names)
  side, unreadable, digests = network.spec.image_size, dict[int, str](), list[str]()

  def views() -> Iterator[np.ndarray]:
    rows = enumerate(files)
    with tqdm(total=len(files), unit='image', disable=not sys.stderr.isatty()) as bar:
      for batch in views_of_files(files, network.spec, batch_size):
        for seen, (row, file) in zip(batch, rows, strict=False):
          if isinstance(seen, str):
            unreadable[row] = file
            bar.write(one_line(f'cannot read {file}: {seen}'), file=sys.stderr)
          digests.append('' if isinstance(seen, str) else _digest(file))
          yield np.zeros((side, side, 3), np.uint8) if isinstance(seen, str) else seen
        bar.update(len(batch))

  taps = list(ours.values())
  batches = feature_batches(network.model, network.variables, views(), taps, pool=pool, batch_size=batch_size)
  stored: dict[str, Any] = {}
  archive: Any = None  # an .npz is written whole at its end, so its rows wait in memory
  start, dtype = 0, np.dtype(np.float16 if half else np.float32)
  try:
    with atomic_path(path) as partial, contextlib.ExitStack() as stack:
      if path.suffix != '.npz':
        with needs_extra(path.suffix):
          import h5py
        archive = h5py.File(partial, 'w')
        stack.callback(_close, archive, stored)
      for batch in batches:
        for name, our_name in ours.items():
          values = batch[our_name]
          if name not in stored:
            shape = (len(files), *values.shape[1:])
            # In HDF5 '/' separates groups, and conv1 is a data set: conv1/bn is conv1.bn there.
            key = name.replace('/', '.')
            stored[name] = archive.create_dataset(key, shape, dtype) if archive else np.empty(shape, dtype)
          stored[name][start : start + len(values)] = values
        start += len(values)
      for row, data in itertools.product(unreadable, stored.values()):
        data[row] = np.nan
      of_file = _attributes(network, names, pool, dtype)
      of_layers = {name: {'layer': ours[name], 'axes': _AXES[stored[name].ndim]} for name in stored}
      if archive:
        for key, texts in ((_NAMES_KEY, [printable(shown(file)) for file in files]), (_DIGESTS_KEY, digests)):
          archive.create_dataset(key, data=texts, dtype=h5py.string_dtype())
        archive.attrs.update(of_file, layers=', '.join(data.name[1:] for data in stored.values()))
        for name, attributes in of_layers.items():
          stored[name].attrs.update(attributes)
      else:
        stored_too: Any = {_NAMES_KEY: np.array([*map(shown, files)]), _DIGESTS_KEY: np.array(digests)}
        stored_too[_ATTRIBUTES_KEY] = np.array(json.dumps(of_file | {'layers': of_layers}))
        with partial.open('wb') as opened:
          np.savez(opened, **stored, **stored_too)
      shapes = [f'{_shown(name, ours[name])} {list(data.shape)}' for name, data in stored.items()]
  except struct.error:  # zipfile's, of a device in the file's place
    raise UsageError(f'cannot write {out}: it must be a regular file') from None
  except OSError as error:
    number = re.search(r'errno = (\d+)', str(error))  # in HDF5's texts
    reason = os.strerror(int(number[1])) if number else error.strerror or error
    raise UsageError(f'cannot write {out}: {reason}') from None
  print(one_line(f'{out}: {len(files)} images, {dtype}: {", ".join(shapes)}'))
  return list(unreadable.values())


def _digest(file: str) -> str:
  try:
    with open(file, 'rb') as opened:
      return hashlib.file_digest(opened, 'sha256').hexdigest()
  except OSError:  # it has gone since it was read
    return ''


def _close(file: Any, stored: dict[str, Any]) -> None:
  """Closes an HDF5 file with its data sets; OSError if not all can be written, as it often turns out now."""
  identifiers = [item.id for item in (file, *stored.values())]
  try:
    file.close()
  except RuntimeError as error:
    for identifier in identifiers:  # or h5py would close each once more, and print a traceback
      identifier.locked = True
    raise OSError(str(error)) from None


def feature_path(out: str) -> pathlib.Path:
  """Returns the path of a feature file.

  Raises:
    UsageError: Its ending is of another kind of file, or it cannot be written.
  """
  path = expanded(out)
  if path.suffix not in ('.h5', '.hdf5', '.npz'):
    raise UsageError(f'--out {out}: the ending must be .h5, .hdf5 or .npz')
  check_writable(path)
  return path


def our_layers(spec: Spec, layers: Sequence[str], names: str) -> dict[str, str]:
  """Returns our name of each layer, by its name in a scheme; spaces around names do not count.

  Raises:
    UsageError: There is no such scheme or layer, or no layer at all.
  """
  if names not in LAYER_NAMES:
    raise unknown_name('scheme of names', names, LAYER_NAMES)
  known = {theirs: ours for ours, theirs in LAYER_NAMES[names](spec).items()}
  found = {}
  for name in filter(None, map(str.strip, layers)):
    if name not in known:
      raise _unknown_layer(spec, name, known)
    found[name] = known[name]
  if not found:
    raise UsageError('--layers names no layer; write them as in --layers relu3,fc7')
  return found


def _unknown_layer(spec: Spec, name: str, known: dict[str, str]) -> UsageError:
  for scheme, layer_names in LAYER_NAMES.items():
    with contextlib.suppress(UsageError):  # a scheme need not have names for all layers of all networks
      ours = {theirs: ours for ours, theirs in layer_names(spec).items()}
      if name in ours:
        here = next(theirs for theirs, one in known.items() if one == ours[name])
        return UsageError(
          f'{name!r} is a name of the scheme {scheme}: add --names {scheme}, or write {here!r}'
        )
  return unknown_name('layer', name, [_shown(theirs, ours) for theirs, ours in known.items()])


def _shown(name: str, our_name: str) -> str:
  return name if name == our_name else f'{name} ({our_name})'


def _attributes(network: PretrainedModel, names: str, pool: str | None, dtype: np.dtype) -> dict[str, Any]:
  """Returns what a reader of the file needs to know besides the values."""
  digest, spec = hashlib.sha256(), network.spec
  for path, leaf in jax.tree_util.tree_leaves_with_path(network.variables):
    digest.update(jax.tree_util.keystr(path, simple=True, separator='/').encode() + b'\0')
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return {
    'source': printable(pathlib.PurePath(network.source).name),
    'weights_sha256': digest.hexdigest(),  # over all arrays by name, whatever the file's format
    'variant': spec.name,
    'variant_source': spec.source,
    'image_size': spec.image_size,
    'layer_names': names,
    'view': 'upright, short side by antialiased bilinear resizing (Pillow), crop of the centre',
    'preprocessing': json.dumps(dataclasses.asdict(spec.preprocessing)),
    'pool': pool or 'none',
    'dtype': str(dtype),
    'versions': ', '.join(f'{one} {sys.modules[one].__version__}' for one in _VERSIONS),
    'created': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def read_features(path: str) -> FeatureFile:
  """Reads what a file of features says of itself: one of ours, or of another program.

  A layer is any array of numbers [N, ...] with at least two axes; in HDF5 also in groups, named by its path.
  An array 'names' [N] holds the names of the stimuli, if there is one.

  Raises:
    UsageError: The file cannot be read, has no layer, or its arrays have different numbers of rows.
  """
  with _opened(path) as (members, attributes):
    sizes, texts = dict[str, int](), dict[str, list[str]]()
    for key, item in members.items():
      if not hasattr(item, 'dtype'):
        continue  # ZIP archives may hold anything
      if key in (_NAMES_KEY, _DIGESTS_KEY):
        found = np.asarray(item[()], object).ravel()
        texts[key] = [
          printable(os.fsdecode(text) if isinstance(text, bytes) else str(text)) for text in found
        ]
      elif item.ndim > 1 and item.dtype.kind in 'biuf':
        sizes[key] = len(item)
  if not sizes:
    raise UsageError(f'{path} has no layer: no array of numbers [N, ...] with at least two axes')
  rows = sizes | {key: len(found) for key, found in texts.items()}
  if len(set(rows.values())) > 1:
    shown = ', '.join(f'{key} {count}' for key, count in rows.items())
    raise UsageError(f'the arrays of {path} must have a row for each stimulus, but their rows are: {shown}')
  names, digests = (texts.get(key, []) for key in (_NAMES_KEY, _DIGESTS_KEY))
  return FeatureFile(path, tuple(sizes), next(iter(sizes.values())), names, digests, attributes)


def read_layer(file: FeatureFile, layer: str) -> np.ndarray:
  """Reads the features [N, ...] of a layer, a row for each stimulus; UsageError if there is no such layer."""
  if layer not in file.layers:
    raise unknown_name('layer', layer, file.layers)
  with _opened(file.path) as (members, _):
    return np.asarray(members[layer][()])


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
  """Gives the arrays of a file by their names, and its attributes; any error of reading is a UsageError."""
  place = expanded(path)
  with contextlib.ExitStack() as stack:
    try:
      refuse_pipe(place)
      file = stack.enter_context(place.open('rb'))
      start = file.read(8)
      file.seek(0)
      if start.startswith(b'PK'):
        archive = stack.enter_context(np.load(file))
        yield archive, _json_attributes(archive)
      elif start == b'\x89HDF\r\n\x1a\n':
        with needs_extra(path):
          import h5py
        opened = stack.enter_context(h5py.File(place))
        members: dict[str, Any] = {}
        opened.visititems(lambda key, item: members.update({key: item} if hasattr(item, 'dtype') else {}))
        values = {key: np.asarray(value).tolist() for key, value in opened.attrs.items()}
        attributes = {key: value for key, value in values.items() if isinstance(value, str | int | float)}
        order = str(attributes.get('layers', '')).split(', ')  # HDF5 sorts by name
        in_order = sorted(members, key=lambda key: order.index(key) if key in order else len(order))
        yield {key: members[key] for key in in_order}, attributes
      else:
        what = 'is empty' if not start else 'is neither HDF5 nor .npz'
        raise UsageError(f'{path} {what}; `alexnet-flax features` writes files of features')
    except _BROKEN as error:
      reason = getattr(error, 'strerror', None) or ' '.join(str(error).split()) or 'it is damaged'
      raise UsageError(f'cannot read {path}: {reason}') from None


def _json_attributes(archive: Mapping[str, Any]) -> dict[str, Any]:
  try:
    found = json.loads(str(archive[_ATTRIBUTES_KEY]))
  except (KeyError, ValueError):  # of another program
    return {}
  return found if isinstance(found, dict) else {}
