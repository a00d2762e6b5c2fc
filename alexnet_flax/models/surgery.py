"""Modifies specs for transfer learning: selects layers, replaces the head, scales learning rates."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any

from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.models.spec import Conv, Dense, Flatten, Layer, LayerWithParameters, Normal, Spec

HEAD = 'head'  # a pattern for the last layer, whatever its name


def layer_patterns(text: str) -> list[str]:
  """Splits a list such as 'conv1, norm*' into patterns."""
  return [name.strip() for name in text.split(',') if name.strip()]


def rate_multipliers(text: str) -> dict[str, float]:
  """Parses a list such as 'conv*:0.1, fc8:10' into multipliers by pattern; raises UsageError if it cannot."""
  rates = {}
  for pair in layer_patterns(text):
    pattern, _, number = pair.partition(':')
    try:
      rates[pattern] = float(number)
    except ValueError:
      rates[pattern] = math.nan
    if not 0 <= rates[pattern] < math.inf:
      raise UsageError(f"learning rates: {pair!r} must be LAYER:MULTIPLIER, as in 'conv*:0.1,fc8:10'")
  return rates


def match_layers(spec: Spec, patterns: Iterable[str]) -> list[str]:
  """Returns the layers whose names match any pattern ('conv*', 'norm[1-3]', 'head'), in the network's order.

  Raises UsageError if a pattern matches no layer.

  >>> from alexnet_flax import VARIANTS
  >>> match_layers(VARIANTS['paper'], ['norm*', 'fc8'])
  ['norm1', 'norm2', 'fc8']
  """
  names = [name for name, _ in spec.named_layers()]
  found: set[str] = set()
  for pattern in patterns:
    matching = names[-1:] if pattern == HEAD else fnmatch.filter(names, pattern)
    if not matching:
      raise unknown_name('layer', pattern, names)
    found.update(matching)
  return [name for name in names if name in found]


def frozen_layers(spec: Spec, patterns: Iterable[str]) -> list[str]:
  """Returns the layers with parameters or statistics that `patterns` freeze, including their BatchNorm.

  The BatchNorm of a convolution or fully connected layer is the one between it and the next such layer. One
  on the network's input belongs to the first.
  """
  named = set(match_layers(spec, patterns))
  first = next(name for name, layer in spec.named_layers() if isinstance(layer, Conv | Dense))
  frozen, under = [], first in named
  for name, layer in spec.named_layers():
    if isinstance(layer, Conv | Dense):
      under = name in named
    if isinstance(layer, LayerWithParameters) and (under or name in named):
      frozen.append(name)
  return frozen


def scale_rates(spec: Spec, rates: Mapping[str, float]) -> Spec:
  """Returns the network with the learning rates of the layers matching each pattern multiplied.

  Raises UsageError if a pattern matches no layer, or only layers without parameters.

  >>> from alexnet_flax import VARIANTS
  >>> scale_rates(VARIANTS['caffe'], {'conv*': 0.1}).layers[0].multipliers.bias_rate
  0.2
  """
  layers = dict(spec.named_layers())
  for pattern, factor in rates.items():
    matching = match_layers(spec, [pattern])
    if not frozen_layers(spec, matching):
      raise UsageError(f'{pattern!r} matches no layer with parameters')
    for name in matching:
      layer = layers[name]
      if isinstance(layer, LayerWithParameters):
        old = layer.multipliers
        new = dataclasses.replace(old, kernel_rate=old.kernel_rate * factor, bias_rate=old.bias_rate * factor)
        layers[name] = dataclasses.replace(layer, multipliers=new)
  return dataclasses.replace(spec, layers=tuple(layers.values()))


def with_head_on(spec: Spec, layer: str) -> Spec:
  """Returns the network up to a layer, with the head on top of it.

  Raises UsageError if there is no such layer, or if it is the head.

  >>> from alexnet_flax import VARIANTS
  >>> [name for name, _ in with_head_on(VARIANTS['torchvision'], 'pool1').named_layers()]
  ['conv1', 'relu1', 'pool1', 'flatten', 'fc2']
  """
  names = [name for name, _ in spec.named_layers()][:-1]
  if layer not in names:
    raise unknown_name('layer to put a head on', layer, names)
  kept = spec.layers[: names.index(layer) + 1]
  flat = () if any(isinstance(one, Flatten) for one in kept) else (Flatten(),)
  return dataclasses.replace(spec, layers=(*kept, *flat, spec.layers[-1]))


def with_head_init(spec: Spec, kernel_init: Normal) -> Spec:
  """Returns the network with another initialisation of the head's kernel."""
  *others, head = spec.layers
  assert isinstance(head, Dense)
  return dataclasses.replace(spec, layers=(*others, dataclasses.replace(head, kernel_init=kernel_init)))


_TRAINING_ONLY = ('kernel_init', 'bias_init', 'multipliers', 'momentum', 'rate')


def computation(layer: Layer) -> Layer:
  """Returns the layer without its training-only settings: equal results compute the same in evaluation."""
  fields = dataclasses.fields(layer)
  defaults: Any = {field.name: field.default for field in fields if field.name in _TRAINING_ONLY}
  return dataclasses.replace(layer, **defaults)
