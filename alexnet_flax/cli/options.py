"""Options that several verbs share: the network, its classes, the data."""

import argparse
import dataclasses
import glob
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alexnet_flax.errors import UsageError

if TYPE_CHECKING:
  from alexnet_flax.pretrained import PretrainedModel


def add_network(parser: argparse.ArgumentParser) -> None:
  """Adds the options that say which network a weights file is of."""
  parser.add_argument('--variant', help='the network, if the file does not describe it')
  parser.add_argument('--width', type=float, default=1.0, help="its width (default: the file's)")
  parser.add_argument('--image_size', type=int, help="its images' side (default: the variant's own)")


def network_options(arguments: argparse.Namespace) -> dict[str, Any]:
  """Returns the options of `add_network` as arguments of `load_pretrained`."""
  return {name: getattr(arguments, name) for name in ('variant', 'width', 'image_size')}


RUNS = "runs' folders; RUN@best and RUN@STEP are other checkpoints than the last"
NETWORK = (
  "a run's folder (RUN@best, RUN@STEP: one of its checkpoints), a file, a URL, a published name, or"
  ' hf:OWNER/NAME[@REVISION]'
)


def add_weights(parser: argparse.ArgumentParser, *, classes: bool) -> None:
  """Adds the options for a trained network, torchvision's by default, and for the names of its classes."""
  parser.add_argument('--weights', metavar='NETWORK', help=f"{NETWORK} (default: torchvision's)")
  add_network(parser)
  parser.set_defaults(classes=None)
  if classes:
    parser.add_argument('--classes', metavar='FILE', help='class names, one a line')


def take_network(arguments: argparse.Namespace, paths: list[str], listed: Sequence[str] = ()) -> list[str]:
  """Takes the trained network that is named among `paths` for `--weights`; returns the others, and `listed`.

  Raises:
    UsageError: There are two networks, nothing besides, or nothing that exists.
  """
  from alexnet_flax.files import buckets, expanded
  from alexnet_flax.pretrained import is_network

  networks = [path for path in paths if is_network(path)]
  if len(networks) + (arguments.weights is not None) > 1:
    one, other = [*networks, arguments.weights][:2]
    raise UsageError(f'{one} and {other} are both networks; name one of them')
  if networks and len(networks) == len(paths) + len(listed):
    raise UsageError(f'{networks[0]} is a network; name the images too')
  if networks:
    (arguments.weights,) = networks
  images = [path for path in paths if path not in networks] + [*listed]
  absent = [path for path in images if not (buckets.is_bucket(path) or glob.has_magic(path))]
  is_default = arguments.weights is None  # which may be downloaded first
  if is_default and len(absent) == len(images) and not any(os.path.exists(expanded(path)) for path in absent):
    raise UsageError(f'cannot read {images[0]}: there is no such file, folder or network')
  return images


def add_data_dir(parser: argparse.ArgumentParser) -> None:
  """Adds the folder of the data sets."""
  parser.add_argument('--data_dir', help="folder of the data sets (default: TFDS's own)")


def add_figure(parser: argparse.ArgumentParser, what: str) -> None:
  """Adds `--figure`, a file for a drawing of `what`."""
  parser.add_argument('--figure', metavar='FILE', help=f'F.svg or F.png: {what}')


def figure_file(arguments: argparse.Namespace) -> pathlib.Path | None:
  """Returns the file of `--figure`, if given; raises UsageError if it cannot be written."""
  if arguments.figure is None:
    return None
  from alexnet_flax.viz.similarity import figure_path

  return figure_path(arguments.figure)


def check_batch_size(arguments: argparse.Namespace) -> None:
  """Raises UsageError for an empty batch."""
  if arguments.batch_size < 1:
    raise UsageError(f'--batch_size (={arguments.batch_size}) must be at least 1')


def load(arguments: argparse.Namespace) -> 'PretrainedModel':
  """Loads the network of the options of `add_weights`."""
  from alexnet_flax.pretrained import find_run, load_pretrained, read_names, run_config

  source = 'torchvision' if arguments.weights is None else arguments.weights
  network = load_pretrained(source, **network_options(arguments))
  if find_run(source) and run_config(source).data.corruption == 'shuffled_pixels':
    print(f'note: {source} was trained on shuffled pixels; images are not shuffled here', file=sys.stderr)
  if arguments.classes is None:
    return network
  names = read_names(arguments.classes, len(network.class_names))
  return dataclasses.replace(network, class_names=names)
