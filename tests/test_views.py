"""Views: what is cropped, mirrored and resized, against Pillow and NumPy."""

import functools

import numpy as np
import pytest
from PIL import Image

from alexnet_flax.data import views
from tests.conftest import encode, smooth_picture

WHOLE = {'crop_scale': (1.0, 1.0), 'crop_ratio': (1.0, 1.0)}


def numbers(**changes):
  """Numbers of a view, all 0.5 but for those named: area, ratio (of the first attempt), top, left, mirror."""
  values = np.full(views.VIEW_NUMBERS, 0.5, np.float32)
  places = {'area': 0, 'ratio': views.CROP_ATTEMPTS, 'top': -3, 'left': -2, 'mirror': -1}
  for name, value in changes.items():
    values[places[name]] = value
  return values


def coordinates(height, width):
  """A picture that says where each of its pixels lies: red is the row, green the column."""
  rows, columns = np.mgrid[:height, :width]
  return np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)


def crop_box(drawn, height=200, width=240, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
  top, left, h, w = (int(x) for x in views._random_crop(height, width, drawn, scale, ratio))
  return top, left, h, w


def test_the_crop_is_torchvisions_formula():
  area = 200 * 240 * (0.08 + 0.3 * 0.92)
  aspect = np.exp(np.log(3 / 4) + 0.9 * (np.log(4 / 3) - np.log(3 / 4)))
  top, left, height, width = crop_box(numbers(area=0.3, ratio=0.9, top=0.25, left=0.999))
  assert (height, width) == (round((area / aspect) ** 0.5), round((area * aspect) ** 0.5))
  assert top == int(0.25 * (200 - height + 1))
  assert left == 240 - width


def test_crops_lie_in_the_picture_and_have_the_drawn_areas():
  rng = np.random.default_rng(0)
  shares = []
  for height, width in ((200, 240), (50, 400), (400, 50), (1, 1), (3, 2)):
    for _ in range(40):
      top, left, h, w = crop_box(rng.random(views.VIEW_NUMBERS, np.float32), height, width)
      assert 0 <= top <= top + h <= height
      assert 0 <= left <= left + w <= width
      assert h > 0 < w
      if (height, width) == (200, 240):
        shares.append(h * w / (height * width))
  assert 0.05 < min(shares) < 0.2 < 0.8 < max(shares) <= 1


def test_a_crop_that_never_fits_becomes_the_largest_central_one():
  assert crop_box(numbers(), 100, 500, scale=(1.0, 1.0)) == (0, 183, 100, 133)  # 4 / 3, the bound
  assert crop_box(numbers(), 500, 100, scale=(1.0, 1.0), ratio=(1.0, 1.0)) == (200, 0, 100, 100)


def test_train_view_crops_resizes_and_mirrors():
  picture = encode(coordinates(60, 60), 'PNG')
  view = functools.partial(views.train_view, picture, image_size=30, crop_scale=(0.25, 0.25), flip=True)
  plain = view(numbers(top=0.0, left=0.999, mirror=0.6), crop_ratio=(1.0, 1.0)).numpy()
  assert plain.dtype == np.uint8
  np.testing.assert_array_equal(plain, coordinates(60, 60)[:30, 30:])
  mirrored = view(numbers(top=0.0, left=0.999, mirror=0.4), crop_ratio=(1.0, 1.0)).numpy()
  np.testing.assert_array_equal(mirrored, plain[:, ::-1])


def test_half_of_the_views_are_mirrored_and_none_without_flip():
  picture = encode(coordinates(8, 8), 'PNG')
  drawn = np.random.default_rng(0).random((200, views.VIEW_NUMBERS), np.float32)
  mirrored = [
    views.train_view(picture, row, image_size=8, flip=flip, **WHOLE).numpy()[0, 0, 1] == 7
    for flip in (True, False)
    for row in drawn
  ]
  assert 70 < sum(mirrored[:200]) < 130
  assert not any(mirrored[200:])


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'BMP'])
def test_eval_view_is_pillows_resize_and_centre_crop(kind):
  picture = smooth_picture(333, 500, seed=1)
  options = {'quality': 95, 'subsampling': 0} if kind == 'JPEG' else {}
  encoded = encode(picture, kind, **options)
  ours = views.eval_view(encoded, image_size=224, resize_side=256).numpy()
  resized = Image.fromarray(picture).resize((256 * 500 // 333, 256), Image.Resampling.BILINEAR)
  left = round((256 * 500 // 333 - 224) / 2)
  theirs = np.asarray(resized)[16:240, left : left + 224]
  assert ours.shape == (224, 224, 3)
  difference = np.abs(ours.astype(int) - theirs)
  assert difference.mean() < 1
  assert difference.max() <= (6 if kind == 'JPEG' else 2)


@pytest.mark.parametrize(('height', 'width'), [(500, 333), (8, 8), (64, 300), (2000, 30)])
def test_eval_view_of_any_shape(height, width):
  encoded = encode(smooth_picture(height, width, seed=0))
  assert views.eval_view(encoded, image_size=64, resize_side=72).shape == (64, 64, 3)


def test_grey_pictures_become_rgb():
  encoded = encode(smooth_picture(40, 40, seed=0)[..., 0])
  for view in (
    views.train_view(encoded, numbers(), image_size=32, flip=True, **WHOLE),
    views.eval_view(encoded, image_size=32, resize_side=32),
  ):
    assert (view.numpy() == view.numpy()[..., :1]).all()


def test_real_photographs(shared_data):
  """The centre view of ImageNet photographs, decoded and resized, is Pillow's to a grey level or two."""
  paths = sorted((shared_data / 'imagenet_samples').glob('*.JPEG'))[:40]
  for path in paths:
    ours = views.eval_view(path.read_bytes(), image_size=224, resize_side=256).numpy()
    with Image.open(path) as opened:
      picture = opened.convert('RGB')
    width, height = picture.size
    short = min(width, height)
    resized = picture.resize((256 * width // short, 256 * height // short), Image.Resampling.BILINEAR)
    left, top = (round((side - 224) / 2) for side in resized.size)
    theirs = np.asarray(resized)[top : top + 224, left : left + 224]
    assert np.abs(ours.astype(int) - theirs).mean() <= 1, path.name
