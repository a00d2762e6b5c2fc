"""Corrupted data sets: what changes, what stays, and that it is the same at each reading."""

import numpy as np
import pytest

from alexnet_flax.data.corruption import corrupted
from alexnet_flax.data.image_header import decode_pixels
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.source import Example, Source
from tests.helpers import encode

COUNT = 2000


def source(images=None, is_published=False):
  images = images or [encode(np.full((4, 6, 3), number % 256, np.uint8), 'PNG') for number in range(COUNT)]

  def read(numbers):
    return [Example(images[number], number % 10, f'{number}.png', (1,)) for number in numbers.tolist()]

  names = tuple('abcdefghij')
  return Source('set:train', len(images), names, read, read, 'folder', 'set', is_published=is_published)


def labels(one, numbers):
  return [example.label for example in one.read(numbers)]


def test_random_labels_are_uniform_independent_and_the_same_for_every_reader():
  everything = np.arange(COUNT)
  one = corrupted(source(), 'random_labels', 0, training=True)
  drawn = labels(one, everything)
  assert drawn == labels(corrupted(source(), 'random_labels', 0, training=True), everything)
  assert labels(one, everything[::-7]) == drawn[::-7]
  assert [example.label for example in one.scan_all()] == drawn
  assert drawn != labels(corrupted(source(), 'random_labels', 1, training=True), everything)
  table = np.zeros((10, 10))
  np.add.at(table, (everything % 10, drawn), 1)
  # 81 degrees of freedom: chi squared is below 125.4 with probability 0.999.
  assert ((table - 20) ** 2 / 20).sum() < 150
  assert all(example.correct is None for example in one.read(everything))
  assert decode_pixels(one.read(everything)[5].image)[0, 0, 0] == 5


def test_what_is_tested_keeps_its_labels():
  one = source()
  assert corrupted(one, 'random_labels', 0, training=False) is one
  assert corrupted(one, 'none', 0, training=True) is one


def test_shuffled_pixels_are_the_same_pixels_in_one_order():
  random = np.random.default_rng(0)
  images = [random.integers(0, 256, (4, 6, 3), np.uint8) for _ in range(3)]
  stored = [encode(image, 'PNG') for image in images]
  splits = [corrupted(source(stored), 'shuffled_pixels', 3, training=training) for training in (True, False)]
  found = [[decode_pixels(one.image) for one in split.read(np.arange(3))] for split in splits]
  np.testing.assert_array_equal(*found)
  pixels = images[0].reshape(-1, 3)
  order = [int(np.flatnonzero((pixels == pixel).all(axis=1))[0]) for pixel in found[0][0].reshape(-1, 3)]
  assert sorted(order) == list(range(24)) != order
  for image, shuffled in zip(images, found[0], strict=True):
    np.testing.assert_array_equal(image.reshape(-1, 3)[order].reshape(4, 6, 3), shuffled)
  other = corrupted(source(stored), 'shuffled_pixels', 4, training=True).read(np.arange(1))
  assert (decode_pixels(other[0].image) != found[0][0]).any()


@pytest.mark.parametrize('image', [b'not an image', UnreadableError('its record is damaged')])
def test_a_bad_image_stays_one(image):
  (one,) = corrupted(source([image]), 'shuffled_pixels', 0, training=True).read(np.arange(1))
  assert isinstance(one.image, UnreadableError)


def test_images_that_are_too_large_stay_bad():
  images = [encode(np.zeros((4, 6, 3), np.uint8), 'PNG')]
  (one,) = corrupted(source(images), 'shuffled_pixels', 0, training=True, max_pixels=10).read(np.arange(1))
  assert isinstance(one.image, UnreadableError)


def test_another_name_and_identity():
  one = corrupted(source(), 'shuffled_pixels', 7, training=True)
  assert (one.name, one.identity) == ('set:train (shuffled pixels)', 'set (shuffled pixels, seed 7)')
