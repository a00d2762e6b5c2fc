"""Keras's files of a sequential network: `.keras` and `.h5`, which describe it, and `.weights.h5`.

Keras 3 stores layers by the name of their class, numbered in order, and their variables by number:
layers/conv2d_1/vars/0. Earlier HDF5 files (`.h5`, with or without the network's description) store them by
the names that users gave; `hdf5.py` renames them. Kernels have our layout. No file says how images were
preprocessed; we assume RGB, scaled as the spec says. A network with preprocessing layers is refused.
"""

import dataclasses
import io
import json
import pathlib
import re
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from alexnet_flax.errors import UsageError
from alexnet_flax.models import spec as specs
from alexnet_flax.models.spec import Layer, Spec
from alexnet_flax.weights import hdf5
from alexnet_flax.weights.format import (
  Activations,
  Format,
  Inputs,
  Parsed,
  WeightsFile,
  lacks_layer,
  open_archive,
)
from alexnet_flax.weights.layout import Tensors, check, in_order, match_input, pick, variable_shapes

_WEIGHTS = 'model.weights.h5'  # inside a .keras archive
# Layers that change nothing, or that may as well be an argument of the layer before them.
_NEUTRAL = ('activation', 're_lu', 'elu', 'softmax', 'dropout', 'flatten', 'input_layer')


def stored_names(spec: Spec) -> dict[str, str]:
  """Our layers' names -> their names in Keras 3's HDF5 files; UsageError if Keras has no such layer."""
  layers = keras_config(spec, 1)['config']['layers'][1:]  # without the input
  kinds = [re.sub(r'(?<=[a-z])(?=[A-Z])', '_', layer['class_name']).lower() for layer in layers]
  return dict(zip((layer['config']['name'] for layer in layers), hdf5.numbered(kinds), strict=True))


def tensor_names(spec: Spec) -> dict[str, str]:
  """Our tensors' names -> Keras's paths, in which a layer's variables are numbered."""
  names: dict[str, str] = {}
  order = (
    'params/{}/kernel',
    'params/{}/scale',
    'params/{}/bias',
    'batch_stats/{}/mean',
    'batch_stats/{}/var',
  )
  for name, stored in stored_names(spec).items():
    leaves = [leaf.format(name) for leaf in order if leaf.format(name) in variable_shapes(spec)]
    names |= {leaf: f'layers/{stored}/vars/{number}' for number, leaf in enumerate(leaves)}
  return names


def parse_hdf5(content: bytes) -> Parsed:
  """The arrays of an HDF5 file of Keras's, and its layers if it describes them."""
  found = hdf5.read(content)
  return _parsed(found, json.loads(found.config)) if found.config else Parsed(found)


def parse_keras(content: bytes) -> Parsed:
  """The arrays and the layers of a `.keras` file, whose network must be a sequence of layers."""
  with open_archive(content) as archive:
    return _parsed(hdf5.read(archive.read(_WEIGHTS)), json.loads(archive.read('config.json')))


def _parsed(found: hdf5.Content, config: dict[str, Any]) -> Parsed:
  settings = _layers(config)[0]['config']
  _, *sides, _ = settings.get('batch_shape', settings.get('batch_input_shape')) or (None, None)
  square = len(sides) == 2 and sides[0] == sides[1] and isinstance(sides[0], int)
  return Parsed(found, layers=described_layers(config), image_size=sides[0] if square else None)


def read(file: WeightsFile, spec: Spec) -> Tensors:
  """The tensors of a file of Keras's."""
  names, source = tensor_names(spec), str(file.path)
  theirs, ours = (
    # By the names of layers in Keras 3's files, how many there are of each kind that computes something.
    Counter(kind for layer in layers if (kind := re.sub(r'_\d+$', '', layer)) not in _NEUTRAL)
    for layers in (file.stored.layers, stored_names(spec).values())
  )
  wrong = {kind for kind in theirs | ours if theirs[kind] != ours[kind]} if theirs else set()
  if file.stored.legacy:  # users name layers there, so that only what is found tells something
    wrong = set(theirs) - set(ours)
  for kind in sorted(wrong):
    difference = f'it has {theirs[kind]} layers of the kind {kind}, where {ours[kind]} must be'
    raise UsageError(f'{source} is of another network than {spec.name}: {difference}')
  tensors = check(pick(file.stored.arrays, names, source), spec, source, names)
  return match_input(tensors, spec, in_order('RGB', spec.preprocessing), source)


