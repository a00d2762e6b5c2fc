"""rsatoolbox: dissimilarities, their comparison, resampling and noise ceilings."""

import numpy as np
import pytest

from alexnet_flax.inference.representations import (
  compare_rdms,
  dissimilarities,
  noise_ceiling,
  resampled_pairs,
)

rsatoolbox = pytest.importorskip('rsatoolbox', reason='rsatoolbox is not installed')

METHODS = {'spearman': 'spearman', 'kendall': 'tau-a', 'pearson': 'corr', 'cosine': 'cosine'}
pytestmark = pytest.mark.filterwarnings('ignore:Noise ceiling for tau')


@pytest.fixture(scope='module')
def subjects():
  """Features of 15 stimuli for six subjects, float64 [6, 15, 40]."""
  rng = np.random.default_rng(0)
  return rng.normal(size=(15, 40)) + rng.normal(0, 2, (6, 15, 40))


@pytest.fixture(scope='module')
def rdms(subjects):
  return np.stack([dissimilarities(features) for features in subjects])


def test_correlation_distances(subjects, rdms):
  theirs = rsatoolbox.rdm.calc_rdm([rsatoolbox.data.Dataset(x) for x in subjects], 'correlation')
  np.testing.assert_allclose(rdms, theirs.dissimilarities, rtol=0, atol=1e-6)


@pytest.mark.parametrize('comparison', METHODS)
@pytest.mark.parametrize('ties', [False, True])
def test_comparisons(rdms, comparison, ties):
  matrices = rdms.round(1) if ties else rdms
  theirs = rsatoolbox.rdm.RDMs(matrices)
  expected = rsatoolbox.rdm.compare(theirs, theirs, METHODS[comparison])
  np.testing.assert_allclose(compare_rdms(matrices, matrices, comparison), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('comparison', METHODS)
def test_a_draw_of_stimuli(rdms, comparison):
  rng, theirs = np.random.default_rng(1), rsatoolbox.rdm.RDMs(rdms)
  for _ in range(5):
    chosen = rng.integers(15, size=15)
    sample = theirs.subsample_pattern('index', chosen)
    expected = rsatoolbox.rdm.compare(sample, sample, METHODS[comparison])
    drawn = rdms[:, resampled_pairs(chosen)]
    np.testing.assert_allclose(compare_rdms(drawn, drawn, comparison), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('comparison', METHODS)
def test_noise_ceilings(rdms, comparison):
  theirs = rsatoolbox.rdm.RDMs(rdms)
  expected = rsatoolbox.inference.boot_noise_ceiling(theirs, METHODS[comparison])
  np.testing.assert_allclose(noise_ceiling(rdms, comparison), expected, rtol=0, atol=1e-6)
