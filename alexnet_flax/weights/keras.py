"""Keras 3's files of a sequential network: `.weights.h5`, and `.keras` with the network's description.

Keras stores layers by the name of their class, numbered in their order, and their variables by number:
layers/conv2d_1/vars/0. Kernels are laid out as ours.
"""

import io
import json
import pathlib
import re
import zipfile
import zlib
from collections import Counter
from typing import Any, BinaryIO

import h5py
import numpy as np

from alexnet_flax.errors import UsageError
from alexnet_flax.models import spec as specs
from alexnet_flax.models.spec import Layer, Preprocessing, Spec
from alexnet_flax.weights.layout import Tensors, check, match_input, pick, reversed_colours

_CLASSES: dict[type, str] = {
  specs.Conv: 'Conv2D',
  specs.Dense: 'Dense',
  specs.BatchNorm: 'BatchNormalization',
}
_LEAVES = {
  'Conv2D': ('params/{}/kernel', 'params/{}/bias'),
  'Dense': ('params/{}/kernel', 'params/{}/bias'),
  'BatchNormalization': ('params/{}/scale', 'params/{}/bias', 'batch_stats/{}/mean', 'batch_stats/{}/var'),
}
# What zipfile raises of a damaged archive; the third of passwords and unknown ways of compression.
_BROKEN_ARCHIVE = (zipfile.BadZipFile, zlib.error, RuntimeError)
_WEIGHTS = 'model.weights.h5'  # inside a .keras archive


def tensor_names(spec: Spec) -> dict[str, str]:
  """Our tensors' names -> Keras's paths."""
  names, counts = {}, Counter[str]()
  for name, layer in spec.named_layers():
    kind = _CLASSES.get(type(layer))
    if kind is None:
      continue
    snake = re.sub(r'(?<=[a-z])(?=[A-Z])', '_', kind).lower()
    stored = f'{snake}_{counts[snake]}' if counts[snake] else snake
    counts[snake] += 1
    for number, leaf in enumerate(_LEAVES[kind]):
      names[leaf.format(name)] = f'layers/{stored}/vars/{number}'
  return names


def read(content: bytes, spec: Spec, source: str) -> Tensors:
  """The tensors of a `.weights.h5` or `.keras` file.

  Neither says how images were preprocessed. We take them to have been in RGB, as the spec says; a
  `.keras` network with preprocessing layers is refused.

  Raises:
    UsageError: the file is broken or of another network, or a tensor does not fit.
  """
  if zipfile.is_zipfile(io.BytesIO(content)):
    content = _from_archive(content, spec, source)
  try:
    stored = _stored(io.BytesIO(content))
  except (OSError, KeyError, ValueError, RuntimeError) as error:
    raise UsageError(f'{source}: broken: {" ".join(str(error).split())[:200]}') from None
  names = tensor_names(spec)
  tensors = check(pick(stored, names, source), spec, source, names)
  return match_input(tensors, spec, _rgb(spec), source)


def write(tensors: Tensors, spec: Spec, path: pathlib.Path) -> None:
  """Writes `.weights.h5`, for `model.load_weights` of a Keras network with the spec's layers.

  Raises:
    UsageError: Keras has no such layer.
  """
  keras_config(spec, 1)  # refuses what Keras has no layer for
  with path.open('wb') as file:
    _write_weights(tensors, spec, file)


def write_keras(tensors: Tensors, spec: Spec, path: pathlib.Path) -> None:
  """Writes `.keras`, for `keras.models.load_model`; it ends in logits, not in a softmax."""
  classes = tensors[f'params/{spec.head}/bias'].shape[0]
  weights = io.BytesIO()
  _write_weights(tensors, spec, weights)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('metadata.json', json.dumps({'keras_version': '3.0.0'}))
    archive.writestr('config.json', json.dumps(keras_config(spec, classes)))
    archive.writestr(_WEIGHTS, weights.getvalue())


def _rgb(spec: Spec) -> Preprocessing:
  ours = spec.preprocessing
  return ours if ours.channel_order == 'RGB' else reversed_colours(ours)


def _stored(file: BinaryIO) -> dict[str, np.ndarray]:
  stored = {}

  def visit(path: str, item: Any) -> None:
    if isinstance(item, h5py.Dataset) and not path.startswith(('optimizer/', 'metrics/')):
      stored[path.removeprefix('_layer_checkpoint_dependencies/')] = item[()]

  with h5py.File(file, 'r') as archive:
    archive.visititems(visit)
  return stored


def _write_weights(tensors: Tensors, spec: Spec, file: BinaryIO) -> None:
  tensors = match_input(tensors, spec, _rgb(spec), "Keras's layout")
  with h5py.File(file, 'w') as archive:
    for ours, theirs in tensor_names(spec).items():
      archive[theirs] = tensors[ours]


