"""Dissimilarities, their comparison and CKA, against hand calculation and the definitions."""

import itertools
import math

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

from alexnet_flax.errors import UsageError
from alexnet_flax.inference.representations import (
  BetweenRuns,
  bootstrap_interval,
  compare_rdms,
  dissimilarities,
  linear_cka,
  noise_ceiling,
  representation,
  resampled_pairs,
  similarity_between_runs,
)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize('distance', ['correlation', 'cosine'])
def test_dissimilarities_are_scipys(rng, distance):
  features = rng.normal(1, 2, (7, 3, 3, 2)).astype(np.float32)
  expected = pdist(features.reshape(7, -1).astype(float), distance)
  np.testing.assert_allclose(dissimilarities(features, distance), expected, rtol=0, atol=1e-12)


def test_half_floats_do_not_overflow():
  rows = np.array([[6e4, 0, 0], [0, 6e4, 0], [6e4, 6e4, 0]], np.float16)
  np.testing.assert_allclose(dissimilarities(rows, 'cosine'), [1, 1 - 0.5**0.5, 1 - 0.5**0.5])


def tau_a(first, second):
  """By counting all pairs of entries: (concordant - discordant) / pairs."""
  pairs = list(itertools.combinations(range(len(first)), 2))
  signs = [np.sign(first[i] - first[j]) * np.sign(second[i] - second[j]) for i, j in pairs]
  return sum(signs) / len(pairs)


def test_comparisons_by_hand():
  first, second = np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])
  assert compare_rdms(first, second) == pytest.approx(0.5)  # 1 - 6 * (0 + 1 + 1) / (3 * 8)
  assert compare_rdms(first, second, 'kendall') == pytest.approx(1 / 3)
  assert compare_rdms(first, second, 'pearson') == pytest.approx(0.5)
  assert compare_rdms(first, second, 'cosine') == pytest.approx(13 / 14)


def test_taus_denominator_counts_ties(rng):
  first, second = rng.integers(0, 4, (2, 15)).astype(float)
  assert compare_rdms(first, second, 'kendall') == pytest.approx(tau_a(first, second), abs=1e-12)
  assert compare_rdms(first, first, 'kendall') < 0.9


def test_stacks_are_compared_each_with_each(rng):
  first, second = rng.random((2, 10)), rng.random((3, 10))
  for comparison in ('spearman', 'kendall', 'pearson', 'cosine'):
    found = compare_rdms(first, second, comparison)
    assert found.shape == (2, 3)
    assert found[1, 2] == pytest.approx(float(compare_rdms(first[1], second[2], comparison)))
    assert compare_rdms(first[0], second, comparison).shape == (3,)


def test_resampling_leaves_out_pairs_of_one_stimulus(rng):
  rdm = rng.random(math.comb(6, 2))
  square = squareform(rdm)
  for _ in range(20):
    chosen = rng.integers(6, size=6)
    expected = [square[i, j] for i, j in itertools.combinations(chosen, 2) if i != j]
    np.testing.assert_array_equal(np.sort(rdm[resampled_pairs(chosen)]), np.sort(expected))


def test_an_interval_of_unrelated_and_of_related_matrices(rng):
  """With pairs of the same stimulus, whose dissimilarity is 0, unrelated ones would seem related."""
  first, second = (dissimilarities(rng.normal(size=(30, 50))) for _ in range(2))
  low, high = bootstrap_interval(first, second, 'pearson', draws=200)
  assert low < 0 < high < 0.35
  np.testing.assert_array_equal(bootstrap_interval(first, second, 'pearson', draws=200), [low, high])
  near = first + rng.normal(0, 0.01, first.shape)
  ends = bootstrap_interval(np.stack([first, near]), near[None], draws=50)
  assert ends.shape == (2, 2, 1)
  assert (ends[:, 0] > 0.9).all()
  np.testing.assert_allclose(ends[:, 1], 1)
  wide = bootstrap_interval(first, near, level=0.99, draws=50)
  assert wide[0] < bootstrap_interval(first, near, level=0.5, draws=50)[0]


def test_a_noise_ceiling_by_hand():
  """Of two matrices each is all that is left of the other; the mean of both has the ranks 1, 2.5, 2.5."""
  rdms = np.array([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]])
  lower, upper = noise_ceiling(rdms)
  assert lower == pytest.approx(0.5)
  assert upper == pytest.approx(3**0.5 / 2)  # of 1, 2, 3 and 1, 2.5, 2.5


def test_a_noise_ceiling_has_the_truth_between_its_bounds(rng):
  truth = rng.random(math.comb(20, 2))
  subjects = truth + rng.normal(0, 0.5, (8, len(truth)))
  for comparison in ('spearman', 'kendall', 'pearson', 'cosine'):
    lower, upper = noise_ceiling(subjects, comparison)
    assert lower < compare_rdms(truth, subjects, comparison).mean() < upper


def hsic(first, second):
  """Gretton et al. 2005, by explicit centring matrices, but for a factor."""
  centring = np.eye(len(first)) - 1 / len(first)
  grams = [x @ x.T for x in (first, second)]
  return np.trace(grams[0] @ centring @ grams[1] @ centring)


def unbiased_hsic(first, second):
  """Song et al. 2012, equation 5."""
  n, one = len(first), np.ones(len(first))
  k, l = (gram - np.diag(np.diag(gram)) for gram in (first @ first.T, second @ second.T))  # noqa: E741
  total = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
  return (np.trace(k @ l) + total - 2 / (n - 2) * one @ k @ l @ one) / (n * (n - 3))


