"""A whole data set on the devices, as uint8: each batch is gathered, cropped and mirrored there.

For sets that fit, such as CIFAR-10 (150 MB). The host then sends indices and windows alone.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.device_views import Batch, view_maker
from alexnet_flax.data.image_header import Encoded, decode_pixels
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.loader import HostBatch, Plan, Reader
from alexnet_flax.data.source import Source
from alexnet_flax.data.views import TrainView
from alexnet_flax.errors import UsageError

_AT_ONCE = 1024  # images


@dataclasses.dataclass(frozen=True)
class ResidentImages:
  """All images of a source, divided over the devices: 'image' [N, H, W, 3], 'label' [N], 'weight' [N].

  N is rounded up to a multiple of the number of devices.
  """

  arrays: Batch
  view: TrainView

  @classmethod
  def load(
    cls,
    source: Source,
    view: TrainView,
    sharding: jax.sharding.Sharding,
    *,
    process: int = 0,
    num_processes: int = 1,
    num_threads: int | None = None,
    bad: BadImages | None = None,
  ) -> 'ResidentImages':
    """Decodes all images, exactly, and puts each process's share onto its devices.

    An image that cannot be decoded has weight 0 for good; arguments as of `loader.train_batches`.

    Raises:
      UsageError: The images are not of one size, cannot be decoded, or do not fit into the devices' memory.
    """
    share = -(-source.num_examples // len(sharding.device_set)) * len(sharding.device_set) // num_processes
    indices = np.arange(share * process, share * (process + 1)) % source.num_examples
    size = _size(source)
    _require_room(source, share * num_processes * size[0] * size[1] * 3, sharding)

    part_size = min(_AT_ONCE, share)

    def plan(step: int) -> Plan:
      positions = step * part_size + np.arange(part_size)
      weights = (positions < share).astype(np.float32)  # 0: the last part is filled up
      return Plan(indices[positions % share], weights, np.zeros((part_size, 0)))

    reader = Reader(source, functools.partial(_whole, source, size), bad or BadImages())
    host: HostBatch = {
      'image': np.empty((share, *size, 3), np.uint8),
      'label': np.empty(share, np.int32),
      'weight': np.empty(share, np.float32),
    }
    for step, batch in enumerate(reader.batches(plan, range(-(-share // part_size)), num_threads)):
      for name, array in host.items():
        part = array[step * part_size : (step + 1) * part_size]
        part[...] = batch[name][: len(part)]
    put = functools.partial(jax.make_array_from_process_local_data, sharding)
    return cls({name: put(array) for name, array in host.items()}, view)

  def batches(self, plan: Callable[[int], Plan], steps: range) -> Iterator[HostBatch]:
    """Yields what the host sends for each step.

    Yields:
      {'index': int64 [b], 'row': int32 [b], 'box': int32 [b, 4], 'mirrored': bool [b]}
    """
    size = self.arrays['image'].shape[1:3]
    for indices, _, numbers in map(plan, steps):
      windows = self.view.windows(np.tile([size], (len(indices), 1)), numbers)
      row = indices.astype(np.int32)
      yield {'index': indices, 'row': row, 'box': windows.boxes, 'mirrored': windows.mirrored}

  def maker(self, sharding: jax.sharding.Sharding) -> Callable[[Batch], Batch]:
    """Returns the function from what the host sends to 'image' uint8 [B, S, S, 3], 'label' and 'weight'."""
    make_views = view_maker(self.view, *self.arrays['image'].shape[1:3])

    @functools.partial(jax.jit, out_shardings=sharding)
    def gathered(arrays: Batch, chosen: Batch) -> Batch:
      row = chosen.pop('row')
      return make_views({name: array[row] for name, array in arrays.items()} | chosen)

    return functools.partial(gathered, self.arrays)


def _size(source: Source) -> tuple[int, int]:
  """Returns height and width of the first image that can be decoded."""
  for number in range(source.num_examples):
    with contextlib.suppress(UnreadableError):
      height, width, _ = decode_pixels(source.read(np.array([number]))[0].image).shape
      return height, width
  raise UsageError(f'no image of {source.name} can be decoded')


def _require_room(source: Source, num_bytes: int, sharding: jax.sharding.Sharding) -> None:
  device: Any
  for device in sharding.addressable_devices:
    if stats := device.memory_stats():  # CPUs have none
      free = stats['bytes_limit'] - stats['bytes_in_use']
      if num_bytes / len(sharding.device_set) > free:
        needed = f'{num_bytes / len(sharding.device_set) / 1e9:.1f} GB of each device'
        has = f'{free / 1e9:.1f} GB are free'
        raise UsageError(f'data.on_device=true: {source.name} needs {needed}, and {has}; leave it out')


def _whole(
  source: Source, size: tuple[int, int], encoded: Sequence[Encoded], numbers: np.ndarray
) -> HostBatch:
  del numbers
  if other := next((image for image in encoded if (image.height, image.width) != size), None):
    found = f'images of {size[0]}x{size[1]} and of {other.height}x{other.width}'
    advice = 'alexnet-flax prepare NAME --side 256 --crop center makes them one size'
    raise UsageError(f'data.on_device=true needs images of one size, and {source.name} has {found}; {advice}')
  return {'image': np.stack([decode_pixels(image) for image in encoded])}
