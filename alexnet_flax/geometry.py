"""Sides of pictures through the layers of a spec: padding, output sizes, the smallest input."""

import itertools
import math

from alexnet_flax.naming import named_layers
from alexnet_flax.specs import Conv, Pool, Spec


def window_padding(layer: Conv | Pool, size: int) -> tuple[int, int]:
  """The padding before and after a side of `size` that makes a VALID window give the layer's output.

  'SAME' gives ceil(size / strides) outputs, placed as XLA and TensorFlow place them. A number pads
  both ends; `ceil_mode` adds at the end what a last, partial window needs, provided that this window
  begins inside the picture or its leading padding (Caffe's and PyTorch's rule).
  """
  window, strides = layer.kernel_size, layer.strides
  if layer.padding == 'SAME':
    total = max((math.ceil(size / strides) - 1) * strides + window - size, 0)
    return total // 2, total - total // 2
  pad = 0 if layer.padding == 'VALID' else layer.padding
  span = size + 2 * pad - window
  last_start = math.ceil(span / strides) * strides
  if not layer.ceil_mode or span < 0 or last_start >= size + pad:
    return pad, pad
  return pad, pad + last_start - span


def side_lengths(spec: Spec, size: int) -> dict[str, int]:
  """The side of the picture after each convolution and pooling; the last is 0 if nothing is left."""
  sides = {}
  for name, layer in named_layers(spec):
    if isinstance(layer, Conv | Pool):
      span = size + sum(window_padding(layer, size)) - layer.kernel_size
      size = sides[name] = max(span // layer.strides + 1, 0)
      if size == 0:
        break
  return sides


def smallest_image_size(spec: Spec) -> int:
  """The least side of a square picture of which something is left after the last pooling."""
  return next(size for size in itertools.count(1) if all(side_lengths(spec, size).values()))


def check_image_size(spec: Spec, *sides: int) -> None:
  """Raises ValueError, naming the layer, if a picture with these sides does not survive the layers."""
  for name, left in side_lengths(spec, min(sides)).items():
    if not left:
      smallest = smallest_image_size(spec)
      raise ValueError(
        f'an image of {"x".join(map(str, sides))} is too small for the network {spec.name}: nothing is'
        f' left at {name}; it needs at least {smallest}x{smallest}'
      )
