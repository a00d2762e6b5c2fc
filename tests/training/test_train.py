"""The loop: what it writes, when, that it resumes to the same bits, and every foreseeable mistake."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

import alexnet_flax
from alexnet_flax import checkpoint
from alexnet_flax.cli import main as cli
from alexnet_flax.cli.train import main
from alexnet_flax.config import Config
from alexnet_flax.errors import DivergedError, UsageError
from alexnet_flax.metrics import Metrics
from alexnet_flax.optim import OptimizerConfig
from alexnet_flax.training import callbacks, logger, train, workdir
from alexnet_flax.training.experiment import build_experiment
from tests.helpers import TINY, encode, replace, smooth_image

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def tiny(data_dir):
  return replace(TINY, data={'data_dir': data_dir})


def params(folder, step):
  manager = checkpoint.checkpoint_manager(folder / 'checkpoints', 3)
  return jax.device_get(manager.restore(step)['params'])


def test_a_run_writes_its_folder(tiny, tmp_path, capsys):
  config = replace(tiny, optimizer={'ema_decay': 0.9, 'accumulate_steps': 2}, log_every_steps=4)
  values = train.train(config, tmp_path)
  assert set(values) == {'loss', 'top1', 'top5'}
  lines = logger.read_metrics(tmp_path)
  assert {tuple(line) for line in lines} == {('step', 'epoch', 'split', 'name', 'value', 'seconds', 'images')}
  evaluated = [line for line in lines if line['split'] == 'test[:37]']
  assert {line['step'] for line in evaluated} == {5, 10}
  assert {line['images'] for line in evaluated} == {37}
  assert {line['epoch'] for line in evaluated} == {1.0, 2.0}
  trained = [line for line in lines if line['split'] == 'train']
  assert {line['name'] for line in trained} == {
    'loss', 'top1', 'top5', 'learning_rate', 'images_per_second'
  }  # fmt: skip
  counted = {line['step']: line['images'] for line in trained}
  assert counted == {4: 64, 5: 16, 8: 48, 10: 32}
  last = [line['value'] for line in evaluated if line['step'] == 10 and line['name'] == 'top1']
  assert last == [values['top1']]
  assert values['top1'] * 37 == pytest.approx(round(values['top1'] * 37), abs=1e-9)

  written = json.loads((tmp_path / 'config.json').read_text())
  assert written['model']['num_classes'] == 10
  assert written['total_steps'] == 10
  assert written['data']['eval_batch_size'] == 24
  assert set(written) == {field.name for field in dataclasses.fields(Config)}
  assert list(tmp_path.glob('events.*'))
  out = capsys.readouterr().out
  assert 'step 10/10 epoch 2.00 test[:37]: loss' in out
  assert out.splitlines()[-1].startswith('done: 10 steps (2.0 epochs)')
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['10', '5']


def test_tensorboard_reads_the_events_at_once(tmp_path):
  """A kill after a checkpoint may not take what TensorBoard was to show of the steps before it."""
  from tensorflow.python.summary.summary_iterator import summary_iterator

  log = logger.Logger(tmp_path, first_step=2, total_steps=5, steps_per_epoch=1, is_writer=True)
  log.write(3, 'train', Metrics({'loss': np.float32(6.0)}, np.float32(4.0)))
  (path,) = tmp_path.glob('events.*')
  first, start, event = summary_iterator(str(path))
  log.close()
  assert first.file_version == 'brain.Event:2'
  assert (start.step, start.session_log.status) == (3, start.session_log.START)
  assert (event.step, event.summary.value[0].tag, event.summary.value[0].simple_value) == (
    3,
    'train/loss',
    1.5,
  )


def test_a_resumed_run_ends_with_the_same_bits(tiny, tmp_path, capsys):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  config = replace(tiny, optimizer={'schedule': 'constant'}, checkpoint_every_steps=3)
  train.train(config, whole)
  train.train(replace(config, total_steps=6), parts)
  capsys.readouterr()
  train.train(config, parts)
  out = capsys.readouterr().out
  assert 'note: total_steps was 6 in this run so far, and is 10 from here on' in out
  assert workdir.read_history(parts) == [{'step': 6, 'changes': {'total_steps': [6, 10]}}]
  assert 'resuming batchnorm' in out
  assert 'steps 7 to 10' in out
  jax.tree.map(np.testing.assert_array_equal, params(whole, 10), params(parts, 10))
  keys = [(line['step'], line['split'], line['name']) for line in logger.read_metrics(parts)]
  assert len(keys) == len(set(keys))
  final = [
    [line['value'] for line in logger.read_metrics(folder) if line['step'] == 10 and line['name'] == 'top1']
    for folder in (whole, parts)
  ]
  assert final[0] == final[1]


def test_lines_beyond_the_checkpoint_are_written_anew(tmp_path):
  common = {'split': 'train', 'name': 'loss', 'value': 2.0, 'images': 4}
  lines = [common | {'step': step, 'seconds': step / 2} for step in (1, 2, 3)]
  text = ''.join(json.dumps(line) + '\n' for line in lines) + '{"step": 4, "cut sho'
  (tmp_path / 'metrics.jsonl').write_text(text)
  log = logger.Logger(tmp_path, first_step=2, total_steps=5, steps_per_epoch=1, is_writer=True)
  log.write(3, 'train', Metrics({'loss': np.float32(6.0)}, np.float32(4.0)))
  log.close()
  read = logger.read_metrics(tmp_path)
  assert [line['step'] for line in read] == [1, 2, 3]
  assert (read[-1]['value'], read[-1]['images']) == (1.5, 4)
  assert read[-1]['seconds'] >= 1.0


def test_callbacks_see_the_run_at_their_periods(tiny, tmp_path):
  seen = []
  config = replace(tiny, log_every_steps=3)
  callback = callbacks.Callback(
    lambda progress: seen.append((progress.step, len(progress.window.metrics))), periods=(2.0,), steps=(3,)
  )
  alexnet_flax.train(config, tmp_path, [callback])
  # Windows end with the log lines: every third step, and with the evaluation and checkpoint of step 5.
  assert seen == [(2, 2), (3, 3), (4, 1), (6, 1), (8, 2), (10, 1)]
  with pytest.raises(ValueError, match='needs periods or steps'):
    callbacks.Callback(print)
  with pytest.raises(ValueError, match=r'periods \(=\(0,\)\) must be more than 0'):
    callbacks.Callback(print, periods=(0,))


def test_a_configuration_made_by_hand_is_checked(tmp_path):
  with pytest.raises(UsageError, match=r"value of optimizer\.name: 'adam'; did you mean 'adamw'"):
    alexnet_flax.train(Config(optimizer=OptimizerConfig(name='adam')), tmp_path)


def test_a_finished_run_is_left_as_it_was(tiny, tmp_path, capsys):
  config = replace(tiny, total_steps=2)
  first = train.train(config, tmp_path)
  files = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(tmp_path.rglob('*'))}
  capsys.readouterr()
  assert train.train(config, tmp_path) == first
  said = capsys.readouterr().out.splitlines()
  assert said[-2] == f'the run in {tmp_path} is finished; nothing is trained, and its files stay as they are'
  assert said[-1].startswith('done: 2 steps')
  for other, keys in (
    (replace(config, optimizer={'learning_rate': 0.5}), r'optimizer.learning_rate \(=0.5\) was 0.02'),
    (
      replace(config, data={'eval_split': 'test[:24]'}),
      r"data.eval_split \(='test\[:24\]'\) was 'test\[:37\]'",
    ),
    (replace(config, seed=3, report=True), r'report \(=True\) was False'),
  ):
    with pytest.raises(UsageError, match=rf'is finished, and .*{keys}; use another --workdir'):
      train.train(other, tmp_path)
  assert {
    path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(tmp_path.rglob('*'))
  } == files
  files_of_run = json.loads((tmp_path / 'local.json').read_text())
  (tmp_path / 'local.json').write_text(json.dumps({'data_dir': f'/elsewhere/{files_of_run["data_dir"]}'}))
  with pytest.raises(
    UsageError, match=r'is finished, and data.data_dir \(='
  ):  # the same name, another folder
    train.train(config, tmp_path)
  (tmp_path / 'local.json').write_text(json.dumps(files_of_run))
  with pytest.raises(UsageError, match='has been trained for 2 steps, more than the 1 asked for'):
    train.train(replace(config, total_steps=1), tmp_path)


def test_each_step_is_compiled_once(tiny, tmp_path, caplog):
  config = replace(tiny, total_steps=4, checkpoint_every_steps=2, eval_every_steps=2)
  with jax.log_compiles(), caplog.at_level('WARNING'):
    train.train(config, tmp_path)
  compiled = re.findall(r'Finished XLA compilation of jit\((\w+)\)', caplog.text)
  assert [compiled.count(name) for name in ('guarded_step', 'eval_step')] == [1, 1]


def test_the_history_of_a_configuration(tmp_path, capsys):
  (tmp_path / 'a').mkdir()
  write = lambda config, step: workdir.write_records(tmp_path / 'a', config, ['x', 'y'], step)  # noqa: E731
  write(TINY, 0)
  write(TINY, 4)
  assert not (tmp_path / 'a' / workdir.HISTORY).exists()
  write(replace(TINY, data={'crop_scale': (0.5, 1.0)}), 4)
  assert 'note: data.crop_scale was [0.7, 1.0] in this run so far' in capsys.readouterr().out
  first = {'step': 4, 'changes': {'data.crop_scale': [[0.7, 1.0], [0.5, 1.0]]}}
  assert workdir.read_history(tmp_path / 'a') == [first]
  write(replace(TINY, data={'crop_scale': (0.5, 1.0)}, seed=1), 8)
  assert workdir.read_history(tmp_path / 'a') == [first, {'step': 8, 'changes': {'seed': [0, 1]}}]
  # The checkpoint of step 8 is gone: what changed there has never been.
  write(replace(TINY, data={'crop_scale': (0.5, 1.0)}), 6)
  assert workdir.read_history(tmp_path / 'a') == [first]
  write(replace(TINY, seed=2), 2)
  assert workdir.read_history(tmp_path / 'a') == [{'step': 2, 'changes': {'seed': [0, 2]}}]
  write(TINY, 0)  # from the start
  assert workdir.read_history(tmp_path / 'a') == []


def test_other_images_and_another_source_of_transfer_are_part_of_the_history(tmp_path):
  def write(source, images, step):
    config = replace(TINY, transfer={'source': source})
    workdir.write_records(tmp_path, config, ['x', 'y'], step, images)
    return workdir.read_history(tmp_path)

  assert write('/here/x.pth', '8 of ab', 0) == []
  assert write('/here/x.pth', '8 of ab', 2) == []
  changed = {'step': 4, 'changes': {'training images': ['8 of ab', '9 of cd']}}
  assert write('/here/x.pth', '9 of cd', 4) == [changed]
  elsewhere = {'step': 6, 'changes': {'transfer.source': ['.../x.pth', '.../x.pth']}}
  assert write('/there/x.pth', '9 of cd', 6) == [changed, elsewhere]
  local = json.loads((tmp_path / 'local.json').read_text())
  (tmp_path / 'local.json').write_text(json.dumps({'data_dir': local['data_dir']}))  # of an earlier version
  assert write('/here/x.pth', '1 of ef', 8) == [changed, elsewhere]


def test_a_published_name_is_the_same_source_in_every_folder(tmp_path, monkeypatch):
  for step in (0, 2):
    (tmp_path / str(step)).mkdir()
    monkeypatch.chdir(tmp_path / str(step))
    workdir.write_records(tmp_path, replace(TINY, transfer={'source': 'torchvision'}), ['x', 'y'], step)
  assert workdir.read_history(tmp_path) == []


def test_the_latest_checkpoints_and_the_best_are_kept(tiny, tmp_path):
  """With accuracy that falls, Orbax's own `max_to_keep` with `best_fn` would drop the latest."""
  run = build_experiment(tiny)
  state = run.steps.init()
  manager = checkpoint.checkpoint_manager(tmp_path, keep=2)
  for step, top1 in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6), (5, None), (6, 0.4)):
    state = state.replace(step=state.step + 1)
    checkpoint.save(manager, state, None if top1 is None else {'top1': top1, 'loss': 1.0})
    assert state.step == step
  manager.wait_until_finished()
  assert sorted(manager.all_steps()) == [2, 5, 6]
  assert manager.latest_step() == 6
  manager.close()
  reopened = checkpoint.checkpoint_manager(tmp_path, keep=2)
  restored = checkpoint.restore(reopened, 6, run.state)
  assert restored.step == 6
  jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)


