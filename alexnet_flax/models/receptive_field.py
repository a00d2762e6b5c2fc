"""Receptive fields: which pixels of an image the units of each layer see, computed from the spec alone."""

from typing import NamedTuple

from alexnet_flax.models.spec import (
  Conv,
  Flatten,
  Pool,
  SpatialResponseNorm,
  Spec,
  output_side,
  window_padding,
)


class ReceptiveField(NamedTuple):
  """The pixels that the units of a layer see, from the first to the last, in rows as in columns."""

  size: int  # of a unit's field, including what lies in padding
  stride: int  # from one unit's field to the next; 0 from `flatten` on, where a unit sees all places
  offset: int  # where the first unit's field begins; negative in padding
  spans: tuple[
    tuple[int, int], ...
  ]  # for each row of units, the first row of pixels and the one after the last


def receptive_fields(spec: Spec, image_size: int | None = None) -> dict[str, ReceptiveField]:
  """Returns the receptive field of each layer by name, for square images of the spec's or another size.

  Size, stride and offset follow Araujo, Norris and Sim (2019, 'Computing Receptive Fields of Convolutional
  Neural Networks', Distill). LRN within channels widens the field too. Spans leave out padding, and pixels
  that a layer in between does not reach. ValueError if such an image is too small for the network.

  >>> from alexnet_flax import VARIANTS
  >>> field = receptive_fields(VARIANTS['torchvision'])['conv2']
  >>> field.size, field.stride, field.offset, field.spans[:2]
  (51, 8, -18, ((0, 33), (0, 41)))
  """
  side = spec.image_size if image_size is None else image_size
  spec.check_image_size(side)
  size, stride, offset, fields = 1, 1, 0, {}
  spans = [(pixel, pixel + 1) for pixel in range(side)]
  for name, layer in spec.named_layers():
    window, strides, before, count = 1, 1, 0, len(spans)
    match layer:
      case Conv() | Pool():
        window, strides, count = layer.kernel_size, layer.strides, output_side(layer, len(spans))
        before = window_padding(layer, len(spans))[0]
      case SpatialResponseNorm():
        window, before = layer.size, layer.size // 2
      case Flatten():
        window, strides, count = len(spans), 0, 1
    size, offset, stride = size + (window - 1) * stride, offset - before * stride, stride * strides
    firsts = [number * strides - before for number in range(count)]
    inside = [spans[max(first, 0) : max(first + window, 0)] or [(0, 0)] for first in firsts]
    spans = [(seen[0][0], seen[-1][1]) for seen in inside]
    fields[name] = ReceptiveField(size, stride, offset, tuple(spans))
  return fields
