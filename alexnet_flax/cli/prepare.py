"""`alexnet-flax prepare`."""

import argparse

from alexnet_flax.cli.options import add_data_dir
from alexnet_flax.errors import UsageError

HELP = 'download and prepare a TFDS data set; make its images smaller'
DESCRIPTION = (
  'Downloads and prepares a TFDS data set, for training by --config.data.dataset=NAME; with --side, writes a'
  ' prepared one anew with smaller images, which train several times as fast.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What the verb takes."""
  parser.add_argument('dataset', metavar='NAME', help='such as cifar10, mnist, imagenet2012')
  add_data_dir(parser)
  parser.add_argument('--manual_dir', help="where archives downloaded by hand lie (ImageNet's two)")
  parser.add_argument('--side', type=int, help='what the short side of its images becomes, such as 256')
  parser.add_argument('--encoding', help='jpeg (default) or raw')
  parser.add_argument('--quality', type=int, help='of JPEG (default 90)')
  parser.add_argument('--crop', help='none (default), or center for the central square')
  parser.add_argument('--out_dir', help='where the smaller ones go (default: --data_dir)')
  parser.add_argument('--on_bad_image', choices=['error', 'skip'], default='error')


def run(arguments: argparse.Namespace) -> int:
  """Prepares; returns the exit code."""
  from alexnet_flax.data import tfds_source

  given = {name: getattr(arguments, name) for name in ('encoding', 'quality', 'crop')}
  given = {name: value for name, value in given.items() if value is not None}
  if arguments.side is None:
    if given:
      raise UsageError(f'--{next(iter(given))} is for smaller images; give their --side too, such as 256')
    tfds_source.prepare(arguments.dataset, arguments.data_dir, arguments.manual_dir)
    return 0
  from alexnet_flax.data.prepare.resize import prepare_smaller
  from alexnet_flax.data.prepare.shards import Form

  name = prepare_smaller(
    arguments.dataset,
    Form(arguments.side, **given),
    data_dir=arguments.data_dir,
    out_dir=arguments.out_dir,
    on_bad_image=arguments.on_bad_image,
  )
  print(f'train on it by --config.data.dataset={name}')
  return 0
