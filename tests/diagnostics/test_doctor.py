"""`alexnet-flax doctor`: what it finds, and what it says of it."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import pytest

from alexnet_flax.cli.main import main
from alexnet_flax.diagnostics import doctor
from alexnet_flax.steps import train_step
from alexnet_flax.training.batches import train_batches
from alexnet_flax.training.experiment import build_experiment
from tests.helpers import SMALL, TINY, encode, replace, smooth_image

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def tiny(data_dir):
  return replace(TINY, data={'data_dir': data_dir}, optimizer={'schedule': 'constant'})


def test_doctor(data_dir, capsys, tmp_path):
  flags = [*SMALL, f'--config.data.data_dir={data_dir}', '--config.data.batch_size=32']
  assert main(['doctor', *flags, '--workdir', str(tmp_path)]) == 0
  said = capsys.readouterr().out
  for expected in (
    'sees no GPU', 'digits:train[:320]', 'GB free', 'images/s, the step takes', 'ln(10) = 2.303',
    '20 steps on the same 32 images: the loss goes from', 'dead units on these images: relu1',
  ):  # fmt: skip
    assert expected in said
  assert 'bad ' not in said
  assert main(['doctor', *SMALL, '--config.data.dataset=cifar10', f'--config.data.data_dir={data_dir}']) == 2
  said = capsys.readouterr().out
  assert "bad   the data set 'cifar10' is not prepared" in said


def test_doctor_sees_what_is_wrong(tiny, tmp_path, monkeypatch):
  run = build_experiment(replace(tiny, optimizer={'learning_rate': 1e6}))
  batch = next(train_batches(run, 0))
  found = list(doctor.check_network(run, run.steps.init(), batch))
  assert found[1].verdict == 'bad'
  assert '20 steps on the same 16 images' in found[1].what
  assert 'try optimizer.learning_rate / 10' in found[1].advice
  monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 1000})())
  assert doctor.disk(run, tmp_path / 'none' / 'yet').verdict == 'bad'
  monkeypatch.setattr(doctor.shutil, 'which', lambda name: '/usr/bin/nvidia-smi')
  assert [finding.verdict for finding in doctor.devices()] == ['ok', 'bad']


@pytest.mark.parametrize(
  ('library', 'count', 'tunables', 'verdict'),
  [
    (('glibc', '2.36'), 1, '', 'look'),
    (('glibc', '2.36'), 1, 'glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=0', 'ok'),
    (('glibc', '2.36'), 8, '', 'ok'),  # whose memory is not kept
    (('glibc', '2.39'), 1, '', 'ok'),
    (('', ''), 1, '', 'ok'),  # musl, macOS
  ],
)
def test_a_c_library_that_splits_memory(library, count, tunables, verdict, monkeypatch):
  monkeypatch.setattr(doctor.platform, 'libc_ver', lambda: library)
  monkeypatch.setattr(jax, 'device_count', lambda: count)
  monkeypatch.setenv('GLIBC_TUNABLES', tunables)
  found = doctor.c_library()
  assert found.verdict == verdict
  assert ('GLIBC_TUNABLES=glibc.malloc.tcache_count=0' in str(found)) == (verdict == 'look')


def still(state, batch, key, **options):
  """A step without an update."""
  return state, train_step(state, batch, key, **options)[1]


def blind(state, batch, key, **options):
  """A step that does not see the images: the loss falls, for it starts above chance."""
  return train_step(state, batch | {'image': batch['image'] * 0.0}, key, **options)


def backwards(state, batch, key, **options):
  """A step up the gradient."""
  new, metrics = train_step(state, batch, key, **options)
  params = jax.tree.map(lambda old, new: old - 0.01 * (new - old), state.params, new.params)
  return dataclasses.replace(new, params=params), metrics


def test_doctor_sees_a_step_that_does_not_learn(tiny, monkeypatch):
  run = build_experiment(replace(tiny, model={'dropout_rate': 0.0}, data={'batch_size': 32}))
  batch, state = next(train_batches(run, 0)), run.steps.init()
  for step, verdict in ((train_step, 'ok'), (still, 'look'), (blind, 'look'), (backwards, 'look')):
    monkeypatch.setattr(doctor, 'train_step', step)
    _, overfit, *_ = doctor.check_network(run, state, batch)
    assert overfit.verdict == verdict, overfit


def test_doctor_names_momentum_and_rate_as_causes(tiny):
  """As of 244 photographs: 86 steps with a momentum of 0.99, or a rate for 256 images at batch 32."""
  config = replace(tiny, model={'batch_norm_momentum': 0.99}, total_steps=86)
  momentum, rate = doctor.recipe(build_experiment(config))
  assert (momentum.verdict, rate.verdict) == ('look', 'look')
  assert "BatchNorm's momentum of 0.99 leaves 42.1% of the initial statistics" in momentum.what
  assert 'set model.batch_norm_momentum=0.88' in momentum.advice
  assert 'learning rate 0.02 at batch 16, that is 0.32 for 256 images' in rate.what
  assert 'set optimizer.learning_rate=0.013, or less' in rate.advice
  config = replace(config, model={'batch_norm_momentum': 0.9}, optimizer={'learning_rate': 0.01})
  assert [finding.verdict for finding in doctor.recipe(build_experiment(config))] == ['ok', 'ok']


def test_doctor_reads_what_is_evaluated(tmp_path, capsys):
  for split in ('train', 'test'):
    for number in range(4):
      folder = tmp_path / split / f'class {number % 2}'
      folder.mkdir(parents=True, exist_ok=True)
      content = encode(smooth_image(64, 64, number)) if split == 'train' else b'no image'
      (folder / f'{number}.jpg').write_bytes(content)
  flags = ['--config.data.dataset=image_folder', f'--config.data.data_dir={tmp_path}']
  batch = ['--config.data.batch_size=8', '--config.data.eval_batch_size=8', '--config.data.train_split=train']
  assert main(['doctor', *SMALL, *flags, *batch]) == 2
  assert re.search(r'bad   .*test/class 0/\d.jpg', capsys.readouterr().out)


def test_a_platform_that_is_not_there(tmp_path):
  """In a process of its own: JAX chooses its devices once."""
  for arguments in (
    ['train.py', '--config=configs/digits.py', f'--workdir={tmp_path}'],
    ['-m', 'alexnet_flax', 'doctor'],
  ):
    done = subprocess.run(
      [sys.executable, *arguments],
      env=os.environ | {'JAX_PLATFORMS': 'cuda'},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 2
    assert 'JAX finds no device of JAX_PLATFORMS=cuda' in done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
