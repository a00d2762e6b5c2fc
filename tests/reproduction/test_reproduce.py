"""`alexnet-flax reproduce`: from nothing to a verdict, on the embedded digits in place of CIFAR-10."""

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys

import pytest

from alexnet_flax.cli.main import main
from alexnet_flax.errors import BusyError, DivergedError, UsageError
from alexnet_flax.reproduction import reproduce as runs
from alexnet_flax.reproduction.claims import CLAIMS, Point
from alexnet_flax.reproduction.figure import draw
from alexnet_flax.reproduction.reproduce import verdict
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


def test_records_say_what_was_run_and_are_not_run_again(tmp_path, monkeypatch, capsys):
  claim, results = CLAIMS['80sec'], tmp_path / 'results' / '80sec.json'
  kept = runs.reproduce(claim, tmp_path / 'runs', results, seeds=1, others=SHORT)
  stored = json.loads(results.read_text())
  assert stored == json.loads(json.dumps({'claim': '80sec', 'runs': kept}))  # tuples are lists in JSON
  (one,) = kept
  assert one['config']['model.variant'] == 'cifar10_80sec'
  assert one['config']['optimizer.weight_decay'] == 0.004
  assert 'data.data_dir' not in one['config']
  assert one['versions']['jax']
  assert one['curve'][-1][0] == pytest.approx(1, abs=0.05)
  monkeypatch.setattr(runs, 'train', None)  # it would be called
  assert 'not trained anew' not in capsys.readouterr().out
  assert runs.reproduce(claim, tmp_path / 'elsewhere', results, seeds=1, others=SHORT) == stored['runs']
  said = f'1 of 1 runs are in {results}, by commit {one["commit"]}: not trained anew'
  assert said in capsys.readouterr().out
  runs.add_records(
    results, '80sec', [one | {'seed': 1, 'config': one['config'] | {'seed': 1}}]
  )  # more seeds than are asked for
  assert runs.reproduce(claim, tmp_path / 'elsewhere', results, seeds=1, others=SHORT) == stored['runs']
  draw(claim, kept, tmp_path / 'figure.svg')


def test_the_command_trains_where_the_ledger_has_records(tmp_path, monkeypatch):
  """In a checkout: what is committed in results/ is not what this machine finds."""
  started = []
  monkeypatch.setattr(runs, 'train', lambda config, place, callbacks: started.append(place) or 1 / 0)
  with pytest.raises(ZeroDivisionError):
    main(['reproduce', '80sec', '--workdir', str(tmp_path), '--seeds', '1'])
  assert started == [tmp_path / '80sec-rate0.001-seed0']


def test_what_is_said_of_an_order(tmp_path, monkeypatch, capsys):
  claim = CLAIMS['ablation']
  records = [
    {
      'arm': arm,
      'seed': seed,
      'config': claim.values(arm, seed, {}),
      'curve': [[6, 0.5, 0.5 - 0.01 * number]],
    }
    for number, arm in enumerate(claim.arms)
    for seed in range(3)
  ]
  about = {'commit': None, 'devices': '1 x cpu', 'versions': {}, 'hours': 1.0}
  runs.add_records(tmp_path / 'ablation.json', 'ablation', [one | about for one in records])
  assert main(['reproduce', 'ablation', '--workdir', str(tmp_path)]) == 0
  assert 'published: the order of 11 changes (Mishkin' in capsys.readouterr().out


def test_runs_and_records_of_another_kind_are_refused(tmp_path, monkeypatch):
  claim, results = CLAIMS['80sec'], tmp_path / 'records' / '80sec.json'
  runs.reproduce(claim, tmp_path, results, seeds=1, others=SHORT)
  with pytest.raises(UsageError, match=r'80sec.json was made with model\.width \(=0\.125\).*remove it'):
    runs.reproduce(claim, tmp_path / 'new', results, seeds=1, others=SHORT | {'model.width': 0.25})
  with pytest.raises(UsageError, match=r'total_epochs \(=1\.0\), and this is 2\.0'):
    runs.reproduce(claim, tmp_path / 'new', results, seeds=1, others=SHORT | {'total_epochs': 2.0})
  for broken in ('{"runs": 3}', '{"runs": [{}]}'):
    results.write_text(broken)
    with pytest.raises(UsageError, match='holds no records of runs'):
      runs.read_records(results)
  about = runs.environment()
  monkeypatch.setattr(runs, 'environment', lambda: about | {'commit': 'another'})
  with pytest.raises(UsageError, match=r'begun by commit .* remove it to begin anew'):
    runs.reproduce(claim, tmp_path, None, seeds=1, others=SHORT)
  monkeypatch.undo()
  with pytest.raises(UsageError, match=r'model\.width'):  # another configuration, of a finished run
    runs.reproduce(claim, tmp_path, None, seeds=1, others=SHORT | {'model.width': 0.25})


