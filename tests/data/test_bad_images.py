"""Unusual and damaged images: decoded correctly, refused, or skipped, named and counted."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from alexnet_flax.cli.train import train_and_report
from alexnet_flax.config import Config
from alexnet_flax.data import image_header, images, loader, sampling
from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.data.views import EvalView, TrainView
from alexnet_flax.errors import UsageError
from alexnet_flax.training import train
from tests.helpers import encode, eval_view, replace, smooth_image

pytestmark = pytest.mark.usefixtures('standard_promotion')

PHOTO = smooth_image(60, 80, seed=4)
EVAL, TRAIN = EvalView(32, 36), TrainView(32)


def converted(mode):
  return Image.fromarray(PHOTO).convert(mode)


def saved(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def rotated_by_exif(kind='JPEG', **options):
  """Stored sideways, with the EXIF orientation that turns it upright."""
  exif = Image.Exif()
  exif[0x0112] = 6  # rotate by 90 degrees clockwise
  return saved(Image.fromarray(np.rot90(PHOTO)), kind, exif=exif, **options)


def with_alpha():
  image = converted('RGBA')
  image.putalpha(Image.fromarray(smooth_image(60, 80, seed=1)[..., 0]))
  return saved(image, 'PNG')


JPEG = saved(converted('RGB'), 'JPEG', quality=98, subsampling=0)
UNUSUAL = {
  'png under a jpeg name': (saved(converted('RGB'), 'PNG'), 1),
  'gif': (saved(converted('RGB'), 'GIF'), 40),
  'bmp': (saved(converted('RGB'), 'BMP'), 1),
  'webp': (saved(converted('RGB'), 'WEBP', lossless=True), 1),
  'tiff': (saved(converted('RGB'), 'TIFF'), 1),
  'progressive': (saved(converted('RGB'), 'JPEG', quality=98, subsampling=0, progressive=True), 5),
  'cmyk': (saved(converted('CMYK'), 'JPEG', quality=98), 8),
  'exif': (rotated_by_exif(quality=100, subsampling=0), 5),
  'exif in png': (rotated_by_exif('PNG'), 1),
  'alpha': (with_alpha(), 1),
  'palette': (saved(converted('RGB').quantize(256), 'PNG'), 40),
}
BAD = {
  'empty': b'',
  'text': b'this is not an image',
  'truncated': JPEG[: len(JPEG) // 3],
  'header alone': JPEG[:20],
  'truncated png': saved(converted('RGB'), 'PNG')[:200],
}


def folder(root, *extra, good=6):
  """A folder of two classes with good images and the given file contents."""
  contents = [*(encode(smooth_image(50, 70, i)) for i in range(good)), *extra]
  for number, content in enumerate(contents):
    path = root / 'train' / str(number % 2) / f'{number}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return open_dataset('image_folder', 'train', str(root))


def evaluated(source, bad=None):
  (batch,) = loader.eval_batches(source, EVAL, batch_size=source.num_examples, bad=bad)
  return batch


def trained(source, steps=range(6), bad=None, **options):
  return list(
    loader.train_batches(
      source,
      TRAIN,
      seed=0,
      batch_size=4,
      first_step=steps[0],
      last_step=steps[-1] + 1,
      bad=bad,
      **options,
    )
  )


@pytest.mark.parametrize('kind', UNUSUAL)
def test_unusual_formats_are_decoded_correctly(tmp_path, kind):
  content, tolerance = UNUSUAL[kind]
  source = folder(tmp_path, content)
  row = next(i for i, one in enumerate(source.read(np.arange(7))) if one.name.endswith('6.jpg'))
  ours = evaluated(source)['image'][row].astype(int)
  assert np.abs(ours - eval_view(saved(converted('RGB'), 'PNG'), EVAL)).max() <= tolerance
  assert len(trained(source)) == 6


def test_grey_and_one_pixel(tmp_path):
  grey, line = encode(PHOTO[..., 0], 'PNG'), encode(PHOTO[:1], 'PNG')
  source = folder(tmp_path, grey, line, encode(PHOTO[:1, :1], 'PNG'))
  batch = evaluated(source)
  assert batch['weight'].tolist() == [1.0] * 9
  rows = {one.name[-5:]: row for row, one in enumerate(source.read(np.arange(9)))}
  same = np.repeat(PHOTO[..., :1], 3, -1)
  for name, image, most in (('6.jpg', same, 1), ('7.jpg', PHOTO[:1], 1), ('8.jpg', PHOTO[:1, :1], 0)):
    expected = eval_view(encode(image, 'PNG'), EVAL).astype(int)
    assert np.abs(batch['image'][rows[name]] - expected).max() <= most
  assert (batch['image'][rows['8.jpg']] == PHOTO[0, 0]).all()
  assert len(trained(folder(tmp_path))) == 6


@pytest.mark.parametrize('kind', BAD)
def test_an_error_names_the_bad_image(tmp_path, kind):
  source = folder(tmp_path, BAD[kind])
  with pytest.raises(UsageError, match=r'6\.jpg cannot be decoded: .*; repair or remove it, or set'):
    evaluated(source)
  with pytest.raises(UsageError, match=r'6\.jpg cannot be decoded'):
    trained(source)


@pytest.mark.parametrize('kind', BAD)
def test_bad_images_are_skipped_named_once_and_counted(tmp_path, kind):
  source = folder(tmp_path, BAD[kind], BAD['text'])
  said = []
  bad = BadImages('skip', said.append)
  names = [one.name[-5:] for one in source.read(np.arange(8))]
  labels = [one.label for one in source.read(np.arange(8))]
  batch = evaluated(source, bad)
  assert [name for name, weight in zip(names, batch['weight'], strict=True) if not weight] == [
    name for name in names if name in ('6.jpg', '7.jpg')
  ]
  assert len(said) == 2
  assert bad.skipped == 2
  assert any('6.jpg cannot be decoded' in line for line in said)
  batches = trained(source, bad=bad)
  indices = [sampling.batch_indices(0, step, 4, 8) for step in range(6)]
  for batch, chosen in zip(batches, indices, strict=True):
    for image, label, weight, number in zip(
      batch['image'], batch['label'], batch['weight'], chosen, strict=True
    ):
      assert weight == (names[number] not in ('6.jpg', '7.jpg'))
      assert image.std() > 5  # never blank
      following = next(i % 8 for i in range(number, number + 8) if names[i % 8] not in ('6.jpg', '7.jpg'))
      assert label == labels[following]
  assert len(said) == 2
  assert bad.skipped == 2 + 6
  assert bad.summary() == '2 images cannot be decoded and were skipped (8 times)'


def test_skipping_does_not_depend_on_earlier_batches(tmp_path):
  source = folder(tmp_path, BAD['truncated'], BAD['empty'], BAD['truncated png'])
  whole = trained(source, range(9), BadImages('skip', lambda line: None))
  for threads in (1, 2, 8):
    later = trained(source, range(4, 9), BadImages('skip', lambda line: None), num_threads=threads)
    for one, other in zip(later, whole[4:], strict=True):
      for name in ('image', 'label', 'weight'):
        np.testing.assert_array_equal(one[name], other[name])


def test_a_batch_without_good_images(tmp_path):
  source = folder(tmp_path, BAD['empty'], BAD['text'], good=0)
  with pytest.raises(UsageError, match=r'no image of .* can be decoded'):
    trained(source, bad=BadImages('skip', lambda line: None))


@pytest.mark.parametrize('processes', [2, 4])
def test_skipping_does_not_depend_on_the_number_of_processes(tmp_path, processes):
  source = folder(tmp_path, BAD['truncated'], BAD['empty'], BAD['text'])

  def stream(**share):
    bad = BadImages('skip', lambda line: None)
    arguments = {'seed': 0, 'batch_size': 4, 'first_step': 0, 'last_step': 9}
    return list(loader.train_batches(source, TRAIN, **arguments, bad=bad, **share))

  shares = [stream(process=process, num_processes=processes) for process in range(processes)]
  for whole, *parts in zip(stream(), *shares, strict=True):
    for name in ('image', 'label', 'weight', 'index'):
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_a_share_that_is_only_padding(tmp_path):
  source = folder(tmp_path, BAD['empty'])
  order_of_bad = next(i for i, one in enumerate(source.read(np.arange(7))) if one.name.endswith('6.jpg'))
  first_is_bad = dataclasses.replace(source, read=lambda numbers: source.read((numbers + order_of_bad) % 7))
  bad = BadImages('skip', lambda line: None)
  (batch,) = loader.eval_batches(first_is_bad, EVAL, batch_size=24, process=1, num_processes=2, bad=bad)
  assert batch['weight'].sum() == 0
  assert bad.skipped == 0


def test_the_limit_of_pixels_is_a_key(tmp_path):
  for number, kind in enumerate(('JPEG', 'PNG', 'GIF')):
    source = folder(tmp_path / str(number), saved(converted('RGB'), kind))
    with pytest.raises(UsageError, match=r'80x60 are more than 4,799 pixels'):
      evaluated(source, BadImages(max_pixels=80 * 60 - 1))
    assert evaluated(source, BadImages(max_pixels=80 * 60))['weight'].sum() == 7


def test_images_of_phones_are_read(monkeypatch):
  """In a hundredth of their size: Pillow warns of 108 megapixels, and reads no more than 179."""
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 895_000)
  for height, width in ((1200, 900), (1500, 1400)):
    content = saved(Image.new('1', (width, height)), 'PNG')
    assert image_header.read_image(io.BytesIO(content), max_pixels=2_200_000).shape == (height, width, 3)
    assert image_header.read_header(content, max_pixels=2_200_000).width == width
  with pytest.raises(UnreadableError, match='1400x1500 are more than 2,000,000 pixels'):
    image_header.read_image(io.BytesIO(content), max_pixels=2_000_000)
  assert Image.MAX_IMAGE_PIXELS == 895_000
  assert images.MAX_PIXELS >= 108_000_000


def test_a_run_reports_skipped_images(tmp_path, capsys):
  folder(tmp_path / 'data', BAD['truncated'], BAD['text'])
  config = replace(
    Config(),
    model={'variant': 'cifar10_full', 'width': 1 / 4},
    data={
      'dataset': 'image_folder',
      'data_dir': str(tmp_path / 'data'),
      'eval_split': 'train',
      'batch_size': 8,
      'on_bad_image': 'skip',
    },
    total_steps=2,
  )
  train_and_report(config, str(tmp_path / 'run'))
  said = capsys.readouterr().out
  assert said.count('6.jpg cannot be decoded') == 1
  assert said.count('7.jpg cannot be decoded: not an image') == 1
  assert 'train[:]: 6 of 8 images were counted' in said
  assert 'report.html shows what it learned' in said
  assert 'Over all 6 images' in (tmp_path / 'run' / 'report.html').read_text()
  assert '2 images cannot be decoded and were skipped' in said
  strict = dataclasses.replace(config, data=dataclasses.replace(config.data, on_bad_image='error'))
  with pytest.raises(UsageError, match='cannot be decoded'):
    train.train(strict, tmp_path / 'other')


def test_the_name_of_a_bad_image_cannot_forge_a_line():
  said = []
  BadImages('skip', say=said.append).report('a.jpg\n\x1b[2Jdone: 3 steps', 'no image')
  assert said == [r'skipped: a.jpg\n\x1b[2Jdone: 3 steps cannot be decoded: no image']
