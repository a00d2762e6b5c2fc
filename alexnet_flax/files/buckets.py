"""Files in buckets, gs:// and s3://, through gcsfs and s3fs: copies on this machine, and ranges of them.

A copy lies in the user's cache folder, at buckets/SCHEME/BUCKET/NAME, where the rest of the package reads and
writes it like any file; `files.atomic_path` uploads what it has written there. Messages name the bucket
(`errors.COPIES`). Both libraries ask again, with growing pauses, before they give up.
"""

import base64
import collections
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from alexnet_flax.errors import COPIES, UnreachableError, UsageError, needs_extra
from alexnet_flax.files.cache import cache_folder

SCHEMES = ('gs', 's3')
_AT_ONCE = 16  # files that are copied at the same time
_COPIED = '.copied/files.jsonl'  # in a folder of copies: what they are of
_AHEAD = 1 << 20  # bytes that are read at once where little is asked for
_REFUSED = re.compile(
  'forbidden|access ?denied|credential|unauthorized|401|403|InvalidAccessKey|ExpiredToken'
  '|SignatureDoesNotMatch|RequestTimeTooSkewed|PermanentRedirect|config profile'
  '|validation failed|Invalid (endpoint|bucket)',
  re.I,
)
# In a folder of a run, what is copied only when it is asked for.
_ARRAYS = re.compile(r'(^|/)(checkpoints/\d+/default|damaged|failures|profile)/')


class Object(NamedTuple):
  """What a bucket says of an object."""

  size: int  # bytes
  tag: str  # its generation or ETag: another one is another content
  time: float  # when it was written, in seconds since 1970
  md5: str = ''  # in hexadecimal digits, where the bucket states it (Google's, of objects sent in one piece)


def is_bucket(place: str | os.PathLike[str] | None) -> bool:
  """Whether a place is in a bucket.

  Raises:
    UsageError: It has a scheme of which nothing is known, or names no bucket.
  """
  text = os.fspath(place or '')
  if short := re.match(r'(gs|s3):(?!//)', text):
    raise UsageError(f'{place}: it must begin with {short[1]}://')
  found = re.match(r'([A-Za-z][\w+.-]*)://', text)
  if not found or found[1] in ('http', 'https'):
    return False
  if found[1] not in SCHEMES:
    known = ', '.join(f'{scheme}://' for scheme in SCHEMES)
    raise UsageError(f'{place}: {found[1]}:// cannot be read or written; give a path, or one of {known}')
  parts = text[len(found[0]) :].rstrip('/').split('/')
  if not parts[0] or {'', '.', '..'} & {*parts}:
    raise UsageError(f'{place}: it must be {found[1]}://BUCKET/NAME, without empty names and dots')
  return True


@functools.cache
def _filesystem(scheme: str) -> Any:
  with needs_extra(f'{scheme}://'):
    if scheme == 's3':
      import s3fs

      return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    import gcsfs.core
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL + 1)  # it logs a traceback of all that it raises
  # Not gcsfs.GCSFileSystem, which first asks another service what kind of bucket it is.
  return gcsfs.core.GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)


@contextlib.contextmanager
def asking(url: str) -> Iterator[Any]:
  """Gives the file system of a URL; what the libraries raise in the block becomes one line.

  Raises:
    UsageError: The bucket does not allow it.
    UnreachableError: It does not answer.
    FileNotFoundError, FileExistsError: As they are.
  """
  try:
    yield _filesystem(url.partition('://')[0])
  except (UsageError, FileNotFoundError, FileExistsError):
    raise
  except Exception as error:  # of aiohttp, botocore, google.auth, gcsfs: they have no common class
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
      raise  # of this machine
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, PermissionError) or _REFUSED.search(reason):
      advice = 'correct it, sign in, or ask for the right to read and write it'
      raise UsageError(f'{url} is refused: {reason}; {advice}') from None
    if type(error).__name__ == 'ChecksumError':  # of gcsfs
      raise UnreachableError(f'{url} is not what was sent: {reason}') from None
    raise UnreachableError(f'{url} does not answer: {reason}') from None


def listing(url: str) -> dict[str, Object]:
  """Returns the objects below a URL by their names from there, without locks below it.

  UsageError if there is no such bucket.
  """
  with asking(url) as fs:
    try:
      found = fs.find(url, detail=True)
    except FileNotFoundError:
      raise UsageError(f'{"/".join(url.split("/")[:3])}: there is no such bucket') from None
  start = len(url.partition('://')[2].rstrip('/')) + 1
  names = {key[start:]: _object(one) for key, one in found.items()}
  return {name: one for name, one in names.items() if not {'', '.', '..', '.lock'} & {*name.split('/')}}


