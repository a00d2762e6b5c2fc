"""The other ways to the same batches: raw images gathered, all images on the devices, several processes."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_flax.data import loader, processes
from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.device_views import view_maker
from alexnet_flax.data.prepare.resize import ImageFormat, prepare_smaller
from alexnet_flax.data.raw import RawImages
from alexnet_flax.data.resident import ResidentImages
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.data.views import TrainView
from alexnet_flax.errors import PreemptedError, UsageError
from alexnet_flax.training.experiment import build_experiment
from alexnet_flax.training.train import train as train_run
from tests.helpers import TINY, encode, replace, smooth_image

VIEW = TrainView(57, 'random_crop', resize_side=65)
STEPS = range(40)  # of 8 images: several epochs of a hundred


@pytest.fixture(scope='module')
def raw_dir(tmp_path_factory):
  """Digits as raw images of 65x65, in a folder with an awkward name."""
  folder = str(tmp_path_factory.mktemp('räw [1] images'))
  open_dataset('digits', 'train', folder)
  prepare_smaller('digits', ImageFormat(65, 'raw', crop='center'), data_dir=folder)
  return folder


@pytest.fixture
def raw_source(raw_dir):
  return open_dataset('digits_65_center_raw', 'train[:100]', raw_dir)


def write_images(folder, contents):
  """Two classes of images to train on."""
  for number, content in enumerate(contents):
    path = folder / 'train' / str(number % 2) / f'{number}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def train(source, **options):
  arguments = {'seed': 1, 'batch_size': 8, 'first_step': STEPS.start, 'last_step': STEPS.stop} | options
  return list(loader.train_batches(source, VIEW, **arguments))


def assert_same(ours, theirs, names=('image', 'label', 'weight')):
  assert len(ours) == len(theirs) > 0
  for one, other in zip(ours, theirs, strict=True):
    for name in names:
      np.testing.assert_array_equal(one[name], other[name])


def cropped(raw, batches):
  return [jax.device_get(view_maker(VIEW, raw.height, raw.width)(batch)) for batch in batches]


def test_gathered_images_make_the_same_batches(raw_source):
  raw = RawImages.of(raw_source, VIEW)
  reads = []
  counted = lambda numbers: reads.append(len(numbers)) or raw_source.read(numbers)  # noqa: E731
  source = type(raw_source)(**(vars(raw_source) | {'read': counted}))
  made = train(source, raw=raw, num_threads=1)
  assert {batch['image'].shape for batch in made} == {(8, 65, 65, 3)}
  assert_same(cropped(raw, made), train(raw_source))
  assert all(raw.addresses)
  assert sum(reads) < 8 * len(STEPS) / 2  # after the first epoch, nothing is read
  assert_same(train(source, raw=raw, num_threads=2), made)
  halves = [train(source, raw=raw, process=p, num_processes=2) for p in (0, 1)]
  joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
  assert_same(joined, made, ('image', 'box', 'mirrored', 'label'))


def test_a_damaged_raw_image_is_skipped_or_named(raw_dir, tmp_path):
  (path,) = pathlib.Path(raw_dir).glob('digits_65_center_raw/*/*-train.tfrecord-*')
  folder = tmp_path / 'tfds' / 'digits_65_center_raw' / path.parent.name
  folder.mkdir(parents=True)
  for file in path.parent.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  content = bytearray(path.read_bytes())
  content[10_000] ^= 1
  (folder / path.name).write_bytes(content)
  source = open_dataset('digits_65_center_raw', 'train[:100]', str(tmp_path / 'tfds'))
  bads = [BadImages('skip', say=lambda line: None) for _ in range(2)]
  raw = RawImages.of(source, VIEW)
  made, expected = train(source, raw=raw, bad=bads[0]), train(source, bad=bads[1])
  assert_same(cropped(raw, made), expected)
  assert sum((batch['weight'] == 0).sum() for batch in made) == bads[0].skipped == bads[1].skipped > 1
  with pytest.raises(UsageError, match='is damaged, by its checksum'):
    train(source, raw=RawImages.of(source, VIEW))


def test_encoded_images_are_not_gathered(data_dir):
  with pytest.raises(UsageError, match=r'digits:train has encoded ones; alexnet-flax prepare NAME --side'):
    RawImages.of(open_dataset('digits', 'train', data_dir), VIEW)


@pytest.mark.parametrize('view', [
  TrainView(8, 'random_crop', resize_side=8, crop_padding=2, rotation_fill=(9.0, 9.0, 9.0)),
  TrainView(6, 'random_crop', resize_side=8),
])  # fmt: skip
def test_images_on_the_devices_make_the_same_batches(data_dir, view):
  source = open_dataset('digits', 'train[:101]', data_dir)  # the devices do not divide it
  sharding = NamedSharding(jax.make_mesh((8,), ('data',), (AxisType.Auto,)), P('data'))
  resident = ResidentImages.load(source, view, sharding)
  plan = loader.train_plan(source.num_examples, 1, 8)
  sent = list(resident.batches(plan, STEPS))
  assert all(array.nbytes < 40 * 8 for batch in sent for array in batch.values())
  made = list(map(resident.maker(sharding), loader.to_devices(iter(sent), sharding)))
  assert made[0]['image'].sharding == sharding
  expected = loader.train_batches(source, view, seed=1, batch_size=8, first_step=0, last_step=len(STEPS))
  assert_same(made, list(expected))


def test_images_of_several_sizes_do_not_go_onto_the_devices(tmp_path):
  write_images(tmp_path, [encode(smooth_image(20, 20 + number // 5, number), 'PNG') for number in range(6)])
  source = open_dataset('image_folder', 'train', str(tmp_path))
  sharding = NamedSharding(jax.make_mesh((1,), ('data',), (AxisType.Auto,)), P('data'))
  with pytest.raises(UsageError, match=r'needs images of one size, and .* has images of 20x2'):
    ResidentImages.load(source, VIEW, sharding)


def examples(folder, **changes):
  fields = {'dataset': 'digits', 'train_split': 'train[:200]', 'data_dir': folder, 'mirror': None}
  fields |= {'verify_records': True}
  fields |= {'examples_per_class': 8, 'corruption': 'random_labels', 'seed': 3, 'bad': BadImages()}
  return processes.TrainingExamples(**fields | changes)


def from_processes(chosen, count, batch_size=8, steps=STEPS, view=VIEW):
  plan = loader.train_plan(chosen.open().num_examples, 1, batch_size)
  return processes.process_batches(chosen, view, plan, steps, count)


def workers():
  """The ids of the processes that decode for this one."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      words, parent = (
        path.read_bytes().split(b'\0'),
        path.with_name('stat').read_text().rsplit(')', 1)[1].split()[1],
      )
    except OSError:  # it has ended
      continue
    if b'alexnet_flax.data.processes' in words:
      found.append((int(path.parent.name), int(parent)))
  return found


