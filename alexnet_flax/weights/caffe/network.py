"""A spec as a Caffe network: its layers, and the `.prototxt` from which Caffe builds it."""

from collections.abc import Iterator
from typing import Any

from alexnet_flax.errors import UsageError
from alexnet_flax.models import spec as specs
from alexnet_flax.models.spec import Layer, Preprocessing, Spec
from alexnet_flax.weights.caffe.schema import net_parameter
from alexnet_flax.weights.format import lacks_layer
from alexnet_flax.weights.layout import in_order

_ACTIVATIONS = {'relu': 'ReLU', 'tanh': 'TanH', 'sigmoid': 'Sigmoid', 'elu': 'ELU'}


def caffe_input(spec: Spec, source: str) -> Preprocessing:
  """The spec's preprocessing as Caffe has it, BGR, 0..255 less a mean; UsageError if the spec's differs."""
  theirs = in_order('BGR', spec.preprocessing)
  if theirs.scale != 1 or theirs.std != (1.0, 1.0, 1.0):
    ours = f'those of {spec.name} have scale {theirs.scale:.4g} and std {theirs.std}'
    raise UsageError(f"{source}: Caffe's images are 0..255 less a mean, {ours}")
  return theirs


def layer_names(spec: Spec) -> dict[str, str]:
  """Our layers' names -> Caffe's: the same, but for BatchNorm, 'norm2' -> 'conv2/bn'."""
  names, weights = {}, 'data'
  for name, layer in spec.named_layers():
    if isinstance(layer, specs.Conv | specs.Dense):
      weights = name
    kind = 'scale' if isinstance(layer, specs.BatchNorm) and layer.affine else 'bn'
    names[name] = f'{weights}/{kind}' if isinstance(layer, specs.BatchNorm) else name
  return names


def prototxt(spec: Spec, num_classes: int) -> str:
  """The network as text, with its input and without weights; a comment states the mean."""
  from google.protobuf import text_format

  mean = caffe_input(spec, 'a .prototxt').mean
  title = ' '.join(f'{spec.name}: {spec.source}'.split())  # in one line, or the rest would not be a comment
  head = f'# {title}\n# Input: BGR, 0..255, less the mean {mean}.\n'
  return head + text_format.MessageToString(build_net(spec, num_classes))


def build_net(spec: Spec, num_classes: int) -> Any:
  """The spec as Caffe's `NetParameter`, a layer for each of ours; UsageError if Caffe lacks one."""
  net = net_parameter()(name=spec.name)
  size = spec.image_size
  net.layer.add(name='data', type='Input', top=['data']).input_param.shape.add(dim=[1, 3, size, size])
  names, bottom = layer_names(spec), 'data'
  for name, layer in spec.named_layers():
    if isinstance(layer, specs.Flatten):
      continue  # InnerProduct flattens
    for parameters in _caffe_layers(name, names[name], layer, bottom, spec, num_classes):
      added = net.layer.add(**({'bottom': [bottom], 'top': [parameters['name']]} | parameters))
      bottom = added.name
      if hasattr(layer, 'multipliers') and added.type != 'BatchNorm':
        rates = layer.multipliers
        added.param.add(lr_mult=rates.kernel_rate, decay_mult=rates.kernel_decay)
        added.param.add(lr_mult=rates.bias_rate, decay_mult=rates.bias_decay)
  return net


def norm_layers(spec: Spec) -> list[str]:
  """Names of Caffe's BatchNorm layers, which hold the statistics."""
  return [layer.name for layer in build_net(spec, 1).layer if layer.type == 'BatchNorm']


def _caffe_layers(
  name: str, theirs: str, layer: Layer, bottom: str, spec: Spec, classes: int
) -> Iterator[dict[str, Any]]:
  match layer:
    case specs.Conv(ceil_mode=False, local=False):
      window = {'kernel_size': [layer.kernel_size], 'stride': [layer.strides]}
      window['pad'] = [_padding(layer, name, spec.name)]
      parameters = {'num_output': layer.features, 'group': layer.groups, **window}
      yield {'name': theirs, 'type': 'Convolution', 'convolution_param': parameters}
    case specs.Dense():
      parameters = {'num_output': layer.features or classes}
      yield {'name': theirs, 'type': 'InnerProduct', 'inner_product_param': parameters}
    case specs.Activation() if layer.kind in _ACTIVATIONS:
      yield {'name': theirs, 'type': _ACTIVATIONS[layer.kind]}
    case specs.Pool(kind='max', ceil_mode=True):
      yield _pooling(theirs, 'MAX', layer, _padding(layer, name, spec.name))
    case specs.Pool(kind='avg', ceil_mode=True, padding='VALID' | 0):  # Caffe's averages include padding
      yield _pooling(theirs, 'AVE', layer)
    case specs.Pool(kind='max+avg', ceil_mode=True, padding='VALID' | 0):
      parts = [f'{theirs}/max', f'{theirs}/avg']
      for part, method in zip(parts, ('MAX', 'AVE'), strict=True):
        yield {'bottom': [bottom], **_pooling(part, method, layer)}
      mean = {'operation': 'SUM', 'coeff': [0.5, 0.5]}
      yield {'name': theirs, 'type': 'Eltwise', 'bottom': parts, 'eltwise_param': mean}
    case specs.LocalResponseNorm(size, k, alpha, beta, groups=1):
      parameters = {'local_size': size, 'alpha': alpha * size, 'beta': beta, 'k': k}
      yield {'name': theirs, 'type': 'LRN', 'lrn_param': parameters}
    case specs.SpatialResponseNorm(size, k=1, alpha=alpha, beta=beta):
      parameters = {'local_size': size, 'alpha': alpha * size**2, 'beta': beta, 'norm_region': 1}
      yield {'name': theirs, 'type': 'LRN', 'lrn_param': parameters}
    case specs.BatchNorm():
      parameters = {'eps': layer.epsilon, 'moving_average_fraction': layer.momentum, 'use_global_stats': True}
      yield {'name': theirs.replace('/scale', '/bn'), 'type': 'BatchNorm', 'batch_norm_param': parameters}
      if layer.affine:
        yield {'name': theirs, 'type': 'Scale', 'scale_param': {'bias_term': True}}
    case specs.Dropout():
      yield {'name': theirs, 'type': 'Dropout', 'dropout_param': {'dropout_ratio': layer.rate}}
    case _:
      raise lacks_layer('Caffe', name, layer, spec)


def _pooling(name: str, method: str, layer: specs.Pool, pad: int = 0) -> dict[str, Any]:
  parameters = {'pool': method, 'pad': pad, 'kernel_size': layer.kernel_size, 'stride': layer.strides}
  return {'name': name, 'type': 'Pooling', 'pooling_param': parameters}


def _padding(layer: specs.Conv | specs.Pool, name: str, variant: str) -> int:
  if layer.padding != 'SAME':
    return 0 if layer.padding == 'VALID' else layer.padding
  if layer.strides != 1 or layer.kernel_size % 2 == 0:
    raise UsageError(f"Caffe cannot pad like {name} of {variant}: 'SAME' with strides {layer.strides}")
  return layer.kernel_size // 2
