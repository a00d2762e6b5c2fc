"""Decodes images into views: fast for training, exact for evaluation.

Training views are visually equivalent to exact ones. Of a JPEG, no rows below the window are decoded, and
libjpeg downscales it as long as the window has at least the view's size. Views that are not rotated use the
fast inverse DCT, and repeat chroma values instead of interpolating them. Resizing is bilinear, antialiased
only below half the size. simplejpeg and OpenCV release Python's lock.

Evaluation views are those of Pillow and torchvision, pixel for pixel.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg

from alexnet_flax.data import import_tensorflow
from alexnet_flax.data.image_header import Encoded, decode_pixels
from alexnet_flax.data.images import UnreadableError, evaluation_crops
from alexnet_flax.data.views import EvalView, TrainView, rotated

_RATIOS = (2, 4, 8)  # libjpeg decodes at a half, quarter or eighth of the size at far lower cost
_END = b'\xff\xd9'
LONGEST = 65_500  # pixels, libjpeg's limit
_REST = 'extraneous bytes before marker'  # libjpeg's warning about data after the last row


def decode_train(
  view: TrainView, encoded: Sequence[Encoded], numbers: np.ndarray, *, out: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """Decodes B images into {'image': uint8 [B, S, S, 3]}; raises UnreadableError if one is damaged.

  `numbers` are the random numbers of the views, float32 [B, VIEW_NUMBERS] in [0, 1). The images are
  written to the first rows of `out`, if given.
  """
  size = view.image_size
  sizes = np.array([(image.height, image.width) for image in encoded], np.int64)
  windows = view.windows(sizes, numbers)
  ratios, is_jpeg = np.ones(len(encoded), np.int64), np.array([image.kind == 'jpeg' for image in encoded])
  for ratio in _RATIOS:
    ratios[is_jpeg & (windows.boxes[:, 2:].min(axis=1) >= ratio * size)] = ratio
  boxes, maps = rotated(windows, sizes, size, ratios) if view.rotation else (windows.boxes, None)
  by = ratios[:, None]
  borders: list[list[int]] | None = None  # pixels above, left of, below and right of the image
  if maps is None and view.crop == 'random_crop' and view.crop_padding:
    ends = boxes[:, :2] + boxes[:, 2:]
    outside = np.maximum(np.concatenate([-boxes[:, :2], ends - sizes], axis=1), 0)
    boxes = boxes + np.concatenate([outside[:, :2], -outside[:, :2] - outside[:, 2:]], axis=1)
    borders = (outside // by).tolist()
  corners = boxes[:, :2] // by  # in the downscaled images
  shapes = np.minimum(-(-boxes[:, 2:] // by), -(-sizes // by) - corners)
  scaled = np.concatenate([corners, np.maximum(shapes, 1)], axis=1)
  chosen = zip(encoded, scaled.tolist(), ratios.tolist(), strict=True)
  images = np.empty((len(encoded), size, size, 3), np.uint8) if out is None else out[: len(encoded)]
  for row, (image, box, ratio) in enumerate(chosen):
    crop = _crop(image, box, ratio, fast=maps is None)
    if borders is not None:
      above, left, below, right = borders[row]
      fill = view.rotation_fill
      crop = cv2.copyMakeBorder(crop, above, below, left, right, cv2.BORDER_CONSTANT, value=fill)
    if maps is None:
      _resize(crop, images[row], mirror=windows.mirrored[row])
    else:
      images[row] = _rotate(crop, maps[row], size, view.rotation_fill)
  return {'image': images}


def decode_eval(view: EvalView, encoded: Sequence[Encoded], numbers: np.ndarray) -> dict[str, np.ndarray]:
  """Decodes B images into {'image': uint8 [B, S, S, 3]}, [B, 10, S, S, 3] for a ten-crop view.

  `numbers` are unused: the views of evaluation are not random. Raises UnreadableError if an image is damaged,
  or too thin to be resized.
  """
  del numbers
  crops = []
  for image in encoded:
    # simplejpeg's pixels are Pillow's, in two thirds of the time.
    rows = _decode_rows(image, image.height, 1, fast=False) if image.kind == 'jpeg' else None
    crops.append(evaluation_crops(decode_pixels(image) if rows is None else rows, view))
  return {'image': np.stack(crops)}


def _crop(image: Encoded, box: list[int], ratio: int, *, fast: bool) -> np.ndarray:
  """Decodes the pixels in a box, uint8 [h, w, 3]; those of a JPEG at 1 / ratio."""
  top, left, height, width = box
  if image.kind == 'jpeg':
    chroma = 0 if fast else 16  # rows below the box that chroma interpolation needs
    rows = _decode_rows(image, (top + height) * ratio + chroma, ratio, fast=fast)
  else:
    rows = decode_pixels(image)
  if rows is not None:
    return rows[top : top + height, left : left + width]
  tf = import_tensorflow()  # a rare image; elsewhere the pixels are the same, but for the rows below the box
  dct_method = 'INTEGER_FAST' if fast else 'INTEGER_ACCURATE'
  options = {'channels': 3, 'ratio': ratio, 'dct_method': dct_method, 'fancy_upscaling': not fast}
  try:
    return tf.io.decode_and_crop_jpeg(bytes(image.content), box, **options).numpy()
  except tf.errors.InvalidArgumentError as error:
    raise UnreadableError(error.message) from None


def _decode_rows(image: Encoded, bottom: int, ratio: int, *, fast: bool) -> np.ndarray | None:
  """Decodes a JPEG's rows above `bottom`, at 1 / ratio; returns None if it may be damaged or unusual."""
  if bytes(image.content[-2:]) != _END or max(image.height, image.width) > LONGEST:
    return None  # the changed height would hide the damage
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


def _resize(crop: np.ndarray, image: np.ndarray, *, mirror: bool) -> None:
  if crop.shape != image.shape:
    method = cv2.INTER_AREA if min(crop.shape[:2]) > 2 * len(image) else cv2.INTER_LINEAR
    crop = cv2.resize(crop, image.shape[:2], interpolation=method)
  if mirror:
    cv2.flip(crop, 1, dst=image)
  else:
    image[...] = crop


def _rotate(crop: np.ndarray, mapping: np.ndarray, size: int, fill: tuple[float, float, float]) -> np.ndarray:
  """Applies a map of `views.rotated`, float32 [2, 3], to the crop; returns uint8 [S, S, 3]."""
  tf = import_tensorflow()

  def transformed(values: np.ndarray, interpolation: str, fill_mode: str) -> np.ndarray:
    return tf.raw_ops.ImageProjectiveTransformV3(
      images=values[None],
      transforms=np.array([[*mapping.ravel(), 0.0, 0.0]], np.float32),
      output_shape=(size, size),
      fill_value=0.0,
      interpolation=interpolation,
      fill_mode=fill_mode,
    )[0].numpy()

  # As in Pillow, a pixel is either the image's or the fill colour, not a mixture.
  rotated_crop = transformed(crop.astype(np.float32), 'BILINEAR', 'NEAREST')
  inside = transformed(np.ones((*crop.shape[:2], 1), np.uint8), 'NEAREST', 'CONSTANT')
  return (np.where(inside > 0, rotated_crop, np.array(fill, np.float32)) + 0.5).astype(np.uint8)
