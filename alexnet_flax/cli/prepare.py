"""`alexnet-flax prepare`."""

import argparse

from alexnet_flax.cli.options import add_data_dir
from alexnet_flax.errors import UsageError

HELP = 'download and prepare a TFDS data set, or rewrite one with smaller images'
DESCRIPTION = (
  'Downloads and prepares a TFDS data set, for training with --config.data.dataset=NAME. With --side,'
  ' rewrites a prepared data set with smaller images, which load several times as fast.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('dataset', metavar='NAME', help='a data set, such as cifar10, mnist, imagenet2012')
  add_data_dir(parser)
  parser.add_argument('--manual_dir', help="folder of archives downloaded by hand (ImageNet's two)")
  parser.add_argument('--side', type=int, help='new short side of the images, such as 256')
  parser.add_argument('--encoding', help='encoding of the new images: jpeg (default) or raw')
  parser.add_argument('--quality', type=int, help='JPEG quality (default 90)')
  parser.add_argument('--crop', help='none (default), or center for the central square')
  parser.add_argument('--out_dir', help='folder of the new data set (default: --data_dir)')
  parser.add_argument('--on_bad_image', choices=['error', 'skip'], default='error')


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.data import tfds_source

  given = {name: getattr(arguments, name) for name in ('encoding', 'quality', 'crop')}
  given = {name: value for name, value in given.items() if value is not None}
  if arguments.side is None:
    if given:
      raise UsageError(f'--{next(iter(given))} is for smaller images; add their --side, such as 256')
    tfds_source.prepare(arguments.dataset, arguments.data_dir, arguments.manual_dir)
    return
  from alexnet_flax.data.prepare.resize import ImageFormat, prepare_smaller

  name = prepare_smaller(
    arguments.dataset,
    ImageFormat(arguments.side, **given),
    data_dir=arguments.data_dir,
    out_dir=arguments.out_dir,
    on_bad_image=arguments.on_bad_image,
  )
  print(f'train on it with --config.data.dataset={name}')
