"""`alexnet-flax features`: activations of layers for image files, as HDF5 or .npz."""

import contextlib
import itertools
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
from alexnet_flax.pretrained import PretrainedModel
from alexnet_flax.weights import LAYER_NAMES

_NAMES_KEY = 'names'


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
  """Writes one row an image, in the order given, with the images' names beside them.

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
  check_ending(out)
  path, files = pathlib.Path(out), image_files(images)
  known = {theirs: ours for ours, theirs in LAYER_NAMES[names](network.spec).items()}
  for name in layers:
    if name not in known:
      raise unknown_name('layer', name, known)
  side, unreadable = network.spec.image_size, dict[int, str]()

  def views() -> Iterator[np.ndarray]:
    rows = enumerate(files)
    with tqdm(total=len(files), unit='image', disable=not sys.stderr.isatty()) as bar:
      for batch in views_of_files(files, network.spec, batch_size):
        for seen, (row, file) in zip(batch, rows, strict=False):
          if isinstance(seen, str):
            unreadable[row] = file
            bar.write(f'cannot read {file}: {seen}', file=sys.stderr)
          yield np.zeros((side, side, 3), np.uint8) if isinstance(seen, str) else seen
        bar.update(len(batch))

  ours = [known[name] for name in layers]
  batches = feature_batches(network.model, network.variables, views(), ours, pool=pool, batch_size=batch_size)
  stored: dict[str, Any] = {}
  archive: Any = None  # an .npz is written whole at its end, so its rows wait in memory
  start, dtype = 0, np.float16 if half else np.float32
  try:
    with atomic_path(path) as partial, contextlib.ExitStack() as stack:
      if path.suffix != '.npz':
        with needs_extra(path.suffix):
          import h5py
        archive = stack.enter_context(h5py.File(partial, 'w'))
      for batch in batches:
        for name in layers:
          values = batch[known[name]]
          if name not in stored:
            shape = (len(files), *values.shape[1:])
            # In HDF5 '/' separates groups, and conv1 is a data set: conv1/bn is conv1.bn there.
            key = name.replace('/', '.')
            stored[name] = archive.create_dataset(key, shape, dtype) if archive else np.empty(shape, dtype)
          stored[name][start : start + len(values)] = values
        start += len(values)
      for row, data in itertools.product(unreadable, stored.values()):
        data[row] = np.nan
      if archive:
        encoded = [os.fsencode(file).decode('utf-8', 'backslashreplace') for file in files]
        archive.create_dataset(_NAMES_KEY, data=encoded, dtype=h5py.string_dtype())
      else:
        with partial.open('wb') as opened:
          np.savez(opened, **stored, **{_NAMES_KEY: np.array(files)})  # type: ignore[arg-type]
  except OSError as error:
    raise UsageError(f'cannot write {out}: {error.strerror or error}') from None
  return list(unreadable.values())


def check_ending(out: str) -> None:
  """Raises UsageError if the ending of a path is not that of a feature file."""
  if not out.endswith(('.h5', '.hdf5', '.npz')):
    raise UsageError(f'--out {out}: the ending must be .h5, .hdf5 or .npz')
