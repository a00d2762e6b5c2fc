"""Files that are written whole or not at all; errors of reading them say what to do."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from alexnet_flax.errors import UsageError
from alexnet_flax.files import buckets

_DAY = 86_400.0  # seconds after which what another machine has left is taken to be of a killed process
_LONG = 32  # an ending so long would make the name of the temporary file too long


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a path beside `path` to write to, which replaces `path` when the block ends without an error.

  Whoever reads `path` sees the old content or the new one. Of a block that fails nothing is left. The copy of
  a place in a bucket is uploaded.

  Args:
    path: The file to write; of a link, the file that it leads to. The temporary one has the same ending. A
      device or a pipe, which cannot be replaced, is given itself.

  Raises:
    UsageError: There is a folder of that name, or a pipe that nobody reads.
  """
  if path.is_dir():
    raise UsageError(f'cannot write {path}: it is a folder; move it away')
  if path.is_fifo():
    try:
      reader = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # open till the end, or the reader would go away
    except OSError:
      raise UsageError(f'cannot write {path}: it is a pipe that nobody reads; move it away') from None
    with contextlib.closing(os.fdopen(reader, 'wb')):
      yield path
    return
  if path.exists() and not path.is_file():
    yield path
    return
  url, path = buckets.written_through(path), pathlib.Path(os.path.realpath(path))
  partial = _partial(path)
  try:
    yield partial
    partial.replace(path)
    if url:
      buckets.upload(path, url)
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def move_into_place(whole: pathlib.Path, path: pathlib.Path) -> None:
  """Moves a file to `path` as `atomic_path` writes one; a device or a pipe there gets its content."""
  with atomic_path(path) as place:
    if place != path:
      shutil.move(whole, place)
      return
    with whole.open('rb') as content, place.open('wb') as file:
      shutil.copyfileobj(content, file)


@contextlib.contextmanager
def partial_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a folder beside `path` for files that belong together, until all are whole and can be moved."""
  folder = _partial(path.with_name(f'{path.name}.files'))  # not the name under which `path` is written
  try:
    folder.mkdir()
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _partial(path: pathlib.Path) -> pathlib.Path:
  """Returns the name under which `path` is written; removes what killed processes have left of it."""
  host, name = (hashlib.sha256(os.fsencode(text)).hexdigest()[:8] for text in (platform.node(), path.name))
  for left in path.parent.glob(f'.partial-*-{name}*'):
    with contextlib.suppress(OSError, ValueError):  # of another user, already gone, or not ours
      _, writer_host, writer, _ = left.name.split('-', 3)
      if not is_running(int(writer)) if writer_host == host else time.time() - left.stat().st_mtime > _DAY:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
  suffix = path.suffix if len(path.suffix) < _LONG else ''
  return path.with_name(f'.partial-{host}-{os.getpid()}-{name}{suffix}')


def is_running(process: int) -> bool:
  """Whether there is a process of that number on this machine."""
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except (PermissionError, OverflowError):  # of another user, or no number of a process
    pass
  return True


def check_writable(path: pathlib.Path) -> None:
  """Raises UsageError if a file cannot be written there: before hours are spent on its content."""
  if url := buckets.written_through(path):
    buckets.listing('/'.join(url.split('/')[:3]) + '/.none')  # whether there is such a bucket
  try:
    mode = path.stat().st_mode
  except (FileNotFoundError, NotADirectoryError):
    mode = stat.S_IFREG
  except OSError as error:  # too long a name, a folder that may not be entered
    raise UsageError(f'cannot write {path}: {error.strerror}') from None
  if stat.S_ISDIR(mode):
    raise UsageError(f'cannot write {path}: it is a folder')
  place = pathlib.Path(os.path.realpath(path)) if path.is_symlink() else path
  if stat.S_ISREG(mode):
    place = place.parent
    if not place.is_dir():
      raise UsageError(f'cannot write {path}: there is no folder {place}')
  if not os.access(place, os.W_OK):
    raise UsageError(f'cannot write {path}: {place} is not writable')


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text atomically, and waits until it is on the disk."""
  with atomic_path(path) as partial, partial.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    if path.is_file() or not path.exists():  # a device or a pipe has nothing to wait for
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
  """Returns a path, with the user's home folder in the place of ~; of a place in a bucket, its copy.

  Raises:
    UsageError: It begins with a user, or the user of this process, who has no home folder here; it is empty,
      as "$RUN" is where that is not set; or it has an unknown scheme, which would become a folder 'ftp:'.
  """
  if not os.fspath(place):
    raise UsageError('the name of a file or a folder is empty')
  if buckets.is_bucket(place):
    return buckets.local(os.fspath(place))
  try:
    return pathlib.Path(place).expanduser()
  except RuntimeError:
    if os.path.lexists(place):  # a file's own name, '~$notes.jpg', where the shell has expanded *.jpg
      return pathlib.Path(place)
    raise UsageError(f'{place}: there is no such home folder; write the path without ~') from None


def without_credentials(place: str) -> str:
  """Returns a URL without user, password and query, which often is a signature; any other text as it is."""
  scheme, separator, rest = place.partition('://')
  if not separator:
    return place
  host, slash, path = re.split('[?#]', rest)[0].partition('/')
  return f'{scheme}://{host.rpartition("@")[2]}{slash}{path}'


def public(place: str) -> str:
  """Shortens a path out of the current folder to its last part, and a URL to scheme, host and path.

  >>> public('/home/ada/data/pets'), public('https://ada:secret@host/a.pth?token=1'), public('runs/a')
  ('.../pets', 'https://host/a.pth', 'runs/a')
  """
  if '://' in place and not place.startswith('file://'):
    return without_credentials(place)
  path = pathlib.PurePath(place.removeprefix('file://'))
  leads_out = path.is_absolute() or place.startswith('~') or '..' in path.parts
  return f'.../{path.name}' if leads_out else place
