"""Caffe's weights, `.caffemodel`: binary protobuf, of Caffe's current layers or the former ones (V1)."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Preprocessing, Spec
from alexnet_flax.weights import layout
from alexnet_flax.weights.caffe.network import build_net, caffe_input, layer_names, norm_layers, prototxt
from alexnet_flax.weights.caffe.schema import V1_TYPES, net_parameter
from alexnet_flax.weights.format import Activations, Format, Inputs, Parsed, WeightsFile
from alexnet_flax.weights.layout import Tensors, check, from_channels_first, match_input, pick

# The settings of each kind of layer that must agree, if there are any, and Caffe's default for each.
_WINDOW: dict[str, Any] = {'kernel_size': [], 'stride': [1], 'pad': [0]}
_DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
  'Convolution': ('convolution_param', _WINDOW | {'group': 1, 'dilation': [1]}),
  'ReLU': ('relu_param', {'negative_slope': 0.0}),
  'LRN': ('lrn_param', {'local_size': 5, 'alpha': 1.0, 'beta': 0.75, 'norm_region': 0, 'k': 1.0}),
  'Pooling': ('pooling_param', {'pool': 0, 'kernel_size': 0, 'stride': 1, 'pad': 0, 'round_mode': 0}),
  'ELU': ('elu_param', {'alpha': 1.0}),
  'Eltwise': ('eltwise_param', {'operation': 1, 'coeff': []}),
  'BatchNorm': ('batch_norm_param', {'eps': 1e-5}),
}
# Mean images whose channel means are not ImageNet's, by the name that a network's data layer has for them.
# CSAILVision/places365, train_val_alexnet.prototxt; the means are of its places365CNN_mean.binaryproto.
_MEAN_FILES = {
  'places2CNN365_mean.binaryproto': Preprocessing(
    1.0, (104.051, 112.514, 116.676), (1.0, 1.0, 1.0), 'BGR', center_crop_share=227 / 256
  )
}
_WITH_WEIGHTS = ('Convolution', 'InnerProduct', 'BatchNorm', 'Scale')
_NEUTRAL = ('Input', 'Dropout', 'Split', 'Flatten', 'Softmax', 'Accuracy', 'ArgMax', 'Silence')


def parse(content: bytes) -> Parsed:
  """The layers of a caffemodel."""
  net = net_parameter().FromString(content)
  layers = list(net.layer or net.layers)
  if not any(layer.blobs for layer in layers):
    advice = "if it dates from 2013, run Caffe's upgrade_net_proto_binary on it"
    raise UsageError(f'no layers with weights; {advice}')
  known = next(filter(None, map(_of_mean_file, layers)), None)
  return Parsed(layers, layers=_described(layers), image_size=_image_size(layers), preprocessing=known)


def read(file: WeightsFile, spec: Spec) -> Tensors:
  """The tensors of a caffemodel."""
  layers, source = file.stored, str(file.path)
  blobs = {
    f'{name}.{number}': _array(blob, f'{source}: tensor {layer.name}.{number}')
    for name, layer in _weight_layers(layers, spec).items()
    for number, blob in enumerate(layer.blobs)
  }
  # Caffe's BatchNorm stores sums of moments, and their divisor.
  divisors = {name: blobs.pop(f'{name}.2', np.ones(1)).sum() or 1.0 for name in norm_layers(spec)}
  names, shapes = _tensor_names(spec), layout.variable_shapes(spec)
  tensors = pick(blobs, names, source)
  for name, stored in names.items():
    array = tensors[name]
    extra = array.ndim - len(shapes[name])
    if set(array.shape[:extra]) == {1}:  # blobs formerly had four axes always: [1, 1, O, I] for [O, I]
      array = array.reshape(array.shape[extra:])
    if name.startswith('batch_stats/'):
      with np.errstate(all='ignore'):  # of a damaged file; `check` refuses what is not finite
        array = array / np.float32(divisors[stored.rpartition('.')[0]])
    tensors[name] = from_channels_first(name, array, spec)
  tensors = check(tensors, spec, source, names)
  return match_input(tensors, spec, _stored_input(layers, spec, source), source)


def dump(tensors: Tensors, spec: Spec, class_names: Sequence[str]) -> bytes:
  """A caffemodel of Caffe's current layers."""
  net = build_net(spec, tensors[f'params/{spec.head}/bias'].shape[0])
  theirs = caffe_input(spec, "Caffe's layout")
  tensors = match_input(tensors, spec, theirs, "Caffe's layout")
  blobs: dict[str, list[np.ndarray]] = {}
  for ours, name in _tensor_names(spec).items():
    blobs.setdefault(name.rpartition('.')[0], []).append(layout.to_channels_first(ours, tensors[ours], spec))
  for name in norm_layers(spec):
    blobs[name].append(np.ones(1, np.float32))
  for layer in net.layer:
    for array in blobs.get(layer.name, ()):
      blob = layer.blobs.add(data=np.asarray(array, '<f4').tobytes())
      blob.shape.dim.extend(array.shape)
    if layer.type == 'Input' and any(theirs.mean):  # Caffe ignores it there; we do not
      layer.transform_param.mean_value.extend(theirs.mean)
  return net.SerializeToString()


