"""`alexnet-flax features`."""

import argparse

from alexnet_flax.cli.options import add_weights, check_batch_size, load, take_network
from alexnet_flax.errors import UsageError

HELP = 'activations of layers for image files'
DESCRIPTION = (
  'Writes one row an image, in the order given, and the names beside them. The row of an image that cannot'
  ' be read is NaN, and the exit code 2.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('images', metavar='IMAGES', nargs='*', help='files, folders, patterns; a network too')
  parser.add_argument(
    '--list',
    metavar='FILE',
    help="a list of further images, one a line: paths in the list's folder, or from here",
  )
  parser.add_argument('--layers', required=True, help='such as relu3,fc7')
  parser.add_argument('--out', required=True, help='F.h5 or F.npz')
  add_weights(parser, classes=False)
  parser.add_argument(
    '--names', default='ours', help="whose names of layers: 'ours' (default), 'torchvision' or 'caffe'"
  )
  parser.add_argument('--pool', choices=['mean', 'max'], help='over space; else all of it')
  parser.add_argument('--half', action='store_true', help='float16 instead of float32')
  parser.add_argument('--batch_size', type=int, default=64)


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.data.images import listed_files
  from alexnet_flax.inference.feature_files import feature_path, write_features

  check_batch_size(arguments)
  listed = [] if arguments.list is None else listed_files(arguments.list)
  if not arguments.images and not listed:
    raise UsageError('name the images: files, folders, patterns, or --list FILE')
  images = take_network(arguments, arguments.images, listed)
  feature_path(arguments.out)  # before the network is loaded
  unreadable = write_features(
    load(arguments),
    images,
    arguments.layers.split(','),
    arguments.out,
    names=arguments.names,
    pool=arguments.pool,
    half=arguments.half,
    batch_size=arguments.batch_size,
  )
  if unreadable:
    raise UsageError(
      f'{len(unreadable)} of the images cannot be read; {arguments.out} is written, and their rows are NaN'
    )
