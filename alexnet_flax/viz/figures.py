"""Images of what was learned: filters and activations as tiles, and images inside of a page."""

import base64
import io
import math
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from alexnet_flax.models.spec import Conv, Spec

_GAP = 1


def first_kernel(spec: Spec, params: Any) -> np.ndarray:
  """The first convolution's kernel, float [K, K, 3, F], in RGB whatever the network's order of colours is."""
  name = next(name for name, layer in spec.named_layers() if isinstance(layer, Conv))
  kernel = np.asarray(params[name]['kernel'])
  return kernel[:, :, ::-1] if spec.preprocessing.channel_order == 'BGR' else kernel


def filter_tiles(kernel: np.ndarray) -> np.ndarray:
  """A first layer's filters side by side, as in figure 3 of Krizhevsky et al. 2012.

  Each is stretched about grey to its own greatest weight, so that 0 is grey in all.

  Args:
    kernel: float [K, K, 3, F] in the order of colours RGB.

  Returns:
    uint8 [H, W, 3].
  """
  greatest = np.abs(kernel).max(axis=(0, 1, 2), keepdims=True)
  scaled = 0.5 + 0.5 * kernel / np.where(greatest > 0, greatest, 1)
  return tiles(np.round(255 * np.moveaxis(scaled, 3, 0)).astype(np.uint8))


def channel_tiles(activations: np.ndarray, most: int = 64) -> np.ndarray:
  """A layer's channels side by side, each stretched to its own range.

  Args:
    activations: float [H, W, C], or [C], which are shown as one square of C values.
    most: how many channels.

  Returns:
    uint8 [H, W, 3].
  """
  if activations.ndim == 1:
    side = math.ceil(math.sqrt(len(activations)))
    activations = np.pad(activations, (0, side**2 - len(activations))).reshape(side, side, 1)
  channels = np.moveaxis(activations[..., :most], 2, 0)
  least, greatest = (f(channels, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
  scaled = (channels - least) / np.where(greatest > least, greatest - least, 1)
  return tiles(np.repeat(np.round(255 * scaled).astype(np.uint8)[..., None], 3, axis=-1))


def tiles(images: np.ndarray) -> np.ndarray:
  """Images uint8 [N, H, W, 3] in rows of a rectangle that is wider than high; gaps are grey."""
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
  """An image uint8 [H, W, 3] as text for a page: PNG if it is small or must be exact, else JPEG."""
  kind = 'PNG' if exact or min(image.shape[:2]) < 96 else 'JPEG'
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, kind, **({'quality': 85} if kind == 'JPEG' else {'optimize': True}))
  return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def page_template(name: str) -> jinja2.Template:
  """One of the package's templates; a value that it is not given is an error."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('alexnet_flax.viz'), autoescape=True, undefined=jinja2.StrictUndefined
  )
  return environment.get_template(name)
