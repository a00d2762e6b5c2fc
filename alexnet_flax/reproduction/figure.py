"""The curves of a claim: mean over the seeds, with their range shaded."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from alexnet_flax.files import atomic_path
from alexnet_flax.reproduction.claims import Claim, Curve
from alexnet_flax.reproduction.reproduce import curves_by_seed


def draw(claim: Claim, runs: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws the errors of each arm by epoch as an SVG: of training dashed, of the test set solid.

  Where runs stop at a training error, that error is drawn, and the training curves alone.
  """
  by_seed = curves_by_seed(claim, runs)
  with matplotlib.rc_context({'svg.hashsalt': 'alexnet_flax', 'svg.fonttype': 'none'}):
    figure = Figure(figsize=(6, 3.6), layout='constrained')
    axes = figure.subplots()
    for number, arm in enumerate(claim.arms):
      curves = [of_arms[arm] for of_arms in by_seed.values()]
      if not curves:
        continue
      if claim.until is not None:
        _draw_curves(axes, curves, 'train_error', f'C{number}', '-', arm)
      else:
        _draw_curves(axes, curves, 'train_error', f'C{number}', '--', f'{arm}, training error')
        _draw_curves(axes, curves, 'test_error', f'C{number}', '-', f'{arm}, test error')
    if claim.until is not None:
      mark, label = claim.until, f'{100 * claim.until:g} % training error'
    else:
      mark, label = claim.published, f'published: {100 * claim.published:g} % test error'
    axes.axhline(mark, color='0.5', linewidth=0.8)
    axes.annotate(label, (0.01, mark), xycoords=('axes fraction', 'data'), va='top', color='0.4')
    axes.set(xlabel='epoch', ylabel='error', xlim=(0, None), ylim=(0, None))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.spines[['top', 'right']].set_visible(False)
    if by_seed:
      axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
      figure.savefig(partial, format='svg', metadata={'Date': None, 'Creator': None})


def _draw_curves(axes: Any, curves: Sequence[Curve], error: str, color: str, style: str, label: str) -> None:
  """Draws the mean of curves, of different lengths, and the range between the least and the greatest."""
  length = max(map(len, curves))
  errors = np.full((len(curves), length), np.nan)
  for row, curve in zip(errors, curves, strict=True):
    row[: len(curve)] = [getattr(point, error) for point in curve]
  epochs = [point.epoch for point in max(curves, key=len)]
  axes.plot(epochs, np.nanmean(errors, 0), style, color=color, label=label)
  axes.fill_between(epochs, np.nanmin(errors, 0), np.nanmax(errors, 0), color=color, alpha=0.2, linewidth=0)
