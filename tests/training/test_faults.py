"""Faults beyond the kill, each made for real: crashes at named points, hangs, no memory, clocks that jump."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from alexnet_flax import checkpoint
from alexnet_flax.cli.train import train_and_report
from alexnet_flax.data import decode
from alexnet_flax.errors import PreemptedError
from alexnet_flax.training import logger, seeds, train, watchdog
from tests.helpers import TINY, replace

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def tiny(data_dir):
  schedule = {'total_steps': 6, 'checkpoint_every_steps': 2, 'eval_every_steps': 2, 'log_every_steps': 2}
  return replace(TINY, data={'data_dir': data_dir}, optimizer={'schedule': 'constant'}, **schedule)


@pytest.fixture(scope='module')
def undisturbed(data_dir, tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  import jax

  with jax.numpy_dtype_promotion('standard'):
    train.train(tiny.__wrapped__(data_dir), folder)
  return folder


def outcome(folder):
  """The last state's bits, and the metrics but for what clocks say."""
  arrays = checkpoint.load_arrays(folder / 'checkpoints', 6)
  kept = [line for line in logger.read_metrics(folder) if line['name'] != 'images_per_second']
  metrics = [(line['step'], line['split'], line['name'], line['value']) for line in kept]
  return {name: array.tobytes() for name, array in arrays.items()}, metrics


# Runs the configuration, and is killed at the nth call of a function.
_CRASH = """
import os, signal, sys
import tests.conftest
import jax
from tests.training.test_faults import tiny
from alexnet_flax.training import train
exec(sys.argv[3])
owner, name, nth = place
real, calls = getattr(owner, name), []
def crash(*arguments, **options):
  calls.append(1)
  if len(calls) == nth:
    os.kill(os.getpid(), signal.SIGKILL)
  return real(*arguments, **options)
setattr(owner, name, crash)
with jax.numpy_dtype_promotion('standard'):
  train.train(tiny.__wrapped__(sys.argv[1]), sys.argv[2])
"""
POINTS = {
  'before the rename of a save': (
    'import orbax.checkpoint._src.path.atomicity as a; place = a.AtomicRenameTemporaryPath, "finalize", 2'
  ),
  'between metrics and state': 'import alexnet_flax.checkpoint as c; place = c, "save", 2',
  'between state and metrics': 'import alexnet_flax.training.logger as l; place = l.Logger, "write", 3',
}


@pytest.mark.parametrize('point', POINTS)
def test_a_crash_at_a_named_point_changes_nothing(tiny, undisturbed, data_dir, tmp_path, point):
  crashed = subprocess.run(
    [sys.executable, '-c', _CRASH, data_dir, str(tmp_path), POINTS[point]], capture_output=True, check=False
  )
  assert crashed.returncode == -signal.SIGKILL, crashed.stderr
  assert 6 not in checkpoint.steps_in(tmp_path / 'checkpoints')
  train.train(tiny, tmp_path)
  assert outcome(tmp_path) == outcome(undisturbed)


@pytest.mark.parametrize(('place', 'name', 'said'), [
  (decode, 'decode_pixels', r'(the images of step \d were asked for|step \d began)'),
  (seeds, 'make_steps', 'step 4 began'),
])  # fmt: skip
def test_what_never_ends_is_found_and_named(tiny, tmp_path, monkeypatch, capsys, place, name, said):
  """A read or a step that waits forever, and an hour later."""
  real, calls, codes, free = getattr(place, name), [], [], threading.Event()

  def hangs(*arguments, **options):
    calls.append(1)
    if len(calls) == (4 if place is seeds else 4 * 16):
      while not free.wait(0.2):
        sign = watchdog._last
        monkeypatch.setattr(watchdog, '_last', sign and sign._replace(at=time.monotonic() - 3600))
    return real(*arguments, **options)

  def end(code):
    codes.append(code)
    free.set()

  monkeypatch.setattr(place, name, hangs)
  monkeypatch.setattr(watchdog.os, '_exit', end)
  train_and_report(replace(tiny, hang_seconds=1800.0, total_steps=5), str(tmp_path))
  assert codes == [75]
  error = capsys.readouterr().err
  assert re.search(rf'nothing has happened for 36\d\d s \(hang_seconds\), since {said};', error), error
  assert 'the same command goes on' in error
  assert 'hangs' in (tmp_path / 'hang.txt').read_text()


def test_no_memory_is_one_line_and_loses_nothing(tiny, data_dir, tmp_path, monkeypatch):
  train.train(replace(tiny, total_steps=2), tmp_path)
  program = (
    'import resource, sys, tests.conftest, jax\n'
    'from tests.training.test_faults import tiny\n'
    'from tests.helpers import replace\n'
    'from alexnet_flax.cli.train import main\n'
    'from alexnet_flax.training import train\n'
    'real = train.compile_train_step\n'
    'def limited(*arguments):\n'
    '  step = real(*arguments)\n'
    '  size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()\n'
    '  resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)\n'
    '  return step\n'
    'train.compile_train_step = limited\n'
    'config = replace(tiny.__wrapped__(sys.argv[1]), data={"batch_size": 1 << 14})\n'
    'def run(*ignored):\n'
    '  with jax.numpy_dtype_promotion("standard"):\n'
    '    train.train(config, sys.argv[2])\n'
    'sys.exit(main(["train.py", "--config=configs/digits.py"], run))\n'
  )
  ended = subprocess.run(
    [sys.executable, '-c', program, data_dir, str(tmp_path)], capture_output=True, text=True, check=False
  )
  assert ended.returncode == 2, ended.stderr
  (line,) = [line for line in ended.stderr.splitlines() if line.startswith('error:')]
  assert 'out of memory' in line
  assert 'lower data.batch_size (=16384), or raise optimizer.accumulate_steps (=1)' in line
  assert 'Traceback' not in ended.stderr
  assert checkpoint.damage(tmp_path / 'checkpoints' / '2') is None
  train.train(tiny, tmp_path)


@pytest.mark.parametrize('days', [-1, 1])
def test_clocks_that_jump_change_nothing(tiny, undisturbed, tmp_path, monkeypatch, days):
  """Whenever they are read. If they jump ahead, Orbax takes a save for one that never ends."""
  real, calls = time.time, []

  def jumping():
    calls.append(1)
    return real() + days * len(calls) * 86_400.0

  with monkeypatch.context() as patch:
    patch.setattr(time, 'time', jumping)
    if days < 0:
      train.train(replace(tiny, total_steps=4), tmp_path)
    else:
      with pytest.raises(PreemptedError, match=r'timed out .*; the same command goes on'):
        train.train(tiny, tmp_path)
  for path in tmp_path.rglob('*'):
    os.utime(path, (0, 0))
  train.train(tiny, tmp_path)
  assert calls
  assert outcome(tmp_path) == outcome(undisturbed)
  seconds = [line['seconds'] for line in logger.read_metrics(tmp_path)]
  assert seconds == sorted(seconds)
  assert np.all(np.array(seconds) >= 0)
