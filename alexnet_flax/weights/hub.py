"""Weights on the Hugging Face Hub, hf:OWNER/NAME[@REVISION]: safetensors alone, nothing is unpickled."""

import contextlib
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

from alexnet_flax.errors import UsageError, needs_extra

PREFIX, WEIGHTS = 'hf:', 'model.safetensors'


def repository_of(text: str) -> tuple[str, str | None]:
  """Returns OWNER/NAME and the revision, None for the newest, of [hf:]OWNER/NAME[@REVISION].

  Raises UsageError for anything else.
  """
  found = re.fullmatch(rf'(?:{PREFIX})?([\w.-]+/[\w.-]+)(?:@(.+))?', text)
  if found is None:
    raise UsageError(f"{text!r} is no repository on the Hub; write OWNER/NAME, as in 'ada/alexnet-digits'")
  return found[1], found[2]


def download(source: str, names: Sequence[str] = (WEIGHTS,)) -> pathlib.Path:
  """Returns the folder, in the Hub's own cache, with those of the named files that a repository has.

  Raises UsageError if it cannot be downloaded, or has no weights file.
  """
  repository, revision = repository_of(source)
  with needs_extra(f'{PREFIX}{repository}'):
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, logging
  logging.set_verbosity_error()  # what matters is said below
  if not sys.stderr.isatty():
    disable_progress_bars()
  with hub_errors(source):
    folder = snapshot_download(repository, revision=revision, allow_patterns=list(names))
  path = pathlib.Path(folder) / WEIGHTS
  if not path.is_file():
    raise UsageError(f'{source} has no {WEIGHTS}; other files are not read from the Hub')
  with path.open('rb') as file:
    if file.read(9)[8:] != b'{':  # a pickle may have any name
      raise UsageError(f'{source}: its {WEIGHTS} is no safetensors file')
  return path.parent


@contextlib.contextmanager
def hub_errors(source: str) -> Iterator[None]:
  """Turns what huggingface_hub raises for a repository into a line that says what to do."""
  from huggingface_hub import constants, errors

  try:
    yield
  except Exception as error:  # its own, those of its HTTP library, which changes, and the system's
    cause: BaseException = error  # the first one: 'Connection refused', not those that pass it on
    while before := cause.__cause__ or cause.__context__:
      cause = before
    said = ' '.join(str(getattr(error, 'server_message', None) or cause).split())[:200]
    reason = said if isinstance(error, errors.HFValidationError) else f'{constants.ENDPOINT}: {said}'
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status == 403 or isinstance(error, errors.GatedRepoError):
      reason = f'your token does not allow it: {said}'
    elif status == 401 or isinstance(error, errors.RepositoryNotFoundError):
      reason = 'there is no such repository, or it is private and no valid token is here (hf auth login)'
    elif isinstance(error, errors.RevisionNotFoundError):
      reason = 'there is no such revision'
    raise UsageError(f'{source}: {reason}') from None
