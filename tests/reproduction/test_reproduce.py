"""`alexnet-flax reproduce`: from nothing to a verdict, on the embedded digits in place of CIFAR-10."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from alexnet_flax.cli.main import main
from alexnet_flax.errors import UsageError
from alexnet_flax.reproduction import reproduce as runs
from alexnet_flax.reproduction.claims import CLAIMS, Search
from alexnet_flax.reproduction.figure import draw
from alexnet_flax.training.logger import read_metrics

pytestmark = pytest.mark.usefixtures('standard_promotion')


def test_80sec_learns_the_digits(tmp_path):
  """The recipe, reduced: at most 15 % of the held-out digits are wrong after six epochs (90 % by chance)."""
  folder = tmp_path / '[1] 数字'
  command = [sys.executable, '-m', 'alexnet_flax', 'reproduce', '80sec', '--quick', '--seeds', '1']
  command += ['--workdir', str(folder)]
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}  # one device
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  assert 'which is no verdict' in done.stdout
  (place,) = (path for path in folder.iterdir() if path.is_dir())
  top1 = [line['value'] for line in read_metrics(place) if (line['split'], line['name']) == ('test', 'top1')]
  assert top1[-1] > 0.85
  assert (folder / '80sec.svg').read_text().count('<path') > 2
  # A second time nothing is trained.
  log = (place / 'metrics.jsonl').read_bytes()
  subprocess.run(command, env=environment, capture_output=True, check=True)
  assert (place / 'metrics.jsonl').read_bytes() == log


SHORT = runs.QUICK | {'total_epochs': 1.0, 'model.width': 0.125, 'optimizer.boundary_epochs': (0.5,)}


def test_records_say_what_was_run_and_are_not_run_again(tmp_path, monkeypatch):
  claim, results = CLAIMS['80sec'], tmp_path / 'results' / '80sec.json'
  kept = runs.reproduce(claim, tmp_path / 'runs', results, seeds=1, others=SHORT)
  stored = json.loads(results.read_text())
  assert stored == {'claim': '80sec', 'runs': kept}
  (one,) = kept
  assert one['config']['model.variant'] == 'cifar10_80sec'
  assert one['config']['optimizer.weight_decay'] == 0.004
  assert 'data.data_dir' not in one['config']
  assert one['versions']['jax']
  assert one['curve'][-1][0] == pytest.approx(1, abs=0.05)
  monkeypatch.setattr(runs, 'train', None)  # it would be called
  assert runs.reproduce(claim, tmp_path / 'elsewhere', results, seeds=1, others=SHORT) == kept
  draw(claim, kept, tmp_path / 'figure.svg')


def test_a_run_of_another_commit_is_refused(tmp_path, monkeypatch):
  claim = CLAIMS['80sec']
  runs.reproduce(claim, tmp_path, None, seeds=1, others=SHORT)
  about = runs.environment()
  monkeypatch.setattr(runs, 'environment', lambda: about | {'commit': 'another'})
  with pytest.raises(UsageError, match=r'begun by commit .* remove that folder to begin anew'):
    runs.reproduce(claim, tmp_path, None, seeds=1, others=SHORT)
  monkeypatch.undo()
  with pytest.raises(UsageError, match=r'model\.width'):  # another configuration, of a finished run
    runs.reproduce(claim, tmp_path, None, seeds=1, others=SHORT | {'model.width': 0.25})


def test_a_rate_is_searched_and_runs_stop_when_they_may(tmp_path):
  """The greater rate reaches 70 % training error in fewer epochs; seeds stop there, not after ten epochs."""
  claim = dataclasses.replace(CLAIMS['figure1'], until=0.7, search=Search((1e-6, 0.002), 0.7))
  others = runs.QUICK | {'total_epochs': 8.0, 'model.width': 0.25}
  results = tmp_path / 'figure1.json'
  kept = runs.reproduce(claim, tmp_path / 'runs', results, seeds=1, others=others)
  assert {one['arm']: one['config']['optimizer.learning_rate'] for one in kept} == {
    'relu': 0.002,
    'tanh': 0.002,
  }
  for one in kept:
    assert one['curve'][-1][1] <= 0.7
    assert len(one['curve']) < 8
  draw(claim, kept, tmp_path / 'figure.svg')


def test_what_may_go_wrong(tmp_path, monkeypatch, capsys):
  assert main(['reproduce', '--list']) == 0
  listed = capsys.readouterr().out
  assert all(name in listed for name in CLAIMS)
  monkeypatch.chdir(tmp_path)
  for words, message in (
    (['reproduce', '80secs'], "did you mean '80sec'"),
    (['reproduce'], 'name a published result: 80sec'),
    (['reproduce', '80sec', '--seeds', '0'], 'must be at least 1'),
    (['reproduce', '80sec', '--data_dir', str(tmp_path)], 'alexnet-flax prepare cifar10'),
  ):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
  assert not (tmp_path / 'results').exists()
