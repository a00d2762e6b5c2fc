"""Pictures from files on the host, without TensorFlow: decoding, and the view of evaluation."""

import os
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from alexnet_flax.specs import Spec


class UnreadableError(Exception):
  """A file that is not a picture, or a broken one."""


def read_picture(path: str | os.PathLike[str]) -> np.ndarray:
  """A picture file as uint8 RGB [H, W, 3]; grey, CMYK and transparent pictures are converted.

  As TensorFlow and torchvision do, an orientation stored in EXIF is not applied.

  Raises:
    UnreadableError: the file is absent, broken, huge (Pillow's limit) or no picture.
  """
  try:
    with Image.open(pathlib.Path(path)) as image:
      return np.asarray(image.convert('RGB'))
  except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise UnreadableError(reason) from None


def evaluation_view(picture: np.ndarray, spec: Spec) -> np.ndarray:
  """The spec's view of a picture in evaluation: short side resized, centre cut out.

  The same pixels as torchvision's `Resize` and `CenterCrop` make of a PIL image.

  Args:
    picture: uint8 [H, W, 3] of any size.
    spec: gives the side S, and by `center_crop_share` the side that is resized to.

  Returns:
    uint8 [S, S, 3].

  Raises:
    ValueError: the picture has another shape or type.
  """
  if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8 or not picture.size:
    raise ValueError(
      f'a picture (of shape {picture.shape}, dtype {picture.dtype}) must be uint8 RGB [H, W, 3]'
    )
  size = spec.image_size
  side = round(size / spec.preprocessing.center_crop_share)
  height, width = picture.shape[:2]
  short = min(height, width)
  resized = Image.fromarray(picture).resize(
    (side * width // short, side * height // short), Image.Resampling.BILINEAR
  )
  left, top = (round((length - size) / 2) for length in resized.size)
  return np.asarray(resized.crop((left, top, left + size, top + size)))
