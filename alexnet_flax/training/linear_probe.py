"""A linear probe: computes the features of every image once, and trains the head alone on them."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils

from alexnet_flax.data.augment import normalize
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.steps import Batch


class Head(nn.Module):
  """A network's head alone, on features [B, D]; it takes the variables of the whole network."""

  head: str  # its name, such as 'fc8'
  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
    del train
    return nn.Dense(self.num_classes, name=self.head)(features)


@dataclasses.dataclass(frozen=True)
class FeatureSet:
  """The head's inputs for a split, float32 [N, D], and the labels, int32 [N]."""

  features: np.ndarray
  labels: np.ndarray

  def batch(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Returns this process's share of the batch of some examples; those past the end have weight 0."""
    mine = np.split(chosen, jax.process_count())[jax.process_index()]
    weight, rows = (mine < len(self.labels)).astype(np.float32), np.minimum(mine, len(self.labels) - 1)
    return {'image': self.features[rows], 'label': self.labels[rows], 'weight': weight, 'index': rows}


@functools.cache
def head_of(name: str, num_classes: int) -> Head:
  """Returns one and the same module for the same arguments, so that states of several seeds are alike."""
  return Head(name, num_classes)


def compute_features(model: AlexNet, variables: Any, batches: Iterable[Batch]) -> FeatureSet:
  """Computes the head's input for each image, uint8 [B, S, S, 3], in evaluation mode; weight 0 is padding."""
  last = model.spec.named_layers()[-2][0]

  @jax.jit
  def head_input(variables: Any, batch: Batch) -> jax.Array:
    images = normalize(batch, preprocessing=model.spec.preprocessing)['image']
    return model.apply(variables, images, train=False, endpoints=True)[1][last].astype(np.float32)

  features, labels = [], []
  for batch in batches:
    seen = head_input(variables, batch), batch['label'], batch['weight']
    rows, classes, weights = (multihost_utils.process_allgather(x, tiled=True) for x in seen)
    features.append(rows[weights > 0])
    labels.append(classes[weights > 0])
  return FeatureSet(np.concatenate(features), np.concatenate(labels))
