"""A linear probe: the features of every image once, then steps of the head alone on them."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alexnet_flax.data import sampling
from alexnet_flax.data.augment import normalize
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.steps import Batch


@dataclasses.dataclass(frozen=True)
class FeatureSet:
  """What the head is to see of a split: float32 [N, D], and int32 [N]."""

  features: np.ndarray
  labels: np.ndarray


def compute_features(model: AlexNet, variables: Any, batches: Iterable[Batch]) -> FeatureSet:
  """What the head sees of each image, in evaluation.

  Args:
    model: the network.
    variables: its variables.
    batches: 'image' uint8 [B, S, S, 3], 'label' [B], and 'weight' [B], 0 for what fills up a batch.
  """
  last = list(model.spec.named_layers())[-2][0]

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
  """The batches of steps `first_step` ... `last_step` - 1, in the order of all training."""
  for step in range(first_step, last_step):
    chosen = sampling.batch_indices(seed, step, batch_size, len(feature_set.labels))
    yield _batch(feature_set, chosen, np.ones(batch_size, np.float32))


def eval_batches(feature_set: FeatureSet, *, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
  """Every example once; the last batch is filled up with examples of weight 0."""
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
