"""Options by which verbs are told which network, of which classes, on which data."""

import argparse
import dataclasses
import typing

from alexnet_flax.errors import UsageError

if typing.TYPE_CHECKING:
  from alexnet_flax.pretrained import Trained


def add_network(parser: argparse.ArgumentParser) -> None:
  """Which network a weights file is of."""
  parser.add_argument('--variant', help='which network, where the file does not tell')
  parser.add_argument('--width', type=float, default=1.0, help="its width (default: the variant's own, 1)")
  parser.add_argument('--image_size', type=int, help="its images' side (default: the variant's own)")


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


def check_batch_size(arguments: argparse.Namespace) -> None:
  """Raises UsageError if no image would be in a batch."""
  if arguments.batch_size < 1:
    raise UsageError(f'--batch_size (={arguments.batch_size}) must be at least 1')


def add_classes(parser: argparse.ArgumentParser) -> None:
  """What the classes are called."""
  parser.add_argument('--classes', metavar='FILE', help='names of the classes, one a line')


def load(arguments: argparse.Namespace) -> 'Trained':
  """The network that `add_weights` and `add_classes` ask for."""
  from alexnet_flax.pretrained import load_trained, read_names

  network = load_trained(arguments.weights, arguments.variant, arguments.width, arguments.image_size)
  if arguments.classes is None:
    return network
  names = read_names(arguments.classes, len(network.class_names))
  return dataclasses.replace(network, class_names=names)
