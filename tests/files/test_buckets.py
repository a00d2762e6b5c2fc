"""Buckets, against a server of each protocol on loopback: runs, data sets, weights and results."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from alexnet_flax import checkpoint, files
from alexnet_flax.cli import train as train_command
from alexnet_flax.cli.main import main
from alexnet_flax.data import digits, loader, tfrecord
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.tfds_source import open_dataset, prepare, split_names
from alexnet_flax.data.views import EvalView
from alexnet_flax.errors import COPIES, BusyError, PreemptedError, UnreachableError, UsageError
from alexnet_flax.files import buckets, expanded
from alexnet_flax.files.cache import cache_folder
from alexnet_flax.training import bucket_run
from alexnet_flax.training.batches import read_examples
from alexnet_flax.training.logger import read_metrics
from benchmarks.emulators import BUCKET, server
from tests.helpers import SMALL, encode, smooth_image

TRAIN = [
  'train.py',
  *SMALL,
  '--config.model.width=0.03',
  '--config.data.train_split=train[:80]',
  '--config.data.eval_split=test[:40]',
  '--config.data.batch_size=16',
  '--config.total_steps=8',
  '--config.checkpoint_every_steps=2',
  '--config.log_every_steps=2',
  '--config.eval_every_steps=4',
  '--config.record_examples=true',
  '--config.optimizer.warmup_steps=1',
]
# Trains as train.py does, and stands still after the fifth step.
STANDS_STILL = """
import sys, time
from alexnet_flax.cli.train import parse
from alexnet_flax.training.callbacks import Callback
from alexnet_flax.training.train import train

