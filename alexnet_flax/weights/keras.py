"""Keras 3's files of a sequential network: `.weights.h5`, and `.keras` with the network's description.

Keras stores layers by the name of their class, numbered in order, and their variables by number:
layers/conv2d_1/vars/0. Kernels have our layout. Neither file says how images were preprocessed; we assume
RGB, scaled as the spec says. A `.keras` network with preprocessing layers is refused.
"""

import dataclasses
import io
import json
import pathlib
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from alexnet_flax.errors import UsageError
from alexnet_flax.models import spec as specs
from alexnet_flax.models.spec import Layer, Preprocessing, Spec
from alexnet_flax.weights.format import Activations, Format, Inputs, Parsed, WeightsFile
from alexnet_flax.weights.layout import Tensors, check, check_same_layers, match_input, pick, reversed_colours

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
# What zipfile raises for a damaged archive; the third for passwords and unknown compression methods.
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


class _Stored(NamedTuple):
  """The arrays of a file by Keras's paths, and its layers if it describes them."""

  arrays: dict[str, np.ndarray]
  layers: list[tuple[str, str]] | None = None


def parse_weights(content: bytes | bytearray, source: str) -> Parsed:
  """The arrays of a `.weights.h5` file."""
  import h5py

  arrays = {}

  def visit(path: str, item: Any) -> None:
    if isinstance(item, h5py.Dataset) and not path.startswith(('optimizer/', 'metrics/')):
      arrays[path.removeprefix('_layer_checkpoint_dependencies/')] = item[()]

  try:
    with h5py.File(io.BytesIO(content), 'r') as archive:
      archive.visititems(visit)
  except (OSError, KeyError, ValueError, RuntimeError) as error:
    raise UsageError(f'{source}: broken: {" ".join(str(error).split())[:200]}') from None
  return Parsed(_Stored(arrays))


def parse_keras(content: bytes, source: str) -> Parsed:
  """The arrays and the layers of a `.keras` file, whose network must be a sequence of layers."""
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      layers = described_layers(json.loads(archive.read('config.json')))
      weights = archive.read(_WEIGHTS)
  except (KeyError, ValueError, TypeError, AttributeError, EOFError, *_BROKEN_ARCHIVE) as error:
    raise UsageError(f'{source}: broken, or not a sequential Keras network: {error}') from None
  return Parsed(parse_weights(weights, source).stored._replace(layers=layers))


def check_layers(file: WeightsFile, spec: Spec) -> None:
  """Compares the layers of a `.keras` file and their settings."""
  if file.stored.layers is not None:
    check_same_layers(file.stored.layers, described_layers(keras_config(spec, 1)), spec, str(file.path))


def read(file: WeightsFile, spec: Spec) -> Tensors:
  """The tensors of a `.weights.h5` or `.keras` file."""
  names, source = tensor_names(spec), str(file.path)
  tensors = check(pick(file.stored.arrays, names, source), spec, source, names)
  return match_input(tensors, spec, _rgb(spec), source)


def write_weights(path: pathlib.Path, tensors: Tensors, spec: Spec, class_names: Sequence[str]) -> None:
  """Writes `.weights.h5`, for `model.load_weights` of a Keras network with the spec's layers."""
  keras_config(spec, 1)  # refuses layers that Keras lacks
  with path.open('wb') as file:
    _write_weights(tensors, spec, file)


def write_keras(path: pathlib.Path, tensors: Tensors, spec: Spec, class_names: Sequence[str]) -> None:
  """Writes `.keras`, for `keras.models.load_model`; its output is logits, without a softmax."""
  config = keras_config(spec, tensors[f'params/{spec.head}/bias'].shape[0])
  weights = io.BytesIO()
  _write_weights(tensors, spec, weights)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('metadata.json', json.dumps({'keras_version': '3.0.0'}))
    archive.writestr('config.json', json.dumps(config))
    with archive.open(_WEIGHTS, 'w', force_zip64=True) as member:
      member.write(weights.getbuffer())


