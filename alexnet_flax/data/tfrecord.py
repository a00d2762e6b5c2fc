"""Random access to TFRecord files, in which TFDS prepares by default, by an index of offsets.

ArrayRecord has an index of its own; but data sets that are prepared already need not be anew. Files are
mapped into memory: what of a record is not looked at, is not read.
"""

import concurrent.futures
import functools
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from alexnet_flax.errors import UsageError

# Paths, and for each record (its path's number, offset, length), int64 [N, 3].
RecordIndex = tuple[list[str], np.ndarray]
_READERS = 32


def record_index(file_instructions: list[Any]) -> RecordIndex:
  """Where each record of a split lies.

  Args:
    file_instructions: TFDS's, of the split: files, and how many records to skip and take in each.

  Raises:
    UsageError: a file ends within a record.
  """
  parts = []
  # Most of the time is waiting for a disk that can do many things at once.
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    found = pool.map(_record_spans, [instruction.filename for instruction in file_instructions])
    for number, (instruction, every) in enumerate(zip(file_instructions, found, strict=True)):
      spans = every[instruction.skip :][: instruction.take]
      parts.append(np.column_stack([np.full(len(spans), number), spans]))
  return [instruction.filename for instruction in file_instructions], np.concatenate(parts)


def read_records(index: RecordIndex, numbers: np.ndarray) -> list[memoryview]:
  """The records with the given numbers, as views of the files."""
  paths, spans = index
  return [_mapped(paths[path])[start : start + length] for path, start, length in spans[numbers].tolist()]


@functools.cache
def _record_spans(path: str) -> np.ndarray:
  """(offset, length) of every record of a TFRecord file, int64 [N, 2].

  A record is its length (uint64, little-endian), a checksum of that, the data, a checksum of those
  (https://www.tensorflow.org/tutorials/load_data/tfrecord).
  """
  spans, position, size = [], 0, os.path.getsize(path)
  with open(path, 'rb', buffering=0) as file:  # not mapped: that would bring in a whole page for a header
    while position + 12 <= size:
      length = int.from_bytes(os.pread(file.fileno(), 8, position), 'little')
      spans.append((position + 12, length))
      position += 12 + length + 4
  if position != size:
    raise UsageError(f'{path} is not a whole TFRecord file; prepare the data set anew')
  return np.array(spans, np.int64).reshape(-1, 2)


@functools.lru_cache(maxsize=512)  # each keeps a file open, and 1,024 are allowed
def _mapped(path: str) -> memoryview:
  with open(path, 'rb') as file:
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def parse_example(record: bytes | memoryview) -> dict[str, memoryview]:
  """The values of a serialised `tf.train.Example` by name, in place: nothing is copied.

  An Example is nested messages, each entry a tag of one byte, a length and its content: Example >
  Features > (key, Feature) > BytesList, FloatList or Int64List > values
  (tensorflow/core/example/feature.proto). Of each list the first value is given: a bytes value as it
  is, others as they are packed.

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
  """The numbers of an Int64List as it is packed."""
  numbers, position = [], 0
  while position < len(packed):
    number, position = _varint(packed, position)
    numbers.append(number - (1 << 64) if number >> 63 else number)
  return numbers


def _fields(message: memoryview) -> Iterator[memoryview]:
  """The contents of a message's fields, all of which have lengths."""
  position = 0
  while position < len(message):
    length, start = _varint(message, position + 1)
    position = start + length
    yield message[start:position]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
  """A number in base 128, least digit first, and the position behind it."""
  number = shift = 0
  while True:
    byte = data[position]
    number |= (byte & 0x7F) << shift
    position += 1
    if byte < 0x80:
      return number, position
    shift += 7
