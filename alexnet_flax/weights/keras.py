"""Keras 3's files of a sequential network: `.weights.h5`, and `.keras` with the network's description.

Keras stores layers by the name of their class, numbered in order, and their variables by number:
layers/conv2d_1/vars/0. Kernels have our layout. Neither file says how images were preprocessed; we assume
RGB, scaled as the spec says. A `.keras` network with preprocessing layers is refused.
"""

import dataclasses
import io
import json
import pathlib
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from alexnet_flax.errors import UsageError
from alexnet_flax.models import spec as specs
from alexnet_flax.models.spec import Layer, Spec
from alexnet_flax.weights.format import Activations, Format, Inputs, Parsed, WeightsFile
from alexnet_flax.weights.layout import Tensors, check, in_order, match_input, pick

_WEIGHT_LEAVES = ('params/{}/kernel', 'params/{}/bias')
_LEAVES: dict[type, tuple[str, tuple[str, ...]]] = {  # Keras's name of the layer, and its variables in order
  specs.Conv: ('conv2d', _WEIGHT_LEAVES),
  specs.Dense: ('dense', _WEIGHT_LEAVES),
  specs.BatchNorm: (
    'batch_normalization',
    ('params/{}/scale', 'params/{}/bias', 'batch_stats/{}/mean', 'batch_stats/{}/var'),
  ),
}
# What zipfile raises for a damaged archive; the third for passwords and unknown compression methods.
_BROKEN_ARCHIVE = (zipfile.BadZipFile, zlib.error, RuntimeError)
_WEIGHTS = 'model.weights.h5'  # inside a .keras archive


def tensor_names(spec: Spec) -> dict[str, str]:
  """Our tensors' names -> Keras's paths."""
  names: dict[str, str] = {}
  counts = Counter[str]()
  for name, layer in spec.named_layers():
    if type(layer) in _LEAVES:
      kind, leaves = _LEAVES[type(layer)]
      stored = f'{kind}_{counts[kind]}' if counts[kind] else kind
      counts[kind] += 1
      names |= {leaf.format(name): f'layers/{stored}/vars/{number}' for number, leaf in enumerate(leaves)}
  return names


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
  return Parsed(arrays)


def parse_keras(content: bytes, source: str) -> Parsed:
  """The arrays and the layers of a `.keras` file, whose network must be a sequence of layers."""
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      layers = described_layers(json.loads(archive.read('config.json')))
      weights = archive.read(_WEIGHTS)
  except (KeyError, ValueError, TypeError, AttributeError, EOFError, *_BROKEN_ARCHIVE) as error:
    raise UsageError(f'{source}: broken, or not a sequential Keras network: {error}') from None
  return Parsed(parse_weights(weights, source).stored, layers=layers)


def read(file: WeightsFile, spec: Spec) -> Tensors:
  """The tensors of a `.weights.h5` or `.keras` file."""
  names, source = tensor_names(spec), str(file.path)
  tensors = check(pick(file.stored, names, source), spec, source, names)
  return match_input(tensors, spec, in_order('RGB', spec.preprocessing), source)


def write_weights(path: pathlib.Path, tensors: Tensors, spec: Spec, class_names: Sequence[str]) -> None:
  """Writes `.weights.h5`, for `model.load_weights` of a Keras network with the spec's layers."""
  keras_config(spec, 1)  # refuses layers that Keras lacks
  path.write_bytes(_hdf5(tensors, spec))


def write_keras(path: pathlib.Path, tensors: Tensors, spec: Spec, class_names: Sequence[str]) -> None:
  """Writes `.keras`, for `keras.models.load_model`; its output is logits, without a softmax."""
  config = keras_config(spec, tensors[f'params/{spec.head}/bias'].shape[0])
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('metadata.json', json.dumps({'keras_version': '3.0.0'}))
    archive.writestr('config.json', json.dumps(config))
    archive.writestr(_WEIGHTS, _hdf5(tensors, spec))


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


def _hdf5(tensors: Tensors, spec: Spec) -> bytes:
  import h5py

  tensors = match_input(tensors, spec, in_order('RGB', spec.preprocessing), "Keras's layout")
  buffer = io.BytesIO()
  with h5py.File(buffer, 'w') as archive:
    for ours, theirs in tensor_names(spec).items():
      archive[theirs] = tensors[ours]
  return buffer.getvalue()


# The settings of each kind of layer that must agree, and Keras's default for each.
_CONV = {'strides': [1, 1], 'padding': 'valid', 'groups': 1, 'dilation_rate': [1, 1], 'use_bias': True}
_POOL = {'pool_size': [2, 2], 'strides': None, 'padding': 'valid'}
_SETTINGS: dict[str, dict[str, Any]] = {
  'Conv2D': {'kernel_size': None, 'data_format': 'channels_last', **_CONV},
  'Dense': {'use_bias': True},
  'BatchNormalization': {'axis': [-1], 'epsilon': 1e-3, 'center': True, 'scale': True},
  'MaxPooling2D': _POOL,
  'AveragePooling2D': _POOL,
  'Activation': {'activation': None},
  'LeakyReLU': {'negative_slope': 0.3},
}


def keras_config(spec: Spec, num_classes: int) -> dict[str, Any]:
  """The network as Keras's `Sequential` describes itself.

  Raises:
    UsageError: Keras has no such layer.
  """
  described = [('InputLayer', {'name': 'input', 'batch_shape': [None, spec.image_size, spec.image_size, 3]})]
  for name, layer in spec.named_layers():
    kind, settings = _keras_layer(name, layer, spec.name, num_classes)
    described.append((kind, {'name': name, **settings}))
  layers = [
    {'module': 'keras.layers', 'class_name': kind, 'config': config, 'registered_name': None}
    for kind, config in described
  ]
  config = {'name': spec.name, 'trainable': True, 'layers': layers}
  return {'module': 'keras', 'class_name': 'Sequential', 'config': config, 'registered_name': None}


def _keras_layer(name: str, layer: Layer, variant: str, classes: int) -> tuple[str, dict[str, Any]]:
  match layer:
    case specs.Conv(padding='SAME' | 'VALID', ceil_mode=False):
      return 'Conv2D', {
        'filters': layer.features,
        'kernel_size': [layer.kernel_size] * 2,
        'strides': [layer.strides] * 2,
        'padding': str(layer.padding).lower(),
        'groups': layer.groups,
      }
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
    if kind in ('InputLayer', 'Dropout'):
      continue
    name = str(settings.get('name', kind))
    if kind == 'ReLU' and not any(settings.get(key) for key in ('max_value', 'negative_slope', 'threshold')):
      kind, settings = 'Activation', {'activation': 'relu'}
    chosen = {key: settings.get(key, value) for key, value in _SETTINGS.get(kind, {}).items()}
    if chosen.get('axis') in (3, -1, [3]):
      chosen['axis'] = [-1]
    plain = (f'{key}={list(value) if isinstance(value, tuple) else value}' for key, value in chosen.items())
    found.append((name, ' '.join([kind, *plain])))
    if kind in ('Conv2D', 'Dense') and settings.get('activation', 'linear') not in (None, 'linear'):
      found.append((name, f'Activation activation={settings["activation"]}'))
  if found and found[-1][1] == 'Activation activation=softmax':
    found.pop()
  return found


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
  recognize=lambda content, path: content.startswith(b'\x89HDF\r\n\x1a\n'),
  parse=parse_weights,
  read=read,
  write=write_weights,
  variants=('batchnorm',),
  describe=lambda spec: described_layers(keras_config(spec, 1)),
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
