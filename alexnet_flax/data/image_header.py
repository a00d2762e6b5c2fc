"""Encoded images: reads size and format from the header, and converts unusual formats to PNG.

The fast decoders take plain JPEG and PNG. Everything else that Pillow reads (GIF, BMP, WebP, TIFF, CMYK, and
images whose metadata turn them) is converted to PNG first.
"""

import io
from typing import Literal, NamedTuple

import numpy as np

from alexnet_flax.data.images import MAX_PIXELS, UnreadableError, open_image, orientation, read_image

Kind = Literal['jpeg', 'png', 'raw']


class Encoded(NamedTuple):
  """An encoded image, and what its header says."""

  content: bytes | memoryview  # the stored bytes; for 'raw', uint8 [height, width, 3]
  kind: Kind
  height: int
  width: int
  frame: int = 0  # where a JPEG's frame header begins: a marker, a length, a byte, the height and the width


Stored = bytes | memoryview | Encoded | UnreadableError  # an image as it is stored, or why it cannot be read


def read_header(
  content: bytes | memoryview, turn: bool = True, max_pixels: int = MAX_PIXELS
) -> Encoded | None:
  """Reads the header of a plain JPEG or PNG; returns None if the image needs `convert_to_png`.

  It needs that if it must be turned, unless `turn` is False, and if it has more than `max_pixels`.
  """
  read = {b'\xff\xd8\xff': _read_jpeg, b'\x89PN': _read_png}.get(bytes(content[:3]))
  if read is None or (found := read(content)) is None:
    return None
  encoded, has_metadata = found
  is_right = 0 < encoded.height * encoded.width <= max_pixels
  return encoded if is_right and not (turn and has_metadata and not _is_upright(content)) else None


def decode_pixels(image: Stored, turn: bool = True, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Decodes a stored image with Pillow into uint8 RGB [H, W, 3]; `turn` is of those whose header is unread.

  Raises UnreadableError if it is not an image, is damaged, or is larger than `max_pixels`.
  """
  if isinstance(image, UnreadableError):
    raise image
  if not isinstance(image, Encoded):
    return read_image(io.BytesIO(image), turn=turn, max_pixels=max_pixels)
  if image.kind != 'raw':
    return read_image(io.BytesIO(image.content), turn=False, max_pixels=image.height * image.width)
  try:
    return np.frombuffer(image.content, np.uint8).reshape(image.height, image.width, 3)
  except ValueError:
    raise UnreadableError(f'{len(image.content)} bytes are not {image.height}x{image.width} pixels') from None


def convert_to_png(content: bytes | memoryview, turn: bool = True, max_pixels: int = MAX_PIXELS) -> Encoded:
  """Converts an image to an RGB PNG; see `read_image` for arguments and errors."""
  from PIL import Image

  image = Image.fromarray(read_image(io.BytesIO(content), turn=turn, max_pixels=max_pixels))
  buffer = io.BytesIO()
  image.save(buffer, 'PNG', compress_level=1)
  return Encoded(buffer.getvalue(), 'png', image.height, image.width)


_TEXTS = (b'tEXt', b'zTXt', b'iTXt')
_PROFILES = (b'exif\0', b'xmp\0', b'Raw profile type exif\0', b'XML:com.adobe.xmp\0')  # as Pillow reads them
_APP1, _SCAN = 0xE1, 0xDA
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: all that libjpeg-turbo reads


def _read_png(content: bytes | memoryview) -> tuple[Encoded, bool] | None:
  """Walks the chunks (length, type, content, checksum); also returns whether metadata may turn the image."""
  width, height = (int.from_bytes(content[start : start + 4], 'big') for start in (16, 20))
  position, has_metadata = 8, False
  while position + 12 <= len(content) and not has_metadata:
    kind, start = bytes(content[position + 4 : position + 8]), bytes(content[position + 8 : position + 40])
    has_metadata = kind == b'eXIf' or (kind in _TEXTS and start.startswith(_PROFILES))
    position += 12 + int.from_bytes(content[position : position + 4], 'big')
  return Encoded(content, 'png', height, width), has_metadata


def _read_jpeg(content: bytes | memoryview) -> tuple[Encoded, bool] | None:
  """Walks the segments (marker, length, content) up to the pixels (ITU-T T.81, annex B), as `_read_png`."""
  position, encoded, has_metadata = 2, None, False
  while position + 10 <= len(content):
    marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], 'big')
    if marker == _SCAN and encoded:
      return encoded, has_metadata
    if content[position] != 0xFF or length < 2:
      return None
    if marker in _FRAMES:
      height, width = (int.from_bytes(content[position + i : position + i + 2], 'big') for i in (5, 7))
      if content[position + 9] not in (1, 3):  # components: grey or colour; CMYK has four
        return None
      encoded = Encoded(content, 'jpeg', height, width, position)
    has_metadata |= marker == _APP1
    position += 2 + length
  return None


def _is_upright(content: bytes | memoryview) -> bool:
  try:
    with open_image(io.BytesIO(content)) as opened:
      return orientation(opened) == 1
  except Exception:  # Pillow's parsers raise anything for damaged files
    return False
