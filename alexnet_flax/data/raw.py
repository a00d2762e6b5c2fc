"""Raw images of one size, gathered by one call a batch; the device crops, mirrors and resizes them.

An example is read, checked and parsed when it is first needed. From then on, the place of its pixels in a
mapped file is known, and no Python runs for it.
"""

import ctypes
import dataclasses
import mmap
from collections.abc import Sequence

import numpy as np

from alexnet_flax.data.image_header import Encoded, decode_pixels
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.source import Source
from alexnet_flax.data.views import TrainView
from alexnet_flax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class RawImages:
  """The raw images of a source, and where those lie that have been read."""

  view: TrainView
  name: str  # of the source, for messages
  height: int
  width: int
  addresses: np.ndarray  # int64 [N], of an example's first pixel in this process; 0 where it is not known
  labels: np.ndarray  # int32 [N]

  @classmethod
  def of(cls, source: Source, view: TrainView) -> 'RawImages':
    """Returns the images of a source, by the size of its first good one.

    Raises:
      UsageError: That is not raw.
    """
    count = source.num_examples
    read = (source.read(np.array([number]))[0].image for number in range(count))
    first = next((image for image in read if not isinstance(image, UnreadableError)), None)
    if not isinstance(first, Encoded) or first.kind != 'raw':
      raise _not_raw(source.name, 'encoded ones')
    places, labels = np.zeros(count, np.int64), np.zeros(count, np.int32)
    return cls(view, source.name, first.height, first.width, places, labels)

  def decode(self, encoded: Sequence[Encoded], numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Returns B whole images, one by one, and their windows.

    Args:
      encoded: The images.
      numbers: The random numbers of the views, float32 [B, VIEW_NUMBERS].

    Returns:
      {'image': uint8 [B, H, W, 3], 'box': int32 [B, 4] (top, left, height, width), 'mirrored': bool [B]}

    Raises:
      UnreadableError: An image is damaged.
      UsageError: An image has another size.
    """
    for image in encoded:
      if image.kind != 'raw':
        raise _not_raw(self.name, 'encoded ones')
      if (image.height, image.width) != (self.height, self.width):
        raise _not_raw(self.name, f'ones of {self.height}x{self.width} and {image.height}x{image.width}')
    return {'image': np.stack([decode_pixels(image) for image in encoded]), **self._windows(numbers)}

  def gather(self, indices: np.ndarray, numbers: np.ndarray) -> dict[str, np.ndarray] | None:
    """Returns what `decode` returns, with 'label' int32 [B]; None if one of the examples was not read yet."""
    places = self.addresses[indices]
    first = int(places.min())
    if not first:
      return None
    # All bytes from the first image on. Those between files are never touched.
    memory = np.frombuffer(memoryview((ctypes.c_uint8 * 1).from_address(first)), np.uint8)
    shape = int(places.max()) - first + 1, self.height * self.width * 3
    rows = np.lib.stride_tricks.as_strided(memory, shape, (1, 1), writeable=False)
    images = rows[places - first].reshape(-1, self.height, self.width, 3)
    return {'image': images, 'label': self.labels[indices], **self._windows(numbers)}

  def remember(self, indices: np.ndarray, images: Sequence[Encoded], batch: dict[str, np.ndarray]) -> None:
    """Notes where the examples lie that were read into a batch and not skipped."""
    for row in np.flatnonzero(batch['weight']).tolist():
      content = images[row].content
      if isinstance(content, memoryview) and isinstance(content.obj, mmap.mmap):  # it stays where it is
        self.labels[indices[row]] = batch['label'][row]
        self.addresses[indices[row]] = np.frombuffer(content, np.uint8).ctypes.data

  def _windows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    windows = self.view.windows(np.tile([[self.height, self.width]], (len(numbers), 1)), numbers)
    return {'box': windows.boxes, 'mirrored': windows.mirrored}


def _not_raw(name: str, found: str) -> UsageError:
  advice = 'alexnet-flax prepare NAME --side 256 --encoding raw --crop center'
  return UsageError(f'data.crop_on=device needs raw images of one size, and {name} has {found}; {advice}')
