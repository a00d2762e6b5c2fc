"""Random access to TFRecord files, TFDS's default format, by an index of offsets.

ArrayRecord has its own index, but data sets that are already prepared should not need preparing again. Files
are memory-mapped, so that unused parts of a record are not read. Of files in a bucket the records are asked
for by their ranges, all of a batch at once; their index is kept in the cache folder.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import mmap
import os
import resource
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from alexnet_flax.data.images import UnreadableError
from alexnet_flax.errors import UsageError, needs_extra
from alexnet_flax.files import atomic_path, buckets, refuse_pipe
from alexnet_flax.files.cache import cache_folder

# Paths, and (index of the path, offset, length) of each record, int64 [N, 3].
RecordIndex = tuple[list[str], np.ndarray]
_READERS = 32
_CHECKSUM = 4  # bytes


def record_index(file_instructions: list[Any]) -> RecordIndex:
  """Locates every record of a split.

  `file_instructions` are TFDS's: files, and how many records to skip and take. Raises UsageError if a file is
  missing, damaged, or ends within a record.
  """
  files = [instruction.filename for instruction in file_instructions]
  # Most of the time is spent waiting for the disk, which serves many requests at once.
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    spans = list(pool.map(_record_spans, files))
  chosen = [spans[i][part.skip :][: part.take] for i, part in enumerate(file_instructions)]
  return files, np.concatenate([np.insert(part, 0, i, axis=1) for i, part in enumerate(chosen)])


def read_records(
  index: RecordIndex, numbers: np.ndarray, verify: bool = False
) -> list[memoryview | UnreadableError]:
  """Returns the records with the given indices, as views of the files.

  If `verify`, those whose checksum is wrong are replaced by the reason.
  """
  paths, spans = index
  found: list[memoryview | UnreadableError] = []
  chosen = spans[numbers].tolist()
  places = [(paths[path], start, start + length + _CHECKSUM) for path, start, length in chosen]
  read = _ranges if buckets.is_bucket(paths[0]) else functools.partial(itertools.starmap, _stored)
  ranges: Iterable[memoryview] = read(places)
  for (path, start, length), stored in zip(chosen, ranges, strict=True):
    if verify and _checksum(stored[:length]) != bytes(stored[length:]):
      number = np.searchsorted(_record_spans(paths[path])[:, 0], start)
      found.append(UnreadableError(f'record {number} of {paths[path]} is damaged, by its checksum'))
    else:
      found.append(stored[:length])
  return found


def _ranges(places: list[tuple[str, int, int]]) -> list[memoryview]:
  return [memoryview(part) for part in buckets.read_ranges(places)]


def _stored(path: str, start: int, end: int) -> memoryview:
  if (mapped := _mapped(path)) is not None:
    return mapped[start:end]
  with open(path, 'rb', buffering=0) as file:
    return memoryview(os.pread(file.fileno(), end - start, start))


def framed(record: bytes) -> bytes:
  """Returns a record as a TFRecord file holds it: with its length and the checksums of both."""
  length = len(record).to_bytes(8, 'little')
  return length + _checksum(length) + record + _checksum(record)


@functools.cache
def _record_spans(path: str) -> np.ndarray:
  """Returns (offset, length) of every record of a TFRecord file, int64 [N, 2].

  Those of a file in a bucket are kept in the cache folder, for its size and its generation or ETag.
  """
  if buckets.is_bucket(path):
    if (found := buckets.stat(path)) is None:
      raise UsageError(f'{path} has gone; prepare the data set again')
    name = hashlib.sha256(f'{path} {found.size} {found.tag}'.encode()).hexdigest()[:32]
    index = cache_folder() / 'records' / f'{name}.npy'
    with contextlib.suppress(OSError, ValueError, EOFError):  # none yet, or a broken one
      return np.load(index)
    index.parent.mkdir(parents=True, exist_ok=True)
    with buckets.opened(path) as file, atomic_path(index) as partial:
      np.save(partial, spans := _scan(path, file, found.size))
    return spans
  try:
    refuse_pipe(path)
    with open(path, 'rb', buffering=0) as file:  # not mapped: that would load a whole page for each header
      return _scan(path, file, os.path.getsize(path))
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}; prepare the data set again') from None


def _scan(path: str, file: BinaryIO, size: int) -> np.ndarray:
  """Returns (offset, length) of every record, int64 [N, 2].

  A record is its length (uint64, little-endian), a checksum of the length, the data, and a checksum of the
  data (https://www.tensorflow.org/tutorials/load_data/tfrecord).
  """
  spans, position = [], 0
  while position + 12 <= size:
    file.seek(position)
    header = file.read(12)
    if _checksum(header[:8]) != header[8:]:
      break
    length = int.from_bytes(header[:8], 'little')
    spans.append((position + 12, length))
    position += 12 + length + _CHECKSUM
  if position != size:
    damage = f'record {len(spans)} is damaged'
    raise UsageError(f'{path} is not a complete TFRecord file ({damage}); prepare the data set again')
  return np.array(spans, np.int64).reshape(-1, 2)


def _checksum(data: bytes | memoryview) -> bytes:
  """CRC-32C of the data, masked as TFRecord files hold it."""
  with needs_extra('reading TFRecord files'):
    import google_crc32c

  crc = google_crc32c.value(bytes(data))
  return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(_CHECKSUM, 'little')


@functools.cache
def _mapped(path: str) -> memoryview | None:
  """Returns a file's content; None once half of the files are open that a process may open.

  Each mapping keeps its file open.
  """
  if _mapped.cache_info().currsize >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
    return None
  with open(path, 'rb') as file:
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def parse_example(record: bytes | memoryview) -> dict[str, memoryview]:
  """Returns the values of a serialised `tf.train.Example` by name, without copying.

  An Example consists of nested messages, each entry a tag of one byte, a length and its content: Example >
  Features > (key, Feature) > BytesList, FloatList or Int64List > values
  (tensorflow/core/example/feature.proto). Of a BytesList the first value is returned, other lists packed.

  >>> record = b'\\n\\x10\\n\\x0e\\n\\x01x\\x12\\t\\n\\x07\\n\\x05hello'
  >>> bytes(parse_example(record)['x'])
  b'hello'
  """
  view = memoryview(record)
  values: dict[str, memoryview] = {}
  for features in _fields(view):
    for entry in _fields(features):
      key, feature = _fields(entry)
      for values_list in _fields(feature):
        values[str(key, 'utf-8')] = next(_fields(values_list), values_list)
  return values


def read_integers(packed: memoryview) -> list[int]:
  """Decodes a packed Int64List."""
  numbers, position = [], 0
  while position < len(packed):
    number, position = _varint(packed, position)
    numbers.append(number - (1 << 64) if number >> 63 else number)
  return numbers


def _fields(message: memoryview) -> Iterator[memoryview]:
  """Yields the contents of a message's fields, all of which are length-delimited."""
  position = 0
  while position < len(message):
    length, start = _varint(message, position + 1)
    position = start + length
    yield message[start:position]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
  """Decodes a base-128 number, least digit first; returns it and the position after it."""
  number = shift = 0
  while True:
    byte = data[position]
    number |= (byte & 0x7F) << shift
    position += 1
    if byte < 0x80:
      return number, position
    shift += 7
