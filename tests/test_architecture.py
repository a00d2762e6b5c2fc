"""The order of imports, the sizes of modules, and what importing the package loads."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import alexnet_flax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'alexnet_flax'
MODULES = sorted(PACKAGE.rglob('*.py'))
HEAVY = """
  aim cv2 google h5py huggingface_hub jinja2 keras matplotlib ml_collections mlflow onnx orbax PIL pooch
  requests simplejpeg sklearn starlette tensorboardX tensorflow tensorflow_datasets torch tqdm trackio wandb
"""
PUBLIC = """
  VARIANTS AlexNet Spec Conv Dense Activation Pool LocalResponseNorm SpatialResponseNorm BatchNorm Flatten
  Dropout Normal VarianceScaling Constant UniformFanIn Multipliers Preprocessing
  Config Metrics TrainState UsageError __version__ create_train_state cross_entropy deconvnet eval_step
  features grad_cam gradient guided_backprop integrated_gradients keep_cpu_memory learning_rate_schedule
  load_pretrained load_weights lpips mean_squared_error occlusion save_weights sgd smoothgrad train train_step
"""


def lint(folder, *options):
  """The exit code and the output of import-linter for the package in a folder."""
  linter = pathlib.Path(sys.executable).with_name('lint-imports')
  done = subprocess.run(
    [linter, '--no-logo', '--no-cache', *options], cwd=folder, capture_output=True, text=True, check=False
  )
  return done.returncode, ' '.join((done.stdout + done.stderr).split())


@pytest.fixture
def copy(tmp_path):
  """A copy of the package and its contracts, to breach them in."""
  ignored = shutil.ignore_patterns('__pycache__')
  shutil.copytree(PACKAGE, tmp_path / 'alexnet_flax', ignore=ignored)
  shutil.copy(ROOT / 'pyproject.toml', tmp_path)
  return tmp_path


def test_contracts_hold():
  code, output = lint(ROOT)
  assert code == 0, output


@pytest.mark.parametrize(
  ('contract', 'module', 'line'),
  [
    ('layers', 'losses', 'from alexnet_flax.weights import load_weights'),  # up
    ('layers', 'metrics', 'def later():\n  import alexnet_flax.cli.main'),  # up, inside a function
    ('layers', 'optim', 'from alexnet_flax.data import views'),  # sideways
    ('layers', 'training.loop', 'from alexnet_flax.viz import report'),
    ('layers', 'losses', 'import alexnet_flax'),  # up, by way of the public names
    ('layers', 'extra', ''),  # a module without a place
    ('data', 'data.augment', 'from alexnet_flax.models.alexnet import AlexNet'),
    ('models', 'models.surgery', 'import cv2'),
    ('tensorflow', 'training.logger', 'import tensorflow as tf'),
    ('tensorflow', 'training.experiment', 'import tensorflow_datasets as tfds'),
    ('names', 'viz.charts', 'from alexnet_flax import VARIANTS'),
  ],
)
def test_a_breach_is_caught(copy, contract, module, line):
  with (copy / 'alexnet_flax' / (module.replace('.', '/') + '.py')).open('a') as file:
    file.write(f'\n{line}\n')
  code, output = lint(copy, '--contract', contract)
  assert code == 1, output
  assert '0 kept, 1 broken' in output or 'Missing layers' in output
  assert f'alexnet_flax.{module}' in output or module in output


def loaded(folder):
  """The heavy packages that the public names of the package in a folder load."""
  script = 'from alexnet_flax import *; import alexnet_flax, sys; print(alexnet_flax.__file__, *sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', script], cwd=folder, capture_output=True, text=True, check=True
  )
  file, *names = done.stdout.split()
  assert pathlib.Path(file).parents[1] == folder
  return set(HEAVY.split()) & set(names)


def test_the_import_is_light():
  assert loaded(ROOT) == set()


def test_a_heavy_import_is_caught(copy):
  with (copy / 'alexnet_flax/losses.py').open('a') as file:
    file.write('\nimport PIL\n')
  assert loaded(copy) == {'PIL'}


def test_the_root_is_small():
  assert len(list(PACKAGE.glob('*.py'))) <= 11


def test_modules_are_short_and_named_for_their_subjects():
  lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in MODULES}
  assert {name: count for name, count in lines.items() if count > 400} == {}
  assert not {'utils', 'helpers', 'common', 'misc', 'manager'} & {path.stem for path in MODULES}


def test_public_names():
  assert sorted(alexnet_flax.__all__) == sorted(PUBLIC.split())
  for name in alexnet_flax.__all__:
    assert getattr(alexnet_flax, name) is not None
  with pytest.raises(AttributeError, match='No alexnet_flax attribute picture'):
    alexnet_flax.picture  # noqa: B018


def test_what_tests_share_is_in_their_helpers():
  for path in pathlib.Path('tests').rglob('*.py'):
    imported = re.findall(r'^from (tests\.[\w.]*test_\w+) import', path.read_text('utf-8'), re.M)
    assert {*imported} <= {'.'.join(path.with_suffix('').parts)}, (
      path
    )  # a program in a test may be its own file
