"""The folder of a run: its lock, and what it says of the run: configuration, history of it, environment."""

import contextlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax

from alexnet_flax.config import Config, all_keys, from_dict, to_dict, value_of, with_values
from alexnet_flax.errors import BusyError, UsageError, one_line
from alexnet_flax.files import expanded, public, read_json, read_lines, rewrite_lines, set_aside, write_json
from alexnet_flax.files.buckets import is_bucket
from alexnet_flax.pretrained import LOCAL, find_run, write_names

CONFIG, HISTORY, ENVIRONMENT = 'config.json', 'config_history.jsonl', 'environment.json'
_ROOM = 1 << 16  # bytes without which nothing can begin
# What local.json holds in full -> its name in the history. Of paths, all other files have the last part.
_LOCAL_KEYS = {'data_dir': 'data.data_dir', 'transfer_source': 'transfer.source', 'images': 'training images'}


def make_folder(folder: pathlib.Path) -> None:
  """Creates the folder where it is missing; raises UsageError if it is not writable."""
  try:
    (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
      probe.write(bytes(_ROOM))
  except OSError as error:
    raise UsageError(f'cannot write to --workdir={folder}: {error.filename}: {error.strerror}') from None


@contextlib.contextmanager
def sole_writer(folder: pathlib.Path) -> Iterator[None]:
  """Locks the folder against a second run; a kill frees it. Warns where the file system has no locks.

  Raises UsageError if another process trains in it, or its `.lock` is a folder.
  """
  import filelock

  lock = filelock.FileLock(folder / '.lock')
  try:
    lock.acquire(blocking=False)
  except filelock.Timeout:
    advice = 'wait for its end, or use another --workdir'
    raise BusyError(f'another process trains in {folder}; {advice}') from None
  except (NotImplementedError, OSError) as error:  # filelock's and the system's of no locks
    if (folder / '.lock').is_dir():
      raise UsageError(f'{folder / ".lock"} is a folder; remove it') from None
    print(f'warning: {folder} cannot be locked ({error}); see that no other run writes to it', flush=True)
  try:
    yield
  finally:
    lock.release()


def write_records(
  folder: pathlib.Path, config: Config, class_names: Sequence[str], step: int, images: str | None = None
) -> None:
  """Writes what a run consists of from `step` on: its configuration, class names and environment.

  Keys that differ from the run so far are said, and kept in config_history.jsonl; other `images` to train on
  likewise.
  """
  for name, read in ((CONFIG, _read_config), (HISTORY, read_history)):
    try:
      read(folder)
    except UsageError as error:
      aside = set_aside(folder / name, folder / 'damaged')
      print(one_line(f'note: {error}; it is set aside as {aside}, and written anew'))
  changes = changed_keys(folder, config, step, images)
  for key, (was, now) in changes.items():
    print(one_line(f'note: {key} was {was!r} in this run so far, and is {now!r} from here on'))
  history = [line for line in read_history(folder) if line['step'] < step]
  if changes or (folder / HISTORY).exists():  # before config.json: a kill between them loses nothing
    rewrite_lines(folder / HISTORY, [*history, {'step': step, 'changes': changes}] if changes else history)
  write_json(folder / CONFIG, to_dict(_without_private(config)))
  # So that evaluate and report find the data, wherever they are started.
  write_json(folder / LOCAL, _local(config, images))
  write_names(folder, class_names)
  write_json(folder / ENVIRONMENT, environment())


def changed_keys(
  folder: pathlib.Path, config: Config, step: int, images: str | None = None
) -> dict[str, tuple[Any, Any]]:
  """Returns key -> (value in the folder's run up to `step`, value in `config`) where they differ.

  Raises UsageError if the run's config.json, or its history, is broken.
  """
  stored = _read_config(folder)
  if not step or stored is None:
    return {}
  old, new = _values(stored), _values(_without_private(config))
  for line in reversed(read_history(folder)):
    if line['step'] >= step:  # changed by a run of which no checkpoint is left
      old |= {key: was for key, (was, _) in line['changes'].items() if key in old}
  changes = {key: (old[key], new[key]) for key in new if old[key] != new[key]}
  local, here = read_json(folder / LOCAL) or {}, _local(config, images)
  for name in _LOCAL_KEYS.keys() & local.keys():
    key = _LOCAL_KEYS[name]
    changes.pop(key, None)
    if local[name] != here[name]:
      changes[key] = (old.get(key, local[name]), new.get(key, here[name]))
  return changes


def _local(config: Config, images: str | None) -> dict[str, str | None]:
  """Returns the paths that are nobody else's business, and which images are trained on."""
  data_dir, source = config.data.data_dir, config.transfer.source
  if source and not is_bucket(source) and (find_run(source) or expanded(source).exists()):
    source = os.path.abspath(expanded(source))  # not a published name, nor a URL
  mirror = config.data.mirror
  return {
    'data_dir': data_dir if is_bucket(data_dir) else data_dir and os.path.abspath(expanded(data_dir)),
    'mirror': mirror and os.path.abspath(expanded(mirror)),
    'transfer_source': source,
    'images': images,
  }


def read_history(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the changes of a run's configuration: {'step': 6, 'changes': {key: [was, is]}}, in order.

  Raises UsageError if the file is broken.
  """
  lines = read_lines(folder / HISTORY, {'step': int, 'changes': dict})
  pairs = [pair for line in lines for pair in line['changes'].values()]
  if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
    raise UsageError(f'{folder / HISTORY} is broken: a change is a pair of values; remove the file')
  return lines


def _read_config(folder: pathlib.Path) -> Config | None:
  stored = read_json(folder / CONFIG)
  return None if stored is None else from_dict(stored)


def _values(config: Config) -> dict[str, Any]:
  return json.loads(json.dumps({key: value_of(config, key) for key in all_keys()}))


def _without_private(config: Config) -> Config:
  """Returns the configuration for others to read, without the paths of the user's folders."""
  paths = {key: value_of(config, key) for key in ('data.data_dir', 'data.mirror', 'transfer.source')}
  return with_values(config, {key: path and public(path) for key, path in paths.items()})


_PACKAGES = 'alexnet_flax jax jaxlib flax optax orbax-checkpoint chex tensorflow-datasets numpy'


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
  """Returns the commit of this package's checkout, with '+' if its code differs from it.

  Results and docs are no code: `reproduce` writes them while other runs train.
  """
  folder = pathlib.Path(__file__).resolve().parents[2]
  if not (folder / '.git').exists():
    return None
  code = ('--', '.', ':(exclude)results', ':(exclude)docs')
  try:
    commit, changes = (
      subprocess.run(['git', '-C', str(folder), *command], capture_output=True, text=True, check=True).stdout
      for command in (
        ('rev-parse', '--short=12', 'HEAD'),
        ('--no-optional-locks', 'status', '--porcelain', '--untracked-files=no', *code),
      )
    )
  except (OSError, subprocess.CalledProcessError):  # no git, or no commit
    return None
  return commit.strip() + ('+' if changes else '')
