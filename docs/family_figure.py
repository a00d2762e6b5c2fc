"""Draws the networks side by side, from their specs, into docs/images/family.png.

python -m docs.family_figure
"""

import pathlib
from typing import Any, assert_never

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from alexnet_flax import VARIANTS, Spec
from alexnet_flax.models import spec as specs

FILE = pathlib.Path('docs/images/family.png')
# By kind of layer: the legend's text, the fill, and the colour of the text on it.
KINDS: dict[str, tuple[str, str, str]] = {
  'conv': ('convolution', '#1f4e79', 'white'),
  'fc': ('fully connected', '#5b3a8c', 'white'),
  'activation': ('ReLU', '#f2c14e', '#222222'),
  'pool': ('pooling', '#7fb285', '#222222'),
  'lrn': ('local response norm', '#d1495b', 'white'),
  'batchnorm': ('batch norm', '#7cc4e8', '#222222'),
  'dropout': ('dropout', '#cfd3d8', '#222222'),
}
INK, RULE = '#768390', '#80808050'  # on a transparent ground: readable on white and on dark pages
ROWS = ['input', *(f'conv{n}' for n in range(1, 6)), 'fc6', 'fc7', 'head']
# In inches.
LEFT, PITCH, WIDTH, BETWEEN_GROUPS = 0.66, 1.12, 1.02, 0.04
HEIGHTS = {'conv': 0.42, 'fc': 0.26}
LOW, GAP, ROW_GAP, HEADER, LEGEND = 0.19, 0.025, 0.13, 0.66, 0.34


def kind_and_label(layer: specs.Layer, spec: Spec) -> tuple[str, str] | None:
  """Returns a layer's kind and the text on each of its boxes; None for a layer that is not drawn."""
  match layer:
    case specs.Conv():
      stride = f' /{layer.strides}' if layer.strides > 1 else ''
      local = ' local' if layer.local else ''
      size = f'{layer.kernel_size}x{layer.kernel_size}{stride}{local}'
      return 'conv', f'{size}\n{layer.features // layer.groups}'
    case specs.Dense():
      return 'fc', str(layer.features or spec.num_classes)
    case specs.Activation():
      return 'activation', 'ReLU'
    case specs.Pool():
      return 'pool', f'{layer.kind} {layer.kernel_size} /{layer.strides}'
    case specs.LocalResponseNorm():
      return 'lrn', 'LRN'
    case specs.SpatialResponseNorm():
      return 'lrn', 'LRN, spatial'
    case specs.BatchNorm():
      return 'batchnorm', 'BN'
    case specs.Dropout():
      return 'dropout', f'drop {layer.rate:g}'
    case specs.Flatten():
      return None
    case _:
      assert_never(layer)


def boxes(spec: Spec) -> dict[str, list[tuple[str, str, int]]]:
  """Returns kind, label and number of groups of the drawn layers, by row.

  Each layer with a kernel begins a row; the head is in the last, fully connected ones before it in fc6, fc7.
  """
  row, found, hidden = 'input', {row: [] for row in ROWS}, iter(ROWS[-3:])
  for name, layer in spec.named_layers():
    if isinstance(layer, specs.Conv):
      row = name
    elif isinstance(layer, specs.Dense):
      row = ROWS[-1] if name == spec.head else next(hidden)
    if drawn := kind_and_label(layer, spec):
      found[row].append((*drawn, getattr(layer, 'groups', 1)))
  return found


def draw_box(axes: Any, kind: str, label: str, groups: int, left: float, top: float) -> float:
  """Draws one layer, as one box for each group of channels; returns its lower edge."""
  _, fill, ink = KINDS[kind]
  width, tall = (WIDTH - BETWEEN_GROUPS * (groups - 1)) / groups, HEIGHTS.get(kind, LOW)
  for group in range(groups):
    x = left + group * (width + BETWEEN_GROUPS)
    style = 'round,pad=0,rounding_size=0.04'
    axes.add_patch(FancyBboxPatch((x, top), width, tall, style, facecolor=fill, linewidth=0))
    size = 11 if kind in HEIGHTS else 9.5
    y = top + tall / 2 + 0.01
    axes.text(x + width / 2, y, label, color=ink, size=size, ha='center', va='center', linespacing=1.05)
  return top + tall


def figure() -> Figure:
  """Returns the figure; its axes are in inches from the upper left corner."""
  columns = {name: boxes(spec) for name, spec in VARIANTS.items()}
  tops, y = {}, HEADER
  for row in ROWS:
    tops[row] = y
    tall = [sum(HEIGHTS.get(kind, LOW) + GAP for kind, *_ in found[row]) for found in columns.values()]
    y += max(tall) + ROW_GAP
  width, height = LEFT + PITCH * len(VARIANTS), y + LEGEND
  drawn = Figure(figsize=(width, height), dpi=150)
  axes = drawn.add_axes((0.0, 0.0, 1.0, 1.0))
  axes.set_xlim(0, width)
  axes.set_ylim(height, 0)
  axes.axis('off')
  title = {'color': INK, 'size': 11.5, 'weight': 'bold', 'va': 'center'}
  for row in ROWS[1:]:
    middle = tops[row] + HEIGHTS['fc' if row[:4] != 'conv' else 'conv'] / 2
    axes.text(LEFT - 0.1, middle, row, ha='right', **title)
    axes.axhline(tops[row] - (ROW_GAP + GAP) / 2, color=RULE, linewidth=0.8)
  for column, (name, spec) in enumerate(VARIANTS.items()):
    left = LEFT + PITCH * column
    heading = '\n'.join(name.rsplit('_', 1)).replace('_', ' ')
    axes.text(left + WIDTH / 2, 0.22, heading, ha='center', linespacing=1.05, **title)
    size = f'{spec.image_size}x{spec.image_size}'
    axes.text(left + WIDTH / 2, HEADER - 0.13, size, color=INK, size=10, ha='center', va='center')
    for row, layers in columns[name].items():
      top = tops[row]
      for kind, label, groups in layers:
        top = draw_box(axes, kind, label, groups, left, top) + GAP
  left = LEFT
  for words, fill, _ in KINDS.values():
    axes.add_patch(FancyBboxPatch((left, y + 0.02), 0.2, 0.18, 'square,pad=0', facecolor=fill, linewidth=0))
    axes.text(left + 0.28, y + 0.12, words, color=INK, size=11, va='center')
    left += 0.75 + 0.085 * len(words)
  return drawn


def main() -> None:
  """Writes the figure."""
  with matplotlib.rc_context({'font.family': 'DejaVu Sans'}):
    figure().savefig(FILE, transparent=True, metadata={'Software': None})


if __name__ == '__main__':
  main()
