"""Parameters as a flat dictionary of named arrays, and checks of them."""

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
from alexnet_flax.models.spec import Conv, Dense, Preprocessing, Spec
from alexnet_flax.weights.channels_first import flattening, last_side

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
      advice = _fitting_sizes(spec, array.shape, shape) if name == flattening(spec) else ''
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
    tensors = dict(tensors)
    for name, tensor in tensors.items():
      if name == 'params/conv1/kernel' or '/norm0/' in name:
        tensors[name] = np.ascontiguousarray(np.flip(tensor, axis=2 if tensor.ndim == 4 else 0))
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
