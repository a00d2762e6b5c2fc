"""Images from files on the host, without TensorFlow: decoding, and the view of evaluation."""

import concurrent.futures
import glob
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from alexnet_flax.data.views import EvalView
from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Spec

MAX_PIXELS = 100_000_000  # beyond, an image is more likely an attack or an accident


_ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm')


class UnreadableError(Exception):
  """A file that is not an image, or a broken one."""


def image_files(paths: Sequence[str]) -> list[str]:
  """The files that paths mean, in the order given.

  Args:
    paths: files; folders, whose images are taken in the order of their names; and patterns
      ('photos/*.jpg'), for those whose shell does not fill them in.

  Raises:
    UsageError: a folder has no images, or a pattern fits none.
  """
  files: list[str] = []
  for path in paths:
    if os.path.isdir(path):
      inside = sorted(p for p in pathlib.Path(path).rglob('*') if p.suffix.lower() in _ENDINGS)
      found = list(map(str, inside))
    elif not os.path.exists(path) and glob.has_magic(path):
      found = sorted(glob.glob(path, recursive=True))
    else:
      found = [path]
    if not found:
      raise UsageError(f'no images {"in the folder" if os.path.isdir(path) else "fit"} {path}')
    files += found
  return files


def read_image(file: str | os.PathLike[str] | BinaryIO, formats: tuple[str, ...] | None = None) -> np.ndarray:
  """An image as uint8 RGB [H, W, 3], upright; grey, CMYK and transparent ones are converted.

  An orientation stored in EXIF is applied, as every viewer does; what is transparent shows the colour
  below; of sixteen bits the upper eight are taken.

  Args:
    file: its path, or an open file.
    formats: by Pillow's names, to accept no others.

  Raises:
    UnreadableError: the file is absent, broken, no image, or has more than `MAX_PIXELS`.
  """
  try:
    with Image.open(file, formats=formats) as opened:
      if opened.width * opened.height > MAX_PIXELS:
        raise UnreadableError(f'{opened.width}x{opened.height} are more than {MAX_PIXELS:,} pixels')
      return np.asarray(_eight_bits(ImageOps.exif_transpose(opened)).convert('RGB'))
  except UnidentifiedImageError:
    raise UnreadableError('no image') from None
  except UnreadableError:
    raise
  except Exception as error:  # Pillow's parsers raise what they like of broken files
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise UnreadableError(reason or type(error).__name__) from None


def _eight_bits(image: Image.Image) -> Image.Image:
  """The same in at most eight bits a channel: Pillow's `convert` would clip sixteen at 255."""
  if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in (None, 'PNG')):
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.mode in ('I', 'F'):
    raise UnreadableError(f'pixels of kind {image.mode}, whose range is not known')
  return image


def views_of_files(files: Sequence[str], spec: Spec, batch_size: int) -> Iterator[list[np.ndarray | str]]:
  """The spec's view of each file in evaluation, uint8 [S, S, 3], or why it cannot be read; by batches."""

  def view(file: str) -> np.ndarray | str:
    try:
      return evaluation_view(read_image(file), spec)
    except UnreadableError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for start in range(0, len(files), batch_size):
      yield list(threads.map(view, files[start : start + batch_size]))


def evaluation_view(image: np.ndarray, spec: Spec) -> np.ndarray:
  """The spec's view of an image in evaluation: short side resized, centre cut out.

  The same pixels as torchvision's `Resize` and `CenterCrop` make of a PIL image.

  Args:
    image: uint8 [H, W, 3] of any size.
    spec: gives the side S, and by `center_crop_share` the side that is resized to.

  Returns:
    uint8 [S, S, 3].

  Raises:
    ValueError: the image has another shape or type.
    UnreadableError: it is so thin that it would have more than `MAX_PIXELS` when resized.
  """
  side = round(spec.image_size / spec.preprocessing.center_crop_share)
  return pillow_view(image, EvalView(spec.image_size, side))


def pillow_view(image: np.ndarray, view: EvalView) -> np.ndarray:
  """A view in evaluation by Pillow itself, as torchvision's `Resize` and `CenterCrop` or `TenCrop` use it.

  Args:
    image: uint8 [H, W, 3] of any size.
    view: whose `resize` is 'pil'.

  Returns:
    uint8 [S, S, 3], or [10, S, S, 3].

  Raises:
    ValueError: the image has another shape or type.
    UnreadableError: it is so thin that it would have more than `MAX_PIXELS` when resized.
  """
  if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
    raise ValueError(f'an image (of shape {image.shape}, dtype {image.dtype}) must be uint8 RGB [H, W, 3]')
  sizes = np.array([image.shape[:2]])
  ((height, width),) = view.resized(sizes).tolist()
  if height * width > MAX_PIXELS:
    raise UnreadableError(f'{image.shape[1]}x{image.shape[0]} is too thin: resized, it has {width}x{height}')
  resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
  size = view.image_size
  squares = [resized[top : top + size, left : left + size] for top, left in view.corners(sizes)[0].tolist()]
  if not view.ten_crop:
    return squares[0]
  return np.stack(squares[:5] + [squares[number][:, ::-1] for number in (0, 1, 2, 3, 5)])
