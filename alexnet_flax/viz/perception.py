"""Figures of how robust, how calibrated and how much like people networks are, and of where images differ."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from alexnet_flax.data.images import read_image
from alexnet_flax.errors import one_line
from alexnet_flax.evaluation.shape_bias import Decisions, by_shape, shape_bias
from alexnet_flax.viz.similarity import STYLE, save_figure, short_name

_PERCENT = PercentFormatter(1, decimals=0)


def draw_evaluation(results: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws what `evaluate` returns for a data set; raises UsageError if the file cannot be written.

  That is top-1 by epsilon if there were attacks, and otherwise a reliability diagram (Guo et al. 2017, figure
  1), before and after temperature scaling, with the share of images in each bin below.
  """
  first = results.get('attacks', [results])[0]
  networks = ' and '.join(f'{short_name(one["source"])} ({one["variant"]})' for one in results['networks'])
  title = f'{one_line(results["dataset"])}, {first["images"]:,} images\n{networks}'
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(4.6, 3.6 if 'attacks' in results else 5), layout='constrained')
    if 'attacks' in results:
      method = 'FGSM' if first['method'] == 'fgsm' else f'PGD of {first["steps"]} steps'
      title = f'{method} on {title}'
      _draw_accuracies(figure, results['attacks'])
    else:
      _draw_reliability(figure, results)
    for axes in figure.axes:
      axes.yaxis.set_major_formatter(_PERCENT)
      axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(title, fontsize=8)
    figure.legend(frameon=False, loc='outside lower center', fontsize=8)
    save_figure(figure, path)


def _draw_accuracies(figure: Figure, attacks: Sequence[Mapping[str, Any]]) -> None:
  scale, unit = (255, '/255') if attacks[0]['norm'] == 'linf' else (1, '')
  epsilons, top1 = zip(
    *sorted((scale * one['epsilon'], [*one['top1'].values()]) for one in attacks), strict=True
  )
  value, low, high = np.array(top1).T
  axes = figure.subplots()
  axes.fill_between(epsilons, low, high, color='C0', alpha=0.25, label='95 % interval')
  axes.plot(epsilons, value, marker='o', markersize=4, label='top-1')
  axes.set(xlabel=f'epsilon in {attacks[0]["norm"]}', ylabel='accuracy', ylim=(0, 1.02))
  axes.locator_params(axis='x', nbins=6)
  axes.xaxis.set_major_formatter(StrMethodFormatter('{x:g}' + unit))


def _draw_reliability(figure: Figure, results: Mapping[str, Any]) -> None:
  axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
  axes.axline((0, 0), (1, 1), color='0.5', linestyle='--', linewidth=0.8)
  scaling = results.get('temperature_scaling', {})
  for one in (results, scaling) if 'temperatures' in scaling else (results,):
    images, confidence, correct = map(np.array, one['calibration_bins'].values())
    temperatures = ' and '.join(f'{value:.4g}' for value in one.get('temperatures', [1]))
    label = f'at temperature {temperatures}: calibration error {one["calibration_error"]:.2%}'
    some = images > 0
    axes.plot(confidence[some] / images[some], correct[some] / images[some], 'o-', markersize=4, label=label)
    below.stairs(images / images.sum(), np.linspace(0, 1, len(images) + 1), fill=True, alpha=0.4)
  axes.set(ylabel='accuracy', xlim=(0, 1), ylim=(0, 1.02))
  below.set(xlabel='confidence', ylabel='images')
  below.xaxis.set_major_formatter(_PERCENT)


def draw_shape_bias(observers: Mapping[str, Decisions], path: pathlib.Path) -> None:
  """Draws the share of shape decisions by shape, and of all shapes as lines (Geirhos et al. 2019, figure 4).

  The first of the observers is the network. Raises UsageError if the file cannot be written.
  """
  shapes = list(by_shape(next(iter(observers.values()))))
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(6.4, 1.2 + 0.25 * max(len(shapes), len(observers))), layout='constrained')
    axes = figure.subplots()
    for number, (name, decisions) in enumerate(observers.items()):
      shares = [one['shape_bias'] for one in (shape_bias(decisions), *by_shape(decisions).values())]
      overall, *each = np.array(shares, np.float64)  # NaN where no decision was for either
      style: Any = {'color': f'C{number % 10}', 'alpha': 0.6 if number else 1}
      share = f'{overall:.1%}'.replace('nan%', 'neither')
      axes.plot(
        each, range(len(shapes)), 's' if number else 'o', **style, label=f'{short_name(name)}, {share}'
      )
      axes.axvline(overall, **style, linewidth=1)
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set(xlabel='shape decisions, the others being for texture', xlim=(1.02, -0.02))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.grid(axis='y', alpha=0.3)
    figure.legend(frameon=False, loc='outside right upper', fontsize=8)
    save_figure(figure, path)


def draw_distances(
  pairs: Sequence[tuple[str, str]], distances: Sequence[float], maps: Sequence[np.ndarray], path: pathlib.Path
) -> None:
  """Draws the two images of each pair, and the map [H, W] of where they differ; all maps have one scale.

  Raises UsageError if the file cannot be written.
  """
  heights = [len(one) / one.shape[1] for one in maps]
  greatest = max(1e-6, *(float(one.max()) for one in maps))  # below that is rounding
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(7, 2.2 * sum(heights) + 0.3 * len(maps)), layout='constrained')
    grid = figure.subplots(len(maps), 3, squeeze=False, height_ratios=heights)
    for row, pair, distance, found in zip(grid, pairs, distances, maps, strict=True):
      titles = *(short_name(file, 24) for file in pair), f'LPIPS {distance:.4f}'
      for axes, title, image in zip(row, titles, (*map(read_image, pair), found), strict=True):
        drawn = axes.imshow(image, vmin=0, vmax=greatest)
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    figure.colorbar(drawn, ax=grid, aspect=20 * sum(heights), label='difference')
    save_figure(figure, path)
