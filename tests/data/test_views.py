"""Views: what is cropped, mirrored, turned and resized, against formulas, Pillow and NumPy."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from alexnet_flax.data import decode, views
from alexnet_flax.data.decode import decode_train
from alexnet_flax.data.image_header import Encoded, read_header
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.views import EvalView, TrainView
from tests.helpers import encode, eval_view, smooth_image

WHOLE = {'crop_scale': (1.0, 1.0), 'crop_ratio': (1.0, 1.0)}


def numbers(**changes):
  """Numbers of a view, all 0.5 but for those named: area, ratio (of the first attempt), top, left, ..."""
  values = np.full(views.VIEW_NUMBERS, 0.5, np.float32)
  places = {'area': 0, 'ratio': 10, 'top': 20, 'left': 21, 'mirror': 22, 'angle': 23}
  for name, value in changes.items():
    values[places[name]] = value
  return values


def coordinates(height, width):
  """An image that says where each of its pixels lies: red is the row, green the column."""
  rows, columns = np.mgrid[:height, :width]
  return np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)


def train_view(image, view, drawn):
  encoded = image if isinstance(image, Encoded) else read_header(image)
  return decode_train(view, [encoded], drawn[None])['image'][0]


def crop_box(drawn, height=200, width=240, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
  view = TrainView(224, crop_scale=scale, crop_ratio=ratio)
  return tuple(view.windows(np.array([[height, width]]), drawn[None]).boxes[0].tolist())


def pillows_view(image, size=224, side=256):
  """torchvision's Resize and CenterCrop, of a PIL image."""
  width, height = image.size
  short = min(width, height)
  resized = image.resize((side * width // short, side * height // short), Image.Resampling.BILINEAR)
  left, top = (round((length - size) / 2) for length in resized.size)
  return np.asarray(resized)[top : top + size, left : left + size].astype(int)


def test_the_crop_is_torchvisions_formula():
  area = 200 * 240 * (0.08 + 0.3 * 0.92)
  aspect = np.exp(np.log(3 / 4) + 0.9 * (np.log(4 / 3) - np.log(3 / 4)))
  top, left, height, width = crop_box(numbers(area=0.3, ratio=0.9, top=0.25, left=0.999))
  assert (height, width) == (round((area / aspect) ** 0.5), round((area * aspect) ** 0.5))
  assert top == int(0.25 * (200 - height + 1))
  assert left == 240 - width


def test_crops_lie_in_the_image_and_have_the_drawn_areas():
  drawn = np.random.default_rng(0).random((400, views.VIEW_NUMBERS), np.float32)
  for height, width in ((200, 240), (50, 400), (400, 50), (1, 1), (3, 2), (1, 900)):
    boxes = TrainView(224).windows(np.tile([[height, width]], (400, 1)), drawn).boxes
    top, left, h, w = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (h > 0).all()
    assert (w > 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    if (height, width) == (200, 240):
      shares = h * w / (height * width)
      assert 0.05 < shares.min() < 0.2 < 0.8 < shares.max() <= 1


def test_a_crop_that_never_fits_becomes_the_largest_central_one():
  assert crop_box(numbers(), 100, 500, scale=(1.0, 1.0)) == (0, 183, 100, 133)  # 4 / 3, the bound
  assert crop_box(numbers(), 500, 100, scale=(1.0, 1.0), ratio=(1.0, 1.0)) == (200, 0, 100, 100)


def test_train_view_crops_resizes_and_mirrors():
  image = encode(coordinates(60, 60), 'PNG')
  view = TrainView(30, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
  plain = train_view(image, view, numbers(top=0.0, left=0.999, mirror=0.6))
  assert plain.dtype == np.uint8
  np.testing.assert_array_equal(plain, coordinates(60, 60)[:30, 30:])
  mirrored = train_view(image, view, numbers(top=0.0, left=0.999, mirror=0.4))
  np.testing.assert_array_equal(mirrored, plain[:, ::-1])


def test_half_of_the_views_are_mirrored_and_none_without_flip():
  drawn = np.random.default_rng(0).random((1000, views.VIEW_NUMBERS), np.float32)
  sizes = np.tile([[8, 8]], (1000, 1))
  assert 440 < TrainView(8).windows(sizes, drawn).mirrored.sum() < 560  # 3.8 standard deviations
  assert not TrainView(8, flip=False).windows(sizes, drawn).mirrored.any()


def test_the_papers_crop_is_any_window_of_224_of_256():
  view = TrainView(224, 'random_crop')
  drawn = np.random.default_rng(0).random((20_000, views.VIEW_NUMBERS), np.float32)
  boxes = view.windows(np.tile([[256, 256]], (20_000, 1)), drawn).boxes
  assert (boxes[:, 2:] == 224).all()
  for column in (0, 1):  # all 33 places alike: 606 times each, give or take 5 standard deviations
    counts = np.bincount(boxes[:, column], minlength=33)
    assert counts.shape == (33,)
    assert np.abs(counts - 20_000 / 33).max() < 5 * (20_000 / 33) ** 0.5
  assert (view.windows(np.array([[512, 1024]]), drawn[:1]).boxes[0, 2:] == 448).all()
  image = coordinates(256, 256)
  top, left = boxes[0, :2]
  drawn[0, 22] = 0.9  # not mirrored
  window = image[top : top + 224, left : left + 224]
  np.testing.assert_array_equal(train_view(encode(image, 'PNG'), view, drawn[0]), window)
  np.testing.assert_array_equal(train_view(Encoded(image.tobytes(), 'raw', 256, 256), view, drawn[0]), window)


@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
@pytest.mark.parametrize('top', [0.0, 0.4, 0.999])
@pytest.mark.parametrize('left', [0.0, 0.5, 0.999])
def test_a_padded_crop_is_a_window_of_the_padded_image(kind, top, left):
  """torchvision's RandomCrop(32, padding=4), for an image of 32 by 40."""
  encoded = encode(smooth_image(32, 40, 0), kind)
  whole = train_view(encoded, TrainView(32, 'random_crop', resize_side=32, flip=False), numbers(left=0.0))
  rest = train_view(encoded, TrainView(32, 'random_crop', resize_side=32, flip=False), numbers(left=0.999))
  padded = np.full((40, 48, 3), (1, 2, 3), np.uint8)
  padded[4:36, 4:36], padded[4:36, 12:44] = whole, rest
  view = TrainView(32, 'random_crop', crop_padding=4, resize_side=32, rotation_fill=(1.0, 2.0, 3.0))
  row, column = int(top * 9), int(left * 17)
  for mirror, step in ((0.9, 1), (0.1, -1)):
    expected = padded[row : row + 32, column : column + 32][:, ::step]
    np.testing.assert_array_equal(
      train_view(encoded, view, numbers(top=top, left=left, mirror=mirror)), expected
    )


def test_a_padded_crop_of_a_larger_image():
  """The border is in pixels of the view: here 8 of the image's, of which libjpeg decodes each second."""
  image = np.full((128, 128, 3), 255, np.uint8)
  view = TrainView(64, 'random_crop', crop_padding=4, resize_side=64, flip=False)
  for kind in ('PNG', 'JPEG'):
    corner = train_view(encode(image, kind), view, numbers(top=0.0, left=0.999))
    expected = np.zeros((64, 64, 3))
    expected[4:, :-4] = 255
    np.testing.assert_array_equal(corner, expected)


def test_a_turned_padded_crop_reaches_as_far():
  image = np.full((64, 64, 3), 255, np.uint8)
  view = TrainView(64, 'random_crop', crop_padding=8, resize_side=64, flip=False, rotation=10.0)
  seen = train_view(encode(image, 'PNG'), view, numbers(top=0.0, left=0.5))
  assert (seen[:7] == 0).all()
  assert (seen[9:] == 255).all()


def test_a_centre_crop_is_the_one_of_evaluation():
  image = coordinates(45, 32)
  view = TrainView(28, 'center_crop', resize_side=32, flip=False)
  seen = train_view(encode(image, 'PNG'), view, numbers(top=0.9))
  np.testing.assert_array_equal(seen, eval_view(encode(image, 'PNG'), EvalView(28, 32)))


@pytest.mark.parametrize('mirror', [0.2, 0.8])
@pytest.mark.parametrize('angle', [0.0, 0.3, 0.999])
@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_rotation_is_pillows(kind, angle, mirror):
  image = smooth_image(101, 101, seed=3)
  view = TrainView(101, **WHOLE, rotation=30.0, rotation_fill=(255.0, 0.0, 10.0))
  encoded = encode(image, kind, **({'quality': 100, 'subsampling': 0} if kind == 'JPEG' else {}))
  ours = train_view(encoded, view, numbers(angle=angle, mirror=mirror)).astype(int)
  degrees = (2 * angle - 1) * 30
  turned = Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(255, 0, 10))
  theirs = np.asarray(turned).astype(int)
  theirs = theirs[:, ::-1] if mirror < 0.5 else theirs
  difference = np.abs(ours - theirs).max(-1)
  rough = 3 if kind == 'JPEG' else 1  # the fast inverse DCT is
  assert np.median(difference) <= rough
  assert (difference > 4 * rough).mean() < 0.005  # a pixel is of the fill in one and not in the other


@pytest.mark.parametrize('side', [1000, 1003, 1005, 1007])
@pytest.mark.parametrize('angle', [0.5, 0.9])
def test_no_fill_within_the_image(side, angle):
  """Whatever libjpeg shrinks it by, and wherever the crop lies."""
  white = encode(np.full((side, side, 3), 255, np.uint8), 'JPEG')
  view = TrainView(100, crop_scale=(0.36, 0.36), crop_ratio=(1.0, 1.0), rotation=5.0)
  for place in (0.2, 0.37, 0.5, 0.61):
    assert train_view(white, view, numbers(angle=angle, top=place, left=place)).min() >= 254


def test_an_enlarged_image_has_no_frame():
  white = encode(np.full((32, 32, 3), 255, np.uint8), 'PNG')
  view = TrainView(64, **WHOLE, rotation=5.0)
  assert train_view(white, view, numbers(angle=0.5)).min() == 255


def test_a_turned_window_is_that_of_the_turned_image():
  """Pixels outside of the crop, but inside of the image, are used, not the fill."""
  image = smooth_image(300, 300, seed=5)
  view = TrainView(100, 'random_crop', resize_side=300, rotation=45.0)
  drawn = numbers(angle=0.999, top=0.5, left=0.5, mirror=0.9)
  ours = train_view(encode(image, 'PNG'), view, drawn).astype(int)
  turned = Image.fromarray(image).rotate(0.998 * 45, Image.Resampling.BILINEAR)
  assert np.abs(ours - np.asarray(turned)[100:200, 100:200].astype(int)).max() <= 6


def test_a_shrunk_jpeg_is_turned_about_the_same_place():
  """libjpeg decodes at a quarter: the map must know, to a fraction of a pixel."""
  image = smooth_image(800, 800, seed=6)
  view = TrainView(100, **WHOLE, rotation=20.0)
  drawn = numbers(angle=0.9, mirror=0.3)
  large = train_view(encode(image, 'JPEG', quality=95, subsampling=0), view, drawn).astype(int)
  exact = train_view(encode(image, 'PNG'), view, drawn).astype(int)
  assert np.abs(large - exact).mean() < 1


def test_angles_are_even():
  drawn = np.random.default_rng(0).random((4000, views.VIEW_NUMBERS), np.float32)
  degrees = TrainView(8, rotation=15.0).windows(np.tile([[8, 8]], (4000, 1)), drawn).degrees
  counts, _ = np.histogram(degrees, bins=10, range=(-15, 15))
  assert counts.sum() == 4000
  assert np.abs(counts - 400).max() < 5 * 400**0.5


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_eval_view_is_pillows_resize_and_centre_crop(kind):
  image = smooth_image(333, 500, seed=1)
  options = {'quality': 95, 'subsampling': 0} if kind == 'JPEG' else {}
  encoded = encode(image, kind, **options)
  ours = eval_view(encoded, EvalView(224))
  np.testing.assert_array_equal(ours, pillows_view(Image.open(io.BytesIO(encoded)).convert('RGB')))


def test_tensorflows_resize_by_name():
  import tensorflow as tf

  image = smooth_image(600, 500, seed=1)
  ours = eval_view(encode(image, 'PNG'), EvalView(224, resize='tf')).astype(int)
  theirs = tf.image.resize(image, (307, 256)).numpy()[42:266, 16:240]  # (307 - 224) / 2, to even
  assert np.abs(ours - theirs).max() <= 1  # OpenCV's weights have eleven bits
  assert np.abs(ours - pillows_view(Image.fromarray(image))).max() > 0


def test_ten_crops_are_the_corners_the_centre_and_their_mirror_images():
  image = coordinates(200, 240)
  crops = eval_view(encode(image, 'PNG'), EvalView(100, 200, ten_crop=True))
  assert crops.shape == (10, 100, 100, 3)
  corners = [(0, 0), (0, 140), (100, 0), (100, 140), (50, 70)]
  for crop, (top, left) in zip(crops[:5], corners, strict=True):
    np.testing.assert_array_equal(crop, image[top : top + 100, left : left + 100])
  np.testing.assert_array_equal(crops[5:], crops[:5, :, ::-1])


@pytest.mark.parametrize(('height', 'width'), [(500, 333), (8, 8), (64, 300), (2000, 30), (1, 5000)])
def test_eval_view_of_any_shape(height, width):
  encoded = encode(smooth_image(height, width, seed=0))
  assert eval_view(encoded, EvalView(64, 72)).shape == (64, 64, 3)
  assert train_view(encoded, TrainView(64), numbers()).shape == (64, 64, 3)


def test_grey_images_become_rgb():
  encoded = encode(smooth_image(40, 40, seed=0)[..., 0])
  for view in (train_view(encoded, TrainView(32, **WHOLE), numbers()), eval_view(encoded, EvalView(32, 32))):
    assert (view == view[..., :1]).all()


def test_real_photographs(shared_data):
  """The antialiased centre view of 500 photographs, against Pillow's, which is torchvision's."""
  worst = 0
  for path in sorted((shared_data / 'imagenet_samples').glob('*.JPEG')):
    ours = eval_view(path.read_bytes(), EvalView(224))
    with Image.open(path) as opened:
      difference = np.abs(ours - pillows_view(opened.convert('RGB')))
    assert difference.mean() <= 1, path.name
    worst = max(worst, difference.max())
  assert worst <= 4


def test_what_libjpeg_shrinks_looks_the_same(shared_data):
  """Decoding at a half, then bilinear, against decoding in full and antialiasing: some two grey levels."""
  differences = []
  view = TrainView(100, **WHOLE, flip=False)
  for path in sorted((shared_data / 'imagenet_samples').glob('*.JPEG'))[:50]:
    content = path.read_bytes()
    shrunk = train_view(content, view, numbers()).astype(int)
    with Image.open(path) as opened:
      side = min(opened.size)
      left, top = ((length - side) // 2 for length in opened.size)
      box = (left, top, left + side, top + side)
      exact = opened.convert('RGB').resize((100, 100), Image.Resampling.BILINEAR, box=box)
    differences.append(np.abs(shrunk - np.asarray(exact)).mean())
  assert np.mean(differences) < 6


@pytest.mark.parametrize(
  'options',
  [
    {'subsampling': 0},
    {'subsampling': 1},
    {'subsampling': 2},
    {'progressive': True},
    {'restart_marker_blocks': 3},
    {'grey': True},
  ],
  ids=lambda options: ''.join(options),
)
def test_a_window_of_a_jpeg_is_libjpegs_bit_for_bit(options, capfd):
  """Though nothing below it is decoded, and without a word about that; shrunk as well."""
  import tensorflow as tf

  noise = np.random.default_rng(0).integers(0, 60, (333, 250, 3))
  image = (smooth_image(333, 250, seed=2) // 2 + noise).astype(np.uint8)
  image = image[..., 0] if options.get('grey') else image
  content = encode(image, 'JPEG', quality=90, **{key: options[key] for key in options if key != 'grey'})
  rng, views_seen = np.random.default_rng(1), 0
  for size in (16, 24, 60):
    view = TrainView(size, crop_scale=(0.3, 1.0))
    for drawn in rng.random((10, views.VIEW_NUMBERS), np.float32):
      windows = view.windows(np.array([[333, 250]]), drawn[None])
      top, left, height, width = windows.boxes[0].tolist()
      ratio = max(ratio for ratio in (1, 2, 4, 8) if min(height, width) >= ratio * size or ratio == 1)
      first = (top // ratio, left // ratio)
      shape = (
        min(-(-height // ratio), -(-333 // ratio) - first[0]),
        min(-(-width // ratio), -(-250 // ratio) - first[1]),
      )
      window = tf.io.decode_and_crop_jpeg(
        content, [*first, *shape], 3, ratio, dct_method='INTEGER_FAST', fancy_upscaling=False
      )
      expected = cv2.resize(window.numpy(), (size, size), interpolation=cv2.INTER_LINEAR)
      expected = expected[:, ::-1] if windows.mirrored[0] else expected
      np.testing.assert_array_equal(train_view(content, view, drawn), expected)
      views_seen += ratio > 1
  assert views_seen > 10
  assert 'JPEG' not in capfd.readouterr().err


@pytest.mark.parametrize('mirror', [0.2, 0.8])
@pytest.mark.parametrize('side', [20, 48, 90])
def test_training_resizes_bilinearly(side, mirror):
  import tensorflow as tf

  image = smooth_image(side, side, seed=4)
  ours = train_view(encode(image, 'PNG'), TrainView(48, **WHOLE), numbers(mirror=mirror)).astype(int)
  theirs = tf.image.resize(image, (48, 48)).numpy()
  assert np.abs(ours - (theirs[:, ::-1] if mirror < 0.5 else theirs)).max() <= 1


def test_jpegs_of_odd_ends():
  """What follows the window does not matter, and what lacks some of it is an error."""
  content = encode(smooth_image(80, 90, seed=0), 'JPEG', quality=90)
  view = TrainView(32, crop_scale=(0.2, 0.2))
  for place in (0.0, 0.999):
    plain = train_view(content, view, numbers(top=place))
    np.testing.assert_array_equal(train_view(content + b'\0' * 9, view, numbers(top=place)), plain)
  for cut in (len(content) // 2, len(content) - 9):
    with pytest.raises(UnreadableError):
      train_view(content[:cut], view, numbers(top=0.999))


def test_what_simplejpeg_does_not_know_goes_to_tensorflow(monkeypatch):
  content = encode(smooth_image(80, 90, seed=0), 'JPEG', quality=90)
  view = TrainView(32)
  expected = train_view(content, view, numbers())

  def refuse(*arguments, **options):
    raise ValueError('Could not determine subsampling type for JPEG image')

  monkeypatch.setattr(decode.simplejpeg, 'decode_jpeg', refuse)
  np.testing.assert_array_equal(train_view(content, view, numbers()), expected)


def test_real_photographs_in_training(shared_data):
  """Windows of 500 photographs, bit for bit what decoding them in full gives."""
  import tensorflow as tf

  rng = np.random.default_rng(0)
  view = TrainView(224, flip=False)
  for path in sorted((shared_data / 'imagenet_samples').glob('*.JPEG')):
    content, drawn = path.read_bytes(), rng.random(views.VIEW_NUMBERS, np.float32)
    encoded = read_header(content)
    top, left, height, width = view.windows(np.array([[encoded.height, encoded.width]]), drawn[None]).boxes[0]
    if min(height, width) >= 448:
      continue
    whole = tf.io.decode_jpeg(content, 3, dct_method='INTEGER_FAST', fancy_upscaling=False).numpy()
    window = whole[top : top + height, left : left + width]
    if window.shape != (224, 224, 3):
      window = cv2.resize(window, (224, 224), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(train_view(content, view, drawn), window, path.name)


def with_marker(content):
  """The JPEG with something in the middle of its data that libjpeg gives up at."""
  middle = len(content) // 2
  return content[:middle] + b'\xff\xb0' * 50 + content[middle:]


@pytest.mark.parametrize('progressive', [False, True])
def test_a_broken_jpeg_is_never_what_was_in_memory(progressive):
  content = encode(smooth_image(300, 200, seed=0), 'JPEG', quality=90, progressive=progressive)
  seen = []
  for value in (7, 200):
    dirt = [np.full((300, 200, 3), value, np.uint8) for _ in range(20)]
    del dirt
    try:
      seen.append(train_view(with_marker(content), TrainView(64, **WHOLE), numbers()))
    except UnreadableError:
      seen.append(None)
  assert (seen[0] is None) == (seen[1] is None)
  assert not progressive or seen[0] is None
  if seen[0] is not None:
    np.testing.assert_array_equal(*seen)


def test_a_jpeg_whose_header_lies_is_refused():
  content = bytearray(encode(smooth_image(60, 80, seed=0), 'JPEG', quality=90))
  frame = read_header(bytes(content)).frame
  content[frame + 5 : frame + 7] = (65_535).to_bytes(2, 'big')
  with pytest.raises(UnreadableError):
    train_view(bytes(content), TrainView(32, crop_scale=(0.5, 0.5)), numbers(top=0.999))


def test_turned_jpegs_are_decoded_exactly():
  """To the last row: colours are interpolated from the rows below the window."""
  noise = np.random.default_rng(0).integers(0, 255, (120, 90, 3)).astype(np.uint8)
  content = encode(noise, 'JPEG', quality=90)
  exact = encode(np.asarray(Image.open(io.BytesIO(content))), 'PNG')
  view = TrainView(40, crop_scale=(0.2, 0.6), rotation=20.0)
  for drawn in np.random.default_rng(1).random((20, views.VIEW_NUMBERS), np.float32):
    difference = train_view(content, view, drawn).astype(int) - train_view(exact, view, drawn)
    assert np.abs(difference).max() <= 1
