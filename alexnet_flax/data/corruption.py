"""Data sets with nothing to learn: corruptions of Zhang et al. 2017 (arXiv:1611.03530, section 2.1)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import numpy as np

from alexnet_flax.data.image_header import Encoded, Stored, decode_pixels
from alexnet_flax.data.images import MAX_PIXELS, UnreadableError
from alexnet_flax.data.source import Example, Source, few_per_class

Corruption = Literal['none', 'random_labels', 'shuffled_pixels']


def corrupted(
  source: Source, corruption: Corruption, seed: int, *, training: bool, max_pixels: int = MAX_PIXELS
) -> Source:
  """Returns a source with other labels or pixels, the same at each reading.

  Args:
    source: The examples.
    corruption: 'random_labels' draws a label for each example to train on, uniformly; others keep theirs.
      'shuffled_pixels' puts the pixels of all images into one random order (one for each size).
    seed: Determines labels and order. The splits of a run have the same order.
    training: Whether these are the examples to train on.
    max_pixels: Images with more are bad ones.
  """
  if corruption == 'none' or (corruption == 'random_labels' and not training):
    return source
  if corruption == 'random_labels':
    count, classes = source.num_examples, len(source.class_names)
    labels = np.random.default_rng(seed).integers(classes, size=count).tolist()

    def change(number: int, example: Example) -> Example:
      return example._replace(label=labels[number], correct=None)
  else:
    turn = training or not source.is_published

    def change(number: int, example: Example) -> Example:
      return example._replace(image=_shuffled(example.image, seed, turn, max_pixels))

  def changed(read: Callable[[np.ndarray], list[Example]]) -> Callable[[np.ndarray], list[Example]]:
    return lambda numbers: [change(*pair) for pair in zip(numbers.tolist(), read(numbers), strict=True)]

  how = corruption.replace('_', ' ')
  return dataclasses.replace(
    source,
    name=f'{source.name} ({how})',
    identity=f'{source.identity} ({how}, seed {seed})',
    read=changed(source.read),
    scan=changed(source.scan) if corruption == 'random_labels' else source.scan,
  )


def training_examples(
  source: Source, examples_per_class: int | None, corruption: Corruption, seed: int, max_pixels: int
) -> Source:
  """Returns the examples that a run trains on: a few per class, unless that is None, and as `corrupted`."""
  if examples_per_class is not None:
    source = few_per_class(source, examples_per_class, seed)
  return corrupted(source, corruption, seed, training=True, max_pixels=max_pixels)


def _shuffled(image: Stored, seed: int, turn: bool, max_pixels: int) -> Stored:
  try:
    pixels = decode_pixels(image, turn, max_pixels)
  except UnreadableError as error:
    return error
  height, width, channels = pixels.shape
  shuffled = pixels.reshape(-1, channels)[_order(seed, height * width)]
  return Encoded(shuffled.tobytes(), 'raw', height, width)


@functools.lru_cache(8)
def _order(seed: int, count: int) -> np.ndarray:
  return np.random.default_rng(seed).permutation(count)
