"""Orientation: one rule for training, evaluation and prediction, wherever it is stored."""

import dataclasses
import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from alexnet_flax.data import loader
from alexnet_flax.data.image_header import convert_to_png, decode_pixels, read_header
from alexnet_flax.data.images import read_image
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.data.views import EvalView, TrainView
from tests.helpers import encode, eval_view, smooth_image

PIXELS = smooth_image(24, 40, seed=3)


def exif(orientation):
  one = Image.Exif()
  one[0x0112] = orientation
  return one.tobytes()


def xmp(orientation, tag='="{}"'):
  return (
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation{tag.format(orientation)}/></x:xmpmeta>'.encode()
  )


def chunks(png):
  """Splits a PNG into its signature and chunks."""
  parts, position = [png[:8]], 8
  while position < len(png):
    end = position + 12 + struct.unpack('>I', png[position : position + 4])[0]
    parts.append(png[position:end])
    position = end
  return parts


def png_with_exif_at_the_end(orientation):
  parts = chunks(encode(PIXELS, 'PNG', exif=exif(orientation)))
  parts.sort(key=lambda part: (part[4:8] == b'IEND', part[4:8] == b'eXIf'))
  return b''.join(parts)


def png_with_text(keyword, text, zipped=False, international=False):
  info = PngImagePlugin.PngInfo()
  (info.add_itxt if international else info.add_text)(keyword, text, zip=zipped)
  return encode(PIXELS, 'PNG', pnginfo=info)


def raw_profile(orientation):
  data = exif(orientation)
  return f'\nexif\n{len(data):8}\n{data.hex()}\n'


def jpeg_with_exif_after_the_frame(orientation):
  plain, described = (
    encode(PIXELS, 'JPEG', quality=95),
    encode(PIXELS, 'JPEG', quality=95, exif=exif(orientation)),
  )
  start = described.index(b'\xff\xe1')
  segment = described[start : start + 2 + int.from_bytes(described[start + 2 : start + 4], 'big')]
  scan = plain.index(b'\xff\xda')
  return plain[:scan] + segment + plain[scan:]


WAYS = {
  'EXIF': lambda turn: encode(PIXELS, 'JPEG', quality=95, exif=exif(turn)),
  'EXIF after the frame': jpeg_with_exif_after_the_frame,
  'XMP': lambda turn: encode(PIXELS, 'JPEG', quality=95, xmp=xmp(turn)),
  'XMP element': lambda turn: encode(PIXELS, 'JPEG', quality=95, xmp=xmp(turn, '>{}<')),
  'PNG chunk': lambda turn: encode(PIXELS, 'PNG', exif=exif(turn)),
  'PNG chunk after the pixels': png_with_exif_at_the_end,
  'PNG text profile': lambda turn: png_with_text('Raw profile type exif', raw_profile(turn)),
  'PNG compressed text profile': lambda turn: png_with_text(
    'Raw profile type exif', raw_profile(turn), zipped=True
  ),
  'PNG XMP': lambda turn: png_with_text('XML:com.adobe.xmp', xmp(turn).decode(), international=True),
  'WebP': lambda turn: encode(PIXELS, 'WEBP', lossless=True, exif=exif(turn)),
  'TIFF': lambda turn: encode(PIXELS, 'TIFF', tiffinfo={274: turn}),
}


def as_in_training(content, **options):
  encoded = read_header(content, **options)
  return decode_pixels(convert_to_png(content, **options) if encoded is None else encoded)


@pytest.mark.parametrize('way', WAYS)
def test_an_image_is_turned_alike_wherever_its_orientation_is_stored(way):
  for turn in range(1, 9):
    content = WAYS[way](turn)
    plain = Image.fromarray(PIXELS)
    plain.getexif()[0x0112] = turn
    expected = np.asarray(ImageOps.exif_transpose(plain)).astype(int)
    predicted = read_image(io.BytesIO(content))
    assert predicted.shape == expected.shape
    assert np.abs(predicted - expected).mean() < 3
    np.testing.assert_array_equal(as_in_training(content), predicted)
    stored = as_in_training(content, turn=False)
    assert stored.shape == (
      PIXELS.shape if way != 'TIFF' else predicted.shape
    )  # Pillow itself turns TIFF files
    assert (read_header(content) is None) == (turn > 1 or way in ('WebP', 'TIFF'))


@pytest.mark.parametrize(
  'content',
  [
    encode(PIXELS, 'JPEG', exif=b'Exif\0\0II*\0\x08\0\0\0\xff\xff'),
    encode(PIXELS, 'JPEG', exif=b'Exif\0\0nonsense'),
    encode(PIXELS, 'JPEG', xmp=b'tiff:Orientation="9"'),
    encode(PIXELS, 'PNG', exif=exif(77)),
    png_with_text('Raw profile type exif', '\nexif\n  3\nzz\n'),
  ],
)
@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_broken_metadata_turn_nothing(content):
  assert read_image(io.BytesIO(content)).shape == PIXELS.shape
  np.testing.assert_array_equal(as_in_training(content), read_image(io.BytesIO(content)))


def test_other_metadata_cost_no_conversion():
  for content in (
    png_with_text('Software', 'xmp'),
    encode(PIXELS, 'JPEG', exif=exif(1)),
    encode(PIXELS, 'JPEG'),
  ):
    assert read_header(content) is not None


def test_batches_are_turned_and_published_sets_are_not(tmp_path):
  for label in 'ab':
    (tmp_path / 'train' / label).mkdir(parents=True)
    (tmp_path / 'train' / label / '1.png').write_bytes(WAYS['PNG XMP'](6))
  source = open_dataset('image_folder', 'train', str(tmp_path))
  (upright,) = loader.eval_batches(source, EvalView(16, 16), batch_size=2)
  (stored,) = loader.eval_batches(source, EvalView(16, 16, turn=False), batch_size=2)
  view = TrainView(16, crop_scale=(1.0, 1.0), crop_ratio=(0.6, 0.6), flip=False)
  (trained,) = loader.train_batches(source, view, seed=0, batch_size=2, first_step=0, last_step=1)
  turned = np.ascontiguousarray(np.rot90(PIXELS, -1))
  np.testing.assert_array_equal(upright['image'][0], eval_view(encode(turned, 'PNG'), EvalView(16, 16)))
  np.testing.assert_array_equal(stored['image'][0], eval_view(encode(PIXELS, 'PNG'), EvalView(16, 16)))
  small = Image.fromarray(turned).resize((16, 16), Image.Resampling.BILINEAR)
  assert np.abs(trained['image'][0] - np.asarray(small).astype(int)).mean() < 12
  published = dataclasses.replace(source, is_published=True)
  (default,) = loader.eval_batches(published, EvalView(16, 16), batch_size=2)
  np.testing.assert_array_equal(default['image'], stored['image'])