def test_processes_make_the_same_batches(raw_dir):
  """A place in the shared memory is used again once nobody has its batch, and not before."""
  chosen, sizes = examples(raw_dir), {'batch_size': 260, 'steps': range(16)}  # of three parts each
  expected = train(chosen.open(), batch_size=260, last_step=16)
  batches = from_processes(chosen, 2, **sizes)
  kept = [next(batches)]
  places = set()
  for number in range(1, 9):
    batch = next(batches)
    places.add(batch['image'].ctypes.data)
    assert_same([batch], [expected[number]])
    del batch
  assert len(places) < 8
  assert kept[0]['image'].ctypes.data not in places
  kept += batches  # more than there are places
  assert_same(kept, expected[:1] + expected[9:], ('image', 'label', 'weight', 'index'))
  assert not [pid for pid, parent in workers() if parent == os.getpid()]


def test_large_batches_of_one_process(raw_dir):
  """Of 96 parts in all: neither side may wait for the other to read."""
  chosen, view = examples(raw_dir), TrainView(4, 'center_crop', resize_side=65)
  batches = from_processes(chosen, 1, batch_size=2048, steps=range(6), view=view)
  assert [len(batch['label']) for batch in batches] == [2048] * 6


def test_a_killed_process_is_one_line(raw_dir):
  batches = from_processes(examples(raw_dir), 1, steps=range(1 << 20))
  next(batches)
  ((pid, _),) = [worker for worker in workers() if worker[1] == os.getpid()]
  os.kill(pid, signal.SIGKILL)
  with pytest.raises(PreemptedError, match=r'was killed \(out of memory\?\); run the same command again'):
    for _ in batches:
      pass
  assert not [pid for pid, parent in workers() if parent == os.getpid()]


