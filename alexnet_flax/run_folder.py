"""The folder of a run, and its config.json."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from alexnet_flax.config import Config
from alexnet_flax.errors import UsageError
from alexnet_flax.provenance import public


def make_folder(folder: pathlib.Path) -> None:
  """Makes the folder where it is missing.

  Raises:
    UsageError: it cannot be written to.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'checkpoints').mkdir(exist_ok=True)
    probe = folder / f'.writable-{os.getpid()}'
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise UsageError(f'cannot write to --workdir={folder}: {error.strerror}') from None


def write_config(folder: pathlib.Path, config: Config, resumed: bool) -> None:
  """Writes config.json; when resuming, says first which keys differ from the run so far."""
  path = folder / 'config.json'
  new = json.loads(json.dumps(dataclasses.asdict(_without_private(config))))
  if resumed and path.exists():
    old = _flat(json.loads(path.read_text()))
    for key, value in _flat(new).items():
      if old.get(key) != value:
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
