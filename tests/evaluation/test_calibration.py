"""Temperature scaling against scikit-learn, and by its definition."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from alexnet_flax.errors import UsageError
from alexnet_flax.evaluation.calibration import fit_temperature, scaled
from alexnet_flax.evaluation.scores import Predictions


def drawn(count, classes, temperature, seed=0):
  """Logits, and labels drawn from their softmax at a temperature."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 3, (count, classes)).astype(np.float32)
  noise = rng.gumbel(size=logits.shape)
  return logits, (logits / temperature + noise).argmax(1)


def test_two_classes_are_a_logistic_regression():
  """Its one coefficient, of the difference of the logits, is 1/T."""
  logits, labels = drawn(1000, 2, 2.5)
  difference = (logits[:, 1] - logits[:, 0]).astype(np.float64)[:, None]
  fitted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(difference, labels)
  assert fit_temperature(logits, labels) == pytest.approx(1 / fitted.coef_.item(), rel=1e-6)


@pytest.mark.parametrize('temperature', [0.3, 1.0, 4.0])
def test_the_temperature_of_the_labels_is_found(temperature):
  logits, labels = drawn(20_000, 10, temperature)
  found = fit_temperature(logits, labels)
  assert found == pytest.approx(temperature, rel=0.03)
  assert fit_temperature(logits + np.float32(100), labels) == pytest.approx(found, rel=1e-4)

  def loss(value):
    return -np.log(softmax(logits.astype(np.float64) / value, axis=1)[np.arange(20_000), labels]).mean()

  assert loss(found) < min(loss(0.999 * found), loss(1.001 * found))


def test_classes_that_cannot_be_predicted():
  logits, labels = drawn(500, 5, 2.0)
  wider = np.concatenate([logits, np.full((500, 3), -np.inf, np.float32)], axis=1)
  assert fit_temperature(wider, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-9)
  with pytest.raises(UsageError, match='2 images are of classes that cannot be predicted'):
    fit_temperature(wider, np.array([6, 7, *labels[2:]]))


def test_images_that_determine_no_temperature():
  logits = np.eye(4, dtype=np.float32)
  with pytest.raises(UsageError, match=r'fitted to the set: none .* with 100% of 4 images right'):
    fit_temperature(logits, np.arange(4), 'the set')
  with pytest.raises(UsageError, match=' 0% of 4 images right; fit on other images'):
    fit_temperature(logits, (np.arange(4) + 1) % 4)


def test_each_image_at_its_own_temperature():
  logits, labels = drawn(6, 4, 1.0)
  temperatures = np.array([0.5, 1, 2, 3, 4, 5])
  best = np.argsort(-logits, axis=1)[:, :2]
  blank = np.zeros(6), [(label,) for label in labels], np.arange(6), logits
  found = scaled(Predictions(best, np.zeros((6, 2)), *blank), temperatures)
  for row in range(6):
    expected = softmax(logits[row].astype(np.float64) / temperatures[row])
    np.testing.assert_allclose(found.probabilities[row], expected[best[row]], rtol=1e-6)
    assert found.losses[row] == pytest.approx(-np.log(expected[labels[row]]), rel=1e-6)
  np.testing.assert_array_equal(found.top_classes, best)