def test_a_checkpoint_of_another_network(tiny, tmp_path):
  train.train(replace(tiny, total_steps=1), tmp_path)
  before = sorted(path for path in tmp_path.rglob('*'))
  cases = [
    ({'width': 1 / 8}, r'params/\w+/(bias|kernel) is float32\[\d+.*\] there and float32\[\d+.*\] in this'),
    (
      {'variant': 'torchvision', 'image_size': 67, 'batch_norm_momentum': None},
      'in this configuration; use another --workdir',
    ),
  ]
  for model, message in cases:
    with pytest.raises(UsageError, match=message):
      train.train(replace(tiny, model=model, total_steps=2), tmp_path)
  with pytest.raises(UsageError, match=r'ema/.* is absent there'):
    train.train(replace(tiny, optimizer={'ema_decay': 0.9}, total_steps=2), tmp_path)
  assert sorted(path for path in tmp_path.rglob('*')) == before


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
  config = replace(
    tiny,
    optimizer={'learning_rate': 1e30, 'schedule': 'constant'},
    checkpoint_every_steps=1,
    log_every_steps=1,
  )
  with pytest.raises(
    DivergedError, match=r'the update is not finite at step 1 \(learning rate 1e\+30\); the state before it'
  ):
    train.train(config, tmp_path)
  # The first loss is finite, and its update breaks the parameters: that state may not be saved.
  assert not list((tmp_path / 'checkpoints').iterdir())
  train.train(replace(tiny, total_steps=2), tmp_path)


