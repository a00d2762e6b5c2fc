"""Batches: the contents of each step, for any number of processes and threads, and exact evaluation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_flax.data import import_tensorflow, loader, sampling
from alexnet_flax.data.decode import decode_eval, decode_train
from alexnet_flax.data.image_header import read_header
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.data.views import VIEW_NUMBERS, EvalView, TrainView
from alexnet_flax.errors import UsageError
from tests.helpers import encode, smooth_image

TRAIN_VIEW = TrainView(16, crop_scale=(0.5, 1.0), crop_ratio=(0.9, 1.1), rotation=10.0)
EVAL_VIEW = EvalView(16, 16)


@pytest.fixture(scope='module')
def source(data_dir):
  return open_dataset('digits', 'test', data_dir)


def train(source, first_step=0, last_step=4, batch_size=8, **options):
  return list(
    loader.train_batches(
      source,
      TRAIN_VIEW,
      seed=1,
      batch_size=batch_size,
      first_step=first_step,
      last_step=last_step,
      **options,
    )
  )


def assert_same(ours, theirs):
  for one, other in zip(ours, theirs, strict=True):
    for name in ('image', 'label', 'weight'):
      np.testing.assert_array_equal(one[name], other[name])


def alone(view, image, drawn=None):
  """Decodes one stored image by itself."""
  decode = functools.partial(decode_eval if drawn is None else decode_train, view)
  return decode([read_header(image)], drawn)['image'][0]


def test_a_batch_consists_of_the_views_of_its_examples(source):
  for step, batch in enumerate(train(source)):
    indices = sampling.batch_indices(1, step, 8, source.num_examples)
    drawn = sampling.view_numbers(1, step, 8, VIEW_NUMBERS)
    for row, example in enumerate(source.read(indices)):
      np.testing.assert_array_equal(batch['image'][row], alone(TRAIN_VIEW, example.image, drawn[[row]]))
      assert batch['label'][row] == example.label
    assert batch['image'].dtype == np.uint8
    assert batch['label'].dtype == np.int32
    assert batch['weight'].tolist() == [1.0] * 8


def test_threads_do_not_change_batches(source):
  reference = train(source, num_threads=1)
  for num_threads in (2, 8, None):
    assert_same(train(source, num_threads=num_threads), reference)


@pytest.mark.parametrize('num_processes', [2, 4])
def test_processes_share_each_batch(source, num_processes):
  shares = [train(source, process=process, num_processes=num_processes) for process in range(num_processes)]
  joined = [
    {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for parts in zip(*shares, strict=True)
  ]
  assert_same(joined, train(source))


def test_any_step_can_be_the_first(source):
  """Also in the second epoch, which begins within a batch: 364 examples, batches of 8."""
  whole = train(source, last_step=60)
  assert_same(train(source, first_step=44, last_step=60), whole[44:])


@pytest.mark.parametrize('num_processes', [1, 2, 4])
@pytest.mark.parametrize('batch_size', [8, 64, 364, 500])
def test_evaluation_counts_every_image_once(source, batch_size, num_processes):
  images, labels = [], []
  for process in range(num_processes):
    for batch in loader.eval_batches(
      source,
      EVAL_VIEW,
      batch_size=batch_size,
      process=process,
      num_processes=num_processes,
    ):
      assert len(batch['label']) == batch_size // num_processes
      real = batch['weight'] == 1
      assert (batch['weight'][~real] == 0).all()
      images += [image.tobytes() for image in batch['image'][real]]
      labels += batch['label'][real].tolist()
  expected = source.read(np.arange(source.num_examples))
  assert sorted(labels) == sorted(example.label for example in expected)
  assert sorted(images) == sorted(alone(EVAL_VIEW, example.image).tobytes() for example in expected)


def test_labels_outside_the_classes(source):
  nine = dataclasses.replace(source, class_names=source.class_names[:9])
  batches = loader.eval_batches(nine, EVAL_VIEW, batch_size=364)
  with pytest.raises(UsageError, match=r'digits:test contains the label 9; labels must be 0 ... 8'):
    next(batches)


def test_to_devices_shards_and_keeps_the_order(source):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  host = train(source, last_step=7)
  for ahead in (1, 2, 20):
    placed = list(loader.to_devices(iter(host), NamedSharding(mesh, P('data')), ahead))
    assert_same(placed, host)
    assert len(placed[0]['image'].sharding.device_set) == 8
    assert placed[0]['image'].addressable_shards[0].data.shape == (1, 16, 16, 3)


@pytest.mark.parametrize('ahead', [1, 2, 3])
def test_batches_are_transferred_ahead(source, ahead):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  host, taken = train(source, last_step=7), []

  def counted():
    for number, batch in enumerate(host):
      taken.append(number)
      yield batch

  placed = loader.to_devices(counted(), NamedSharding(mesh, P('data')), ahead)
  for number, _ in enumerate(placed):
    assert len(taken) == min(number + 1 + ahead, 7)


def test_tensorflow_sees_no_gpu():
  assert import_tensorflow().config.get_visible_devices('GPU') == []


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
  """40 JPEGs of several sizes in two classes."""
  root = tmp_path_factory.mktemp('photographs')
  for number in range(40):
    path = root / 'train' / 'ab'[number % 2] / f'{number}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    image = smooth_image(40 + number, 90 - number, number)
    path.write_bytes(encode(image, 'JPEG', quality=90, progressive=number % 5 == 0))
  return open_dataset('image_folder', 'train', str(root))


@pytest.mark.parametrize('crop', ['random_resized_crop', 'random_crop'])
@pytest.mark.parametrize('rotation', [0.0, 20.0])
def test_jpegs_do_not_depend_on_threads_and_processes(photographs, crop, rotation):
  """Two epochs of 40 examples, each example once per epoch."""
  view = TrainView(24, crop, resize_side=32, rotation=rotation)

  def batches(size, **options):
    counts = {'first_step': 0, 'last_step': 80 // size, 'batch_size': size}
    return list(loader.train_batches(photographs, view, seed=5, **counts, **options))

  reference = batches(8, num_threads=1)
  for epoch in (reference[:5], reference[5:]):
    assert sorted(np.concatenate([batch['index'] for batch in epoch])) == list(range(40))
  for num_threads in (2, 8):
    assert_same(batches(8, num_threads=num_threads), reference)
  for num_processes in (2, 4):
    shares = [batches(8, process=part, num_processes=num_processes) for part in range(num_processes)]
    joined = [
      {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
      for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, reference)


def test_decoding_in_parts_gives_the_same_batches(photographs, monkeypatch):
  view = EvalView(24, 32)
  whole = list(loader.eval_batches(photographs, view, batch_size=32))
  monkeypatch.setattr(loader, '_PART', 5)
  assert_same(loader.eval_batches(photographs, view, batch_size=32), whole)
  assert [batch['weight'].sum() for batch in whole] == [32, 8]
