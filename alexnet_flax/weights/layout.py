"""Parameters as a flat dictionary of named arrays, how channels-first programs lay them out, and checks."""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from alexnet_flax.errors import UsageError
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Conv, Dense, Flatten, Preprocessing, Spec

Tensors = dict[str, np.ndarray]  # 'params/conv1/kernel' -> array, as linen lays it out
_SHOWN = 3


def tensors_of(variables: Mapping[str, Any]) -> Tensors:
  """Returns the model's variables as 'params/conv1/kernel' -> float32 array."""
  flat = traverse_util.flatten_dict(dict(variables), sep='/')
  return {name: np.asarray(value, np.float32) for name, value in flat.items()}


def variables_of(tensors: Tensors) -> dict[str, Any]:
  """Returns the reverse of `tensors_of`."""
  return traverse_util.unflatten_dict(tensors, sep='/')


@functools.lru_cache(maxsize=16)
def variable_shapes(spec: Spec, num_classes: int | None = None) -> Mapping[str, tuple[int, ...]]:
  """Returns the shape of every variable of the network at the spec's image size."""
  images = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.float32)
  model = AlexNet(spec, num_classes)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  shapes = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(variables, sep='/').items()}
  return types.MappingProxyType(shapes)


def weight_layers(spec: Spec) -> list[str]:
  """Returns the names of the convolutions and fully connected layers, in order."""
  return [name for name, layer in spec.named_layers() if isinstance(layer, Conv | Dense)]


def to_channels_first(name: str, array: np.ndarray, spec: Spec) -> np.ndarray:
  """Returns a kernel as PyTorch and Caffe store it: [O, I, H, W], or [O, I] with I in the order C, H, W.

  Args:
    name: The tensor's name, 'params/fc6/kernel'; only kernels change.
    array: HWIO, or [I, O] with I in the order H, W, C.
    spec: The network, for the layer that sees flattened images, and their shape.
  """
  if not name.endswith('/kernel'):
    return array
  if array.ndim == 4:
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
  if name == _flattening(spec):
    side, outputs = _last_side(spec), array.shape[1]
    array = array.reshape(side, side, -1, outputs).transpose(2, 0, 1, 3).reshape(-1, outputs)
  return np.ascontiguousarray(array.T)


def from_channels_first(name: str, array: np.ndarray, spec: Spec) -> np.ndarray:
  """Returns the reverse; an array that cannot belong to the layer stays as it is, for `check` to refuse."""
  if not name.endswith('/kernel'):
    return array
  if array.ndim == 4:
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
  if array.ndim != 2:
    return array
  if name == _flattening(spec):
    side, outputs = _last_side(spec), array.shape[0]
    if array.shape[1] % (side * side):
      return array
    array = array.reshape(outputs, -1, side, side).transpose(0, 2, 3, 1).reshape(outputs, -1)
  return np.ascontiguousarray(array.T)


def pick(stored: Mapping[str, np.ndarray], names: Mapping[str, str], source: str) -> Tensors:
  """Returns the stored arrays by our names.

  Args:
    stored: Arrays by the file's names.
    names: Our name -> the file's, of every variable of the network.
    source: The file, for messages.

  Raises:
    UsageError: An array is missing or superfluous; the message names it.
  """
  missing = [theirs for theirs in names.values() if theirs not in stored]
  if missing:
    raise UsageError(f'{source}: missing {_some("tensor", missing)}; is it of another architecture?')
  extra = sorted(set(stored) - set(names.values()))
  if extra:
    raise UsageError(f'{source}: unexpected {_some("tensor", extra)}; is it of another architecture?')
  return {ours: stored[theirs] for ours, theirs in names.items()}


