"""The field's names for a network's layers."""

from collections.abc import Iterator

from alexnet_flax.specs import (
  Activation,
  BatchNorm,
  Conv,
  Dense,
  Dropout,
  Flatten,
  Layer,
  LocalResponseNorm,
  Pool,
  SpatialResponseNorm,
  Spec,
)


def named_layers(spec: Spec) -> Iterator[tuple[str, Layer]]:
  """Each layer with the field's name for it: conv1, relu1, norm1, pool1, ..., flatten, fc6, drop6.

  Weight layers are counted through; every other layer has the number of the weight layer before it,
  and a letter where there are several of its kind (norm1a, norm1b).
  """
  number = 0
  names = []
  for layer in spec.layers:
    if isinstance(layer, Conv | Dense):
      number += 1
    names.append(layer_kind(layer) if isinstance(layer, Flatten) else f'{layer_kind(layer)}{number}')
  for index, (name, layer) in enumerate(zip(names, spec.layers, strict=True)):
    letter = 'abcdefgh'[names[:index].count(name)] if names.count(name) > 1 else ''
    yield name + letter, layer


def head_name(spec: Spec) -> str:
  """The name of the last layer, which gives the logits: 'fc8'."""
  return list(named_layers(spec))[-1][0]


def layer_kind(layer: Layer) -> str:
  """The stem of a layer's name."""
  match layer:
    case Conv():
      return 'conv'
    case Dense():
      return 'fc'
    case Activation():
      return layer.kind
    case Pool():
      return 'pool'
    case LocalResponseNorm() | SpatialResponseNorm() | BatchNorm():
      return 'norm'
    case Flatten():
      return 'flatten'
    case Dropout():
      return 'drop'