def without_arrays(objects: dict[str, Object]) -> dict[str, Object]:
  """Returns the objects of a run without those that are large, and copied when they are asked for."""
  return {name: one for name, one in objects.items() if not _ARRAYS.search(name)}


def stat(url: str) -> Object | None:
  """Returns what a bucket says of an object; None if there is none."""
  with asking(url) as fs:
    try:
      found = fs.info(url)
    except FileNotFoundError:
      return None
    return _object(found) if found['type'] == 'file' else None


def _object(found: dict[str, Any]) -> Object:
  tag, time = found.get('generation') or found.get('ETag'), found.get('mtime') or found.get('LastModified')
  md5 = base64.b64decode(found.get('md5Hash') or '').hex()
  return Object(int(found['size']), str(tag), time.timestamp() if time else 0.0, md5)


def read_ranges(places: Sequence[tuple[str, int, int]]) -> list[bytes]:
  """Returns parts of objects of one bucket, (URL, start, end), all asked for at once."""
  if not places:
    return []
  urls, starts, ends = zip(*places, strict=True)
  with asking(urls[0]) as fs:
    try:
      return list(fs.cat_ranges([*urls], [*starts], [*ends], on_error='raise'))
    except FileNotFoundError as error:
      raise UsageError(f'{urls[0]}, or another file of its data set, has gone: {error}') from None


@contextlib.contextmanager
def opened(url: str) -> Iterator[Any]:
  """Gives an object as a binary file, of which parts are read as they are needed."""
  with asking(url) as fs, fs.open(url, 'rb', block_size=_AHEAD, cache_type='readahead') as file:
    yield file


def write(url: str, content: bytes, only_if_absent: bool = False) -> None:
  """Writes an object; no reader sees a part of it.

  FileExistsError if it is there, and must not be: the bucket compares and writes in one step (S3's
  If-None-Match, Google's ifGenerationMatch=0). UsageError if there is no such bucket.
  """
  options = _checked(url)
  # gcsfs would send it between lines '--==0==' that LF begins; a server that reads by RFC 2046 takes a CR
  # before that LF for a part of the line. In a chunk of its own it is sent as it is.
  if url.startswith('gs:') and (content.endswith(b'\r') or b'--==0==' in content):
    options['chunksize'] = len(content)
  with asking(url) as fs:
    try:
      fs.pipe_file(url, content, mode='create' if only_if_absent else 'overwrite', **options)
    except FileNotFoundError:
      raise UsageError(f'{url}: there is no such bucket') from None


def upload(path: pathlib.Path, url: str) -> None:
  """Writes a file to an object; no reader sees a part of it."""
  if path.stat().st_size < _AHEAD * 64:
    write(url, path.read_bytes())  # at once: a log may grow in the meantime
    return
  with asking(url) as fs:
    fs.put_file(str(path), url, **_checked(url))


def _checked(url: str) -> dict[str, Any]:
  """Returns what makes a file system compare a digest of what the bucket has got; s3fs needs nothing."""
  return {'consistency': 'md5'} if url.startswith('gs:') else {}


def remove(urls: Sequence[str]) -> None:
  """Removes objects one after the other; those that are gone do not matter."""
  for url in urls:
    with asking(url) as fs, contextlib.suppress(FileNotFoundError):
      fs.rm_file(url)


def url_of(path: pathlib.Path) -> str | None:
  """Returns the URL of which a path is the copy; None for a path like any other."""
  for root, url in COPIES.items():
    if path.is_relative_to(root):
      return '/'.join([url, *path.relative_to(root).parts])
  return None


def written_through(path: pathlib.Path) -> str | None:
  """Returns the URL to which a file is uploaded when it is written: not one of a run that trains."""
  is_here = path.is_relative_to(cache_folder().absolute() / 'buckets')
  return url_of(path) if is_here and not any(one.startswith('.partial-') for one in path.parts) else None


def copy_place(url: str) -> pathlib.Path:
  """Returns where the copy of a URL lies, or will lie."""
  scheme, _, rest = url.rstrip('/').partition('://')
  bucket, _, name = rest.partition('/')
  root = cache_folder().absolute() / 'buckets' / scheme / bucket
  COPIES[str(root)] = f'{scheme}://{bucket}'
  return root / name if name else root


