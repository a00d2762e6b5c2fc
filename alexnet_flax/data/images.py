"""Pictures from files on the host, without TensorFlow: decoding, and the view of evaluation."""

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

MAX_PIXELS = 100_000_000  # beyond, a picture is more likely an attack or an accident


_ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm')


class UnreadableError(Exception):
  """A file that is not a picture, or a broken one."""


def picture_files(paths: Sequence[str]) -> list[str]:
  """The files that paths mean, in the order given.

  Args:
    paths: files; folders, whose pictures are taken in the order of their names; and patterns
      ('photos/*.jpg'), for those whose shell does not fill them in.

  Raises:
    UsageError: a folder has no pictures, or a pattern fits none.
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
      raise UsageError(f'no pictures {"in the folder" if os.path.isdir(path) else "fit"} {path}')
    files += found
  return files


def read_picture(
  file: str | os.PathLike[str] | BinaryIO, formats: tuple[str, ...] | None = None
) -> np.ndarray:
  """A picture as uint8 RGB [H, W, 3], upright; grey, CMYK and transparent ones are converted.

  An orientation stored in EXIF is applied, as every viewer does; what is transparent shows the colour
  below; of sixteen bits the upper eight are taken.

  Args:
    file: its path, or an open file.
    formats: by Pillow's names, to accept no others.

  Raises:
    UnreadableError: the file is absent, broken, no picture, or has more than `MAX_PIXELS`.
  """
  try:
    with Image.open(file, formats=formats) as opened:
      if opened.width * opened.height > MAX_PIXELS:
        raise UnreadableError(f'{opened.width}x{opened.height} are more than {MAX_PIXELS:,} pixels')
      return np.asarray(_eight_bits(ImageOps.exif_transpose(opened)).convert('RGB'))
  except UnidentifiedImageError:
    raise UnreadableError('no picture') from None
  except UnreadableError:
    raise
  except Exception as error:  # Pillow's parsers raise what they like of broken files
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise UnreadableError(reason or type(error).__name__) from None


def _eight_bits(picture: Image.Image) -> Image.Image:
  """The same in at most eight bits a channel: Pillow's `convert` would clip sixteen at 255."""
  if picture.mode.startswith('I;16') or (picture.mode == 'I' and picture.format in (None, 'PNG')):
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
  if picture.mode in ('I', 'F'):
    raise UnreadableError(f'pixels of kind {picture.mode}, whose range is not known')
  return picture


def views_of_files(files: Sequence[str], spec: Spec, batch_size: int) -> Iterator[list[np.ndarray | str]]:
  """The spec's view of each file in evaluation, uint8 [S, S, 3], or why it cannot be read; by batches."""

  def view(file: str) -> np.ndarray | str:
    try:
      return evaluation_view(read_picture(file), spec)
    except UnreadableError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for start in range(0, len(files), batch_size):
      yield list(threads.map(view, files[start : start + batch_size]))


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
    UnreadableError: it is so thin that it would have more than `MAX_PIXELS` when resized.
  """
  side = round(spec.image_size / spec.preprocessing.center_crop_share)
  return pillow_view(picture, EvalView(spec.image_size, side))


def pillow_view(picture: np.ndarray, view: EvalView) -> np.ndarray:
  """A view in evaluation by Pillow itself, as torchvision's `Resize` and `CenterCrop` or `TenCrop` use it.

  Args:
    picture: uint8 [H, W, 3] of any size.
    view: whose `resize` is 'pil'.

  Returns:
    uint8 [S, S, 3], or [10, S, S, 3].

  Raises:
    ValueError: the picture has another shape or type.
    UnreadableError: it is so thin that it would have more than `MAX_PIXELS` when resized.
  """
  if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8 or not picture.size:
    raise ValueError(
      f'a picture (of shape {picture.shape}, dtype {picture.dtype}) must be uint8 RGB [H, W, 3]'
    )
  sizes = np.array([picture.shape[:2]])
  ((height, width),) = view.resized(sizes).tolist()
  if height * width > MAX_PIXELS:
    raise UnreadableError(
      f'{picture.shape[1]}x{picture.shape[0]} is too thin: resized, it has {width}x{height}'
    )
  resized = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
  size = view.image_size
  squares = [resized[top : top + size, left : left + size] for top, left in view.corners(sizes)[0].tolist()]
  if not view.ten_crop:
    return squares[0]
  return np.stack(squares[:5] + [squares[number][:, ::-1] for number in (0, 1, 2, 3, 5)])
