"""Scores of answers to images: accuracy and its interval, calibration, confusion. NumPy alone."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CALIBRATION_BINS = 15


class Estimate(NamedTuple):
  """A mean over images, and its 95 % interval."""

  value: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Answers:
  """What was answered to N images.

  Attributes:
    best: int [N, K], the K most probable classes, most probable first.
    probabilities: float [N, K], of those.
    losses: float [N], -log of the right class's probability, in nats.
    right: of each image the right class, or all that count as right, of which the first is its label.
    numbers: int [N], of the images in their data set; those without a label are not among them.
  """

  best: np.ndarray
  probabilities: np.ndarray
  losses: np.ndarray
  right: Sequence[tuple[int, ...]]
  numbers: np.ndarray

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """int [N]."""
    return np.array([classes[0] for classes in self.right], np.int64)

  @functools.cached_property
  def hits(self) -> np.ndarray:
    """bool [N, K], which answers are right."""
    return np.array(
      [np.isin(best, classes) for best, classes in zip(self.best, self.right, strict=True)]
    ).reshape(self.best.shape)

  def top(self, count: int) -> Estimate:
    """The share of images of which one of the `count` best answers is right."""
    return proportion(int(self.hits[:, :count].any(axis=1).sum()), len(self.hits))

  def loss(self) -> Estimate:
    """The mean loss, in nats."""
    mean = float(np.mean(self.losses, dtype=np.float64))
    error = float(np.std(self.losses, dtype=np.float64)) / math.sqrt(len(self.losses))
    return Estimate(mean, mean - 1.96 * error, mean + 1.96 * error)

  def calibration_error(self) -> float:
    """Expected calibration error of the first answers (Guo et al. 2017, equation 5), 15 equal bins.

    The mean distance between confidence and accuracy, each bin weighted by its images.
    """
    confidence, hit = self.probabilities[:, 0], self.hits[:, 0]
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=hit - confidence.astype(np.float64), minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(hit))

  def per_class(self, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each class how many images there are, and of how many the first answer is right: int [C]."""
    return (
      np.bincount(self.labels, minlength=num_classes),
      np.bincount(self.labels[self.hits[:, 0]], minlength=num_classes),
    )

  def confusion(self, num_classes: int) -> np.ndarray:
    """int [C, C]: how many images of the row's class were taken for the column's.

    An image whose first answer is one of several right ones counts as answered by its label.
    """
    answers = np.where(self.hits[:, 0], self.labels, self.best[:, 0])
    pairs = np.bincount(self.labels * num_classes + answers, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def proportion(hits: int, total: int) -> Estimate:
  """A share and its 95 % interval by Wilson (1927), which holds near 0 and 1 too.

  >>> [round(x, 4) for x in proportion(9, 10)]
  [0.9, 0.5958, 0.9821]
  """
  from scipy.stats import binomtest

  interval = binomtest(hits, total).proportion_ci(method='wilson')
  return Estimate(hits / total, float(interval.low), float(interval.high))


def most_confused(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
  """The most frequent mistakes: (label, answer, images), most frequent first."""
  mistakes = confusion - np.diag(np.diag(confusion))
  order = np.argsort(-mistakes, axis=None, kind='stable')[:count]
  rows, columns = np.unravel_index(order, mistakes.shape)
  found = zip(rows.tolist(), columns.tolist(), mistakes[rows, columns].tolist(), strict=True)
  return [(label, answer, images) for label, answer, images in found if images]