@pytest.mark.parametrize(('debiased', 'of'), [(False, hsic), (True, unbiased_hsic)])
def test_cka_is_a_ratio_of_hsics(rng, debiased, of):
  first = rng.normal(3, 1, (12, 5))
  second = first @ rng.normal(size=(5, 8)) + rng.normal(size=(12, 8))
  expected = of(first, second) / math.sqrt(of(first, first) * of(second, second))
  assert linear_cka(first, second, debiased=debiased) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('debiased', [False, True])
def test_what_cka_does_not_see(rng, debiased):
  first, second = rng.normal(size=(20, 6)), rng.normal(size=(20, 9))
  turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  value = linear_cka(first, second, debiased=debiased)
  for changed in (first @ turn, 7 * first, first + rng.normal(size=6)):
    assert linear_cka(changed, second, debiased=debiased) == pytest.approx(value, abs=1e-12)
  assert linear_cka(first, -3 * first @ turn + 1, debiased=debiased) == pytest.approx(1)
  assert linear_cka(first * np.arange(1, 7), second, debiased=debiased) != pytest.approx(value, abs=1e-3)


def test_independent_features(rng):
  """More features than stimuli: biased, everything is similar."""
  pairs = rng.normal(size=(20, 2, 30, 500))
  assert np.mean([linear_cka(*pair) for pair in pairs]) > 0.9
  assert abs(np.mean([linear_cka(*pair, debiased=True) for pair in pairs])) < 0.02


def test_similarity_between_runs(rng):
  common, own = rng.normal(size=(10, 30)), rng.normal(size=(3, 10, 30))
  runs = [{'relu1': common, 'fc7': common + noise} for noise in own]
  for measure in ('rsa-spearman', 'cka'):
    found = similarity_between_runs(runs, measure)
    assert list(found) == ['relu1', 'fc7']
    assert found['relu1'] == pytest.approx(BetweenRuns(1, 0, 3))
    vectors = [representation(run['fc7'], measure) for run in runs]
    comparison = 'spearman' if measure == 'rsa-spearman' else 'cosine'
    values = [float(compare_rdms(*pair, comparison)) for pair in itertools.combinations(vectors, 2)]
    assert found['fc7'] == pytest.approx(BetweenRuns(np.mean(values), np.std(values, ddof=1), 3))
  assert math.isnan(similarity_between_runs(runs[:2])['fc7'].deviation)


ROWS = np.eye(5) + np.arange(5.0)[:, None] * np.arange(5)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: dissimilarities(ROWS, 'cosin'), "unknown distance 'cosin'; did you mean 'cosine'?"),
    (lambda: dissimilarities(np.ones((3, 4))), 'of row 0, row 1, row 2 are all equal: the corr'),
    (
      lambda: dissimilarities(np.diag([1.0, 0, 2]), 'cosine', names=['a', 'b', 'c']),
      'the activations of b are all 0: the cosine distance is undefined',
    ),
    (lambda: dissimilarities(ROWS[:1]), '1 stimulus is too few; 2 are the least'),
    (lambda: dissimilarities(np.where(ROWS > 9, np.nan, ROWS)), 'of row 3, row 4 are NaN or infinite'),
    (lambda: dissimilarities(np.ones(3)), r'\(of shape \[3\], float64\) must be numbers \[N, ...\]'),
    (lambda: dissimilarities(np.array([['a']])), 'must be numbers'),
    (lambda: representation(ROWS, 'ck'), "unknown measure 'ck'; did you mean 'cka'?"),
    (lambda: representation(ROWS[:2], 'rsa-cosine'), '2 stimuli are too few; 3 are the least'),
    (lambda: representation(np.eye(4), 'rsa-spearman'), 'equally dissimilar: rsa-spearman is undefined'),
    (lambda: representation(np.eye(4), 'cka-debiased'), 'equally dissimilar: cka-debiased is undefined'),
    (lambda: linear_cka(ROWS[:3], ROWS[:3], debiased=True), '3 stimuli are too few; 4 are the least'),
    (lambda: linear_cka(np.ones((5, 2)), ROWS), 'all stimuli are the same: there is nothing to compare'),
    (lambda: linear_cka(ROWS, ROWS[:4]), 'different numbers of stimuli: 5 and 4'),
    (lambda: compare_rdms(np.arange(3), np.arange(3), 'kendal'), "unknown comparison 'kendal'"),
    (lambda: compare_rdms(np.arange(3), np.arange(6)), r'\(of shapes \[3\] and \[6\]\) must be condensed'),
    (lambda: compare_rdms(np.arange(3), np.ones(3), 'kendall'), 'whose entries are all equal'),
    (lambda: compare_rdms(np.arange(3), [1, 2, math.nan]), 'dissimilarities are NaN or infinite'),
    (lambda: bootstrap_interval(np.ones(1), np.ones(1)), '2 stimuli are too few; 3 are the least'),
    (lambda: noise_ceiling(np.arange(3)), 'needs at least two'),
    (lambda: similarity_between_runs([{'fc7': ROWS}]), 'at least two'),
    (lambda: similarity_between_runs([{'fc7': ROWS}, {}]), 'run 1 has no layer fc7'),
    (lambda: similarity_between_runs([{'a': ROWS}, {'a': ROWS[1:]}]), r'a: .* numbers of stimuli: \[4, 5\]'),
    (lambda: similarity_between_runs([{'a': np.ones((5, 2))}] * 2), 'a: the activations of row 0'),
  ],
)  # fmt: skip
def test_mistakes(call, message):
  with pytest.raises(UsageError, match=message):
    call()
