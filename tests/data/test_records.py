"""Prepared data sets that are damaged, and TFRecord files where a process may open few files."""

import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from alexnet_flax.data import digits, import_tensorflow, loader, tfrecord
from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.source import few_per_class, require_labels
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.data.views import EvalView, TrainView
from alexnet_flax.errors import UsageError
from tests.helpers import smooth_image


@pytest.fixture
def prepared(data_dir, tmp_path):
  """A copy of the digits that may be damaged, and its test split's file."""
  open_dataset('digits', 'test', data_dir)
  shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
  (path,) = tmp_path.rglob('digits-test.tfrecord*')
  yield str(tmp_path), path
  tfrecord._record_spans.cache_clear()
  tfrecord._mapped.cache_clear()


def damage(path, position):
  content = bytearray(path.read_bytes())
  content[position] ^= 0x20
  path.write_bytes(content)


def test_every_damaged_byte_of_a_record_is_found(prepared):
  place, path = prepared
  start, length = tfrecord._record_spans(str(path))[3].tolist()
  good = path.read_bytes()
  for position in (*range(start, start + length, 7), start + length, start + length + 3):  # data, checksum
    damage(path, position)
    tfrecord._mapped.cache_clear()
    images = [example.image for example in open_dataset('digits', 'test', place).read(np.arange(6))]
    assert [isinstance(image, UnreadableError) for image in images] == [row == 3 for row in range(6)]
    assert str(images[3]) == f'record 3 of {path} is damaged, by its checksum'
    path.write_bytes(good)


@pytest.mark.parametrize('offset', [-12, -5, -4, -1])  # its length, and the length's checksum
def test_a_damaged_length_of_a_record_is_found(prepared, offset):
  place, path = prepared
  start, _ = tfrecord._record_spans(str(path))[3].tolist()
  damage(path, start + offset)
  tfrecord._record_spans.cache_clear()
  with pytest.raises(
    UsageError, match=r'test.tfrecord.* is not a complete TFRecord file \(record 3 is damaged\)'
  ):
    open_dataset('digits', 'test', place)


def test_a_damaged_record_is_a_bad_image(prepared):
  place, path = prepared
  start, length = tfrecord._record_spans(str(path))[3].tolist()
  damage(path, start + length // 2)
  source, view = open_dataset('digits', 'test', place), EvalView(16, 16)
  with pytest.raises(
    UsageError, match=r'digits:test: example 3 cannot be decoded: record 3 of .*on_bad_image=skip'
  ):
    list(loader.eval_batches(source, view, batch_size=91))
  bad = BadImages('skip', lambda line: None)
  batches = list(loader.eval_batches(source, view, batch_size=91, bad=bad))
  assert sum(batch['weight'].sum() for batch in batches) == 363
  assert batches[0]['weight'][3] == 0
  unverified = open_dataset('digits', 'test', place, verify=False)
  assert not isinstance(unverified.read(np.array([3]))[0].image, UnreadableError)


@pytest.mark.parametrize('record', [b'', b'\x0a', b'\xff' * 40, b'\x0a\x03\x0a\x01\x0a', b'\x00' * 30])
def test_a_record_that_is_no_example(prepared, record):
  place, path = prepared
  good, spans = path.read_bytes(), tfrecord._record_spans(str(path)).tolist()
  with path.open('wb') as file:
    for start, length in spans:
      file.write(tfrecord.framed(record if file.tell() == 0 else good[start : start + length]))
  tfrecord._record_spans.cache_clear()
  tfrecord._mapped.cache_clear()
  for verify in (True, False):
    first, second = open_dataset('digits', 'test', place, verify).read(np.arange(2))
    assert 'its record does not hold what the data set describes' in str(first.image)
    assert bytes(second.image).startswith(b'\x89PNG')


def test_tensorflow_reads_our_records(tmp_path):
  path = tmp_path / 'a.tfrecord'
  records = [b'', b'x' * 100_000, bytes(range(256))]
  with path.open('wb') as file:
    for record in records:
      file.write(tfrecord.framed(record))
  tf = import_tensorflow()
  assert [one.numpy() for one in tf.data.TFRecordDataset(str(path))] == records


def test_a_missing_file(prepared):
  place, path = prepared
  path.unlink()
  with pytest.raises(
    UsageError, match=r'1 of 1 files of digits:test are missing, the first is .*test.tfrecord'
  ):
    open_dataset('digits', 'test', place)


@pytest.mark.parametrize('content', [b'', b'null', b'\xff\xfe', 'half', None])
def test_a_damaged_description(prepared, content):
  place, path = prepared
  info = path.with_name('dataset_info.json')
  if content is None:
    info.unlink()
  else:
    info.write_bytes(info.read_bytes()[:300] if content == 'half' else content)
  with pytest.raises(UsageError, match=r'remove (that|it) and prepare (it|the data set) again') as error:
    open_dataset('digits', 'test', place)
  assert '\n' not in str(error.value)


def test_array_records_are_verified_by_their_library(tmp_path):
  builder = digits.digits_builder(data_dir=tmp_path, file_format='array_record')
  builder.download_and_prepare()
  (path,) = tmp_path.rglob('digits-test.array_record*')
  damage(path, 500)
  images = [example.image for example in open_dataset('digits', 'test', str(tmp_path)).read(np.arange(9))]
  assert sum(isinstance(image, UnreadableError) and 'hash mismatch' in str(image) for image in images) == 1


def test_few_open_files(tmp_path, monkeypatch):
  """300 shards where a process may open 256 files, as on macOS."""
  builder = digits.digits_builder(data_dir=tmp_path)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=300))
  expected = [
    bytes(example.image) for example in open_dataset('digits', 'train', str(tmp_path)).read(np.arange(1433))
  ]
  tfrecord._mapped.cache_clear()
  monkeypatch.setattr(tfrecord.resource, 'getrlimit', lambda what: (40, 40))
  source = open_dataset('digits', 'train', str(tmp_path))
  examples = source.read(np.arange(1433))
  assert [bytes(example.image) for example in examples] == expected
  paths = [str(path) for path in tmp_path.rglob('*train.tfrecord*')]
  assert sum(tfrecord._mapped(path) is not None for path in paths) == 20
  tfrecord._mapped.cache_clear()


