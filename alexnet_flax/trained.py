"""A trained network with all that is needed to ask it: variables, classes, where it comes from."""

import dataclasses
import functools
from typing import Any

import jax

from alexnet_flax.class_names import class_names, readable
from alexnet_flax.model import AlexNet
from alexnet_flax.naming import head_name
from alexnet_flax.pretrained import load_variant
from alexnet_flax.specs import Spec


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained network.

  Attributes:
    source: the run's folder, file, URL or name it was loaded from.
    model: the network.
    variables: {'params', 'batch_stats'}.
    class_names: of its logits, as the data set has them.
  """

  source: str
  model: AlexNet
  variables: dict[str, Any]
  class_names: tuple[str, ...]

  @property
  def spec(self) -> Spec:
    """Of the network."""
    return self.model.spec

  @property
  def num_parameters(self) -> int:
    """How many parameters it has; statistics are none."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.variables['params']))

  @functools.cached_property
  def readable_names(self) -> tuple[str, ...]:
    """The classes for people."""
    return readable(self.class_names)


def load_trained(
  source: str, variant: str | None = None, width: float = 1.0, image_size: int | None = None
) -> Trained:
  """Loads a trained network; arguments and errors as for `pretrained.load_variant`."""
  return trained(source, *load_variant(source, variant, width, image_size))


def trained(source: str, spec: Spec, variables: dict[str, Any]) -> Trained:
  """A network whose variables are at hand; its head has as many classes as they say."""
  num_classes = variables['params'][head_name(spec)]['bias'].shape[0]
  return Trained(source, AlexNet(spec, num_classes), variables, class_names(source, num_classes))