def test_a_training_error_is_the_mean_of_the_epochs_steps(tmp_path):
  """Lines of training are weighted by their images: one of a single step counts little."""
  lines = [('train', 0.5, 300), ('test', 0.4, 50), ('train', 1.0, 1), ('train', 0.2, 299), ('test', 0.6, 50)]
  with (tmp_path / 'metrics.jsonl').open('w') as file:
    for step, (split, top1, images) in enumerate(lines):
      about = {'step': step, 'epoch': step / 2, 'split': split, 'seconds': 1, 'images': images}
      file.write(json.dumps(about | {'name': 'top1', 'value': top1}) + '\n')
  first, second = runs._curve(tmp_path)
  assert first == pytest.approx((0.5, 0.5, 0.6))
  assert second == pytest.approx((2.0, (299 * 0.8) / 300, 0.4))


def test_a_rate_is_searched_and_runs_stop_when_they_may(tmp_path, monkeypatch, capsys):
  """An epoch lowers the training error by ten times the rate, by half of that with tanh; trains nothing."""

  def falling(config, place, callbacks):
    place.mkdir(parents=True, exist_ok=True)
    runs.write_json(place / 'config.json', {})
    speed = 10 * config.optimizer.learning_rate / (2 if config.model.activation == 'tanh' else 1)
    for epoch in range(len(runs._curve(place)) + 1, round(config.total_epochs) + 1):
      about = {'step': epoch, 'epoch': epoch, 'seconds': epoch, 'images': 100, 'name': 'top1'}
      with (place / 'metrics.jsonl').open('a') as file:
        for split in ('train', 'test'):
          file.write(json.dumps(about | {'split': split, 'value': 0.1 + epoch * speed}) + '\n')
      for callback in callbacks:
        callback.function(None)

  monkeypatch.setattr(runs, 'train', falling)
  monkeypatch.setattr(
    runs, 'read_environment', lambda place: {'commit': None, 'devices': '1', 'versions': {}}
  )
  claim = dataclasses.replace(CLAIMS['figure1'], rates=(0.001, 0.01, 0.005))
  results, others = tmp_path / 'figure1.json', {'total_epochs': 30.0}
  kept = runs.reproduce(claim, tmp_path / 'runs', results, seeds=2, others=others)
  assert {one['config']['optimizer.learning_rate'] for one in kept} == {0.01}  # which is also the default
  said = capsys.readouterr().out
  assert 'relu: epochs to 25% training error: inf at 0.001, inf at 0.005, 6.5 at 0.01' in said
  assert 'note: relu: the best rate, 0.01, is at the edge of those tried' in said
  assert [(one['arm'], one['seed'], len(one['curve'])) for one in kept] == [
    *(('relu', 0, 7), ('relu', 1, 7)),  # 0.9 - 7 * 0.1 is below 0.25
    *(('tanh', 0, 13), ('tanh', 1, 13)),
  ]
  found = verdict(claim, kept)
  assert (found.mean, found.outcome) == (pytest.approx(2), 'missed')
  # With another seed the rate is not searched again.
  more = runs.reproduce(claim, tmp_path / 'more', results, seeds=3, others=others)
  assert len(more) == 6
  assert sorted(path.name for path in (tmp_path / 'more').iterdir()) == [
    'relu-rate0.01-seed2',
    'tanh-rate0.01-seed2',
  ]
  draw(claim, more, tmp_path / 'figure.svg')
  assert 'tanh, as published' in (tmp_path / 'figure.svg').read_text()


