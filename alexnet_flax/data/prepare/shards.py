"""Files of resized images, each written whole or not at all, with notes of their colours."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from alexnet_flax.data import decode_eval
from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.image_header import Encoded
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.loader import HostBatch, Plan, Reader
from alexnet_flax.data.source import Source
from alexnet_flax.errors import UsageError, unknown_name

Encoding = Literal['jpeg', 'raw']
Center = Literal['none', 'center']

_LONGEST = 65_500  # of libjpeg
_CHUNK = 64  # images that are decoded together


@dataclasses.dataclass(frozen=True)
class Form:
  """How images are stored.

  Attributes:
    side: of the short side, in pixels.
    encoding: 'jpeg', or 'raw' for pixels as they are.
    quality: of JPEG, 1 ... 100.
    crop: 'center' for the central square alone (Krizhevsky et al. 2012, section 2), or 'none'.
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
    """What distinguishes the data set's name: '256_q90', '256_center_raw'."""
    kind = 'raw' if self.encoding == 'raw' else f'q{self.quality}'
    return '_'.join([str(self.side), *(['center'] if self.crop == 'center' else []), kind])


def write_shard(
  path: pathlib.Path,
  noted: pathlib.Path,
  source: Source,
  numbers: np.ndarray,
  form: Form,
  bad: BadImages,
  bar: tqdm,
) -> None:
  """Writes the examples with some numbers, resized, as TFRecords.

  Args:
    path: the file, which appears when it is whole.
    noted: a JSON file beside it: images, pixels, and sums of their values and products.
    source: of the examples.
    numbers: of those to write.
    form: of the images.
    bad: what to do with images that cannot be decoded.
    bar: is moved on.

  Raises:
    OSError: the disk is full, or not to be written to.
  """
  partial = path.with_name(f'partial-{os.getpid()}.{path.name}')
  images, pixels, sums, products = 0, 0, np.zeros(3), np.zeros((3, 3))
  try:
    with _system_errors(), tf.io.TFRecordWriter(str(partial)) as writer:
      for chosen, batch in _resized(source, numbers, form, bad):
        names = [_short_name(one.name) for one in source.read(chosen)]
        for row in np.flatnonzero(batch['weight'][: len(chosen)]):
          writer.write(
            _record(batch['image'][row], batch['size'][row], int(batch['label'][row]), names[row], form)
          )
          images += 1
          pixels += int(batch['size'][row].prod())
          sums += batch['sums'][row]
          products += batch['products'][row]
        bar.update(len(chosen))
    note = {'images': images, 'left_out': len(numbers) - images, 'pixels': pixels}
    write_whole(noted, json.dumps(note | {'sums': sums.tolist(), 'products': products.tolist()}))
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file that is there whole or not at all."""
  partial = path.with_name(f'partial-{os.getpid()}.{path.name}')
  try:
    partial.write_text(text)
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
  """What TensorFlow's writer raises of a full disk, as Python would."""
  try:
    yield
  except (tf.errors.ResourceExhaustedError, tf.errors.PermissionDeniedError, tf.errors.UnknownError) as error:
    full = os.strerror(errno.ENOSPC)
    raise OSError(full if full in error.message else error.message) from None


def _short_name(name: str) -> str:
  """CLASS/image of a file's path; TFDS's own names as they are."""
  return '/'.join(pathlib.PurePath(name).parts[-2:]) if os.path.isfile(name) else name


def _resized(
  source: Source, numbers: np.ndarray, form: Form, bad: BadImages
) -> Iterator[tuple[np.ndarray, HostBatch]]:
  """(numbers, their resized images), some at a time."""
  chunks = [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]

  def plan(step: int) -> Plan:
    filled = np.resize(chunks[step], _CHUNK)
    weights = (np.arange(_CHUNK) < len(chunks[step])).astype(np.float32)
    return Plan(filled, weights, np.zeros((_CHUNK, 0), np.float32))

  def accept(image: Encoded) -> None:
    sides = sorted((image.height, image.width))
    longest = form.side if form.crop == 'center' else form.side * sides[1] // sides[0]
    if longest > _LONGEST:
      raise UnreadableError(
        f'{image.height}x{image.width} would become {longest:,} pixels long; JPEG ends at {_LONGEST:,}'
      )

  reader = Reader(source, _decoder(form), None, bad, accept)
  yield from zip(chunks, reader.batches(plan, range(len(chunks)), None), strict=True)


@functools.lru_cache
def _decoder(form: Form) -> Callable[[Sequence[Encoded], np.ndarray], HostBatch]:
  signature = {
    'image': tf.TensorSpec((), tf.string),
    'size': tf.TensorSpec((2,), tf.int32),
    'sums': tf.TensorSpec((3,), tf.float64),
    'products': tf.TensorSpec((3, 3), tf.float64),
  }
  columns = functools.partial(decode_eval.resized_columns, form.side, form.crop == 'center')
  return decode_eval.by_graph(columns, functools.partial(_encode, form), signature)


def _encode(form: Form, example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  image = decode_eval.decode_resized(example)
  if form.encoding == 'raw':
    encoded = tf.io.serialize_tensor(image)
  else:
    encoded = tf.io.encode_jpeg(image, quality=form.quality)
  values = tf.reshape(tf.cast(image, tf.float64), [-1, 3])
  return {
    'image': encoded,
    'size': tf.shape(image)[:2],
    'sums': tf.reduce_sum(values, 0),
    'products': tf.matmul(values, values, transpose_a=True),
  }


def _record(encoded: bytes, size: np.ndarray, label: int, name: str, form: Form) -> bytes:
  features = {
    'label': tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    'file_name': _bytes_feature(name.encode()),
  }
  if form.encoding == 'jpeg':
    features['image'] = _bytes_feature(encoded)
  else:
    pixels = tf.io.parse_tensor(encoded, tf.uint8).numpy().tobytes()
    if form.crop == 'center':
      features['image'] = _bytes_feature(pixels)
    else:  # as TFDS stores a tensor of which it does not know the shape
      shape = tf.train.Int64List(value=[*size.tolist(), 3])
      features['image/shape'] = tf.train.Feature(int64_list=shape)
      features['image/value'] = _bytes_feature(pixels)
  example = tf.train.Example(features=tf.train.Features(feature=features))
  return example.SerializeToString(deterministic=True)


def _bytes_feature(value: bytes) -> tf.train.Feature:
  return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
