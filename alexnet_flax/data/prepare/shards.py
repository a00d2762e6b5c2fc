"""Writes TFRecord files of resized images atomically, with statistics of their colours."""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import pathlib
import typing
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from alexnet_flax.data import import_tensorflow
from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.image_header import Encoded, decode_pixels
from alexnet_flax.data.images import UnreadableError, evaluation_crops, resize_short_side
from alexnet_flax.data.loader import HostBatch, Plan, Reader
from alexnet_flax.data.source import Source
from alexnet_flax.data.views import EvalView
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.files import atomic_path, write_text

tf = import_tensorflow()
Encoding = Literal['jpeg', 'raw']
Center = Literal['none', 'center']

_LONGEST = 65_500  # pixels, libjpeg's limit
_CHUNK = 64  # images decoded together


@dataclasses.dataclass(frozen=True)
class ImageFormat:
  """The size and encoding of the images of a rewritten data set.

  Attributes:
    side: The short side in pixels.
    encoding: 'jpeg', or 'raw' for unencoded pixels.
    quality: The JPEG quality, 1 ... 100.
    crop: 'center' for the central square (Krizhevsky et al. 2012, section 2), or 'none'.
  """

  side: int
  encoding: Encoding = 'jpeg'
  quality: int = 90
  crop: Center = 'none'

  def __post_init__(self) -> None:
    for key, value, choices in (
      ('--encoding', self.encoding, typing.get_args(Encoding)),
      ('--crop', self.crop, typing.get_args(Center)),
    ):
      if value not in choices:
        raise unknown_name(f'value of {key}:', value, choices)
    if self.side < 8:
      raise UsageError(f'--side (={self.side}) must be at least 8')
    if not 1 <= self.quality <= 100:
      raise UsageError(f'--quality (={self.quality}) must be 1 ... 100')

  def suffix(self) -> str:
    """The suffix of the data set's name: '256_q90', '256_center_raw'."""
    kind = 'raw' if self.encoding == 'raw' else f'q{self.quality}'
    return '_'.join([str(self.side), *(['center'] if self.crop == 'center' else []), kind])


def write_shard(
  path: pathlib.Path,
  statistics: pathlib.Path,
  source: Source,
  indices: np.ndarray,
  image_format: ImageFormat,
  bad: BadImages,
  bar: tqdm,
) -> None:
  """Resizes examples and writes them as a TFRecord file.

  Args:
    path: The file to write.
    statistics: A JSON file for the numbers of images and pixels, and sums of pixel values and products.
    source: The data set.
    indices: The indices of the examples to write.
    image_format: The format of the images.
    bad: Handles images that cannot be decoded.
    bar: The progress bar.

  Raises:
    OSError: The disk is full or not writable.
  """
  images, pixels, sums, products = 0, 0, np.zeros(3), np.zeros((3, 3))
  with atomic_path(path) as partial:
    with _system_errors(), tf.io.TFRecordWriter(str(partial)) as writer:
      for chunk, batch in _resized(source, indices, image_format, bad):
        names = [_short_name(one.name) for one in source.read(chunk)]
        for row in np.flatnonzero(batch['weight'][: len(chunk)]):
          size, label = batch['size'][row], int(batch['label'][row])
          writer.write(_serialized_example(batch['image'][row], size, label, names[row], image_format))
          images += 1
          pixels += int(size.prod())
          sums += batch['sums'][row]
          products += batch['products'][row]
        bar.update(len(chunk))
    counts = {'images': images, 'left_out': len(indices) - images, 'pixels': pixels}
    write_text(statistics, json.dumps(counts | {'sums': sums.tolist(), 'products': products.tolist()}))


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
  """Turns the errors of TensorFlow's writer into Python's OSError."""
  try:
    yield
  except (tf.errors.ResourceExhaustedError, tf.errors.PermissionDeniedError, tf.errors.UnknownError) as error:
    full = os.strerror(errno.ENOSPC)
    raise OSError(full if full in error.message else error.message) from None


def _short_name(name: str) -> str:
  """Shortens a path to CLASS/image; TFDS's own names are kept."""
  return '/'.join(pathlib.PurePath(name).parts[-2:]) if os.path.isfile(name) else name


def _resized(
  source: Source, indices: np.ndarray, image_format: ImageFormat, bad: BadImages
) -> Iterator[tuple[np.ndarray, HostBatch]]:
  """Yields chunks of indices with their resized images."""
  chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]

  def plan(step: int) -> Plan:
    padded = np.resize(chunks[step], _CHUNK)
    weights = (np.arange(_CHUNK) < len(chunks[step])).astype(np.float32)
    return Plan(padded, weights, np.zeros((_CHUNK, 0), np.float32))

  def accept(image: Encoded) -> None:
    short, long = sorted((image.height, image.width))
    longest = image_format.side if image_format.crop == 'center' else image_format.side * long // short
    if longest > _LONGEST:
      raise UnreadableError(
        f'{image.height}x{image.width} would be resized to {longest:,} pixels; JPEG allows {_LONGEST:,}'
      )

  reader = Reader(source, functools.partial(_encode, image_format), None, bad, accept)
  yield from zip(chunks, reader.batches(plan, range(len(chunks)), None), strict=True)


def _encode(
  image_format: ImageFormat, images: Sequence[Encoded], numbers: np.ndarray
) -> dict[str, np.ndarray]:
  """Resizes and encodes images; returns sizes [B, 2], sums of values [B, 3] and of products [B, 3, 3] as
  well."""
  del numbers
  view = EvalView(image_format.side, image_format.side)
  resize = evaluation_crops if image_format.crop == 'center' else resize_short_side
  rows = [resize(decode_pixels(image), view) for image in images]
  contents = np.empty(len(rows), object)  # np.array would strip trailing zeros
  contents[:] = [
    row.tobytes() if image_format.encoding == 'raw' else _jpeg(row, image_format.quality) for row in rows
  ]
  values = [row.reshape(-1, 3).astype(np.float64) for row in rows]
  return {
    'image': contents,
    'size': np.array([row.shape[:2] for row in rows]),
    'sums': np.array([value.sum(0) for value in values]),
    'products': np.array([value.T @ value for value in values]),
  }


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'JPEG', quality=quality)
  return buffer.getvalue()


def _serialized_example(
  encoded: bytes, size: np.ndarray, label: int, name: str, image_format: ImageFormat
) -> bytes:
  values: dict[str, bytes | list[int]] = {'label': [label], 'file_name': name.encode()}
  if image_format.encoding == 'raw' and image_format.crop == 'none':  # as TFDS stores unknown shapes
    values |= {'image/shape': [*size.tolist(), 3], 'image/value': encoded}
  else:
    values['image'] = encoded
  features = {
    key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    if isinstance(value, bytes)
    else tf.train.Feature(int64_list=tf.train.Int64List(value=value))
    for key, value in values.items()
  }
  example = tf.train.Example(features=tf.train.Features(feature=features))
  return example.SerializeToString(deterministic=True)
