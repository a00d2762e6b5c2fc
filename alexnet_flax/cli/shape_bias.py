"""`alexnet-flax shape-bias`."""

import argparse
import json
import pathlib
import sys

from alexnet_flax.cli.options import add_figure, add_weights, figure_file, load, take_network
from alexnet_flax.errors import UsageError, one_line

HELP = 'shape or texture: decisions on cue-conflict images, beside those of people'
DESCRIPTION = (
  'Shape bias (Geirhos et al. 2019) of a network of ImageNet on images FOLDER/SHAPE/SHAPE1-TEXTURE1.png, and'
  ' its error consistency (Geirhos et al. 2020) with people or other networks.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('folder', metavar='FOLDER', nargs='+', help="the toolbox's cue-conflict; a network too")
  add_weights(parser, classes=False)
  parser.add_argument(
    '--humans', metavar='FILE', nargs='+', default=[], help="trials of people or networks: the toolbox's CSV"
  )
  parser.add_argument('--out', metavar='FILE', help="CSV for the network's own trials")
  parser.add_argument('--json', action='store_true', help='one JSON object')
  add_figure(parser, 'shape decisions by shape')


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.evaluation import shape_bias as bias
  from alexnet_flax.files import check_writable, expanded

  if arguments.out is not None:
    check_writable(expanded(arguments.out))
  figure = figure_file(arguments)
  places = take_network(arguments, arguments.folder)
  if len(places) > 1:
    raise UsageError(f'name one folder, not {len(places)}: {", ".join(places)}')
  images = bias.cue_images(places[0])
  others = bias.read_trials(arguments.humans, images)
  network = load(arguments)
  ours = bias.network_decisions(network, images)
  if missing := set(bias.CATEGORIES) - {bias.cues(name)[1] for name in images}:
    print(
      f'note: no images of {", ".join(sorted(missing))}: published figures are of 16 shapes', file=sys.stderr
    )
  result = bias.with_observers(ours, others)
  name = one_line(pathlib.PurePath(network.source).name)
  if arguments.out is not None:
    bias.write_trials(arguments.out, name, ours)
  title = f'{name} ({network.spec.name})'
  if figure:
    from alexnet_flax.viz.perception import draw_shape_bias

    draw_shape_bias({title: ours, **others}, figure)
  if arguments.json:
    print(json.dumps({'network': name, 'variant': network.spec.name, **result}))
    return
  print(f'{result["images"]:,} images with a conflict, of {len(images):,}\n')
  print('shape bias  95 % interval   error consistency with the network')
  for observer, figures in {title: result, **result['observers']}.items():
    bounds = [figures[key] for key in ('shape_bias', 'low', 'high')]
    value, low, high = ('-' if bound is None else f'{100 * bound:.1f}' for bound in bounds)
    kappa = '' if figures is result else f'{figures["error_consistency"]:.3f}'
    print(f'{value:>8} %  {low:>5} ... {high:5}  {kappa:>6}  {one_line(observer)}')
  if result['observers']:
    print(f'\nmean error consistency with the network: {result["error_consistency"]:.3f}')
  if (among := result['error_consistency_among_observers']) is not None:
    print(f'mean error consistency among the others: {among:.3f}')
