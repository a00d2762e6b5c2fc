"""Random access to TFRecord files, in which TFDS prepares by default, by an index of offsets.

ArrayRecord has an index of its own; but data sets that are prepared already need not be anew.
"""

import functools
import os
import struct
from typing import Any

import numpy as np

from alexnet_flax.errors import UsageError

# Paths, and for each record (its path's number, offset, length), int64 [N, 3].
RecordIndex = tuple[list[str], np.ndarray]


def record_index(file_instructions: list[Any]) -> RecordIndex:
  """Where each record of a split lies.

  Args:
    file_instructions: TFDS's, of the split: files, and how many records to skip and take in each.

  Raises:
    UsageError: a file ends within a record.
  """
  parts = []
  for number, instruction in enumerate(file_instructions):
    spans = _record_spans(instruction.filename)[instruction.skip :][: instruction.take]
    parts.append(np.column_stack([np.full(len(spans), number), spans]))
  return [instruction.filename for instruction in file_instructions], np.concatenate(parts)


@functools.cache
def _record_spans(path: str) -> np.ndarray:
  """(offset, length) of every record of a TFRecord file, int64 [N, 2].

  A record is its length (uint64, little-endian), a checksum of that, the data, a checksum of those
  (https://www.tensorflow.org/tutorials/load_data/tfrecord).
  """
  spans = []
  size = os.path.getsize(path)
  with open(path, 'rb', buffering=0) as file:
    position = 0
    while position < size:
      header = os.pread(file.fileno(), 12, position)
      (length,) = struct.unpack('<Q', header[:8]) if len(header) == 12 else (size,)
      spans.append((position + 12, length))
      position += 12 + length + 4
  if position != size:
    raise UsageError(f'{path} is not a whole TFRecord file; prepare the data set anew')
  return np.array(spans, np.int64).reshape(-1, 2)


def read_records(index: RecordIndex, numbers: np.ndarray) -> np.ndarray:
  """The records with the given numbers, bytes [N]."""
  paths, spans = index
  records = []
  for number, offset, length in spans[numbers].tolist():
    with open(paths[number], 'rb', buffering=0) as file:
      records.append(os.pread(file.fileno(), length, offset))
  return as_bytes(records)


def as_bytes(items: list[bytes]) -> np.ndarray:
  """An array of byte strings as they are."""
  array = np.empty(len(items), object)  # not np.array: that would cut trailing zeros
  array[:] = items
  return array
