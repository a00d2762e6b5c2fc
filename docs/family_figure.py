"""Draws the eleven networks side by side, from their specs, into docs/images/family.png.

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
  'batchnorm': ('batch norm', '#f28482', '#222222'),
  'dropout': ('dropout', '#d9d9d9', '#222222'),
}
ROWS = ['input', *(f'conv{n}' for n in range(1, 6)), 'fc6', 'fc7', 'head']
WIDTH, TALL, LOW, GAP, STAGE_GAP, BETWEEN_GROUPS = 0.86, 0.72, 0.40, 0.05, 0.34, 0.05


def kind_and_label(layer: specs.Layer, spec: Spec) -> tuple[str, str] | None:
  """Returns a layer's kind and the text on its box; None for a layer that is not drawn."""
  match layer:
    case specs.Conv():
      stride = f' /{layer.strides}' if layer.strides > 1 else ''
      return 'conv', f'{layer.kernel_size}x{layer.kernel_size}, {layer.features}{stride}'
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


def stages(spec: Spec) -> dict[str, list[specs.Layer]]:
  """Returns the drawn layers by row: each weight layer begins a row, and the head is in the last."""
  row, found = 'input', {row: [] for row in ROWS}
  for name, layer in spec.named_layers():
    if isinstance(layer, specs.Conv | specs.Dense):
      row = ROWS[-1] if name == spec.head else name
    if kind_and_label(layer, spec):
      found[row].append(layer)
  return found


def height(layer: specs.Layer) -> float:
  """Returns the height of a layer's box."""
  return TALL if isinstance(layer, specs.Conv | specs.Dense) else LOW


def draw_layer(axes: Any, layer: specs.Layer, spec: Spec, left: float, top: float) -> None:
  """Draws one box, or one box for each group of channels."""
  described, groups = kind_and_label(layer, spec), getattr(layer, 'groups', 1)
  assert described is not None
  kind, label = described
  _, fill, text = KINDS[kind]
  if isinstance(layer, specs.Conv):
    label = label.replace(str(layer.features), str(layer.features // groups))
  width, tall = (WIDTH - BETWEEN_GROUPS * (groups - 1)) / groups, height(layer)
  size = 6.4 if tall == LOW else 7.4 if groups == 1 else 5.9
  for group in range(groups):
    x = left + group * (width + BETWEEN_GROUPS)
    style = 'round,pad=0,rounding_size=0.05'
    axes.add_patch(FancyBboxPatch((x, top), width, tall, style, facecolor=fill, linewidth=0))
    axes.text(x + width / 2, top + tall / 2, label, color=text, size=size, ha='center', va='center')


def figure() -> Figure:
  """Returns the figure."""
  columns = {name: stages(spec) for name, spec in VARIANTS.items()}
  tops, y = {}, 0.0
  for row in ROWS:
    tops[row] = y
    y += max(sum(height(layer) + GAP for layer in found[row]) for found in columns.values()) + STAGE_GAP
  drawn = Figure(figsize=(13, 8.6), dpi=120, facecolor='white')
  axes = drawn.add_axes((0.0, 0.0, 1.0, 1.0))
  axes.set_xlim(-0.85, len(VARIANTS) + 0.05)
  axes.set_ylim(y + 0.75, -1.35)
  axes.axis('off')
  for row in ROWS[1:]:
    axes.text(
      -0.15, tops[row] + TALL / 2, row, size=9, weight='bold', color='#444444', ha='right', va='center'
    )
    axes.axhspan(tops[row] - STAGE_GAP / 2, tops[row] - STAGE_GAP / 2 + 0.015, color='#e4e4e4', zorder=0)
  for column, (name, spec) in enumerate(VARIANTS.items()):
    center = column + WIDTH / 2
    axes.text(
      center,
      -0.95,
      '\n'.join(name.rsplit('_', 1)).replace('_', ' '),
      size=8.4,
      weight='bold',
      ha='center',
      va='center',
    )
    axes.text(
      center,
      -0.3,
      f'{spec.image_size}x{spec.image_size}',
      size=7.5,
      color='#666666',
      ha='center',
      va='center',
    )
    for row, layers in columns[name].items():
      top = tops[row]
      for layer in layers:
        draw_layer(axes, layer, spec, column, top)
        top += height(layer) + GAP
  for index, (words, fill, _) in enumerate(KINDS.values()):
    left = 0.0 + index * 1.57
    axes.add_patch(FancyBboxPatch((left, y + 0.1), 0.22, 0.3, 'square,pad=0', facecolor=fill, linewidth=0))
    axes.text(left + 0.3, y + 0.25, words, size=8.5, va='center')
  return drawn


def main() -> None:
  """Writes the figure."""
  with matplotlib.rc_context({'font.family': 'DejaVu Sans'}):
    figure().savefig(FILE, metadata={'Software': None})


if __name__ == '__main__':
  main()
