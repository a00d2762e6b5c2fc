"""Kills, signals and faults, made for real: what a run loses by them (nothing), and what it says."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from alexnet_flax import checkpoint, steps
from alexnet_flax.data.source import Example, Source
from alexnet_flax.errors import DivergedError, PreemptedError, UsageError
from alexnet_flax.files import rewrite_lines
from alexnet_flax.training import batches, callbacks, logger, preemption, workdir
from alexnet_flax.training import train as training
from alexnet_flax.training.experiment import build_experiment
from tests.helpers import TINY, command, replace

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def tiny(data_dir):
  return replace(TINY, data={'data_dir': data_dir}, optimizer={'schedule': 'constant'})


def arrays(folder):
  (step, *_) = checkpoint.steps_in(folder / 'checkpoints')
  return checkpoint.load_arrays(folder / 'checkpoints', step)


def assert_same_bits(one, other):
  assert one.keys() == other.keys()
  for name, array in one.items():
    assert array.tobytes() == other[name].tobytes(), name


@pytest.mark.usefixtures('hangup_counts')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_75(data_dir, tmp_path, number):
  flags = ['--config.total_steps=100000', '--config.checkpoint_every_steps=100000', f'--workdir={tmp_path}']
  with subprocess.Popen(
    command(data_dir, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
      if line.startswith('step '):
        process.send_signal(number)
        break
    said = process.stderr.read()
  assert process.returncode == 75
  assert f'{number.name}: finishing the step' in said
  assert 'as asked; the same command goes on from there' in said
  (step,) = checkpoint.steps_in(tmp_path / 'checkpoints')
  assert checkpoint.damage(tmp_path / 'checkpoints' / str(step)) is None
  if number is signal.SIGHUP:
    return  # the rest is the same
  again = subprocess.run(
    command(data_dir, f'--config.total_steps={step + 2}', f'--workdir={tmp_path}'),
    capture_output=True,
    text=True,
    check=False,
  )
  assert again.returncode == 0, again.stderr
  assert f'steps {step + 1} to {step + 2}' in again.stdout
  keys = [(line['step'], line['split'], line['name']) for line in logger.read_metrics(tmp_path)]
  assert len(keys) == len(set(keys))


def test_a_second_signal_ends_at_once():
  program = (
    'import time; from alexnet_flax.training.preemption import GracefulShutdown\n'
    'with GracefulShutdown() as request:\n'
    '  print("ready", flush=True)\n'
    '  while True: time.sleep(0.01)'
  )
  with subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # at the same time: the same request
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


def flip_a_byte(folder):
  path = max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(folder):
  path = max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  os.truncate(path, path.stat().st_size // 2)


def remove_a_file(folder):
  (folder / 'default' / '_METADATA').unlink()


def remove_the_manifest(folder):
  (folder / checkpoint.MANIFEST).unlink()


@pytest.mark.parametrize('harm', [flip_a_byte, truncate, remove_a_file, remove_the_manifest])
def test_a_damaged_checkpoint_is_set_aside(tiny, tmp_path, capsys, harm):
  config = replace(tiny, checkpoint_every_steps=2, total_steps=6)
  training.train(config, tmp_path)
  whole = arrays(tmp_path)
  harm(tmp_path / 'checkpoints' / '6')
  capsys.readouterr()
  training.train(config, tmp_path)
  said = capsys.readouterr().out
  assert 'warning: the checkpoint of step 6 is damaged (' in said
  assert 'steps 5 to 6' in said
  assert_same_bits(arrays(tmp_path), whole)
  assert [path.name for path in (tmp_path / 'damaged').iterdir()] == ['6-1']


def test_the_best_checkpoint_outlives_restarts(tiny, tmp_path, monkeypatch):
  """Orbax must know after a restart what the checkpoints before it have scored."""
  scores = iter([0.5, 0.9, 0.4, 0.3, 0.2])
  evaluate = callbacks.evaluate

  def scored(run, state):
    metrics = evaluate(run, state)
    return dataclasses.replace(metrics, sums=metrics.sums | {'top1': next(scores) * metrics.images})

  monkeypatch.setattr(callbacks, 'evaluate', scored)
  config = replace(tiny, checkpoint_every_steps=1, eval_every_steps=1, keep_checkpoints=1)
  for total in (1, 2, 3, 5):
    training.train(replace(config, total_steps=total), tmp_path)
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [5, 2]
  # What the older one scored is unreadable: it is set aside, and the latest is used.
  (tmp_path / 'checkpoints' / '2' / 'metrics' / 'metrics').write_bytes(b'\xff')
  monkeypatch.setattr(callbacks, 'evaluate', evaluate)
  training.train(replace(config, total_steps=6), tmp_path)
  assert checkpoint.steps_in(tmp_path / 'checkpoints')[0] == 6
  assert [path.name for path in (tmp_path / 'damaged').iterdir()] == ['2-1']


@pytest.mark.parametrize('content', ['[]', '{"files": ["a"]}', '{"files": 3}', '{', ''])
def test_manifests_that_are_none(tmp_path, content):
  (tmp_path / checkpoint.MANIFEST).write_text(content)
  assert checkpoint.damage(tmp_path) == f'no readable {checkpoint.MANIFEST}'


def test_what_orbax_could_not_read_is_damage(tiny, tmp_path, capsys):
  training.train(replace(tiny, total_steps=1), tmp_path)
  (tmp_path / 'checkpoints' / '1' / '_CHECKPOINT_METADATA').write_text('[' * 100_000)
  training.train(replace(tiny, total_steps=1), tmp_path)
  assert 'the checkpoint of step 1 is damaged (no readable _CHECKPOINT_METADATA)' in capsys.readouterr().out


def test_damaged_twice(tiny, tmp_path):
  config = replace(tiny, total_steps=2)
  training.train(config, tmp_path)
  (tmp_path / 'damaged' / '2-2').mkdir(parents=True)
  flip_a_byte(tmp_path / 'checkpoints' / '2')
  training.train(config, tmp_path)
  flip_a_byte(tmp_path / 'checkpoints' / '2')
  training.train(config, tmp_path)
  assert sorted(path.name for path in (tmp_path / 'damaged').iterdir()) == ['2-1', '2-2', '2-3']


def test_two_runs_in_one_folder(tiny, tmp_path):
  with workdir.sole_writer(tmp_path), pytest.raises(UsageError, match='another process trains in'):
    training.train(tiny, tmp_path)
  training.train(replace(tiny, total_steps=1), tmp_path)


def test_broken_files_of_a_run(tiny, tmp_path, capsys):
  training.train(replace(tiny, total_steps=1), tmp_path)
  (tmp_path / 'config.json').write_text('{"seed')
  training.train(replace(tiny, total_steps=2), tmp_path)
  assert 'config.json is broken: it holds no JSON object' in capsys.readouterr().out
  assert (tmp_path / 'damaged' / 'config.json-1').read_text() == '{"seed'
  text = (tmp_path / 'metrics.jsonl').read_text()
  (tmp_path / 'metrics.jsonl').write_text('{"st\n' + text)
  with pytest.raises(UsageError, match=r'line 1 of .*metrics.jsonl is broken'):
    training.train(replace(tiny, total_steps=3), tmp_path)


@pytest.fixture
def small_disk(mount):
  """A filesystem of three megabytes."""
  return mount('size=3m')


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')  # tensorboardX's
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # TensorStore's
@pytest.mark.parametrize('policy', ['stop', 'continue'])
def test_a_full_disk(tiny, small_disk, capsys, policy):
  config = replace(tiny, checkpoint_every_steps=1, total_steps=3, on_save_error=policy)
  training.train(replace(config, total_steps=1), small_disk / 'run')
  fill(small_disk, 100_000)
  capsys.readouterr()
  if policy == 'stop':
    with pytest.raises(UsageError, match=r'step \d cannot be written: the disk is full; make room and start'):
      training.train(config, small_disk / 'run')
  else:
    training.train(config, small_disk / 'run')
    said = capsys.readouterr().out
    assert 'cannot be written: the disk is full; the run goes on' in said
    assert 'done: 3 steps' in said
  steps = checkpoint.steps_in(small_disk / 'run' / 'checkpoints')
  assert steps[0] < 3
  assert checkpoint.damage(small_disk / 'run' / 'checkpoints' / str(steps[0])) is None
  (small_disk / 'ballast').unlink()
  training.train(config, small_disk / 'run')
  assert checkpoint.steps_in(small_disk / 'run' / 'checkpoints')[0] == 3
  assert {line['step'] for line in logger.read_metrics(small_disk / 'run')} >= {3}


def fill(folder, room):
  """Leaves so many bytes on a small disk."""
  free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
  (folder / 'ballast').write_bytes(bytes(max(free - room, 0)))


def test_a_disk_that_is_full_from_the_start(tiny, small_disk):
  training.train(replace(tiny, total_steps=1), small_disk / 'run')
  fill(small_disk, 0)
  with pytest.raises(UsageError, match='No space left on device'):
    training.train(replace(tiny, total_steps=2), small_disk / 'run')
  with pytest.raises(UsageError, match='No space left on device'):
    training.train(replace(tiny, total_steps=2), small_disk / 'another')
  (small_disk / 'ballast').unlink()
  training.train(replace(tiny, total_steps=2), small_disk / 'run')


def test_the_command_says_a_full_disk_in_a_line(data_dir, small_disk):
  flags = [f'--workdir={small_disk / "run"}', '--config.checkpoint_every_steps=1']
  flags += ['--config.optimizer.warmup_steps=0']
  first = subprocess.run(
    [*command(data_dir, *flags), '--config.total_steps=1'], capture_output=True, check=False
  )
  assert first.returncode == 0, first.stderr
  fill(small_disk, 100_000)
  full = subprocess.run(
    [*command(data_dir, *flags), '--config.total_steps=4'], capture_output=True, text=True, check=False
  )
  assert full.returncode == 2
  assert full.stderr.splitlines()[-1].startswith('error: the checkpoint of step ')
  assert 'Traceback' not in full.stderr, full.stderr[:2000]


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')  # tensorboardX's
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # TensorStore's
def test_a_signal_on_a_full_disk_says_what_is_lost(tiny, small_disk, monkeypatch):
  training.train(replace(tiny, total_steps=1), small_disk / 'run')
  fill(small_disk, 100_000)
  config = replace(tiny, total_steps=4, on_save_error='continue')
  run_steps = training.run_steps

  def asked_later(*arguments):
    arguments[-1].requested = True
    return run_steps(*arguments)

  monkeypatch.setattr(training, 'run_steps', asked_later)
  with pytest.raises(PreemptedError, match=r'ended at step 2 of 4, .* from step 1, after which nothing'):
    training.train(config, small_disk / 'run')


def poisoned(monkeypatch, *broken_steps):
  """Makes the images of some steps infinite on their way to the network."""
  original = steps.train_step

  def poisoned_step(state, batch, key, **options):
    preprocess = options.pop('preprocess')

    def broken(batch, key):
      out = preprocess(batch, key)
      bad = jax.numpy.isin(state.step + 1, jax.numpy.asarray(broken_steps))
      return out | {'image': jax.numpy.where(bad, jax.numpy.inf, out['image'])}

    return original(state, batch, key, preprocess=broken, **options)

  monkeypatch.setattr(steps, 'train_step', poisoned_step)


def test_a_step_that_is_not_finite_leaves_the_state_before_it(tiny, tmp_path, monkeypatch):
  config = replace(tiny, total_steps=8, checkpoint_every_steps=4, log_every_steps=8)
  poisoned(monkeypatch, 5)  # of both runs: another program rounds otherwise
  training.train(replace(config, total_steps=4), tmp_path / 'before')
  with pytest.raises(DivergedError, match=r'at step 5 .*; the state before it is in .*failures/5;') as caught:
    training.train(config, tmp_path / 'run')
  assert caught.value.exit_code == 3
  place = tmp_path / 'run' / 'failures' / '5'
  found = json.loads((place / 'batch.json').read_text())
  assert found['step'] == 5
  assert len(found['examples']) == 16
  import orbax.checkpoint as ocp

  saved = ocp.StandardCheckpointer().restore(place.resolve() / 'state')
  (whole,) = [checkpoint.load_arrays(tmp_path / 'before' / 'checkpoints', 4)]
  np.testing.assert_array_equal(saved['params']['fc3']['kernel'], whole['params/fc3/kernel'])
  np.testing.assert_array_equal(saved['batch_stats']['norm1']['mean'], whole['batch_stats/norm1/mean'])


def test_steps_that_are_not_finite_are_skipped(tiny, tmp_path, monkeypatch, capsys):
  poisoned(monkeypatch, 2, 3)
  config = replace(
    tiny, total_steps=6, log_every_steps=3, on_nonfinite='skip', checkpoint_every_steps=6, eval_every_steps=6
  )
  values = training.train(config, tmp_path)
  assert np.isfinite(values['loss'])
  assert 'steps 1 to 3: 2 updates were not finite and were left out' in capsys.readouterr().out
  lines = logger.read_metrics(tmp_path)
  counts = [line['value'] for line in lines if line['name'] == 'skipped_steps']
  assert counts == [2.0, 0.0]
  assert {line['images'] for line in lines if (line['split'], line['step']) == ('train', 3)} == {16}
  assert all(np.isfinite(array).all() for array in arrays(tmp_path).values())


def test_skipping_ends_after_many_in_a_row(tiny, tmp_path, monkeypatch):
  """However the log is cut into windows."""
  poisoned(monkeypatch, 1, 3, 4, 5)
  monkeypatch.setattr(callbacks, '_MAX_SKIPPED_IN_A_ROW', 3)
  config = replace(tiny, total_steps=9, log_every_steps=1, on_nonfinite='skip')
  with pytest.raises(DivergedError, match=r'3 updates in a row were not finite at step 5 .*failures/5'):
    training.train(config, tmp_path)
  assert (tmp_path / 'failures' / '5' / 'batch.json').exists()


def test_a_skipped_step_moves_the_schedule_on(tiny, tmp_path, monkeypatch):
  poisoned(monkeypatch, 2)
  training.train(replace(tiny, total_steps=3, on_nonfinite='skip'), tmp_path)
  counts = [int(x) for name, x in arrays(tmp_path).items() if x.dtype.kind == 'i']
  assert counts
  assert set(counts) == {3}


def test_micro_batches_that_are_not_finite(tiny, tmp_path, monkeypatch):
  poisoned(monkeypatch, 2)
  config = replace(tiny, optimizer={'accumulate_steps': 2}, total_steps=4, log_every_steps=1)
  with pytest.raises(DivergedError, match=r'the loss is (nan|inf) at step 2'):
    training.train(config, tmp_path / 'stop')
  training.train(replace(config, on_nonfinite='skip'), tmp_path / 'skip')
  assert all(np.isfinite(array).all() for array in arrays(tmp_path / 'skip').values())


def test_the_examples_of_a_broken_step_are_those_of_its_batch(tiny, tmp_path, monkeypatch):
  poisoned(monkeypatch, 3)
  with pytest.raises(DivergedError):
    training.train(replace(tiny, total_steps=4, record_examples=True, log_every_steps=1), tmp_path)
  lines = batches.read_examples(tmp_path / 'examples-0.jsonl')
  recorded = {line['step']: line['examples'] for line in lines}
  found = json.loads((tmp_path / 'failures' / '3' / 'batch.json').read_text())
  assert [example['index'] for example in found['examples']] == recorded[3]


def test_fewer_processes_leave_no_examples_of_steps_that_were_made_anew(tiny, tmp_path):
  config = replace(tiny, record_examples=True, checkpoint_every_steps=2)
  training.train(replace(config, total_steps=2), tmp_path)
  second = [{'step': step, 'examples': [step]} for step in range(1, 5)]  # its process ended with step 4
  rewrite_lines(tmp_path / 'examples-1.jsonl', second)
  training.train(replace(config, total_steps=3), tmp_path)
  assert [line['step'] for line in batches.read_examples(tmp_path / 'examples-0.jsonl')] == [1, 2, 3]
  assert batches.read_examples(tmp_path / 'examples-1.jsonl') == second[:2]


def test_the_examples_of_a_broken_step_do_not_say_where_the_images_are(tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, 'save_alone', lambda place, state: place.mkdir(parents=True))
  names = [f'{tmp_path}/photos/cat/{number}.jpg' for number in range(16)]
  scan = lambda numbers: [Example(b'', 0, names[number]) for number in numbers]  # noqa: E731
  source = Source('photos', 16, ('cat',), scan, scan, f'{tmp_path}/photos')
  run = build_experiment(tiny)
  run = dataclasses.replace(run, data=dataclasses.replace(run.data, train=source))
  callbacks.record_failure(types.SimpleNamespace(experiment=run, state=None), 1, 'the loss', tmp_path)
  text = (tmp_path / 'failures' / '1' / 'batch.json').read_text()
  assert '"cat/3.jpg"' in text
  assert str(tmp_path) not in text


def test_the_configuration_names_no_place_of_the_user(tiny, tmp_path):
  training.train(replace(tiny, total_steps=1), tmp_path)
  text = (tmp_path / 'config.json').read_text()
  assert tiny.data.data_dir not in text
  assert f'.../{pathlib.Path(tiny.data.data_dir).name}' in text


def test_the_option_that_makes_gpus_deterministic_is_one_of_xlas(tiny):
  """It cannot be tried without a GPU; a name that XLA does not know would be an error here too."""
  for name, known in (('xla_gpu_deterministic_ops', True), ('xla_gpu_no_such_option', False)):
    compile_it = jax.jit(lambda x: x + 1, compiler_options={name: True}).lower(1.0).compile
    if known:
      compile_it()
    else:
      with pytest.raises(jax.errors.JaxRuntimeError, match='No such compile option'):
        compile_it()


def test_a_signal_while_the_program_starts(tmp_path):
  with subprocess.Popen(
    [sys.executable, 'train.py', '--config=configs/digits.py', f'--workdir={tmp_path}'],
    stderr=subprocess.PIPE,
  ) as process:
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 75
    assert process.stderr is not None
    assert process.stderr.read() == b''


def test_output_that_nobody_reads_goes_on_in_the_folder(tiny, tmp_path, monkeypatch):
  """As with `| head`, or a terminal that has hung up."""
  reader, writer = os.pipe()
  with open(writer, 'w') as broken:
    monkeypatch.setattr(sys, 'stdout', broken)
    os.close(reader)
    values = training.train(replace(tiny, total_steps=2), tmp_path / 'run')
  assert set(values) == {'loss', 'top1', 'top5'}
  said = (tmp_path / 'run' / 'output.log').read_text().splitlines()
  assert said[0].startswith('training batchnorm')
  assert said[-1].startswith('done: 2 steps')


def test_output_that_is_closed_from_the_start(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'stdout', None)
  monkeypatch.setattr(sys, 'stderr', None)
  with logger.steady_output(tmp_path / 'run'):
    print('one')
  with logger.steady_output(tmp_path / 'run'):
    print('two', flush=True, file=sys.stderr)
    assert not sys.stderr.isatty()
  assert (tmp_path / 'run' / 'output.log').read_text() == 'one\ntwo\n'


@pytest.mark.usefixtures('hangup_counts')
def test_which_signals_end_a_run():
  with preemption.GracefulShutdown() as shutdown:
    os.kill(os.getpid(), signal.SIGHUP)
    assert shutdown.requested
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
  try:
    with preemption.GracefulShutdown() as shutdown:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not shutdown.requested
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_checkpoint_that_is_rotated_away_while_it_is_read(tmp_path, monkeypatch):
  (tmp_path / '3').mkdir()
  monkeypatch.setattr(checkpoint, 'damage', lambda *_: None)

  def restore(folder, step):
    if step == 3:
      (tmp_path / '3').rename(tmp_path / '4')
      raise FileNotFoundError(step)
    return {'params': 1, 'batch_stats': 2}

  monkeypatch.setattr(checkpoint, '_restore_on_one_device', restore)
  assert checkpoint.restore_variables(tmp_path) == (4, {'params': 1, 'batch_stats': 2})
  monkeypatch.setattr(checkpoint, '_restore_on_one_device', lambda *_: {}[0])
  with pytest.raises(KeyError):
    checkpoint.restore_variables(tmp_path)
