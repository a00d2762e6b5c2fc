"""`alexnet-flax convert`."""

import argparse

from alexnet_flax.cli.options import NETWORK, add_network, network_options
from alexnet_flax.errors import UsageError

HELP = "convert weights between programs' formats; export networks as ONNX or StableHLO"
DESCRIPTION = (
  "Reads a run's folder, a weights file, a URL or a published name, and writes SRC's weights in the format of"
  ' the ending: .safetensors, .pth, .caffemodel (and .prototxt), .weights.h5, .keras; or the whole network as'
  ' .onnx or .stablehlo, from images to logits. A model card is written beside it.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('source', metavar='SRC', nargs='?', help=NETWORK)
  parser.add_argument('destination', metavar='DST')
  parser.add_argument('--weights', metavar='SRC', help='the same as SRC')
  add_network(parser)
  parser.add_argument('--names', choices=['torchvision'], help="safetensors in torchvision's names")
  parser.add_argument(
    '--verify', action='store_true', help="compare every layer with SRC's own program on images"
  )
  parser.add_argument('--images', nargs='+', default=(), help="for --verify (default: scikit-learn's two)")


def run(arguments: argparse.Namespace) -> int:
  from alexnet_flax.export.convert import convert

  if (arguments.source is None) == (arguments.weights is None):
    raise UsageError('name the network and the file to write, once: alexnet-flax convert SRC DST')
  agrees = convert(
    arguments.weights if arguments.source is None else arguments.source,
    arguments.destination,
    **network_options(arguments),
    names=arguments.names,
    verify=arguments.verify or bool(arguments.images),
    images=arguments.images,
  )
  return 0 if agrees else 1