train(*parse(sys.argv), [Callback(lambda progress: time.sleep(300), steps=(5,))])
"""


@pytest.fixture(scope='module', params=['gs', 's3'])
def bucket(request, tmp_path_factory):
  """The URL of an empty bucket of a running server."""
  for module in (
    ('gcsfs', 'gcp_storage_emulator') if request.param == 'gs' else ('s3fs', 'moto', 'flask_cors')
  ):
    pytest.importorskip(module, reason=f'no {module}')
  buckets._filesystem.cache_clear()
  with pytest.MonkeyPatch.context() as patch, server(request.param):
    patch.setenv('ALEXNET_FLAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield f'{request.param}://{BUCKET}'
  buckets._filesystem.cache_clear()
  COPIES.clear()


@pytest.fixture(scope='module')
def data(bucket, data_dir):
  """The digits in the bucket."""
  open_dataset('digits', 'test', data_dir)  # prepares them
  return copied(data_dir, f'{bucket}/data')


def copied(folder, url):
  for place, _, names in os.walk(folder):
    for name in names:
      path = os.path.join(place, name)
      with open(path, 'rb') as file:
        buckets.write(f'{url}/{os.path.relpath(path, folder)}', file.read())
  return url


@pytest.fixture(scope='module')
def array_records(tmp_path_factory):
  """The digits in a folder, as ArrayRecord."""
  folder = tmp_path_factory.mktemp('array')
  digits.digits_builder(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


def contents(source, numbers):
  return [bytes(example.image) for example in source.read(np.array(numbers, np.int64))]


def line_of(capsys):
  (line,) = capsys.readouterr().err.splitlines()
  return line


@pytest.fixture(scope='module')
def undisturbed(data_dir, tmp_path_factory):
  """The same run in a folder."""
  folder = tmp_path_factory.mktemp('run')
  with jax.numpy_dtype_promotion('standard'):
    assert train_command.main([*TRAIN, f'--config.data.data_dir={data_dir}', f'--workdir={folder}']) == 0
  return folder


@pytest.mark.usefixtures('standard_promotion')
def test_a_run_that_is_killed_goes_on_with_the_same_bits(bucket, data, undisturbed, tmp_path, capfd):
  url = f'{bucket}/runs/killed'
  flags = [*TRAIN, f'--config.data.data_dir={data}', f'--workdir={url}']
  with subprocess.Popen([sys.executable, '-c', STANDS_STILL, *flags[1:]]) as process:
    while 'checkpoints/4/manifest.json' not in buckets.listing(url):
      assert process.poll() is None
      time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
  assert {'config.json', 'metrics.jsonl', 'examples-0.jsonl'} <= {*buckets.listing(url)}
  assert {*buckets.listing(f'{url}/.lock')} == {'1'}
  half = f'{url}/checkpoints/6'  # of a kill during an upload
  buckets.write(f'{half}/_CHECKPOINT_METADATA', b'{}')
  capfd.readouterr()
  assert train_command.main(flags) == 0
  said = capfd.readouterr().out
  assert f'on 80 images of digits:train[:80], 8 x cpu, steps 5 to 8, in {url}\n' in said
  assert 'damaged' not in said

  there = buckets.listing(url)
  assert not buckets.listing(f'{url}/.lock')
  assert {name.split('/')[1] for name in there if name.startswith('checkpoints/')} == {'4', '6', '8'}
  shutil.rmtree(cache_folder() / 'buckets')
  copy = files.expanded(url)
  for step in (4, 6, 8):
    assert checkpoint.damage(copy / 'checkpoints' / str(step)) is None
    ours, theirs = (checkpoint.load_arrays(one / 'checkpoints', step) for one in (copy, undisturbed))
    assert {name: array.tobytes() for name, array in ours.items()} == {
      name: array.tobytes() for name, array in theirs.items()
    }
  ours, theirs = (
    [
      [line['step'], line['split'], line['name'], line['value']]
      for line in read_metrics(one)
      if line['name'] != 'images_per_second'
    ]
    for one in (copy, undisturbed)
  )
  assert ours == theirs
  assert read_examples(copy / 'examples-0.jsonl') == read_examples(undisturbed / 'examples-0.jsonl')

  before = buckets.listing(url)
  assert train_command.main(flags) == 0
  assert f'the run in {url} is finished; nothing is trained' in capfd.readouterr().out
  assert buckets.listing(url) == before

  assert main(['evaluate', f'{url}@best', '--json', f'{bucket}/out/scores.json']) == 0
  scores = json.loads(files.expanded(f'{bucket}/out/scores.json').read_text())
  assert scores['top1']['value'] in [line['value'] for line in read_metrics(copy) if line['name'] == 'top1']
  assert main(['report', url]) == 0
  assert f'wrote {url}/report.html' in capfd.readouterr().out
  assert main(['convert', url, f'{bucket}/out/a.safetensors']) == 0
  assert f'wrote {bucket}/out/a.safetensors; read back' in capfd.readouterr().out
  buckets.write(f'{bucket}/photos/a.png', encode(smooth_image(60, 60, 0), 'PNG'))
  command = ['features', f'{bucket}/photos', '--layers', 'pool2', '--weights', f'{bucket}/out/a.safetensors']
  assert main([*command, '--out', f'{bucket}/out/f.npz']) == 0
  with np.load(io.BytesIO(files.expanded(f'{bucket}/out/f.npz').read_bytes())) as stored:
    assert stored['names'].tolist() == [f'{bucket}/photos/a.png']
    assert np.isfinite(stored['pool2']).all()
  assert main(['predict', f'{bucket}/photos/a.png', '--weights', f'{url}@6']) == 0
  assert f'{bucket}/out/f.npz: 1 images' in (said := capfd.readouterr().out)
  assert f'{bucket}/photos/a.png\n' in said
  names = {*buckets.listing(bucket)}
  assert {'runs/killed/report.html', 'out/scores.json', 'out/a.safetensors.md', 'out/f.npz'} <= names
  assert not [name for name in names if 'partial' in name]


def test_records_are_read_by_ranges(bucket, data, data_dir, monkeypatch):
  local, remote = (open_dataset('digits', 'train[10:200]', place) for place in (data_dir, data))
  assert remote.identity == local.identity
  assert contents(remote, [5, 0, 99, 5]) == contents(local, [5, 0, 99, 5])
  assert contents(remote, []) == []
  view = EvalView(8, 8)
  one, other = (list(loader.eval_batches(source, view, batch_size=48)) for source in (local, remote))
  for ours, theirs in zip(one, other, strict=True):
    np.testing.assert_array_equal(ours['image'], theirs['image'])
  tfrecord._record_spans.cache_clear()
  monkeypatch.setattr(buckets, 'opened', None)  # the index is kept
  assert contents(open_dataset('digits', 'train[10:200]', data), [7]) == contents(local, [7])


def test_a_record_that_is_damaged_or_replaced_is_a_bad_image(bucket, data_dir):
  open_dataset('digits', 'test', data_dir)  # prepares them
  place = copied(data_dir, f'{bucket}/damaged')
  source = open_dataset('digits', 'test', place)
  (name,) = (name for name in buckets.listing(place) if 'test.tfrecord' in name)
  content = bytearray(buckets.read_ranges([(f'{place}/{name}', 0, 1 << 20)])[0])
  content[20] ^= 1
  buckets.write(f'{place}/{name}', bytes(content))
  image, good = (example.image for example in source.read(np.arange(2)))
  assert str(image) == f'record 0 of {place}/{name} is damaged, by its checksum'
  assert not isinstance(good, UnreadableError)
  buckets.write(f'{place}/{name}', bytes(content[:-1]))
  tfrecord._record_spans.cache_clear()
  with pytest.raises(UsageError, match=r'-of-00001 is not a complete TFRecord file \(record 364 is damaged'):
    open_dataset('digits', 'test', place)
  buckets.remove([f'{place}/{name}'])
  with pytest.raises(UsageError, match=r'1 of 1 files in .* are missing, the first is digits-test.tfrecord'):
    open_dataset('digits', 'test', place)


def test_a_mirror_is_copied_once(bucket, data, data_dir, tmp_path, monkeypatch):
  source = open_dataset('digits', 'test', data, mirror=str(tmp_path))
  assert contents(source, [3]) == contents(open_dataset('digits', 'test', data_dir), [3])
  assert source.ahead == 0
  assert contents(open_dataset('digits', 'test', str(tmp_path)), [3]) == contents(source, [3])  # on its own
  filesystem, asked = buckets._filesystem(bucket[:2]), []
  get = filesystem.get_file
  monkeypatch.setattr(filesystem, 'get_file', lambda *names: (asked.append(names[0]), get(*names)))
  open_dataset('digits', 'test', data, mirror=str(tmp_path))
  assert not asked
  (path,) = tmp_path.rglob('digits-test.tfrecord*')
  path.write_bytes(path.read_bytes()[:-1])
  open_dataset('digits', 'test', data, mirror=str(tmp_path))
  assert [name.rpartition('/')[2] for name in asked] == [path.name]


def test_what_is_read_from_a_disk_alone_says_so_and_reads_a_mirror(bucket, array_records, tmp_path):
  place = copied(array_records, f'{bucket}/array')
  for number, name in enumerate(('train/a/1', 'train/b/2', 'test/a/3', 'test/b/4')):
    buckets.write(f'{bucket}/folder/{name}.png', encode(smooth_image(9, 9, number), 'PNG'))
  for name, url, what in (
    ('digits', place, 'ArrayRecord files'),
    ('image_folder', f'{bucket}/folder', 'folders of images'),
  ):
    with pytest.raises(
      UsageError, match=rf'{url}: {what} are read from a disk alone; add --config.data.mirror='
    ):
      open_dataset(name, 'test', url)
    source = open_dataset(name, 'test', url, mirror=str(tmp_path / name))
    assert not isinstance(source.read(np.arange(1))[0].image, UnreadableError)
  with pytest.raises(UsageError, match='mirror is for a data_dir in a bucket, not for'):
    open_dataset('digits', 'test', str(tmp_path), mirror=str(tmp_path))


def test_mistakes_are_one_line(bucket, data, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  scheme = bucket[:2]
  for command, said in (
    (['evaluate', f'{bucket}/absent', '--dataset', 'digits'], f'{bucket}/absent: no such file'),
    (['report', f'{bucket}/absent'], f"{bucket}/absent is not a run's folder: it has no config.json"),
    (['predict', 'a.png', '--weights', f'{scheme}://no-such-bucket/a.pth'], 'a.pth: no such file'),
    (['convert', 'a.pth', f'{scheme}://no-such-bucket/a.keras'], 'there is no such bucket'),
    (['convert', f'{bucket}//a.pth', 'a.keras'], 'without empty names and dots'),
    (
      ['convert', 'az://b/a.pth', 'a.keras'],
      'az:// cannot be read or written; give a path, or one of gs://, s3',
    ),
    (['prepare', 'digits', '--data_dir', f'{bucket}/new'], 'a data set is prepared on a disk; copy'),
    (
      ['prepare', 'digits', '--data_dir', data, '--side', '8'],
      'prepared on a disk; add --out_dir, and copy it',
    ),
    (
      ['reproduce', '80sec', '--workdir', f'{bucket}/r'],
      'the runs of reproduce are written to a disk; give a',
    ),
  ):
    assert main(command) == 2
    assert said in line_of(capsys)
  with pytest.raises(
    UsageError, match=f"the data set 'digits' is not in {bucket}/new; prepare it in a folder"
  ):
    open_dataset('digits', 'test', f'{bucket}/new')
  assert not [*tmp_path.iterdir()]
  with pytest.raises(UsageError, match='a data set is prepared on a disk'):
    prepare('digits', data)
  with pytest.raises(UsageError, match='folders of images are read from a disk alone'):
    split_names('image_folder', data)


def test_names_that_lead_out_of_a_folder_are_not_copied(bucket, monkeypatch):
  buckets.write(f'{bucket}/odd/config.json', b'{}')
  buckets.write(f'{bucket}/odd/[a]*?/b', b'1')
  filesystem = buckets._filesystem(bucket[:2])
  find = filesystem.find

  def with_another(url, detail):
    found = find(url, detail=detail)
    return found | {f'{BUCKET}/odd/../../../outside': next(iter(found.values()))}

  monkeypatch.setattr(filesystem, 'find', with_another)
  assert {*buckets.listing(f'{bucket}/odd')} == {'config.json', '[a]*?/b'}
  assert (files.expanded(f'{bucket}/odd') / '[a]*?' / 'b').read_bytes() == b'1'


def test_an_object_is_created_once(bucket):
  """The emulator of gs:// does not compare generations, so there the request itself is looked at."""
  if bucket[:2] == 's3':
    buckets.write(f'{bucket}/once', b'1', only_if_absent=True)
    with pytest.raises(FileExistsError):
      buckets.write(f'{bucket}/once', b'2', only_if_absent=True)
    assert buckets.read_ranges([(f'{bucket}/once', 0, 9)]) == [b'1']
    return
  filesystem, asked = buckets._filesystem('gs'), []
  call = filesystem._call

  async def recorded(*arguments, **options):
    asked.append(str((arguments, options)))
    return await call(*arguments, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(filesystem, '_call', recorded)
    buckets.write(f'{bucket}/once', b'1', only_if_absent=True)
  assert any('ifGenerationMatch' in one for one in asked)


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(bucket_run, '_RENEW', 0.2)
  monkeypatch.setattr(bucket_run, '_LEASE', 4.0)


@pytest.mark.parametrize(
  'end', [b'', b'\n', b'\r', b'\r\n', b'--==0==--', b'--==0==\nb', b'\r--==0==\rb', b'\r\n--==0==\n\r']
)
@pytest.mark.parametrize('size', [0, 1, 6 << 20])
@pytest.mark.filterwarnings('ignore:Sending a large body:ResourceWarning')  # aiohttp of gcsfs
def test_an_object_has_the_bytes_of_its_file(bucket, tmp_path, size, end, monkeypatch):
  monkeypatch.setattr(buckets, '_AHEAD', 1 << 16)  # the large one goes another way
  content = b'a' * size + end
  (tmp_path / 'file').write_bytes(content)
  buckets.upload(tmp_path / 'file', f'{bucket}/bytes')
  assert files.expanded(f'{bucket}/bytes').read_bytes() == content


def test_what_arrives_otherwise_is_said(bucket, monkeypatch):
  if not bucket.startswith('gs:'):
    pytest.skip('S3 itself refuses it')
  monkeypatch.setattr('gcsfs.checkers.MD5Checker.update', lambda self, data: None)
  with pytest.raises(UnreachableError, match='out/a is not what was sent: MD5'):
    buckets.write(f'{bucket}/out/a', b'content')


@pytest.mark.usefixtures('quick')
def test_a_run_has_one_process(bucket, monkeypatch, capsys):
  url = f'{bucket}/runs/one'
  with bucket_run.run_folder(url), pytest.raises(BusyError, match=f'trains in {url}; wait for its end'):
    bucket_run.run_folder(url).__enter__()
  assert not buckets.listing(f'{url}/.lock')
  with subprocess.Popen(['true']) as ended:
    pass
  for holder in (
    {'machine': bucket_run._machine(), 'process': ended.pid},
    {'machine': 'other', 'process': 1},
  ):
    buckets.write(f'{url}/.lock/7', json.dumps(holder).encode())
    with bucket_run.run_folder(url):
      assert {*buckets.listing(f'{url}/.lock')} == {'8'}
  assert 'waiting for a minute' in capsys.readouterr().out


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize('other_has_ended', [False, True])
def test_a_process_whose_run_was_taken_over_ends_and_uploads_nothing(
  bucket, monkeypatch, capsys, other_has_ended
):
  url, asked = f'{bucket}/runs/taken-{other_has_ended}', threading.Event()
  monkeypatch.setattr(bucket_run.os, 'kill', lambda *_: asked.set())

  def train():
    with bucket_run.run_folder(url) as folder:
      buckets.write(f'{url}/.lock/2', b'{}')
      buckets.remove([f'{url}/.lock/1'])
      if other_has_ended:
        buckets.remove([f'{url}/.lock/2'])
      assert asked.wait(20)
      (folder / 'metrics.jsonl').write_text('late')

  with pytest.raises(BusyError):
    train()
  assert not buckets.listing(url)
  assert {*buckets.listing(f'{url}/.lock')} == (set() if other_has_ended else {'2'})
  assert f'another process trains in {url}; ' in capsys.readouterr().out


@pytest.mark.usefixtures('quick')
def test_what_a_suspended_process_writes_when_it_goes_on_is_not_uploaded(bucket, monkeypatch):
  url, asked = f'{bucket}/runs/suspended', threading.Event()
  monkeypatch.setattr(bucket_run, '_has_ended', lambda lock: True)  # as after a minute
  monkeypatch.setattr(bucket_run.os, 'kill', lambda *_: asked.set())

  def run():
    with bucket_run.run_folder(url) as suspended:
      with bucket_run.run_folder(url) as folder:
        assert bucket_run.place_here(url) == folder != suspended
        for place, text in ((suspended, 'late'), (folder, 'new')):
          place.mkdir(parents=True, exist_ok=True)
          (place / 'metrics.jsonl').write_text(text)
      assert asked.wait(20)

  with pytest.raises(BusyError):
    run()
  assert expanded(f'{url}/metrics.jsonl').read_text() == 'new'


def test_a_signal_during_the_last_upload_does_not_cut_it_off(bucket, monkeypatch):
  url, upload = f'{bucket}/runs/late', buckets.upload

  def slow(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    upload(*arguments)

  with bucket_run.run_folder(url) as folder:
    monkeypatch.setattr(bucket_run, '_EVERY', 1e9)
    monkeypatch.setattr(buckets, 'upload', slow)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.jsonl').write_text('the last lines')
  assert {*buckets.listing(url)} == {'metrics.jsonl'}
  assert not buckets.listing(f'{url}/.lock')


def test_a_run_that_was_copied_from_a_disk_may_hold_its_lock_file(bucket):
  url = f'{bucket}/runs/from_disk'
  buckets.write(f'{url}/config.json', b'{}')
  buckets.write(f'{url}/.lock', b'')
  buckets.write(f'{url}/.lock/1', b'{}')
  assert {*buckets.listing(url)} == {'config.json'}
  assert (expanded(url) / 'config.json').read_text() == '{}'


def test_a_full_disk_and_a_refusal_are_not_the_network(bucket):
  for raised, expected in (
    (PermissionError('Access Denied'), UsageError),
    (ConnectionResetError('reset'), UnreachableError),
    (OSError(28, 'No space left on device'), OSError),
  ):
    with pytest.raises(expected) as error, buckets.asking(bucket):
      raise raised
    assert type(error.value) is expected


def test_a_bucket_that_does_not_answer(tmp_path, monkeypatch, capsys):
  """One line after some tries: 75 for a run, 2 for other commands."""
  pytest.importorskip('s3fs', reason='no s3fs')
  buckets._filesystem.cache_clear()
  monkeypatch.setenv('ALEXNET_FLAX_CACHE', str(tmp_path / 'cache'))
  for name, value in (
    ('AWS_ENDPOINT_URL', 'http://127.0.0.1:9'),
    ('AWS_ACCESS_KEY_ID', 'a'),
    ('AWS_SECRET_ACCESS_KEY', 'b'),
    ('AWS_MAX_ATTEMPTS', '1'),
  ):
    monkeypatch.setenv(name, value)
  assert main(['report', 's3://bucket/run']) == 2
  assert line_of(capsys).startswith('error: s3://bucket/run does not answer: Could not connect to the')
  assert train_command.main([*TRAIN, '--workdir=s3://bucket/run']) == 75
  assert line_of(capsys).endswith('; the same command goes on when it does')
  with pytest.raises(PreemptedError), bucket_run.run_folder(tmp_path):
    open_dataset('digits', 'test', 's3://bucket/data')
  buckets._filesystem.cache_clear()
  COPIES.clear()