def dump_keras(tensors: Tensors, spec: Spec, class_names: Sequence[str]) -> bytes:
  """A `.keras` file, for `keras.models.load_model`; its output is logits, without a softmax."""
  config = keras_config(spec, tensors[f'params/{spec.head}/bias'].shape[0])
  with zipfile.ZipFile(buffer := io.BytesIO(), 'w') as archive:
    archive.writestr('metadata.json', json.dumps({'keras_version': '3.0.0'}))
    archive.writestr('config.json', json.dumps(config))
    archive.writestr(_WEIGHTS, dump_hdf5(tensors, spec, class_names))
  return buffer.getvalue()


def activations(file: WeightsFile, spec: Spec, num_classes: int, inputs: Inputs) -> tuple[str, Activations]:
  """The network of a `.keras` file, or one built from the spec for a `.weights.h5` file, on our input."""
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')  # Keras would take the device's whole memory
  import keras

  with tempfile.TemporaryDirectory() as folder:  # Keras insists on the ending
    ending = '.h5' if file.stored.legacy else file.format.ending
    path = shutil.copy(file.path, pathlib.Path(folder, f'network{ending}'))
    if file.layers is not None:
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
  taps: Activations = {}
  for layer in model.layers:
    if isinstance(layer, keras.layers.InputLayer | keras.layers.Dropout):
      continue
    if spec.head in taps:  # a softmax
      break
    inner = None
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
      inner, layer.activation = layer.activation, keras.activations.linear
    x = layer(x, training=False) if isinstance(layer, keras.layers.BatchNormalization) else layer(x)
    taps[next(names)] = np.asarray(x)
    if inner not in (None, keras.activations.linear, keras.activations.softmax):
      x = inner(x)
      taps[next(names)] = np.asarray(x)
  return taps


def dump_hdf5(tensors: Tensors, spec: Spec, class_names: Sequence[str]) -> bytes:
  """A `.weights.h5` file, for `model.load_weights` of a Keras network with the spec's layers."""
  import h5py

  names, layers, buffer = tensor_names(spec), stored_names(spec), io.BytesIO()
  tensors = match_input(tensors, spec, in_order('RGB', spec.preprocessing), "Keras's layout")
  with h5py.File(buffer, 'w') as archive:
    for layer in layers.values():  # those without variables too: they tell what the network is
      archive.create_group(f'layers/{layer}/vars')
    for ours, theirs in names.items():
      archive[theirs] = tensors[ours]
  return buffer.getvalue()


# The settings of each kind of layer that must agree, and Keras's default for each.
_WINDOW = {'padding': 'valid', 'data_format': 'channels_last'}
_CONV = {'strides': [1, 1], 'groups': 1, 'dilation_rate': [1, 1], 'use_bias': True, **_WINDOW}
_POOL = {'pool_size': [2, 2], 'strides': None, **_WINDOW}
_SETTINGS: dict[str, dict[str, Any]] = {
  'Conv2D': {'kernel_size': None, **_CONV},
  'Dense': {'use_bias': True},
  'BatchNormalization': {'axis': [-1], 'epsilon': 1e-3, 'center': True, 'scale': True},
  'MaxPooling2D': _POOL,
  'AveragePooling2D': _POOL,
  'Activation': {'activation': None},
  'LeakyReLU': {'negative_slope': 0.3},
}


def keras_config(spec: Spec, num_classes: int) -> dict[str, Any]:
  """The network as Keras's `Sequential` describes itself; UsageError if Keras has no such layer."""

  def described(kind: str, module: str = 'keras.layers', **config: Any) -> dict[str, Any]:
    return {'module': module, 'class_name': kind, 'config': config, 'registered_name': None}

  layers = [described('InputLayer', name='input', batch_shape=[None, spec.image_size, spec.image_size, 3])]
  for name, layer in spec.named_layers():
    kind, settings = _keras_layer(name, layer, spec, num_classes)
    layers.append(described(kind, name=name, **settings))
  return described('Sequential', 'keras', name=spec.name, trainable=True, layers=layers)


