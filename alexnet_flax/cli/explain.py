"""`alexnet-flax explain`."""

import argparse
import sys

from alexnet_flax.cli.options import add_weights, load, take_network
from alexnet_flax.errors import UsageError, unknown_name

HELP = 'which pixels speak for a class: seven methods side by side'
DESCRIPTION = 'Draws images, each beside what every method says of its most probable class, or of --class.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('images', metavar='IMAGES', nargs='+', help='files, folders, patterns; a network too')
  add_weights(parser, classes=True)
  parser.add_argument(
    '--methods',
    default='all',
    help='some of gradient, smoothgrad, integrated_gradients, guided_backprop, deconvnet, grad_cam, occlusion'
    ' (default: all)',
  )
  parser.add_argument('--class', dest='label', metavar='CLASS', help='name or number of the class to explain')
  parser.add_argument('--steps', type=int, default=32, help='of integrated gradients (32)')
  parser.add_argument(
    '--out',
    metavar='FILE_OR_FOLDER',
    default='explanation.png',
    help='F.png, F.svg or F.pdf with all images; a folder: a PNG of each (default: explanation.png)',
  )


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.files import check_writable, expanded
  from alexnet_flax.inference.attributions import METHODS, OF_RELU, has_relu
  from alexnet_flax.viz.explain import write_explanations

  named = [name.strip() for name in arguments.methods.split(',')]
  for name in named:
    if name not in (*METHODS, 'all'):
      raise unknown_name('method', name, (*METHODS, 'all'))
  if arguments.steps < 1:
    raise UsageError(f'--steps (={arguments.steps}) must be at least 1')
  methods = [name for name in METHODS if name in named or 'all' in named]
  out = expanded(arguments.out)
  if (out.suffix or out.exists()) and not out.is_dir():
    if out.suffix.lower() not in ('.png', '.svg', '.pdf'):
      raise UsageError(f'--out {arguments.out}: the ending must be .png, .svg or .pdf; or name a folder')
    check_writable(out)
  images = take_network(arguments, arguments.images)
  network = load(arguments)
  if not has_relu(network.spec) and (without := [name for name in methods if name in OF_RELU]):
    what = f"{' and '.join(without)} can only change ReLU's derivative, and this network has no ReLU"
    if without == methods:
      raise UsageError(f'{what}; take gradient')
    methods = [name for name in methods if name not in OF_RELU]
    print(f'note: {what}; left out', file=sys.stderr)
  label = None if arguments.label is None else network.label_of(arguments.label)
  if failed := write_explanations(network, images, methods, label, out, arguments.steps):
    raise UsageError(f'{failed} of the images cannot be read')
