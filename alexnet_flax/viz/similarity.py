"""Figures of how similar layers are: of files of features, and of runs."""

import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from alexnet_flax.errors import UsageError, one_line
from alexnet_flax.files import atomic_path, check_writable, expanded
from alexnet_flax.inference.compare import Result
from alexnet_flax.inference.representations import BetweenRuns

STYLE: Any = {
  'svg.hashsalt': 'alexnet_flax',
  'svg.fonttype': 'none',
  'text.parse_math': False,  # a name may contain a dollar sign
  'font.size': 9,
}
_NO_TIME: Any = {'.svg': {'Date': None, 'Creator': None}, '.pdf': {'CreationDate': None}}
_MOST = 12  # layers of a file up to which cells show their values


def figure_path(path: str) -> pathlib.Path:
  """Returns the path of a figure.

  Raises:
    UsageError: Its ending is neither .svg nor .png, or it cannot be written.
  """
  place = expanded(path)
  if place.suffix.lower() not in ('.svg', '.png'):
    raise UsageError(f'--figure {path}: the ending must be .svg or .png')
  check_writable(place)
  return place


def draw_comparisons(result: Result, path: pathlib.Path) -> None:
  """Draws a panel for each comparison: the first file's layers downwards, the other's to the right.

  Raises:
    UsageError: The file cannot be written.
  """
  panels = result.comparisons
  columns = [len(one.second_layers) for one in panels]
  rows = len(panels[0].first_layers)
  lowest = min(0.0, *(float(one.similarity.min()) for one in panels))
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(2 + 0.5 * sum(columns) + len(panels), 1.8 + 0.4 * rows), layout='constrained')
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=columns)[0]
    for axes, one in zip(grid, panels, strict=True):
      image = axes.imshow(one.similarity, vmin=lowest, vmax=1)
      axes.set_xticks(range(len(one.second_layers)), [*map(one_line, one.second_layers)], rotation=90)
      axes.set_yticks(range(rows), [*map(one_line, one.first_layers)])
      axes.set(xlabel=short_name(one.second.path), ylabel=short_name(one.first.path))
      for (row, column), value in np.ndenumerate(one.similarity):
        if max(rows, *columns) <= _MOST:
          color = 'white' if value < (lowest + 1) / 2 else 'black'
          axes.text(column, row, f'{value:.2f}', color=color, ha='center', va='center', fontsize=7)
    figure.colorbar(image, ax=grid, label=result.measure)
    figure.suptitle(str(result), fontsize=8)
    save_figure(figure, path)


def draw_between_runs(measures: Mapping[str, Mapping[str, BetweenRuns]], path: pathlib.Path) -> None:
  """Draws the similarity between runs by layer: means over pairs, with standard deviations as bars.

  Args:
    measures: For each measure, such as 'rsa-spearman' and 'cka', what `similarity_between_runs` returned.
    path: The file, .svg or .png.

  Raises:
    UsageError: The file cannot be written.
  """
  layers = list(dict.fromkeys(layer for found in measures.values() for layer in found))
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(2 + 0.4 * len(layers), 3), layout='constrained')
    axes = figure.subplots()
    for number, (measure, found) in enumerate(measures.items()):
      places = [layers.index(layer) + 0.06 * number for layer in found]
      means, deviations = (
        np.array([getattr(one, name) for one in found.values()]) for name in BetweenRuns._fields[:2]
      )
      axes.errorbar(
        places, means, np.nan_to_num(deviations), marker='o', markersize=4, capsize=3, label=measure
      )
    axes.set_xticks(range(len(layers)), [*map(one_line, layers)], rotation=90)
    axes.set(ylabel='similarity between runs', ylim=(None, 1.02))
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def short_name(path: str, longest: int = 40) -> str:
  """Returns a file's name without its folder, of at most `longest` characters."""
  name = one_line(os.path.basename(path))
  return name if len(name) <= longest else f'{name[: longest - 3]}...'


def save_figure(figure: Figure, path: pathlib.Path) -> None:
  """Writes a figure as its ending says, without the time; raises UsageError if it cannot be written."""
  metadata = _NO_TIME.get(path.suffix.lower(), {})
  try:
    with warnings.catch_warnings(action='ignore'), atomic_path(path) as partial:  # of letters the font lacks
      figure.savefig(partial, format=path.suffix[1:].lower(), dpi=150, metadata=metadata)
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror or error}') from None
