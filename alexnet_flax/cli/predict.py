"""`alexnet-flax predict`."""

import argparse

from alexnet_flax.cli.options import add_weights, load, take_network
from alexnet_flax.errors import UsageError

HELP = 'classify image files: the five most probable classes'
DESCRIPTION = 'The five most probable classes of each image, in the order given.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('images', metavar='IMAGES', nargs='+', help='files, folders, patterns; a network too')
  add_weights(parser, classes=True)
  parser.add_argument('--json', action='store_true', help='one JSON object a line')
  parser.add_argument(
    '--saliency', metavar='FOLDER', help='folder for Grad-CAM maps of the most probable class'
  )


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.inference.predict import write_predictions

  images = take_network(arguments, arguments.images)
  failed = write_predictions(load(arguments), images, as_json=arguments.json, saliency=arguments.saliency)
  if failed:
    raise UsageError(f'{failed} of the images cannot be read')