def test_runs_at_which_another_process_is_come_last(tmp_path, monkeypatch):
  busy, made = ['80sec-rate0.001-seed0'], []

  def trained(claim, values, place, give_up=False):
    if place.name in busy:
      busy.remove(place.name)
      raise BusyError('another process trains in it')
    made.append(values['seed'])
    return [Point(10, 0.2, 0.25)]

  monkeypatch.setattr(runs, '_run', trained)
  monkeypatch.setattr(runs, '_WAIT', 0.0)
  claim, results = CLAIMS['80sec'], tmp_path / '80sec.json'
  other = runs.record('80sec', claim.values('80sec', 2, {}), tmp_path, [Point(10, 0.2, 0.25)])
  runs.add_records(results, '80sec', [other])  # what the other process has done
  found = runs.reproduce(claim, tmp_path / 'runs', results, seeds=3, others={})
  assert made == [1, 0]
  assert [one['seed'] for one in found] == [one['seed'] for one in runs.read_records(results)] == [0, 1, 2]


@pytest.mark.parametrize('name', CLAIMS)
def test_every_claim_without_a_file_of_results(name, tmp_path, monkeypatch):
  """As with --quick: all arms, and two seeds."""
  monkeypatch.setattr(runs, '_run', lambda *_, **__: [Point(10, 0.2, 0.25)])
  claim = CLAIMS[name]
  found = runs.reproduce(claim, tmp_path, None, seeds=2, others=runs.QUICK)
  assert {(one['arm'], one['seed']) for one in found} == {
    (arm, seed) for arm in claim.arms for seed in (0, 1)
  }
  draw(claim, found, tmp_path / 'figure.svg')


@pytest.mark.parametrize('curve', [[], [[1, 2]], [['a', 0.5, 0.5]], [3]])
def test_records_of_broken_curves(curve, tmp_path):
  about = {'arm': '80sec', 'seed': 0, 'config': {}, 'versions': {}, 'hours': 1.0}
  (tmp_path / '80sec.json').write_text(json.dumps({'runs': [about | {'curve': curve}]}))
  with pytest.raises(UsageError, match='holds no records of runs'):
    runs.read_records(tmp_path / '80sec.json')


def test_a_run_that_diverges_does_not_end_the_others(tmp_path, monkeypatch, capsys):
  def trained(claim, values, place, give_up=False):
    if values['seed'] == 1:
      raise DivergedError('the loss is nan')
    return [Point(10, 0.2, 0.25)]

  monkeypatch.setattr(runs, '_run', trained)
  with pytest.raises(DivergedError):
    runs.reproduce(CLAIMS['80sec'], tmp_path, tmp_path / 'results.json', seeds=3, others={})
  assert [one['seed'] for one in runs.read_records(tmp_path / 'results.json')] == [0, 2]
  assert capsys.readouterr().out == '80sec, seed 1: the loss is nan\n'


def test_two_processes_add_to_one_file(tmp_path):
  def one(seed, arm='80sec', hours=1.0):
    about = {'config': {}, 'versions': {}, 'hours': hours, 'curve': [[1, 0.5, 0.5]]}
    return {'arm': arm, 'seed': seed, **about}

  path = tmp_path / 'new' / '80sec.json'
  runs.add_records(path, '80sec', [])
  runs.write_json(path, runs.read_json(path) | {'remark': 'by hand'})
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda seed: runs.add_records(path, '80sec', [one(seed)]), range(20)))
  runs.add_records(path, '80sec', [one(3, hours=2.0), one(3, 'other')])
  found = {(line['arm'], line['seed']): line['hours'] for line in runs.read_records(path)}
  assert found == {('80sec', seed): 1.0 for seed in range(20)} | {('80sec', 3): 2.0, ('other', 3): 1.0}
  assert runs.read_json(path)['remark'] == 'by hand'


def test_what_may_go_wrong(tmp_path, monkeypatch, capsys):
  assert main(['reproduce', '--list']) == 0
  listed = capsys.readouterr().out
  assert all(name in listed for name in CLAIMS)
  monkeypatch.chdir(tmp_path)
  for words, message in (
    (['reproduce', '80secs'], "did you mean '80sec'"),
    (['reproduce'], 'name a published result: 80sec'),
    (['reproduce', '80sec', '--seeds', '0'], 'must be at least 1'),
    (['reproduce', '80sec', '--workdir', __file__], 'cannot write to --workdir'),
    (['reproduce', '80sec', '--data_dir', str(tmp_path)], 'alexnet-flax prepare cifar10'),
  ):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
  assert not (tmp_path / 'results').exists()
