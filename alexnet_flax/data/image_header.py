"""Encoded images: reads size and format from the header, and converts unusual formats to PNG.

The fast decoders take plain JPEG and PNG. Everything else that Pillow reads (GIF, BMP, WebP, TIFF, CMYK, and
images that EXIF rotates) is converted to PNG first.
"""

import io
from typing import Literal, NamedTuple

import numpy as np

from alexnet_flax.data.images import MAX_PIXELS, read_image

Kind = Literal['jpeg', 'png', 'raw']


class Encoded(NamedTuple):
  """An encoded image, and what its header says."""

  content: bytes | memoryview  # the stored bytes; for 'raw', uint8 [height, width, 3]
  kind: Kind
  height: int
  width: int
  frame: int = 0  # where a JPEG's frame header begins: a marker, a length, a byte, the height and the width


def read_header(content: bytes | memoryview) -> Encoded | None:
  """Reads the header of a plain JPEG or PNG; returns None if the image needs `convert_to_png`."""
  if bytes(content[:8]) == b'\x89PNG\r\n\x1a\n' and len(content) > 24:
    width, height = (int.from_bytes(content[start : start + 4], 'big') for start in (16, 20))
    return None if _has_exif(content) else _within_limit(Encoded(content, 'png', height, width))
  if bytes(content[:3]) == b'\xff\xd8\xff':
    return _read_jpeg_header(content)
  return None


def decode_pixels(image: bytes | memoryview | Encoded) -> np.ndarray:
  """Decodes a stored image with Pillow into uint8 RGB [H, W, 3].

  Raises:
    UnreadableError: It is not an image, is damaged, or is larger than `MAX_PIXELS`.
  """
  if isinstance(image, Encoded) and image.kind == 'raw':
    return np.frombuffer(image.content, np.uint8).reshape(image.height, image.width, 3)
  return read_image(io.BytesIO(image.content if isinstance(image, Encoded) else image))


def convert_to_png(content: bytes | memoryview) -> Encoded:
  """Converts an image to an upright RGB PNG.

  Raises:
    UnreadableError: It is not an image, is damaged, or is larger than `MAX_PIXELS`.
  """
  from PIL import Image

  image = Image.fromarray(read_image(io.BytesIO(content)))
  buffer = io.BytesIO()
  image.save(buffer, 'PNG', compress_level=1)
  return Encoded(buffer.getvalue(), 'png', image.height, image.width)


def _has_exif(content: bytes | memoryview) -> bool:
  """Whether a PNG has EXIF before its pixels. A chunk is a length, a type, data and a checksum."""
  position = 8
  while position + 12 <= len(content):
    kind = bytes(content[position + 4 : position + 8])
    if kind in (b'IDAT', b'eXIf'):
      return kind == b'eXIf'
    position += 12 + int.from_bytes(content[position : position + 4], 'big')
  return False


_APP1 = 0xE1
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: all that libjpeg-turbo reads
_ORIENTATION = 0x0112


def _read_jpeg_header(content: bytes | memoryview) -> Encoded | None:
  """Walks the segments (marker, length, content) up to the frame header (ITU-T T.81, annex B)."""
  position = 2
  while position + 10 <= len(content):
    marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], 'big')
    if content[position] != 0xFF or length < 2:
      return None
    if marker == _APP1 and not _upright(content[position + 4 : position + 2 + length]):
      return None
    if marker in _FRAMES:
      height, width = (int.from_bytes(content[position + i : position + i + 2], 'big') for i in (5, 7))
      plain = content[position + 9] in (1, 3)  # components: grey or colour; CMYK has four
      return _within_limit(Encoded(content, 'jpeg', height, width, position)) if plain else None
    position += 2 + length
  return None


def _upright(segment: bytes | memoryview) -> bool:
  """Whether an APP1 segment leaves the image's orientation as it is."""
  if bytes(segment[:6]) != b'Exif\0\0':
    return True
  from PIL import Image

  exif = Image.Exif()
  try:
    exif.load(bytes(segment))
    return exif.get(_ORIENTATION, 1) in (0, 1)
  except Exception:  # Pillow parses it as a TIFF file and raises anything; decoders ignore broken EXIF
    return True


def _within_limit(encoded: Encoded) -> Encoded | None:
  return encoded if 0 < encoded.height * encoded.width <= MAX_PIXELS else None
