"""Encoded images: what their first bytes say, and the odd ones made plain.

JPEG and PNG go to the fast decoders as they are. Everything else that Pillow can read (GIF, BMP, WebP,
TIFF, CMYK, images that EXIF says lie on their side) becomes a PNG first.
"""

import io
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from alexnet_flax.data.images import MAX_PIXELS, read_image

Kind = Literal['jpeg', 'png', 'raw']


class Encoded(NamedTuple):
  """An image's bytes, and what its header says of them.

  Attributes:
    content: as it is stored; 'raw' is uint8 [height, width, 3].
    kind: 'jpeg', 'png' or 'raw'.
    height, width: in pixels.
    frame: where a JPEG's frame header begins: a marker, then its length, a byte, the height, the width.
  """

  content: bytes | memoryview
  kind: Kind
  height: int
  width: int
  frame: int = 0


def read_header(content: bytes | memoryview) -> Encoded | None:
  """The image with its size, if it is a plain JPEG or PNG; None if it needs `made_plain`."""
  if bytes(content[:8]) == b'\x89PNG\r\n\x1a\n' and len(content) > 24:
    width, height = (int.from_bytes(content[start : start + 4], 'big') for start in (16, 20))
    return None if _has_exif(content) else _within_limit(Encoded(content, 'png', height, width))
  if bytes(content[:3]) == b'\xff\xd8\xff':
    return _read_jpeg_header(content)
  return None


def pixels(image: bytes | memoryview | Encoded) -> np.ndarray:
  """A stored image as uint8 RGB [H, W, 3], decoded by Pillow.

  Raises:
    UnreadableError: it is none, broken, or larger than `MAX_PIXELS`.
  """
  if not isinstance(image, Encoded):
    return read_image(io.BytesIO(image))
  if image.kind == 'raw':
    return np.frombuffer(image.content, np.uint8).reshape(image.height, image.width, 3)
  return read_image(io.BytesIO(image.content))


def made_plain(content: bytes | memoryview) -> Encoded:
  """The image, upright and in RGB, as a PNG.

  Raises:
    UnreadableError: it is none, broken, or larger than `MAX_PIXELS`.
  """
  image = Image.fromarray(read_image(io.BytesIO(content)))
  buffer = io.BytesIO()
  image.save(buffer, 'PNG', compress_level=1)
  return Encoded(buffer.getvalue(), 'png', image.height, image.width)


def _has_exif(content: bytes | memoryview) -> bool:
  """Whether a PNG says, before its pixels, how it is to be turned: chunks of length, type, data, checksum."""
  position = 8
  while position + 12 <= len(content):
    kind = bytes(content[position + 4 : position + 8])
    if kind in (b'IDAT', b'eXIf'):
      return kind == b'eXIf'
    position += 12 + int.from_bytes(content[position : position + 4], 'big')
  return False


def _read_jpeg_header(content: bytes | memoryview) -> Encoded | None:
  """Walks the segments (marker, length, content) to the frame's header (ITU-T T.81, annex B)."""
  position = 2
  while position + 10 <= len(content):
    marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], 'big')
    if content[position] != 0xFF or length < 2:
      return None
    if marker == _APP1 and not _upright(content[position + 4 : position + 2 + length]):
      return None
    if marker in _FRAMES:
      height, width = (int.from_bytes(content[position + i : position + i + 2], 'big') for i in (5, 7))
      plain = content[position + 9] in (1, 3)  # components: grey or colours; four are CMYK
      return _within_limit(Encoded(content, 'jpeg', height, width, position)) if plain else None
    position += 2 + length
  return None


_APP1 = 0xE1
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; all that libjpeg-turbo reads
_ORIENTATION = 0x0112


def _upright(segment: bytes | memoryview) -> bool:
  """Whether an APP1 segment does not ask for the image to be turned."""
  if bytes(segment[:6]) != b'Exif\0\0':
    return True
  exif = Image.Exif()
  try:
    exif.load(bytes(segment))
    return exif.get(_ORIENTATION, 1) in (0, 1)
  except Exception:  # Pillow parses it as a TIFF file, and raises what it likes; decoders ignore it then
    return True


def _within_limit(encoded: Encoded) -> Encoded | None:
  return encoded if 0 < encoded.height * encoded.width <= MAX_PIXELS else None