def _keras_layer(name: str, layer: Layer, spec: Spec, classes: int) -> tuple[str, dict[str, Any]]:
  match layer:
    case specs.Conv(padding='SAME' | 'VALID', ceil_mode=False, local=False):
      window: dict[str, Any] = {'kernel_size': [layer.kernel_size] * 2, 'strides': [layer.strides] * 2}
      window |= {'padding': str(layer.padding).lower()}
      return 'Conv2D', {'filters': layer.features, 'groups': layer.groups, **window}
    case specs.Dense():
      return 'Dense', {'units': layer.features or classes}
    case specs.Activation('leaky_relu'):
      return 'LeakyReLU', {'negative_slope': 0.01}
    case specs.Activation():
      return 'Activation', {'activation': layer.kind}
    case specs.Pool(padding='SAME' | 'VALID', ceil_mode=False, kind='max' | 'avg'):
      kind = {'max': 'MaxPooling2D', 'avg': 'AveragePooling2D'}[layer.kind]
      sizes = {'pool_size': [layer.kernel_size] * 2, 'strides': [layer.strides] * 2}
      return kind, sizes | {'padding': str(layer.padding).lower()}
    case specs.BatchNorm():
      affine = {'center': layer.affine, 'scale': layer.affine}
      return 'BatchNormalization', {'momentum': layer.momentum, 'epsilon': layer.epsilon, **affine}
    case specs.Dropout():
      return 'Dropout', {'rate': layer.rate}
    case specs.Flatten():
      return 'Flatten', {}
    case _:
      raise lacks_layer('Keras', name, layer, spec)


def _layers(config: dict[str, Any]) -> list[dict[str, Any]]:
  network = config['config']
  return network if isinstance(network, list) else network['layers']  # Keras 2.0's is a list


def described_layers(config: dict[str, Any]) -> list[tuple[str, str]]:
  """The computing layers of a network: (name, kind and settings), activations apart.

  Dropout, input layers and a final softmax are left out.
  """
  found = []
  for layer in _layers(config):
    kind, settings = layer['class_name'], layer['config']
    if kind in ('InputLayer', 'Dropout'):
      continue
    name = str(settings.get('name', kind))
    if kind == 'ReLU' and not any(settings.get(key) for key in ('max_value', 'negative_slope', 'threshold')):
      kind, settings = 'Activation', {'activation': 'relu'}
    if kind == 'ELU' and settings.get('alpha', 1.0) == 1:
      kind, settings = 'Activation', {'activation': 'elu'}
    if kind == 'Softmax':
      kind, settings = 'Activation', {'activation': 'softmax'}
    if kind == 'LeakyReLU' and 'alpha' in settings:  # Keras 2's name
      settings = {'negative_slope': settings['alpha']}
    chosen = {key: settings.get(key, value) for key, value in _SETTINGS.get(kind, {}).items()}
    if chosen.get('axis') in (3, -1, [3]):
      chosen['axis'] = [-1]
    plain = (f'{key}={f"{value:g}" if isinstance(value, float) else value}' for key, value in chosen.items())
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
  except Exception:  # zipfile raises errors of many kinds for a damaged archive
    return path.suffix == '.keras'


KERAS_WEIGHTS: Format = Format(
  name='keras_weights',
  ending='.weights.h5',
  recognize=lambda content, path: content.startswith(b'\x89HDF\r\n\x1a\n'),
  nature='a sequential Keras network',
  parse=parse_hdf5,
  read=read,
  dump=dump_hdf5,
  variants=('batchnorm',),
  outputs=lambda file, spec, layer: len(file.stored.arrays[tensor_names(spec)[f'params/{layer}/bias']]),
  describe=lambda spec: described_layers(keras_config(spec, 1)),
  activations=activations,
)
KERAS: Format = dataclasses.replace(
  KERAS_WEIGHTS,
  name='keras',
  ending='.keras',
  recognize=_recognize_keras,
  parse=parse_keras,
  dump=dump_keras,
)
