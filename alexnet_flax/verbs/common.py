"""Arguments that several verbs share."""

import argparse
import dataclasses
import typing

if typing.TYPE_CHECKING:
  from alexnet_flax.trained import Trained


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


def add_classes(parser: argparse.ArgumentParser) -> None:
  """What the classes are called."""
  parser.add_argument('--classes', metavar='FILE', help='names of the classes, one a line')


def load(arguments: argparse.Namespace) -> 'Trained':
  """The network that `add_weights` and `add_classes` ask for."""
  from alexnet_flax.class_names import read_names
  from alexnet_flax.trained import load_trained

  network = load_trained(arguments.weights, arguments.variant, arguments.width, arguments.image_size)
  if arguments.classes is None:
    return network
  names = read_names(arguments.classes, len(network.class_names))
  return dataclasses.replace(network, class_names=names)
