"""`alexnet-flax verify-resume`."""

import argparse

from alexnet_flax.errors import UsageError

HELP = 'kill a run again and again, and compare it with one that was left alone'
DESCRIPTION = 'Takes --config=FILE and --config.KEY=VALUE as train.py does; few steps unless given.'
TAKES_FLAGS = True  # train.py's


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What the verb takes."""
  parser.add_argument('--kills', type=int, default=3, help='how many (default 3)')
  parser.add_argument('--seed', type=int, default=0, help='of the moments')


def run(arguments: argparse.Namespace) -> int:
  """Proves; returns the exit code."""
  from alexnet_flax.cli.train import parse
  from alexnet_flax.diagnostics.verify_resume import prove_resume

  if arguments.kills < 1:
    raise UsageError(f'--kills (={arguments.kills}) must be at least 1')
  parse(['train.py', *arguments.flags])  # its mistakes are said before anything begins
  proof = prove_resume(
    arguments.flags, arguments.kills, seed=arguments.seed, say=lambda line: print(line, flush=True)
  )
  for difference in proof.differences:
    print(f'different: {difference}')
  counts = ', '.join(f'{count:,} {name}' for name, count in proof.compared.items())
  print(
    f'{proof.kills} kills, {proof.inside_save} inside of a save: {proof.equal} times the same bits ({counts})'
  )
  return 0 if proof.equal == proof.kills else 1