def local(url: str) -> pathlib.Path:
  """Returns the copy of an object, made or renewed; of a run's folder, all but the arrays of its checkpoints.

  Of another folder nothing is copied; of what is not there, no copy is left.
  """
  path, url = copy_place(url), url.rstrip('/')
  if found := stat(url):
    fetch(url.rpartition('/')[0], path.parent, {path.name: found})
    return path
  with asking(url) as fs:
    try:
      inside = fs.ls(url, detail=False)
    except FileNotFoundError:
      inside = []
  if path.is_file():
    path.unlink()
  elif not inside:
    shutil.rmtree(path, ignore_errors=True)
  (path if inside else path.parent).mkdir(parents=True, exist_ok=True)
  if any(re.search(r'/(config\.json|seed-\d+/?)$', name) for name in inside):
    objects = listing(url)
    fetch(url, path, without_arrays(objects), objects)
  return path


def fetched(path: pathlib.Path) -> pathlib.Path:
  """Returns a path; if it is of the copy of a folder, all that the bucket has there has been copied."""
  if path.is_dir() and (url := url_of(path)):
    objects = listing(url)
    fetch(url, path, objects, objects)
  return path


def fetch(
  url: str,
  folder: pathlib.Path,
  wanted: dict[str, Object],
  there: dict[str, Object] | None = None,
  progress: bool = False,
) -> None:
  """Copies objects below a URL into a folder; those that it has already, by size and tag, stay.

  A copy appears when it is whole, has the size and, where the bucket states it, the MD5 digest.

  Args:
    url: The URL of the folder.
    folder: Its copy.
    wanted: The objects to copy, by their names.
    there: All that the bucket has there; copies of others are removed. None leaves them.
    progress: Whether to show how far it is.

  Raises:
    UsageError: An object has changed in the meantime, or the folder cannot be written.
  """
  record, lock = folder / _COPIED, threading.Lock()
  try:
    record.parent.mkdir(parents=True, exist_ok=True)
    copied = _copied(record)
    for name in copied.keys() - there.keys() if there is not None else ():
      (folder / name).unlink(missing_ok=True)
      for place in itertools.takewhile(folder.__ne__, (folder / name).parents):
        with contextlib.suppress(OSError):  # not empty, or gone
          place.rmdir()

    def copy(name: str) -> None:
      one, path, source = wanted[name], folder / name, f'{url}/{name}'
      path.parent.mkdir(parents=True, exist_ok=True)
      partial = path.with_name(f'.partial-copy-{os.getpid()}-{hashlib.md5(name.encode()).hexdigest()}')
      try:
        with asking(source) as fs:
          fs.get_file(source, str(partial))
        with partial.open('rb') as file:
          same = not one.md5 or hashlib.file_digest(file, 'md5').hexdigest() == one.md5
        if not same or partial.stat().st_size != one.size:
          raise UsageError(f'{source} has changed while it was copied; try again')
        os.utime(partial, (one.time, one.time))
        partial.replace(path)
      except FileNotFoundError:
        raise UsageError(f'{source} has gone while it was copied; try again') from None
      finally:
        partial.unlink(missing_ok=True)
      with lock, record.open('a', encoding='utf-8') as lines:
        lines.write(json.dumps([name, one.size, one.tag]) + '\n')

    def is_copied(name: str) -> bool:
      one, path = wanted[name], folder / name
      return copied.get(name) == [one.size, one.tag] and path.is_file() and path.stat().st_size == one.size

    missing = [name for name in wanted if not is_copied(name)]
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
      done: Iterable[None] = pool.map(copy, missing)
      if progress and missing:
        from tqdm import tqdm

        done = tqdm(done, f'copying {url}', len(missing), unit='file', mininterval=1)
      collections.deque(done, 0)
  except OSError as error:
    raise UsageError(f'cannot copy {url} to {folder}: {error.strerror or error}') from None


def _copied(record: pathlib.Path) -> dict[str, list[Any]]:
  """Returns name -> [size, tag] of the copies in a folder; a line that was cut short counts nothing."""
  found = {}
  with contextlib.suppress(FileNotFoundError):
    for line in record.read_text(encoding='utf-8', errors='replace').splitlines():
      with contextlib.suppress(ValueError, TypeError):
        name, *rest = json.loads(line)
        found[str(name)] = rest
  return found