def test_a_loss_that_is_not_finite_is_named_with_its_step(tiny, tmp_path):
  config = replace(
    replace(tiny, transfer={'layer': None}),
    optimizer={'learning_rate': 1e15, 'schedule': 'constant', 'momentum': 0.0, 'weight_decay': 0.0},
  )
  with pytest.raises(DivergedError, match=r'the loss is (nan|inf) at step [23] '):
    train.train(config, tmp_path)


def test_evaluating_the_training_split_is_told_from_training(tiny, tmp_path):
  config = replace(tiny, data={'eval_split': 'train', 'eval_batch_size': 512}, total_steps=2)
  train.train(config, tmp_path)
  images = {line['split']: line['images'] for line in logger.read_metrics(tmp_path)}
  assert images == {'train': 32, 'train[:]': 1433}


def test_evaluation_is_the_same_for_any_batch_size(tiny):
  results = []
  for size in (8, 24, 40):
    run = build_experiment(replace(tiny, data={'eval_batch_size': size}))
    metrics = callbacks.evaluate(run, run.steps.init())
    assert metrics.images == 37
    results.append(metrics.means())
  for other in results[1:]:
    assert other == pytest.approx(results[0], rel=1e-5)


def test_a_trace_of_some_steps(tiny, tmp_path):
  train.train(replace(tiny, profile_steps=2), tmp_path)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


