"""Data sets: the embedded digits, TFDS by name, slices, record files, folders, ImageNet's archives."""

import io
import pathlib
import tarfile
import tempfile
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from alexnet_flax.data import digits, tfds_source, tfrecord
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.errors import UsageError
from tests.helpers import encode, smooth_image


def tfds_contents(builder, split):
  """Reads (encoded image, label) with TFDS, one file after another."""
  dataset = builder.as_dataset(
    split=split,
    decoders={'image': tfds.decode.SkipDecoding()},
    read_config=tfds.ReadConfig(interleave_cycle_length=1),
  )
  return [(example['image'], int(example['label'])) for example in tfds.as_numpy(dataset)]


def contents(source, count=None):
  """Yields (encoded image, label) of the first examples."""
  for example in source.read(np.arange(source.num_examples if count is None else count)):
    yield bytes(example.image), example.label


def test_no_digit_is_in_both_splits(data_dir):
  open_dataset('digits', 'train', data_dir)  # prepares it
  builder = digits.digits_builder(data_dir=data_dir)
  indices = {
    split: {int(example['index']) for example in tfds.as_numpy(builder.as_dataset(split=split))}
    for split in ('train', 'test')
  }
  assert len(indices['train']) == 1433
  assert len(indices['test']) == 364
  assert not indices['train'] & indices['test']
  assert indices['train'] | indices['test'] == set(range(1797))
  images, labels = load_digits(return_X_y=True)
  for label in range(10):
    share = (labels[sorted(indices['test'])] == label).sum() / (labels == label).sum()
    assert share == pytest.approx(0.2, abs=0.01)
  same = {images[i].tobytes() for i in indices['train']} & {images[i].tobytes() for i in indices['test']}
  assert not same


def test_no_folder_is_left_among_the_temporary_ones(data_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  open_dataset('digits', 'train', data_dir)
  with pytest.raises(UsageError, match='is not prepared'):
    open_dataset('mnist', 'train', data_dir)
  assert not list(tmp_path.iterdir())
  assert tempfile.gettempdir() == str(tmp_path)


def test_digits_equal_scikit_learn(data_dir):
  source = open_dataset('digits', 'test', data_dir)
  builder = digits.digits_builder(data_dir=data_dir)
  images, labels = load_digits(return_X_y=True)
  seen = {}
  for example in tfds.as_numpy(builder.as_dataset(split='test')):
    seen[int(example['index'])] = example['image'], int(example['label'])
  for index, (image, label) in seen.items():
    assert label == labels[index]
    np.testing.assert_allclose(image[..., 0] / 255 * 16, images[index].reshape(8, 8), atol=0.04)
  assert source.class_names == tuple('0123456789')
  assert sorted(label for _, label in contents(source)) == sorted(label for _, label in seen.values())


@pytest.mark.parametrize('split', ['test', 'test[10:20]', 'test[:10%]', 'test[300:]+train[:5]', 'train[-7:]'])
def test_records_equal_tfds_in_its_order(data_dir, split):
  source = open_dataset('digits', split, data_dir)
  builder = digits.digits_builder(data_dir=data_dir)
  expected = tfds_contents(builder, split)
  assert source.num_examples == len(expected)
  assert list(contents(source)) == expected


def test_array_record(data_dir, tmp_path):
  builder = digits.digits_builder(data_dir=tmp_path, file_format='array_record')
  builder.download_and_prepare()
  source = open_dataset('digits', 'test[5:25]', str(tmp_path))
  reference = builder.as_data_source('test[5:25]')
  assert source.num_examples == 20
  assert [label for _, label in contents(source)] == [int(example['label']) for example in reference]


def test_several_shards(tmp_path):
  builder = digits.digits_builder(data_dir=tmp_path)
  shards = tfds.download.DownloadConfig(num_shards=4)
  builder.download_and_prepare(download_config=shards)
  source = open_dataset('digits', 'train[100:1200]', str(tmp_path))
  assert list(contents(source)) == tfds_contents(builder, 'train[100:1200]')


def clear_caches():
  tfrecord._record_spans.cache_clear()
  tfrecord._mapped.cache_clear()


def test_a_truncated_record_file(tmp_path):
  open_dataset('digits', 'test', str(tmp_path))
  (path,) = tmp_path.rglob('*test.tfrecord*')
  path.write_bytes(path.read_bytes()[:-10])
  clear_caches()
  with pytest.raises(UsageError, match=r'tfrecord.* is not a complete TFRecord file'):
    open_dataset('digits', 'test', str(tmp_path))
  clear_caches()


@pytest.mark.parametrize(
  ('name', 'split', 'message'),
  [
    ('cifar', 'train', "unknown data set 'cifar'; did you mean 'cifar10"),
    ('cifar10', 'train', "'cifar10' is not prepared in .*; run: alexnet-flax prepare cifar10 --data_dir="),
    ('imagenet2012', 'train', 'run: alexnet-flax prepare imagenet2012'),
    ('digits', 'tset', "unknown split 'tset'; did you mean 'test'"),
    ('digits', 'test[:0]', 'has no examples'),
  ],
)
def test_data_sets_that_cannot_be_opened(data_dir, name, split, message):
  with pytest.raises(UsageError, match=message):
    open_dataset(name, split, data_dir)


def test_an_error_without_a_text_is_a_line(monkeypatch, tmp_path):
  monkeypatch.setattr(tfds, 'builder', mock.Mock(side_effect=AssertionError))
  with pytest.raises(UsageError, match="data set 'cifar10': AssertionError; if its folder in"):
    open_dataset('cifar10', 'train', str(tmp_path))


def write_imagenet_archives(folder: pathlib.Path, synsets: int = 3, images: int = 4) -> None:
  """Writes ImageNet's two archives in miniature: a tar with a tar per synset, a tar of numbered images."""

  def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))

  labels = pathlib.Path(tfds.__file__).parent / 'datasets' / 'imagenet2012' / 'validation_labels.txt'
  official = labels.read_text().split()
  chosen = official[:synsets]
  with tarfile.open(folder / 'ILSVRC2012_img_train.tar', 'w') as train:
    for number, synset in enumerate(chosen):
      buffer = io.BytesIO()
      with tarfile.open(fileobj=buffer, mode='w') as inner:
        for i in range(images):
          add(inner, f'{synset}_{i}.JPEG', encode(smooth_image(80, 100, 100 * number + i)))
      add(train, f'{synset}.tar', buffer.getvalue())
  with tarfile.open(folder / 'ILSVRC2012_img_val.tar', 'w') as validation:
    for number in range(1, synsets + 1):
      name = f'ILSVRC2012_val_{number:08d}.JPEG'
      add(validation, name, encode(smooth_image(80, 100, 100 * (number - 1))))


