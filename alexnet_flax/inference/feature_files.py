"""`alexnet-flax features`: activations of layers for image files, as HDF5 or .npz."""

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from alexnet_flax.data.images import image_files, printable, views_of_files
from alexnet_flax.errors import UsageError, needs_extra, one_line, unknown_name
from alexnet_flax.files import atomic_path, check_writable, expanded
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.models.spec import Spec
from alexnet_flax.pretrained import PretrainedModel
from alexnet_flax.weights import LAYER_NAMES

_NAMES_KEY, _ATTRIBUTES_KEY = 'names', 'attributes'
_VERSIONS = ('alexnet_flax', 'jax', 'numpy')
_AXES = {4: 'image, row, column, channel', 2: 'image, channel'}


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
  """Writes one row an image, in the order given, with the images' names beside them, and says what it wrote.

  The file itself says what it holds: HDF5 by attributes of the file (source, digest of the weights, variant,
  image size, preprocessing, pooling, versions, date) and of each data set (layer, axes); `.npz` by an array
  'attributes', the same as JSON.

  Args:
    network: The network.
    images: Files, folders and patterns, as for `image_files`.
    layers: The layers, by the names of the scheme `names`.
    out: `.h5` or `.hdf5`, one data set a layer (Caffe's conv1/bn is conv1.bn there); or `.npz`, one array
      a layer. Both also hold 'names'.
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
  side, unreadable = network.spec.image_size, dict[int, str]()

  def views() -> Iterator[np.ndarray]:
    rows = enumerate(files)
    with tqdm(total=len(files), unit='image', disable=not sys.stderr.isatty()) as bar:
      for batch in views_of_files(files, network.spec, batch_size):
        for seen, (row, file) in zip(batch, rows, strict=False):
          if isinstance(seen, str):
            unreadable[row] = file
            bar.write(one_line(f'cannot read {file}: {seen}'), file=sys.stderr)
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
        archive.create_dataset(_NAMES_KEY, data=[*map(printable, files)], dtype=h5py.string_dtype())
        archive.attrs.update(of_file)
        for name, attributes in of_layers.items():
          stored[name].attrs.update(attributes)
      else:
        stored_too: Any = {_NAMES_KEY: np.array(files)}
        stored_too[_ATTRIBUTES_KEY] = np.array(json.dumps(of_file | {'layers': of_layers}))
        with partial.open('wb') as opened:
          np.savez(opened, **stored, **stored_too)
      shapes = [f'{_shown(name, ours[name])} {list(data.shape)}' for name, data in stored.items()]
  except OSError as error:
    number = re.search(r'errno = (\d+)', str(error))  # in HDF5's texts
    reason = os.strerror(int(number[1])) if number else error.strerror or error
    raise UsageError(f'cannot write {out}: {reason}') from None
  print(one_line(f'{out}: {len(files)} images, {dtype}: {", ".join(shapes)}'))
  return list(unreadable.values())


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
    'preprocessing': json.dumps(dataclasses.asdict(spec.preprocessing)),
    'pool': pool or 'none',
    'dtype': str(dtype),
    'versions': ', '.join(f'{one} {sys.modules[one].__version__}' for one in _VERSIONS),
    'created': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }
