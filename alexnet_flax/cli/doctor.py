"""`alexnet-flax doctor`."""

import argparse
import dataclasses
import os

from alexnet_flax.files import expanded

HELP = 'check machine, data and recipe for common problems'
DESCRIPTION = (
  'Accepts --config=FILE and --config.KEY=VALUE like train.py; the default is the run in --workdir, else the'
  ' embedded digits.'
)
TAKES_FLAGS = True  # those of train.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--workdir', default='.', help='the folder that runs would be written to')


def run(arguments: argparse.Namespace) -> int:
  from alexnet_flax.cli.train import parse
  from alexnet_flax.config import Config
  from alexnet_flax.diagnostics.doctor import examine
  from alexnet_flax.pretrained import run_config, run_data

  config = Config()
  if arguments.flags:
    config = parse(['train.py', *arguments.flags])[0]
  elif os.path.exists(expanded(arguments.workdir) / 'config.json'):
    config = dataclasses.replace(run_config(arguments.workdir), data=run_data(arguments.workdir))
  return 2 if examine(config, arguments.workdir) else 0