def activations(file: WeightsFile, spec: Spec, num_classes: int, inputs: Inputs) -> tuple[str, Activations]:
  """The network of a `.keras` file, or one built from the spec for a `.weights.h5` file, on our input."""
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')  # Keras would take the device's whole memory
  import keras

  with tempfile.TemporaryDirectory() as folder:  # Keras insists on the ending
    path = shutil.copy(file.path, pathlib.Path(folder, f'network{file.format.ending}'))
    if file.format is KERAS:
      model = keras.models.load_model(path, safe_mode=True)
    else:
      model = keras.Sequential.from_config(keras_config(spec, num_classes)['config'])
      model.load_weights(path)
  program = f'Keras {keras.__version__}'
  return program, {'input': inputs.normalized, **keras_taps(model, spec, inputs.normalized)}


def keras_taps(model: Any, spec: Spec, images: np.ndarray) -> Activations:
  """The output of every layer, by our names, of a Keras network with the spec's layers in their order.

  Changes the model: removes the activations inside its convolutions, and a final softmax.
  """
  import keras

  names = iter([name for name, layer in spec.named_layers() if not isinstance(layer, specs.Dropout)])
  x = keras.ops.convert_to_tensor(images)
  taps = {}
  for layer in model.layers:
    if isinstance(layer, keras.layers.InputLayer | keras.layers.Dropout):
      continue
    inner = None
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
      inner, layer.activation = layer.activation, keras.activations.linear
    x = layer(x, training=False) if isinstance(layer, keras.layers.BatchNormalization) else layer(x)
    taps[next(names)] = np.asarray(x)
    if inner not in (None, keras.activations.linear, keras.activations.softmax):
      x = inner(x)
      taps[next(names)] = np.asarray(x)
  return taps


def _rgb(spec: Spec) -> Preprocessing:
  ours = spec.preprocessing
  return ours if ours.channel_order == 'RGB' else reversed_colours(ours)


def _write_weights(tensors: Tensors, spec: Spec, file: BinaryIO) -> None:
  import h5py

  tensors = match_input(tensors, spec, _rgb(spec), "Keras's layout")
  with h5py.File(file, 'w') as archive:
    for ours, theirs in tensor_names(spec).items():
      archive[theirs] = tensors[ours]


# The settings of each kind of layer that must agree, and Keras's default for each.
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
      raise UsageError(f'Keras has no layer like {name} of {variant}: {layer}')


def described_layers(config: dict[str, Any]) -> list[tuple[str, str]]:
  """The computing layers of a network: (name, kind and settings), activations apart.

  Dropout, input layers and a final softmax are left out.
  """
  found = []
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
    plain = (f'{key}={list(value) if isinstance(value, tuple) else value}' for key, value in chosen.items())
    found.append((name, ' '.join([kind, *plain])))
    if kind in ('Conv2D', 'Dense') and settings.get('activation', 'linear') not in (None, 'linear'):
      found.append((name, f'Activation activation={settings["activation"]}'))
  if found and found[-1][1] == 'Activation activation=softmax':
    found.pop()
  return found


def _recognize_weights(content: bytes, path: pathlib.Path) -> bool:
  return content.startswith(b'\x89HDF\r\n\x1a\n')


def _recognize_keras(content: bytes, path: pathlib.Path) -> bool:
  if not content.startswith(b'PK\x03\x04'):
    return False
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      return _WEIGHTS in archive.namelist()
  except zipfile.BadZipFile:
    return path.suffix == '.keras'


KERAS_WEIGHTS: Format = Format(
  name='keras_weights',
  ending='.weights.h5',
  recognize=_recognize_weights,
  parse=parse_weights,
  read=read,
  write=write_weights,
  variants=('batchnorm',),
  check_layers=check_layers,
  activations=activations,
)
KERAS: Format = dataclasses.replace(
  KERAS_WEIGHTS,
  name='keras',
  ending='.keras',
  recognize=_recognize_keras,
  parse=parse_keras,
  write=write_keras,
)
