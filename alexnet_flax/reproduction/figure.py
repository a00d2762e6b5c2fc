"""The curves of a claim: mean over the seeds, with their range shaded."""

import pathlib
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from alexnet_flax.files import atomic_path
from alexnet_flax.reproduction.claims import Claim
from alexnet_flax.reproduction.reproduce import curves_by_seed


def draw(claim: Claim, runs: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws the errors of each arm by epoch as an SVG: of training dashed, of the test set solid.

  Where runs stop at a training error, that error is drawn, and the training curves alone.
  """
  with matplotlib.rc_context({'svg.hashsalt': 'alexnet_flax', 'svg.fonttype': 'none'}):
    figure = Figure(figsize=(6, 3.6), layout='constrained')
    axes = figure.subplots()
    by_seed = curves_by_seed(claim, runs)
    for number, arm in enumerate(claim.arms):
      curves = [np.array(curves[arm]) for curves in by_seed.values()]
      length = max((len(curve) for curve in curves), default=0)
      padded = np.full((len(curves), length, 3), np.nan)
      for curve, row in zip(curves, padded, strict=True):
        row[: len(curve)] = curve
      for column, name, style in ((1, 'training', '--'), (2, 'test', '-')):
        if not length or (column == 2 and claim.until is not None):
          continue
        epochs, errors = np.nanmean(padded[..., 0], 0), padded[..., column]
        shown = '-' if claim.until is not None else style
        axes.plot(epochs, np.nanmean(errors, 0), shown, color=f'C{number}', label=f'{arm}, {name} error')
        low, high = np.nanmin(errors, 0), np.nanmax(errors, 0)
        axes.fill_between(epochs, low, high, color=f'C{number}', alpha=0.2, linewidth=0)
    mark = claim.until if claim.until is not None else claim.published
    axes.axhline(mark, color='0.5', linewidth=0.8)
    label = f'{mark:.0%} training error' if claim.until is not None else f'published: {mark:.0%} test error'
    axes.annotate(label, (0.01, mark), xycoords=('axes fraction', 'data'), va='top', color='0.4')
    axes.set(xlabel='epoch', xlim=(0, None), ylim=(0, None))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
      figure.savefig(temporary, format='svg', metadata={'Date': None, 'Creator': None})
