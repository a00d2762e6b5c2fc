"""`alexnet-flax report`."""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Sequence

from alexnet_flax.cli.options import RUNS, add_data_dir
from alexnet_flax.errors import UsageError, one_line
from alexnet_flax.files import expanded

HELP = 'write an HTML report of a run, or of several side by side'
DESCRIPTION = (
  'Writes a self-contained HTML page: curves, first filters, predictions, nearest neighbours, confusion'
  ' matrix, errors, layers, speed, configuration. Compares several runs side by side.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('networks', metavar='RUN', nargs='*', help=RUNS)
  parser.add_argument('--weights', metavar='RUN', nargs='+', default=[], help='the same')
  add_data_dir(parser)
  parser.add_argument(
    '--out', help='(default: RUN/report.html or report-best.html; ./report.html for several)'
  )


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.pretrained import find_run
  from alexnet_flax.viz.report import FILE, load_results, write_report

  folders = [*arguments.networks, *arguments.weights]
  if not folders:
    raise UsageError('name the runs: alexnet-flax report RUN ...')
  runs = [load_results(folder, arguments.data_dir) for folder in folders]
  default = pathlib.Path(FILE)
  if len(runs) == 1 and (found := find_run(folders[0])):
    default = found[0] / (FILE.replace('.', f'-{found[1]}.') if found[1] else FILE)
  path = default if arguments.out is None else expanded(arguments.out)
  if len({run.name for run in runs}) < len(runs):  # such as a/digits and b/digits
    names = _names([one for folder in folders if (one := find_run(folder))])
    runs = [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]
  write_report(runs, path)
  print(one_line(f'wrote {path}'))


def _names(runs: Sequence[tuple[pathlib.Path, str | None]]) -> list[str]:
  """Returns the names of runs of which several end alike: their paths from where these part."""
  folders = [folder.resolve() for folder, _ in runs]
  parting = os.path.commonpath([folder.parent for folder in folders])
  steps = [f'@{which}' if which else '' for _, which in runs]
  return [f'{folder.relative_to(parting)}{step}' for folder, step in zip(folders, steps, strict=True)]
