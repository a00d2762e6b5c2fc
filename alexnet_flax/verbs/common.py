"""Arguments that several verbs share."""

import argparse


def add_network(parser: argparse.ArgumentParser) -> None:
  """Which network a weights file is of."""
  parser.add_argument('--variant', help='which network, where the file does not tell')
  parser.add_argument('--width', type=float, default=1.0, help="its width (default: the variant's own, 1)")
  parser.add_argument('--image_size', type=int, help="its pictures' side (default: the variant's own)")


def add_weights(parser: argparse.ArgumentParser) -> None:
  """A trained network; torchvision's unless another is named."""
  parser.add_argument(
    '--weights',
    default='torchvision',
    help="a run's folder, a file, a URL or a published name (default: torchvision's, downloaded once)",
  )
  add_network(parser)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
  """Where data sets are looked for."""
  parser.add_argument('--data_dir', help="where data sets lie (default: TFDS's own folder)")
