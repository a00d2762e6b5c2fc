"""Figures of attributions: images, each beside what every method says of it."""

import functools
import itertools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from alexnet_flax.data.images import image_files
from alexnet_flax.errors import UsageError, one_line
from alexnet_flax.inference.attributions import METHODS, integrated_gradients
from alexnet_flax.inference.grad_cam import overlay
from alexnet_flax.inference.predict import Prediction, output_paths, predict
from alexnet_flax.pretrained import Classification, PretrainedModel
from alexnet_flax.viz.similarity import STYLE, save_figure, short_name

MOST = 40  # images in one figure
_AT_ONCE = 16  # images
_INEXACT = 0.05  # of the difference that integrated gradients are to sum to
_LONGEST = 28  # characters of a name over a panel
_COLUMNS = 4  # at most, where the figure has one image
_KEY = 'white: the greatest gradients; red: for the class; blue: against it; each map has its own scale'


class Explanation(NamedTuple):
  """What methods say of an image."""

  file: str
  view: np.ndarray  # uint8 [S, S, 3], what the network sees
  chosen: Classification  # the class that is explained
  maps: Mapping[str, np.ndarray]  # by method: float [S, S, 3] in RGB order, or a map [H, W]
  logit_difference: float  # to a black image


def write_explanations(
  network: PretrainedModel,
  images: Sequence[str],
  methods: Sequence[str],
  label: int | None,
  out: pathlib.Path,
  steps: int = 32,
) -> int:
  """Draws what methods say of image files, prints the classes, and returns how many cannot be read.

  `images` are as for `image_files`, `methods` names among `METHODS`. `label` is the class to explain; None,
  the most probable one of each image. `out` is the figure of all images or, without an ending, a folder for
  a PNG of each. `steps` are those of integrated gradients. Raises UsageError for no images, too many for one
  figure, and figures that cannot be written.
  """
  files, apart = image_files(images), not out.suffix or out.is_dir()
  if not apart and len(files) > MOST:
    raise UsageError(f'{len(files)} images are too many for one figure; --out FOLDER draws one of each')
  places = output_paths(files, str(out), '-explained.png', '--out') if apart else {}
  sheet, failed, inexact = [], 0, 0
  predictions = predict(network, files, _AT_ONCE, top=len(network.class_names))
  while some := list(itertools.islice(predictions, _AT_ONCE)):
    for one in some:
      if one.error:
        reason = f'cannot read {one.file}: {one.error}'
        if len(files) == 1:
          raise UsageError(reason)
        print(one_line(reason), file=sys.stderr)
        failed += 1
    for row in explain(network, [one for one in some if not one.error], methods, label, steps):
      parts = [f'{row.file}: {row.chosen.name} {row.chosen.probability:.1%}']
      if (found := row.maps.get('integrated_gradients')) is not None:
        total, expected = float(found.sum()), row.logit_difference
        parts.append(f'integrated gradients sum to {total:.3f} of {expected:.3f}')
        inexact += abs(total - expected) > _INEXACT * abs(expected)
      if apart:
        draw_explanations([row], places[row.file])
        parts.append(str(places[row.file]))
      print(one_line('; '.join(parts)))
      sheet += [] if apart else [row]
  if sheet:
    draw_explanations(sheet, out)
    print(one_line(out))
  if inexact:
    what = f'integrated gradients of {inexact} images sum to another value by more than {_INEXACT:.0%}'
    print(f'note: {what}; --steps {4 * steps} comes nearer', file=sys.stderr)
  return failed


def explain(
  network: PretrainedModel,
  images: Sequence[Prediction],
  methods: Sequence[str],
  label: int | None = None,
  steps: int = 32,
) -> list[Explanation]:
  """Applies methods to images that were read, whose predictions hold all classes."""
  if not images:
    return []
  views = np.stack([np.asarray(one.view) for one in images])
  chosen = [next(found for found in one.best if label in (None, found.label)) for one in images]
  classes = np.array([found.label for found in chosen])
  order = -1 if network.spec.preprocessing.channel_order == 'BGR' else 1
  variables = jax.device_put(network.variables)  # once
  functions: dict[str, Any] = {
    **METHODS,
    'integrated_gradients': functools.partial(integrated_gradients, steps=steps),
  }
  maps = {name: functions[name](network.model, variables, views, classes) for name in methods}
  maps = {name: x[..., ::order] if x.ndim == 4 else x for name, x in maps.items()}
  changes = network.logits(views) - network.logits(np.zeros_like(views))
  return [
    Explanation(one.file, view, found, {name: x[row] for name, x in maps.items()}, change[found.label])
    for row, (one, view, found, change) in enumerate(zip(images, views, chosen, changes, strict=True))
  ]


def draw_explanations(rows: Sequence[Explanation], path: pathlib.Path) -> None:
  """Draws a row of panels for each image; for one alone, larger panels. Raises UsageError if it cannot."""
  height, width, side = len(rows), 1 + len(rows[0].maps), 2.0
  if len(rows) == 1:
    height, side = -(-width // _COLUMNS), 3.2
    width = -(-width // height)
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(side * width, (side + 0.3) * height + 0.4), layout='constrained')
    panels = figure.subplots(height, width, squeeze=False).reshape(len(rows), -1)
    for row, line in zip(rows, panels, strict=True):
      for axes in line:
        axes.set_axis_off()
      line[0].imshow(row.view)
      chosen = f'{one_line(row.chosen.name)[:_LONGEST]}  {row.chosen.probability:.1%}'
      line[0].set_title(f'{short_name(row.file, _LONGEST)}\n{chosen}', fontsize=8)
      for axes, (method, values) in zip(line[1:], row.maps.items(), strict=False):
        _draw(axes, method, row.view, values)
        axes.set_title('' if row is not rows[0] else method.replace('_', ' '))
    figure.supxlabel(_KEY, fontsize=8, color='0.4')
    save_figure(figure, path)


def _draw(axes: Any, method: str, view: np.ndarray, values: np.ndarray) -> None:
  match method:
    case 'gradient' | 'smoothgrad':
      axes.imshow(_scaled(np.abs(values).max(-1)), cmap='gray', vmin=0, vmax=1)
    case 'integrated_gradients':
      axes.imshow(_scaled(values.sum(-1)), cmap='bwr', vmin=-1, vmax=1)
    case 'occlusion':
      heat = _scaled(values)
      axes.imshow(view.mean(-1), cmap='gray', vmin=0, vmax=255)
      axes.imshow(heat, cmap='bwr', vmin=-1, vmax=1, alpha=0.6 * np.abs(heat))
    case 'grad_cam':
      axes.imshow(overlay(view, values))
    case _:
      axes.imshow(0.5 + 0.5 * _scaled(values))


def _scaled(values: np.ndarray) -> np.ndarray:
  """Scales values to -1 ... 1; the greatest hundredth of them are cut off."""
  most = np.percentile(np.abs(values), 99)
  return np.clip(values / (most if most > 0 else 1), -1, 1)
