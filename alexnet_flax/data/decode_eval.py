"""Decodes images into evaluation views, pixel for pixel as Pillow and torchvision do.

Training views use a faster path (`decode_train.py`).
"""

from collections.abc import Sequence

import numpy as np

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
  return {'image': np.stack([evaluation_crops(decode_pixels(image), view) for image in images])}
