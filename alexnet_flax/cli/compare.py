"""`alexnet-flax compare`."""

import argparse

from alexnet_flax.cli.options import add_figure, figure_file
from alexnet_flax.errors import UsageError, one_line
from alexnet_flax.files import check_writable, expanded

HELP = 'similarity of layers by files of features: RSA, CKA'
DESCRIPTION = (
  'Compares each layer of the first file of features with each layer of every other file. Takes what'
  ' `features` writes, and any .npz or HDF5 file with an array [N, ...] for each layer and, optionally, an'
  " array 'names' of the stimuli."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('files', metavar='FILE', nargs='+', help='at least two files of features')
  parser.add_argument(
    '--measure',
    default='rsa-spearman',
    help='rsa-spearman (default), rsa-kendall, rsa-pearson, rsa-cosine, cka or cka-debiased',
  )
  parser.add_argument('--distance', help='of dissimilarities: correlation (default) or cosine')
  parser.add_argument(
    '--layers', default='', help='such as relu3,fc7: those of them that a file has (default: all)'
  )
  parser.add_argument(
    '--bootstrap', metavar='N', type=int, help='95 %% confidence intervals by N draws of stimuli; for rsa-...'
  )
  parser.add_argument(
    '--ceiling',
    action='store_true',
    help='print noise ceilings: the files after the first are of at least two subjects; for rsa-...',
  )
  parser.add_argument('--out', metavar='FILE', help='F.csv or F.json')
  add_figure(parser, 'a matrix of similarities for each comparison')


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.inference.compare import compare_files, tables, write_result

  out = None
  if arguments.out is not None:
    out = expanded(arguments.out)
    if out.suffix.lower() not in ('.csv', '.json'):
      raise UsageError(f'--out {arguments.out}: the ending must be .csv or .json')
    check_writable(out)
  figure = figure_file(arguments)
  result = compare_files(
    arguments.files,
    arguments.measure,
    distance=arguments.distance,
    layers=arguments.layers.split(','),
    bootstrap=arguments.bootstrap,
    ceiling=arguments.ceiling,
  )
  for line in tables(result):
    print(one_line(line))
  if out:
    write_result(result, out)
  if figure:
    from alexnet_flax.viz.similarity import draw_comparisons

    draw_comparisons(result, figure)
