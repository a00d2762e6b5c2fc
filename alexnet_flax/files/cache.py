"""The folder of what can be made or downloaded again."""

import os
import pathlib

from alexnet_flax.errors import UsageError


def cache_folder() -> pathlib.Path:
  """Returns the user's folder for what can be made or downloaded again: $ALEXNET_FLAX_CACHE, if it is set."""
  place = os.environ.get('ALEXNET_FLAX_CACHE') or '~/.cache/alexnet_flax'
  if '://' in place:
    raise UsageError(f'ALEXNET_FLAX_CACHE (={place}) must be a folder of this machine')
  try:
    return pathlib.Path(place).expanduser()
  except RuntimeError:
    raise UsageError(f'{place}: there is no such home folder; write the path without ~') from None
