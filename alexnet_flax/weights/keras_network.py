"""A spec as Keras's `Sequential` describes itself, and such descriptions made comparable."""

from typing import Any

from alexnet_flax import specs
from alexnet_flax.errors import UsageError
from alexnet_flax.naming import named_layers
from alexnet_flax.specs import Layer, Spec

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
  for name, layer in named_layers(spec):
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
