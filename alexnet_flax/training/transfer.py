"""Transfer learning: the variables of a trained network in the place of a new one's."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Spec
from alexnet_flax.models.surgery import computation


@dataclasses.dataclass(frozen=True)
class Grafted:
  """Variables of a network, some of which come from another.

  Attributes:
    variables: {'params', 'batch_stats'}.
    loaded, new: The layers whose variables were loaded, or are newly initialised.
    left_out: The other network's layers that were not used.
  """

  variables: dict[str, Any]
  loaded: tuple[str, ...]
  new: tuple[str, ...]
  left_out: tuple[str, ...]


def graft(
  fresh: Mapping[str, Any],
  spec: Spec,
  pretrained: Mapping[str, Any],
  theirs: Spec,
  *,
  new_head: bool = True,
) -> Grafted:
  """Replaces the initial variables of a network by those of another, layer by layer.

  Args:
    fresh: The initial variables of `spec`.
    spec: The network to train.
    pretrained: The variables of `theirs`.
    theirs: The network that they were trained in; it may have more layers.
    new_head: Whether to keep the head's initial variables.

  Raises:
    UsageError: A layer other than the head is missing there, computes something else, or has another shape.
  """
  head = spec.head
  mine, other = dict(spec.named_layers()), dict(theirs.named_layers())
  ours, stored = _by_layer(fresh), _by_layer(pretrained)
  if _pixels(theirs) != _pixels(spec):
    raise UsageError(f'the weights expect images with {_pixels(theirs)}, not with {_pixels(spec)}')
  taken: dict[str, Any] = {}
  for name, layer in mine.items():
    if name == head and (new_head or not _fits(ours[name], stored.get(name, {}))):
      continue
    if name not in other or _of_any_size(layer) != _of_any_size(other[name]):
      raise UsageError(
        f'the weights are of another network ({theirs.name}): {name} is {other.get(name, "absent")} there,'
        f' {layer} here'
      )
    if name not in ours:
      continue
    for leaf, value in ours[name].items():
      if np.shape(stored[name][leaf]) != np.shape(value):
        raise UsageError(
          f'{leaf} of the weights has shape {np.shape(stored[name][leaf])}, and'
          f' {np.shape(value)} is needed; only the head may differ (same model.width and model.image_size?)'
        )
    taken |= stored[name]
  flat = traverse_util.flatten_dict(dict(fresh), sep='/', keep_empty_nodes=True) | taken
  loaded = {path.split('/')[1] for path in taken}
  return Grafted(
    variables=traverse_util.unflatten_dict(flat, sep='/'),
    loaded=tuple(name for name in mine if name in loaded),
    new=tuple(name for name in mine if name in ours and name not in loaded),
    left_out=tuple(name for name in other if name in stored and name not in loaded),
  )


def count(variables: Mapping[str, Any], layers: Collection[str]) -> int:
  """Returns the number of the layers' parameters."""
  return sum(leaf.size for name in layers for leaf in jax.tree.leaves(variables['params'].get(name, {})))


def _by_layer(variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns layer -> {'params/conv1/kernel': array, ...}."""
  layers: dict[str, dict[str, Any]] = {}
  for path, value in traverse_util.flatten_dict(dict(variables), sep='/').items():
    layers.setdefault(path.split('/')[1], {})[path] = value
  return layers


def _fits(ours: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
  return {key: np.shape(value) for key, value in ours.items()} == {
    key: np.shape(value) for key, value in stored.items()
  }


def _of_any_size(layer: Any) -> Any:
  """Returns what a layer computes, whatever its number of features, which shows in the shapes."""
  layer = computation(layer)
  return dataclasses.replace(layer, features=None) if hasattr(layer, 'features') else layer


def _pixels(spec: Spec) -> Any:
  return dataclasses.replace(spec.preprocessing, center_crop_share=1.0)
