"""`alexnet-flax report`."""

import argparse
import dataclasses
import pathlib

from alexnet_flax.cli.options import add_data_dir

HELP = 'write an HTML report of a run, or of several side by side'
DESCRIPTION = (
  'Writes a self-contained HTML page: curves, first filters, predictions, nearest neighbours, confusion'
  ' matrix, errors, layers, speed, configuration. Compares several runs side by side.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('workdirs', metavar='WORKDIR', nargs='+', help='the folders of the runs')
  add_data_dir(parser)
  parser.add_argument('--out', help='(default: WORKDIR/report.html; ./report.html for several runs)')


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.viz.report import FILE, load_results, write_report

  folders = arguments.workdirs
  default = pathlib.Path(folders[0]).expanduser() / FILE if len(folders) == 1 else pathlib.Path(FILE)
  path = pathlib.Path(arguments.out).expanduser() if arguments.out else default
  runs = [load_results(folder, arguments.data_dir) for folder in folders]
  if len({run.name for run in runs}) < len(runs):  # such as a/digits and b/digits
    runs = [dataclasses.replace(run, name=folder) for run, folder in zip(runs, folders, strict=True)]
  write_report(runs, path)
  print(f'wrote {path}')
