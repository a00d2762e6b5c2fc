"""Metrics of predictions against other programs and plain loops."""

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import norm
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

from alexnet_flax.evaluation.scores import Predictions, most_confused, proportion


def predictions(count=500, classes=7, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, count)
  logits = rng.normal(size=(count, classes))
  logits[np.arange(count), labels] += rng.choice([0, 2], count)
  probabilities = softmax(logits, axis=1)
  best = np.argsort(-probabilities, axis=1)[:, :5]
  found = Predictions(
    best,
    np.take_along_axis(probabilities, best, 1),
    -np.log(probabilities[np.arange(count), labels]),
    [(label,) for label in labels],
    np.arange(count),
  )
  return found, probabilities, labels


def test_accuracy_loss_and_confusion_are_scikit_learns():
  found, probabilities, labels = predictions()
  for count in (1, 3, 5):
    assert found.top_k(count).value == pytest.approx(top_k_accuracy_score(labels, probabilities, k=count))
  assert found.mean_loss().value == pytest.approx(log_loss(labels, probabilities))
  expected = confusion_matrix(labels, probabilities.argmax(1))
  np.testing.assert_array_equal(found.confusion(7), expected)


def test_calibration_error_is_a_loop_over_bins():
  found, probabilities, labels = predictions(2000)
  confidence, hit = probabilities.max(1), probabilities.argmax(1) == labels
  total = 0.0
  for low in np.arange(15) / 15:
    inside = (confidence >= low) & (confidence < low + 1 / 15)
    if inside.any():
      total += abs(hit[inside].mean() - confidence[inside].mean()) * inside.sum()
  assert found.calibration_error() == pytest.approx(total / 2000, rel=1e-6)
  assert found.calibration_error() > 0.01


def test_calibration_error_of_certain_predictions():
  sure = Predictions(np.array([[1], [0]]), np.ones((2, 1)), np.zeros(2), [(1,), (0,)], np.arange(2))
  assert sure.calibration_error() == 0
  wrong = Predictions(np.array([[1], [1]]), np.ones((2, 1)), np.zeros(2), [(0,), (0,)], np.arange(2))
  assert wrong.calibration_error() == 1


@pytest.mark.parametrize(('hits', 'total'), [(0, 10), (7, 10), (50, 50), (28261, 50000)])
def test_wilson_interval(hits, total):
  z, share = norm.ppf(0.975), hits / total
  center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
  half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
  found = proportion(hits, total)
  np.testing.assert_allclose((found.low, found.high), (center - half, center + half), atol=1e-9)


def test_intervals_have_the_stated_coverage():
  rng = np.random.default_rng(1)
  inside = [proportion(int(rng.binomial(200, 0.1)), 200) for _ in range(500)]
  share = np.mean([one.low <= 0.1 <= one.high for one in inside])
  assert 0.92 <= share <= 0.98
  losses = [predictions(200, seed=seed)[0].mean_loss() for seed in range(300)]
  truth = predictions(200_000, seed=1000)[0].mean_loss().value
  assert 0.90 <= np.mean([one.low <= truth <= one.high for one in losses]) <= 0.99


def test_any_of_several_correct_classes_counts():
  best = np.array([[2, 0], [1, 0], [0, 1]])
  found = Predictions(best, np.full((3, 2), 0.5), np.zeros(3), [(0, 2), (0,), (2, 3)], np.arange(3))
  assert found.hits.tolist() == [[True, True], [False, True], [False, False]]
  assert found.top_k(1).value == pytest.approx(1 / 3)
  assert found.confusion(4)[0].tolist() == [1, 1, 0, 0]  # class 2 is as correct as the label 0


def test_most_frequent_errors():
  confusion = np.array([[9, 2, 0], [5, 7, 0], [0, 0, 3]])
  assert most_confused(confusion, 5) == [(1, 0, 5), (0, 1, 2)]
  assert most_confused(np.eye(3, dtype=int), 5) == []
