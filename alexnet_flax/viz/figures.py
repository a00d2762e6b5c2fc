"""Figures of filters and activations, and images embedded in a page."""

import base64
import io
import math
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from alexnet_flax.errors import one_line
from alexnet_flax.models.spec import Conv, Spec

_GAP = 1


def first_kernel(spec: Spec, params: Any) -> np.ndarray:
  """Returns the first convolution's kernel, float [K, K, 3, F], in RGB order even if the network uses BGR.

  If that is a local one, the kernel in the middle.
  """
  name, layer = next((name, layer) for name, layer in spec.named_layers() if isinstance(layer, Conv))
  kernel = np.asarray(params[name]['kernel'])
  if layer.local:
    kernel = kernel[kernel.shape[0] // 2, kernel.shape[1] // 2]
  return kernel[:, :, ::-1] if spec.preprocessing.channel_order == 'BGR' else kernel


def filter_tiles(kernel: np.ndarray) -> np.ndarray:
  """Draws the filters of a kernel, float [K, K, 3, F] in RGB order, side by side: uint8 [H, W, 3].

  Each filter is scaled by its largest absolute weight; grey is 0 (Krizhevsky et al. 2012, figure 3).
  """
  largest = np.abs(kernel).max(axis=(0, 1, 2), keepdims=True)
  scaled = 0.5 + 0.5 * kernel / np.where(largest > 0, largest, 1)
  return tiles(np.round(255 * np.moveaxis(scaled, 3, 0)).astype(np.uint8))


def channel_tiles(activations: np.ndarray, most: int = 64) -> np.ndarray:
  """Draws up to `most` channels of a layer, float [H, W, C], side by side: uint8 [H, W, 3].

  Each channel is scaled to its own range. Activations [C] are drawn as one square of C values.
  """
  if activations.ndim == 1:
    side = math.ceil(math.sqrt(len(activations)))
    activations = np.pad(activations, (0, side**2 - len(activations))).reshape(side, side, 1)
  channels = np.moveaxis(activations[..., :most], 2, 0)
  low, high = (f(channels, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
  scaled = (channels - low) / np.where(high > low, high - low, 1)
  return tiles(np.repeat(np.round(255 * scaled).astype(np.uint8)[..., None], 3, axis=-1))


def tiles(images: np.ndarray) -> np.ndarray:
  """Arranges images, uint8 [N, H, W, 3], in rows, wider than high, with grey gaps."""
  count, height, width, _ = images.shape
  columns = min(math.ceil(math.sqrt(1.5 * count)), count)
  rows = math.ceil(count / columns)
  sheet = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), 128, np.uint8)
  for number, image in enumerate(images):
    row, column = divmod(number, columns)
    top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
    sheet[top : top + height, left : left + width] = image
  return sheet


def data_uri(image: np.ndarray, *, exact: bool = False) -> str:
  """Encodes an image, uint8 [H, W, 3], as a data URI: PNG if it is small or must be exact, otherwise JPEG."""
  kind = 'PNG' if exact or min(image.shape[:2]) < 96 else 'JPEG'
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, kind, **({'quality': 85} if kind == 'JPEG' else {'optimize': True}))
  return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def page_template(name: str) -> jinja2.Template:
  """Loads one of the package's templates; an undefined value is an error, and text is one line."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('alexnet_flax.viz'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: one_line(value) if type(value) is str else value,  # not markup, such as charts
  )
  return environment.get_template(name)
