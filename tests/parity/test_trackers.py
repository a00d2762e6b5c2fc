"""The real trackers, local or offline: a run that was killed and went on is one run, with each step once."""

import contextlib
import glob
import json
import os
import pathlib
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request

import jax.numpy as jnp
import pytest

from alexnet_flax.metrics import Metrics
from alexnet_flax.training.logger import Logger
from alexnet_flax.training.trackers import FILE, PROJECT

pytestmark = pytest.mark.filterwarnings('default')  # theirs
WANTED = [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 2.5), (6, 3.0)]


def log(folder, steps, tracker):
  logger = Logger(folder, steps[0] - 1, 6, 1, True, tracker=tracker)
  for step in steps:
    logger.write(step, 'train[:9]', Metrics({'loss': jnp.array(step / 2)}, jnp.array(1.0)))
  logger.close()


@pytest.fixture
def run(tmp_path, monkeypatch):
  """run(tracker): the folder of a run that was killed after step 4 and went on from step 2, and its id."""
  monkeypatch.chdir(tmp_path)

  def tracked(tracker):
    pytest.importorskip(tracker, reason=f'{tracker} is not installed')
    folder = tmp_path / 'run'
    folder.mkdir()
    log(folder, [1, 2, 3, 4], tracker)
    log(folder, [3, 4, 5, 6], tracker)
    return json.loads((folder / FILE).read_text())[tracker][0]

  return tracked


def test_trackio(run, tmp_path, monkeypatch):
  monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
  name = run('trackio')
  (file,) = glob.glob('trackio/*.db')
  with contextlib.closing(sqlite3.connect(file)) as base:
    rows = base.execute('select run_name, step, metrics from metrics order by step').fetchall()
  assert {row[0] for row in rows} == {name}
  assert [(step, float(re.search(rb'loss":([\d.]+)', bytes(text))[1])) for _, step, text in rows] == WANTED


def test_wandb(run, monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  name = run('wandb')
  files = sorted(
    pathlib.Path('wandb').glob(f'offline-run-*/run-{name}.wandb'), key=lambda path: path.stat().st_mtime
  )
  values = (
    rb'train\[:9\]/loss\x82\x01[\x01\x03]([\d.]+)'  # a field of Protocol Buffers: its number, length and text
  )
  found = [set(map(float, re.findall(values, path.read_bytes()))) for path in files]
  assert found == [{0.5, 1.0, 1.5, 2.0}, {2.5, 3.0}]


def test_aim(run):
  name = run('aim')
  import aim

  tracked = aim.Run(name, system_tracking_interval=None, capture_terminal_logs=False)
  (metric,) = tracked.metrics()
  steps, (values, *_) = metric.data.items_list()
  assert list(zip(steps, values, strict=True)) == WANTED
  assert (tracked.name, metric.name, metric.context.to_dict()) == ('run', 'train[:9]/loss', {})
  tracked.close()


def test_mlflow_and_its_server_going_away(run, tmp_path, monkeypatch, capsys):
  pytest.importorskip('mlflow', reason='mlflow is not installed')
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  address, store = f'http://127.0.0.1:{port}', f'sqlite:///{tmp_path}/mlflow.db'
  command = [
    sys.executable,
    '-m',
    'mlflow',
    'server',
    '--port',
    str(port),
    '--backend-store-uri',
    store,
    '--workers',
    '1',
  ]
  with open('server.log', 'w') as output:
    server = subprocess.Popen(
      [*command, '--workers', '1'], stdout=output, stderr=output, start_new_session=True
    )
  try:
    while server.poll() is None:
      with contextlib.suppress(OSError), urllib.request.urlopen(f'{address}/health'):
        break
      time.sleep(0.2)
    monkeypatch.setenv('MLFLOW_TRACKING_URI', address)
    name = run('mlflow')
    import mlflow

    client = mlflow.MlflowClient()
    assert client.get_experiment_by_name(PROJECT) is not None
    told = client.get_run(name)
    assert (told.info.run_name, told.info.status) == ('run', 'FINISHED')
    history = client.get_metric_history(name, 'train__9_/loss')
    assert sorted((one.step, one.value) for one in history) == WANTED
  finally:
    os.killpg(server.pid, signal.SIGTERM)
    server.wait()
  capsys.readouterr()
  log(tmp_path / 'run', [5, 6], 'mlflow')
  (line,) = [line for line in capsys.readouterr().out.splitlines() if 'warning' in line]
  assert line.startswith('warning: mlflow: ')
