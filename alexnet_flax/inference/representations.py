"""Compares representations of the same stimuli: dissimilarity matrices (RSA), and linear CKA."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from scipy.spatial.distance import num_obs_y, squareform
from tqdm import tqdm

from alexnet_flax.errors import UsageError, unknown_name

DISTANCES = ('correlation', 'cosine')
COMPARISONS = ('spearman', 'kendall', 'pearson', 'cosine')
MEASURES = (*(f'rsa-{comparison}' for comparison in COMPARISONS), 'cka', 'cka-debiased')
_EQUAL = 1e-12  # of the greatest dissimilarity: less is rounding
_LARGE = 1e70  # fourth powers of larger activations, in norms of Gram matrices, may overflow


class BetweenRuns(NamedTuple):
  """How similar a layer is in different runs: mean and standard deviation over all pairs of runs.

  Pairs that share a run are not independent: the deviation describes them, and is no standard error. It is
  NaN for a single pair.
  """

  mean: float
  deviation: float
  pairs: int


def dissimilarities(
  features: np.ndarray, distance: str = 'correlation', *, names: Sequence[str] | None = None
) -> np.ndarray:
  """Returns the representational dissimilarity matrix (Kriegeskorte et al. 2008) of features, condensed.

  Args:
    features: Activations [N, ...], a row for each stimulus.
    distance: 'correlation' (1 - Pearson's r) or 'cosine' (1 - cosine), as `DISTANCES` has them.
    names: What messages call the stimuli; row 0, row 1, ... by default.

  Returns:
    float64 [N (N - 1) / 2], the upper triangle by rows; `scipy.spatial.distance.squareform` makes it [N, N].

  Raises:
    UsageError: There are fewer than two stimuli, values that are not finite, or stimuli without a distance.

  >>> dissimilarities(np.array([[1, 2, 3], [3, 2, 1], [2, 4, 6]])).round(6)
  array([2., 0., 2.])
  """
  if distance not in DISTANCES:
    raise unknown_name('distance', distance, DISTANCES)
  rows = _rows(features, names)
  _require(len(rows), 2)
  if distance == 'correlation':
    undefined, reason = np.ptp(rows, axis=1) == 0, 'all equal'
    rows -= rows.mean(axis=1, keepdims=True)
  else:
    undefined, reason = ~rows.any(axis=1), 'all 0'
  if undefined.any():
    which = some(_called(undefined, names))
    raise UsageError(f'the activations of {which} are {reason}: the {distance} distance is undefined')
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  return squareform(np.clip(1 - rows @ rows.T, 0, 2), checks=False)


def compare_rdms(first: np.ndarray, second: np.ndarray, comparison: str = 'spearman') -> np.ndarray:
  """Returns the similarity of each dissimilarity matrix with each other.

  Args:
    first: Condensed matrices [A, P], or one [P].
    second: Condensed matrices [B, P], or one [P], of the same stimuli in the same order.
    comparison: Of `COMPARISONS`: 'spearman' (rho, tied entries get their mean rank), 'kendall' (tau-a, for
      models that predict ties: Nili et al. 2014), 'pearson' or 'cosine'.

  Returns:
    float64 [A, B], without the axes of single matrices.

  Raises:
    UsageError: The comparison is unknown, the shapes differ, or the entries of a matrix are all equal.
  """
  found = _compare(*_condensed(first, second, comparison), comparison)
  if np.isnan(found).any():
    raise UsageError('a dissimilarity matrix whose entries are all equal cannot be compared')
  return found.reshape(np.shape(first)[:-1] + np.shape(second)[:-1])


def bootstrap_interval(
  first: np.ndarray,
  second: np.ndarray,
  comparison: str = 'spearman',
  *,
  draws: int = 1000,
  level: float = 0.95,
  seed: int = 0,
) -> np.ndarray:
  """Returns a confidence interval of `compare_rdms` for other stimuli of the same kind.

  Stimuli are drawn with replacement, the same for all matrices. Pairs of a stimulus with itself are left out:
  their dissimilarity is 0 in all matrices (Schütt et al. 2023, as rsatoolbox does). Draws with fewer than
  three different stimuli are drawn again.

  Args:
    first, second, comparison: As for `compare_rdms`.
    draws: How many.
    level: The share of the draws between both ends, which are their quantiles.
    seed: The seed of the draws.

  Returns:
    float64 [2, A, B], the lower and the upper end.

  Raises:
    UsageError: As for `compare_rdms`; or there are fewer than three stimuli.
  """
  one, other = _condensed(first, second, comparison)
  count = num_obs_y(one[0])
  _require(count, 3)
  rng, found = np.random.default_rng(seed), list[np.ndarray]()
  for _ in tqdm(range(draws), unit='draw', disable=not sys.stderr.isatty()):
    while len(np.unique(chosen := rng.integers(count, size=count))) < 3:
      pass
    pairs = resampled_pairs(chosen)
    found.append(_compare(one[:, pairs], other[:, pairs], comparison))
  ends = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
  return ends.reshape((2, *np.shape(first)[:-1], *np.shape(second)[:-1]))


def resampled_pairs(chosen: np.ndarray) -> np.ndarray:
  """Returns the places in a condensed matrix of all pairs of different stimuli in a sample.

  Args:
    chosen: int [N], the numbers of the N stimuli that were drawn with replacement from N.

  >>> resampled_pairs(np.array([0, 2, 2]))  # of the pairs 01, 02, 12
  array([1, 1])
  """
  count = len(chosen)
  low, high = np.triu_indices(count, 1)
  pairs = np.sort(np.stack([chosen[low], chosen[high]]), axis=0)
  low, high = pairs[:, pairs[0] < pairs[1]]
  return low * (2 * count - low - 1) // 2 + high - low - 1


def noise_ceiling(rdms: np.ndarray, comparison: str = 'spearman') -> tuple[float, float]:
  """Returns lower and upper bound of the similarity that the true model could have (Nili et al. 2014).

  The upper bound is the mean similarity of each matrix with the mean of all, the lower bound that with the
  mean of all others. The mean is that of ranks for 'spearman' and 'kendall' (for which it is only nearly the
  best matrix), of z-scores for 'pearson', and of matrices of length 1 for 'cosine'.

  Args:
    rdms: Condensed matrices [S, P], one for each of at least two subjects or runs.
    comparison: As for `compare_rdms`.

  Raises:
    UsageError: As for `compare_rdms`; or there is only one matrix.
  """
  rdms, _ = _condensed(rdms, rdms, comparison)
  if len(rdms) < 2:
    raise UsageError('a noise ceiling needs at least two dissimilarity matrices')
  ranked = comparison in ('spearman', 'kendall')
  scaled = scipy.stats.rankdata(rdms, axis=1) if ranked else _directions(rdms, comparison)
  total = scaled.sum(axis=0)
  upper = compare_rdms(total, rdms, comparison)
  lower = [compare_rdms(total - own, rdm, comparison) for own, rdm in zip(scaled, rdms, strict=True)]
  return float(np.mean(lower)), float(np.mean(upper))


def linear_cka(first: np.ndarray, second: np.ndarray, *, debiased: bool = False) -> float:
  """Returns the linear centred kernel alignment (Kornblith et al. 2019) of two sets of features.

  It is 1 for features that are equal up to rotation, reflection and one factor. With few stimuli and many
  features it is near 1 for anything; debiased, with the unbiased estimator of HSIC (Song et al. 2012,
  equation 5; Nguyen et al. 2021), it is near 0 for what is independent, and may be negative.

  Args:
    first: Activations [N, ...].
    second: Activations [N, ...] of the same stimuli in the same order.
    debiased: Take the unbiased estimator.

  Raises:
    UsageError: There are fewer than three stimuli (four if debiased), different numbers of them, values that
      are not finite, or the same activations for all stimuli.
  """
  measure = 'cka-debiased' if debiased else 'cka'
  one, other = representation(first, measure), representation(second, measure)
  if len(one) != len(other):
    raise UsageError(f'features are of different numbers of stimuli: {len(first)} and {len(second)}')
  return float(compare_rdms(one, other, 'cosine'))


def representation(
  features: np.ndarray,
  measure: str,
  distance: str = 'correlation',
  *,
  names: Sequence[str] | None = None,
) -> np.ndarray:
  """Returns the vector of features that a measure compares, by `compare_rdms` with `comparison_of(measure)`.

  For RSA it has the dissimilarities, for CKA the Gram matrix, centred: [N²]. Debiased, that matrix is
  U-centred (Székely and Rizzo 2014), and the product of two of them is N (N - 3) times the unbiased HSIC.

  Args:
    features: Activations [N, ...].
    measure: Of `MEASURES`.
    distance, names: As for `dissimilarities`; CKA has no distance.

  Raises:
    UsageError: As for `dissimilarities` and `linear_cka`.
  """
  comparison = comparison_of(measure)
  debiased = measure == 'cka-debiased'
  _require(len(features), 4 if debiased else 3)
  if measure.startswith('rsa-'):
    rdm = dissimilarities(features, distance, names=names)
    if _is_flat(rdm, comparison):
      raise UsageError(f'all stimuli are equally dissimilar: {measure} is undefined')
    return rdm
  rows = _rows(features, names)
  if not np.ptp(rows, axis=0).any():
    raise UsageError('the activations of all stimuli are the same: there is nothing to compare')
  rows -= rows.mean(axis=0)
  gram = rows @ rows.T
  if debiased:
    scale = gram.trace()
    np.fill_diagonal(gram, 0)
    means = gram.sum(axis=0) / (len(gram) - 2)
    gram += means.sum() / (len(gram) - 1) - means - means[:, None]
    np.fill_diagonal(gram, 0)
    if np.abs(gram).max() <= _EQUAL * scale:
      raise UsageError(f'all stimuli are equally dissimilar: {measure} is undefined')
  return gram.ravel()


def comparison_of(measure: str) -> str:
  """Returns the comparison of `COMPARISONS` that a measure makes; UsageError if there is no such measure."""
  if measure not in MEASURES:
    raise unknown_name('measure', measure, MEASURES)
  return measure.removeprefix('rsa-') if measure.startswith('rsa-') else 'cosine'


def similarity_between_runs(
  runs: Sequence[Mapping[str, np.ndarray]], measure: str = 'rsa-spearman', distance: str = 'correlation'
) -> dict[str, BetweenRuns]:
  """Returns how similar each layer is in runs that differ by their seed, say.

  `alexnet_flax.viz.similarity.draw_between_runs` draws it.

  Args:
    runs: For each of at least two runs its features [N, ...] by layer, of the same stimuli in the same order.
    measure, distance: As for `representation`.

  Raises:
    UsageError: There is one run only, the runs have different layers or stimuli; or as for `representation`.
  """
  if len(runs) < 2:
    raise UsageError('the similarity between runs needs at least two of them')
  found, pairs = {}, np.triu_indices(len(runs), 1)
  for layer in runs[0]:
    if lacking := [number for number, run in enumerate(runs) if layer not in run]:
      raise UsageError(f'run {lacking[0]} has no layer {layer}, which run 0 has')
    if len(sizes := {len(run[layer]) for run in runs}) > 1:
      raise UsageError(f'{layer}: the runs have different numbers of stimuli: {sorted(sizes)}')
    try:
      vectors = np.stack([representation(run[layer], measure, distance) for run in runs])
      values = compare_rdms(vectors, vectors, comparison_of(measure))[pairs]
    except UsageError as error:
      raise UsageError(f'{layer}: {error}') from None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    found[layer] = BetweenRuns(float(values.mean()), deviation, len(values))
  return found


def some(names: Iterable[str], most: int = 3) -> str:
  """Lists names, the first few of many.

  >>> some(['a', 'b', 'c', 'd', 'e'])
  'a, b, c and 2 more'
  """
  names = list(names)
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


def _called(which: Any, names: Sequence[str] | None) -> list[str]:
  return [names[row] if names else f'row {row}' for row in np.flatnonzero(which).tolist()]


def _require(stimuli: int, least: int) -> None:
  if stimuli < least:
    what = '1 stimulus is' if stimuli == 1 else f'{stimuli} stimuli are'
    raise UsageError(f'{what} too few; {least} are the least')


def _rows(features: np.ndarray, names: Sequence[str] | None) -> np.ndarray:
  """Returns features as float64 [N, D], a copy; UsageError unless they are finite numbers."""
  array = np.asarray(features)
  if array.ndim < 2 or array.dtype.kind not in 'biuf' or not array.size:
    raise UsageError(f'features (of shape {list(array.shape)}, {array.dtype}) must be numbers [N, ...]')
  rows = np.array(array.reshape(len(array), -1), np.float64)
  if (bad := ~np.isfinite(rows).all(axis=1)).any():
    raise UsageError(f'the activations of {some(_called(bad, names))} are NaN or infinite; leave them out')
  if (bad := (np.abs(rows) > _LARGE).any(axis=1)).any():
    which = some(_called(bad, names))
    raise UsageError(f'the activations of {which} are too large: their magnitudes must be below {_LARGE:g}')
  return rows


def _condensed(first: np.ndarray, second: np.ndarray, comparison: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns matrices as float64 [A, P] and [B, P]; UsageError unless they can be compared."""
  if comparison not in COMPARISONS:
    raise unknown_name('comparison', comparison, COMPARISONS)
  pair = [np.atleast_2d(np.asarray(rdms, np.float64)) for rdms in (first, second)]
  if any(rdms.ndim != 2 for rdms in pair) or pair[0].shape[1] != pair[1].shape[1]:
    shapes = ' and '.join(str(list(np.shape(rdms))) for rdms in (first, second))
    raise UsageError(f'dissimilarities (of shapes {shapes}) must be condensed, of the same stimuli: [..., P]')
  if not all(np.isfinite(rdms).all() for rdms in pair):
    raise UsageError('dissimilarities are NaN or infinite; leave out the stimuli without features')
  return pair[0], pair[1]


def _compare(first: np.ndarray, second: np.ndarray, comparison: str) -> np.ndarray:
  """Returns similarities [A, B]; NaN where they are undefined."""
  if comparison != 'kendall':
    return _directions(first, comparison) @ _directions(second, comparison).T
  pairs = [(one, other) for one in first for other in second]
  taus = np.array([scipy.stats.kendalltau(*pair, method='asymptotic').statistic for pair in pairs])
  return taus.reshape(len(first), -1) * np.outer(_untied(first), _untied(second))


def _directions(rdms: np.ndarray, comparison: str) -> np.ndarray:
  """Returns vectors [A, P] of length 1 whose products are the similarities; NaN where they have none."""
  values = scipy.stats.rankdata(rdms, axis=1) if comparison == 'spearman' else rdms
  if comparison != 'cosine':
    values = values - values.mean(axis=1, keepdims=True)
  lengths = np.linalg.norm(values, axis=1)
  lengths[_is_flat(rdms, comparison)] = np.nan
  return values / lengths[:, None]


def _is_flat(rdms: np.ndarray, comparison: str) -> np.ndarray:
  """Whether matrices [..., P] cannot be compared: all entries are equal; for 'cosine', all are 0."""
  greatest = np.abs(rdms).max(axis=-1)
  return greatest == 0 if comparison == 'cosine' else np.ptp(rdms, axis=-1) <= _EQUAL * greatest


def _untied(rdms: np.ndarray) -> np.ndarray:
  """Returns the factors [A] from tau-b, which leaves tied pairs out, to tau-a; NaN for flat matrices."""
  counts = [np.unique(rdm, return_counts=True)[1] for rdm in rdms]
  tied = np.array([int(np.sum(count * (count - 1) // 2)) for count in counts])
  factors = np.sqrt(1 - tied / max(1, math.comb(rdms.shape[1], 2)))
  factors[_is_flat(rdms, 'kendall')] = np.nan
  return factors
