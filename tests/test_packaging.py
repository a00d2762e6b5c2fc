"""What is installed: extras and the modules that need them, and a bare environment."""

import ast
import email
import importlib.metadata
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile

import numpy as np
import pytest

import alexnet_flax
from alexnet_flax import errors
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.training.trackers import TRACKERS
from alexnet_flax.weights.layout import variable_shapes, variables_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
DISTRIBUTIONS = importlib.metadata.packages_distributions()
MODULES = {extra: modules.split() for extra, modules in errors._EXTRAS.items()}

CLASSIFY = """
import sys
import jax
import numpy as np
from alexnet_flax import AlexNet, VARIANTS, load_pretrained

image = np.zeros([67, 67, 3], np.uint8)
model = AlexNet(VARIANTS['paper'].scaled(1 / 16), num_classes=10)
logits, _ = model.init_with_output(jax.random.key(0), image[None] / 255, train=False)
[[best, *_]] = load_pretrained('weights.safetensors').classify([image])
print(logits.shape, best.label)
"""
COMMAND = """
import sys
sys.path[:0] = sys.argv[1:2]
from alexnet_flax.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def distribution(requirement):
  """The normalised name of the distribution that a requirement asks for."""
  return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()


OF_CHOICE = {'torch', *TRACKERS}  # not in `all`
CORE = {distribution(line) for line in PROJECT['dependencies']}
EXTRAS = {
  extra: {distribution(line) for line in lines} for extra, lines in PROJECT['optional-dependencies'].items()
}


def providers(module):
  """The distributions that install a module."""
  names = DISTRIBUTIONS.get(module, [module])
  return {distribution(name) for name in names}


@pytest.mark.parametrize('extra', MODULES)
def test_an_extra_installs_what_the_message_says(extra):
  for module in MODULES[extra]:
    assert providers(module) & EXTRAS[extra], module


def test_every_import_is_declared():
  known = {module for modules in MODULES.values() for module in modules}
  for path in sorted((ROOT / 'alexnet_flax').rglob('*.py')):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f'{path}: a relative import'
        names = [node.module]
      else:
        continue
      for module in {name.partition('.')[0] for name in names} - {'alexnet_flax'} - sys.stdlib_module_names:
        assert providers(module) & CORE or module in known, f'{path} imports {module}'


def test_all_is_all_but_torch_trackers_and_accelerators():
  (line,) = PROJECT['optional-dependencies']['all']
  included = set(re.search(r'\[(.*)\]', line)[1].split(','))
  assert included == set(MODULES) - OF_CHOICE
  assert set(PROJECT['optional-dependencies']) == {*(*MODULES, 'all', 'cuda', 'tpu', 'dev', 'docs', 'peers')}


@pytest.mark.parametrize('lock', sorted((ROOT / 'requirements').glob('*.txt')), ids=lambda path: path.stem)
def test_locks_hold_hashes_and_no_address(lock):
  text = lock.read_text()
  assert '://' not in text
  pins = re.findall(r'^([\w.-]+)==\S+ (?:;.*)?\\\n    --hash=sha256:', text, re.M)
  assert len(pins) == len(re.findall(r'^\S', text, re.M))
  assert {distribution(pin) for pin in pins} >= CORE
  if lock.stem != 'docs':
    names = {distribution(pin) for pin in pins}
    assert all(EXTRAS[extra] - {'tensorflow-cpu'} <= names for extra in MODULES if extra not in OF_CHOICE)


def test_the_version_is_one():
  assert alexnet_flax.__version__ == PROJECT['version']
  assert f'version: {PROJECT["version"]}\n' in (ROOT / 'CITATION.cff').read_text()
  assert f'## [{PROJECT["version"]}]' in (ROOT / 'CHANGELOG.md').read_text()


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """The built wheel."""
  folder = tmp_path_factory.mktemp('wheel')
  pip(sys.executable, 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', folder, ROOT)
  return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def bare(wheel, tmp_path_factory):
  """The Python of an environment with the wheel and the core dependencies, of the pinned versions."""
  folder = tmp_path_factory.mktemp('bare')
  subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder / 'venv'], check=True)
  pins = re.findall(r'^\S+==[^\\\n]+', (ROOT / 'requirements/dev.txt').read_text(), re.M)
  (folder / 'pins.txt').write_text('\n'.join(pins))
  python = folder / 'venv/bin/python'
  pip(python, 'install', '--no-compile', '--only-binary=:all:', '--constraint', folder / 'pins.txt', wheel)
  return python


def pip(python, *arguments):
  """Runs this environment's pip for another Python."""
  command = [sys.executable, '-m', 'pip', '--python', python, *arguments]
  done = subprocess.run(
    [*command, '--quiet', '--disable-pip-version-check'], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


def outcome(python, *arguments, cwd):
  """The exit code and the output of a Python that knows nothing of this checkout."""
  environment = {
    key: value for key, value in os.environ.items() if not key.startswith(('PYTHON', 'VIRTUAL_ENV'))
  }
  done = subprocess.run(
    [python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
  )
  return done.returncode, done.stdout + done.stderr


def test_the_wheel_has_its_data_and_its_addresses(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    metadata = email.message_from_bytes(
      archive.read(next(name for name in names if name.endswith('METADATA')))
    )
  assert 'alexnet_flax/py.typed' in names
  assert {
    f'alexnet_flax/viz/templates/{path.name}' for path in (ROOT / 'alexnet_flax/viz/templates').iterdir()
  } <= set(names)
  assert {name.partition('/')[0] for name in names} == {
    'alexnet_flax',
    wheel.name.replace('-py3-none-any.whl', '.dist-info'),
  }
  labels = {line.partition(',')[0] for line in metadata.get_all('Project-URL')}
  assert labels == {'Homepage', 'Repository', 'Documentation', 'Changelog', 'Issues'}


def test_a_bare_environment_classifies(bare, tmp_path):
  spec = VARIANTS['torchvision'].scaled(1 / 16, 67)
  tensors = {name: np.zeros(shape, np.float32) for name, shape in variable_shapes(spec).items()}
  tensors['params/fc8/bias'][282] = 1
  alexnet_flax.save_weights(tmp_path / 'weights.safetensors', spec, variables_of(tensors))
  assert outcome(bare, '-W', 'error', '-c', CLASSIFY, cwd=tmp_path) == (0, '(1, 10) 282\n')


@pytest.mark.parametrize('checkout', [False, True], ids=['index', 'clone'])
def test_a_missing_extra_is_named_with_the_line_that_installs_it(bare, tmp_path, checkout):
  path = str(ROOT) if checkout else ''
  code, output = outcome(bare, '-c', COMMAND, path, 'predict', 'a.safetensors', 'b.jpg', cwd=tmp_path)
  assert code == 2
  (line,) = output.splitlines()
  command = shlex.split(line.partition('pip install ')[2])
  assert command == (['-e', f'{ROOT}[train]'] if checkout else ['alexnet_flax[train]'])
