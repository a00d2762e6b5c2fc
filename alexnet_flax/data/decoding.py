"""Encoded pictures to views uint8 [S, S, 3], in TensorFlow's C++: one pass over each picture.

What is to be seen of each picture was settled before, in NumPy (`views.py`); TensorFlow decodes, resizes
and mirrors.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from alexnet_flax.data.encoded import Encoded
from alexnet_flax.data.views import EvalView, TrainView, turned

Example = dict[str, tf.Tensor]
Columns = dict[str, np.ndarray]

# libjpeg decodes at a half, quarter or eighth for far less: where that still leaves a pixel a pixel.
_RATIOS = (1, 2, 4, 8)
_JPEG, _PNG, _RAW = 'jpeg', 'png', 'raw'
_BRANCHES = (*_RATIOS, _PNG, _RAW)


def train_columns(view: TrainView, pictures: Sequence[Encoded], numbers: np.ndarray) -> Columns:
  """What `decode_train` needs to know of each picture.

  Args:
    view: of the pictures.
    pictures: B of them.
    numbers: float32 [B, VIEW_NUMBERS] in [0, 1).
  """
  sizes = np.array([(picture.height, picture.width) for picture in pictures], np.int64)
  windows = view.windows(sizes, numbers)
  ratios = np.ones(len(pictures), np.int64)
  is_jpeg = np.array([picture.kind == _JPEG for picture in pictures])
  for ratio in _RATIOS[1:]:
    ratios[is_jpeg & (windows.boxes[:, 2:].min(axis=1) >= ratio * view.image_size)] = ratio
  columns = {'mirrored': windows.mirrored}
  boxes = windows.boxes
  if view.rotation:
    boxes, columns['map'] = turned(windows, sizes, view.image_size, ratios)
  scaled = _scaled(boxes, sizes, ratios)
  contents = [
    _cut(picture, box) if picture.kind == _RAW else bytes(picture.content)
    for picture, box in zip(pictures, boxes.tolist(), strict=True)
  ]
  return columns | {'content': _strings(contents), 'branch': _branches(pictures, ratios), 'box': scaled}


def eval_columns(view: EvalView, pictures: Sequence[Encoded]) -> Columns:
  """What `decode_eval` needs to know of each picture."""
  sizes = np.array([(picture.height, picture.width) for picture in pictures], np.int64)
  boxes = np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.int32)
  return {
    'content': _strings([bytes(picture.content) for picture in pictures]),
    'branch': _branches(pictures, np.ones(len(pictures), np.int64)),
    'box': boxes,
    'scale': (view.resized(sizes) / sizes).astype(np.float32),
    'corners': view.corners(sizes),
  }


def decode_train(view: TrainView, example: Example) -> Example:
  """'image', one view in training, uint8 [S, S, 3]; of columns, one row each."""
  size = view.image_size
  crop = _decode(example, 'INTEGER_FAST')
  if view.rotation:
    image = _turn(crop, example['map'], size, view.fill)
  else:
    same = tf.reduce_all(tf.shape(crop)[:2] == size)
    image = tf.cond(same, lambda: crop, lambda: _resize(crop, size))
    image = tf.cond(example['mirrored'], lambda: tf.reverse(image, [1]), lambda: image)
  return {'image': tf.ensure_shape(image, (size, size, 3))}


def decode_eval(view: EvalView, example: Example) -> Example:
  """'image', one view in evaluation, uint8 [S, S, 3], or ten of them, [10, S, S, 3]."""
  size = (view.image_size, view.image_size)
  picture = tf.cast(_decode(example, 'INTEGER_ACCURATE'), tf.float32)[None]
  squares = [
    _translated(picture, size, example['scale'], corner, antialias=view.resize == 'pil')
    for corner in tf.unstack(example['corners'], num=5 if view.ten_crop else 1)
  ]
  images = _to_uint8(tf.stack(squares))
  image = tf.concat([images, tf.reverse(images, [2])], 0) if view.ten_crop else images[0]
  return {'image': tf.ensure_shape(image, (10, *size, 3) if view.ten_crop else (*size, 3))}


def resized_columns(side: int, center: bool, pictures: Sequence[Encoded]) -> Columns:
  """What `decode_resized` needs to know of each picture."""
  view = EvalView(side, side)
  columns = eval_columns(view, pictures)
  sizes = columns['box'][:, 2:].astype(np.int64)
  if center:
    return columns | {'size': np.full_like(sizes, side, np.int32), 'corners': columns['corners'][:, 0]}
  return columns | {'size': view.resized(sizes), 'corners': np.zeros_like(sizes, np.int32)}


def decode_resized(example: Example) -> tf.Tensor:
  """The picture with another short side, or a square of it: uint8 [H, W, 3]."""
  picture = tf.cast(_decode(example, 'INTEGER_ACCURATE'), tf.float32)[None]
  return _to_uint8(
    _translated(picture, example['size'], example['scale'], example['corners'], antialias=True)
  )


def first_row(columns: Columns) -> Example:
  """The first picture's row, for decoding it alone."""
  return {name: tf.constant(values[0]) for name, values in columns.items()}


