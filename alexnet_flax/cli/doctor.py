"""`alexnet-flax doctor`."""

import argparse

HELP = 'look for what could be wrong with machine, data and recipe'
DESCRIPTION = 'Takes --config=FILE and --config.KEY=VALUE as train.py does; without, the embedded digits.'
TAKES_FLAGS = True  # train.py's


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What the verb takes."""
  parser.add_argument('--workdir', default='.', help='where runs are to be written')


def run(arguments: argparse.Namespace) -> int:
  """Examines; returns the exit code."""
  from alexnet_flax.cli.train import parse
  from alexnet_flax.config import Config
  from alexnet_flax.diagnostics.doctor import examine

  config = parse(['train.py', *arguments.flags])[0] if arguments.flags else Config()
  return 2 if examine(config, arguments.workdir) else 0