def activations(file: WeightsFile, spec: Spec, num_classes: int, inputs: Inputs) -> tuple[str, Activations]:
  """OpenCV's Caffe engine: the caffemodel, our prototxt, and the blob that OpenCV makes of our views."""
  import cv2

  if not hasattr(cv2.dnn, 'readNetFromCaffe'):
    raise UsageError("OpenCV 5 cannot read Caffe networks: pip install 'opencv-python-headless<5'")
  renamed = net_parameter().FromString(file.path.read_bytes())
  for name, layer in _weight_layers(renamed.layer or renamed.layers, spec).items():
    layer.name = name
  text, weights = prototxt(spec, num_classes).encode(), renamed.SerializeToString()
  net = cv2.dnn.readNetFromCaffe(np.frombuffer(text, np.uint8), np.frombuffer(weights, np.uint8))
  net.enableFusion(False)  # or a layer would return what the next one makes of it
  mean, side = caffe_input(spec, str(file.path)).mean, (spec.image_size, spec.image_size)
  blob = cv2.dnn.blobFromImages(list(inputs.views), 1.0, side, mean, swapRB=True)
  net.setInput(blob)
  names = {ours: theirs for ours, theirs in layer_names(spec).items() if ours != 'flatten'}
  outputs = net.forward(list(names.values()))
  taps = {ours: layout.channels_last(output) for ours, output in zip(names, outputs, strict=True)}
  step = -1 if spec.preprocessing.channel_order == 'RGB' else 1
  return f'OpenCV {cv2.__version__}', {'input': layout.channels_last(blob)[..., ::step], **taps}


def _weight_layers(layers: Iterable[Any], spec: Spec) -> dict[str, Any]:
  """The layers with weights by the names that we have for them, in their order.

  Whoever trains a network further gives its head another name, and some rename all layers.
  """
  both = (build_net(spec, 1).layer, layers)
  ours, theirs = ([layer for layer in some if _kind(layer) in _WITH_WEIGHTS] for some in both)
  return {our.name: their for our, their in zip(ours, theirs, strict=True)}


def _described(layers: Iterable[Any]) -> list[tuple[str, str]]:
  """Names of the computing layers, and their kinds with their settings."""
  described = []
  for layer in layers:
    kind = _kind(layer)
    if kind in _NEUTRAL or kind.endswith(('Data', 'Loss')):
      continue
    field, defaults = _DEFAULTS.get(kind, ('', {}))
    settings: dict[str, Any] = {}
    for name, default in defaults.items():
      parameters = getattr(layer, field)
      if isinstance(default, list):
        settings[name] = list(getattr(parameters, name)) or default
      else:
        value = getattr(parameters, name) if parameters.HasField(name) else default
        settings[name] = round(value, 9) if isinstance(value, float) else value
    described.append((layer.name, f'{kind} {settings or ""}'))
  return described