@pytest.mark.parametrize('variant', ['paper', 'torchvision', 'batchnorm_prose'])
def test_other_variants_and_settings_train(tiny, tmp_path, variant):
  model = {'variant': variant, 'image_size': 67, 'dtype': 'bfloat16', 'activation': 'leaky_relu'}
  config = replace(
    tiny,
    model=model | {'batch_norm_momentum': None},
    loss={'name': 'mean_squared_error', 'label_smoothing': 0.1},
    optimizer={'schedule': 'polynomial', 'warmup_steps': 1, 'nesterov': True, 'clip_norm': 1.0},
    total_steps=2,
  )
  assert np.isfinite(train.train(config, tmp_path)['loss'])


def test_learning_on_the_digits(data_dir, tmp_path):
  """The recipe in a fifth of its time: far above chance, on images that it has not seen."""
  config = replace(
    TINY,
    data={'data_dir': data_dir, 'train_split': 'train', 'eval_split': 'test', 'batch_size': 32},
    total_epochs=3.0,
  )
  assert train.train(config, tmp_path)['top1'] > 0.6


def test_is_time():
  times = lambda period, last: [s for s in range(1, last + 1) if callbacks.is_time(s, period, last)]  # noqa: E731
  assert times(3, 10) == [3, 6, 9, 10]
  assert times(10 / 3, 11) == [4, 7, 10, 11]
  assert times(0.5, 3) == [1, 2, 3]
  assert len(times(1437 / 128, 1437)) == 128


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data': {'batch_size': 12}}, r'data.batch_size \(=12\) must be divisible by .* devices \(=8\)'),
    ({'data': {'eval_batch_size': 9}}, r'data.eval_batch_size \(=9\)'),
    (
      {'data': {'batch_size': 2_000_000_000}},
      r'2,000,000,000 images of .* pixels, .* GB, do not fit the memory of',
    ),
    ({'optimizer': {'accumulate_steps': 4}}, 'the nearest is 32'),
    ({'model': {'num_classes': 9}}, r'model.num_classes \(=9\) is less than the 10 classes of digits'),
    ({'data': {'dataset': 'cifar10'}}, "'cifar10' is not prepared"),
    ({'data': {'dataset': 'digit'}}, "did you mean 'digits'"),
    ({'data': {'eval_split': 'validation'}}, "unknown split 'validation'"),
    ({'data': {'eval_split': 'test[90%:10%]'}}, 'has no examples'),
    ({'data': {'data_dir': '/dev/null/data'}}, 'cannot write to data_dir'),
    ({'data': {'dataset': 'mnist:9.9.9'}}, "data set 'mnist:9.9.9'"),
    ({'data': {'dataset': 'image_folder', 'data_dir': 'configs'}}, 'no images in configs'),
    ({'optimizer': {'warmup_steps': 10}}, 'set optimizer.warmup_steps'),
  ],
)
def test_mistakes_leave_nothing_behind(tiny, tmp_path, changes, message):
  with pytest.raises(UsageError, match=message):
    train.train(replace(tiny, **changes), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_an_unwritable_workdir(tiny, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match=r'cannot write to --workdir=.*file/run/checkpoints: Not a directory'):
    train.train(tiny, tmp_path / 'file' / 'run')


def test_own_images_from_the_command_to_the_report(tmp_path, capsys):
  """A folder whose path has a bracket, a space and an umlaut, and that no verb is told again."""
  photos, run = tmp_path / 'photos [1] für', tmp_path / 'run [2] ä'
  for split, count in (('train', 16), ('validation', 8)):
    for number in range(count):
      place = photos / split / ('ant', 'bee')[number % 2]
      place.mkdir(parents=True, exist_ok=True)
      (place / f'{number}.jpg').write_bytes(encode(smooth_image(60, 70, number)))
  flags = ['--config.model.width=0.0625', '--config.model.image_size=57', '--config.transfer.layer=pool2']
  flags += ['--config.total_steps=2', '--config.data.eval_batch_size=8', f'--config.data.data_dir={photos}']
  assert main(['train.py', '--config=configs/folder.py', *flags, f'--workdir={run}']) == 0
  said = capsys.readouterr().out
  assert '2 classes, images to train on + to evaluate on: ant 8 + 4, bee 8 + 4' in said
  assert f'{run}/report.html shows what it learned' in said
  page = (run / 'report.html').read_text()
  assert 'run-1-panel' in page
  assert str(tmp_path) not in page
  assert cli.main(['evaluate', str(run), '--json', str(tmp_path / 'figures.json')]) == 0
  assert cli.main(['report', str(run)]) == 0
  figures = (tmp_path / 'figures.json').read_text()
  assert json.loads(figures)['images'] == 8
  assert str(tmp_path) not in figures
