"""`alexnet-flax report`."""

import argparse
import dataclasses
import pathlib

from alexnet_flax.cli.options import add_data_dir

HELP = 'a page of images of a run, or of several side by side'
DESCRIPTION = (
  'Writes one self-contained page: curves, first filters, answers to images, nearest neighbours, confusion,'
  ' mistakes, layers, speed, configuration. Of several runs, a comparison too.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What the verb takes."""
  parser.add_argument('workdirs', metavar='WORKDIR', nargs='+', help="runs' folders")
  add_data_dir(parser)
  parser.add_argument('--out', help='(default: WORKDIR/report.html; of several runs, report.html here)')


def run(arguments: argparse.Namespace) -> int:
  """Reports; returns the exit code."""
  from alexnet_flax.viz.report import FILE, write_report
  from alexnet_flax.viz.report_run import load_subject

  folders = arguments.workdirs
  default = pathlib.Path(folders[0]).expanduser() / FILE if len(folders) == 1 else pathlib.Path(FILE)
  path = pathlib.Path(arguments.out).expanduser() if arguments.out else default
  subjects = [load_subject(folder, arguments.data_dir) for folder in folders]
  if len({subject.name for subject in subjects}) < len(subjects):  # a/digits and b/digits
    subjects = [
      dataclasses.replace(subject, name=folder) for subject, folder in zip(subjects, folders, strict=True)
    ]
  write_report(subjects, path)
  print(f'wrote {path}')
  return 0