def check(tensors: Tensors, spec: Spec, source: str, names: Mapping[str, str] | None = None) -> Tensors:
  """Checks that tensors are the network's, of the right shapes, and finite; returns them in float32.

  The head may have any number of classes.

  Raises:
    UsageError: One is not; the message names it, by the file's own name if `names` has that.
  """
  names = names or {name: name for name in tensors}
  head = tensors.get(f'params/{spec.head}/bias')
  classes = head.shape[0] if head is not None and head.ndim == 1 and head.size else None
  shapes = variable_shapes(spec, classes)
  pick(tensors, {name: name for name in shapes}, source)
  for name, shape in shapes.items():
    array = tensors[name]
    shown = name if names[name] == name else f'{names[name]} ({name})'
    if array.shape != shape:
      raise UsageError(
        f'{source}: tensor {shown} has shape {array.shape}, in our layout; {spec.name} at'
        f' {spec.image_size}x{spec.image_size} needs {shape}'
      )
    if not np.issubdtype(array.dtype, np.floating):
      raise UsageError(f'{source}: tensor {shown} holds {array.dtype}; floats are needed')
    if not np.isfinite(array).all():
      raise UsageError(f'{source}: tensor {shown} holds NaN or infinite values')
  return {name: np.asarray(tensors[name], np.float32) for name in shapes}


def check_same_layers(
  theirs: Sequence[tuple[str, Any]], ours: Sequence[tuple[str, Any]], spec: Spec, source: str
) -> None:
  """Compares a file's computing layers, (name, description), with the spec's in their order.

  Raises:
    UsageError: One differs; the message names it.
  """
  for (name, layer), (our_name, our_layer) in zip(theirs, ours, strict=False):
    if layer != our_layer:
      raise UsageError(
        f'{source} is of another network than {spec.name}: its layer {name} is {layer}, where {our_name}'
        f' must be {our_layer}'
      )
  if len(theirs) != len(ours):
    raise UsageError(f'{source} has {len(theirs)} computing layers, {spec.name} has {len(ours)}')


def match_input(tensors: Tensors, spec: Spec, theirs: Preprocessing, source: str) -> Tensors:
  """Adapts tensors of a network that takes images as `theirs` says to the spec's preprocessing.

  For another order of the colours, the input channels of the first layer are reversed. Another mean or scale
  is refused: because of padding with zeros, no change of weights is equivalent.

  Raises:
    UsageError: Mean, std or scale differ.
  """
  ours = spec.preprocessing
  if theirs.channel_order != ours.channel_order:
    theirs = reversed_colours(theirs)
    tensors = dict(tensors)
    on_input = [name for name in tensors if name.split('/')[1] == 'norm0']
    for name in [*on_input, 'params/conv1/kernel']:
      axis = 2 if tensors[name].ndim == 4 else 0
      tensors[name] = np.ascontiguousarray(np.flip(tensors[name], axis))
  for field in ('scale', 'mean', 'std'):
    mine, other = getattr(ours, field), getattr(theirs, field)
    if not np.allclose(mine, other, rtol=1e-6, atol=1e-6):
      raise UsageError(
        f'{source}: its network takes images with {field} {other}, {spec.name} with {mine}; give a spec'
        f' with preprocessing={theirs}'
      )
  return tensors


def reversed_colours(preprocessing: Preprocessing) -> Preprocessing:
  """Returns the same preprocessing with the channels in the other order."""
  (r, g, b), (sr, sg, sb) = preprocessing.mean, preprocessing.std
  order: Literal['RGB', 'BGR'] = 'BGR' if preprocessing.channel_order == 'RGB' else 'RGB'
  return dataclasses.replace(preprocessing, mean=(b, g, r), std=(sb, sg, sr), channel_order=order)


def _some(what: str, names: list[str]) -> str:
  shown = ', '.join(names[:_SHOWN])
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return f'{what}{"s" if len(names) > 1 else ""} {shown}{more}'


def _flattening(spec: Spec) -> str | None:
  """The kernel that sees a flattened image."""
  layers = list(spec.named_layers())
  flat = next((i for i, (_, layer) in enumerate(layers) if isinstance(layer, Flatten)), len(layers))
  return next((f'params/{name}/kernel' for name, layer in layers[flat:] if isinstance(layer, Dense)), None)


def _last_side(spec: Spec) -> int:
  return list(spec.side_lengths(spec.image_size).values())[-1]
