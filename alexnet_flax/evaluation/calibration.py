"""Temperature scaling (Guo et al. 2017): one number, fitted on other images, that calibrates predictions.

Logits are divided by a temperature T. The mean of several networks or crops has no logits; its log
probabilities take their place: an average is calibrated after averaging, as Rahaman and Thiery (2021,
arXiv:2007.08792) find it should be. For one network and one crop that is the same, as log probabilities are
logits less a constant. The order of the classes, and so accuracy, does not change.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

from alexnet_flax.data.source import Source
from alexnet_flax.errors import UsageError
from alexnet_flax.evaluation.scores import Predictions

HALVES = 'halves'
_RANGE = 0.01, 100.0
_AT_ONCE = 4096  # images


def fit_temperature(log_probabilities: np.ndarray, labels: np.ndarray, what: str = 'these images') -> float:
  """Returns the temperature that minimizes the mean loss.

  The loss is convex in 1/T, and its derivative the mean of the expected log probability less the label's.

  Args:
    log_probabilities: float [N, C]; -inf for classes that cannot be predicted. Logits do as well.
    labels: int [N].
    what: The name of the images, for messages.

  Raises:
    UsageError: A label's class cannot be predicted, or no temperature from 0.01 to 100 is best, as when all
      images are classified correctly.
  """
  at_labels = log_probabilities[np.arange(len(labels)), labels]
  if impossible := int(np.isneginf(at_labels).sum()):
    raise UsageError(f'{what}: {impossible} images are of classes that cannot be predicted; fit on others')

  def slope(inverse: float) -> float:
    total = 0.0
    for rows in np.array_split(log_probabilities, range(_AT_ONCE, len(labels), _AT_ONCE)):
      values = rows.astype(np.float64)
      shares = softmax(inverse * values, axis=1)
      total += float((shares * np.where(shares > 0, values, 0.0)).sum())
    return total / len(labels) - float(at_labels.mean(dtype=np.float64))

  low, high = _RANGE
  if not slope(1 / high) < 0 < slope(1 / low):
    right = np.mean(at_labels >= log_probabilities.max(axis=1))
    reason = f'none from {low} to {high:g} is best, with {right:.0%} of {len(labels):,} images right'
    raise UsageError(f'no temperature can be fitted to {what}: {reason}; fit on other images')
  return 1 / brentq(slope, 1 / high, 1 / low, xtol=1e-12)


def scaled(predictions: Predictions, temperatures: np.ndarray) -> Predictions:
  """Returns predictions at temperatures, float [N], one for each image; the classes stay in their order.

  `predictions` must have the log probabilities of all classes.
  """
  assert predictions.log_probabilities is not None
  probabilities, losses = [], []
  for start in range(0, len(temperatures), _AT_ONCE):
    rows = slice(start, start + _AT_ONCE)
    values = log_softmax(predictions.log_probabilities[rows] / temperatures[rows, None], axis=1)
    probabilities.append(np.exp(np.take_along_axis(values, predictions.top_classes[rows], 1)))
    losses.append(-values[np.arange(len(values)), predictions.labels[rows]])
  return dataclasses.replace(
    predictions,
    probabilities=np.concatenate(probabilities),
    losses=np.concatenate(losses),
    log_probabilities=None,
  )


def scale_by(fitted: Predictions, name: str, predictions: Predictions) -> dict[str, Any]:
  """Returns figures of predictions at the temperature that is fitted on others, of images called `name`.

  'loss' and 'calibration_...' are at 'temperatures'; 'fitted_on' and 'images' say where those are from. All
  predictions must have the log probabilities of all classes. Raises the errors of `fit_temperature`.
  """
  temperature = _temperature(fitted, np.arange(len(fitted.labels)), name)
  after = scaled(predictions, np.full(len(predictions.labels), temperature))
  return _figures(after, [temperature], name, len(fitted.labels))


def scale_by_halves(predictions: Predictions, name: str) -> dict[str, Any]:
  """Returns the same figures with each half, every second image, at the temperature of the other half."""
  halves = [np.arange(half, len(predictions.labels), 2) for half in (0, 1)]
  if not len(halves[1]):
    raise UsageError(f'{name} has one image; halves need two or more')
  fitted = [_temperature(predictions, half, f'a half of {name}') for half in halves]
  temperatures = np.empty(len(predictions.labels))
  for half, temperature in zip(halves, reversed(fitted), strict=True):
    temperatures[half] = temperature
  after = scaled(predictions, temperatures)
  return _figures(after, fitted, f'the other half of {name}', len(halves[1]))


def _temperature(predictions: Predictions, rows: np.ndarray, name: str) -> float:
  assert predictions.log_probabilities is not None
  return fit_temperature(predictions.log_probabilities[rows], predictions.labels[rows], name)


def _figures(after: Predictions, temperatures: list[float], name: str, images: int) -> dict[str, Any]:
  return {
    'fitted_on': name,
    'images': images,
    'temperatures': temperatures,
    'loss': after.mean_loss()._asdict(),
    'calibration_error': after.calibration_error(),
    'calibration_bins': after.calibration_bins(),
  }


def require_other_images(fitted: Source, evaluated: Source) -> None:
  """Raises UsageError if two splits share an image, by their parts, or of two data sets by file names."""
  if fitted.folder == evaluated.folder:
    pairs = ((one, other) for one in fitted.parts for other in evaluated.parts if one[0] == other[0])
    shared = sum(max(0, min(one[2], other[2]) - max(one[1], other[1])) for one, other in pairs)
  else:
    ours, theirs = ({example.name for example in one.scan_all()} - {''} for one in (fitted, evaluated))
    shared = len(ours & theirs)
  if shared:
    what = f'--calibrate: {fitted.name} has {shared:,} of the images that are evaluated, {evaluated.name}'
    advice = f"fit on others, such as test[:50%] for test[50%:], or give '{HALVES}'"
    raise UsageError(f'{what}; {advice}')
