"""Files that are written whole or not at all; errors of reading them say what to do."""

import contextlib
import errno
import glob
import itertools
import json
import os
import pathlib
import stat
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from alexnet_flax.errors import UsageError


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a path beside `path` to write to, which replaces `path` when the block ends without an error.

  Whoever reads `path` sees the old content or the new one. Of a block that fails nothing is left.

  Args:
    path: The file to write. The temporary one has the same ending.

  Raises:
    UsageError: There is a folder of that name.
  """
  if path.is_dir():
    raise UsageError(f'cannot write {path}: it is a folder; move it away')
  _remove_partial(path)
  partial = path.with_name(f'.partial-{os.getpid()}-{path.name}')
  try:
    yield partial
    partial.replace(path)
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def _remove_partial(path: pathlib.Path) -> None:
  """Removes what killed processes have left of a file that they were writing."""
  for partial in path.parent.glob(f'.partial-[0-9]*-{glob.escape(path.name)}'):
    try:
      os.kill(int(partial.name.split('-')[1]), 0)
    except ProcessLookupError:
      partial.unlink(missing_ok=True)
    except (OSError, ValueError, OverflowError):  # of another user, or not ours
      pass


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text atomically, and waits until it is on the disk."""
  with atomic_path(path) as partial, partial.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Writes a JSON object atomically."""
  write_text(path, json.dumps(content, indent=2) + '\n')


def rewrite_lines(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
  """Replaces a file of JSON lines."""
  write_text(path, ''.join(json.dumps(line) + '\n' for line in lines))


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns the JSON object in a file; None if there is no file.

  Raises:
    UsageError: It cannot be read, or holds something else.
  """
  content = _read(path)
  found = None if content is None else _json_object(content)
  if content is not None and found is None:
    raise UsageError(f'{path} is broken: it holds no JSON object; remove it, or put it back from a copy')
  return found


def read_lines(
  path: pathlib.Path, fields: Mapping[str, Any], say: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
  """Returns the objects of a file of JSON lines, of which a kill may have cut the last one short.

  Args:
    path: The file; none is the same as an empty one.
    fields: The fields that each object must have, with the types of `isinstance`.
    say: Called with a line if the last one is left out.

  Raises:
    UsageError: The file cannot be read, or another line is broken.
  """
  found = []
  lines = (_read(path) or b'').split(b'\n')
  for number, text in enumerate(lines, start=1):
    line = _json_object(text)
    if line is not None and all(isinstance(line.get(name), kind) for name, kind in fields.items()):
      found.append(line)
    elif number < len(lines):
      raise UsageError(f'line {number} of {path} is broken; remove it, and nothing else is lost')
    elif text and say:
      say(f'note: the last line of {path} was cut short and is left out')
  return found


def set_aside(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Moves a damaged file or folder into `folder`, under a name that is free there; returns the new path.

  Raises:
    UsageError: It cannot be moved.
  """
  try:
    folder.mkdir(exist_ok=True)
    names = (folder / f'{path.name}-{number}' for number in itertools.count(1))
    aside = next(free for free in names if not os.path.lexists(free))
    path.rename(aside)
  except OSError as error:
    raise UsageError(f'cannot move {path}, which is damaged, to {folder}: {error.strerror}') from None
  return aside


def refuse_pipe(path: str | os.PathLike[str]) -> None:
  """Raises OSError for a pipe or a device: reading it may never end."""
  mode = os.stat(path).st_mode
  if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
    raise OSError(errno.EINVAL, 'not a regular file')


def _read(path: pathlib.Path) -> bytes | None:
  try:
    refuse_pipe(path)
    return path.read_bytes()
  except FileNotFoundError:
    return None
  except OSError as error:  # a folder, no permission
    raise UsageError(f'cannot read {path}: {error.strerror}; it must be a readable file') from None


def _json_object(text: bytes) -> dict[str, Any] | None:
  """Returns the object in JSON of UTF-8; None if it holds something else."""
  try:
    found = json.loads(text.decode('utf-8'))
  except (ValueError, RecursionError):
    return None
  return found if isinstance(found, dict) else None


def expanded(place: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path, with the user's home folder in the place of ~.

  Raises:
    UsageError: It begins with a user, or the user of this process, who has no home folder here.
  """
  try:
    return pathlib.Path(place).expanduser()
  except RuntimeError:
    raise UsageError(f'{place}: there is no such home folder; write the path without ~') from None


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
