"""Reads image files on the host, and resizes and crops images for evaluation."""

import concurrent.futures
import glob
import importlib.util
import os
import pathlib
import threading
import typing
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from alexnet_flax.data.views import EvalView
from alexnet_flax.errors import UsageError, needs_extra
from alexnet_flax.files import buckets, expanded, refuse_pipe
from alexnet_flax.models.spec import Spec

if typing.TYPE_CHECKING:
  from PIL import Image

MAX_PIXELS = 200_000_000  # as phones take them; larger images are more likely an attack or an accident
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm')
# EXIF's orientations, of which 1 is upright, by Pillow's names.
_TURNS = {2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_270'}
_TURNS |= {7: 'TRANSVERSE', 8: 'ROTATE_90'}
_opening = threading.Lock()


class UnreadableError(Exception):
  """A file is not an image, or is damaged."""


def walk_files(folder: str) -> Iterator[str]:
  """Yields the files below a folder, sorted; raises UsageError if a folder cannot be read.

  Links to folders are followed, hidden folders are left out.
  """

  def refuse(error: OSError) -> None:
    raise UsageError(f'cannot read the folder {printable(error.filename)}: {error.strerror}')

  around = {folder: {os.path.realpath(folder)}}  # of each folder, those on the way to it
  for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
    inside = {name: os.path.realpath(os.path.join(place, name)) for name in folders}
    # A link to a folder on the way would lead in a circle.
    folders[:] = sorted(name for name in folders if name[0] != '.' and inside[name] not in around[place])
    around |= {os.path.join(place, name): around[place] | {inside[name]} for name in folders}
    yield from (os.path.join(place, name) for name in sorted(files))


def is_image_file(path: str) -> bool:
  """Whether a file's name is that of an image, and not hidden: '._x.jpg' is what macOS knows about x.jpg."""
  return path.lower().endswith(IMAGE_SUFFIXES) and not os.path.basename(path).startswith('.')


def printable(name: str) -> str:
  """A path as text: bytes of it that are not UTF-8 become escapes."""
  return os.fsencode(name).decode('utf-8', 'backslashreplace')


def image_files(paths: Sequence[str]) -> list[str]:
  """Expands paths to image files, in the order given; raises UsageError if one leads to no image.

  A path is a file; a folder, whose images are sorted by name (`walk_files`); or a pattern ('photos/*.jpg'),
  for shells that do not expand them.
  """
  files: list[str] = []
  for path in paths:
    path = str(expanded(path)) if path.startswith('~') else path  # the shell leaves --option=~/a as it is
    if buckets.is_bucket(path):
      path = str(buckets.fetched(expanded(path)))
    if os.path.isdir(path):
      found = sorted(filter(is_image_file, walk_files(path)), key=lambda file: file.split(os.sep))
    elif not os.path.exists(path) and glob.has_magic(path):
      found = sorted(glob.glob(path, recursive=True))
    else:
      found = [path]
    if not found:
      raise UsageError(f'no images {"in the folder" if os.path.isdir(path) else "match"} {path}')
    files += found
  return files


def listed_files(path: str) -> list[str]:
  """Returns the files that a list names, one a line, in its order: paths in the list's folder, or from here.

  Spaces and brackets belong to the names; empty lines are left out.

  Raises:
    UsageError: The list cannot be read or is empty, or a line names no file.
  """
  place, files = expanded(path), []
  try:
    refuse_pipe(place)
    text = place.read_text('utf-8-sig', 'surrogateescape')
  except OSError as error:
    raise UsageError(f'cannot read the list {path}: {error.strerror}') from None
  for number, line in enumerate(text.split('\n'), start=1):
    if name := line.removesuffix('\r'):
      choices = (str(place.parent / name), name)
      found = next(filter(os.path.isfile, choices), None)
      if found is None:
        where = '' if os.path.isabs(name) else f', neither in {place.parent} nor here'
        raise UsageError(f'line {number} of {path}: there is no file {name[:200]!r}{where}')
      files.append(found)
  if not files:
    raise UsageError(f'the list {path} is empty; it must name images, one a line')
  return files


def orientation(image: 'Image.Image') -> int:
  """Returns how viewers turn an image, 1 ... 8 as in EXIF; 1, as it is stored, if it does not say.

  Pillow looks into EXIF, then XMP; of a PNG also into its text profiles. Broken metadata turn nothing.
  """
  try:
    value = image.getexif().get(0x0112, 1)
  except Exception:  # Pillow parses EXIF as a TIFF file and raises anything
    return 1
  return value if isinstance(value, int) and value in _TURNS else 1


def open_image(file: Any, formats: tuple[str, ...] | None = None) -> 'Image.Image':
  """Opens an image with Pillow, but without its own limit of pixels, which warns and cannot be passed."""
  from PIL import Image

  with _opening:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
      return Image.open(file, formats=formats)
    finally:
      Image.MAX_IMAGE_PIXELS = limit


def read_image(
  file: str | os.PathLike[str] | BinaryIO,
  formats: tuple[str, ...] | None = None,
  turn: bool = True,
  max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
  """Reads an image as uint8 RGB [H, W, 3].

  Grey, CMYK and transparent images are converted. Transparent pixels keep their stored colour. Of 16-bit
  values the upper eight bits are used.

  Args:
    file: A path or an open file.
    formats: The accepted formats, by Pillow's names; all if None.
    turn: Turn the image as its metadata say (`orientation`), as viewers do.
    max_pixels: The most pixels that it may have.

  Raises:
    UnreadableError: The file is missing, damaged, not an image, or has too many pixels.
  """
  from PIL import Image, UnidentifiedImageError

  try:
    if isinstance(file, str | os.PathLike):
      refuse_pipe(file)
    with open_image(file, formats) as opened:
      if opened.width * opened.height > max_pixels:
        raise UnreadableError(f'{opened.width}x{opened.height} are more than {max_pixels:,} pixels')
      opened.load()  # which turns TIFF files
      image, turned = opened, orientation(opened) if turn else 1
      if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in (None, 'PNG')):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # `convert` would clip at 255
      elif image.mode in ('I', 'F'):
        raise UnreadableError(f'pixels have mode {image.mode}, whose range is unknown')
      image = image.convert('RGB')
      return np.asarray(image if turned == 1 else image.transpose(Image.Transpose[_TURNS[turned]]))
  except UnidentifiedImageError:
    raise UnreadableError('not an image') from None
  except UnreadableError:
    raise
  except Exception as error:  # Pillow's parsers raise anything for damaged files
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise UnreadableError(reason or type(error).__name__) from None


def views_of_files(files: Sequence[str], spec: Spec, batch_size: int) -> Iterator[list[np.ndarray | str]]:
  """Yields batches of evaluation crops, uint8 [S, S, 3]; for an unreadable file, the reason instead."""

  def view(file: str) -> np.ndarray | str:
    try:
      return evaluation_view(read_image(file), spec)
    except UnreadableError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for start in range(0, len(files), batch_size):
      yield list(threads.map(view, files[start : start + batch_size]))


def evaluation_view(image: np.ndarray, spec: Spec) -> np.ndarray:
  """Returns the spec's evaluation crop of an image; see `evaluation_crops` for arguments and errors."""
  side = round(spec.image_size / spec.preprocessing.center_crop_share)
  return evaluation_crops(image, EvalView(spec.image_size, side))


def evaluation_crops(image: np.ndarray, view: EvalView) -> np.ndarray:
  """Resizes an image and crops it: the same pixels as torchvision's `Resize` and `CenterCrop` or `TenCrop`.

  The view's `resize` 'pil' is Pillow's; 'tf' is OpenCV's bilinear resizing, within a level of
  `tf.image.resize`. Takes uint8 RGB [H, W, 3] of any size, ValueError for others; returns uint8 [S, S, 3], or
  [10, S, S, 3]. Raises UnreadableError for an image so thin that it would have more than `MAX_PIXELS` then.
  """
  if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
    raise ValueError(f'an image (of shape {image.shape}, dtype {image.dtype}) must be uint8 RGB [H, W, 3]')
  resized = resize_short_side(image, view)
  size, corners = view.image_size, view.corners(np.array([image.shape[:2]]))
  squares = [resized[top : top + size, left : left + size] for top, left in corners[0].tolist()]
  if not view.ten_crop:
    return squares[0]
  return np.stack(squares[:5] + [squares[number][:, ::-1] for number in (0, 1, 2, 3, 5)])


def resize_short_side(image: np.ndarray, view: EvalView) -> np.ndarray:
  """Resizes an image, uint8 [H, W, 3], so that its short side is `view.resize_side`; errors as above."""
  ((height, width),) = view.resized(np.array([image.shape[:2]])).tolist()
  if height * width > MAX_PIXELS:
    raise UnreadableError(f'{image.shape[1]}x{image.shape[0]} is too thin: resized, it has {width}x{height}')
  if view.resize == 'tf':
    import cv2

    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
  with needs_extra('resizing images'):
    from PIL import Image
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def caption_font(size: float) -> Any:
  """Returns a Pillow font: matplotlib's DejaVu Sans if it is installed, else Pillow's own, of ASCII alone."""
  from PIL import ImageFont

  matplotlib = importlib.util.find_spec('matplotlib')  # not imported: only its file is needed
  if matplotlib is None or matplotlib.origin is None:
    return ImageFont.load_default(size)
  fonts = pathlib.Path(matplotlib.origin).parent / 'mpl-data' / 'fonts' / 'ttf'
  return ImageFont.truetype(fonts / 'DejaVuSans.ttf', size)
