"""Batches of windows of pictures that are stored as pixels: copied in NumPy, with nothing to decode."""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from alexnet_flax.data.encoded import Encoded
from alexnet_flax.data.reading import HostBatch, Plan, check_labels
from alexnet_flax.data.source import Source
from alexnet_flax.data.views import TrainView

_PIXEL = np.dtype('V3')  # NumPy copies a reversed row twice as fast by pixels as by bytes


def fits(source: Source, view: TrainView) -> bool:
  """Whether views are windows as they are: of all pictures, to judge by the first."""
  if not source.is_raw or view.crop != 'random_crop' or view.rotation:
    return False
  (first,) = source.read(np.array([0]))
  return isinstance(first.picture, Encoded) and min(first.picture[2:]) == view.resize_side


def _resized(window: np.ndarray, size: int) -> np.ndarray:
  """A window of a picture that has another short side than the others."""
  channels = np.ascontiguousarray(window).view(np.uint8).reshape(*window.shape, 3)
  resized = Image.fromarray(channels).resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(resized).view(_PIXEL)[..., 0]


def raw_batches(
  source: Source,
  view: TrainView,
  plan: Callable[[int], Plan],
  steps: range,
  num_classes: int,
  num_threads: int | None,
) -> Iterator[HostBatch]:
  """The batches of steps, built by threads, a few ahead, in order."""
  size = view.image_size

  def build(step: int) -> HostBatch:
    planned = plan(step)
    examples = source.read(planned.indices)
    labels = np.array([example.label for example in examples], np.int32)
    check_labels(source, labels, num_classes)
    pictures = [example.picture for example in examples if isinstance(example.picture, Encoded)]
    sizes = np.array([(picture.height, picture.width) for picture in pictures], np.int64)
    windows = view.windows(sizes, planned.numbers)
    images = np.empty((len(pictures), size, size), _PIXEL)
    chosen = zip(pictures, windows.boxes.tolist(), windows.mirrored.tolist(), strict=True)
    for image, (picture, (top, left, side, _), mirrored) in zip(images, chosen, strict=True):
      pixels = np.frombuffer(picture.content, _PIXEL).reshape(picture.height, picture.width)
      window = pixels[top : top + side, left : left + side]
      if side != size:
        window = _resized(window, size)
      image[...] = window[:, ::-1] if mirrored else window
    unpacked = images.view(np.uint8).reshape(len(pictures), size, size, 3)
    return {'image': unpacked, 'label': labels, 'weight': planned.weights, 'index': planned.indices}

  threads = num_threads or os.cpu_count() or 1
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting = iter(steps)
    ahead = collections.deque(pool.submit(build, step) for step in itertools.islice(waiting, 2 * threads))
    try:
      while ahead:
        yield ahead.popleft().result()
        ahead.extend(pool.submit(build, step) for step in itertools.islice(waiting, 1))
    finally:
      for future in ahead:
        future.cancel()