def test_imagenet_archives_with_tfds_builder(tmp_path):
  archives = tmp_path / 'archives'
  archives.mkdir()
  write_imagenet_archives(archives)
  tfds_source.prepare('imagenet2012', str(tmp_path), str(archives))
  train = open_dataset('imagenet2012', 'train', str(tmp_path))
  validation = open_dataset('imagenet2012', 'validation', str(tmp_path))
  assert (train.num_examples, validation.num_examples) == (12, 3)
  assert len(train.class_names) == 1000
  by_image = dict(contents(train))
  assert len(by_image) == 12
  for encoded, label in contents(validation):  # each equals a training image of its class
    assert by_image[encoded] == label


def test_archives_that_are_cut_short(tmp_path):
  write_imagenet_archives(tmp_path, images=1)
  for name in ('ILSVRC2012_img_val.tar', 'ILSVRC2012_img_train.tar'):
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(
      UsageError, match=r"cannot prepare 'imagenet2012': .*; if an archive is damaged, get it"
    ) as error:
      tfds_source.prepare('imagenet2012', str(tmp_path / 'tfds'), str(tmp_path))
    assert '\n' not in str(error.value)


def test_missing_archives(tmp_path):
  with pytest.raises(UsageError, match=r'cannot prepare .*ILSVRC2012_img_train\.tar'):
    tfds_source.prepare('imagenet2012', str(tmp_path), str(tmp_path / 'nowhere'))


def test_real_cifar10(shared_data):
  source = open_dataset('cifar10', 'test', str(shared_data / 'tfds'))
  assert source.num_examples == 10_000
  builder = tfds.builder('cifar10', data_dir=shared_data / 'tfds')
  assert list(contents(source, 50)) == tfds_contents(builder, 'test[:50]')
