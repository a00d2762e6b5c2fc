"""`alexnet-flax demo`."""

import argparse

from alexnet_flax.cli.options import add_classes, add_weights, load
from alexnet_flax.errors import UsageError

HELP = 'a page to drop an image on'
DESCRIPTION = 'Serves a page: five best answers, where the network looks, every layer. To this machine alone.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What the verb takes."""
  parser.add_argument('workdir', metavar='WORKDIR', nargs='?', help="a run's folder, instead of --weights")
  add_weights(parser)
  add_classes(parser)
  parser.add_argument('--port', type=int, default=8000, help='(default 8000; 0 for any that is free)')
  parser.add_argument(
    '--host',
    default='127.0.0.1',
    help='(default 127.0.0.1: this machine alone; 0.0.0.0: the network)',
  )


def run(arguments: argparse.Namespace) -> int:
  """Serves; returns the exit code."""
  try:
    from alexnet_flax.viz.demo import serve
  except ModuleNotFoundError as error:
    raise UsageError(f"the page needs {error.name}; pip install 'alexnet_flax[demo]'") from None
  if arguments.workdir:
    arguments.weights = arguments.workdir
  serve(load(arguments), arguments.host, arguments.port)
  return 0
