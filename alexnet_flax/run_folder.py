"""The folder of a run, and its config.json."""

import dataclasses
import json
import pathlib
from typing import Any

from alexnet_flax.config import Config
from alexnet_flax.errors import UsageError


def make_folder(folder: pathlib.Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'checkpoints').mkdir(exist_ok=True)
    probe = folder / '.writable'
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise UsageError(f'cannot write to --workdir={folder}: {error.strerror}') from None


def write_config(folder: pathlib.Path, config: Config, resumed: bool) -> None:
  """Writes config.json; when resuming, says first which keys differ from the run so far."""
  path = folder / 'config.json'
  new = json.loads(json.dumps(dataclasses.asdict(config)))
  if resumed and path.exists():
    old = _flat(json.loads(path.read_text()))
    for key, value in _flat(new).items():
      if old.get(key) != value:
        print(f'note: {key} was {old.get(key)!r} in this run so far, and is {value!r} from here on')
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps(new, indent=2) + '\n')
  partial.replace(path)


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return flat