_PROGRAM = """
import sys
from tests.data.test_feeds import examples, from_processes
for batch in from_processes(examples(sys.argv[1]), 1, steps=range(1 << 30)):
  print(batch['label'].sum(), flush=True)
"""


def test_processes_end_with_the_run_that_is_killed(raw_dir):
  before = set(workers())
  run = subprocess.Popen([sys.executable, '-c', _PROGRAM, raw_dir], stdout=subprocess.PIPE)
  assert run.stdout is not None
  assert run.stdout.readline()
  mine = {pid for pid, parent in workers() if parent == run.pid}
  assert len(mine) == 1
  run.kill()
  run.communicate()
  deadline = time.monotonic() + 30
  while alive := {pid for pid, _ in set(workers()) - before} & mine:
    assert time.monotonic() < deadline, alive
    time.sleep(0.05)


def test_a_bad_image_is_named_by_the_process_that_decodes_it(tmp_path):
  good = [encode(smooth_image(20, 20, number), 'PNG') for number in range(1, 6)]
  write_images(tmp_path, [b'not an image', *good])
  said = []
  skip = BadImages('skip', say=said.append)
  chosen = examples(
    str(tmp_path), dataset='image_folder', train_split='train', examples_per_class=None, bad=skip
  )
  made = list(from_processes(chosen, 1, batch_size=4, steps=range(3)))
  expected = train(chosen.open(), bad=BadImages('skip', say=said.append), batch_size=4, last_step=3)
  assert_same(made, expected)
  assert len(said) == 2
  assert said[0] == said[1]
  with pytest.raises(UsageError, match=r'train/0/0\.png cannot be decoded: .*; repair or remove it'):
    list(from_processes(dataclasses.replace(chosen, bad=BadImages()), 1, batch_size=4, steps=range(3)))


FEEDS = {
  'processes': {'num_processes': 2},
  'gathered': {'crop_on': 'device'},
  'resident': {'on_device': True},
}


@pytest.mark.usefixtures('standard_promotion')
def test_runs_are_the_same_with_every_feed(raw_dir, tmp_path):
  data = {'dataset': 'digits_65_center_raw', 'data_dir': raw_dir, 'crop': 'random_crop'}
  data |= {name: getattr(TrainView(), name) for name in ('crop_scale', 'crop_ratio')}
  config = replace(TINY, data=data, total_steps=4, record_examples=True)
  curves = {}
  for name, keys in {'threads': {}, **FEEDS}.items():
    for seeds in (1, 2) if name == 'resident' else (1,):
      folder = tmp_path / f'{name}{seeds}'
      train_run(replace(config, data=keys, num_seeds=seeds), str(folder))
      run = folder if seeds == 1 else folder / 'seed-0'
      lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
      curves[name, seeds] = [
        (x['step'], x['split'], x['name'], x['value']) for x in lines if x['name'] == 'loss'
      ]
      curves[name, seeds].append((run / 'examples-0.jsonl').read_text())
  first = curves['threads', 1]
  assert len(first) > 2
  for name, other in curves.items():
    assert other == first, name


@pytest.mark.parametrize(('keys', 'message'), [
  ({'on_device': True, 'num_processes': 2}, 'data.on_device and data.num_processes exclude one another'),
  ({'crop_on': 'device', 'rotation': 5.0}, 'data.crop_on and data.rotation exclude one another'),
])  # fmt: skip
def test_feeds_that_contradict_each_other(data_dir, keys, message):
  with pytest.raises(UsageError, match=message):
    build_experiment(replace(TINY, data={'data_dir': data_dir, **keys}))
