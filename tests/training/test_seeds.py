"""Several seeds in one program: each is the run that it would be alone."""

import json

import jax
import numpy as np
import pytest

from alexnet_flax import checkpoint, steps
from alexnet_flax.cli.main import main as cli
from alexnet_flax.cli.train import main
from alexnet_flax.errors import DivergedError, PreemptedError, UsageError
from alexnet_flax.training import callbacks, seeds, train
from alexnet_flax.training.logger import read_metrics
from tests.helpers import SMALL, TINY, replace

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def tiny(data_dir):
  return replace(TINY, data={'data_dir': data_dir}, total_steps=4)


def measured(folder):
  names = ('step', 'split', 'name', 'value', 'images')
  lines = [line for line in read_metrics(folder) if line['name'] != 'images_per_second']
  return [tuple(line[name] for name in names) for line in lines]


def test_each_seed_is_the_run_that_it_would_be_alone(tiny, tmp_path, capsys):
  # What depends on the seed: the order, the views, dropout, the initial parameters, the chosen examples.
  config = replace(tiny, seed=3, num_seeds=2, data={'examples_per_class': 3, 'corruption': 'random_labels'})
  values = train.train(config, tmp_path / 'both')
  said = capsys.readouterr().out
  assert 'seed 3: training' in said
  assert 'seed 4: done: 4 steps' in said
  assert '2 seeds: test[:37]: top1 ' in said
  tops = []
  for seed in (3, 4):
    alone, place = tmp_path / f'alone {seed}', tmp_path / 'both' / f'seed-{seed}'
    tops.append(train.train(replace(config, seed=seed, num_seeds=1), alone)['top1'])
    assert measured(place) == measured(alone) != []
    one, other = (
      jax.device_get(checkpoint.checkpoint_manager(folder / 'checkpoints', 3).restore(4)['params'])
      for folder in (place, alone)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    written = [json.loads((folder / 'config.json').read_text()) for folder in (place, alone)]
    assert written[0] == written[1]
  assert values['top1'] == pytest.approx(np.mean(tops))
  assert measured(tmp_path / 'both/seed-3') != measured(tmp_path / 'both/seed-4')


def test_one_program_for_all_seeds_makes_the_same_steps(tiny, tmp_path, monkeypatch):
  """As on GPUs and TPUs: `vmap` over the states."""
  config = replace(tiny, num_seeds=3, model={'variant': 'batchnorm'}, total_steps=3)
  train.train(config, tmp_path / 'each')
  shapes = []
  monkeypatch.setattr(train, 'steps_maker', lambda experiment, count: seeds.joint_steps(experiment))
  original = jax.vmap
  monkeypatch.setattr(jax, 'vmap', lambda function: original(lambda *a: shapes.append(1) or function(*a)))
  train.train(config, tmp_path / 'together')
  assert len(shapes) == 1  # traced once, and used
  for seed in range(3):
    lines = [measured(tmp_path / folder / f'seed-{seed}') for folder in ('each', 'together')]
    assert [line[:3] for line in lines[0]] == [line[:3] for line in lines[1]]
    np.testing.assert_allclose(*([line[3] for line in found] for found in lines), rtol=2e-3, atol=2e-3)


def test_seeds_go_on_from_where_each_was(tiny, tmp_path):
  config = replace(tiny, num_seeds=2, optimizer={'schedule': 'constant'}, checkpoint_every_steps=1)
  train.train(replace(config, total_steps=2), tmp_path / 'runs')
  checkpoint.checkpoint_manager(tmp_path / 'runs/seed-1/checkpoints', 3).delete(2)
  train.train(replace(config, num_seeds=3), tmp_path / 'runs')  # and one more
  for seed in range(3):
    train.train(replace(config, seed=seed, num_seeds=1), tmp_path / f'{seed}')
    assert measured(tmp_path / f'runs/seed-{seed}')[-3:] == measured(tmp_path / f'{seed}')[-3:]
  finished = train.train(replace(config, num_seeds=3), tmp_path / 'runs')
  assert set(finished) == {'loss', 'top1', 'top5'}


def test_a_seed_that_diverges_does_not_end_the_others(tiny, tmp_path, monkeypatch):
  original = steps.train_step
  its_key = jax.random.key_data(jax.random.fold_in(jax.random.key(1), 1))  # as in training.loop

  def poisoned(state, batch, key, **options):
    preprocess, is_seed_1 = options.pop('preprocess'), jax.numpy.all(jax.random.key_data(key) == its_key)

    def broken(batch, key):
      out = preprocess(batch, key)
      return out | {'image': jax.numpy.where(is_seed_1 & (state.step == 1), jax.numpy.inf, out['image'])}

    return original(state, batch, key, preprocess=broken, **options)

  monkeypatch.setattr(steps, 'train_step', poisoned)
  with pytest.raises(DivergedError, match=r'seed-1/failures/2'):
    train.train(replace(tiny, num_seeds=3, log_every_steps=1), tmp_path)
  lengths = [max(line[0] for line in measured(tmp_path / f'seed-{seed}')) for seed in range(3)]
  assert lengths[0] == lengths[2] == 4
  assert lengths[1] < 4


def test_all_seeds_are_saved_when_the_run_is_stopped(tiny, tmp_path, monkeypatch):
  shutdown = []

  def stop(progress):
    if progress.step == 2:
      shutdown[0].requested = True

  original = train.GracefulShutdown
  monkeypatch.setattr(train, 'GracefulShutdown', lambda: shutdown.append(original()) or shutdown[0])
  with pytest.raises(PreemptedError, match='of 4, as asked'):
    train.train(replace(tiny, num_seeds=2), tmp_path, [callbacks.Callback(stop, (1.0,))])
  saved = [
    checkpoint.latest_whole(tmp_path / f'seed-{seed}/checkpoints', tmp_path / 'damaged', print)
    for seed in range(2)
  ]
  assert all(step in (2, 3) for step in saved)
  monkeypatch.undo()
  train.train(replace(tiny, num_seeds=2), tmp_path)
  assert [max(line[0] for line in measured(tmp_path / f'seed-{seed}')) for seed in range(2)] == [4, 4]


def test_what_does_not_go_together(tiny, tmp_path, monkeypatch):
  train.train(replace(tiny, total_steps=1), tmp_path / 'one')
  with pytest.raises(UsageError, match=r'one holds the run of one seed, not of num_seeds=2; use another'):
    train.train(replace(tiny, num_seeds=2), tmp_path / 'one')
  train.train(replace(tiny, num_seeds=2, total_steps=1), tmp_path / 'two [1]')
  with pytest.raises(UsageError, match='holds the runs of several seeds'):
    train.train(tiny, tmp_path / 'two [1]')
  with pytest.raises(UsageError, match=r'num_seeds \(=2\) needs one process and mesh\.model=1'):
    train.train(replace(tiny, num_seeds=2, mesh={'model': 2}), tmp_path / 'three')
  with pytest.raises(UsageError, match=r'num_seeds \(=2\) from seed=4294967295 on go beyond'):
    train.train(replace(tiny, num_seeds=2, seed=2**32 - 1), tmp_path / 'three')
  with pytest.raises(UsageError, match=r'profile_steps \(=2\) traces one run; train it with num_seeds=1'):
    train.train(replace(tiny, num_seeds=2, profile_steps=2), tmp_path / 'three')
  assert not (tmp_path / 'three').exists()


@pytest.mark.parametrize(
  'maker', [seeds.steps_maker, lambda experiment, count: seeds.joint_steps(experiment)]
)
def test_linear_probes(tiny, tmp_path, monkeypatch, maker):
  monkeypatch.setattr(train, 'steps_maker', maker)
  transfer = {'source': 'random', 'mode': 'linear_probe'}
  config = replace(tiny, num_seeds=2, transfer=transfer, total_steps=2, optimizer={'schedule': 'constant'})
  assert set(train.train(config, tmp_path)) == {'loss', 'top1', 'top5'}
  assert measured(tmp_path / 'seed-0') != measured(tmp_path / 'seed-1')


def test_a_finished_seed_without_its_log(tiny, tmp_path, capsys):
  config = replace(tiny, num_seeds=2)
  train.train(config, tmp_path)
  (tmp_path / 'seed-1' / 'metrics.jsonl').unlink()
  capsys.readouterr()
  assert set(train.train(config, tmp_path)) == {'loss', 'top1', 'top5'}
  assert 'nan' not in capsys.readouterr().out


def test_a_stopped_run_is_asked_to_go_on_although_a_seed_diverged(capsys):
  experiments = [
    type('Of', (), {'config': replace(TINY, seed=seed), 'eval_split': 'test'}) for seed in (5, 6)
  ]
  ended = [DivergedError('the loss is nan'), PreemptedError('ended at step 2 of 4')]
  with pytest.raises(PreemptedError):
    train._summary(experiments, ended, 'runs')
  assert capsys.readouterr().out == 'seed 5: the loss is nan\nseed 6: ended at step 2 of 4\n'


def test_the_folder_of_all_seeds_is_no_run(tiny, tmp_path, capsys):
  train.train(replace(tiny, num_seeds=2, total_steps=1), tmp_path / 'two')
  capsys.readouterr()
  for words in (['convert', str(tmp_path / 'two'), 'a.safetensors'], ['report', str(tmp_path / 'two')]):
    assert cli(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f'holds the runs of several seeds; name them: {tmp_path}/two/seed-0 {tmp_path}/two/seed-1' in line


def test_the_command(data_dir, tmp_path, capsys):
  flags = [f'--config.data.data_dir={data_dir}', '--config.total_steps=3', '--config.num_seeds=2']
  flags += ['--config.report=True', f'--workdir={tmp_path}/ä [1]']
  assert main(['train.py', *SMALL, *flags]) == 0
  page = (tmp_path / 'ä [1]/report.html').read_text()
  assert all(f'seed-{seed}' in page for seed in range(2))
  before = (tmp_path / 'ä [1]/report.html').stat().st_mtime_ns
  assert main(['train.py', *SMALL, *flags]) == 0
  assert (tmp_path / 'ä [1]/report.html').stat().st_mtime_ns == before
