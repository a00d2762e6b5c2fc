"""`alexnet-flax demo`."""

import argparse

from alexnet_flax.cli.options import add_weights, load
from alexnet_flax.errors import UsageError, needs_extra

HELP = 'web demo'
DESCRIPTION = 'Serves a page that classifies images: top-5, Grad-CAM, every layer. To this machine alone.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('network', metavar='NETWORK', nargs='?', help='the same as --weights')
  add_weights(parser, classes=True)
  parser.add_argument('--port', type=int, default=8000, help='(default 8000; 0 for any that is free)')
  parser.add_argument(
    '--host', default='127.0.0.1', help='(default 127.0.0.1: this machine alone; 0.0.0.0: the network)'
  )


def run(arguments: argparse.Namespace) -> None:
  with needs_extra('demo'):
    from alexnet_flax.viz.demo import serve
  if arguments.network and arguments.weights:
    raise UsageError(f'{arguments.network} and {arguments.weights} are both networks; name one of them')
  arguments.weights = arguments.network or arguments.weights
  serve(load(arguments), arguments.host, arguments.port)
