"""Metrics of predictions: accuracy with its interval, calibration error, confusion matrix."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CALIBRATION_BINS = 15


class Estimate(NamedTuple):
  """A mean over images with its 95 % confidence interval."""

  value: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Predictions for N images.

  Attributes:
    top_classes: int [N, K], the K most probable classes, most probable first.
    probabilities: float [N, K], their probabilities.
    losses: float [N], negative log probability of the label, in nats.
    correct_classes: The classes that count as correct for each image. The first one is its label.
    indices: int [N], the images' indices in the data set. Images without a label are not included.
    log_probabilities: float [N, C], of all classes, if they were kept.
  """

  top_classes: np.ndarray
  probabilities: np.ndarray
  losses: np.ndarray
  correct_classes: Sequence[tuple[int, ...]]
  indices: np.ndarray
  log_probabilities: np.ndarray | None = None

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """int [N]."""
    return np.array([classes[0] for classes in self.correct_classes], np.int64)

  @functools.cached_property
  def hits(self) -> np.ndarray:
    """bool [N, K], whether each predicted class is correct."""
    pairs = zip(self.top_classes, self.correct_classes, strict=True)
    return np.array([np.isin(top, classes) for top, classes in pairs]).reshape(self.top_classes.shape)

  def top_k(self, k: int) -> Estimate:
    """Top-k accuracy."""
    return proportion(int(self.hits[:, :k].any(axis=1).sum()), len(self.hits))

  def mean_loss(self) -> Estimate:
    """The mean loss, in nats."""
    mean = float(np.mean(self.losses, dtype=np.float64))
    error = float(np.std(self.losses, dtype=np.float64)) / math.sqrt(len(self.losses))
    return Estimate(mean, mean - 1.96 * error, mean + 1.96 * error)

  def calibration_error(self) -> float:
    """Expected calibration error of the top-1 predictions (Guo et al. 2017, equation 5), 15 equal bins.

    The mean distance between confidence and accuracy, with each bin weighted by its number of images.
    """
    _, confidence, correct = map(np.array, self.calibration_bins().values())
    return float(np.abs(correct - confidence).sum() / len(self.hits))

  def calibration_bins(self) -> dict[str, list[float]]:
    """Returns sums over the images of each of 15 equal bins: of 'images', 'confidence' and 'correct'."""
    confidence, hit = self.probabilities[:, 0].astype(np.float64), self.hits[:, 0]
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    sums = {'images': np.ones(len(hit)), 'confidence': confidence, 'correct': hit}
    return {name: np.bincount(bins, one, CALIBRATION_BINS).tolist() for name, one in sums.items()}

  def confusion(self, num_classes: int) -> np.ndarray:
    """Confusion matrix, int [C, C]: rows are labels, columns top-1 predictions.

    A top-1 prediction that is correct, but not the label, counts as the label.
    """
    predicted = np.where(self.hits[:, 0], self.labels, self.top_classes[:, 0])
    pairs = np.bincount(self.labels * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def proportion(hits: int, total: int) -> Estimate:
  """A proportion with its 95 % Wilson score interval (Wilson 1927), which also holds near 0 and 1.

  >>> [round(x, 4) for x in proportion(9, 10)]
  [0.9, 0.5958, 0.9821]
  """
  from scipy.stats import binomtest

  interval = binomtest(hits, total).proportion_ci(method='wilson')
  return Estimate(hits / total, float(interval.low), float(interval.high))


def most_confused(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
  """The most frequent errors, most frequent first: (label, predicted class, number of images)."""
  errors = confusion - np.diag(np.diag(confusion))
  order = np.argsort(-errors, axis=None, kind='stable')[:count]
  rows, columns = np.unravel_index(order, errors.shape)
  found = zip(rows.tolist(), columns.tolist(), errors[rows, columns].tolist(), strict=True)
  return [(label, predicted, images) for label, predicted, images in found if images]