def cut_window(picture: Encoded, box: Sequence[int]) -> np.ndarray:
  """A window of a raw picture, as a view of its bytes: uint8 [h, w, 3]."""
  top, left, height, width = box
  pixels = np.frombuffer(picture.content, np.uint8).reshape(picture.height, picture.width, 3)
  return pixels[top : top + height, left : left + width]


def _decode(example: Example, dct_method: str) -> tf.Tensor:
  """The picture within the box."""
  content, box = example['content'], example['box']

  def jpeg(ratio: int) -> tf.Tensor:
    return tf.io.decode_and_crop_jpeg(content, box, channels=3, dct_method=dct_method, ratio=ratio)

  def png() -> tf.Tensor:
    picture = tf.io.decode_png(content, channels=3)
    return tf.slice(picture, [box[0], box[1], 0], [box[2], box[3], 3])

  def raw() -> tf.Tensor:
    return tf.reshape(tf.io.decode_raw(content, tf.uint8), [box[2], box[3], 3])

  branches = [lambda ratio=ratio: jpeg(ratio) for ratio in _RATIOS]
  return tf.switch_case(example['branch'], [*branches, png, raw])


def _resize(crop: tf.Tensor, size: int) -> tf.Tensor:
  """Bilinear; antialiased only where it shrinks to less than a half, for that takes four times as long."""
  shrinks = tf.reduce_min(tf.shape(crop)[:2]) > 2 * size
  return _to_uint8(
    tf.cond(
      shrinks,
      lambda: tf.image.resize(crop, (size, size), antialias=True),
      lambda: tf.raw_ops.ResizeBilinear(images=crop[None], size=(size, size), half_pixel_centers=True)[0],
    )
  )


def _translated(
  picture: tf.Tensor, size: tf.Tensor, scale: tf.Tensor, corner: tf.Tensor, *, antialias: bool
) -> tf.Tensor:
  """A window of a resized picture, of which nothing else is computed."""
  return tf.raw_ops.ScaleAndTranslate(
    images=picture,
    size=size,
    scale=scale,
    translation=-tf.cast(corner, tf.float32),
    kernel_type='triangle',
    antialias=antialias,
  )[0]


def _turn(crop: tf.Tensor, mapping: tf.Tensor, size: int, fill: tuple[float, float, float]) -> tf.Tensor:
  color = tf.constant(fill, tf.float32)
  turned = tf.raw_ops.ImageProjectiveTransformV3(
    images=(tf.cast(crop, tf.float32) - color)[None],
    transforms=tf.concat([tf.reshape(mapping, [1, 6]), [[0.0, 0.0]]], 1),
    output_shape=(size, size),
    fill_value=0.0,
    interpolation='BILINEAR',
  )[0]
  return _to_uint8(turned + color)


def _to_uint8(pixels: tf.Tensor) -> tf.Tensor:
  """Rounded; bilinear mixtures stay within 0 ... 255, but for the last bit."""
  return tf.cast(pixels + 0.5, tf.uint8)


def _branches(pictures: Sequence[Encoded], ratios: np.ndarray) -> np.ndarray:
  kinds = [
    ratio if picture.kind == _JPEG else picture.kind
    for picture, ratio in zip(pictures, ratios.tolist(), strict=True)
  ]
  return np.array([_BRANCHES.index(kind) for kind in kinds], np.int32)


def _scaled(boxes: np.ndarray, sizes: np.ndarray, ratios: np.ndarray) -> np.ndarray:
  """The boxes in the pictures that libjpeg makes at 1 / ratio; as large as they are where that is 1."""
  ratio = ratios[:, None]
  corner = boxes[:, :2] // ratio
  shape = np.minimum(boxes[:, 2:] // ratio, -(-sizes // ratio) - corner)
  return np.concatenate([corner, np.maximum(shape, 1)], axis=1).astype(np.int32)


def _cut(picture: Encoded, box: Sequence[int]) -> bytes:
  return cut_window(picture, box).tobytes()


def _strings(contents: Sequence[bytes]) -> np.ndarray:
  array = np.empty(len(contents), object)  # not np.array: that would cut trailing zeros
  array[:] = contents
  return array
