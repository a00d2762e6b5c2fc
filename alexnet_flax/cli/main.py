"""`alexnet-flax VERB ...`, the same as `python -m alexnet_flax VERB ...`."""

import argparse
import os
import sys
from typing import NoReturn

from alexnet_flax.cli import (
  convert,
  demo,
  doctor,
  evaluate,
  features,
  predict,
  prepare,
  report,
  verify_resume,
)
from alexnet_flax.errors import UsageError, needs_extra

# Each module has HELP, DESCRIPTION, `add_arguments`, and `run`, which returns the exit code (None for 0) and
# imports what it needs.
_MODULES = (prepare, evaluate, predict, report, demo, features, convert, verify_resume, doctor)
VERBS = {module.__name__.rpartition('.')[2].replace('_', '-'): module for module in _MODULES}


def main(argv: list[str] | None = None) -> int:
  """Runs a verb and returns its exit code; a foreseeable error is one line."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  try:
    parser = _parser()
    arguments, others = parser.parse_known_args(argv)
    verb = VERBS[arguments.verb]
    if others and not getattr(verb, 'TAKES_FLAGS', False):
      parser.error(f'unrecognized arguments: {" ".join(others)}')
    arguments.flags = others
    with needs_extra(f'alexnet-flax {arguments.verb}'):
      return verb.run(arguments) or 0
  except BrokenPipeError:  # the reader has closed the pipe
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except UsageError as error:
    print(f'error: {error}', file=sys.stderr)
    return error.exit_code


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    """Raises argparse's message as a line, without its usage text."""
    raise UsageError(f'{" ".join(message.split())}; see {self.prog} --help')


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog='alexnet-flax', description='AlexNet in JAX and Flax.')
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
  for name, verb in VERBS.items():
    verb.add_arguments(verbs.add_parser(name, help=verb.HELP, description=verb.DESCRIPTION))
  return parser
