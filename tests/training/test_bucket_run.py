"""Several processes with a run in a bucket: two real ones on loopback, each with a folder of its own."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
import types

import jax
import pytest

from alexnet_flax import checkpoint, files
from alexnet_flax.cli.main import main
from alexnet_flax.errors import COPIES, PreemptedError, UnreachableError, UsageError
from alexnet_flax.files import buckets
from alexnet_flax.training import bucket_run, distributed, watchdog
from alexnet_flax.training.batches import read_examples
from alexnet_flax.training.logger import read_metrics
from benchmarks.emulators import BUCKET, server
from tests.helpers import finish, start_processes

# The axis of the model goes across both processes, and divides the head.
FLAGS = (
  '--config.model.width=0.03',
  '--config.model.num_classes=12',
  '--config.mesh.model=4',
  '--config.data.train_split=train[:80]',
  '--config.data.eval_split=test[:40]',
  '--config.data.batch_size=16',
  '--config.data.num_threads=1',
  '--config.total_steps=8',
  '--config.log_every_steps=2',
  '--config.eval_every_steps=4',
  '--config.keep_checkpoints=2',
)
# Trains as train.py does, and stands still after the fifth step.
STANDS_STILL = """
import sys, time
from alexnet_flax.cli.train import main
from alexnet_flax.training.callbacks import Callback
from alexnet_flax.training.train import train

def run(config, workdir):
  train(config, workdir, [Callback(lambda progress: time.sleep(300), steps=(5,))])

