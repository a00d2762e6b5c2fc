"""A step that does not repeat is found, and the commands say so."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from alexnet_flax.cli.main import main
from alexnet_flax.diagnostics import determinism, doctor, verify_resume
from alexnet_flax.training.batches import train_batches
from alexnet_flax.training.experiment import build_experiment
from tests.helpers import SMALL, TINY, replace

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def tiny(data_dir):
  return replace(TINY, data={'data_dir': data_dir})


def unsteady(experiment, every):
  """The experiment with a step whose loss is off by the last bits at each `every`th call."""
  calls, step = [], experiment.steps.train

  def train(*arguments):
    calls.append(1)
    state, metrics, *rest = step(*arguments)
    if len(calls) % every == 0:
      metrics = jax.tree.map(lambda x: jax.numpy.nextafter(x, x + 1), metrics)
    return state, metrics, *rest

  return dataclasses.replace(experiment, steps=dataclasses.replace(experiment.steps, train=train))


def test_a_step_repeats_to_the_bit(tiny):
  experiment = build_experiment(tiny)
  batch, state = next(train_batches(experiment, 0, 1)), experiment.steps.init()
  assert determinism.other_bits(experiment, state, batch, times=5) == 0
  assert doctor.repeats(experiment, state, batch).verdict == 'ok'
  assert determinism.line_if_other_bits(tiny, times=2) is None
  assert determinism.line_if_other_bits(replace(tiny, transfer={'mode': 'linear_probe'})) is None
  broken = unsteady(experiment, every=4)
  assert determinism.other_bits(broken, state, batch, times=10) == 2
  found = doctor.repeats(unsteady(experiment, every=4), state, batch)
  assert (found.verdict, found.what) == (
    'look',
    'the same step gave other bits in 2 of 10 repetitions: runs do not repeat here',
  )
  assert found.advice == 'set deterministic=true'


def test_the_proof_of_resuming_says_so_first(data_dir, monkeypatch, capsys):
  monkeypatch.setattr(determinism, 'build_experiment', lambda config: unsteady(build_experiment(config), 2))
  nothing = verify_resume.Verification(kills=1, equal=1)
  monkeypatch.setattr(verify_resume, 'verify_resume', lambda *_, **__: nothing)
  assert main(['verify-resume', *SMALL, f'--config.data.data_dir={data_dir}', '--kills', '1']) == 0
  lines = capsys.readouterr().out.splitlines()  # the data may be prepared first
  warning = (
    'warning: the same step gave other bits in 5 of 10 repetitions: on this machine a run that resumes'
  )
  places = [line.startswith(warning) for line in lines], [line.startswith('1 kills') for line in lines]
  assert places[0].index(True) < places[1].index(True)


@pytest.mark.skipif(not pathlib.Path('/proc/self/task').is_dir(), reason='no threads to look at')
def test_what_deterministic_sets_on_cpus():
  """One thread of XLA, which otherwise has as many as there are processors: here three, on any machine."""
  program = (
    'import pathlib, jax\n'
    'from alexnet_flax.cli.train import parse\n'
    'parse(["train.py", "--config=configs/digits.py", "--config.deterministic=true"])\n'
    'jax.devices()\n'
    'names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]\n'
    'print(sum("XLAEigen" in name for name in names))\n'
  )
  flags = {'NPROC': '3', 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  said = subprocess.run(
    [sys.executable, '-c', program], env=os.environ | flags, capture_output=True, text=True, check=True
  )
  assert said.stdout.split() == ['1']
