"""`alexnet-flax verify-resume`: it kills runs, and sees what differs."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import pytest

from alexnet_flax import checkpoint
from alexnet_flax.cli.main import main
from alexnet_flax.diagnostics import verify_resume
from alexnet_flax.errors import UsageError
from alexnet_flax.training import train
from alexnet_flax.training.callbacks import Callback
from tests.helpers import SMALL, TINY, replace

pytestmark = pytest.mark.usefixtures('standard_promotion')


def test_three_kills(data_dir):
  """By the command that users have; the third kill is inside of a save."""
  flags = [*SMALL, f'--config.data.data_dir={data_dir}', '--config.total_steps=20']
  flags += ['--config.checkpoint_every_steps=2', '--config.log_every_steps=5']
  proof = verify_resume.verify_resume(flags, 3)
  assert (proof.kills, proof.equal, proof.differences) == (3, 3, [])
  assert proof.compared['checkpoints'] >= 10  # every kill came after one of them
  assert proof.compared['arrays'] >= 8 * 20
  assert proof.compared['steps'] >= 20


class KilledError(Exception):
  """In place of SIGKILL."""


@pytest.fixture(scope='module')
def runs(data_dir, tmp_path_factory):
  """A run of four steps with two checkpoints, and the same one killed after the third step."""
  root = tmp_path_factory.mktemp('runs')
  config = replace(
    TINY,
    data={'data_dir': data_dir},
    optimizer={'schedule': 'constant', 'ema_decay': 0.9},
    total_steps=4,
    checkpoint_every_steps=2,
    log_every_steps=1,
    eval_every_steps=100,
    record_examples=True,
  )

  def kill(progress):
    if progress.step == 3:
      raise KilledError

  with jax.numpy_dtype_promotion('standard'):
    train.train(config, root / 'whole')
    with pytest.raises(KilledError):
      train.train(config, root / 'killed', [Callback(kill, periods=(1.0,))])
  return config, root


@pytest.fixture
def in_process(runs, monkeypatch, capsys):
  """Lets the verification run and kill in this process instead of others."""
  config, root = runs

  def run(command, folder):
    if folder.name == 'whole':
      shutil.copytree(root / 'whole', folder)
      return ''
    capsys.readouterr()
    train.train(config, folder)
    return capsys.readouterr().out

  def kill(command, folder, *moment):
    shutil.copytree(root / 'killed', folder)
    return 3, []

  monkeypatch.setattr(verify_resume, '_run', run)
  monkeypatch.setattr(verify_resume, '_kill', kill)


def louder(state):
  return dataclasses.replace(state, params=jax.tree.map(lambda x: 1.01 * x, state.params))


def other_averages(state):
  return dataclasses.replace(state, ema=jax.tree.map(lambda x: x * (1 + 1e-6), state.ema))


def no_momentum(state):
  return dataclasses.replace(state, opt_state=state.tx.init(state.params))


def another_step(state):
  return dataclasses.replace(state, step=state.step + 1)


@pytest.mark.parametrize(
  ('sabotage', 'different'),
  [
    (None, None),
    (louder, 'params/conv1/kernel at step 4'),
    (other_averages, 'ema/params/conv1/kernel at step 4'),
    (no_momentum, 'opt_state/'),
    (another_step, 'the checkpoint of step 2 was not restored'),
    ('from the start', 'the checkpoint of step 2 was not restored'),
  ],
)
def test_a_broken_restore_is_found(in_process, monkeypatch, sabotage, different):
  real = checkpoint.restore
  if callable(sabotage):
    monkeypatch.setattr(checkpoint, 'restore', lambda *given: sabotage(real(*given)))
  elif sabotage:  # such a run ends with the same bits, but has resumed nothing
    monkeypatch.setattr(checkpoint, 'latest_whole', lambda folder, *rest: shutil.rmtree(folder))
  proof = verify_resume.verify_resume([], 1)
  assert proof.kills == 1
  assert proof.equal == (sabotage is None)
  if different is None:
    assert proof.differences == []
  else:
    assert any(line.startswith(different) for line in proof.differences), proof.differences


def test_what_the_command_and_the_benchmark_say_of_a_broken_restore(in_process, monkeypatch, capsys):
  real = checkpoint.restore
  monkeypatch.setattr(checkpoint, 'restore', lambda *given: louder(real(*given)))
  path = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'chaos.py'
  spec = importlib.util.spec_from_file_location('chaos', path)
  chaos = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(chaos)
  monkeypatch.setattr('sys.argv', ['chaos.py', '--kills', '1'])
  assert chaos.main() == 1
  said = capsys.readouterr().out.splitlines()
  assert json.loads(said[-1]) == {'kills': 1, 'equal': 0, 'inside_save': 0}
  assert 'different: params/conv1/kernel at step 4' in said
  monkeypatch.setattr(verify_resume, 'verify_resume', lambda *given, **options: proof)
  proof = verify_resume.Verification(kills=1, differences=['params/conv1/kernel at step 4'])
  assert main(['verify-resume', '--config=configs/digits.py']) == 1
  assert 'different: params/conv1/kernel at step 4' in capsys.readouterr().out


@pytest.mark.parametrize('when', ['before the first checkpoint', 'after the last'])
def test_kills_that_prove_nothing_are_not_counted(runs, in_process, monkeypatch, when):
  def kill(command, folder, *moment):
    if when == 'after the last':
      shutil.copytree(runs[1] / 'whole', folder)
    return 3, []

  monkeypatch.setattr(verify_resume, '_kill', kill)
  monkeypatch.setattr(verify_resume, '_run', lambda command, folder: _copied(runs, folder))
  with pytest.raises(UsageError, match='only 0 kills came between two checkpoints, in 6 runs; train for'):
    verify_resume.verify_resume([], 1)


def _copied(runs, folder):
  shutil.copytree(runs[1] / 'whole', folder, dirs_exist_ok=True)
  return ''


def test_the_verification_compares_what_was_logged(runs, tmp_path):
  whole = runs[1] / 'whole'
  shutil.copytree(whole, tmp_path / 'other')
  metrics, examples = tmp_path / 'other' / 'metrics.jsonl', tmp_path / 'other' / 'examples-0.jsonl'
  assert verify_resume._compare(whole, tmp_path / 'other', verify_resume.Verification()) == []
  lines = metrics.read_text().splitlines(keepends=True)
  metrics.write_text(''.join([*lines, lines[-1]]))
  examples.write_text(examples.read_text().replace('"step": 3', '"step": 5'))
  shutil.rmtree(tmp_path / 'other' / 'checkpoints' / '2')
  assert verify_resume._compare(whole, tmp_path / 'other', verify_resume.Verification()) == [
    'checkpoints at steps [4] instead of [4, 2]',
    'metrics.jsonl',
    'metrics.jsonl contains a value twice',
    "the steps' examples",
  ]


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--workdir=x', '--workdir is not supported here'),
    ('--show_batch=x.png', '--show_batch is not supported here'),
    ('--config.total_steps=3', 'too short to be interrupted'),
  ],
)
def test_verifications_that_cannot_start(data_dir, flag, message, capsys):
  flags = [*SMALL, f'--config.data.data_dir={data_dir}', flag, '--config.checkpoint_every_steps=10']
  assert main(['verify-resume', *flags]) == 2
  assert message in capsys.readouterr().err


def test_mistakes(capsys):
  assert main(['verify-resume', '--config=configs/digits.py', '--kills', '0']) == 2
  assert '--kills (=0) must be at least 1' in capsys.readouterr().err
  assert main(['verify-resume', '--config=configs/digit.py']) == 2
  assert "did you mean 'configs/digits.py'" in capsys.readouterr().err
  assert main(['prepare', 'digits', '--config=x']) == 2
  assert 'unrecognized arguments: --config=x' in capsys.readouterr().err
