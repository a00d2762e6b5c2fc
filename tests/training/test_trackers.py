"""Trackers: what they are told and when, and that a run outlives them. tests/parity has the real ones."""

import json
from importlib import metadata

import jax.numpy as jnp
import pytest

from alexnet_flax.cli.train import main
from alexnet_flax.config import Config, all_keys
from alexnet_flax.metrics import Metrics
from alexnet_flax.training import trackers
from alexnet_flax.training.logger import Logger, read_metrics
from alexnet_flax.training.train import train
from tests.helpers import SMALL, TINY, replace


class Fake:
  """A tracker that remembers its calls; it refuses the step `fails_at`."""

  def __init__(self):
    self.calls, self.fails_at = [], None

  def open(self, name, id, config):
    id = id or f'{name}-1'
    self.calls.append(('open', name, id, config.get('seed')))
    return trackers.Tracked(id, lambda *told: self.log(id, *told), lambda end: self.calls.append((id, end)))

  def log(self, id, step, values):
    if step == self.fails_at:
      raise ConnectionError('the server\nis gone')
    self.calls.append((id, step, dict(values)))


@pytest.fixture
def fake(monkeypatch):
  tracker = Fake()
  monkeypatch.setitem(trackers.TRACKERS, 'aim', tracker.open)
  monkeypatch.setattr(trackers, 'check_installed', lambda name: None)
  return tracker


def log(folder, steps, total=9, tracker='aim', is_writer=True):
  """Logs some steps of a run that goes on after the step before them, and two evaluations."""
  logger = Logger(folder, steps[0] - 1, total, 1, is_writer, tracker=tracker)
  for step in steps:
    metrics = Metrics({'loss': jnp.array(step / 2)}, jnp.array(1.0))
    logger.write(step, 'train', metrics, learning_rate=0.5)
    if step in (2, 4):
      logger.write(step, 'test', metrics)
  logger.close()


def test_the_choices_are_the_trackers():
  assert all_keys()['tracker'].choices == ['none', *trackers.TRACKERS]
  assert Config().tracker == 'none'


def test_a_resumed_run_is_the_same_run_and_no_step_comes_twice(tmp_path, fake):
  folder = tmp_path / 'run'
  folder.mkdir()
  log(folder, [1, 2, 3, 4])
  log(folder, [3, 4, 5])  # killed after step 4, whose last checkpoint is of step 2
  log(folder, range(6, 10))
  opened, logged = (
    [call for call in fake.calls if (call[0] == 'open') == opening] for opening in (True, False)
  )
  assert opened == [('open', 'run', 'run-1', None)] * 3
  steps = [(call[1], next(iter(call[2])).partition('/')[0]) for call in logged if len(call) == 3]
  assert steps == [(1, 'train'), (2, 'train'), (2, 'test'), (3, 'train'), (4, 'train'), (4, 'test')] + [
    (step, 'train') for step in range(5, 10)
  ]
  assert ('run-1', 2, {'train/loss': 1.0, 'train/learning_rate': 0.5}) in logged
  assert [call[1] for call in logged if len(call) == 2] == [False, False, True]  # whether the run is complete


def test_a_tracker_that_fails_costs_one_line(tmp_path, fake, capsys):
  fake.fails_at = 3
  log(tmp_path, [1, 2, 3, 4])
  warnings = [line for line in capsys.readouterr().out.splitlines() if 'warning' in line]
  assert warnings == [
    'warning: aim: the server is gone; the run goes on without it, and metrics.jsonl has all'
  ]
  assert max(line['step'] for line in read_metrics(tmp_path)) == 4
  fake.fails_at = None
  log(tmp_path, [5, 6])  # which begins with what is missing
  assert [call[1] for call in fake.calls if len(call) == 3 and 'train/loss' in call[2]] == [1, 2, 3, 4, 5, 6]
  (tmp_path / trackers.FILE).write_text('[')
  log(tmp_path, [7])
  assert 'tracker.json is broken' in capsys.readouterr().out


def test_of_several_processes_one_tracks(tmp_path, fake):
  log(tmp_path, [1, 2], is_writer=False)
  assert fake.calls == []


@pytest.mark.usefixtures('standard_promotion')
def test_each_seed_is_a_run_of_its_own(tmp_path, data_dir, fake):
  config = replace(TINY, data={'data_dir': data_dir}, total_steps=2, eval_every_steps=2, log_every_steps=1)
  train(replace(config, num_seeds=2, tracker='aim'), tmp_path / 'runs')
  for seed in (0, 1):
    name, folder = f'runs-seed-{seed}-1', tmp_path / f'runs/seed-{seed}'
    assert ('open', f'runs-seed-{seed}', name, seed) in fake.calls
    assert (name, True) in fake.calls
    told = {
      (step, key): value
      for id, step, values in [call for call in fake.calls if len(call) == 3]
      for key, value in values.items()
      if id == name
    }
    assert told == {(x['step'], f'{x["split"]}/{x["name"]}'): x['value'] for x in read_metrics(folder)}
    assert json.loads((folder / trackers.FILE).read_text())['aim'] == [name, {'train': 2, 'test[:37]': 2}]


def test_what_cannot_be_is_said_before_the_work(tmp_path, data_dir, monkeypatch, capsys):
  def absent(name):
    raise metadata.PackageNotFoundError(name)

  monkeypatch.setattr(metadata, 'distribution', absent)
  flags = [*SMALL, f'--config.data.data_dir={data_dir}', f'--workdir={tmp_path}/run']
  for value, message in [
    ('mlflow', "tracker=mlflow needs mlflow, which is not installed: pip install -e '"),
    ('wandbb', "unknown value of tracker: 'wandbb'; did you mean 'wandb'?"),
  ]:
    assert main(['train.py', *flags, f'--config.tracker={value}']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
  assert not (tmp_path / 'run').exists()
