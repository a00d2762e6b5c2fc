"""Parameters as a flat dictionary of named arrays, checks of them, and the layout of PyTorch and Caffe."""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from alexnet_flax.errors import UsageError
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Conv, Dense, Flatten, Preprocessing, Spec

Tensors = dict[str, np.ndarray]  # 'params/conv1/kernel' -> array, as linen lays it out


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
  init = functools.partial(AlexNet(spec, num_classes).init, train=False)
  variables = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0), images), sep='/')
  return types.MappingProxyType({name: leaf.shape for name, leaf in variables.items()})


def weight_layers(spec: Spec) -> list[str]:
  """Returns the names of the convolutions and fully connected layers, in order."""
  return [name for name, layer in spec.named_layers() if isinstance(layer, Conv | Dense)]


def pick(stored: Mapping[str, np.ndarray], names: Mapping[str, str], source: str) -> Tensors:
  """Returns the stored arrays by our names, or raises UsageError that names a missing or superfluous one.

  `names` has our name -> the file's, of every variable of the network; `source` is the file, for messages.
  """
  missing = [theirs for theirs in names.values() if theirs not in stored]
  extra = sorted(set(stored) - set(names.values()))
  for what, wrong in (('missing', missing), ('unexpected', extra)):
    if wrong:
      shown = ', '.join(wrong[:3]) + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')
      tensors = 'tensors' if len(wrong) > 1 else 'tensor'
      raise UsageError(f'{source}: {what} {tensors} {shown}; is it of another architecture?')
  return {ours: stored[theirs] for ours, theirs in names.items()}


def check(tensors: Tensors, spec: Spec, source: str, names: Mapping[str, str] | None = None) -> Tensors:
  """Checks that tensors are the network's, of the right shapes, and finite; returns them in float32.

  The head may have any number of classes. UsageError names what is wrong, by the file's name from `names`.
  """
  head = tensors.get(f'params/{spec.head}/bias', np.empty(()))
  shapes = variable_shapes(spec, head.shape[0] if head.ndim == 1 and head.size else None)
  pick(tensors, {name: name for name in shapes}, source)
  for name, shape in shapes.items():
    array, what = tensors[name], f'{source}: tensor {f"{names[name]} ({name})" if names else name}'
    if array.shape != shape:
      needs = f'{spec.name} at {spec.image_size}x{spec.image_size} needs {shape}'
      is_flat = name == flattening(spec) and array.ndim == 2 and array.size
      advice = _fitting_sizes(spec, array.shape, shape) if is_flat else ''
      raise UsageError(f'{what} has shape {array.shape}, in our layout; {needs}{advice}')
    if not np.issubdtype(array.dtype, np.floating):
      raise UsageError(f'{what} holds {array.dtype}; floats are needed')
    if not np.isfinite(array).all():
      raise UsageError(f'{what} holds NaN or infinite values')
  # Contiguous: safetensors writes the memory of an array, whatever its strides are.
  return {name: np.ascontiguousarray(tensors[name], np.float32) for name in shapes}


def _fitting_sizes(spec: Spec, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
  """Advice for a fully connected layer that has seen images of another size."""
  side = math.sqrt(theirs[0] / ours[0]) * last_side(spec, spec.image_size)
  sizes = [size for size in range(1, 1025) if last_side(spec, size) == side]
  return f'; images of {sizes[0]} to {sizes[-1]} pixels fit it (image_size)' if sizes else ''


def match_input(tensors: Tensors, spec: Spec, theirs: Preprocessing, source: str) -> Tensors:
  """Adapts tensors of a network that takes images as `theirs` says to the spec's preprocessing.

  For another order of the colours, the input channels of the first layer are reversed. Another mean, std or
  scale is a UsageError: because of padding with zeros, no change of weights is equivalent.
  """
  ours = spec.preprocessing
  if theirs.channel_order != ours.channel_order:
    theirs = in_order(ours.channel_order, theirs)
    kernel = f'params/{weight_layers(spec)[0]}/kernel'  # of a convolution or of flattened images
    flipped = {name: np.flip(x) for name, x in tensors.items() if '/norm0/' in name}
    flipped[kernel] = np.flip(tensors[kernel].reshape(-1, 3, tensors[kernel].shape[-1]), 1)
    tensors = tensors | {
      name: np.ascontiguousarray(x).reshape(tensors[name].shape) for name, x in flipped.items()
    }
  for field in ('scale', 'mean', 'std'):
    mine, other = getattr(ours, field), getattr(theirs, field)
    if not np.allclose(mine, other, rtol=1e-6, atol=1e-6):
      taken = f'its network takes images with {field} {other}, {spec.name} with {mine}'
      raise UsageError(f'{source}: {taken}; give a spec with preprocessing={theirs}')
  return tensors


def in_order(channel_order: Literal['RGB', 'BGR'], preprocessing: Preprocessing) -> Preprocessing:
  """Returns the same preprocessing with the channels in an order."""
  if preprocessing.channel_order == channel_order:
    return preprocessing
  mean, std = preprocessing.mean[::-1], preprocessing.std[::-1]
  return dataclasses.replace(preprocessing, mean=mean, std=std, channel_order=channel_order)


def to_channels_first(name: str, array: np.ndarray, spec: Spec) -> np.ndarray:
  """Returns a kernel as PyTorch and Caffe store it: [O, I, H, W], or [O, I] with I in the order C, H, W.

  `name` is the tensor's ('params/fc6/kernel'; only kernels change), `array` HWIO, or [I, O] with I in the
  order H, W, C.
  """
  if not name.endswith('/kernel'):
    return array
  if array.ndim == 4:
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
  if name == flattening(spec):
    side, outputs = last_side(spec, spec.image_size), array.shape[1]
    array = array.reshape(side, side, -1, outputs).transpose(2, 0, 1, 3).reshape(-1, outputs)
  return np.ascontiguousarray(array.T)


def from_channels_first(name: str, array: np.ndarray, spec: Spec) -> np.ndarray:
  """Returns the reverse; a kernel of images of another size is only transposed, for `check` to refuse."""
  if not name.endswith('/kernel') or array.ndim not in (2, 4):
    return array
  if array.ndim == 4:
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
  if name == flattening(spec):
    side, outputs = last_side(spec, spec.image_size), array.shape[0]
    if array.shape[1] % (side * side) == 0:
      array = array.reshape(outputs, -1, side, side).transpose(0, 2, 3, 1).reshape(outputs, -1)
  return np.ascontiguousarray(array.T)


def channels_last(array: Any) -> np.ndarray:
  """Copies a channels-first array or tensor [N, C, H, W] to [N, H, W, C]; [N, C] stays as it is."""
  array = np.array(array.numpy() if hasattr(array, 'numpy') else array)
  return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def flattening(spec: Spec) -> str | None:
  """Returns the name of the kernel that sees a flattened image."""
  layers = list(spec.named_layers())
  flat = next((i for i, (_, layer) in enumerate(layers) if isinstance(layer, Flatten)), len(layers))
  return next((f'params/{name}/kernel' for name, layer in layers[flat:] if isinstance(layer, Dense)), None)


def last_side(spec: Spec, size: int) -> int:
  """Returns the side of the image that is flattened, for images of side `size`."""
  return [size, *spec.side_lengths(size).values()][-1]
