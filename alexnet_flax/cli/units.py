"""`alexnet-flax units`."""

import argparse

from alexnet_flax.cli.options import add_data_dir, add_weights, load
from alexnet_flax.errors import UsageError

HELP = 'what the units of a layer like'
DESCRIPTION = (
  'Writes a page with an image made to activate each unit, the images of a folder or data set that activate'
  ' it most, the part of them that it sees, and its receptive field.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('network', metavar='NETWORK', nargs='?', help='the same as --weights')
  add_weights(parser, classes=True)
  parser.add_argument('--layer', required=True, help='such as conv5 or fc8')
  parser.add_argument('--units', help='its channels, such as 0-15,20 (default: the first 16)')
  parser.add_argument('--images', help='a folder, file or pattern, or a data set NAME[:SPLIT]')
  add_data_dir(parser)
  parser.add_argument('--top', type=int, default=8, help='images for each unit (8)')
  parser.add_argument(
    '--objective', choices=['channel', 'center'], default='channel', help='its mean (default) or middle unit'
  )
  parser.add_argument('--steps', type=int, default=96, help='of Adam (96)')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', default='units.html', help='F.html or F.png (default: units.html)')


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.files import check_writable, expanded
  from alexnet_flax.inference.units import AT_ONCE, output_shape, parse_units
  from alexnet_flax.pretrained import find_run, run_config, run_data
  from alexnet_flax.viz.units import open_images, write_units

  if arguments.network and arguments.weights:
    raise UsageError(f'{arguments.network} and {arguments.weights} are both networks; name one of them')
  if min(arguments.steps, arguments.top) < 1:
    raise UsageError(f'--steps (={arguments.steps}) and --top (={arguments.top}) must be at least 1')
  if not 0 <= arguments.seed < 2**32:
    raise UsageError(f'--seed (={arguments.seed}) must be between 0 and {2**32 - 1}')
  out, data_dir, images = expanded(arguments.out), arguments.data_dir, None
  if out.suffix.lower() not in ('.html', '.png'):
    raise UsageError(f'--out {arguments.out}: the ending must be .html or .png')
  check_writable(out)
  arguments.weights = arguments.network or arguments.weights
  network = load(arguments)
  count = output_shape(network, arguments.layer)[-1]
  units = f'0-{min(AT_ONCE, count) - 1}' if arguments.units is None else arguments.units
  chosen = parse_units(units, count)
  if arguments.images is not None:
    run = network.source if find_run(network.source) else None
    if run and arguments.images.partition(':')[0] == run_config(run).data.dataset:
      data_dir = run_data(run, data_dir).data_dir
    images = open_images(arguments.images, network.spec, data_dir)
  options = {name: getattr(arguments, name) for name in ('objective', 'steps', 'seed', 'top')}
  failed = write_units(network, arguments.layer, chosen, out, images, **options)
  print(f'wrote {out}')
  if failed:
    raise UsageError(f'{failed} of the images cannot be read; {out} is written without them')
