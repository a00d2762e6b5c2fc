"""`alexnet-flax features`: activations of layers for image files, as HDF5 or .npz."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from alexnet_flax.data.images import image_files, views_of_files
from alexnet_flax.errors import UsageError, needs_extra, unknown_name
from alexnet_flax.files import atomic_path
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.models.spec import Spec
from alexnet_flax.pretrained import load_pretrained
from alexnet_flax.weights import LAYER_NAMES

_NAMES_KEY = 'names'


def write_features(
  images: Sequence[str],
  layers: Sequence[str],
  out: str,
  *,
  weights: str,
  variant: str | None = None,
  width: float = 1.0,
  image_size: int | None = None,
  names: str = 'ours',
  pool: str | None = None,
  half: bool = False,
  batch_size: int = 64,
) -> list[str]:
  """Writes one row an image, in the order given, with the images' names beside them.

  Args:
    images: Files, folders and patterns, as for `image_files`.
    layers: The layers, by the names of the scheme `names`.
    out: `.h5` or `.hdf5`, one data set a layer (Caffe's conv1/bn is conv1.bn there); or `.npz`, one array
      a layer. Both also hold 'names'.
    weights: A run's folder, a weights file, a URL or a published name.
    variant, width, image_size: The network, as for `load_pretrained`.
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
  path = pathlib.Path(out)
  if path.suffix not in ('.h5', '.hdf5', '.npz'):
    raise UsageError(f'--out {out}: the ending must be .h5, .hdf5 or .npz')
  files = image_files(images)
  network = load_pretrained(weights, variant=variant, width=width, image_size=image_size)
  known = {theirs: ours for ours, theirs in LAYER_NAMES[names](network.spec).items()}
  for name in layers:
    if name not in known:
      raise unknown_name('layer', name, known)
  ours = [known[name] for name in layers]
  unreadable: list[str] = []
  with tqdm(total=len(files), unit='image', disable=not sys.stderr.isatty()) as bar:
    views = _views(files, network.spec, batch_size, unreadable, bar)
    batches = feature_batches(network.model, network.variables, views, ours, pool=pool, batch_size=batch_size)
    renamed = ({name: batch[known[name]] for name in layers} for batch in batches)
    try:
      _write(path, files, renamed, unreadable, np.float16 if half else np.float32)
    except OSError as error:
      raise UsageError(f'cannot write {out}: {error.strerror or error}') from None
  return unreadable


def _views(
  files: list[str], spec: Spec, batch_size: int, unreadable: list[str], bar: tqdm
) -> Iterator[np.ndarray]:
  """The network's view of each file, uint8 [S, S, 3]; black for those that cannot be read."""
  for number, batch in enumerate(views_of_files(files, spec, batch_size)):
    for file, seen in zip(files[number * batch_size :], batch, strict=False):
      if isinstance(seen, str):
        unreadable.append(file)
        bar.write(f'cannot read {file}: {seen}', file=sys.stderr)
        seen = np.zeros((spec.image_size, spec.image_size, 3), np.uint8)
      yield seen
    bar.update(len(batch))


def _write(
  path: pathlib.Path,
  files: list[str],
  batches: Iterator[dict[str, np.ndarray]],
  unreadable: list[str],
  dtype: type,
) -> None:
  stored: dict[str, Any] = {}
  # An .npz is written whole at its end, so its rows wait in memory; those of HDF5 go to the disk.
  archive: Any = None
  start = 0
  with atomic_path(path) as partial, contextlib.ExitStack() as stack:
    if path.suffix != '.npz':
      with needs_extra(path.suffix):
        import h5py
      archive = stack.enter_context(h5py.File(partial, 'w'))
    for batch in batches:
      for name, values in batch.items():
        if name not in stored:
          shape = (len(files), *values.shape[1:])
          # In HDF5 '/' separates groups, and conv1 is a data set: conv1/bn is conv1.bn there.
          key = name.replace('/', '.')
          stored[name] = archive.create_dataset(key, shape, dtype) if archive else np.empty(shape, dtype)
        stored[name][start : start + len(values)] = values
      start += len(values)
    for row in [i for i, file in enumerate(files) if file in unreadable]:
      for data in stored.values():
        data[row] = np.nan
    if archive:
      names = [os.fsencode(file).decode('utf-8', 'backslashreplace') for file in files]
      archive.create_dataset(_NAMES_KEY, data=names, dtype=h5py.string_dtype())
    else:
      with partial.open('wb') as file:
        np.savez(file, **stored, **{_NAMES_KEY: np.array(files)})  # type: ignore[arg-type]
