"""Networks made from networks, for transfer learning: which layers, with which head, at which rates."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping

from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.models.spec import (
  BatchNorm,
  Conv,
  Dense,
  Dropout,
  Flatten,
  Layer,
  Normal,
  Spec,
  VarianceScaling,
)

HEAD = 'head'  # the last layer, whatever its name


def layer_patterns(text: str) -> list[str]:
  """The names in 'conv1, norm*'."""
  return [name.strip() for name in text.split(',') if name.strip()]


def rate_multipliers(text: str) -> dict[str, float]:
  """The pairs in 'conv*:0.1, fc8:10'.

  Raises:
    UsageError: it is not written so, or a multiplier is negative.
  """
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
  """The layers whose names match any pattern ('conv*', 'norm[1-3]', 'head'), in the network's order.

  Raises:
    UsageError: a pattern matches nothing.

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
    found |= set(matching)
  return [name for name in names if name in found]


def frozen_layers(spec: Spec, patterns: Iterable[str]) -> list[str]:
  """The layers with parameters or statistics that `patterns` freeze: those named, and their BatchNorm.

  The BatchNorm of a convolution or fully connected layer is that between it and the next one; one on the
  network's input goes with the first.
  """
  named = set(match_layers(spec, patterns))
  first = next(name for name, layer in spec.named_layers() if isinstance(layer, Conv | Dense))
  frozen, under = [], first in named
  for name, layer in spec.named_layers():
    if isinstance(layer, Conv | Dense):
      under = name in named
    if isinstance(layer, Conv | Dense | BatchNorm) and (under or name in named):
      frozen.append(name)
  return frozen


def scale_rates(spec: Spec, rates: Mapping[str, float]) -> Spec:
  """The network with the learning rates of the layers that match each pattern multiplied.

  Raises:
    UsageError: a pattern matches nothing, or only layers without parameters.

  >>> from alexnet_flax import VARIANTS
  >>> scale_rates(VARIANTS['caffe'], {'conv*': 0.1}).layers[0].multipliers.bias_rate
  0.2
  """
  factors = dict.fromkeys((name for name, _ in spec.named_layers()), 1.0)
  for pattern, factor in rates.items():
    matching = match_layers(spec, [pattern])
    if not frozen_layers(spec, matching):
      raise UsageError(f'{pattern!r} names no layer with parameters')
    for name in matching:
      factors[name] *= factor

  def scaled(name: str, layer: Layer) -> Layer:
    if factors[name] == 1.0 or not isinstance(layer, Conv | Dense | BatchNorm):
      return layer
    old, factor = layer.multipliers, factors[name]
    new = dataclasses.replace(old, kernel_rate=old.kernel_rate * factor, bias_rate=old.bias_rate * factor)
    return dataclasses.replace(layer, multipliers=new)

  return dataclasses.replace(spec, layers=tuple(scaled(name, layer) for name, layer in spec.named_layers()))


def with_head_on(spec: Spec, layer: str) -> Spec:
  """The network up to a layer, and the head upon it.

  Raises:
    UsageError: there is no such layer, or it is the head.

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


def with_head_init(spec: Spec, kernel_init: Normal | VarianceScaling) -> Spec:
  """The network whose head's kernel starts otherwise."""
  *others, head = spec.layers
  assert isinstance(head, Dense)
  return dataclasses.replace(spec, layers=(*others, dataclasses.replace(head, kernel_init=kernel_init)))


def computation(layer: Layer) -> Layer:
  """The layer without what it says of training alone: two that are equal then compute the same."""
  match layer:
    case Conv():
      default = Conv(1, 1)
      return dataclasses.replace(
        layer, kernel_init=default.kernel_init, bias_init=default.bias_init, multipliers=default.multipliers
      )
    case Dense():
      return Dense(layer.features)
    case BatchNorm():
      return BatchNorm(epsilon=layer.epsilon, affine=layer.affine)
    case Dropout():
      return Dropout()
    case _:
      return layer
