"""Keras's HDF5 files, read without leaving the file, and with layers named as Keras 3 names them."""

import io
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from alexnet_flax.errors import UsageError
from alexnet_flax.weights.format import check_inflated_size

# Names that Keras gives to layers without variables; a user may give others.
_TELLING = (
  'average_pooling2d', 'cropping2d', 'elu', 'global_average_pooling2d', 'global_max_pooling2d', 'lambda',
  'leaky_re_lu', 'max_pooling2d', 'rescaling', 'thresholded_re_lu', 'up_sampling2d', 'zero_padding2d',
)  # fmt: skip
_LAYERS = '(?:layers|_layer_checkpoint_dependencies)'


class Content(NamedTuple):
  """What a file of Keras's holds."""

  arrays: dict[str, np.ndarray]  # by Keras 3's paths, 'layers/conv2d_1/vars/0'
  layers: tuple[str, ...]  # names that tell the kinds of all layers; empty if they do not
  config: str | None  # the network's description as JSON
  legacy: bool  # whether this is the format of Keras 1 and 2


def read(content: bytes) -> Content:
  """Reads an HDF5 file of Keras's; UsageError if it leads elsewhere or claims to hold far too much."""
  import h5py

  with h5py.File(io.BytesIO(content), 'r') as file:
    groups, arrays = _contents(file, content)
    root = 'model_weights/' if 'model_weights' in groups else ''
    names = file[root or '/'].attrs.get('layer_names')
    if names is not None:
      weights = {_text(name): file[f'{root}{_text(name)}'].attrs.get('weight_names', ()) for name in names}
      config = file.attrs.get('model_config')
      arrays = {path.removeprefix(root): array for path, array in arrays.items()}
      return Content(*_by_class(arrays, weights), None if config is None else _text(config), legacy=True)
  # Keras 2.12 to 2.15 had another name for layers/.
  arrays = {re.sub(f'^{_LAYERS}/', 'layers/', path): array for path, array in arrays.items()}
  layers = tuple(group.rpartition('/')[2] for group in groups if re.fullmatch(f'{_LAYERS}/[^/]+', group))
  tell = len(layers) > len({path.split('/')[1] for path in arrays if path.startswith('layers/')})
  return Content(arrays, layers if tell else (), None, legacy=False)


def _contents(file: Any, content: bytes) -> tuple[list[str], dict[str, np.ndarray]]:
  """The groups and the arrays of a file by their paths, but for the state of an optimizer."""
  import h5py

  groups, datasets = [], {}

  def collect(path: str, item: Any) -> None:
    if isinstance(item, h5py.Group):
      groups.append(path)
    elif isinstance(item, h5py.Dataset) and not path.startswith(('optimizer', 'metrics/')):
      if item.external or item.is_virtual:
        raise UsageError(f'refused: the numbers of {path} lie in another file')
      if item.shape is not None and item.dtype.kind in 'fiuV':
        datasets[path] = item

  link = file.visititems_links(lambda path, link: None if isinstance(link, h5py.HardLink) else path)
  if link is not None:
    raise UsageError(f'refused: {link} is a link, which may lead out of the file')
  file.visititems(collect)
  check_inflated_size(sum(item.size * item.dtype.itemsize for item in datasets.values()), content)
  arrays = {path: np.asarray(item[()]) for path, item in datasets.items()}
  for path, array in arrays.items():
    if array.dtype == 'V2':  # HDF5 has no bfloat16: Keras stores it as two bytes without a type
      arrays[path] = array.view(jnp.bfloat16).astype(np.float32)
  return groups, arrays


def _by_class(
  arrays: dict[str, np.ndarray], weights: dict[str, Any]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """The arrays of earlier files as Keras 3 names them, and the names of layers that tell their kind."""
  of_layers = {
    layer: [arrays[f'{layer}/{_text(name)}'] for name in names]
    for layer, names in weights.items()
    if len(names)
  }
  by_rank = {4: 'conv2d', 2: 'dense', 1: 'batch_normalization'}
  kinds = [by_rank.get(of_layer[0].ndim, layer) for layer, of_layer in of_layers.items()]
  renamed = {
    f'layers/{stored}/vars/{number}': array
    for stored, of_layer in zip(numbered(kinds), of_layers.values(), strict=True)
    for number, array in enumerate(of_layer)
  }
  return renamed, tuple(layer for layer in weights if re.sub(r'_\d+$', '', layer) in _TELLING)


def numbered(kinds: Iterable[str]) -> list[str]:
  """Names layers as Keras does, by their kinds: conv2d, conv2d_1, dense."""
  names, counts = [], Counter[str]()
  for kind in kinds:
    names.append(f'{kind}_{counts[kind]}' if counts[kind] else kind)
    counts[kind] += 1
  return names


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
