"""The curves of a claim: mean over the seeds, with their range shaded."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from alexnet_flax.files import atomic_path
from alexnet_flax.reproduction.claims import Claim, Curve, changes, epochs_until
from alexnet_flax.reproduction.reproduce import curves_by_seed


def draw(claim: Claim, runs: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws the errors of each arm by epoch as an SVG: of training dashed, of the test set solid.

  Where the claim is about training, the error at which runs stop is drawn, and the training curves alone. Of
  a ratio, a mark shows where the second arm would be by the published one.
  Where changes are compared, bars say how much test error each saves.
  """
  by_seed = curves_by_seed(claim, runs)
  with matplotlib.rc_context({'svg.hashsalt': 'alexnet_flax', 'svg.fonttype': 'none'}):
    tall = 1.2 + 0.3 * len(claim.arms) if claim.published_changes else 3.6
    figure = Figure(figsize=(6, tall), layout='constrained')
    axes = figure.subplots()
    if claim.published_changes:
      _draw_changes(axes, claim, list(by_seed.values()))
    else:
      _draw_errors(axes, claim, list(by_seed.values()))
    axes.spines[['top', 'right']].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
      figure.savefig(partial, format='svg', metadata={'Date': None, 'Creator': None})


def _draw_changes(axes: Any, claim: Claim, seeds: Sequence[Mapping[str, Curve]]) -> None:
  """Draws the points of accuracy that each change gains, and those that were published."""
  found = [changes(curves) for curves in seeds]
  arms = list(claim.arms)[1:]
  points = 100 * np.array([[one[arm] for arm in arms] for one in found]).reshape(len(found), len(arms))
  means = points.mean(axis=0) if len(points) else np.zeros(len(arms))
  errors = points.std(axis=0, ddof=1) / np.sqrt(len(points)) if len(points) > 1 else np.zeros(len(arms))
  order = np.argsort(means)
  rows = {arms[number]: row for row, number in enumerate(order)}
  axes.barh(range(len(arms)), means[order], xerr=errors[order], color='C0', alpha=0.6, label='here, CIFAR-10')
  marks = [(gain, rows[arm]) for arm, gain in claim.published_changes.items()]
  axes.plot(*zip(*marks, strict=True), 'D', color='C1', label='published, ImageNet')
  axes.axvline(0, color='0.4', linewidth=0.8)
  axes.set_yticks(range(len(arms)), [arms[number] for number in order])
  axes.set(xlabel=f'points of accuracy more than the {next(iter(claim.arms))}')
  axes.locator_params(axis='x', nbins=6)
  axes.legend(frameon=False, loc='upper left')


def _draw_errors(axes: Any, claim: Claim, seeds: Sequence[Mapping[str, Curve]]) -> None:
  of_tests = claim.unit == 'test error'
  for number, arm in enumerate(claim.arms):
    curves = [of_arms[arm] for of_arms in seeds]
    if not curves:
      continue
    if of_tests:
      _draw_curves(axes, curves, 'train_error', f'C{number}', '--', f'{arm}, training error')
      _draw_curves(axes, curves, 'test_error', f'C{number}', '-', f'{arm}, test error')
    else:
      _draw_curves(axes, curves, 'train_error', f'C{number}', '-', arm)
  if of_tests:
    mark, label = claim.published, f'published: {100 * claim.published:g} % test error'
  else:
    assert claim.until is not None
    mark, label = claim.until, f'{100 * claim.until:g} % training error'
  axes.axhline(mark, color='0.5', linewidth=0.8)
  side = 'top' if mark > 0.05 else 'bottom'  # below it there is the axis
  axes.annotate(label, (0.01, mark), xycoords=('axes fraction', 'data'), va=side, color='0.4')
  if claim.unit == 'times' and seeds:
    first, second = claim.arms
    epochs = np.mean([epochs_until(curves[first], mark) for curves in seeds])
    if np.isfinite(epochs):
      axes.plot(claim.published * epochs, mark, 'D', color='C1', label=f'{second}, as published')
  of_what = 'error' if of_tests else 'training error'
  axes.set(xlabel='epoch', ylabel=of_what, xlim=(0, None), ylim=(0, None))
  axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
  if seeds:
    axes.legend(frameon=False)


def _draw_curves(axes: Any, curves: Sequence[Curve], error: str, color: str, style: str, label: str) -> None:
  """Draws the mean of curves, of different lengths, and the range between the least and the greatest."""
  length = max(map(len, curves))
  errors = np.full((len(curves), length), np.nan)
  for row, curve in zip(errors, curves, strict=True):
    row[: len(curve)] = [getattr(point, error) for point in curve]
  epochs = [point.epoch for point in max(curves, key=len)]
  axes.plot(epochs, np.nanmean(errors, 0), style, color=color, label=label)
  axes.fill_between(epochs, np.nanmin(errors, 0), np.nanmax(errors, 0), color=color, alpha=0.2, linewidth=0)
