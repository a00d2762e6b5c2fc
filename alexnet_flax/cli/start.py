"""How each command begins (environment, output of any encoding, a home folder), and how it fails."""

import io
import os
import pathlib
import sys
import tempfile

from alexnet_flax.errors import DivergedError, PreemptedError, UsageError


def set_up() -> None:
  """Prepares the process.

  Raises:
    UsageError: The user has no home folder, and can have no temporary one.
  """
  # TensorFlow, where it is imported, prints notes on operations that are not used here.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # of a closed stream, which no file may get
    pass
  os.close(number)
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')  # of characters that ASCII or Latin-1 lack
  if os.path.expanduser('~') == '~':  # in a container: neither HOME nor a line in /etc/passwd
    home = pathlib.Path(tempfile.gettempdir()) / f'alexnet_flax-{os.getuid()}'
    home.mkdir(mode=0o700, exist_ok=True)
    if home.lstat().st_uid != os.getuid():
      raise UsageError(f'this user has no home folder, and {home} is of another; set HOME')
    print(f'note: this user has no home folder; without HOME it is {home}', file=sys.stderr)
    os.environ['HOME'] = str(home)


def tell(error: UsageError | DivergedError | PreemptedError) -> int:
  """Prints a foreseeable error as one line, and returns the exit code."""
  print('' if isinstance(error, PreemptedError) else 'error: ', error, sep='', file=sys.stderr)
  return error.exit_code
