"""Encoded images to the views of training, uint8 [S, S, 3], by the shortest way that looks the same.

Of a JPEG no row below the window is decoded, and libjpeg shrinks it where that still leaves a pixel a
pixel. Where nothing is turned, its inverse DCT is the rounder one, and colours, stored at half the size,
are doubled, not interpolated. What is resized is resized bilinearly, antialiased only where it shrinks to
less than half. simplejpeg and OpenCV do it without Python's lock; evaluation takes the exact way
(`decoding.py`).
"""

from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg
import tensorflow as tf

from alexnet_flax.data.image_header import Encoded, pixels
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.views import TrainView, rotated

# libjpeg decodes at a half, quarter or eighth for far less.
_RATIOS = (1, 2, 4, 8)
_END = b'\xff\xd9'
_LONGEST = 65_500  # pixels, that libjpeg decodes
_REST = 'extraneous bytes before marker'  # libjpeg's word for what follows the last row


def decode_train(view: TrainView, encoded: Sequence[Encoded], numbers: np.ndarray) -> dict[str, np.ndarray]:
  """{'image': uint8 [B, S, S, 3]}, a view of each image.

  Args:
    view: of the images.
    encoded: B of them.
    numbers: float32 [B, VIEW_NUMBERS] in [0, 1).

  Raises:
    UnreadableError: one of them is broken.
  """
  size = view.image_size
  sizes = np.array([(image.height, image.width) for image in encoded], np.int64)
  windows = view.windows(sizes, numbers)
  ratios = _ratios(encoded, windows.boxes, size)
  boxes, maps = rotated(windows, sizes, size, ratios) if view.rotation else (windows.boxes, None)
  chosen = zip(encoded, _scaled(boxes, sizes, ratios).tolist(), ratios.tolist(), strict=True)
  images = np.empty((len(encoded), size, size, 3), np.uint8)
  for row, (image, box, ratio) in enumerate(chosen):
    crop = _crop(image, box, ratio, fast=maps is None)
    if maps is None:
      _resize(crop, images[row], mirror=windows.mirrored[row])
    else:
      images[row] = _turn(crop, maps[row], size, view.rotation_fill)
  return {'image': images}


def _ratios(images: Sequence[Encoded], boxes: np.ndarray, size: int) -> np.ndarray:
  """By how much each image is shrunk as it is decoded."""
  ratios = np.ones(len(images), np.int64)
  is_jpeg = np.array([image.kind == 'jpeg' for image in images])
  for ratio in _RATIOS[1:]:
    ratios[is_jpeg & (boxes[:, 2:].min(axis=1) >= ratio * size)] = ratio
  return ratios


def _scaled(boxes: np.ndarray, sizes: np.ndarray, ratios: np.ndarray) -> np.ndarray:
  """The boxes in the images that libjpeg makes at 1 / ratio; as large as they are where that is 1."""
  ratio = ratios[:, None]
  corner = boxes[:, :2] // ratio
  shape = np.minimum(-(-boxes[:, 2:] // ratio), -(-sizes // ratio) - corner)
  return np.concatenate([corner, np.maximum(shape, 1)], axis=1)


def _crop(image: Encoded, box: list[int], ratio: int, *, fast: bool) -> np.ndarray:
  """What lies in the box, uint8 [h, w, 3]; of a JPEG at 1 / ratio."""
  top, left, height, width = box
  if image.kind == 'jpeg':
    return _crop_jpeg(image, box, ratio, fast=fast)
  if image.kind == 'png':
    whole = _by_tensorflow(tf.io.decode_png, bytes(image.content), channels=3)
  else:
    whole = pixels(image)
  return whole[top : top + height, left : left + width]


def _crop_jpeg(image: Encoded, box: list[int], ratio: int, *, fast: bool) -> np.ndarray:
  """As `tf.io.decode_and_crop_jpeg`, bit for bit, which goes through all that is below the box as well."""
  top, left, height, width = box
  colours = 0 if fast else 16  # rows below, from which colours are interpolated
  upper = _upper_rows(image, (top + height) * ratio + colours, ratio, fast=fast)
  if upper is not None:
    return upper[top : top + height, left : left + width]
  return _by_tensorflow(
    tf.io.decode_and_crop_jpeg,
    bytes(image.content),
    box,
    channels=3,
    ratio=ratio,
    dct_method='INTEGER_FAST' if fast else 'INTEGER_ACCURATE',
    fancy_upscaling=not fast,
  )


def _upper_rows(image: Encoded, bottom: int, ratio: int, *, fast: bool) -> np.ndarray | None:
  """A JPEG down to the row `bottom`, at 1 / ratio; None if it may be broken or of an unusual kind."""
  if bytes(image.content[-2:]) != _END or max(image.height, image.width) > _LONGEST:
    return None  # with another height, what is wrong with it would not be noticed
  bottom = min(bottom, image.height)
  content = bytearray(image.content)
  content[image.frame + 5 : image.frame + 7] = bottom.to_bytes(2, 'big')
  shape = -(-bottom // ratio), -(-image.width // ratio)
  rows = np.empty((*shape, 3), np.uint8)
  try:
    simplejpeg.decode_jpeg(
      content, fastdct=fast, fastupsample=fast, min_height=shape[0], min_width=shape[1], buffer=rows
    )
  except ValueError as error:
    return rows if _REST in str(error) else None
  return rows


def _by_tensorflow(function, *arguments, **options) -> np.ndarray:
  try:
    return function(*arguments, **options).numpy()
  except tf.errors.InvalidArgumentError as error:
    raise UnreadableError(error.message) from None


def _resize(crop: np.ndarray, image: np.ndarray, *, mirror: bool) -> None:
  """Puts the crop into the image, uint8 [S, S, 3]."""
  size = len(image)
  if crop.shape != image.shape:
    much = min(crop.shape[:2]) > 2 * size
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if much else cv2.INTER_LINEAR)
  if mirror:
    cv2.flip(crop, 1, dst=image)
  else:
    image[...] = crop


def _turn(crop: np.ndarray, mapping: np.ndarray, size: int, fill: tuple[float, float, float]) -> np.ndarray:
  """What the map, float32 [2, 3], takes from the crop, as `views.rotated` says: uint8 [S, S, 3]."""

  def transformed(values: np.ndarray, interpolation: str, fill_mode: str) -> np.ndarray:
    return tf.raw_ops.ImageProjectiveTransformV3(
      images=values[None],
      transforms=np.array([[*mapping.ravel(), 0.0, 0.0]], np.float32),
      output_shape=(size, size),
      fill_value=0.0,
      interpolation=interpolation,
      fill_mode=fill_mode,
    )[0].numpy()

  # As Pillow does it: a pixel is of the image or of the fill, and no mixture.
  turned_crop = transformed(crop.astype(np.float32), 'BILINEAR', 'NEAREST')
  inside = transformed(np.ones((*crop.shape[:2], 1), np.uint8), 'NEAREST', 'CONSTANT')
  return (np.where(inside > 0, turned_crop, np.array(fill, np.float32)) + 0.5).astype(np.uint8)
