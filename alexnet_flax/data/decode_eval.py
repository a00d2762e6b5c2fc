"""Exact decoding in TensorFlow's C++, for evaluation views and for writing smaller images.

NumPy has computed the windows beforehand (`views.py`); TensorFlow decodes and resizes. Training views use a
faster path (`decode_train.py`).
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from alexnet_flax.data.image_header import Encoded
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.views import EvalView

Example = dict[str, tf.Tensor]
Columns = dict[str, np.ndarray]

_KINDS = ('jpeg', 'png', 'raw')


def by_graph(
  columns: Callable[[Sequence[Encoded]], Columns],
  decode: Callable[[Example], Example],
  signature: dict[str, tf.TensorSpec],
) -> Callable[[Sequence[Encoded], np.ndarray], Columns]:
  """Returns a decoder that runs in a TensorFlow graph, one image after another, without Python's lock.

  Args:
    columns: Computes the inputs of `decode`, one row per image.
    decode: Decodes a row.
    signature: The types that `decode` returns.

  Returns:
    A function of images and of the numbers of their views, which it ignores. It raises UnreadableError if
    an image is damaged.
  """
  graph = tf.function(
    lambda rows: tf.map_fn(decode, rows, fn_output_signature=signature, parallel_iterations=1),
    reduce_retracing=True,
  )

  def decoded(images: Sequence[Encoded], numbers: np.ndarray) -> Columns:
    del numbers
    try:
      return {name: values.numpy() for name, values in graph(columns(images)).items()}
    except tf.errors.InvalidArgumentError as error:
      raise UnreadableError(error.message) from None

  return decoded


@functools.lru_cache  # tracing takes time, and TensorFlow warns about repeated tracing
def eval_decoder(view: EvalView) -> Callable[[Sequence[Encoded], np.ndarray], Columns]:
  """Returns a decoder of B images into {'image': uint8 [B, S, S, 3]}, or [B, 10, S, S, 3]; see `by_graph`."""
  size = (view.image_size, view.image_size)
  shape = (10, *size, 3) if view.ten_crop else (*size, 3)
  signature = {'image': tf.TensorSpec(shape, tf.uint8)}
  return by_graph(functools.partial(_eval_columns, view), functools.partial(_decode_eval, view), signature)


def _eval_columns(view: EvalView, images: Sequence[Encoded]) -> Columns:
  """Computes the inputs of `_decode_eval`."""
  sizes = np.array([(image.height, image.width) for image in images], np.int64)
  contents = np.empty(len(images), object)  # not np.array: that would cut trailing zeros
  contents[:] = [bytes(image.content) for image in images]
  return {
    'content': contents,
    'kind': np.array([_KINDS.index(image.kind) for image in images], np.int32),
    'shape': sizes.astype(np.int32),
    'scale': (view.resized(sizes) / sizes).astype(np.float32),
    'corners': view.corners(sizes),
  }


def _decode_eval(view: EvalView, example: Example) -> Example:
  """Decodes 'image': one evaluation view, uint8 [S, S, 3], or ten, [10, S, S, 3]."""
  size = (view.image_size, view.image_size)
  pixels = tf.cast(_decode(example), tf.float32)[None]
  squares = [
    _translated(pixels, size, example['scale'], corner, antialias=view.resize == 'pil')
    for corner in tf.unstack(example['corners'], num=6 if view.ten_crop else 1)
  ]
  images = _to_uint8(tf.stack(squares))
  image = images[0]
  if view.ten_crop:
    mirrored = tf.gather(images, [0, 1, 2, 3, 5])
    image = tf.concat([images[:5], tf.reverse(mirrored, [2])], 0)
  return {'image': image}


def resized_columns(side: int, center: bool, images: Sequence[Encoded]) -> Columns:
  """Computes the inputs of `decode_resized`."""
  view = EvalView(side, side)
  columns = _eval_columns(view, images)
  sizes = columns['shape'].astype(np.int64)
  if center:
    return columns | {'size': np.full_like(sizes, side, np.int32), 'corners': columns['corners'][:, 0]}
  return columns | {'size': view.resized(sizes), 'corners': np.zeros_like(sizes, np.int32)}


def decode_resized(example: Example) -> tf.Tensor:
  """Decodes an image and resizes its short side, or the central square of it: uint8 [H, W, 3]."""
  image = tf.cast(_decode(example), tf.float32)[None]
  return _to_uint8(_translated(image, example['size'], example['scale'], example['corners'], antialias=True))


def _decode(row: Example) -> tf.Tensor:
  def jpeg() -> tf.Tensor:
    return tf.io.decode_jpeg(row['content'], channels=3, dct_method='INTEGER_ACCURATE')

  def png() -> tf.Tensor:
    return tf.io.decode_png(row['content'], channels=3)

  def raw() -> tf.Tensor:
    return tf.reshape(tf.io.decode_raw(row['content'], tf.uint8), [*tf.unstack(row['shape']), 3])

  return tf.switch_case(row['kind'], [jpeg, png, raw])


def _translated(
  image: tf.Tensor, size: tf.Tensor, scale: tf.Tensor, corner: tf.Tensor, *, antialias: bool
) -> tf.Tensor:
  """Computes one window of the resized image, and nothing outside it."""
  return tf.raw_ops.ScaleAndTranslate(
    images=image,
    size=size,
    scale=scale,
    translation=-tf.cast(corner, tf.float32),
    kernel_type='triangle',
    antialias=antialias,
  )[0]


def _to_uint8(pixels: tf.Tensor) -> tf.Tensor:
  """Rounds; bilinear interpolation stays within 0 ... 255, up to the last bit."""
  return tf.cast(pixels + 0.5, tf.uint8)
