"""Views made on the device are those of `decode_train`: to the bit, or within a level where resized."""

import jax
import numpy as np
import pytest

from alexnet_flax.data.decode import decode_train
from alexnet_flax.data.device_views import view_maker
from alexnet_flax.data.image_header import Encoded
from alexnet_flax.data.views import VIEW_NUMBERS, TrainView
from tests.helpers import smooth_image

EXACT = {
  'windows': (TrainView(24, 'random_crop', resize_side=32), (32, 40)),
  'the middle': (TrainView(24, 'center_crop', resize_side=32, flip=False), (40, 32)),
  'windows over the border': (
    TrainView(32, 'random_crop', resize_side=32, crop_padding=4, rotation_fill=(10.0, 200.0, 30.0)),
    (32, 32),
  ),
}
RESIZED = {
  'resized crops': (TrainView(24), (64, 48)),
  'enlarged crops': (TrainView(40, crop_scale=(0.08, 0.2)), (32, 40)),
  'crops by area': (TrainView(12, crop_scale=(0.5, 1.0)), (64, 80)),
  'windows of a larger image': (TrainView(24, 'random_crop', resize_side=32), (48, 56)),
  'borders of a smaller one': (TrainView(24, 'random_crop', resize_side=24, crop_padding=3), (20, 20)),
}


def both(view, shape, count=24):
  """The views of random images by the host and by the device."""
  rng = np.random.default_rng(0)
  images = np.stack([smooth_image(*shape, seed) for seed in range(count)])
  images = np.clip(images + rng.normal(0, 30, images.shape), 0, 255).astype(np.uint8)
  numbers = rng.random((count, VIEW_NUMBERS), np.float32)
  ours = decode_train(view, [Encoded(image.tobytes(), 'raw', *shape) for image in images], numbers)['image']
  windows = view.windows(np.tile([shape], (count, 1)), numbers)
  batch = {'image': images, 'box': windows.boxes, 'mirrored': windows.mirrored, 'label': np.arange(count)}
  made = view_maker(view, *shape)(batch)
  assert made['image'].dtype == np.uint8
  assert made['label'].tolist() == list(range(count))
  return ours.astype(int), np.asarray(made['image']).astype(int)


@pytest.mark.parametrize('case', EXACT)
def test_windows_are_the_hosts_to_the_bit(case):
  host, device = both(*EXACT[case])
  assert len(np.unique(host)) > 100
  np.testing.assert_array_equal(device, host)


@pytest.mark.parametrize('case', RESIZED)
def test_resized_windows_are_the_hosts_within_a_level(case):
  host, device = both(*RESIZED[case])
  assert np.abs(device - host).max() <= 1
  assert (device != host).mean() < 0.2


def test_only_whole_pixels_are_copied_by_slices():
  view, shape = EXACT['windows']
  assert view.copies_pixels(*shape)
  assert not view.copies_pixels(48, 48)
  assert not TrainView(32).copies_pixels(32, 32)
  program = str(
    jax.make_jaxpr(view_maker(view, *shape))(
      {
        'image': np.zeros((1, *shape, 3), np.uint8),
        'box': np.zeros((1, 4), np.int32),
        'mirrored': np.zeros(1, bool),
      }
    )
  )
  assert 'dot_general' not in program
