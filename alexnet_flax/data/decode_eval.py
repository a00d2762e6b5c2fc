"""Decodes images into evaluation views, pixel for pixel as Pillow and torchvision do.

Training views use a faster path (`decode_train.py`).
"""

from collections.abc import Sequence

import numpy as np

from alexnet_flax.data.decode_train import decode_rows
from alexnet_flax.data.image_header import Encoded, decode_pixels
from alexnet_flax.data.images import evaluation_crops
from alexnet_flax.data.views import EvalView


def decode_eval(view: EvalView, images: Sequence[Encoded], numbers: np.ndarray) -> dict[str, np.ndarray]:
  """Returns {'image': uint8 [B, S, S, 3]} of B images, or [B, 10, S, S, 3] for a ten-crop view.

  Args:
    view: The view.
    images: B encoded images.
    numbers: Unused; the views of evaluation are not random.

  Raises:
    UnreadableError: An image is damaged, or too thin to be resized.
  """
  del numbers
  return {'image': np.stack([evaluation_crops(_decode(image), view) for image in images])}


def _decode(image: Encoded) -> np.ndarray:
  # simplejpeg's pixels are Pillow's, in two thirds of the time.
  rows = decode_rows(image, image.height, 1, fast=False) if image.kind == 'jpeg' else None
  return decode_pixels(image) if rows is None else rows
