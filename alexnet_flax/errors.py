"""Errors that end a command with one line instead of a traceback, and their exit codes."""

import contextlib
import difflib
import pathlib
import re
from collections.abc import Iterable, Iterator

# Line breaks, controls, changes of direction, and bytes of names that are not UTF-8.
_ACTS = re.compile('[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')


# Folders of copies -> the place in a bucket that each is a copy of; messages name the bucket.
COPIES: dict[str, str] = {}


def shown(text: object) -> str:
  """Returns text with the places in buckets in which files are, for their copies on this machine."""
  shown = str(text)
  for folder, url in COPIES.items():
    shown = shown.replace(folder, url)
  return shown


def one_line(text: object) -> str:
  """Returns text with escapes for what a terminal acts upon: no name of a file or class can forge a line.

  >>> one_line('cat\\n\\x1b[2J')
  'cat\\\\n\\\\x1b[2J'
  """
  return _ACTS.sub(lambda found: ascii(found[0])[1:-1], shown(text))


class _Foreseen(Exception):  # noqa: N818
  def __str__(self) -> str:
    return one_line(super().__str__())


class UsageError(_Foreseen):
  """A mistake of the user's: one line that says what is wrong and what would be right."""

  exit_code = 2


class BusyError(UsageError):
  """Another process trains in the folder of a run."""


class UnreachableError(UsageError):
  """A bucket does not answer, also after it was asked several times."""


class DivergedError(_Foreseen):
  """The loss, or the parameters' norm, is not finite."""

  exit_code = 3


class PreemptedError(_Foreseen):
  """The run was asked to end, or lost a process; the same command goes on with it."""

  exit_code = 75  # EX_TEMPFAIL of sysexits.h, on which schedulers start a job again


class StoppedError(PreemptedError):
  """The run ended as it was asked to, in all of its processes at the same step."""


def unknown_name(what: str, name: str, choices: Iterable[str], adjective: str = 'unknown') -> UsageError:
  """Returns an error for a misspelt name, with the nearest right one and the choices.

  >>> print(unknown_name('variant', 'torchvison', ['paper', 'torchvision']))
  unknown variant 'torchvison'; did you mean 'torchvision'? (choices: paper, torchvision)
  """
  choices = list(choices)
  folded = {choice.lower(): choice for choice in choices}
  nearest = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
  meant = f'; did you mean {folded[nearest[0]]!r}?' if nearest else ''
  return UsageError(f'{adjective} {what} {name!r}{meant} (choices: {", ".join(choices)})')


# The extras of pyproject.toml, and the modules for which each is the one to install.
_EXTRAS = {
  'train': (
    'absl cv2 filelock google_crc32c importlib_resources ml_collections orbax PIL pooch requests simplejpeg'
    ' sklearn tensorboardX tensorflow tensorflow_datasets tqdm urllib3'
  ),
  'buckets': 'gcsfs s3fs',
  'report': 'jinja2 matplotlib',
  'demo': 'python_multipart starlette uvicorn',
  'onnx': 'onnx onnxruntime',
  'torch': 'torch torchvision',
  'keras': 'keras',
  'hdf5': 'h5py',
  'caffe': 'google',
  'hub': 'huggingface_hub',
  'trackio': 'trackio',
  'wandb': 'wandb',
  'mlflow': 'mlflow',
  'aim': 'aim',
}


def install_command(extra: str) -> str:
  """Returns the command that installs an extra: from this checkout, if it is one, else from an index."""
  checkout = pathlib.Path(__file__).resolve().parents[1]
  package = f"-e '{checkout}" if (checkout / 'pyproject.toml').is_file() else "'alexnet_flax"
  return f"pip install {package}[{extra}]'"


@contextlib.contextmanager
def needs_extra(what: str) -> Iterator[None]:
  """Turns the absence of an optional dependency into a line that says how to install it.

  Args:
    what: What needs it, as the message's subject.

  Raises:
    UsageError: A module of an extra is not installed.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    module = (error.name or '').partition('.')[0]
    extra = next((extra for extra, modules in _EXTRAS.items() if module in modules.split()), None)
    if extra is None:
      raise
    raise UsageError(f'{what} needs {module}, which is not installed: {install_command(extra)}') from None
