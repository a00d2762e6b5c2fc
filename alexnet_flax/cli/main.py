"""`alexnet-flax VERB ...`, the same as `python -m alexnet_flax VERB ...`."""

import argparse
import difflib
import os
import re
import sys
from typing import NoReturn

from alexnet_flax.cli import (
  compare,
  convert,
  demo,
  distance,
  doctor,
  evaluate,
  explain,
  features,
  hub,
  plan,
  predict,
  prepare,
  report,
  reproduce,
  shape_bias,
  start,
  units,
  verify_resume,
)
from alexnet_flax.cli.compilation_cache import use_compilation_cache
from alexnet_flax.errors import DivergedError, PreemptedError, UsageError, needs_extra, unknown_name
from alexnet_flax.training.cpu_memory import keep_cpu_memory

# Each module has HELP, DESCRIPTION, `add_arguments`, and `run`, which returns the exit code (None for 0) and
# imports what it needs.
_MODULES = (
  prepare,
  evaluate,
  shape_bias,
  predict,
  explain,
  report,
  demo,
  features,
  units,
  compare,
  distance,
  convert,
  hub,
  verify_resume,
  doctor,
  plan,
  reproduce,
)
VERBS = {module.__name__.rpartition('.')[2].replace('_', '-'): module for module in _MODULES}


def main(argv: list[str] | None = None) -> int:
  """Runs a verb and returns its exit code; a foreseeable error is one line."""
  try:
    start.set_up()
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == 'train':
      raise UsageError(
        'training is: python train.py --config=configs/digits.py [--workdir=DIR], in a checkout'
      )
    if words and words[0] not in VERBS and not words[0].startswith('-'):
      raise unknown_name('verb', words[0], VERBS)
    parser, options = _parser()
    arguments, others = parser.parse_known_args(words)
    verb = VERBS[arguments.verb]
    if others and not getattr(verb, 'TAKES_FLAGS', False):
      near = difflib.get_close_matches(others[0].partition('=')[0], options[arguments.verb], n=1, cutoff=0.8)
      meant = f'did you mean {near[0]}? ' if near else ''
      advice = f'{meant}see alexnet-flax {arguments.verb} --help'
      raise UsageError(f'unrecognized arguments: {" ".join(others)}; {advice}')
    arguments.flags = others
    use_compilation_cache()
    keep_cpu_memory()
    with needs_extra(f'alexnet-flax {arguments.verb}'):
      return verb.run(arguments) or 0
  except BrokenPipeError:  # the reader has closed the pipe
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except (UsageError, DivergedError, PreemptedError) as error:
    return start.tell(error)


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    """Raises argparse's message as a line, without its usage text."""
    raise UsageError(f'{" ".join(message.split())}; see {self.prog} --help')


def _parser() -> tuple[argparse.ArgumentParser, dict[str, list[str]]]:
  """Returns the parser, and the options of each verb."""
  parser = _Parser(prog='alexnet-flax', description='AlexNet in JAX and Flax.')
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
  options = {}
  for name, verb in VERBS.items():
    added = verbs.add_parser(name, help=verb.HELP, description=verb.DESCRIPTION)
    verb.add_arguments(added)
    options[name] = re.findall(r'--\w+', added.format_usage())
  return parser, options
