"""The folder of a run, and its config.json."""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from alexnet_flax.config import Config
from alexnet_flax.errors import UsageError
from alexnet_flax.provenance import public

_ROOM = 1 << 16  # bytes without which nothing can begin


def make_folder(folder: pathlib.Path) -> None:
  """Makes the folder where it is missing.

  Raises:
    UsageError: it cannot be written to.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'checkpoints').mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
      probe.write(bytes(_ROOM))
  except OSError as error:
    raise UsageError(f'cannot write to --workdir={folder}: {error.strerror}') from None


@contextlib.contextmanager
def sole_writer(folder: pathlib.Path) -> Iterator[None]:
  """Keeps a second run out of the folder; a kill frees it.

  Raises:
    UsageError: another process trains in it.
  """
  with (folder / '.lock').open('a') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      message = f'another process trains in {folder}; wait for its end, or use another --workdir'
      raise UsageError(message) from None
    except OSError:  # a filesystem without locks
      pass
    yield


def write_config(folder: pathlib.Path, config: Config, resumed: bool) -> None:
  """Writes config.json; when resuming, says first which keys differ from the run so far."""
  path = folder / 'config.json'
  new = json.loads(json.dumps(dataclasses.asdict(_without_private(config))))
  if resumed and path.exists():
    try:
      old = _flat(json.loads(path.read_text()))
    except ValueError:
      old = {}
      print(f'note: {path} was broken, and is written anew')
    for key, value in _flat(new).items():
      if old and old.get(key) != value:
        print(f'note: {key} was {old.get(key)!r} in this run so far, and is {value!r} from here on')
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps(new, indent=2) + '\n')
  partial.replace(path)


def _without_private(config: Config) -> Config:
  """The configuration for others to read: where the user's files lie is nobody else's business."""
  place, source = config.data.data_dir, config.transfer.source
  data = dataclasses.replace(config.data, data_dir=place and public(place))
  transfer = dataclasses.replace(config.transfer, source=source and public(source))
  return dataclasses.replace(config, data=data, transfer=transfer)


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return flat
