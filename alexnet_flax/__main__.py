"""`alexnet-flax VERB ...`, the same as `python -m alexnet_flax VERB ...`."""

import argparse
import os
import sys
from typing import NoReturn

from alexnet_flax.errors import UsageError


def main(argv: list[str] | None = None) -> int:
  """Runs a verb; returns the exit code, having printed one line for every foreseeable error."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  try:
    parser = _parser()
    arguments, others = parser.parse_known_args(argv)
    if others and arguments.verb not in _WITH_FLAGS:
      parser.error(f'unrecognized arguments: {" ".join(others)}')
    arguments.flags = others
    return _VERBS[arguments.verb](arguments)
  except UsageError as error:
    print(f'error: {error}', file=sys.stderr)
    return error.exit_code


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    """argparse's message as a line, without its usage text."""
    raise UsageError(f'{" ".join(message.split())}; see {self.prog} --help')


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog='alexnet-flax', description='AlexNet in JAX and Flax.')
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')

  prepare = verbs.add_parser(
    'prepare',
    help='download and prepare a TFDS data set; make its pictures smaller',
    description='Downloads and prepares a TFDS data set, for training by --config.data.dataset=NAME; with'
    ' --side, writes a prepared one anew with smaller pictures, which train several times as fast.',
  )
  prepare.add_argument('dataset', metavar='NAME', help='such as cifar10, mnist, imagenet2012')
  prepare.add_argument('--data_dir', help="where data sets lie (default: TFDS's own folder)")
  prepare.add_argument('--manual_dir', help="where archives downloaded by hand lie (ImageNet's two)")

  prepare.add_argument('--side', type=int, help='what the short side of its pictures becomes, such as 256')
  prepare.add_argument('--encoding', help='jpeg (default) or raw')
  prepare.add_argument('--quality', type=int, help='of JPEG (default 90)')
  prepare.add_argument('--crop', help='none (default), or center for the central square')
  prepare.add_argument('--out_dir', help='where the smaller ones go (default: --data_dir)')
  prepare.add_argument('--on_bad_image', choices=['error', 'skip'], default='error')

  convert = verbs.add_parser(
    'convert',
    help="weights from one program's file to another's",
    description="Reads a run's folder, a weights file, a URL or a published name, and writes SRC's weights"
    ' in the format of the ending: .safetensors, .pth, .caffemodel (and .prototxt), .weights.h5, .keras.',
  )
  convert.add_argument('source', metavar='SRC')
  convert.add_argument('destination', metavar='DST')
  _add_network(convert)
  convert.add_argument('--names', choices=['torchvision'], help="safetensors in torchvision's names")
  convert.add_argument(
    '--verify', action='store_true', help="compare every layer with SRC's own program on pictures"
  )
  convert.add_argument('--pictures', nargs='+', default=(), help="for --verify (default: scikit-learn's two)")

  features = verbs.add_parser(
    'features',
    help='activations of layers for picture files',
    description='Writes one row a picture, in the order given, and the names beside them. The row of a'
    ' picture that cannot be read is NaN, and the exit code 2.',
  )
  features.add_argument('pictures', metavar='PICTURES', nargs='+', help='files and folders')
  features.add_argument('--layers', required=True, help='such as relu3,fc7')
  features.add_argument('--out', required=True, help='F.h5 or F.npz')
  features.add_argument(
    '--weights',
    default='torchvision',
    help="a run's folder, a file, a URL or a published name (default: torchvision's, downloaded once)",
  )
  _add_network(features)
  features.add_argument(
    '--names', choices=['ours', 'torchvision', 'caffe'], default='ours', help='whose names of layers'
  )
  features.add_argument('--pool', choices=['mean', 'max'], help='over space; else all of it')
  features.add_argument('--half', action='store_true', help='float16 instead of float32')
  features.add_argument('--batch_size', type=int, default=64)

  verify = verbs.add_parser(
    'verify-resume',
    help='kill a run again and again, and compare it with one that was left alone',
    description='Takes --config=FILE and --config.KEY=VALUE as train.py does; few steps unless given.',
  )
  verify.add_argument('--kills', type=int, default=3, help='how many (default 3)')
  verify.add_argument('--seed', type=int, default=0, help='of the moments')

  doctor = verbs.add_parser(
    'doctor',
    help='look for what could be wrong with machine, data and recipe',
    description='Takes --config=FILE and --config.KEY=VALUE as train.py does; without, the embedded digits.',
  )
  doctor.add_argument('--workdir', default='.', help='where runs are to be written')
  return parser


def _add_network(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--variant', help='which network, where the file does not tell')
  parser.add_argument('--width', type=float, default=1.0, help="its width (default: the variant's own, 1)")
  parser.add_argument('--image_size', type=int, help="its pictures' side (default: the variant's own)")


def _prepare(arguments: argparse.Namespace) -> int:
  from alexnet_flax.data import datasets

  given = {name: getattr(arguments, name) for name in ('encoding', 'quality', 'crop')}
  given = {name: value for name, value in given.items() if value is not None}
  if arguments.side is None:
    if given:
      raise UsageError(f'--{next(iter(given))} is for smaller pictures; give their --side too, such as 256')
    datasets.prepare(arguments.dataset, arguments.data_dir, arguments.manual_dir)
    return 0
  from alexnet_flax.data.preparing import prepare_smaller
  from alexnet_flax.data.shards import Form

  name = prepare_smaller(
    arguments.dataset,
    Form(arguments.side, **given),
    data_dir=arguments.data_dir,
    out_dir=arguments.out_dir,
    on_bad_image=arguments.on_bad_image,
  )
  print(f'train on it by --config.data.dataset={name}')
  return 0


def _verify_resume(arguments: argparse.Namespace) -> int:
  from alexnet_flax.command_line import parse
  from alexnet_flax.resume_proof import prove_resume

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


def _doctor(arguments: argparse.Namespace) -> int:
  from alexnet_flax.command_line import parse
  from alexnet_flax.config import Config
  from alexnet_flax.doctor import examine

  config = parse(['train.py', *arguments.flags])[0] if arguments.flags else Config()
  return 2 if examine(config, arguments.workdir) else 0


def _convert(arguments: argparse.Namespace) -> int:
  from alexnet_flax.conversion import convert

  agrees = convert(
    arguments.source,
    arguments.destination,
    variant=arguments.variant,
    width=arguments.width,
    image_size=arguments.image_size,
    names=arguments.names,
    verify=arguments.verify or bool(arguments.pictures),
    pictures=arguments.pictures,
  )
  return 0 if agrees else 1


def _features(arguments: argparse.Namespace) -> int:
  from alexnet_flax.feature_files import write_features

  if arguments.batch_size < 1:
    raise UsageError(f'--batch_size (={arguments.batch_size}) must be at least 1')
  unreadable = write_features(
    arguments.pictures,
    arguments.layers.split(','),
    arguments.out,
    weights=arguments.weights,
    variant=arguments.variant,
    width=arguments.width,
    image_size=arguments.image_size,
    names=arguments.names,
    pool=arguments.pool,
    half=arguments.half,
    batch_size=arguments.batch_size,
  )
  if unreadable:
    raise UsageError(
      f'{len(unreadable)} of the pictures cannot be read; {arguments.out} is written, and their rows are NaN'
    )
  return 0


_WITH_FLAGS = ('verify-resume', 'doctor')  # which take train.py's
_VERBS = {
  'prepare': _prepare,
  'convert': _convert,
  'features': _features,
  'verify-resume': _verify_resume,
  'doctor': _doctor,
}


if __name__ == '__main__':
  sys.exit(main())