sys.exit(main(sys.argv, run))
"""


@pytest.fixture(scope='module')
def bucket(tmp_path_factory):
  """The URL of an empty bucket of a running server."""
  for module in ('s3fs', 'moto', 'flask_cors'):
    pytest.importorskip(module, reason=f'no {module}')
  buckets._filesystem.cache_clear()
  with pytest.MonkeyPatch.context() as patch, server('s3'):
    patch.setenv('ALEXNET_FLAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    patch.setenv('PYTHONPATH', os.getcwd())
    yield f's3://{BUCKET}'
  buckets._filesystem.cache_clear()
  COPIES.clear()


def contents(url):
  """All that two runs of the same steps have in common: arrays, metrics, examples of each process."""
  copy = files.expanded(url)
  buckets.fetched(copy)
  steps = checkpoint.steps_in(copy / 'checkpoints')
  assert [checkpoint.damage(copy / 'checkpoints' / str(step)) for step in steps] == [None] * len(steps)
  arrays = {step: checkpoint.load_arrays(copy / 'checkpoints', step) for step in steps}
  keys = ('step', 'split', 'name', 'value', 'images')
  return (
    {step: {name: array.tobytes() for name, array in found.items()} for step, found in arrays.items()},
    [[one[key] for key in keys] for one in read_metrics(copy) if one['name'] != 'images_per_second'],
    [read_examples(copy / f'examples-{number}.jsonl') for number in range(2)],
  )


@pytest.mark.usefixtures('standard_promotion')
def test_when_one_is_killed_both_end_and_go_on_with_the_same_bits(bucket, data_dir, tmp_path):
  whole, killed = f'{bucket}/whole', f'{bucket}/killed'
  results = finish(start_processes(data_dir, whole, 2, 2, *FLAGS))
  assert [code for code, _, _ in results] == [0, 0], results
  assert f'steps 1 to 8, in {whole}\n' in results[0][1]

  program = tmp_path / 'stands_still.py'
  program.write_text(STANDS_STILL)
  running = start_processes(data_dir, killed, 2, 2, *FLAGS, program=str(program))
  while 'checkpoints/4/manifest.json' not in buckets.listing(killed):
    assert all(process.poll() is None for process in running)
    time.sleep(0.1)
  running[1].send_signal(signal.SIGKILL)
  code, _, error = finish(running)[0]
  assert code == 75
  assert 'process 0 of 2 ends: process 1 is lost' in error.splitlines()[-1]

  results = finish(start_processes(data_dir, killed, 2, 2, *FLAGS))
  assert [code for code, _, _ in results] == [0, 0], results
  assert f'steps 5 to 8, in {killed}\n' in results[0][1]
  assert 'damaged' not in ''.join(results[0][1:] + results[1][1:])
  arrays, metrics, read = found = contents(killed)
  assert found == contents(whole)
  assert {6, 8} <= {*arrays} <= {4, 6, 8}  # the last two, and the best
  assert [len(one) for one in read] == [8, 8]
  assert not buckets.listing(f'{killed}/.lock')
  assert main(['evaluate', f'{killed}@8', '--json', str(tmp_path / 'scores.json')]) == 0
  top1 = json.loads((tmp_path / 'scores.json').read_text())['top1']['value']
  assert (8, 'top1', top1) in [(step, name, value) for step, _, name, value, _ in metrics]


@pytest.fixture
def processes(monkeypatch):
  """What two processes have posted, by 'NAME/PROCESS'; this one is the first of them."""
  posts = {}

  def get(key):
    try:
      return posts[key.partition(f'alexnet_flax/{distributed._run}/')[2]]
    except KeyError:
      raise jax.errors.JaxRuntimeError('NOT_FOUND') from None

  def put(key, value, allow_overwrite):
    assert allow_overwrite
    posts[key.partition(f'alexnet_flax/{distributed._run}/')[2]] = value

  client = types.SimpleNamespace(key_value_set=put, key_value_try_get=get)
  monkeypatch.setattr(distributed, '_runtime', types.SimpleNamespace(client=client))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  return posts


def test_each_sees_what_another_has_posted_last_in_this_run(processes):
  for step in (3, 5):
    distributed.post('step', step)
    assert distributed.posted('step', 0) == step
  assert distributed.posted('step', 1) is None
  distributed.clear_posts()
  distributed.post('step', 7)
  assert processes == {'step/0': '7'}
  assert distributed.posted('step', 0) == 7


@pytest.mark.parametrize('raised', [None, UsageError, UnreachableError])
def test_at_the_end_each_waits_for_the_other_and_ends_with_its_error(processes, monkeypatch, raised):
  monkeypatch.setattr(distributed, '_COMES_WITHIN', 0.1)
  processes['comes/1'] = 'true'
  said = json.dumps([distributed._said(raised and raised('its error'))])
  threading.Timer(0.5, lambda: processes.update({'ended/1': said})).start()
  start = time.monotonic()
  with pytest.raises(raised) if raised else contextlib.nullcontext() as error:  # noqa: SIM117
    with distributed.end_together():
      pass
  assert time.monotonic() - start > 0.4
  assert raised is None or (type(error.value), str(error.value)) == (raised, 'process 1: its error')
  with pytest.raises(UsageError, match='my error'), distributed.end_together():
    raise UsageError('my error')
  assert json.loads(processes['ended/0']) == [['my error', False]]


def test_who_does_not_come_to_the_end_is_not_waited_for(processes, monkeypatch):
  monkeypatch.setattr(distributed, '_COMES_WITHIN', 0.1)
  with distributed.end_together():
    pass
  assert processes == {'comes/0': 'true', 'ended/0': '[null]'}


def test_a_manifest_waits_for_what_the_others_write(bucket, processes, tmp_path, monkeypatch):
  url = f'{bucket}/waits'
  uploads = bucket_run._Uploads(tmp_path, url, lease := bucket_run._Lease(url))
  monkeypatch.setattr(bucket_run, '_LEASE', 0.1)
  for name in ('config.json', 'checkpoints/4/array', 'checkpoints/4/manifest.json'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  with pytest.raises(UnreachableError, match='process 1 has not uploaded what it wrote until step 4'):
    uploads._upload()
  assert processes['uploads/0'] == '4'
  assert {*buckets.listing(url)} == {'checkpoints/4/array', 'config.json'}
  processes['uploaded/1'] = '4'
  uploads._upload()
  assert 'checkpoints/4/manifest.json' in buckets.listing(url)
  lease.release()

  # The other: it says until where it has uploaded its files, and leaves checkpoints alone.
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  monkeypatch.setattr(bucket_run, '_LOOK', 0.05)
  monkeypatch.setattr(bucket_run, '_LEASE', 60.0)
  other = bucket_run._Uploads(tmp_path / 'other', url, bucket_run._LeaseOfFirst(url))
  other.fetch()
  other.begin()
  shutil.rmtree(tmp_path / 'other' / 'checkpoints')
  (tmp_path / 'other' / 'examples-1.jsonl').write_text('lines')
  processes['uploads/0'] = '6'
  while processes['uploaded/1'] != '6':
    assert other.is_alive()
    time.sleep(0.05)
  assert {'checkpoints/4/manifest.json', 'examples-1.jsonl'} <= {*buckets.listing(url)}
  (tmp_path / 'other' / 'examples-1.jsonl').write_text('more lines')
  other._lease._seen -= 60  # since when the first has not renewed its lease
  with pytest.raises(UnreachableError, match='process 0 cannot renew its right to write'):
    other._upload()
  processes['beat/0'] = '9'
  other.finish(everything=True)
  assert int(processes['uploaded/1']) > 1 << 60


def test_what_a_process_hangs_in_is_uploaded_or_stays_in_its_copy(bucket, tmp_path, monkeypatch):
  folder = tmp_path / 'digest' / 'run'
  folder.mkdir(parents=True)
  place = folder / 'hang.txt'
  place.write_text('waits')
  assert watchdog._uploaded(place) == str(place)
  monkeypatch.setitem(COPIES, str(folder), f'{bucket}/hangs')
  assert watchdog._uploaded(place) == f'{bucket}/hangs/hang.txt'
  assert {*buckets.listing(f'{bucket}/hangs')} == {'hang.txt'}
  monkeypatch.setattr(watchdog, '_UPLOAD_WITHIN', 0.1)
  monkeypatch.setattr(buckets, 'upload', lambda *_: time.sleep(1))
  error = PreemptedError(f'{watchdog._uploaded(place)} shows what waits')
  assert str(error) == f'hang.txt below {tmp_path / "digest"} shows what waits'
  monkeypatch.setattr(jax, 'process_index', lambda: 2)
  assert distributed.of_process('hang.txt') == 'hang-2.txt'
