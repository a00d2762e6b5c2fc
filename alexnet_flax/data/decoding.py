"""Encoded pictures to views uint8 [S, S, 3], in TensorFlow's C++: one pass over each picture.

What is to be seen of each picture was settled before, in NumPy (`views.py`); TensorFlow decodes, resizes
and mirrors.
"""

import functools
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
  crop = _decode(example, fast_to=None if view.rotation else size)
  if view.rotation:
    image = _turn(crop, example['map'], size, view.fill)
  else:
    resized = functools.partial(_resize, crop, size)
    if view.crop == 'random_crop':  # most often of S by S pixels
      image = tf.cond(tf.reduce_all(tf.shape(crop)[:2] == size), lambda: crop, resized)
    else:
      image = resized()
    image = tf.cond(example['mirrored'], lambda: tf.reverse(image, [1]), lambda: image)
  return {'image': tf.ensure_shape(image, (size, size, 3))}


def decode_eval(view: EvalView, example: Example) -> Example:
  """'image', one view in evaluation, uint8 [S, S, 3], or ten of them, [10, S, S, 3]."""
  size = (view.image_size, view.image_size)
  picture = tf.cast(_decode(example), tf.float32)[None]
  squares = [
    _translated(picture, size, example['scale'], corner, antialias=view.resize == 'pil')
    for corner in tf.unstack(example['corners'], num=6 if view.ten_crop else 1)
  ]
  images = _to_uint8(tf.stack(squares))
  image = images[0]
  if view.ten_crop:
    mirrored = tf.gather(images, [0, 1, 2, 3, 5])
    image = tf.concat([images[:5], tf.reverse(mirrored, [2])], 0)
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
  picture = tf.cast(_decode(example), tf.float32)[None]
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


def _decode(example: Example, *, fast_to: int | None = None) -> tf.Tensor:
  """The picture within the box; for a view of side `fast_to`, by the shortest way that looks the same.

  In JPEG that is a rounder inverse DCT, and colours, stored at half the size, are doubled instead of
  interpolated. Pictures of other kinds shrink to the view here if it is to less than a half.
  """
  content, box = example['content'], example['box']
  method = 'INTEGER_ACCURATE' if fast_to is None else 'INTEGER_FAST'

  def jpeg(ratio: int) -> tf.Tensor:
    return tf.io.decode_and_crop_jpeg(
      content, box, channels=3, ratio=ratio, dct_method=method, fancy_upscaling=fast_to is None
    )

  def png() -> tf.Tensor:
    picture = tf.io.decode_png(content, channels=3)
    return shrunk(tf.slice(picture, [box[0], box[1], 0], [box[2], box[3], 3]))

  def raw() -> tf.Tensor:
    return shrunk(tf.reshape(tf.io.decode_raw(content, tf.uint8), [box[2], box[3], 3]))

  def shrunk(crop: tf.Tensor) -> tf.Tensor:
    if fast_to is None:
      return crop
    small = lambda: _to_uint8(tf.image.resize(crop, (fast_to, fast_to), antialias=True))  # noqa: E731
    return tf.cond(tf.reduce_min(box[2:]) > 2 * fast_to, small, lambda: crop)

  branches = [functools.partial(jpeg, ratio) for ratio in _RATIOS]
  return tf.switch_case(example['branch'], [*branches, png, raw])


def _resize(crop: tf.Tensor, size: int) -> tf.Tensor:
  """Bilinear, not antialiased, for that takes four times as long."""
  resized = tf.raw_ops.ResizeBilinear(images=crop[None], size=(size, size), half_pixel_centers=True)
  return _to_uint8(resized[0])


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
  def transformed(pixels: tf.Tensor, interpolation: str, fill_mode: str) -> tf.Tensor:
    return tf.raw_ops.ImageProjectiveTransformV3(
      images=pixels[None],
      transforms=tf.concat([tf.reshape(mapping, [1, 6]), [[0.0, 0.0]]], 1),
      output_shape=(size, size),
      fill_value=0.0,
      interpolation=interpolation,
      fill_mode=fill_mode,
    )[0]

  # As Pillow does it: a pixel is of the picture or of the fill, and no mixture.
  turned = transformed(tf.cast(crop, tf.float32), 'BILINEAR', 'NEAREST')
  inside = transformed(tf.ones_like(crop[..., :1]), 'NEAREST', 'CONSTANT')
  return _to_uint8(tf.where(inside > 0, turned, tf.constant(fill, tf.float32)))


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
  shape = np.minimum(-(-boxes[:, 2:] // ratio), -(-sizes // ratio) - corner)
  return np.concatenate([corner, np.maximum(shape, 1)], axis=1).astype(np.int32)


def _cut(picture: Encoded, box: Sequence[int]) -> bytes:
  return cut_window(picture, box).tobytes()


def _strings(contents: Sequence[bytes]) -> np.ndarray:
  array = np.empty(len(contents), object)  # not np.array: that would cut trailing zeros
  array[:] = contents
  return array
