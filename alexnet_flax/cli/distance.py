"""`alexnet-flax distance`."""

import argparse
import json

from alexnet_flax.cli.options import add_figure, add_weights, figure_file, load, take_network
from alexnet_flax.errors import UsageError, one_line

HELP = 'how different images look: LPIPS (Zhang et al. 2018)'
DESCRIPTION = (
  'LPIPS, version 0.1, of two images, or of the images of the same names in two folders, and the mean. The'
  " network is torchvision's AlexNet; other weights of it give another distance than the published one."
)
_DRAWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('images', metavar='A B', nargs='+', help='two images, or two folders; a network too')
  add_weights(parser, classes=False)
  parser.add_argument(
    '--heads', metavar='FILE', help="weights of the layers' channels (default: the authors', v0.1/alex.pth)"
  )
  parser.add_argument('--json', action='store_true', help='one JSON object')
  add_figure(parser, f'where images differ, of up to {_DRAWN} pairs')


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.inference.lpips import distances, image_pairs, load_heads

  figure = figure_file(arguments)
  places = take_network(arguments, arguments.images)
  if len(places) != 2:
    raise UsageError(f'name two images, or two folders, not {len(places)}')
  pairs = image_pairs(*places)
  network = load(arguments)
  heads = load_heads(arguments.heads, network.spec)
  found = []
  for pair, distance in zip(pairs, distances(network, heads, pairs), strict=True):
    found.append(distance.item())
    if not arguments.json:
      print(f'{distance:.6f}  {one_line(pair[0])}  {one_line(pair[1])}', flush=True)
  mean = sum(found) / len(found)
  if arguments.json:
    listed = [
      {'first': first, 'second': second, 'lpips': distance}
      for (first, second), distance in zip(pairs, found, strict=True)
    ]
    print(json.dumps({'pairs': listed, 'mean': mean}))
  elif len(pairs) > 1:
    print(f'{mean:.6f}  mean of {len(pairs)} pairs')
  if figure:
    from alexnet_flax.viz.perception import draw_distances

    drawn = pairs[:_DRAWN]
    draw_distances(drawn, found[:_DRAWN], list(distances(network, heads, drawn, spatial=True)), figure)
