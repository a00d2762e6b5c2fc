"""Starting from what another run has learned: what is taken over, what is new, what stays as it is."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util

from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Spec
from alexnet_flax.models.surgery import computation


@dataclasses.dataclass(frozen=True)
class Grafted:
  """Variables of a network, some of which come from another.

  Attributes:
    variables: {'params', 'batch_stats'}.
    loaded, new: layers with variables that were taken over, or not.
    left_out: the other network's layers that have no place here.
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
  """The fresh variables of a network with those of another in their place, layer by layer.

  Args:
    fresh: variables of `spec`, as initialised.
    spec: the network to train.
    pretrained: variables of `theirs`.
    theirs: the network they were trained in; it may have more layers.
    new_head: leave the head as it was initialised.

  Raises:
    UsageError: a layer is missing there, or computes something else, or a shape does not fit; all but
      the head must.
  """
  head = list(spec.named_layers())[-1][0]
  mine, other = dict(spec.named_layers()), dict(theirs.named_layers())
  ours, stored = _by_layer(fresh), _by_layer(pretrained)
  if _pixels(theirs) != _pixels(spec):
    raise UsageError(f'the weights take images with {_pixels(theirs)}, and not with {_pixels(spec)}')
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
  flat = traverse_util.flatten_dict(dict(fresh), sep='/') | taken
  loaded = {path.split('/')[1] for path in taken}
  return Grafted(
    variables=traverse_util.unflatten_dict(flat, sep='/'),
    loaded=tuple(name for name in mine if name in loaded),
    new=tuple(name for name in mine if name in ours and name not in loaded),
    left_out=tuple(name for name in other if name in stored and name not in loaded),
  )


def freeze(tx: optax.GradientTransformation, layers: Collection[str]) -> optax.GradientTransformation:
  """The optimiser that leaves the parameters of some layers as they are, and keeps no state for them.

  Norms of gradients, for clipping, are those of the other layers alone.
  """
  if not layers:
    return tx

  def labels(params: Any) -> Any:
    return {name: 'frozen' if name in layers else 'trained' for name in params}

  return optax.partition({'trained': tx, 'frozen': optax.set_to_zero()}, labels)


class Head(nn.Module):
  """A network's head alone, on features [B, D]; it takes the whole network's variables.

  Attributes:
    head: its name, such as 'fc8'.
    num_classes: length of the logits.
  """

  head: str
  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
    del train
    return nn.Dense(self.num_classes, name=self.head)(features)


def count(variables: Mapping[str, Any], layers: Collection[str]) -> int:
  """How many parameters the layers have."""
  return sum(leaf.size for name in layers for leaf in jax.tree.leaves(variables['params'].get(name, {})))


def _by_layer(variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Layer -> {'params/conv1/kernel': array, ...}."""
  layers: dict[str, dict[str, Any]] = {}
  for path, value in traverse_util.flatten_dict(dict(variables), sep='/').items():
    layers.setdefault(path.split('/')[1], {})[path] = value
  return layers


def _fits(ours: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
  return {key: np.shape(value) for key, value in ours.items()} == {
    key: np.shape(value) for key, value in stored.items()
  }


def _of_any_size(layer: Any) -> Any:
  """What a layer computes; its number of features shows in the shapes."""
  layer = computation(layer)
  return dataclasses.replace(layer, features=None) if hasattr(layer, 'features') else layer


def _pixels(spec: Spec) -> Any:
  return dataclasses.replace(spec.preprocessing, center_crop_share=1.0)
