"""The folder of a run, and its config.json."""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax

from alexnet_flax.config import Config
from alexnet_flax.errors import UsageError

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


FILE = 'environment.json'  # in a run's folder
_PACKAGES = (
  'alexnet_flax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'chex', 'tensorflow-datasets',
  'numpy',
)  # fmt: skip


def public(place: str) -> str:
  """The last part of a path that leads out of the current folder; a URL without user, password and query.

  >>> public('/home/ada/data/pets'), public('https://ada:secret@host/a.pth?token=1'), public('runs/a')
  ('.../pets', 'https://host/a.pth', 'runs/a')
  """
  if '://' in place:
    url = urllib.parse.urlsplit(place)
    if url.scheme != 'file':
      return f'{url.scheme}://{url.netloc.rpartition("@")[2]}{url.path}'
    place = url.path
  path = pathlib.PurePath(place)
  leads_out = path.is_absolute() or place.startswith('~') or '..' in path.parts
  return f'.../{path.name}' if leads_out else place


def public_command(argv: list[str]) -> str:
  """A command line for others to read.

  >>> public_command(['/home/ada/train.py', '--config=configs/digits.py', '--workdir=/home/ada/runs/a'])
  'python train.py --config=configs/digits.py --workdir=.../a'
  """
  shown = [
    f'{name}={public(value)}' if equals else public(name)
    for name, equals, value in (argument.partition('=') for argument in argv[1:])
  ]
  return ' '.join(['python', pathlib.PurePath(argv[0]).name, *shown])


def versions() -> dict[str, str]:
  """Python's version, and those of the packages that a run's figures may depend on."""
  found = {'python': platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      found[package] = 'absent'
  return found


def environment() -> dict[str, Any]:
  """Versions, devices, commit and command of this process."""
  devices = jax.devices()
  return {
    'command': public_command(sys.argv),
    'commit': _commit(),
    'devices': f'{len(devices)} x {devices[0].device_kind}',
    'platform': f'{platform.system()} {platform.machine()}',
    'versions': versions(),
  }


def write_environment(folder: pathlib.Path) -> None:
  """Writes what this process is into a run's folder."""
  (folder / FILE).write_text(json.dumps(environment(), indent=2) + '\n')


def read_environment(folder: pathlib.Path) -> dict[str, Any]:
  """What was written; empty for a run that has none."""
  try:
    return json.loads((folder / FILE).read_text())
  except (OSError, ValueError):
    return {}


def _commit() -> str | None:
  """The commit of the checkout that this package lies in, with '+' if files differ from it."""
  folder = pathlib.Path(__file__).resolve().parents[1]
  if not (folder / '.git').exists():
    return None
  command = ['git', '-C', str(folder), 'describe', '--always', '--dirty=+', '--abbrev=12', '--exclude=*']
  try:
    described = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError:  # no git
    return None
  return described.stdout.strip() or None