def _from_archive(content: bytes, spec: Spec, source: str) -> bytes:
  """The weights of a .keras archive whose network has the spec's layers in their order."""
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      config = json.loads(archive.read('config.json'))
      weights = archive.read(_WEIGHTS)
    theirs = steps(config)
  except (KeyError, ValueError, TypeError, AttributeError, EOFError, *_BROKEN_ARCHIVE) as error:
    raise UsageError(f'{source}: broken, or not a Keras network of layers in a row: {error}') from None
  ours = steps(keras_config(spec, 1))
  for (name, *step), (our_name, *our_step) in zip(theirs, ours, strict=False):
    if step != our_step:
      raise UsageError(
        f'{source} is of another network than {spec.name}: its layer {name} is {_text(step)}, where'
        f' {our_name} must be {_text(our_step)}'
      )
  if len(theirs) != len(ours):
    raise UsageError(f'{source} has {len(theirs)} computing layers, {spec.name} has {len(ours)}')
  return weights


def _text(step: list[Any]) -> str:
  return ' '.join([step[0], *(f'{key}={value}' for key, value in step[1].items())])


# Of each kind of layer, what must agree, and Keras's value where none is stored.
_SETTINGS: dict[str, dict[str, Any]] = {
  'Conv2D': {
    'kernel_size': None,
    'strides': [1, 1],
    'padding': 'valid',
    'groups': 1,
    'dilation_rate': [1, 1],
    'data_format': 'channels_last',
    'use_bias': True,
  },
  'Dense': {'use_bias': True},
  'BatchNormalization': {'axis': [-1], 'epsilon': 1e-3, 'center': True, 'scale': True},
  'MaxPooling2D': {'pool_size': [2, 2], 'strides': None, 'padding': 'valid'},
  'AveragePooling2D': {'pool_size': [2, 2], 'strides': None, 'padding': 'valid'},
  'Activation': {'activation': None},
  'LeakyReLU': {'negative_slope': 0.3},
}


def keras_config(spec: Spec, num_classes: int) -> dict[str, Any]:
  """The network as Keras's `Sequential` describes itself.

  Raises:
    UsageError: Keras has no such layer.
  """
  side = spec.image_size
  layers = [_described('InputLayer', {'batch_shape': [None, side, side, 3], 'name': 'input'})]
  for name, layer in spec.named_layers():
    kind, settings = _keras_layer(name, layer, spec.name, num_classes)
    layers.append(_described(kind, {'name': name, **settings}))
  config = {'name': spec.name, 'trainable': True, 'layers': layers}
  return {'module': 'keras', 'class_name': 'Sequential', 'config': config, 'registered_name': None}


def _described(kind: str, config: dict[str, Any]) -> dict[str, Any]:
  return {'module': 'keras.layers', 'class_name': kind, 'config': config, 'registered_name': None}


def _keras_layer(name: str, layer: Layer, variant: str, classes: int) -> tuple[str, dict[str, Any]]:
  match layer:
    case specs.Conv(padding='SAME' | 'VALID', ceil_mode=False):
      sizes = {'kernel_size': [layer.kernel_size] * 2, 'strides': [layer.strides] * 2}
      settings = {'filters': layer.features, 'padding': str(layer.padding).lower(), 'groups': layer.groups}
      return 'Conv2D', settings | sizes
    case specs.Dense():
      return 'Dense', {'units': layer.features or classes}
    case specs.Activation('leaky_relu'):
      return 'LeakyReLU', {'negative_slope': 0.01}
    case specs.Activation():
      return 'Activation', {'activation': layer.kind}
    case specs.Pool(padding='SAME' | 'VALID', ceil_mode=False):
      kind = {'max': 'MaxPooling2D', 'avg': 'AveragePooling2D'}[layer.kind]
      sizes = {'pool_size': [layer.kernel_size] * 2, 'strides': [layer.strides] * 2}
      return kind, sizes | {'padding': str(layer.padding).lower()}
    case specs.BatchNorm(affine=True):
      return 'BatchNormalization', {'momentum': layer.momentum, 'epsilon': layer.epsilon}
    case specs.Dropout():
      return 'Dropout', {'rate': layer.rate}
    case specs.Flatten():
      return 'Flatten', {}
    case _:
      raise UsageError(f'Keras has no layer as {name} of {variant}: {layer}')


def steps(config: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
  """What a described network computes: (layer's name, kind, settings), an activation by itself.

  Dropout, input layers and a last softmax are left out.
  """
  found: list[tuple[str, str, dict[str, Any]]] = []
  for layer in config['config']['layers']:
    kind, settings = layer['class_name'], layer['config']
    name = str(settings.get('name', kind))
    if kind in ('InputLayer', 'Dropout'):
      continue
    if kind == 'ReLU' and not any(settings.get(key) for key in ('max_value', 'negative_slope', 'threshold')):
      kind, settings = 'Activation', {'activation': 'relu'}
    chosen = {key: settings.get(key, value) for key, value in _SETTINGS.get(kind, {}).items()}
    if kind == 'BatchNormalization' and chosen['axis'] in (3, -1, [3]):
      chosen['axis'] = [-1]
    found.append((name, kind, {key: _plain(value) for key, value in chosen.items()}))
    if kind in ('Conv2D', 'Dense') and settings.get('activation', 'linear') not in (None, 'linear'):
      found.append((name, 'Activation', {'activation': settings['activation']}))
  if found and found[-1][1:] == ('Activation', {'activation': 'softmax'}):
    found.pop()
  return found


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value
