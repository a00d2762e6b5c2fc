"""ONNX, built from the spec: uint8 RGB images [N, S, S, 3] in, logits [N, C] out."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from alexnet_flax.errors import UsageError
from alexnet_flax.files import atomic_path
from alexnet_flax.models import spec as specs
from alexnet_flax.models.spec import Spec, output_side, window_padding
from alexnet_flax.weights.layout import tensors_of

OPSET, IR_VERSION = 17, 8
_ACTIVATIONS = {'relu': 'Relu', 'tanh': 'Tanh', 'sigmoid': 'Sigmoid', 'leaky_relu': 'LeakyRelu', 'elu': 'Elu'}


def write(
  path: pathlib.Path, spec: Spec, variables: Mapping[str, Any], class_names: Sequence[str] = ()
) -> list[pathlib.Path]:
  """Writes the network, with the class names in the metadata as JSON; UsageError if ONNX lacks a layer."""
  graph = Graph(tensors_of(variables))
  size, classes = spec.image_size, graph.tensors[f'params/{spec.head}/bias'].shape[0]
  graph.add_input(spec.preprocessing)
  side = size
  for name, layer in spec.named_layers():
    side = graph.add_layer(name, layer, side)
  graph.add('Identity', [], 'logits')
  images = helper.make_tensor_value_info('images', TensorProto.UINT8, ['batch', size, size, 3])
  logits = helper.make_tensor_value_info('logits', TensorProto.FLOAT, ['batch', classes])
  onnx_graph = helper.make_graph(graph.nodes, spec.name, [images], [logits], graph.constants)
  versions = {'opset_imports': [helper.make_opsetid('', OPSET)], 'ir_version': IR_VERSION}
  model = helper.make_model(onnx_graph, producer_name='alexnet_flax', **versions)
  helper.set_model_props(model, {'variant': spec.name, 'class_names': json.dumps(list(class_names))})
  onnx.checker.check_model(model, full_check=True)
  with atomic_path(path) as partial:
    partial.write_bytes(model.SerializeToString())
  return [path]


def run(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
  """Returns the logits [N, C] of ONNX Runtime for images, uint8 RGB [N, S, S, 3]."""
  import onnxruntime

  session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
  return session.run(['logits'], {'images': images})[0]


class Graph:
  """Nodes in the order of the layers; `last` names the last value, [N, C, H, W] or [N, C]."""

  def __init__(self, tensors: Mapping[str, np.ndarray]):
    self.tensors = tensors
    self.nodes: list[Any] = []
    self.constants: list[Any] = []
    self.last: str = 'images'

  def add(self, kind: str, operands: Sequence[np.ndarray | str], name: str, **attributes: Any) -> None:
    """Adds an operation on the last value and on constants, or other values by their names."""
    inputs = [self.last]
    for number, operand in enumerate(operands):
      if not isinstance(operand, str):
        value, operand = np.ascontiguousarray(operand), f'{name}/{number}'
        self.constants.append(numpy_helper.from_array(value, operand))
      inputs.append(operand)
    self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
    self.last = name

  def add_input(self, preprocessing: specs.Preprocessing) -> None:
    """Adds the preprocessing, from bytes to the network's input, channels first."""
    self.add('Cast', [], 'floats', to=TensorProto.FLOAT)
    if preprocessing.channel_order == 'BGR':
      self.add('Gather', [np.array([2, 1, 0])], 'bgr', axis=3)
    self.add('Mul', [np.array(preprocessing.scale, np.float32)], 'scaled')
    self.add('Sub', [np.array(preprocessing.mean, np.float32)], 'centered')
    self.add('Div', [np.array(preprocessing.std, np.float32)], 'normalized')
    self.add('Transpose', [], 'channels_first', perm=[0, 3, 1, 2])

  def add_layer(self, name: str, layer: specs.Layer, side: int) -> int:
    """Adds a layer whose input has a side; returns the side of its output."""
    match layer:
      case specs.Conv(local=True):
        self._add_local(name, _window(layer, side))
        return output_side(layer, side)
      case specs.Conv():
        kernel, bias = self._parameters(name)
        window = _window(layer, side)
        self.add('Conv', [kernel.transpose(3, 2, 0, 1), bias], name, group=layer.groups, **window)
        return output_side(layer, side)
      case specs.Pool():
        self._add_pool(name, layer, _window(layer, side))
        return output_side(layer, side)
      case specs.Dense():
        self.add('Gemm', self._parameters(name), name)
      case specs.BatchNorm():
        mean, variance = (self.tensors[f'batch_stats/{name}/{part}'] for part in ('mean', 'var'))
        scale = self.tensors.get(f'params/{name}/scale', np.ones_like(mean))
        bias = self.tensors.get(f'params/{name}/bias', np.zeros_like(mean))
        self.add('BatchNormalization', [scale, bias, mean, variance], name, epsilon=layer.epsilon)
      case specs.Activation() if layer.kind in _ACTIVATIONS:
        slope = {'alpha': 0.01} if layer.kind == 'leaky_relu' else {}
        self.add(_ACTIVATIONS[layer.kind], [], name, **slope)
      case specs.LocalResponseNorm():
        self._add_response_norm(name, layer)
      case specs.SpatialResponseNorm():
        self._add_spatial_norm(name, layer)
      case specs.Flatten():  # fc6 takes height, width, channels
        self.add('Transpose', [], f'{name}/channels_last', perm=[0, 2, 3, 1])
        self.add('Flatten', [], name)
      case specs.Dropout():
        pass
      case _:
        raise UsageError(f'ONNX export has no layer like {name}: {layer}')
    return side

  def _parameters(self, name: str) -> list[np.ndarray]:
    return [self.tensors[f'params/{name}/{part}'] for part in ('kernel', 'bias')]

  def _add_local(self, name: str, window: dict[str, Any]) -> None:
    """A convolution that copies each window into the channels of one place; then a product for each place."""
    kernel, bias = self._parameters(name)
    rows, columns, size, _, channels, features = kernel.shape
    taps, places = size * size, rows * columns
    copying = np.tile(np.eye(taps, dtype=np.float32).reshape(taps, 1, size, size), (channels, 1, 1, 1))
    kernel = kernel.transpose(0, 1, 4, 2, 3, 5).reshape(places, channels * taps, features)
    self.add('Conv', [copying], f'{name}/windows', group=channels, **window)
    self.add('Reshape', [np.array([0, channels * taps, places])], f'{name}/by_place')
    self.add('Transpose', [], f'{name}/place_first', perm=[2, 0, 1])
    self.add('MatMul', [kernel], f'{name}/products')
    self.add('Add', [bias.reshape(places, 1, features)], f'{name}/biased')
    self.add('Transpose', [], f'{name}/place_last', perm=[1, 2, 0])
    self.add('Reshape', [np.array([0, features, rows, columns])], name)

  def _add_pool(self, name: str, layer: specs.Pool, window: dict[str, Any]) -> None:
    match layer.kind:
      case 'max':
        self.add('MaxPool', [], name, **window)
      case 'avg':
        self.add('AveragePool', [], name, **window)
      case 'max+avg':
        given = self.last
        self.add('MaxPool', [], f'{name}/max', **window)
        self.last = given
        self.add('AveragePool', [], f'{name}/avg', **window)
        self.add('Mean', [f'{name}/max'], name)
      case _:
        assert_never(layer.kind)

  def _add_response_norm(self, name: str, layer: specs.LocalResponseNorm) -> None:
    """ONNX divides alpha by the window size; an even window lies one channel off ours."""
    size = layer.size
    if size % 2 == 0:
      raise UsageError(f'{name}: ONNX places a window of {size} channels otherwise; the size must be odd')
    constants: Any = {'alpha': layer.alpha * size, 'beta': layer.beta, 'bias': layer.k, 'size': size}
    if layer.groups == 1:
      self.add('LRN', [], name, **constants)
      return
    parts = [f'{name}/part{number}' for number in range(layer.groups)]
    self.nodes.append(helper.make_node('Split', [self.last], parts, f'{name}/split', axis=1))
    for part in parts:
      self.last = part
      self.add('LRN', [], f'{part}/normed', **constants)
    self.last = f'{parts[0]}/normed'
    self.add('Concat', [f'{part}/normed' for part in parts[1:]], name, axis=1)

  def _add_spatial_norm(self, name: str, layer: specs.SpatialResponseNorm) -> None:
    """x / (k + alpha * sum x^2)^beta; the sum is the average, padding included, times the area."""
    given, before, after = self.last, layer.size // 2, (layer.size - 1) // 2
    self.add('Mul', [given], f'{name}/squares')
    window = {'kernel_shape': [layer.size] * 2, 'pads': [before, before, after, after]}
    self.add('AveragePool', [], f'{name}/means', count_include_pad=1, **window)
    self.add('Mul', [np.array(layer.alpha * layer.size**2, np.float32)], f'{name}/sums')
    self.add('Add', [np.array(layer.k, np.float32)], f'{name}/shifted')
    self.add('Pow', [np.array(-layer.beta, np.float32)], f'{name}/factors')
    self.add('Mul', [given], name)


def _window(layer: specs.Conv | specs.Pool, side: int) -> dict[str, Any]:
  before, after = window_padding(layer, side)
  sizes = {'kernel_shape': [layer.kernel_size] * 2, 'strides': [layer.strides] * 2}
  return sizes | {'pads': [before, before, after, after]}