def _kind(layer: Any) -> str:
  return layer.type if isinstance(layer.type, str) else V1_TYPES.get(layer.type, f'type {layer.type}')


def _image_size(layers: Iterable[Any]) -> int | None:
  """The side of square images, from an input layer, or from a data layer's crop."""
  for layer in layers:
    if layer.HasField('transform_param') and layer.transform_param.crop_size:
      return layer.transform_param.crop_size
    if _kind(layer) == 'Input' and layer.input_param.shape:
      dimensions = list(layer.input_param.shape[0].dim)
      return dimensions[3] if len(dimensions) == 4 and dimensions[2] == dimensions[3] > 0 else None
  return None


def _of_mean_file(layer: Any) -> Preprocessing | None:
  return _MEAN_FILES.get(layer.transform_param.mean_file.rpartition('/')[2])


def _array(blob: Any, what: str) -> np.ndarray:
  shape = tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)
  content, kind = (blob.data, '<f4') if blob.data else (blob.double_data, '<f8')
  if min(shape) < 0 or len(content) != math.prod(shape) * int(kind[-1]):
    raise UsageError(f'{what} is cut short: {len(content):,} bytes for the shape {shape}')
  return np.frombuffer(content, kind).reshape(shape).astype(np.float32)


def _stored_input(layers: list[Any], spec: Spec, source: str) -> Preprocessing:
  """The input of the file's network by its data layer; without one, Caffe's with the spec's mean."""
  theirs = caffe_input(spec, source)
  for layer in layers:
    if not layer.HasField('transform_param'):
      continue
    transform = layer.transform_param
    scale = transform.scale if transform.HasField('scale') else 1.0
    mean = theirs.mean
    if transform.mean_value:
      blue, green, red = (list(transform.mean_value) * 3)[:3]
      mean = (blue * scale, green * scale, red * scale)
    elif known := _of_mean_file(layer):
      mean = known.mean
    elif transform.mean_file and not any(theirs.mean):
      what = f'its network subtracts {transform.mean_file}'
      raise UsageError(f'{source}: {what}; {spec.name} subtracts nothing')
    found = dataclasses.replace(theirs, scale=scale, mean=mean)
    if not np.allclose((found.scale, *found.mean), (theirs.scale, *theirs.mean), rtol=1e-6):
      return found  # a file may have several data layers
  return theirs


def _tensor_names(spec: Spec) -> dict[str, str]:
  """Our tensors' names -> layer and blob number, 'conv1.0'."""
  names, result = layer_names(spec), {}
  for ours in layout.variable_shapes(spec):
    collection, layer, leaf = ours.split('/')
    theirs = names[layer].replace('/scale', '/bn') if collection == 'batch_stats' else names[layer]
    result[ours] = f'{theirs}.{1 if leaf in ("bias", "var") else 0}'
  return dict(sorted(result.items(), key=lambda item: item[1]))


CAFFE: Format = Format(
  name='caffe',
  ending='.caffemodel',
  recognize=lambda content, path: path.suffix == '.caffemodel',  # protobuf has no signature
  nature='a binary caffemodel',
  parse=parse,
  read=read,
  dump=dump,
  companions={
    '.prototxt': lambda tensors, spec, _: prototxt(spec, len(tensors[f'params/{spec.head}/bias'])).encode()
  },
  variants=('caffe', 'caffenet', 'batchnorm_grouped'),
  outputs=lambda file, spec, layer: _array(_weight_layers(file.stored, spec)[layer].blobs[1], layer).size,
  describe=lambda spec: _described(build_net(spec, 1).layer),
  layer_names=layer_names,
  activations=activations,
)
