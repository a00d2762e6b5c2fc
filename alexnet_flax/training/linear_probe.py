"""A linear probe: computes the features of every image once, and trains the head alone on them."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils

from alexnet_flax.data import sampling
from alexnet_flax.data.augment import normalize
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.steps import Batch


class Head(nn.Module):
  """A network's head alone, on features [B, D]; it takes the variables of the whole network.

  Attributes:
    head: The head's name, such as 'fc8'.
    num_classes: The length of the logits.
  """

  head: str
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


def compute_features(model: AlexNet, variables: Any, batches: Iterable[Batch]) -> FeatureSet:
  """Computes the head's input for each image, in evaluation mode.

  Args:
    model: The network.
    variables: Its variables.
    batches: 'image' uint8 [B, S, S, 3], 'label' [B], and 'weight' [B], 0 for padding.
  """
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


def train_batches(
  feature_set: FeatureSet, *, seed: int, batch_size: int, first_step: int, last_step: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the batches of steps `first_step` ... `last_step` - 1, in the order of all training."""
  for step in range(first_step, last_step):
    chosen = sampling.batch_indices(seed, step, batch_size, len(feature_set.labels))
    yield _batch(feature_set, chosen, np.ones(batch_size, np.float32))


def eval_batches(feature_set: FeatureSet, *, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
  """Yields every example once; the last batch is padded with examples of weight 0."""
  count = len(feature_set.labels)
  for start in range(0, count, batch_size):
    numbers = np.arange(start, start + batch_size)
    yield _batch(feature_set, np.minimum(numbers, count - 1), (numbers < count).astype(np.float32))


def _batch(feature_set: FeatureSet, chosen: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
  return {
    'image': feature_set.features[chosen],
    'label': feature_set.labels[chosen],
    'weight': weight,
    'index': chosen,
  }
