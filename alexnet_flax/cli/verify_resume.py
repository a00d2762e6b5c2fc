"""`alexnet-flax verify-resume`."""

import argparse

from alexnet_flax.errors import UsageError

HELP = 'kill a run repeatedly, and compare it with an uninterrupted run'
DESCRIPTION = (
  'Accepts --config=FILE and --config.KEY=VALUE like train.py; by default a small number of steps.'
)
TAKES_FLAGS = True  # those of train.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--kills', type=int, default=3, help='number of kills (default 3)')
  parser.add_argument('--seed', type=int, default=0, help='seed of the random times')


def run(arguments: argparse.Namespace) -> int:
  from alexnet_flax.cli.train import parse
  from alexnet_flax.diagnostics.determinism import line_if_other_bits
  from alexnet_flax.diagnostics.verify_resume import verify_resume

  if arguments.kills < 1:
    raise UsageError(f'--kills (={arguments.kills}) must be at least 1')
  config, _ = parse(['train.py', *arguments.flags])  # reports mistakes before the runs start
  if line := line_if_other_bits(config):
    print(f'warning: {line}', flush=True)
  result = verify_resume(
    arguments.flags, arguments.kills, seed=arguments.seed, say=lambda line: print(line, flush=True)
  )
  for difference in result.differences:
    print(f'different: {difference}')
  counts = ', '.join(f'{count:,} {name}' for name, count in result.compared.items())
  print(f'{result.kills} kills, {result.inside_save} during a save: {result.equal} bit-identical ({counts})')
  return 0 if result.equal == result.kills else 1
