"""Modifies specs: norms for ablations; for transfer, selects layers, replaces the head, scales rates."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.models.spec import (
  Activation,
  BatchNorm,
  Conv,
  Dense,
  Flatten,
  Layer,
  LayerWithParameters,
  LocalResponseNorm,
  Normal,
  SpatialResponseNorm,
  Spec,
)

BatchNormPlace = Literal['none', 'before', 'after']
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


def without_response_norms(spec: Spec) -> Spec:
  """Returns the network without its local response norms, of either kind."""
  layers = tuple(
    layer for layer in spec.layers if not isinstance(layer, LocalResponseNorm | SpatialResponseNorm)
  )
  return dataclasses.replace(spec, layers=layers)


def with_batch_norm(spec: Spec, place: BatchNormPlace) -> Spec:
  """Returns the network with BatchNorm before or after activations, or with none.

  The network's own BatchNorm changes sides where it has one; a network without any gets one at every
  activation, as in Mishkin et al. (2017). A norm of the network's input stays: it stands in for the mean.

  >>> from alexnet_flax import VARIANTS
  >>> [name for name, _ in with_batch_norm(VARIANTS['torchvision'], 'after').named_layers()][:4]
  ['conv1', 'relu1', 'norm1', 'pool1']
  """
  if place not in get_args(BatchNormPlace):
    raise unknown_name('place of BatchNorm', place, get_args(BatchNormPlace))
  starts = [at for at, layer in enumerate(spec.layers) if isinstance(layer, Conv | Dense)]
  inputs, rest = spec.layers[: starts[0]], spec.layers[starts[0] :]
  if place == 'none':
    kept = (layer for layer in rest if not isinstance(layer, BatchNorm))
    return dataclasses.replace(spec, layers=(*inputs, *kept))
  new = None if any(isinstance(layer, BatchNorm) for layer in rest) else BatchNorm()
  stages = zip(starts, [*starts[1:], None], strict=True)
  layers = (layer for start, end in stages for layer in _with_norm(spec.layers[start:end], place, new))
  return dataclasses.replace(spec, layers=(*inputs, *layers))


def _with_norm(stage: Sequence[Layer], place: BatchNormPlace, new: BatchNorm | None) -> list[Layer]:
  """Returns a stage with its first BatchNorm, or a new one, on one side of its activation."""
  layers, kinds = list(stage), [type(layer) for layer in stage]
  if Activation not in kinds:
    return layers
  activation = kinds.index(Activation)
  if BatchNorm in kinds:
    if (kinds.index(BatchNorm) < activation) != (place == 'before'):
      layers.insert(activation, layers.pop(kinds.index(BatchNorm)))
  elif new:
    layers.insert(activation + (place == 'after'), new)
  return layers


_TRAINING_ONLY = ('kernel_init', 'bias_init', 'multipliers', 'momentum', 'rate')


def computation(layer: Layer) -> Layer:
  """Returns the layer without its training-only settings: equal results compute the same in evaluation."""
  fields = dataclasses.fields(layer)
  defaults: Any = {field.name: field.default for field in fields if field.name in _TRAINING_ONLY}
  return dataclasses.replace(layer, **defaults)
