"""Transfer learning: the variables of a trained network in the place of a new one's."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Spec
from alexnet_flax.models.surgery import computation


class Grafted(NamedTuple):
  """Variables of a network, some of which come from another, and names of layers with variables."""

  variables: dict[str, Any]
  loaded: tuple[str, ...]
  new: tuple[str, ...]
  left_out: tuple[str, ...]  # the other network's that were not used


def graft(
  fresh: Mapping[str, Any], spec: Spec, pretrained: Mapping[str, Any], theirs: Spec, *, new_head: bool = True
) -> Grafted:
  """Replaces the initial variables of a network by those of another, layer by layer.

  `fresh` are the initial variables of `spec`, `pretrained` those of `theirs`, which may have more layers. The
  head stays as it is if `new_head`, or if its shape differs. Raises UsageError if another layer is missing
  there, computes something else, or has another shape.
  """
  mine, other = dict(spec.named_layers()), dict(theirs.named_layers())
  if _pixels(theirs) != _pixels(spec):
    raise UsageError(f'the weights expect images with {_pixels(theirs)}, not with {_pixels(spec)}')
  variables = {collection: dict(layers) for collection, layers in fresh.items()}
  loaded = []
  for name, layer in mine.items():
    shapes, stored = _shapes(fresh, name), _shapes(pretrained, name)
    if name == spec.head and (new_head or shapes != stored):
      continue
    if name not in other or _of_any_size(layer) != _of_any_size(other[name]):
      both = f'{name} is {other.get(name, "absent")} there, {layer} here'
      raise UsageError(f'the weights are of another network ({theirs.name}): {both}')
    for leaf, shape in shapes.items():
      if stored[leaf] != shape:
        hint = 'only the head may differ (same model.width and model.image_size?)'
        raise UsageError(f'{leaf} of the weights has shape {stored[leaf]}, and {shape} is needed; {hint}')
      collection = leaf.partition('/')[0]
      variables[collection][name] = pretrained[collection][name]
    if shapes:
      loaded.append(name)
  new = tuple(name for name in mine if _shapes(fresh, name) and name not in loaded)
  left_out = tuple(name for name in other if _shapes(pretrained, name) and name not in loaded)
  return Grafted(variables, tuple(loaded), new, left_out)


def _shapes(variables: Mapping[str, Any], name: str) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a layer's variables: {'params/conv1/kernel': (11, 11, 3, 96), ...}."""
  return {
    f'{collection}/{name}/{leaf}': np.shape(value)
    for collection, layers in variables.items()
    for leaf, value in layers.get(name, {}).items()
  }


def _of_any_size(layer: Any) -> Any:
  """Returns what a layer computes, whatever its number of features, which shows in the shapes."""
  layer = computation(layer)
  return dataclasses.replace(layer, features=None) if hasattr(layer, 'features') else layer


def _pixels(spec: Spec) -> Any:
  return dataclasses.replace(spec.preprocessing, center_crop_share=1.0)
