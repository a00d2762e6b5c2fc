"""Where a run comes from: versions, devices, commit and command. Nothing of the user's folders or secrets."""

import json
import pathlib
import platform
import subprocess
import sys
import urllib.parse
from importlib import metadata
from typing import Any

import jax

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
