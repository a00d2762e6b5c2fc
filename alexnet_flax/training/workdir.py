"""The folder of a run: its lock, config.json and environment.json (versions, devices, commit, command)."""

import contextlib
import pathlib
import platform
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax

from alexnet_flax.config import Config, all_keys, from_dict, to_dict, value_of, with_values
from alexnet_flax.errors import UsageError
from alexnet_flax.files import read_json, set_aside, write_json
from alexnet_flax.pretrained import write_names

_ROOM = 1 << 16  # bytes without which nothing can begin


def make_folder(folder: pathlib.Path) -> None:
  """Creates the folder where it is missing.

  Raises:
    UsageError: It is not writable.
  """
  try:
    (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
      probe.write(bytes(_ROOM))
  except OSError as error:
    raise UsageError(f'cannot write to --workdir={folder}: {error.filename}: {error.strerror}') from None


@contextlib.contextmanager
def sole_writer(folder: pathlib.Path) -> Iterator[None]:
  """Locks the folder against a second run; a kill frees it. Warns where the file system has no locks.

  Raises:
    UsageError: Another process trains in it, or its `.lock` is a folder.
  """
  import filelock

  lock = filelock.FileLock(folder / '.lock')
  try:
    lock.acquire(blocking=False)
  except filelock.Timeout:
    message = f'another process trains in {folder}; wait for its end, or use another --workdir'
    raise UsageError(message) from None
  except (NotImplementedError, OSError) as error:
    if (folder / '.lock').is_dir():
      raise UsageError(f'{folder / ".lock"} is a folder; remove it') from None
    print(f'warning: {folder} cannot be locked ({error}); see that no other run writes to it', flush=True)
  try:
    yield
  finally:
    lock.release()


def write_records(folder: pathlib.Path, config: Config, class_names: Sequence[str], resumed: bool) -> None:
  """Writes config.json, classes.txt and environment.json; says which keys differ from the run so far."""
  path = folder / 'config.json'
  new = _without_private(config)
  if resumed and path.exists():
    try:
      old = from_dict(read_json(path) or {})
    except UsageError as error:
      aside = set_aside(path, folder / 'damaged')
      print(f'note: {error}; it is set aside as {aside}, and written anew')
    else:
      for key in all_keys():
        was, now = value_of(old, key), value_of(new, key)
        if was != now:
          print(f'note: {key} was {was!r} in this run so far, and is {now!r} from here on')
  write_json(path, to_dict(new))
  write_names(folder, class_names)
  write_json(folder / ENVIRONMENT, environment())


def _without_private(config: Config) -> Config:
  """Returns the configuration for others to read, without the paths of the user's folders."""
  place, source = config.data.data_dir, config.transfer.source
  return with_values(
    config, {'data.data_dir': place and public(place), 'transfer.source': source and public(source)}
  )


ENVIRONMENT = 'environment.json'
_PACKAGES = 'alexnet_flax jax jaxlib flax optax orbax-checkpoint chex tensorflow-datasets numpy'


def public(place: str) -> str:
  """Shortens a path out of the current folder to its last part, and a URL to scheme, host and path.

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
  """Returns a command line for others to read.

  >>> public_command(['/home/ada/train.py', '--config=configs/digits.py', '--workdir=/home/ada/runs/a'])
  'python train.py --config=configs/digits.py --workdir=.../a'
  """
  parts = [argument.partition('=') for argument in argv[1:]]
  shown = [f'{name}={public(value)}' if equals else public(name) for name, equals, value in parts]
  return ' '.join(['python', pathlib.PurePath(argv[0]).name, *shown])


def versions() -> dict[str, str]:
  """Returns the versions of Python and of the packages that a run's figures may depend on."""
  found = {'python': platform.python_version()}
  for package in _PACKAGES.split():
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      found[package] = 'absent'
  return found


def environment() -> dict[str, Any]:
  """Returns versions, devices, commit and command of this process, as environment.json holds them."""
  devices = jax.devices()
  return {
    'command': public_command(sys.argv),
    'commit': _commit(),
    'devices': f'{len(devices)} x {devices[0].device_kind}',
    'platform': f'{platform.system()} {platform.machine()}',
    'versions': versions(),
  }


def read_environment(folder: pathlib.Path) -> dict[str, Any]:
  """Returns environment.json's content; empty for a run that has none, or a broken one."""
  try:
    found = read_json(folder / ENVIRONMENT) or {}
  except UsageError:
    return {}
  return found if isinstance(found.get('versions'), dict) else found | {'versions': {}}


def _commit() -> str | None:
  """Returns the commit of this package's checkout, with '+' if files differ from it."""
  folder = pathlib.Path(__file__).resolve().parents[2]
  if not (folder / '.git').exists():
    return None
  command = ['git', '-C', str(folder), 'describe', '--always', '--dirty=+', '--abbrev=12', '--exclude=*']
  try:
    described = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError:  # no git
    return None
  return described.stdout.strip() or None