class Secret(tfds.core.GeneratorBasedBuilder):
  """Six images in two classes; the test split has no labels, as in TFDS's sets of competitions."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    image = tfds.features.Image(shape=(None, None, 3))
    features = {'image': image, 'label': tfds.features.ClassLabel(names=['a', 'b'])}
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features), supervised_keys=('image', 'label')
    )

  def _split_generators(self, manager):
    return {'train': self._generate_examples([0, 1, 0, 1, 0, -1]), 'test': self._generate_examples([-1] * 6)}

  def _generate_examples(self, labels):
    for number, label in enumerate(labels):
      yield number, {'image': smooth_image(20, 20, number), 'label': label}


class Floats(Secret):
  """The same with images of floats, which TFDS stores as PNGs of their bytes."""

  def _info(self):
    image = tfds.features.Image(shape=(20, 20, 1), dtype=np.float32)
    features = {'image': image, 'label': tfds.features.ClassLabel(names=['a', 'b'])}
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features), supervised_keys=('image', 'label')
    )

  def _generate_examples(self, labels):
    for number, label in enumerate(labels):
      yield number, {'image': np.full((20, 20, 1), 0.5, np.float32), 'label': label}


def open_set(builder, split, folder):
  builder(data_dir=folder).download_and_prepare()
  return open_dataset(builder.name, split, str(folder))


def test_labels_of_minus_one_are_no_labels(tmp_path):
  train, test = (open_set(Secret, split, tmp_path) for split in ('train', 'test'))
  (batch,) = loader.eval_batches(train, EvalView(16, 16), batch_size=8)
  labels = np.array([example.label for example in train.scan_all()])
  np.testing.assert_array_equal(batch['weight'], [*(labels >= 0), 0, 0])
  assert batch['label'].min() >= 0
  assert few_per_class(train, 2, seed=0).num_examples == 4
  require_labels(train)
  with pytest.raises(UsageError, match=r'secret:test: no image has a label \(TFDS stores -1'):
    require_labels(test)
  with pytest.raises(
    UsageError, match=r'contains the label -1; labels must be 0 ... 1 \(-1 stands for a secret'
  ):
    list(loader.train_batches(train, TrainView(16), seed=0, batch_size=6, first_step=0, last_step=1))


def test_images_of_floats_are_refused(tmp_path):
  with pytest.raises(UsageError, match="the images of 'floats' are float32; they must be uint8 or uint16"):
    open_set(Floats, 'train', tmp_path)
