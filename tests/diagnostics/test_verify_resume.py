"""`alexnet-flax verify-resume`: it kills runs, and sees what differs."""

import pytest

from alexnet_flax.cli.main import main
from alexnet_flax.diagnostics import verify_resume
from alexnet_flax.training import train
from tests.helpers import SMALL, TINY, replace

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def tiny(data_dir):
  return replace(TINY, data={'data_dir': data_dir}, optimizer={'schedule': 'constant'})


def test_three_kills(data_dir):
  """By the command that users have; the third kill is inside of a save."""
  flags = [*SMALL, f'--config.data.data_dir={data_dir}', '--config.total_steps=20']
  flags += ['--config.checkpoint_every_steps=2', '--config.log_every_steps=5']
  proof = verify_resume.verify_resume(flags, 3)
  assert (proof.kills, proof.equal, proof.differences) == (3, 3, [])
  assert proof.compared['checkpoints'] >= 10
  assert proof.compared['arrays'] >= 8 * 20
  assert proof.compared['steps'] >= 20


def test_the_verification_detects_a_difference(tiny, tmp_path):
  """Another seed: other bits, other examples, other metrics."""
  config = replace(tiny, total_steps=2, record_examples=True, log_every_steps=1)
  for name, seed in (('a', 0), ('b', 1)):
    train.train(replace(config, seed=seed), tmp_path / name)
  proof = verify_resume.Verification()
  wrong = verify_resume._compare(tmp_path / 'a', tmp_path / 'b', proof)
  assert {'metrics.jsonl', "the steps' examples", 'params/conv1/kernel at step 2'} <= set(wrong)
  assert verify_resume._compare(tmp_path / 'a', tmp_path / 'a', proof) == []
  assert verify_resume._latest_whole(tmp_path / 'b') == 2


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
