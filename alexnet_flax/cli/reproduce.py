"""`alexnet-flax reproduce`."""

import argparse
import dataclasses

from alexnet_flax.cli.options import add_data_dir
from alexnet_flax.errors import UsageError
from alexnet_flax.files import expanded
from alexnet_flax.files.buckets import is_bucket

HELP = 'reproduce a published number: train, compare, draw'
DESCRIPTION = (
  'Trains what a published result was measured on, by its recipe, with several seeds; says whether the number'
  ' is reproduced, within two standard errors or better, and draws its curves. Goes on where it was cut off.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('name', nargs='?', metavar='NAME', help='the result; --list names them')
  parser.add_argument('--list', action='store_true', help='list the results, and how long each takes')
  parser.add_argument('--seeds', type=int, help='how many (default: as many as the result states)')
  parser.add_argument(
    '--quick', action='store_true', help='the embedded digits, a few steps: whether it works; no verdict'
  )
  parser.add_argument('--workdir', help='folder of the runs (default: runs/reproduce/NAME)')
  parser.add_argument('--results', help='folder of the records (default: that of the runs)')
  add_data_dir(parser)


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.reproduction.claims import CLAIMS

  if arguments.list or arguments.name is None:
    if not arguments.list:
      raise UsageError(f'name a published result: {", ".join(CLAIMS)}')
    for claim in CLAIMS.values():
      minutes = (
        'not timed yet' if claim.minutes is None else f'{claim.minutes:g} min a seed on one or two cores'
      )
      print(f'{claim.name:15} {claim.seeds} x, {minutes}: {claim.what}')
    return
  claim = CLAIMS[arguments.name]
  seeds = claim.seeds if arguments.seeds is None else arguments.seeds
  if seeds < 1:
    raise UsageError(f'--seeds (={seeds}) must be at least 1')

  from alexnet_flax.reproduction.figure import draw
  from alexnet_flax.reproduction.reproduce import QUICK, reproduce, verdict

  quick = '-quick' if arguments.quick else ''
  default = f'runs/reproduce/{claim.name}{quick}'
  if is_bucket(arguments.workdir):
    raise UsageError(
      f'--workdir={arguments.workdir}: the runs of reproduce are written to a disk; give a folder'
    )
  folder = expanded(default if arguments.workdir is None else arguments.workdir)
  records = folder if arguments.results is None else expanded(arguments.results)
  results = None if arguments.quick else records / f'{claim.name}.json'
  others = {'data.data_dir': arguments.data_dir} | (QUICK if arguments.quick else {})
  if arguments.quick and claim.rates:
    others['optimizer.learning_rate'] = min(claim.rates)
    claim = dataclasses.replace(claim, rates=())
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f'cannot write to --workdir={folder}: {error.strerror}') from None
  runs = reproduce(claim, folder, results, seeds=seeds, others=others)
  figure = folder / f'{claim.name}.svg'
  draw(claim, runs, figure)
  found = verdict(claim, runs)
  number = (
    f'the order of {len(claim.published_changes)} changes' if claim.published_changes else claim.published
  )
  published = f'published: {number} ({claim.source})'
  if results is None:
    mean = '-' if found is None else f'{found.mean:.4g}'
    print(f'{claim.name} on the embedded digits, which is no verdict: {mean} {claim.unit}; {figure}')
  else:
    print(f'{claim.name}: {found} {claim.unit}; {published}; {figure} and {results}')
