"""The errors that end a run with a line instead of a traceback, and their exit codes."""

import difflib
from collections.abc import Iterable


class UsageError(Exception):
  """The user's mistake: one line that says what is wrong and what would be right."""

  exit_code = 2


class DivergedError(Exception):
  """The loss, or the parameters' norm, is not finite."""

  exit_code = 3


class PreemptedError(Exception):
  """The run was asked to end, or lost a process, and goes on when it is started again."""

  exit_code = 75  # EX_TEMPFAIL of sysexits.h, on which schedulers start a job again


def unknown_name(what: str, name: str, choices: Iterable[str], adjective: str = 'unknown') -> UsageError:
  """An error for a misspelt name, with the nearest right one and the choices.

  >>> print(unknown_name('variant', 'torchvison', ['paper', 'torchvision']))
  unknown variant 'torchvison'; did you mean 'torchvision'? (choices: paper, torchvision)
  """
  choices = list(choices)
  nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
  meant = f'; did you mean {nearest[0]!r}?' if nearest else ''
  return UsageError(f'{adjective} {what} {name!r}{meant} (choices: {", ".join(choices)})')
