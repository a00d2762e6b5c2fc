"""`alexnet-flax VERB ...`, the same as `python -m alexnet_flax VERB ...`."""

import argparse
import sys
from typing import NoReturn

from alexnet_flax.errors import UsageError


def main(argv: list[str] | None = None) -> int:
  """Runs a verb; returns the exit code, having printed one line for every foreseeable error."""
  parser = argparse.ArgumentParser(prog='alexnet-flax', description='AlexNet in JAX and Flax.')
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
  prepare = verbs.add_parser(
    'prepare',
    help='download and prepare a TFDS data set',
    description='Downloads and prepares a TFDS data set, for training by --config.data.dataset=NAME.',
  )
  prepare.add_argument('dataset', metavar='NAME', help='such as cifar10, mnist, imagenet2012')
  prepare.add_argument('--data_dir', help="where data sets lie (default: TFDS's own folder)")
  prepare.add_argument('--manual_dir', help="where archives downloaded by hand lie (ImageNet's two)")
  for one in (parser, prepare):
    one.error = _refuse  # type: ignore[method-assign]
  try:
    arguments = parser.parse_args(argv)
    from alexnet_flax.data import datasets

    datasets.prepare(arguments.dataset, arguments.data_dir, arguments.manual_dir)
    return 0
  except UsageError as error:
    print(f'error: {error}', file=sys.stderr)
    return error.exit_code


def _refuse(message: str) -> NoReturn:
  """argparse's message as a line, without its usage text."""
  raise UsageError(f'{" ".join(message.split())}; see alexnet-flax --help')


if __name__ == '__main__':
  sys.exit(main())
